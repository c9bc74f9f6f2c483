//! A guest: what it sees, and what its vCPUs have in their registers.

use cpuid_amx::{Entry, Table};
use xsave_state::{ExtendedState, XFeatures};

use super::reason::Usage;
use crate::host::Host;
use crate::msrs::FeatureMsrs;

/// A guest, as far as it is known. What is not known is not compared, and the answer says so.
#[derive(Clone, Copy, Debug, Default)]
pub struct Guest<'a> {
    pub(super) cpuid: Option<&'a Table>,
    pub(super) entries: Option<&'a [Entry]>,
    pub(super) states: &'a [ExtendedState<'a>],
    pub(super) feature_msrs: FeatureMsrs,
    pub(super) tsc_khz: Option<u32>,
    pub(super) relayout: bool,
    xss: Option<XFeatures>,
    xcr0_is_guessed: bool,
}

impl<'a> Guest<'a> {
    /// A guest with this CPUID that has not started.
    #[must_use]
    pub fn new(cpuid: &'a Table) -> Self {
        Self {
            cpuid: Some(cpuid),
            ..Self::default()
        }
    }

    /// All entries of its CPUID in the order in which its VMM passes them to KVM. A [`Table`] has only what
    /// the guest sees; contradictions are looked for in all.
    #[must_use]
    pub const fn listed(mut self, entries: &'a [Entry]) -> Self {
        self.entries = Some(entries);
        self
    }

    /// A guest that has not started, and would get all that a host has; `None` without KVM.
    #[must_use]
    pub fn of_host(host: &'a Host) -> Option<Self> {
        let kvm = host.kvm.as_ref().ok()?;
        Some(Self::new(host.guest_cpuid()?).feature_msrs(kvm.feature_msrs))
    }

    /// A guest that runs, of which only the states of its vCPUs are known.
    #[must_use]
    pub fn from_states(states: &'a [ExtendedState<'a>]) -> Self {
        Self::default().running(states)
    }

    /// The guest has started, and these are the states of its vCPUs.
    #[must_use]
    pub const fn running(mut self, states: &'a [ExtendedState<'a>]) -> Self {
        self.states = states;
        self
    }

    /// IA32_XSS, of all its vCPUs together.
    #[must_use]
    pub const fn xss(mut self, xss: XFeatures) -> Self {
        self.xss = Some(xss);
        self
    }

    /// Says that XCR0 in the states is no more than a guess.
    #[must_use]
    pub const fn with_guessed_xcr0(mut self) -> Self {
        self.xcr0_is_guessed = true;
        self
    }

    /// The values of MSRs that say what a processor can do.
    #[must_use]
    pub const fn feature_msrs(mut self, msrs: FeatureMsrs) -> Self {
        self.feature_msrs = msrs;
        self
    }

    /// The frequency of its TSC in kHz.
    #[must_use]
    pub const fn tsc_khz(mut self, khz: Option<u32>) -> Self {
        self.tsc_khz = khz;
        self
    }

    /// Lets the guest go on where components lie at other places, with its states moved into that
    /// layout. Only for guests known not to use the standard format with places that they have read
    /// from CPUID: Linux does, for its signal frames (arch/x86/kernel/fpu/signal.c).
    #[must_use]
    pub const fn with_relayout(mut self) -> Self {
        self.relayout = true;
        self
    }

    pub(super) const fn has_started(&self) -> bool {
        !self.states.is_empty()
    }

    /// Of a feature that the guest can use without enabling anything.
    pub(super) const fn seen(&self) -> Usage {
        if self.has_started() {
            Usage::Seen
        } else {
            Usage::NotStarted
        }
    }

    /// Of what needs all of these components of XCR0.
    pub(super) fn usage(&self, components: XFeatures) -> Usage {
        if !self.has_started() {
            return Usage::NotStarted;
        }
        let enabled = |state: &ExtendedState<'_>| state.registers().xcr0;
        let in_use = |state: &ExtendedState<'_>| state.image().xstate_bv();
        let enabled: XFeatures = self.states.iter().map(enabled).collect();
        let in_use: XFeatures = self.states.iter().map(in_use).collect();
        let is_known = !self.xcr0_is_guessed;
        if enabled.contains(components) && is_known {
            Usage::Enabled
        } else if !(enabled | in_use).contains(components) {
            Usage::NotEnabled
        } else if is_known || in_use.contains(components) {
            Usage::InUse
        } else {
            Usage::NotKnown
        }
    }

    /// Of components of IA32_XSS, which is not part of the states.
    pub(super) fn supervisor_usage(&self, components: XFeatures) -> Usage {
        match self.xss {
            _ if !self.has_started() => Usage::NotStarted,
            None => Usage::NotKnown,
            Some(xss) if xss.intersects(components) => Usage::Enabled,
            Some(_) => Usage::NotEnabled,
        }
    }
}

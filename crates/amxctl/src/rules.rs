//! What keeps a vCPU from being restored as its file has it: broken rules, open questions, and what is
//! worth knowing.
//!
//! The rules of the area and its registers are those of [`xsave_state::sanitize`]: each of its changes
//! is one that is broken. Beside them stand what only a whole file can break: see [`Rule`].

use xsave_state::format::{EXTENDED_OFFSET, INITIAL_FCW};
use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::sanitize::{Change, SanitizeError, UntrustedArea, sanitize};
use xsave_state::{ComponentId, ExtendedState, Image, Losses, Misfit, Registers, XFeatures};

use crate::bytes;
use crate::supervisor;
use crate::vcpu::{InvalidState, Subject};

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Rule {
    /// The guest's CPUID describes an area that can exist, and no entry hides another.
    Cpuid,
    /// The area is as long as its CPUID requires.
    Length,
    /// The components lie where they are looked for.
    Layout,
    /// XCOMP_BV is 0: the standard format.
    Format,
    /// The reserved bytes of the legacy region and of the header are 0.
    Reserved,
    /// XSTATE_BV is within CPUID.
    Components,
    /// Components that are initial have no bytes that a restore ignores.
    InitialBytes,
    /// MXCSR has only bits that the processor has.
    Mxcsr,
    /// TILECFG is one that LDTILECFG accepts, or initial.
    TileConfig,
    /// XCR0 is listed, and a value that XSETBV accepts.
    Xcr0,
    /// IA32_XFD and IA32_XFD_ERR have one value each, with only components that can be disabled.
    Xfd,
    /// No component is in use and disabled.
    XfdInUse,
    /// The file lists the MSRs that hold the guest's other extended state.
    Msrs,
}

impl Rule {
    /// All rules, in the order in which they are reported.
    pub const ALL: [Self; 13] = [
        Self::Cpuid,
        Self::Length,
        Self::Layout,
        Self::Format,
        Self::Reserved,
        Self::Components,
        Self::InitialBytes,
        Self::Mxcsr,
        Self::TileConfig,
        Self::Xcr0,
        Self::Xfd,
        Self::XfdInUse,
        Self::Msrs,
    ];

    /// Returns its name for machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpuid => "cpuid",
            Self::Length => "length",
            Self::Layout => "layout",
            Self::Format => "format",
            Self::Reserved => "reserved",
            Self::Components => "components",
            Self::InitialBytes => "initial_bytes",
            Self::Mxcsr => "mxcsr",
            Self::TileConfig => "tile_config",
            Self::Xcr0 => "xcr0",
            Self::Xfd => "xfd",
            Self::XfdInUse => "xfd_in_use",
            Self::Msrs => "msrs",
        }
    }

    /// Returns what it is about, in a few words.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Cpuid => "CPUID of the guest",
            Self::Length => "length of the area",
            Self::Layout => "layout",
            Self::Format => "standard format",
            Self::Reserved => "reserved bytes",
            Self::Components => "XSTATE_BV within CPUID",
            Self::InitialBytes => "initial components",
            Self::Mxcsr => "MXCSR within its mask",
            Self::TileConfig => "TILECFG is loadable",
            Self::Xcr0 => "XCR0",
            Self::Xfd => "XFD within CPUID",
            Self::XfdInUse => "XSTATE_BV & XFD = 0",
            Self::Msrs => "MSRs of the guest",
        }
    }

    /// Returns what happens when a state that breaks it is restored all the same.
    #[must_use]
    pub const fn danger(self) -> &'static str {
        match self {
            Self::Cpuid => "the guest finds other places and sizes than its area has",
            Self::Length => {
                "KVM copies as many bytes as the vCPU's CPUID requires, whatever is there: a VMM that \
                 restores this gives the guest what lies behind its buffer. A length check before \
                 KVM_SET_XSAVE protects (xsave-state: Image::parse)"
            }
            Self::Layout => "the guest finds other registers' values in its registers",
            // arch/x86/kernel/fpu/xstate.c, validate_user_xstate_header and copy_uabi_to_xstate.
            Self::Format => "KVM_SET_XSAVE refuses it with EINVAL",
            Self::Reserved => {
                "KVM_SET_XSAVE refuses it with EINVAL where it is in the header, and does not look at \
                 bytes 416 to 463"
            }
            Self::Components => {
                "KVM_SET_XSAVE accepts it where the host has the component and the vCPU's area a place \
                 for it, whatever the guest's CPUID says, and refuses it with EINVAL elsewhere: whether \
                 the guest comes up depends on the host"
            }
            Self::InitialBytes => "KVM ignores the bytes",
            Self::Mxcsr => {
                "KVM_SET_XSAVE refuses it with EINVAL where x87, SSE or AVX is in use, and does not \
                 look at it where none of them is"
            }
            Self::TileConfig => {
                "the processor drops it without a fault, and the guest finds its tiles unconfigured"
            }
            Self::Xcr0 => {
                "KVM_SET_XCRS fails with EINVAL, or leaves XCR0 at 1 where the file does not list it: the \
                 guest then faults at its next instruction of a component that it has enabled"
            }
            Self::Xfd => "KVM_SET_MSRS does not set it, or not to the value that was checked",
            Self::XfdInUse => {
                "a host that loads this state raises #NM in its own kernel, and can go down with all \
                 its guests. Setting IA32_XFD before the state, and refusing or clearing such a \
                 component, protects (xsave-state: ExtendedState::new, sanitize)"
            }
            Self::Msrs => {
                "the guest goes on with the values after reset, and fails when it relies on its own"
            }
        }
    }
}

/// What a finding means for a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The rule is broken: the state must not be restored as it is.
    Broken,
    /// Whether the rule holds is not known without this option of amxctl.
    Unknown {
        /// The option that tells.
        option: &'static str,
    },
    /// It does not keep the state from being restored.
    Note,
}

/// A rule and what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What it is about.
    pub rule: Rule,
    /// What it means for a restore.
    pub verdict: Verdict,
    /// What was found and what was expected, with the values.
    pub values: String,
    /// Whether `amxctl convert` writes a state without it that is the same for the guest.
    pub is_mendable: bool,
}

impl Finding {
    pub(crate) fn broken(rule: Rule, values: String) -> Self {
        Self::new(rule, Verdict::Broken, values)
    }

    pub(crate) fn unknown(rule: Rule, option: &'static str, values: String) -> Self {
        Self::new(rule, Verdict::Unknown { option }, values)
    }

    pub(crate) fn note(rule: Rule, values: String) -> Self {
        Self::new(rule, Verdict::Note, values)
    }

    fn new(rule: Rule, verdict: Verdict, values: String) -> Self {
        Self {
            rule,
            verdict,
            values,
            is_mendable: false,
        }
    }
}

/// Returns everything that is broken, open or worth knowing, in the order of [`Rule::ALL`]. Nothing: the
/// state can be restored as it is.
#[must_use]
pub fn check(subject: &Subject) -> Vec<Finding> {
    let mut found = subject.findings.clone();
    if let Some(cpuid) = &subject.cpuid {
        // What has made it invalid is said there.
        if found.iter().all(|one| one.rule != Rule::Cpuid) {
            let hidden = cpuid.hidden_entries();
            found.extend(hidden.map(|one| Finding::note(Rule::Cpuid, one.to_string())));
        }
        let lost = supervisor::missing(&subject.listed, &cpuid.table, &subject.layout.value);
        found.extend(lost);
    }
    if subject.other_layout.is_some() {
        found.push(Finding::unknown(
            Rule::Layout,
            "--cpuid",
            "two fit, which have components at different places; the guest's CPUID tells: give it with \
             --cpuid"
                .to_owned(),
        ));
    }
    area(subject, &mut found);
    initial_bytes(subject, &mut found);
    found.sort_by_key(|finding| finding.rule);
    found
}

/// The area and its registers, as sanitize judges them.
fn area(subject: &Subject, found: &mut Vec<Finding>) {
    let layout = &subject.layout.value;
    let judge = |area: &[u8]| sanitize(&subject.untrusted_like(area), layout, Losses::all());
    let sanitized = judge(&subject.area).or_else(|error| {
        let rule = match error {
            SanitizeError::TooShort { .. } | SanitizeError::Truncated { .. } => Rule::Length,
            SanitizeError::PlaceUnknown { .. } | SanitizeError::WithoutPlace { .. } => Rule::Format,
            _ => Rule::Components,
        };
        found.push(Finding::broken(rule, error.to_string()));
        // What else is wrong, as far as the area can be read.
        let mut whole = subject.area.clone();
        if rule == Rule::Length {
            whole.resize(MAX_AREA_BYTES, 0);
        } else {
            whole.clear();
            whole.resize(EXTENDED_OFFSET, 0);
        }
        judge(&whole)
    });
    let Ok(sanitized) = sanitized else {
        return;
    };
    for change in sanitized.report.changes() {
        // It is known to be short.
        let is_short = matches!(change, Change::Extended { .. });
        if is_short && found.iter().any(|one| one.rule == Rule::Length) {
            continue;
        }
        let (rule, values) = words(change, subject);
        let verdict = match change {
            Change::OverReported { .. } => Verdict::Note,
            _ => Verdict::Broken,
        };
        found.push(Finding {
            is_mendable: change.loss().is_empty(),
            ..Finding::new(rule, verdict, values)
        });
    }
}

/// A change of sanitize, as the rule that makes it necessary.
fn words(change: &Change, subject: &Subject) -> (Rule, String) {
    let layout = &subject.layout.value;
    let Registers { xfd, .. } = subject.registers();
    let missing = |component: &ComponentId| {
        let values = format!("{component} is in use; CPUID has {}", layout.user());
        (Rule::Components, values)
    };
    let disabled = |component: &ComponentId| {
        let values = format!("{component} is in use, and IA32_XFD ({xfd}) disables it");
        (Rule::XfdInUse, values)
    };
    match change {
        Change::Compacted { xcomp_bv } => {
            let reason = Image::from_compacted(&subject.area, layout).err();
            let more = reason.map_or_else(
                || format!("with places for {xcomp_bv}"),
                |error| format!("and not a valid one: {error}"),
            );
            let values = format!("XCOMP_BV has bit 63: the compacted format, {more}");
            (Rule::Format, values)
        }
        Change::XcompBv { was } => (
            Rule::Format,
            format!("XCOMP_BV is {was:#x}; it must be 0 in the standard format"),
        ),
        Change::Bit63 => (
            Rule::Components,
            "XSTATE_BV has bit 63, which is no component".to_owned(),
        ),
        Change::Reserved {
            offset,
            was,
            nonzero_bytes,
        } => (
            Rule::Reserved,
            format!("byte {offset} is {was:#04x}, and must be 0 ({nonzero_bytes} in this region)"),
        ),
        Change::Extended {
            actual_bytes,
            required_bytes,
        } => (
            Rule::Length,
            format!("{actual_bytes} bytes; its CPUID requires {required_bytes}"),
        ),
        Change::UnusedMxcsr { was: mxcsr, mask } | Change::Lost(Misfit::Mxcsr { mxcsr, mask }) => {
            (Rule::Mxcsr, format!("{mxcsr:#x}; the mask is {mask:#x}"))
        }
        Change::OverReported { component } => (
            Rule::Components,
            format!(
                "{component} is in use, and the guest's CPUID lacks it: kernels before 6.6 report it so. \
                 The guest has never had it, and nothing is lost without it"
            ),
        ),
        Change::Dropped { component } | Change::Lost(Misfit::Missing { component })
            if !layout.user().contains(component.bit()) =>
        {
            missing(component)
        }
        Change::Dropped { component } | Change::Lost(Misfit::Disabled { component, .. }) => {
            disabled(component)
        }
        Change::Lost(Misfit::TileConfig { rule }) => (Rule::TileConfig, rule.to_string()),
        Change::Lost(Misfit::Xcr0 { xcr0, .. }) => {
            let legal = xsave_state::xcr0::check(*xcr0, layout.user());
            let values = legal.map_or_else(|error| error.to_string(), |()| xcr0.to_string());
            (Rule::Xcr0, values)
        }
        Change::Lost(Misfit::Xfd { xfd, unsupported }) => (
            Rule::Xfd,
            format!("IA32_XFD is {xfd}; the guest cannot disable {unsupported}"),
        ),
        Change::Lost(Misfit::XfdErr {
            xfd_err,
            unsupported,
        }) => (
            Rule::Xfd,
            format!("IA32_XFD_ERR is {xfd_err}; the guest cannot disable {unsupported}"),
        ),
        other => (Rule::Components, other.to_string()),
    }
}

/// Bytes that are not zero although their component is initial: a restore ignores them.
fn initial_bytes(subject: &Subject, found: &mut Vec<Finding>) {
    let in_use = subject.xstate_bv();
    let initial = (subject.layout.value.user() - in_use).components();
    let ignored = initial.filter_map(|id| {
        let start = subject.place(id)?.start;
        let content = subject.component(id);
        // MXCSR belongs to SSE, and x87 begins with its control word.
        let has_control = matches!(bytes::u16_at(content, 0), 0 | INITIAL_FCW);
        let counts = |at: usize| match id {
            ComponentId::X87 => !(24..32).contains(&at) && (at >= 2 || !has_control),
            _ => true,
        };
        let bytes = (0..).zip(content);
        let mut there = bytes
            .filter(|(at, byte)| **byte != 0 && counts(*at))
            .map(|(at, _)| start.saturating_add(at));
        let first = there.next()?;
        let last = there.last().unwrap_or(first);
        Some(format!("{id}: bytes {first} to {last}"))
    });
    let ignored: Vec<String> = ignored.collect();
    if !ignored.is_empty() {
        found.push(Finding::note(
            Rule::InitialBytes,
            format!(
                "XSTATE_BV says that these components are initial, and their bytes are not zero: a restore \
                 ignores them ({})",
                ignored.join("; ")
            ),
        ));
    }
}

impl Subject {
    /// The area with its registers, for [`sanitize`]. Known to be the guest's own are all components but a
    /// PKRU that its CPUID lacks, which kernels before 6.6 report.
    #[must_use]
    pub fn untrusted(&self) -> UntrustedArea<'_> {
        self.untrusted_like(&self.area)
    }

    fn untrusted_like<'a>(&self, area: &'a [u8]) -> UntrustedArea<'a> {
        let own = XFeatures::from_bits_retain(u64::MAX) - self.never_had();
        UntrustedArea::new(area, self.registers()).of_guest_with(own)
    }

    fn never_had(&self) -> XFeatures {
        match self.cpuid {
            Some(_) => XFeatures::PKRU - self.layout.value.user(),
            None => XFeatures::empty(),
        }
    }

    /// The components in use that the guest has never had: see [`Change::OverReported`].
    #[must_use]
    pub fn over_reported(&self) -> XFeatures {
        self.xstate_bv() & self.never_had()
    }

    /// The state as KVM restores it from the area as it is: without components that the guest has never had.
    ///
    /// # Errors
    ///
    /// Those of [`state`](Self::state).
    pub fn restorable(&self) -> Result<ExtendedState<'_>, InvalidState> {
        self.state().or_else(|error| {
            let sanitized = sanitize(&self.untrusted(), &self.layout.value, Losses::empty());
            let only_more = |change: &Change| matches!(change, Change::OverReported { .. });
            match sanitized {
                Ok(sanitized) if sanitized.report.changes().iter().all(only_more) => {
                    Ok(sanitized.state)
                }
                _ => Err(error),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What KVM does with each of the areas that it is given: tests/kvm_live.rs.
    #[test]
    fn each_rule_has_a_danger_of_its_own() {
        let mut said: Vec<_> = Rule::ALL.into_iter().map(Rule::danger).collect();
        said.sort_unstable();
        said.dedup();
        assert_eq!(said.len(), Rule::ALL.len());
    }
}

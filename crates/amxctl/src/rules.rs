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
pub use crate::finding::{Finding, Rule, Verdict};
use crate::supervisor;
use crate::vcpu::{Doubt, InvalidState, Subject};

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
        let xss = subject.xss.as_ref().map(|xss| xss.value);
        let layout = &subject.layout.value;
        found.extend(supervisor::missing(
            &subject.listed,
            xss,
            &cpuid.table,
            layout,
        ));
    }
    if let Some(doubt) = &subject.doubt {
        found.push(Finding::unknown(Rule::Layout, "--cpuid", doubt.to_string()));
    }
    if !matches!(subject.doubt, Some(Doubt::NoneFits(_))) {
        area(subject, &mut found);
        initial_bytes(subject, &mut found);
    }
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
            format!("{actual_bytes} bytes; its layout requires {required_bytes}"),
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

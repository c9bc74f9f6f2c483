//! What an update of a kernel, of firmware or of a hypervisor below did to a host: two descriptions of it
//! compared, and which running guests it would strand.

use xsave_state::XFeatures;

use crate::compat::{self, Guest, NotCompared, Reason};
use crate::host::Host;
use crate::kernel::{Fix, State};

/// What differs between two descriptions of a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Changes {
    /// Kernel releases before and after, where they differ.
    pub kernels: Option<[String; 2]>,
    /// What guests could have before and cannot after, or have at another place.
    pub lost: Vec<Lost>,
    /// What they can have after and could not before.
    pub gained: Vec<Reason>,
    /// Fixes whose state differs, before and after.
    pub fixes: Vec<(&'static Fix, State, State)>,
    /// What was not compared.
    pub not_compared: Vec<NotCompared>,
    /// Whether one of the two has no KVM: nothing else was compared then.
    pub undescribed: bool,
}

/// One thing that guests cannot have any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lost {
    /// What a guest from before would lack.
    pub reason: Reason,
    /// Which guests of before cannot run after.
    pub strands: Strands,
}

/// Which running guests depend on something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Strands {
    /// Every one that has seen it in its CPUID.
    Seen,
    /// Those that have enabled these components in XCR0 or IA32_XSS.
    Enabled(XFeatures),
}

/// Compares two descriptions of a host.
///
/// ```
/// use cpuid_amx::{Policy, Table};
/// use host_compat::{Host, update};
///
/// let before: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let mut after = before.clone();
/// Policy::hide_amx().apply(&mut after)?;
/// let (before, after) = (Host::from_cpuid("node", before), Host::from_cpuid("node", after));
/// let changes = update::changes(&before, &after);
/// assert!(!changes.lost.is_empty());
/// assert_eq!(changes.gained, []);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn changes(before: &Host, after: &Host) -> Changes {
    let release = |host: &Host| host.kernel.as_ref().map(|kernel| kernel.release.clone());
    let kernels = release(before).zip(release(after));
    let states = before.fixes().zip(after.fixes());
    let fixes = states.map(|((fix, before), (_, after))| (fix, before, after));
    let forth = Guest::of_host(before).map(|guest| compat::check(guest, after));
    let back = Guest::of_host(after).map(|guest| compat::check(guest, before));
    let mut not_compared = forth
        .as_ref()
        .map_or_else(Vec::new, |found| found.not_compared.clone());
    for one in back.iter().flat_map(|found| &found.not_compared) {
        if !not_compared.contains(one) {
            not_compared.push(one.clone());
        }
    }
    let undescribed = forth.is_none() || back.is_none();
    let lost = forth
        .map_or_else(Vec::new, |found| found.reasons)
        .into_iter();
    // What has moved is among what is lost.
    let moved = |reason: &Reason| matches!(reason, Reason::Elsewhere { .. });
    let gained = back
        .map_or_else(Vec::new, |found| found.reasons)
        .into_iter();
    Changes {
        kernels: kernels
            .filter(|(before, after)| before != after)
            .map(|(before, after)| [before, after]),
        lost: lost
            .map(|reason| Lost {
                strands: strands(&reason),
                reason,
            })
            .collect(),
        gained: gained.filter(|reason| !moved(reason)).collect(),
        fixes: fixes.filter(|(_, before, after)| before != after).collect(),
        not_compared,
        undescribed,
    }
}

fn strands(reason: &Reason) -> Strands {
    let needs = match reason {
        Reason::Feature { feature, .. } => feature.needs(),
        Reason::Component { sees, .. } | Reason::Elsewhere { sees, .. } => sees.id.bit(),
        Reason::Permission { .. } => XFeatures::AMX,
        Reason::Bits { bits, .. } => match bits.by_component().collect::<Vec<_>>()[..] {
            [(needs, _)] => needs,
            _ => XFeatures::empty(),
        },
        _ => XFeatures::empty(),
    };
    // XSAVE itself, and what nothing has to be enabled for.
    if XFeatures::LEGACY.contains(needs) {
        Strands::Seen
    } else {
        Strands::Enabled(needs)
    }
}

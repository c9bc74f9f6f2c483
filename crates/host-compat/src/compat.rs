//! Whether a guest can go on, or start, on another host: every reason why not, what would help, and what
//! was not compared.
//!
//! What counts is what the guest can rely on. A guest that runs has read CPUID when it started, and
//! nobody can take that back: it chose its instructions by it, and places of components for the
//! standard format of its signal frames. Only a component that it has not enabled, and what needs one,
//! can still be hidden from it. A guest that has not started can be given less.

use cpuid_amx::coherence::{self, Contradiction};
use cpuid_amx::features::{ComponentShape, Feature, FeatureSet};
use cpuid_amx::{CpuidTable, Policy, Table};
use xsave_state::{ComponentId, Layout, LayoutError, Losses, RelocateError, XFeatures};

use crate::host::{Host, NoKvm, Permission};
use crate::msrs::{self, FeatureMsrs};
use crate::registers::{self, Missing};
use crate::restrict::restrict;

mod guest;
mod reason;
mod verdict;

pub use guest::Guest;
pub use reason::{NotCompared, Reason, Usage};
pub use verdict::{Compatibility, Remedy, Verdict};

/// Compares a guest with a host.
///
/// ```
/// use cpuid_amx::{Policy, Table};
/// use host_compat::compat::{self, Guest, Verdict};
/// use host_compat::Host;
/// use xsave_state::{ExtendedState, Layout};
///
/// # use cpuid_amx::CpuidTable;
/// let table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let mut older = table.clone();
/// Policy::hide_amx().apply(&mut older)?;
/// let older = Host::from_cpuid("older", older);
///
/// // It sees AMX. After reset it has not enabled it: hidden, it can go there.
/// let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))?;
/// let states = [ExtendedState::reset(&layout)];
/// let compatibility = compat::check(Guest::new(&table).running(&states), &older);
/// assert_eq!(compatibility.verdict(), Verdict::RunsAfter { relayout: false, hide: true });
/// for reason in &compatibility.reasons {
///     println!("{reason}");
/// }
/// // What it sees then.
/// let hidden = compatibility.hidden.ok_or("nothing can be hidden")?;
/// assert_eq!(hidden.leaf(0xd, 0)[0], 0x2e7);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn check(guest: Guest<'_>, host: &Host) -> Compatibility {
    let mut found = Found::default();
    match &host.kvm {
        Ok(_) => {}
        Err(error @ (NoKvm::NoAccess | NoKvm::Failed { .. })) => {
            found.not_compared.push(NotCompared::Host(error.clone()));
        }
        Err(error) => found.reasons.push(Reason::NoKvm(error.clone())),
    }
    let there = host.guest_features();
    if host.kvm.is_ok() {
        match guest.cpuid {
            Some(cpuid) => cpuid_of(&guest, cpuid, host, &there, &mut found),
            None => {
                found.not_compared.push(NotCompared::GuestCpuid);
                places(&guest, &there, &mut found);
            }
        }
        feature_msrs(&guest, host, &mut found);
        tsc(&guest, host, &mut found);
        extended_states(&guest, host, &there, &mut found);
    }
    let unknown = host.unknown.iter().cloned();
    found.not_compared.extend(unknown.map(NotCompared::Unknown));
    found.finish(&guest, host)
}

/// What there is to say so far.
#[derive(Default)]
struct Found {
    reasons: Vec<Reason>,
    not_compared: Vec<NotCompared>,
    contradictions: Vec<Contradiction>,
}

impl Found {
    fn finish(self, guest: &Guest<'_>, host: &Host) -> Compatibility {
        let Self {
            mut reasons,
            not_compared,
            contradictions,
        } = self;
        let kvm = host.kvm.as_ref();
        let hides = kvm.is_ok_and(|kvm| kvm.rewritten.is_none());
        let hidden = guest.cpuid.filter(|_| hides).and_then(|cpuid| {
            let mut hidden = cpuid.clone();
            match restrict(&mut hidden, std::slice::from_ref(host)) {
                Ok(()) => Some(hidden),
                Err(error) => {
                    // Not known to be possible.
                    reasons.push(Reason::NotWhole(error));
                    None
                }
            }
        });
        Compatibility {
            reasons,
            not_compared,
            contradictions,
            hidden,
            relayout: guest.relayout,
        }
    }
}

/// All that the guest sees in CPUID.
fn cpuid_of(guest: &Guest<'_>, cpuid: &Table, host: &Host, there: &FeatureSet, found: &mut Found) {
    let own = match guest.entries {
        Some(entries) => coherence::check(&entries.to_vec()),
        None => coherence::check(cpuid),
    };
    let own = own.into_iter();
    found.contradictions = own.filter(|own| !own.is_recomputed_by_kvm()).collect();
    let Some(has) = host.coherent_cpuid() else {
        return;
    };
    let vendors = [registers::vendor(cpuid), registers::vendor(&has)];
    if let [guest, host] = &vendors
        && guest != host
    {
        found.reasons.push(Reason::Vendor {
            guest: guest.clone(),
            host: host.clone(),
        });
    }
    // What contradicts itself, no guest can use.
    let sees = FeatureSet::from_cpuid(|leaf, subleaf| cpuid.leaf(leaf, subleaf)).closed();
    if let Permission::Refused(error) = host.permission
        && sees.user().contains(XFeatures::XTILEDATA)
    {
        let usage = guest.usage(XFeatures::AMX);
        found.reasons.push(Reason::Permission { error, usage });
    }
    let lacking = sees.iter().filter(|feature| !there.supports(feature));
    found
        .reasons
        .extend(lacking.map(|feature| lacks(feature, there, guest)));
    let mut coherent = cpuid.clone();
    // To expose all that there is never fails.
    let _ = Policy::expose_all().apply(&mut coherent);
    let missing = registers::missing(&coherent, &has).into_iter();
    let (missing, unknown): (Vec<_>, Vec<_>) =
        missing.partition(|missing| host.tells_leaf(missing.place().leaf));
    let mut unknown: Vec<u32> = unknown.iter().map(|missing| missing.place().leaf).collect();
    unknown.dedup();
    found
        .not_compared
        .extend(unknown.into_iter().map(NotCompared::HostLeaf));
    for missing in missing {
        match missing {
            Missing::Bits(bits) => {
                for (needs, bits) in bits.by_component() {
                    let usage = if needs.is_empty() {
                        guest.seen()
                    } else {
                        guest.usage(needs)
                    };
                    found.reasons.push(Reason::Bits { bits, usage });
                }
            }
            Missing::Number {
                place,
                guest: sees,
                host,
            } => found.reasons.push(Reason::Number {
                place,
                guest: sees,
                host,
                usage: guest.seen(),
            }),
        }
    }
}

/// A feature of XSAVE or AMX that the host does not have as the guest sees it.
fn lacks(feature: Feature, there: &FeatureSet, guest: &Guest<'_>) -> Reason {
    match feature {
        Feature::Component(sees) => component(sees, there, guest),
        // The instructions that a kernel chose when it started.
        _ if feature.needs() == XFeatures::LEGACY => Reason::Feature {
            feature,
            usage: guest.seen(),
        },
        _ => Reason::Feature {
            feature,
            usage: guest.usage(feature.needs()),
        },
    }
}

fn component(sees: ComponentShape, there: &FeatureSet, guest: &Guest<'_>) -> Reason {
    let usage = if sees.supervisor {
        guest.supervisor_usage(sees.id.bit())
    } else {
        guest.usage(sees.id.bit())
    };
    match there.components.get(&sees.id) {
        None => Reason::Component { sees, usage },
        Some(has) => Reason::Elsewhere {
            sees,
            has: *has,
            usage,
        },
    }
}

/// The places of the components that a guest has enabled, where only the layouts of its states tell.
fn places(guest: &Guest<'_>, there: &FeatureSet, found: &mut Found) {
    for (vcpu, state) in (0..).zip(guest.states) {
        let layout = state.layout();
        let enabled = state.registers().xcr0 | state.image().xstate_bv();
        for id in (enabled - XFeatures::LEGACY).components() {
            let Some(sees) = shape(layout, id) else {
                continue;
            };
            if there.components.get(&id) != Some(&sees) {
                let reason = component(sees, there, guest);
                // All vCPUs of a guest have the same.
                if vcpu == 0 || !found.reasons.contains(&reason) {
                    found.reasons.push(reason);
                }
            }
        }
    }
}

fn shape(layout: &Layout, id: ComponentId) -> Option<ComponentShape> {
    let component = layout.component(id)?;
    let bytes = |value: usize| u32::try_from(value).unwrap_or(u32::MAX);
    Some(ComponentShape {
        id,
        size: bytes(component.size()),
        offset: bytes(component.offset()?),
        supervisor: false,
        aligned: component.is_aligned(),
        xfd: layout.xfd().contains(id.bit()),
    })
}

fn feature_msrs(guest: &Guest<'_>, host: &Host, found: &mut Found) {
    let there = host
        .kvm
        .as_ref()
        .map_or(FeatureMsrs::default(), |kvm| kvm.feature_msrs);
    for msr in msrs::ALL {
        // A guest whose CPUID does not name the MSR does not read it.
        if guest.cpuid.is_some_and(|cpuid| !msr.is_enumerated(cpuid)) {
            continue;
        }
        match (msr.value(&guest.feature_msrs), msr.value(&there)) {
            (Some(sees), Some(has)) => {
                let missing = msr.missing(sees, has);
                if missing != 0 {
                    found.reasons.push(Reason::FeatureMsr {
                        name: msr.name,
                        guest: sees,
                        host: has,
                        missing,
                        usage: guest.seen(),
                    });
                }
            }
            (None, _) => found.not_compared.push(NotCompared::GuestMsr(msr.name)),
            (_, None) => found.not_compared.push(NotCompared::HostMsr(msr.name)),
        }
    }
}

/// A guest that starts there starts with that host's frequency.
fn tsc(guest: &Guest<'_>, host: &Host, found: &mut Found) {
    if !guest.has_started() {
        return;
    }
    let there = host.kvm.as_ref().ok().and_then(|kvm| kvm.tsc);
    match (guest.tsc_khz, there) {
        (_, Some(there)) if there.scales => {}
        (Some(guest_khz), Some(there)) if !same_frequency(guest_khz, there.khz) => {
            found.reasons.push(Reason::Tsc {
                guest_khz,
                host_khz: there.khz,
            });
        }
        (Some(_), Some(_)) => {}
        (None, _) => found.not_compared.push(NotCompared::GuestTsc),
        (_, None) => found.not_compared.push(NotCompared::HostTsc),
    }
}

/// Within the 250 ppm up to which KVM does not scale (arch/x86/kvm/x86.c, `tsc_tolerance_ppm`).
fn same_frequency(a_khz: u32, b_khz: u32) -> bool {
    let difference = u64::from(a_khz.abs_diff(b_khz));
    difference.saturating_mul(1_000_000) <= u64::from(a_khz).saturating_mul(250)
}

fn extended_states(guest: &Guest<'_>, host: &Host, there: &FeatureSet, found: &mut Found) {
    if !guest.has_started() {
        return;
    }
    let target = match layout(there, host) {
        Ok(target) => target,
        Err(error) => {
            found.reasons.push(Reason::Layout(error));
            return;
        }
    };
    for (vcpu, state) in (0..).zip(guest.states) {
        match state.relocate(&target, Losses::empty()) {
            Ok(_) => {
                let misfits = state.misfits(&target);
                let misfits = misfits.map(|misfit| Reason::Misfit { vcpu, misfit });
                found.reasons.extend(misfits);
            }
            Err(RelocateError::Lossy { losses }) => {
                let losses = losses.into_iter();
                let losses = losses.map(|loss| Reason::Loss { vcpu, loss });
                found.reasons.extend(losses);
            }
            Err(error) => found.reasons.push(Reason::State { vcpu, error }),
        }
    }
}

/// What the host gives to guests, and its MXCSR mask.
fn layout(there: &FeatureSet, host: &Host) -> Result<Layout, LayoutError> {
    let registers = there.to_table();
    Layout::from_cpuid(|leaf, subleaf| {
        if leaf < 0x4000_0000 {
            registers.leaf(leaf, subleaf)
        } else {
            let table = host.guest_cpuid();
            table.map_or([0; 4], |table| table.leaf(leaf, subleaf))
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frequencies_within_kvm_s_tolerance_are_the_same() {
        for (a, b, same) in [
            (2_000_000, 2_000_000, true),
            (2_000_000, 2_000_500, true),
            (2_000_000, 2_000_501, false),
            (2_000_000, 1_999_499, false),
            (0, 1, false),
            (u32::MAX, 0, false),
        ] {
            assert_eq!(same_frequency(a, b), same, "{a} kHz, {b} kHz");
        }
    }
}

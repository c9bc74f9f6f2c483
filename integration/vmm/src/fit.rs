//! Whether a guest can go on on a host, or every reason why not.
//!
//! What there is to say of the host, `host-compat` says ([`compat::check`]). The other reasons are about
//! what a destination offers ([`Offer`]).

use std::fmt;

use cpuid_amx::{CpuidTable, Table};
use host_compat::FeatureMsrs;
use host_compat::compat::{self, Guest, NotCompared};
use thiserror::Error;
use xsave_state::XFeatures;

use crate::host::Host;
use crate::migration::Offer;
use crate::migration::offer::Candidate;
use crate::snapshot::{Snapshot, VcpuState};

/// SDM Vol. 4, table 2-2.
const MSR_IA32_XSS: u32 = 0xda0;

impl Snapshot {
    /// Compares what the guest sees and has with this host: the extended state of every vCPU, features,
    /// MSRs, the frequency of its TSC, memory and vCPUs.
    ///
    /// # Errors
    ///
    /// All reasons why it cannot go on here.
    pub fn fit(&self, host: &Host) -> Result<(), Unfit> {
        Offer::of(host).check(&Candidate {
            vcpus: &self.vcpus,
            memory_bytes: self.memory.memory_bytes(),
            tsc_khz: self.tsc_khz,
        })
    }
}

/// What host-compat has to say. A feature that the guest sees and does not use is a reason too: nothing
/// is hidden from a guest that moves.
pub(crate) fn reasons(
    vcpus: &[VcpuState],
    tsc_khz: Option<u32>,
    host: &host_compat::Host,
) -> Vec<Reason> {
    // All vCPUs of a guest have the same features.
    let cpuid = vcpus.first().map(|vcpu| vcpu.cpuid.entries());
    let cpuid: Table = cpuid.into_iter().flatten().collect();
    let states: Vec<_> = vcpus.iter().map(|vcpu| vcpu.extended.clone()).collect();
    let mut msrs = FeatureMsrs::default();
    let mut xss = XFeatures::empty();
    for msr in vcpus.iter().flat_map(|vcpu| &vcpu.msrs) {
        msrs.set(msr.index, msr.data);
        if msr.index == MSR_IA32_XSS {
            xss |= XFeatures::from_bits_retain(msr.data);
        }
    }
    let guest = Guest::new(&cpuid)
        .running(&states)
        .xss(xss)
        .feature_msrs(msrs)
        .tsc_khz(tsc_khz);
    let found = compat::check(guest, host);
    let undecided = found.not_compared.into_iter().filter(NotCompared::decides);
    let reasons = found.reasons.into_iter().map(Reason::Host);
    reasons.chain(undecided.map(Reason::NotCompared)).collect()
}

/// A guest cannot go on there.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct Unfit {
    reasons: Vec<Reason>,
}

impl Unfit {
    pub(crate) fn unless_empty(reasons: Vec<Reason>) -> Result<(), Self> {
        if reasons.is_empty() {
            Ok(())
        } else {
            Err(Self { reasons })
        }
    }

    /// Every one of them.
    #[must_use]
    pub fn reasons(&self) -> &[Reason] {
        &self.reasons
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the guest cannot go on there")?;
        let mut separator = ": ";
        for reason in &self.reasons {
            write!(f, "{separator}{reason}")?;
            separator = "; ";
        }
        Ok(())
    }
}

/// One reason why a guest cannot go on on a host.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Reason {
    /// The host lacks something that the guest has or sees.
    #[error("{0}")]
    Host(compat::Reason),
    /// Too little is known of the host.
    #[error("not compared: {0}")]
    NotCompared(NotCompared),
    /// An MSR has a value, and KVM there does not know it.
    #[error("vCPU {vcpu}: MSR {index:#x} is {value:#x}, and KVM there does not have it")]
    Msr {
        /// The vCPU.
        vcpu: u32,
        /// The MSR.
        index: u32,
        /// Its value.
        value: u64,
    },
    /// More vCPUs than a guest has there.
    #[error("the guest has {vcpus} vCPUs; there it has at most {limit}")]
    Vcpus {
        /// The guest's.
        vcpus: u32,
        /// The host's.
        limit: u32,
    },
    /// More memory than a guest has there.
    #[error("the guest has {memory_bytes} bytes of memory; there it has at most {limit_bytes}")]
    Memory {
        /// The guest's.
        memory_bytes: u64,
        /// The host's.
        limit_bytes: u64,
    },
}

impl From<compat::Reason> for Reason {
    fn from(reason: compat::Reason) -> Self {
        Self::Host(reason)
    }
}

#[cfg(test)]
mod tests {
    use cpuid_amx::{AmxFeatures, Feature, Policy, Table};
    use host_compat::compat::{Reason as Compat, Usage};
    use xsave_state::{ComponentId, ExtendedState, Misfit, XFeatures};

    use super::*;
    use crate::snapshot::tests::{cpuid, snapshot};

    /// The snapshot's own processor with other values of some sub-leaves.
    fn host(changes: &[(u32, u32, [u32; 4])]) -> host_compat::Host {
        let mut table: Table = cpuid().entries().collect();
        for (leaf, subleaf, value) in changes {
            table.set_leaf(*leaf, *subleaf, *value).unwrap();
        }
        host_compat::Host::from_cpuid("there", table)
    }

    fn reasons(snapshot: &Snapshot, host: &host_compat::Host) -> Vec<Compat> {
        super::reasons(&snapshot.vcpus, None, host)
            .into_iter()
            .map(|reason| match reason {
                Reason::Host(reason) => {
                    println!("{reason}");
                    reason
                }
                other => panic!("{other}"),
            })
            .collect()
    }

    #[test]
    fn it_fits_where_it_comes_from() {
        assert_eq!(reasons(&snapshot(), &host(&[])), []);
    }

    #[test]
    fn a_host_without_amx_is_told_everything_that_it_lacks() {
        let mut table = host(&[]).guest_cpuid().unwrap().clone();
        Policy::hide_amx().apply(&mut table).unwrap();
        let there = host_compat::Host::from_cpuid("there", table);
        let reasons = reasons(&snapshot(), &there);
        for amx in [AmxFeatures::TILE, AmxFeatures::INT8, AmxFeatures::BF16] {
            let feature = Feature::Amx(amx);
            let usage = Usage::Enabled;
            assert!(reasons.contains(&Compat::Feature { feature, usage }));
        }
        for vcpu in 0..2 {
            for component in [ComponentId::XTILECFG, ComponentId::XTILEDATA] {
                let loss = Misfit::Missing { component };
                assert!(reasons.contains(&Compat::Loss { vcpu, loss }));
            }
        }
    }

    #[test]
    fn a_component_that_lies_elsewhere_is_named() {
        let moved = host(&[(0xd, 9, [8, 2696, 0, 0])]);
        let misfit = Misfit::Offset {
            component: ComponentId::PKRU,
            source_offset: 2688,
            target_offset: 2696,
        };
        let reasons = reasons(&snapshot(), &moved);
        assert!(matches!(
            reasons[0],
            Compat::Elsewhere {
                usage: Usage::Enabled,
                ..
            }
        ));
        let of = |vcpu| Compat::Misfit { vcpu, misfit };
        assert_eq!(reasons[1..], [of(0), of(1)]);
    }

    #[test]
    fn armed_xfd_needs_a_host_that_has_it() {
        let armed = snapshot().map_extended(|extended| {
            let image = extended.image().clone().without(XFeatures::XTILEDATA);
            let registers = extended.registers().with_xfd(XFeatures::XTILEDATA);
            ExtendedState::new(image, registers).unwrap()
        });
        assert_eq!(reasons(&armed, &host(&[])), []);
        // XSAVE features without XFD
        let reasons = reasons(&armed, &host(&[(0xd, 1, [0xf, 0x2a00, 0, 0])]));
        for vcpu in 0..2 {
            let xfd = XFeatures::XTILEDATA;
            let loss = Misfit::Xfd {
                xfd,
                unsupported: xfd,
            };
            assert!(reasons.contains(&Compat::Loss { vcpu, loss }));
        }
    }
}

#[cfg(test)]
mod live_kvm {
    use amx_guest::Workload;
    use host_compat::compat::Reason as Compat;

    use super::*;
    use crate::host::tests::live;
    use crate::registers::Msr;
    use crate::restore::RestoreError;
    use crate::vm::Vm;

    /// A file says of the guest what a source would say.
    #[test]
    fn a_snapshot_is_compared_with_all_of_the_host() {
        let Some(host) = live() else { return };
        let kind = host.best_kind().unwrap();
        let mut vm = Vm::boot(&host, kind, &[Workload::new(kind, 1, 1000)]).unwrap();
        let here = vm.capture(&host).unwrap();
        assert_eq!(here.fit(&host), Ok(()));
        let refused = |change: fn(&mut Snapshot)| {
            let mut there = here.clone();
            change(&mut there);
            match Vm::restore(&host, &there) {
                Err(RestoreError::Unfit(unfit)) => unfit.reasons().to_vec(),
                Err(error) => panic!("{error}"),
                Ok(_) => panic!("it is restored"),
            }
        };
        if let Some(host_khz) = host.tsc_khz() {
            let guest_khz = host_khz + host_khz / 10;
            let faster = |there: &mut Snapshot| {
                there.tsc_khz = there.tsc_khz.map(|khz| khz + khz / 10);
            };
            if host.scales_tsc() {
                let mut there = here.clone();
                faster(&mut there);
                let restored = Vm::restore(&host, &there).unwrap();
                assert_eq!(restored.tsc_khz(), Some(guest_khz));
            } else {
                let tsc = Compat::Tsc {
                    guest_khz,
                    host_khz,
                };
                assert_eq!(refused(faster), [tsc.into()]);
            }
        }
        let vendor = refused(|there| {
            for entry in &mut there.vcpus[0].cpuid {
                if entry.function == 0 {
                    entry.ebx ^= 1;
                }
            }
        });
        assert!(
            matches!(vendor[..], [Reason::Host(Compat::Vendor { .. })]),
            "{vendor:?}"
        );
        let unknown = refused(|there| {
            let msr = Msr {
                index: 0xdead,
                data: 1,
            };
            there.vcpus[0].msrs.push(msr);
        });
        assert!(matches!(unknown[..], [Reason::Msr { index: 0xdead, .. }]));
    }
}

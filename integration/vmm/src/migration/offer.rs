//! What a destination says of itself before anything comes, and whether a guest fits that.

use serde::{Deserialize, Serialize};

use super::frame::VERSION;
use crate::fit::{self, Reason, Unfit};
use crate::host::Host;
use crate::memory::MAX_MEMORY_BYTES;
use crate::snapshot::VcpuState;
use crate::vm::MAX_VCPUS;

/// What guests may have at the destination. [`Offer::of`] is all that the host can do; a VMM that
/// knows better, because a guest must be able to go on from there, offers less.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// [`VERSION`].
    pub version: u32,
    /// The host, as host-compat describes it: docs/host.schema.json.
    #[serde(with = "json")]
    pub host: host_compat::Host,
    /// The most vCPUs of a guest.
    pub vcpus: u32,
    /// The most memory of a guest, in bytes.
    pub memory_bytes: u64,
    /// KVM_GET_MSR_INDEX_LIST.
    pub msrs: Vec<u32>,
}

/// A guest that wants to move.
pub(crate) struct Candidate<'a> {
    pub(crate) vcpus: &'a [VcpuState],
    pub(crate) memory_bytes: u64,
    pub(crate) tsc_khz: Option<u32>,
}

impl Offer {
    /// Everything that this host can do.
    #[must_use]
    pub fn of(host: &Host) -> Self {
        Self {
            version: VERSION,
            host: host.description().clone(),
            vcpus: host.max_vcpus().min(MAX_VCPUS.into()),
            memory_bytes: MAX_MEMORY_BYTES,
            msrs: host.msr_indices().to_vec(),
        }
    }

    /// Whether the guest, as it is now, can go on there.
    ///
    /// A guest that runs has read its CPUID, and nobody can take back what it has seen. So a feature
    /// that it sees and does not use is a reason too.
    pub(crate) fn check(&self, guest: &Candidate<'_>) -> Result<(), Unfit> {
        let mut reasons = fit::reasons(guest.vcpus, guest.tsc_khz, &self.host);
        reasons.extend(self.registers(guest.vcpus));
        let vcpus = u32::try_from(guest.vcpus.len()).unwrap_or(u32::MAX);
        if vcpus > self.vcpus {
            let limit = self.vcpus;
            reasons.push(Reason::Vcpus { vcpus, limit });
        }
        if guest.memory_bytes > self.memory_bytes {
            reasons.push(Reason::Memory {
                memory_bytes: guest.memory_bytes,
                limit_bytes: self.memory_bytes,
            });
        }
        Unfit::unless_empty(reasons)
    }

    /// MSRs that have a value and cannot be written there.
    fn registers(&self, vcpus: &[VcpuState]) -> impl Iterator<Item = Reason> {
        let known = |index| self.msrs.contains(&index);
        (0..).zip(vcpus).flat_map(move |(vcpu, state)| {
            let msrs = state.msrs.iter();
            msrs.filter(move |msr| msr.data != 0 && !known(msr.index))
                .map(move |msr| Reason::Msr {
                    vcpu,
                    index: msr.index,
                    value: msr.data,
                })
        })
    }
}

/// A description as JSON text within another format: it is a document for formats that name their
/// fields.
mod json {
    use host_compat::Host;
    use serde::{Deserialize, Deserializer, Serializer, de, ser};

    pub(super) fn serialize<S: Serializer>(host: &Host, serializer: S) -> Result<S::Ok, S::Error> {
        let text = serde_json::to_string(host).map_err(ser::Error::custom)?;
        serializer.serialize_str(&text)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Host, D::Error> {
        let text = <&str>::deserialize(from)?;
        serde_json::from_str(text).map_err(de::Error::custom)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use cpuid_amx::{Bits, Register};
    use cpuid_amx::{CpuidTable, Entry, Table};
    use host_compat::Host;
    use host_compat::compat::{Reason as Compat, Usage};
    use host_compat::host::{KvmFacts, MAX_ENTRIES, Tsc};

    use super::*;
    use crate::snapshot::tests::{cpuid, snapshot};

    fn offer(table: Table, msrs: impl Iterator<Item = u32>) -> Offer {
        Offer {
            version: VERSION,
            host: Host::from_cpuid("there", table),
            vcpus: 2,
            memory_bytes: 64 << 12,
            msrs: msrs.collect(),
        }
    }

    fn kvm(offer: &mut Offer) -> &mut KvmFacts {
        offer.host.kvm.as_mut().unwrap()
    }

    pub(crate) fn small_offer() -> Offer {
        let table = cpuid().entries().filter(|entry| entry.leaf == 7).collect();
        offer(table, 0x10..0x13)
    }

    /// Two tables with as many entries as KVM has, and no entry shorter than any is.
    pub(crate) fn largest_offer() -> Offer {
        let entry = |subleaf: u32| Entry {
            leaf: 0xffff_ffff,
            subleaf: Some(subleaf.wrapping_sub(300)),
            value: [0xffff_ffff; 4],
        };
        let table: Table = (0..256).map(entry).collect();
        assert_eq!(table.len(), MAX_ENTRIES);
        let mut offer = offer(table.clone(), 0xffff_f000..0xffff_f400);
        kvm(&mut offer).rewritten = Some(table);
        offer
    }

    /// Where the guest of `snapshot` comes from.
    fn home() -> Offer {
        let mut offer = offer(cpuid().entries().collect(), [0x10].into_iter());
        kvm(&mut offer).tsc = Some(Tsc {
            khz: 2_000_000,
            scales: false,
        });
        offer
    }

    fn reasons(offer: &Offer) -> Vec<Reason> {
        let snapshot = snapshot();
        let guest = Candidate {
            vcpus: &snapshot.vcpus,
            memory_bytes: 64 << 12,
            tsc_khz: Some(2_000_000),
        };
        match offer.check(&guest) {
            Ok(()) => Vec::new(),
            Err(unfit) => unfit.reasons().to_vec(),
        }
    }

    #[test]
    fn each_thing_that_is_less_is_a_reason_of_its_own() {
        assert_eq!(reasons(&home()), []);
        let less = |change: fn(&mut Offer)| {
            let mut offer = home();
            change(&mut offer);
            let reasons = reasons(&offer);
            println!("{reasons:?}");
            reasons
        };
        assert_eq!(
            less(|offer| offer.vcpus = 1),
            [Reason::Vcpus { vcpus: 2, limit: 1 }]
        );
        assert_eq!(
            less(|offer| offer.memory_bytes = 4096),
            [Reason::Memory {
                memory_bytes: 64 << 12,
                limit_bytes: 4096
            }]
        );
        assert_eq!(
            less(|offer| {
                kvm(offer).tsc = Some(Tsc {
                    khz: 2_100_000,
                    scales: false,
                });
            }),
            [Reason::Host(Compat::Tsc {
                guest_khz: 2_000_000,
                host_khz: 2_100_000
            })]
        );
        assert_eq!(less(|offer| kvm(offer).tsc = None), []);
        let scaled = less(|offer| {
            kvm(offer).tsc = Some(Tsc {
                khz: 2_100_000,
                scales: true,
            });
        });
        assert_eq!(scaled, []);
        assert_eq!(
            less(|offer| offer.msrs.clear()),
            [0, 1].map(|vcpu| Reason::Msr {
                vcpu,
                index: 0x10,
                value: 77
            })
        );
        // Many at once.
        let nothing = less(|offer| {
            offer.vcpus = 0;
            offer.memory_bytes = 0;
            offer.msrs.clear();
            offer.host = Host::from_cpuid("nothing", Table::default());
        });
        assert!(nothing.len() > 20, "{nothing:?}");
    }

    #[test]
    fn features_are_compared_bit_by_bit_and_amx_once() {
        let mut offer = home();
        let cpuid = &mut kvm(&mut offer).cpuid;
        let [eax, ebx, ecx, edx] = cpuid.leaf(7, 0);
        let value = [eax, ebx & !(1 << 5 | 1 << 16), ecx & !(1 << 4), edx];
        cpuid.set_leaf(7, 0, value).unwrap();
        let reason = |mask| {
            let bits = Bits {
                leaf: 7,
                subleaf: 0,
                register: Register::Ebx,
                mask,
            };
            let usage = Usage::Enabled;
            Reason::Host(Compat::Bits { bits, usage })
        };
        // ECX[4] follows from CR4.
        assert_eq!(reasons(&offer), [reason(1 << 5), reason(1 << 16)]);

        let cpuid = &mut kvm(&mut offer).cpuid;
        cpuid_amx::Policy::hide_amx().apply(cpuid).unwrap();
        let registers: Vec<_> = reasons(&offer)
            .into_iter()
            .filter(|reason| matches!(reason, Reason::Host(Compat::Bits { .. })))
            .collect();
        assert_eq!(registers.len(), 2, "{registers:?}");
    }

    #[test]
    fn a_description_that_is_none_is_refused() {
        let bytes = postcard::to_allocvec(&small_offer()).unwrap();
        assert_eq!(postcard::from_bytes::<Offer>(&bytes), Ok(small_offer()));
        // Its text begins behind the version and its own length of two bytes.
        let text = std::str::from_utf8(&bytes[3..40]).unwrap();
        assert!(text.starts_with(r#"{"format":"amx-host""#), "{text}");
        for at in 0..bytes.len() {
            assert!(postcard::from_bytes::<Offer>(&bytes[..at]).is_err());
        }
        let mut other = bytes;
        other[4] = b'F';
        assert!(postcard::from_bytes::<Offer>(&other).is_err());
    }
}

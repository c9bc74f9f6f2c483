//! What a destination says of itself before anything comes, and whether a guest fits that.

use serde::{Deserialize, Serialize};

use super::frame::VERSION;
use crate::features;
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
    /// The host, as cpuid-amx describes it: docs/host.schema.json.
    #[serde(with = "json")]
    pub host: host_compat::Host,
    /// The most vCPUs of a guest.
    pub vcpus: u32,
    /// The most memory of a guest, in bytes.
    pub memory_bytes: u64,
    /// KVM_GET_MSR_INDEX_LIST.
    pub msrs: Vec<u32>,
    /// KVM_GET_TSC_KHZ of a vCPU that was not told otherwise; `None` where KVM does not know.
    pub tsc_khz: Option<u32>,
    /// A vCPU's TSC can have another frequency.
    pub scales_tsc: bool,
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
            tsc_khz: host.tsc_khz(),
            scales_tsc: host.scales_tsc(),
        }
    }

    /// Whether the guest, as it is now, can go on there.
    ///
    /// A guest that runs has read its CPUID, and nobody can take back what it has seen. So a feature
    /// that it sees and does not use is a reason too.
    pub(crate) fn check(&self, guest: &Candidate<'_>) -> Result<(), Unfit> {
        let mut reasons: Vec<Reason> = fit::extended(guest.vcpus, &self.host).collect();
        // All vCPUs of a guest have the same features; the host without KVM has been named.
        let sees = guest.vcpus.first().map(|vcpu| &vcpu.cpuid);
        if let Some((sees, has)) = sees.zip(self.host.guest_cpuid()) {
            reasons.extend(features::missing(sees, has));
        }
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
        if let Some((guest_khz, host_khz)) = guest.tsc_khz.zip(self.tsc_khz)
            && !self.scales_tsc
            && !same_frequency(guest_khz, host_khz)
        {
            reasons.push(Reason::Tsc {
                guest_khz,
                host_khz,
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

/// Within the 250 ppm up to which KVM does not scale (arch/x86/kvm/x86.c, `tsc_tolerance_ppm`).
fn same_frequency(a_khz: u32, b_khz: u32) -> bool {
    let difference = u64::from(a_khz.abs_diff(b_khz));
    difference.saturating_mul(1_000_000) <= u64::from(a_khz).saturating_mul(250)
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
    use cpuid_amx::{CpuidTable, Entry, Table};
    use host_compat::Host;
    use host_compat::host::MAX_ENTRIES;

    use super::*;
    use crate::snapshot::tests::{cpuid, snapshot};

    fn offer(table: Table, msrs: impl Iterator<Item = u32>) -> Offer {
        Offer {
            version: VERSION,
            host: Host::from_cpuid("there", table),
            vcpus: 2,
            memory_bytes: 64 << 12,
            msrs: msrs.collect(),
            tsc_khz: Some(2_000_000),
            scales_tsc: false,
        }
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
        let Ok(kvm) = &mut offer.host.kvm else {
            panic!("it has one")
        };
        kvm.rewritten = Some(table);
        offer
    }

    /// Where the guest of `snapshot` comes from.
    fn home() -> Offer {
        offer(cpuid().entries().collect(), [0x10].into_iter())
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
            less(|offer| offer.tsc_khz = Some(2_100_000)),
            [Reason::Tsc {
                guest_khz: 2_000_000,
                host_khz: 2_100_000
            }]
        );
        assert_eq!(less(|offer| offer.tsc_khz = None), []);
        let scaled = less(|offer| {
            offer.tsc_khz = Some(2_100_000);
            offer.scales_tsc = true;
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
        let Ok(kvm) = &mut offer.host.kvm else {
            panic!("it has one")
        };
        let [eax, ebx, ecx, edx] = kvm.cpuid.leaf(7, 0);
        let value = [eax, ebx & !(1 << 5 | 1 << 16), ecx & !(1 << 4), edx];
        kvm.cpuid.set_leaf(7, 0, value).unwrap();
        let reason = Reason::Cpuid {
            leaf: 7,
            subleaf: 0,
            register: "EBX",
            bits: 1 << 5 | 1 << 16,
        };
        // ECX[4] follows from CR4.
        assert_eq!(reasons(&offer), [reason]);

        let Ok(kvm) = &mut offer.host.kvm else {
            panic!("it has one")
        };
        cpuid_amx::Policy::hide_amx().apply(&mut kvm.cpuid).unwrap();
        let registers: Vec<_> = reasons(&offer)
            .into_iter()
            .filter(|reason| matches!(reason, Reason::Cpuid { .. }))
            .collect();
        assert_eq!(registers.len(), 1, "{registers:?}");
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

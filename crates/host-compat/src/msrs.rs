//! MSRs that say what a processor can do, beside CPUID.

use cpuid_amx::CpuidTable;

use crate::host::Host;

/// The values of feature MSRs; `None`: not known.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FeatureMsrs {
    /// IA32_ARCH_CAPABILITIES, 10AH: which attacks the processor withstands, and what it can do against
    /// others.
    pub arch_capabilities: Option<u64>,
    /// IA32_PERF_CAPABILITIES, 345H: performance monitoring.
    pub perf_capabilities: Option<u64>,
}

impl FeatureMsrs {
    /// Takes the value of an MSR, if it is one of them.
    pub fn set(&mut self, index: u32, value: u64) {
        match index {
            ARCH_CAPABILITIES => self.arch_capabilities = Some(value),
            PERF_CAPABILITIES => self.perf_capabilities = Some(value),
            _ => {}
        }
    }

    /// Returns the values that a guest may see that is to run on this host and on all of `hosts`.
    /// A host whose value is not known does not limit it: [`compat::check`](crate::compat::check) says
    /// then that it was not compared.
    #[must_use]
    pub fn shared_with(mut self, hosts: &[Host]) -> Self {
        for kvm in hosts.iter().filter_map(|host| host.kvm.as_ref().ok()) {
            for msr in ALL {
                if let (Some(ours), Some(theirs)) = (msr.value(&self), msr.value(&kvm.feature_msrs))
                {
                    self.set(msr.index, msr.shared(ours, theirs));
                }
            }
        }
        self
    }

    /// Iterates over (index, value) of the MSRs that `cpuid` names and whose value is known, for
    /// KVM_SET_MSRS of a vCPU that has this CPUID.
    pub fn entries(self, cpuid: &impl CpuidTable) -> impl Iterator<Item = (u32, u64)> {
        ALL.into_iter()
            .filter(|msr| msr.is_enumerated(cpuid))
            .filter_map(move |msr| Some((msr.index, msr.value(&self)?)))
    }
}

pub(crate) const ARCH_CAPABILITIES: u32 = 0x10a;
pub(crate) const PERF_CAPABILITIES: u32 = 0x345;

/// One of them.
pub(crate) struct FeatureMsr {
    pub(crate) name: &'static str,
    index: u32,
    /// Bits that say that something is worse: RSBA and RRSBA, without which a guest does not protect
    /// itself.
    inverted: u64,
    /// Numbers for which KVM takes the host's value or 0 (arch/x86/kvm/vmx/vmx.c, `vmx_set_msr`): the
    /// formats of LBR and PEBS records.
    same: &'static [u64],
}

pub(crate) const ALL: [FeatureMsr; 2] = [
    FeatureMsr {
        name: "IA32_ARCH_CAPABILITIES",
        index: ARCH_CAPABILITIES,
        inverted: 1 << 2 | 1 << 19,
        same: &[],
    },
    FeatureMsr {
        name: "IA32_PERF_CAPABILITIES",
        index: PERF_CAPABILITIES,
        inverted: 0,
        same: &[0x3f, 0xf00],
    },
];

impl FeatureMsr {
    pub(crate) fn value(&self, msrs: &FeatureMsrs) -> Option<u64> {
        match self.index {
            ARCH_CAPABILITIES => msrs.arch_capabilities,
            _ => msrs.perf_capabilities,
        }
    }

    /// Whether CPUID says that the MSR is there.
    pub(crate) fn is_enumerated(&self, cpuid: &impl CpuidTable) -> bool {
        if self.index == ARCH_CAPABILITIES {
            let [.., edx] = cpuid.leaf(7, 0);
            edx & 1 << 29 != 0
        } else {
            let [_, _, ecx, _] = cpuid.leaf(1, 0);
            ecx & 1 << 15 != 0
        }
    }

    /// The value that neither of two hosts is less than.
    fn shared(&self, ours: u64, theirs: u64) -> u64 {
        let numbers = self.same.iter().fold(0, |all, mask| all | mask);
        let plain = ours & theirs & !self.inverted & !numbers;
        let worse = (ours | theirs) & self.inverted;
        let same = self.same.iter().fold(0, |all, mask| {
            let equal = ours & mask == theirs & mask;
            if equal { all | ours & mask } else { all }
        });
        plain | worse | same
    }

    /// The bits by which the host is less than the guest relies on.
    pub(crate) fn missing(&self, guest: u64, host: u64) -> u64 {
        let numbers = self.same.iter().fold(0, |all, mask| all | mask);
        let plain = guest & !host & !self.inverted & !numbers;
        let worse = host & !guest & self.inverted;
        let differing = self.same.iter().fold(0, |all, mask| {
            let (guest, host) = (guest & mask, host & mask);
            if guest != 0 && guest != host {
                all | mask
            } else {
                all
            }
        });
        plain | worse | differing
    }
}

/// The value of IA32_ARCH_CAPABILITIES that neither of two hosts is less than.
pub(crate) fn shared_arch_capabilities(ours: u64, theirs: u64) -> u64 {
    let [arch, _] = ALL;
    arch.shared(ours, theirs)
}

/// The bits of IA32_ARCH_CAPABILITIES that say that something is worse.
pub(crate) const fn arch_capabilities_inverted() -> u64 {
    let [arch, _] = ALL;
    arch.inverted
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_missing_of_what_two_hosts_share() {
        let values = [
            0,
            0b1,
            0b11,
            1 << 2,
            1 << 19 | 1,
            1 << 62 | 0x5f,
            5,
            6,
            0x106,
            0x2005,
            u64::MAX,
        ];
        for msr in ALL {
            for (ours, theirs) in values.iter().flat_map(|a| values.map(|b| (*a, b))) {
                let shared = msr.shared(ours, theirs);
                assert_eq!(shared, msr.shared(theirs, ours));
                for host in [ours, theirs] {
                    assert_eq!(msr.missing(shared, host), 0, "{ours:#x} {theirs:#x}");
                }
            }
            assert_eq!(msr.shared(0x2005, 0x2005), 0x2005);
        }
    }

    #[test]
    fn what_is_less_is_missing() {
        let [arch, perf] = ALL;
        // RDCL_NO; RRSBA, which the guest has to know of.
        assert_eq!(arch.missing(0b1, 0b11), 0);
        assert_eq!(arch.missing(0b11, 0b10), 1);
        assert_eq!(arch.missing(1 << 19, 0), 0);
        assert_eq!(arch.missing(0, 1 << 19), 1 << 19);
        // The format of LBR records is another number, not a smaller one.
        assert_eq!(perf.missing(5, 6), 0x3f);
        assert_eq!(perf.missing(0, 6), 0);
        assert_eq!(perf.missing(1 << 13 | 6, 6), 1 << 13);
    }
}

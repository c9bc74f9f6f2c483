//! Bits of CPUID's registers, and the names of the features that they stand for.

use alloc::vec::Vec;
use core::fmt;

use xsave_state::XFeatures;

use crate::features::dependents;

/// A register of CPUID.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Register {
    /// EAX.
    Eax,
    /// EBX.
    Ebx,
    /// ECX.
    Ecx,
    /// EDX.
    Edx,
}

impl Register {
    /// All four, in the order in which a leaf gives them.
    pub const ALL: [Self; 4] = [Self::Eax, Self::Ebx, Self::Ecx, Self::Edx];
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eax => "EAX",
            Self::Ebx => "EBX",
            Self::Ecx => "ECX",
            Self::Edx => "EDX",
        })
    }
}

/// Bits of one register.
///
/// ```
/// use cpuid_amx::{Bits, Register};
///
/// let bits = Bits { leaf: 7, subleaf: 0, register: Register::Ebx, mask: 1 << 5 | 1 << 16 };
/// assert_eq!(bits.to_string(), "AVX2, AVX512F (CPUID.7H.0:EBX[5, 16])");
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Bits {
    /// The leaf.
    pub leaf: u32,
    /// The sub-leaf, 0 in leaves without.
    pub subleaf: u32,
    /// The register.
    pub register: Register,
    /// The bits.
    pub mask: u32,
}

impl Bits {
    /// The features by the names of the manuals; those without a name are left out.
    pub fn names(&self) -> impl Iterator<Item = &'static str> + '_ {
        self.numbers().filter_map(|bit| self.name(bit))
    }

    /// The same bits by the user components without which their features cannot be used (SDM Vol. 1
    /// §13.3): none of them where XCR0 lacks those. Last, with no component, the other bits.
    pub fn by_component(&self) -> impl Iterator<Item = (XFeatures, Self)> {
        let Self {
            leaf,
            subleaf,
            register,
            mut mask,
        } = *self;
        let place = (leaf, subleaf);
        let of = move |mask| Self {
            leaf,
            subleaf,
            register,
            mask,
        };
        let mut parts = Vec::new();
        for (needs, at, below, bits) in dependents() {
            let registers = Register::ALL.into_iter().zip(bits);
            let own = registers.filter(|(own, _)| *own == register);
            let bits = own.fold(0, |all, (_, bits)| all | bits);
            // Shadow stacks and IBT are enabled in MSRs, IA32_XSS or not.
            let is_user = !needs.intersects(XFeatures::CET_U | XFeatures::CET_S);
            if (at, below) == place && is_user && mask & bits != 0 {
                parts.push((needs, of(mask & bits)));
                mask &= !bits;
            }
        }
        if mask != 0 {
            parts.push((XFeatures::empty(), of(mask)));
        }
        parts.into_iter()
    }

    fn numbers(&self) -> impl Iterator<Item = u32> + use<> {
        let mask = self.mask;
        (0..u32::BITS).filter(move |bit| mask & 1u32.wrapping_shl(*bit) != 0)
    }

    fn name(&self, bit: u32) -> Option<&'static str> {
        let place = (self.leaf, self.subleaf, self.register);
        let (.., names) = NAMES
            .iter()
            .find(|(leaf, subleaf, register, _)| (*leaf, *subleaf, *register) == place)?;
        let name = names.split(' ').nth(usize::try_from(bit).ok()?);
        name.filter(|name| *name != "-")
    }
}

impl fmt::Display for Bits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for bit in self.numbers() {
            match self.name(bit) {
                Some(name) => write!(f, "{separator}{name}")?,
                None => write!(f, "{separator}bit {bit}")?,
            }
            separator = ", ";
        }
        let Self {
            leaf,
            subleaf,
            register,
            ..
        } = self;
        write!(f, " (CPUID.{leaf:X}H.{subleaf}:{register}")?;
        separator = "[";
        for bit in self.numbers() {
            write!(f, "{separator}{bit}")?;
            separator = ", ";
        }
        f.write_str("])")
    }
}

/// The features of a register: a word for each bit from 0 upwards, `-` where there is none.
type Names = (u32, u32, Register, &'static str);

/// SDM Vol. 2, CPUID; the instruction set extensions reference; AMD APM Vol. 3, appendix E;
/// Documentation/virt/kvm/x86/cpuid.rst.
const NAMES: &[Names] = &[
    (
        1,
        0,
        Register::Ecx,
        "SSE3 PCLMULQDQ DTES64 MONITOR DS-CPL VMX SMX EIST TM2 SSSE3 CNXT-ID SDBG FMA \
         CMPXCHG16B xTPR PDCM - PCID DCA SSE4.1 SSE4.2 x2APIC MOVBE POPCNT \
         TSC-deadline AES XSAVE OSXSAVE AVX F16C RDRAND hypervisor",
    ),
    (
        1,
        0,
        Register::Edx,
        "FPU VME DE PSE TSC MSR PAE MCE CX8 APIC - SEP MTRR PGE MCA CMOV PAT PSE-36 \
         PSN CLFLUSH - DS ACPI MMX FXSR SSE SSE2 SS HTT TM - PBE",
    ),
    (
        7,
        0,
        Register::Ebx,
        "FSGSBASE TSC_ADJUST SGX BMI1 HLE AVX2 FDP_EXCPTN_ONLY SMEP BMI2 ERMS INVPCID \
         RTM RDT-M no-FCS-and-FDS MPX RDT-A AVX512F AVX512DQ RDSEED ADX SMAP \
         AVX512_IFMA - CLFLUSHOPT CLWB PT AVX512PF AVX512ER AVX512CD SHA AVX512BW \
         AVX512VL",
    ),
    (
        7,
        0,
        Register::Ecx,
        "PREFETCHWT1 AVX512_VBMI UMIP PKU OSPKE WAITPKG AVX512_VBMI2 SHSTK GFNI VAES \
         VPCLMULQDQ AVX512_VNNI AVX512_BITALG TME_EN AVX512_VPOPCNTDQ - LA57 - - - - \
         - RDPID KL BUS_LOCK_DETECT CLDEMOTE - MOVDIRI MOVDIR64B ENQCMD SGX_LC PKS",
    ),
    (
        7,
        0,
        Register::Edx,
        "- SGX-KEYS AVX512_4VNNIW AVX512_4FMAPS FSRM UINTR - - AVX512_VP2INTERSECT \
         SRBDS_CTRL MD_CLEAR RTM_ALWAYS_ABORT - RTM_FORCE_ABORT SERIALIZE hybrid \
         TSXLDTRK - PCONFIG ARCH_LBR IBT - AMX-BF16 AVX512-FP16 AMX-TILE AMX-INT8 \
         IBRS-and-IBPB STIBP L1D_FLUSH ARCH_CAPABILITIES CORE_CAPABILITIES SSBD",
    ),
    (
        7,
        1,
        Register::Eax,
        "SHA512 SM3 SM4 RAO-INT AVX-VNNI AVX512_BF16 LASS CMPCCXADD ArchPerfmonExt - \
         FZRM FSRS FSRCS - - - - FRED LKGS WRMSRNS NMI_SRC AMX-FP16 HRESET AVX-IFMA - \
         - LAM MSRLIST - - - MOVRS",
    ),
    (
        7,
        1,
        Register::Edx,
        "- - - - AVX-VNNI-INT8 AVX-NE-CONVERT - - AMX-COMPLEX - AVX-VNNI-INT16 - - \
         UTMR PREFETCHI USER_MSR - UIRET_UIF CET_SSS AVX10 - APX_F - MWAIT",
    ),
    (
        7,
        2,
        Register::Edx,
        "PSFD IPRED_CTRL RRSBA_CTRL DDPD_U BHI_CTRL MCDT_NO UC_LOCK_DISABLE \
         MONITOR_MITG_NO",
    ),
    (
        0x4000_0001,
        0,
        Register::Eax,
        "CLOCKSOURCE NOP_IO_DELAY - CLOCKSOURCE2 ASYNC_PF STEAL_TIME PV_EOI PV_UNHALT \
         - PV_TLB_FLUSH ASYNC_PF_VMEXIT PV_SEND_IPI POLL_CONTROL PV_SCHED_YIELD \
         ASYNC_PF_INT MSI_EXT_DEST_ID HC_MAP_GPA_RANGE MIGRATION_CONTROL - - - - - - \
         CLOCKSOURCE_STABLE",
    ),
    (
        0x8000_0001,
        0,
        Register::Ecx,
        "LAHF - SVM ExtApicSpace AltMovCr8 LZCNT SSE4A MisAlignSse PREFETCHW OSVW IBS \
         XOP SKINIT WDT - LWP FMA4 TCE - - - TBM TopologyExtensions PerfCtrExtCore \
         PerfCtrExtNB - DataBkptExt PerfTsc PerfCtrExtLLC MONITORX AddrMaskExt",
    ),
    (
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - SYSCALL - - - - - - - - NX - MmxExt - - FFXSR Page1GB \
         RDTSCP - LM 3DNowExt 3DNow",
    ),
    (
        0x8000_0007,
        0,
        Register::Edx,
        "- - - - - - - - invariant-TSC",
    ),
    (
        0x8000_0008,
        0,
        Register::Ebx,
        "CLZERO InstRetCntMsr XSAVEERPTR INVLPGB RDPRU - - - MCOMMIT WBNOINVD - - \
         IBPB - IBRS STIBP - - - - - - - - SSBD VIRT_SSBD SSBD-not-needed - PSFD",
    ),
    (
        0x8000_0021,
        0,
        Register::Eax,
        "NoNestedDataBp - LFENCE-serializes - - - null-selector-clears-base - \
         AutoIBRS no-SMM_CTL-MSR - - - - - - - - - - - - - - - - - SBPB IBPB_BRTYPE \
         SRSO_NO",
    ),
];

#[cfg(test)]
mod tests {
    use alloc::collections::BTreeSet;
    use alloc::string::ToString;
    use alloc::vec::Vec;

    use super::*;

    #[test]
    fn no_bit_has_two_names_and_no_name_two_bits() {
        let mut places: BTreeSet<(u32, u32, Register)> = BTreeSet::new();
        for (leaf, subleaf, register, names) in NAMES {
            let mut seen: BTreeSet<&str> = BTreeSet::new();
            assert!(places.insert((*leaf, *subleaf, *register)));
            let words: Vec<&str> = names.split(' ').collect();
            assert!(words.len() <= 32, "{leaf:#x} {register}");
            for name in words.into_iter().filter(|name| *name != "-") {
                assert!(
                    !name.is_empty() && seen.insert(name),
                    "{leaf:#x} {register}: {name:?}"
                );
            }
        }
    }

    #[test]
    fn features_by_what_they_need() {
        let bits = Bits {
            leaf: 7,
            subleaf: 0,
            register: Register::Ebx,
            mask: 1 << 3 | 1 << 5 | 1 << 16 | 1 << 31,
        };
        let parts: Vec<_> = bits
            .by_component()
            .map(|(needs, bits)| (needs, bits.mask))
            .collect();
        let avx512 = XFeatures::AVX512 | XFeatures::AVX;
        assert_eq!(
            parts,
            [
                (XFeatures::AVX, 1 << 5),
                (avx512, 1 << 16 | 1 << 31),
                (XFeatures::empty(), 1 << 3)
            ]
        );
    }

    #[test]
    fn what_has_no_name_is_a_number() {
        let bits = |leaf, mask| Bits {
            leaf,
            subleaf: 0,
            register: Register::Ecx,
            mask,
        };
        let unnamed = bits(7, 1 << 3 | 1 << 15);
        assert_eq!(unnamed.to_string(), "PKU, bit 15 (CPUID.7H.0:ECX[3, 15])");
        assert_eq!(unnamed.names().collect::<Vec<_>>(), ["PKU"]);
        assert_eq!(bits(0x99, 1).to_string(), "bit 0 (CPUID.99H.0:ECX[0])");
    }
}

//! A CPU for QEMU's `-cpu`: model `base`, which has no features whatever QEMU's version is, and each
//! feature by name.
//!
//! Names were read in target/i386/cpu.c (`feature_word_info`, commit 0048035a8703) and are held against
//! a QEMU program by a test. Those with `*` came after QEMU 7.2.

use cpuid_amx::{Bits, CpuidTable, Register};

use super::{NotHeld, Rendered, What, names};
use crate::guest_cpu::GuestCpu;
use crate::host::Processor;
use crate::registers;

/// Features that every KVM has and that CPUID of a host does not tell, or tells elsewhere.
const ALWAYS: [&str; 4] = ["apic", "hypervisor", "tsc-deadline", "arat"];

/// Features that are more than a flag: they need other options, or keep the guest from being moved.
const NOT_ALONE: [&str; 9] = [
    "vmx", "svm", "sgx", "sgxlc", "intel-pt", "arch-lbr", "pdcm", "topoext", "invtsc",
];

/// The features of a register: a word for each bit from 0 upwards, `-` where QEMU has no name.
type Names = (u32, u32, Register, &'static str);

const NAMES: [Names; 16] = [
    (
        1,
        0,
        Register::Ecx,
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm - pcid \
         dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave - avx f16c rdrand hypervisor",
    ),
    (
        1,
        0,
        Register::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - ds \
         acpi mmx fxsr sse sse2 ss ht tm ia64 pbe",
    ),
    (
        7,
        0,
        Register::Ebx,
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 *fdp-excptn-only smep bmi2 erms invpcid rtm - \
         *zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb \
         intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl",
    ),
    (
        7,
        0,
        Register::Ecx,
        "- avx512vbmi umip pku - waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni \
         avx512bitalg - avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - \
         movdiri movdir64b - sgxlc pks",
    ),
    (
        7,
        0,
        Register::Edx,
        "- - avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - serialize \
         - tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl stibp \
         *flush-l1d arch-capabilities core-capability ssbd",
    ),
    (
        7,
        1,
        Register::Eax,
        "*sha512 *sm3 *sm4 - avx-vnni avx512-bf16 - *cmpccxadd - - *fzrm *fsrs *fsrc - - - - *fred \
         *lkgs *wrmsrns - *amx-fp16 - *avx-ifma - - *lam",
    ),
    (
        7,
        1,
        Register::Edx,
        "- - - - *avx-vnni-int8 *avx-ne-convert - - *amx-complex - *avx-vnni-int16 - - - \
         *prefetchiti - - - - *avx10",
    ),
    (
        7,
        2,
        Register::Edx,
        "*intel-psfd *ipred-ctrl *rrsba-ctrl *ddpd-u *bhi-ctrl *mcdt-no",
    ),
    (0xd, 1, Register::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    (
        0x4000_0001,
        0,
        Register::Eax,
        "kvmclock kvm-nopiodelay kvm-mmu kvmclock kvm-asyncpf kvm-steal-time kvm-pv-eoi \
         kvm-pv-unhalt - kvm-pv-tlb-flush *kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control \
         kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - kvmclock-stable-bit",
    ),
    (
        0x8000_0001,
        0,
        Register::Ecx,
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop \
         skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb",
    ),
    (
        0x8000_0001,
        0,
        Register::Edx,
        "- - - - - - - - - - - syscall - - - - - - - - nx - mmxext - - fxsr-opt pdpe1gb rdtscp - \
         lm 3dnowext 3dnow",
    ),
    (0x8000_0007, 0, Register::Edx, "- - - - - - - - invtsc"),
    (
        0x8000_0008,
        0,
        Register::Ebx,
        "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - *stibp-always-on - - \
         - - - - amd-ssbd virt-ssbd amd-no-ssb - *amd-psfd",
    ),
    (
        0x8000_0021,
        0,
        Register::Eax,
        "*no-nested-data-bp - *lfence-always-serializing - - - *null-sel-clr-base - *auto-ibrs - - \
         - - - - - - - - - - - - - *eraps - - *sbpb *ibpb-brtype *srso-no *srso-user-kernel-no",
    ),
    // IA32_ARCH_CAPABILITIES, whose number is not one of a leaf: its low half, as if it were EAX.
    (
        crate::msrs::ARCH_CAPABILITIES,
        0,
        Register::Eax,
        "rdctl-no ibrs-all rsba skip-l1dfl-vmentry ssb-no mds-no pschange-mc-no tsx-ctrl taa-no - \
         - - - *sbdr-ssdp-no *fbsdp-no *psdp-no - *fb-clear - - *bhi-no - - - *pbrsb-no - *gds-no \
         *rfds-no *rfds-clear",
    ),
];

/// Bits of leaf 80000001H EDX that are those of leaf 1 EDX on AMD's processors, where QEMU copies them.
const AMD_ALIASES: u32 = 0x0183_f3ff;
/// AMX-BF16, AMX-TILE and AMX-INT8; AMX-FP16; AMX-COMPLEX.
const AMX: [(u32, Register, u32); 3] = [
    (0, Register::Edx, 1 << 22 | 1 << 24 | 1 << 25),
    (1, Register::Eax, 1 << 21),
    (1, Register::Edx, 1 << 8),
];

/// Writes the CPU as the option `-cpu` of QEMU.
///
/// QEMU refuses to start where the host lacks one of the features (`enforce`).
#[must_use]
pub fn qemu(cpu: &GuestCpu) -> Rendered {
    let mut found = Found::default();
    for name in ALWAYS {
        found.named.push(name);
    }
    for bits in cpu.bits().filter(|bits| !matches!(bits.leaf, 0xa | 0xd)) {
        let Bits {
            leaf,
            subleaf,
            register,
            mask,
        } = bits;
        let plain = registers::plain(leaf, subleaf, register, mask);
        let amx = AMX
            .iter()
            .filter(|(below, own, _)| (7, *below, *own) == (leaf, subleaf, register));
        let amx = amx.fold(0, |all, (.., amx)| all | amx);
        found.add(Bits {
            mask: plain | mask & amx,
            ..bits
        });
    }
    let [xsave, ..] = cpu.cpuid.leaf(0xd, 1);
    found.add(Bits {
        leaf: 0xd,
        subleaf: 1,
        register: Register::Eax,
        mask: xsave,
    });
    let mut unknown_half = 0;
    if let Some(msr) = cpu
        .arch_capabilities
        .filter(|_| cpu.sees_arch_capabilities())
    {
        let [low, high] = halves(msr);
        unknown_half = high;
        found.add_msr(low);
    }
    if matches!(&*cpu.vendor, "AuthenticAMD" | "HygonGenuine") {
        let is_alias = |bits: &Bits| (bits.leaf, bits.register) == (0x8000_0001, Register::Edx);
        for bits in found.unnamed.iter_mut().filter(|bits| is_alias(bits)) {
            bits.mask &= !AMD_ALIASES;
        }
        found.unnamed.retain(|bits| bits.mask != 0);
    }
    let text = option(cpu, &found);
    let mut not_held = found.not_held(unknown_half);
    not_held.extend(notes(cpu));
    Rendered { text, not_held }
}

/// `-cpu base,vendor=GenuineIntel,family=6,...`.
fn option(cpu: &GuestCpu, found: &Found) -> String {
    let processor = Processor::from_cpuid(|leaf, subleaf| match leaf {
        1 => [cpu.signature, 0, 0, 0],
        0 => cpu.cpuid.leaf(leaf, subleaf),
        _ => [0; 4],
    });
    let Processor {
        vendor,
        family,
        model,
        stepping,
        ..
    } = processor;
    let mut option =
        format!("-cpu base,vendor={vendor},family={family},model={model},stepping={stepping}");
    let [sizes, ..] = cpu.cpuid.leaf(0x8000_0008, 0);
    let physical = sizes & 0xff;
    if physical != 0 {
        option.push_str(&format!(",phys-bits={physical}"));
    }
    for name in &found.named {
        option.push_str(&format!(",+{name}"));
    }
    option + ",enforce\n"
}

/// The features by what QEMU makes of them.
#[derive(Default)]
struct Found {
    named: Vec<&'static str>,
    newer: Vec<&'static str>,
    not_alone: Vec<&'static str>,
    unnamed: Vec<Bits>,
    /// Bits of IA32_ARCH_CAPABILITIES.
    unnamed_msr: Vec<u32>,
}

impl Found {
    fn add(&mut self, bits: Bits) {
        let place = (bits.leaf, bits.subleaf, bits.register);
        let mut unnamed = 0;
        for (number, bit) in numbers(bits.mask) {
            match name(place, number) {
                Some(name) => self.add_name(name),
                None => unnamed |= bit,
            }
        }
        if unnamed != 0 {
            self.unnamed.push(Bits {
                mask: unnamed,
                ..bits
            });
        }
    }

    fn add_msr(&mut self, low: u32) {
        let place = (crate::msrs::ARCH_CAPABILITIES, 0, Register::Eax);
        for (number, _) in numbers(low) {
            match name(place, number) {
                Some(name) => self.add_name(name),
                None => self
                    .unnamed_msr
                    .push(u32::try_from(number).unwrap_or(u32::MAX)),
            }
        }
    }

    fn add_name(&mut self, name: &'static str) {
        let (plain, is_newer) = name
            .strip_prefix('*')
            .map_or((name, false), |name| (name, true));
        if NOT_ALONE.contains(&plain) {
            self.not_alone.push(plain);
        } else if !self.named.contains(&plain) {
            self.named.push(plain);
            if is_newer {
                self.newer.push(plain);
            }
        }
    }

    fn not_held(&self, high: u32) -> Vec<NotHeld> {
        let mut not_held = Vec::new();
        if !self.unnamed.is_empty() {
            not_held.push(What::Cpuid.because(format!(
                "QEMU has no name for these features, and the guest does not get them: {}",
                names(&self.unnamed)
            )));
        }
        if !self.not_alone.is_empty() {
            not_held.push(What::Cpuid.because(format!(
                "left out, because they need other options of QEMU or keep a guest from being moved: {}",
                self.not_alone.join(", ")
            )));
        }
        if !self.newer.is_empty() {
            not_held.push(What::Cpuid.because(format!(
                "QEMU 7.2 does not know these names and refuses them; newer versions do: {}",
                self.newer.join(", ")
            )));
        }
        let mut bits = self.unnamed_msr.clone();
        bits.extend(
            numbers(high)
                .map(|(number, _)| u32::try_from(number).unwrap_or(u32::MAX).saturating_add(32)),
        );
        if !bits.is_empty() {
            let bits: Vec<String> = bits.iter().map(u32::to_string).collect();
            not_held.push(What::FeatureMsrs.because(format!(
                "QEMU has no name for these bits of IA32_ARCH_CAPABILITIES, and the guest does not \
                 get them: {}",
                bits.join(", ")
            )));
        }
        not_held
    }
}

fn notes(cpu: &GuestCpu) -> Vec<NotHeld> {
    let mut notes = vec![
        What::XsaveLayout.because(
            "QEMU takes the places of components from the host; the fleet shares only components \
             that have the same place on all hosts",
        ),
        What::Tsc.because(
            "the frequency of the guest's TSC is that of the host that starts it; tsc-frequency= \
             sets it",
        ),
        What::Model.because(
            "family, model and stepping are the smallest of the fleet; caches and the processor's \
             name are QEMU's",
        ),
    ];
    if cpu.has_amx() {
        let why = "QEMU 7.0 and newer ask for the AMX permission themselves";
        notes.insert(0, What::AmxPermission.because(why));
    }
    if cpu.cpuid.leaf(0x1e, 1) != [0; 4] {
        notes.push(What::Leaf1eh1.because(
            "CPUID.1EH.1 is not in the option: QEMU gives the guest what its version has there",
        ));
    }
    let [_, ebx, ..] = cpu.cpuid.leaf(7, 0);
    if ebx & (1 << 6 | 1 << 13) != 0 {
        notes.push(What::Cpuid.because(
            "the guest is not told that the processor lacks FCS and FDS or updates FDP only on \
             exceptions: QEMU 7.2 has no names for these bits",
        ));
    }
    if cpu.cpuid.leaf(0xa, 0) != [0; 4] {
        notes.push(What::Cpuid.because(
            "performance counters are not in the option: pmu=on gives the guest those of the host",
        ));
    }
    if cpu.cpuid.leaf(0x24, 0) != [0; 4] {
        notes.push(What::Cpuid.because(
            "the version of AVX10 is not in the option: avx10-version= of newer versions of QEMU \
             sets it",
        ));
    }
    notes.extend(super::unknown_msr(cpu, "the guest sees none of its bits"));
    notes.extend(super::untold(cpu));
    notes
}

fn name(place: (u32, u32, Register), number: usize) -> Option<&'static str> {
    let (.., words) = NAMES
        .iter()
        .find(|(leaf, subleaf, register, _)| (*leaf, *subleaf, *register) == place)?;
    let word = words.split_whitespace().nth(number)?;
    (word != "-").then_some(word)
}

/// The bits that are set: number and value.
fn numbers(mask: u32) -> impl Iterator<Item = (usize, u32)> {
    let bits = (0..32_usize).zip((0..u32::BITS).map(|bit| 1_u32.wrapping_shl(bit)));
    bits.filter(move |(_, bit)| mask & bit != 0)
}

fn halves(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    [[a, b, c, d], [e, f, g, h]].map(u32::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_name_is_of_one_register() {
        let mut seen = BTreeSet::new();
        for (leaf, _, register, words) in NAMES {
            let words: Vec<&str> = words.split_whitespace().collect();
            assert!(words.len() <= 32, "{leaf:#x} {register}");
            let own: BTreeSet<&str> = words.into_iter().filter(|word| *word != "-").collect();
            for word in own {
                assert!(seen.insert(word), "{word}");
            }
        }
        for name in NOT_ALONE {
            assert!(seen.contains(name), "{name}");
        }
    }
}

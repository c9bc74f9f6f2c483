//! CPUID as `cpuid -r` prints it and `cpuid -r -f` reads it.

use cpuid_amx::CpuidTable;

use super::{Rendered, What};
use crate::guest_cpu::GuestCpu;

/// Writes the CPU as a dump of CPUID.
#[must_use]
pub fn cpuid(cpu: &GuestCpu) -> Rendered {
    let mut not_held = vec![
        What::FeatureMsrs.because("a dump has no MSRs: IA32_ARCH_CAPABILITIES is not in it"),
        What::Tsc.because("a dump does not say at which frequency the TSC of a guest runs"),
        What::Model.because("caches, topology and the processor's name are not shared"),
    ];
    if cpu.has_amx() {
        let why = "the VMM has to ask for the AMX permission before it sets this CPUID";
        not_held.insert(0, What::AmxPermission.because(why));
    }
    if cpu.cpuid.leaf(0x24, 0) != [0; 4] {
        not_held.push(What::Cpuid.because(
            "CPUID.24H.0 has the version of AVX10 and not its vector lengths, which are not compared \
             between hosts",
        ));
    }
    not_held.extend(super::untold(cpu));
    Rendered {
        // `cpuid -f` knows no comments.
        text: format!("CPU 0:\n{}", cpu.cpuid),
        not_held,
    }
}

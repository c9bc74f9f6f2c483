//! A custom CPU template of Firecracker: JSON with a bitmap for each register, in which a bit is
//! cleared, set, or stays as the host has it.
//!
//! Firecracker applies a template to what KVM supports on the host. It refuses one that names a leaf
//! which is not there (src/vmm/src/cpu_config/x86_64/mod.rs, `apply_template_to_cpuid`, version 1.16).

use serde::Serialize;

use super::{NotHeld, RenderError, Rendered, What};
use crate::guest_cpu::GuestCpu;
use crate::msrs::{ARCH_CAPABILITIES, arch_capabilities_inverted};
use crate::registers::{Forced, forced};
use cpuid_amx::CpuidTable;
use cpuid_amx::table::has_subleaves;

#[derive(Serialize)]
struct Template {
    cpuid_modifiers: Vec<LeafModifier>,
    msr_modifiers: Vec<MsrModifier>,
}

#[derive(Serialize)]
struct LeafModifier {
    leaf: String,
    subleaf: String,
    /// KVM_CPUID_FLAG_SIGNIFCANT_INDEX where the leaf has sub-leaves.
    flags: u32,
    modifiers: Vec<RegisterModifier>,
}

#[derive(Serialize)]
struct RegisterModifier {
    register: &'static str,
    bitmap: String,
}

#[derive(Serialize)]
struct MsrModifier {
    addr: String,
    bitmap: String,
}

/// Writes the CPU as a custom CPU template for all hosts of the fleet, or for one
/// ([`GuestCpu::on`]).
///
/// # Errors
///
/// Some hosts lack a leaf that has to change on others: each kind of host needs a template of its own.
pub fn firecracker(cpu: &GuestCpu) -> Result<Rendered, RenderError> {
    let mut not_held = Vec::new();
    let mut cpuid_modifiers = Vec::new();
    for (&(leaf, subleaf), found) in &cpu.leaves {
        let registers = registers(cpu, leaf, subleaf);
        let changes = registers.iter().any(|forced| forced.mask != 0);
        if !changes || !found.somewhere {
            continue;
        }
        if found.everywhere {
            cpuid_modifiers.push(modifier(leaf, subleaf, registers));
        } else if is_idle(cpu, leaf, subleaf) {
            let why = format!(
                "CPUID.{leaf:X}H.{subleaf} stays on the hosts that have it; it means nothing without \
                 the features that the guest does not have"
            );
            not_held.push(What::Cpuid.because(why));
        } else {
            return Err(RenderError::LeafOfSomeHosts { leaf, subleaf });
        }
    }
    let inverted = arch_capabilities_inverted();
    let msr = cpu
        .arch_capabilities
        .filter(|_| cpu.sees_arch_capabilities());
    let msr_modifiers = msr.map(|shared| MsrModifier {
        addr: format!("{ARCH_CAPABILITIES:#x}"),
        bitmap: bitmap(
            u64::BITS,
            !shared & !inverted | shared & inverted,
            shared & inverted,
        ),
    });
    not_held.extend(notes(cpu));
    let template = Template {
        cpuid_modifiers,
        msr_modifiers: msr_modifiers.into_iter().collect(),
    };
    // Strings and numbers can always be written.
    let text = serde_json::to_string_pretty(&template).unwrap_or_default();
    Ok(Rendered {
        text: text + "\n",
        not_held,
    })
}

fn notes(cpu: &GuestCpu) -> Vec<NotHeld> {
    let mut notes = vec![
        What::XsaveLayout.because(
            "the places of components stay those of the host; the fleet shares only components that \
             have the same place on all hosts",
        ),
        What::FeatureMsrs.because(
            "IA32_PERF_CAPABILITIES is not in it: Firecracker hides performance monitoring",
        ),
        What::Tsc.because("a template does not say at which frequency the TSC of the guest runs"),
        What::Model.because(
            "model, caches, topology and the processor's name stay those of the host that starts \
             the guest",
        ),
    ];
    if cpu.has_amx() {
        let why = "Firecracker 1.12 and newer ask for the AMX permission themselves; older ones \
                   cannot start this guest";
        notes.insert(0, What::AmxPermission.because(why));
    }
    let so = "it stays that of the host that starts the guest";
    notes.extend(super::unknown_msr(cpu, so));
    notes.extend(super::untold(cpu));
    notes
}

/// What makes the CPU's register of any host's.
fn registers(cpu: &GuestCpu, leaf: u32, subleaf: u32) -> [Forced; 4] {
    let target = cpu.cpuid.leaf(leaf, subleaf);
    let cleared = |register: u32| Forced {
        mask: !register,
        value: 0,
    };
    let exactly = |value: u32| Forced {
        mask: u32::MAX,
        value,
    };
    let stays = Forced::default();
    match (leaf, subleaf) {
        // EBX is a size, which KVM computes anew from XCR0 and IA32_XSS while the guest runs.
        (0xd, 0) => {
            let [eax, ebx, ecx, edx] = target;
            [cleared(eax), exactly(ebx), exactly(ecx), cleared(edx)]
        }
        (0xd, 1) => {
            let [eax, ebx, ecx, edx] = target;
            [cleared(eax), exactly(ebx), cleared(ecx), cleared(edx)]
        }
        // A component that is shared is the same on all hosts.
        (0xd, _) if target != [0; 4] => [stays; 4],
        (0xd | 0x1d | 0x1e, _) => target.map(exactly),
        // Their bits for AMX are not among the plain features.
        (7, 0 | 1) => {
            let mut registers = forced(leaf, subleaf, target);
            let amx = match subleaf {
                0 => [0, 0, 0, 1 << 22 | 1 << 24 | 1 << 25],
                _ => [1 << 21, 0, 0, 1 << 8],
            };
            for ((forced, amx), target) in registers.iter_mut().zip(amx).zip(target) {
                forced.mask |= amx & !target;
            }
            registers
        }
        _ => forced(leaf, subleaf, target),
    }
}

/// Whether a leaf says nothing, because other leaves say that there is nothing that it describes.
fn is_idle(cpu: &GuestCpu, leaf: u32, subleaf: u32) -> bool {
    match leaf {
        0xd => subleaf >= 2,
        0x1d | 0x1e => !cpu.has_amx(),
        _ => false,
    }
}

fn modifier(leaf: u32, subleaf: u32, registers: [Forced; 4]) -> LeafModifier {
    let names = ["eax", "ebx", "ecx", "edx"].into_iter();
    let changed = names.zip(registers).filter(|(_, forced)| forced.mask != 0);
    LeafModifier {
        leaf: format!("{leaf:#x}"),
        subleaf: format!("{subleaf:#x}"),
        flags: u32::from(has_subleaves(leaf)),
        modifiers: changed
            .map(|(register, Forced { mask, value })| RegisterModifier {
                register,
                bitmap: bitmap(u32::BITS, mask.into(), value.into()),
            })
            .collect(),
    }
}

/// `0b01x...`: the bits of `mask` as in `value`, the others stay.
fn bitmap(bits: u32, mask: u64, value: u64) -> String {
    let bit = |number: u32| {
        let bit = 1_u64.wrapping_shl(number);
        match (mask & bit != 0, value & bit != 0) {
            (false, _) => 'x',
            (true, false) => '0',
            (true, true) => '1',
        }
    };
    let digits: String = (0..bits).rev().map(bit).collect();
    format!("0b{digits}")
}

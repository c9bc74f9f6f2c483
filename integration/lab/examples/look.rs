//! Prints all that a program can see of the host's processor and of its KVM, one fact a line.
//!
//! tests/resumed.rs compares what this says in labs that were booted and in labs that were resumed. What counts time, and where
//! the kernel has put its data, is left out by name.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, MsrList, Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

/// Registers that count, or that hold addresses in the kernel: the time stamp, the performance counters' clocks, the deadline of
/// the timer, the stack for SYSENTER, Hyper-V's two clocks, and the bases of FS and GS.
const CHANGING: [u32; 11] = [
    0x10,
    0xe7,
    0xe8,
    0x175,
    0x6e0,
    0x839,
    0x4000_0010,
    0x4000_0020,
    0xc000_0100,
    0xc000_0101,
    0xc000_0102,
];

fn main() {
    // A thread has gone to a processor when the call is done.
    for cpu in 0..64 {
        let mut one = rustix::thread::CpuSet::new();
        one.set(cpu);
        if rustix::thread::sched_setaffinity(None, &one).is_ok() {
            cpuid(cpu);
        }
    }
    // The module comes along: it is not part of a lab.
    let module = std::env::args().nth(1).unwrap();
    rustix::system::init_module(&fs::read(module).unwrap(), c"").unwrap();
    for cpu in 0..64 {
        if let Ok(registers) = fs::File::open(format!("/dev/cpu/{cpu}/msr")) {
            msrs(cpu, &registers);
        }
    }
    kvm();
    kernel();
}

#[allow(unused_unsafe, unsafe_code, reason = "safe in newer compilers only")]
fn cpuid(cpu: usize) {
    let look = |leaf, subleaf| {
        // SAFETY: CPUID exists on every x86-64 processor and touches four registers only.
        let it = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
        [it.eax, it.ebx, it.ecx, it.edx]
    };
    for first in [0, 0x4000_0000, 0x8000_0000] {
        let last = look(first, 0)[0].clamp(first, first + 0xff);
        for leaf in first..=last {
            for subleaf in 0..64 {
                let [eax, ebx, ecx, edx] = look(leaf, subleaf);
                // Most leaves have none, and say the same in each.
                if subleaf > 0 && look(leaf, subleaf - 1) == [eax, ebx, ecx, edx] {
                    continue;
                }
                println!(
                    "cpuid {cpu} {leaf:08x}.{subleaf:02x}: {eax:08x} {ebx:08x} {ecx:08x} {edx:08x}"
                );
            }
        }
    }
}

fn msrs(cpu: u32, registers: &fs::File) {
    for index in (0..0x2000)
        .chain(0xc000_0000..0xc000_1000)
        .chain(0xc001_0000..0xc001_0400)
    {
        let mut value = [0; 8];
        match registers.read_exact_at(&mut value, u64::from(index)) {
            _ if CHANGING.contains(&index) => {}
            Ok(()) => println!("msr {cpu} {index:08x}: {:016x}", u64::from_le_bytes(value)),
            Err(error) if error.kind() == io::ErrorKind::Other => {}
            Err(error) => println!("msr {cpu} {index:08x}: {error}"),
        }
    }
}

fn kvm() {
    let kvm = Kvm::new().unwrap();
    for capability in 0..300 {
        println!(
            "kvm capability {capability}: {}",
            kvm.check_extension_raw(capability)
        );
    }
    for (name, table) in [
        ("supported", kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)),
        ("emulated", kvm.get_emulated_cpuid(KVM_MAX_CPUID_ENTRIES)),
    ] {
        for entry in table.unwrap().as_slice() {
            println!("kvm {name} {entry:x?}");
        }
    }
    let features = kvm.get_msr_feature_index_list().unwrap();
    for index in features.as_slice() {
        let mut value = one(*index);
        let read = kvm.get_msrs(&mut value);
        println!(
            "kvm feature {index:08x}: {read:?} {:016x}",
            value.as_slice()[0].data
        );
    }
    let vm = kvm.create_vm().unwrap();
    vm.create_irq_chip().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    vcpu.set_cpuid2(&kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap())
        .unwrap();
    println!("vcpu {:x?}", vcpu.get_sregs().unwrap());
    println!("vcpu {:x?}", vcpu.get_regs().unwrap());
    println!("vcpu {:x?}", vcpu.get_xcrs().unwrap());
    println!("vcpu {:x?}", vcpu.get_debug_regs().unwrap());
    // Its registers at A90H count.
    println!("vcpu {:x?}", &vcpu.get_lapic().unwrap().regs[..0x380]);
    vcpu_msrs(&vcpu, &kvm.get_msr_index_list().unwrap());
}

fn vcpu_msrs(vcpu: &VcpuFd, list: &MsrList) {
    for index in list.as_slice() {
        let mut value = one(*index);
        let read = vcpu.get_msrs(&mut value);
        if !CHANGING.contains(index) {
            println!(
                "vcpu msr {index:08x}: {read:?} {:016x}",
                value.as_slice()[0].data
            );
        }
    }
}

fn one(index: u32) -> Msrs {
    Msrs::from_entries(&[kvm_msr_entry {
        index,
        ..Default::default()
    }])
    .unwrap()
}

fn kernel() {
    for line in fs::read_to_string("/proc/cpuinfo").unwrap().lines() {
        if !line.starts_with("cpu MHz") {
            println!("cpuinfo {line}");
        }
    }
    for file in [
        "/proc/cmdline",
        "/proc/iomem",
        "/proc/ioports",
        "/proc/mtrr",
        "/proc/sys/kernel/osrelease",
    ] {
        for line in fs::read_to_string(file).unwrap_or_default().lines() {
            println!("{file}: {line}");
        }
    }
    for folder in [
        "/sys/devices/system/clocksource/clocksource0",
        "/sys/devices/system/clockevents/clockevent0",
        "/sys/devices/system/cpu",
        "/sys/devices/system/cpu/vulnerabilities",
        "/sys/module/kvm/parameters",
        "/sys/module/kvm_intel/parameters",
    ] {
        files(Path::new(folder));
    }
}

fn files(folder: &Path) {
    let Ok(members) = fs::read_dir(folder) else {
        return println!("{}: is not there", folder.display());
    };
    let mut paths: Vec<_> = members.map(|member| member.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.is_file()) {
        // Some can only be written.
        if let Ok(text) = fs::read_to_string(path) {
            println!("{}: {}", path.display(), text.trim());
        }
    }
}

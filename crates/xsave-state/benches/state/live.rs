//! Capture and restore on the /dev/kvm that is here, and the bare ioctls that they consist of.

use criterion::Criterion;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_msr_entry, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuFd};
use xsave_state::kvm::{self, MSR_IA32_XFD, MSR_IA32_XFD_ERR, XsaveBuffer, XsaveSize};
use xsave_state::{ExtendedState, Image, Layout, Registers};

use super::common;
use super::ratios::Ratio;

pub(crate) fn capture_and_restore(criterion: &mut Criterion) -> Vec<Ratio> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("capture and restore are left out: /dev/kvm cannot be used");
        return Vec::new();
    };
    // SAFETY: arch_prctl with this operation takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1025, 18) };
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&supported).unwrap();
    let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    let layout = Layout::from_cpuid(|leaf, subleaf| {
        let entries = cpuid.as_slice().iter();
        let mut same = entries.filter(|e| e.function == leaf && e.index == subleaf);
        same.next().map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
    })
    .unwrap();
    let size = XsaveSize::query(&vm, &vcpu).unwrap();
    let mut buffer = XsaveBuffer::new(size);
    let area = common::area(&layout, layout.user().bits());
    let image = Image::parse(&area, &layout).unwrap();
    let registers = Registers {
        xcr0: layout.user(),
        ..Registers::RESET
    };
    let state = ExtendedState::new(image, registers).unwrap();

    let mut bare = Bare::new(&vcpu, size.bytes(), !layout.xfd().is_empty());
    let mut group = criterion.benchmark_group("live KVM");
    group.bench_function("capture ioctls", |bencher| bencher.iter(|| bare.get()));
    group.bench_function("capture", |bencher| {
        bencher.iter(|| {
            kvm::capture(&vcpu, &layout, &mut buffer)
                .unwrap()
                .over_reported
        });
    });
    group.bench_function("restore ioctls", |bencher| bencher.iter(|| bare.set()));
    group.bench_function("restore", |bencher| {
        bencher.iter(|| kvm::restore(&vcpu, &state, &mut buffer).unwrap());
    });
    group.finish();

    vec![
        Ratio::in_turns(
            "capture / its ioctls",
            10,
            || drop(kvm::capture(&vcpu, &layout, &mut buffer).unwrap()),
            || bare.get(),
        )
        .at_most(1.05),
        Ratio::in_turns(
            "restore / its ioctls",
            10,
            || kvm::restore(&vcpu, &state, &mut buffer).unwrap(),
            || bare.set(),
        )
        .at_most(1.05),
    ]
}

/// What a VMM without these crates calls, with buffers that it keeps.
struct Bare<'a> {
    vcpu: &'a VcpuFd,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    msrs: Option<Msrs>,
}

impl<'a> Bare<'a> {
    fn new(vcpu: &'a VcpuFd, bytes: usize, has_xfd: bool) -> Self {
        let entry = |index| kvm_msr_entry {
            index,
            ..Default::default()
        };
        let msrs = [entry(MSR_IA32_XFD), entry(MSR_IA32_XFD_ERR)];
        let mut bare = Self {
            vcpu,
            xsave: Xsave::new((bytes - 4096) / 4).unwrap(),
            xcrs: vcpu.get_xcrs().unwrap(),
            msrs: has_xfd.then(|| Msrs::from_entries(&msrs).unwrap()),
        };
        bare.get();
        bare
    }

    fn get(&mut self) {
        // SAFETY: The buffer has as many bytes as `XsaveSize` proves to be enough.
        unsafe { self.vcpu.get_xsave2(&mut self.xsave) }.unwrap();
        self.xcrs = self.vcpu.get_xcrs().unwrap();
        if let Some(msrs) = &mut self.msrs {
            assert_eq!(self.vcpu.get_msrs(msrs).unwrap(), 2);
        }
    }

    fn set(&self) {
        if let Some(msrs) = &self.msrs {
            assert_eq!(self.vcpu.set_msrs(msrs).unwrap(), 2);
        }
        self.vcpu.set_xcrs(&self.xcrs).unwrap();
        // SAFETY: As in `get`.
        unsafe { self.vcpu.set_xsave2(&self.xsave) }.unwrap();
    }
}

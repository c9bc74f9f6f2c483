//! Capture and restore on the /dev/kvm that is here, and the bare ioctls that they consist of.

use criterion::Criterion;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_msr_entry, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuFd};
use xsave_state::kvm::{self, HostArea, MSR_IA32_XFD, MSR_IA32_XFD_ERR, VcpuLayout, XsaveBuffer};
use xsave_state::{ExtendedState, Image, Registers};

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
    let mut vcpu = vm.create_vcpu(0).unwrap();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    vcpu.set_cpuid2(&supported).unwrap();
    let host = HostArea::query(&vm, &vcpu).unwrap();
    let vcpu_layout = VcpuLayout::query(&mut vcpu, &host).unwrap();
    let layout = vcpu_layout.layout();
    let mut buffer = XsaveBuffer::new(&host);
    let area = common::area(layout, layout.user().bits());
    let image = Image::parse(&area, layout).unwrap();
    let registers = Registers::RESET.with_xcr0(layout.user());
    let state = ExtendedState::new(image, registers).unwrap();

    // The ioctls alone are called on another vCPU, which has the same state.
    let mut other = vm.create_vcpu(1).unwrap();
    other.set_cpuid2(&supported).unwrap();
    kvm::restore(&mut other, &state, &vcpu_layout, &mut buffer).unwrap();
    let mut bare = Bare::new(&other, host.bytes(), !layout.xfd().is_empty());
    let mut group = criterion.benchmark_group("live KVM");
    group.bench_function("capture ioctls", |bencher| bencher.iter(|| bare.get()));
    group.bench_function("capture", |bencher| {
        bencher.iter(|| {
            kvm::capture(&mut vcpu, &vcpu_layout, &mut buffer)
                .unwrap()
                .over_reported
        });
    });
    group.bench_function("restore ioctls", |bencher| bencher.iter(|| bare.set()));
    group.bench_function("restore", |bencher| {
        bencher.iter(|| kvm::restore(&mut vcpu, &state, &vcpu_layout, &mut buffer).unwrap());
    });
    group.finish();

    vec![
        Ratio::in_turns(
            "capture / its ioctls",
            10,
            || drop(kvm::capture(&mut vcpu, &vcpu_layout, &mut buffer).unwrap()),
            || bare.get(),
        )
        .at_most(1.05),
        Ratio::in_turns(
            "restore / its ioctls",
            10,
            || kvm::restore(&mut vcpu, &state, &vcpu_layout, &mut buffer).unwrap(),
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
        // SAFETY: The buffer has as many bytes as `HostArea` proves to be enough.
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

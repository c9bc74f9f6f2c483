//! Costs of capture and restore on the /dev/kvm that is here, against the bare ioctls that they consist
//! of, in the same run. Ends with the ratios, because the times themselves depend on the machine.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]
#![expect(unsafe_code, reason = "the bare ioctls, to compare with")]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../ratios/mod.rs"]
mod ratios;

use criterion::Criterion;
use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_msr_entry, kvm_xcrs};
use kvm_ioctls::{Kvm, VcpuFd};
use xsave_state::kvm::{self, HostArea, MSR_IA32_XFD, MSR_IA32_XFD_ERR, VcpuLayout, XsaveBuffer};
use xsave_state::{ExtendedState, Image, Registers, XFeatures};

use ratios::Ratio;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    let measured = capture_and_restore(&mut criterion);
    criterion.final_summary();
    ratios::print(&measured);
}

fn capture_and_restore(criterion: &mut Criterion) -> Vec<Ratio> {
    let Ok(kvm) = Kvm::new() else {
        eprintln!("capture and restore are left out: /dev/kvm cannot be used");
        return Vec::new();
    };
    // SAFETY: arch_prctl with this operation takes two numbers and touches no memory.
    unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1025, 18) };
    let vm = kvm.create_vm().unwrap();
    let mut vcpu = vm.create_vcpu(0).unwrap();
    // A second one for the bare ioctls: capture and restore are the only users of theirs.
    let bare = vm.create_vcpu(1).unwrap();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    for vcpu in [&vcpu, &bare] {
        vcpu.set_cpuid2(&supported).unwrap();
    }
    let host = HostArea::query(&vm, &vcpu).unwrap();
    let layout = VcpuLayout::query(&mut vcpu, &host).unwrap();
    let mut buffer = XsaveBuffer::new(&host);
    let user = layout.layout().user();
    let xfd = layout.layout().xfd();
    let state = |in_use: XFeatures, xfd| {
        let area = common::area(layout.layout(), in_use.bits());
        let image = Image::parse(&area, layout.layout()).unwrap().into_owned();
        ExtendedState::new(image, Registers::RESET.with_xcr0(user).with_xfd(xfd)).unwrap()
    };
    let mut bare = Bare::new(&bare, host.bytes(), !xfd.is_empty());

    let mut group = criterion.benchmark_group("live KVM");
    let full = state(user, XFeatures::empty());
    group.bench_function("capture ioctls", |bencher| bencher.iter(|| bare.get()));
    group.bench_function("capture", |bencher| {
        bencher.iter(|| {
            let captured = kvm::capture(&mut vcpu, &layout, &mut buffer).unwrap();
            captured.over_reported
        });
    });
    group.bench_function("restore ioctls", |bencher| bencher.iter(|| bare.set()));
    group.bench_function("restore", |bencher| {
        bencher.iter(|| kvm::restore(&mut vcpu, &full, &layout, &mut buffer).unwrap());
    });
    group.finish();

    let mut ratios = Vec::new();
    for (name, state) in [
        ("everything in use", full),
        ("idle", state(user - XFeatures::AMX, xfd)),
    ] {
        // Both have the same state, so that the kernel copies the same.
        kvm::restore(&mut vcpu, &state, &layout, &mut buffer).unwrap();
        bare.give(&state);
        let vcpu = std::cell::RefCell::new((&mut vcpu, &mut buffer));
        let ours = |act: &dyn Fn(&mut VcpuFd, &mut XsaveBuffer)| {
            let (vcpu, buffer) = &mut *vcpu.borrow_mut();
            act(vcpu, buffer);
        };
        ratios.push(
            Ratio::in_turns(
                &format!("capture / its ioctls, {name}"),
                10,
                || ours(&|vcpu, buffer| drop(kvm::capture(vcpu, &layout, buffer).unwrap())),
                || bare.get(),
            )
            .at_most(1.05),
        );
        ratios.push(
            Ratio::in_turns(
                &format!("restore / its ioctls, {name}"),
                10,
                || ours(&|vcpu, buffer| kvm::restore(vcpu, &state, &layout, buffer).unwrap()),
                || bare.set(),
            )
            .at_most(1.15),
        );
    }
    ratios
}

/// What a VMM without these crates calls, with buffers that it keeps.
struct Bare<'a> {
    vcpu: &'a VcpuFd,
    xsave: Xsave,
    xcrs: kvm_xcrs,
    msrs: Option<Msrs>,
    bytes: usize,
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
            bytes,
        };
        bare.get();
        bare
    }

    /// Takes over a state: area, XCR0 and IA32_XFD, in an order that is safe for a new vCPU.
    fn give(&mut self, state: &ExtendedState<'_>) {
        let registers = state.registers();
        self.xsave = kvm::to_xsave(state.image()).unwrap();
        let len = (self.bytes - 4096) / 4;
        if self.xsave.as_slice().len() < len {
            let mut longer = Xsave::new(len).unwrap();
            // SAFETY: The length of the entries is not changed.
            unsafe { longer.as_mut_fam_struct() }.xsave.region =
                self.xsave.as_fam_struct_ref().xsave.region;
            self.xsave = longer;
        }
        self.xcrs.nr_xcrs = 1;
        self.xcrs.xcrs[0].value = registers.xcr0.bits();
        if let Some(msrs) = &mut self.msrs {
            msrs.as_mut_slice()[0].data = registers.xfd.bits();
            msrs.as_mut_slice()[1].data = registers.xfd_err.bits();
            assert_eq!(self.vcpu.set_msrs(msrs).unwrap(), 2);
        }
        self.set();
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

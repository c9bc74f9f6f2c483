//! VMs without memory, whose vCPUs have state and never run, and the ioctls that a VMM calls for it.

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, Xsave, kvm_debugregs, kvm_mp_state, kvm_msr_entry,
    kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};
use xsave_state::kvm::{self, MSR_IA32_XFD, MSR_IA32_XFD_ERR, XsaveBuffer, XsaveSize};
use xsave_state::{ExtendedState, Layout, XFeatures};

use super::{common, states};

/// What a host with AMX copies for each vCPU: KVM_CAP_XSAVE2.
pub(crate) const BLOB_BYTES: usize = 11_008;

pub(crate) struct Machine {
    pub(crate) vcpus: Vec<VcpuFd>,
    _vm: VmFd,
    kvm: Kvm,
    supported: CpuId,
    pub(crate) layout: Layout,
    pub(crate) size: XsaveSize,
    /// Those that can be read and written, without the extended state's.
    msrs: Vec<kvm_msr_entry>,
}

/// What is no extended state.
pub(crate) struct Rest {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    debug: kvm_debugregs,
    events: kvm_vcpu_events,
    msrs: Msrs,
}

/// The extended state, as the ioctls have it.
pub(crate) struct Bare {
    pub(crate) xsave: Xsave,
    pub(crate) xcrs: kvm_xcrs,
    xfd: Option<Msrs>,
}

impl Machine {
    pub(crate) fn new(vcpus: u64) -> Option<Self> {
        let kvm = Kvm::new().ok()?;
        // SAFETY: arch_prctl with this operation takes two numbers and touches no memory.
        unsafe { libc::syscall(libc::SYS_arch_prctl, 0x1025, 18) };
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ok()?;
        let (vm, vcpus) = create(&kvm, &supported, vcpus);
        let cpuid = vcpus[0].get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
        let layout = Layout::from_cpuid(|leaf, subleaf| {
            let entries = cpuid.as_slice().iter();
            let mut same = entries.filter(|e| e.function == leaf && e.index == subleaf);
            same.next().map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        })
        .unwrap();
        let list = kvm.get_msr_index_list().unwrap();
        let msrs = list.as_slice().iter().filter_map(|&index| {
            let mut one = Msrs::from_entries(&[entry(index)]).unwrap();
            let both = !matches!(index, MSR_IA32_XFD | MSR_IA32_XFD_ERR)
                && vcpus[0].get_msrs(&mut one) == Ok(1)
                && vcpus[0].set_msrs(&one) == Ok(1);
            both.then(|| entry(index))
        });
        Some(Self {
            msrs: msrs.collect(),
            size: XsaveSize::query(&vm, &vcpus[0]).unwrap(),
            layout,
            vcpus,
            _vm: vm,
            kvm,
            supported,
        })
    }

    /// As many vCPUs as a destination needs that has none yet, with their CPUID.
    pub(crate) fn others(&self, vcpus: usize) -> impl Sized + use<> {
        create(&self.kvm, &self.supported, vcpus as u64)
    }

    /// A guest that computes without AMX, and one that uses everything.
    pub(crate) fn states(&self) -> [(&'static str, ExtendedState<'static>); 2] {
        let user = self.layout.user();
        let of = |in_use: XFeatures, xfd: XFeatures| {
            let mut area = common::area(&self.layout, in_use.bits());
            if let Some(pkru) = self.layout.component(xsave_state::ComponentId::PKRU) {
                // KVM keeps PKRU as a number of its own.
                area[pkru.offset().unwrap() + 4..][..4].fill(0);
            }
            let registers = states::registers(user.bits(), xfd.bits(), 0);
            states::state(&area, &self.layout, registers)
        };
        let idle = XFeatures::LEGACY | XFeatures::AVX;
        [
            ("idle", of(idle & user, self.layout.xfd())),
            ("all in use", of(user, XFeatures::empty())),
        ]
    }

    pub(crate) fn give(&mut self, state: &ExtendedState<'_>) {
        let mut buffer = XsaveBuffer::new(self.size);
        for vcpu in &self.vcpus {
            kvm::restore(vcpu, state, &mut buffer).unwrap();
        }
    }

    pub(crate) fn rest(&self, vcpu: &VcpuFd) -> Rest {
        let mut msrs = Msrs::from_entries(&self.msrs).unwrap();
        let mp_state = vcpu.get_mp_state().unwrap();
        assert_eq!(vcpu.get_msrs(&mut msrs), Ok(self.msrs.len()));
        Rest {
            mp_state,
            regs: vcpu.get_regs().unwrap(),
            sregs: vcpu.get_sregs().unwrap(),
            debug: vcpu.get_debug_regs().unwrap(),
            events: vcpu.get_vcpu_events().unwrap(),
            msrs,
        }
    }
}

impl Rest {
    pub(crate) fn set(&self, vcpu: &VcpuFd) {
        vcpu.set_sregs(&self.sregs).unwrap();
        let msrs = self.msrs.as_slice().len();
        assert_eq!(vcpu.set_msrs(&self.msrs), Ok(msrs));
        vcpu.set_regs(&self.regs).unwrap();
        vcpu.set_debug_regs(&self.debug).unwrap();
        vcpu.set_vcpu_events(&self.events).unwrap();
        vcpu.set_mp_state(self.mp_state).unwrap();
    }
}

impl Bare {
    pub(crate) fn get(machine: &Machine, vcpu: &VcpuFd) -> Self {
        let mut xsave = Xsave::new((BLOB_BYTES.max(machine.size.bytes()) - 4096) / 4).unwrap();
        // SAFETY: The buffer has no fewer bytes than `XsaveSize` proves to be enough.
        unsafe { vcpu.get_xsave2(&mut xsave) }.unwrap();
        let xfd = (!machine.layout.xfd().is_empty()).then(|| {
            let entries = [entry(MSR_IA32_XFD), entry(MSR_IA32_XFD_ERR)];
            let mut msrs = Msrs::from_entries(&entries).unwrap();
            assert_eq!(vcpu.get_msrs(&mut msrs), Ok(2));
            msrs
        });
        Self {
            xsave,
            xcrs: vcpu.get_xcrs().unwrap(),
            xfd,
        }
    }

    pub(crate) fn set(&self, vcpu: &VcpuFd) {
        if let Some(msrs) = &self.xfd {
            assert_eq!(vcpu.set_msrs(msrs), Ok(2));
        }
        vcpu.set_xcrs(&self.xcrs).unwrap();
        // SAFETY: As in `get`.
        unsafe { vcpu.set_xsave2(&self.xsave) }.unwrap();
    }

    /// The first 4,096 bytes of the area as words, and the rest.
    pub(crate) fn words(&self) -> (&[u32], &[u32]) {
        (
            &self.xsave.as_fam_struct_ref().xsave.region,
            self.xsave.as_slice(),
        )
    }

    pub(crate) fn set_words(&mut self, region: &[u32], extra: &[u32]) {
        // SAFETY: `len` stays as it is.
        let xsave = unsafe { self.xsave.as_mut_fam_struct() };
        xsave.xsave.region.copy_from_slice(region);
        self.xsave.as_mut_slice().copy_from_slice(extra);
    }
}

fn create(kvm: &Kvm, cpuid: &CpuId, vcpus: u64) -> (VmFd, Vec<VcpuFd>) {
    let vm = kvm.create_vm().unwrap();
    let vcpus = (0..vcpus).map(|index| {
        let vcpu = vm.create_vcpu(index).unwrap();
        vcpu.set_cpuid2(cpuid).unwrap();
        vcpu
    });
    let vcpus = vcpus.collect();
    (vm, vcpus)
}

fn entry(index: u32) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        ..Default::default()
    }
}

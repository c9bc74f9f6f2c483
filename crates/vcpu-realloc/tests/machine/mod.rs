//! A VM whose guest writes IA32_XFD, on the /dev/kvm that is here.

use std::sync::Once;

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vcpu_realloc::Growth;
use vcpu_realloc::kvm::{Answer, HandleError, Handled, XfdDriver};
use xsave_state::kvm::{self, XsaveBuffer, XsaveSize};
use xsave_state::{ExtendedState, Image, Layout, Registers, XFeatures};

pub(crate) const GP_VECTOR: u8 = 13;

const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_long = 0x1025;
const XTILEDATA: libc::c_long = 18;
const CODE: usize = 0x1000;
const HANDLERS: usize = 0x800;
const HANDLER_BYTES: usize = 8;
const PORT: u16 = 0x10;

/// Why the guest stopped.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Stop {
    WroteXfd(u64),
    Vector(u8),
    Halted,
}

#[repr(align(4096))]
struct Memory([u8; 0x2000]);

pub(crate) struct Machine {
    pub(crate) vm: VmFd,
    pub(crate) vcpu: VcpuFd,
    pub(crate) layout: Layout,
    pub(crate) driver: XfdDriver,
    pub(crate) buffer: XsaveBuffer,
    /// The guest's memory; the VM goes first.
    _memory: Box<Memory>,
}

impl Machine {
    /// A guest that writes these values to IA32_XFD and halts, or `None` (and why) without /dev/kvm.
    pub(crate) fn new(writes: &[u64]) -> Option<Self> {
        let mut code: Vec<u8> = writes.iter().flat_map(|&value| wrmsr(value)).collect();
        code.push(0xf4); // hlt
        Self::with_code(&code)
    }

    /// A guest that writes 0 for ever.
    pub(crate) fn endless() -> Option<Self> {
        let mut code = wrmsr(0);
        let back = -(code.len() as i16) - 2;
        code.extend([0xeb, back as u8]); // jmp
        Self::with_code(&code)
    }

    fn with_code(code: &[u8]) -> Option<Self> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                println!("skipped: /dev/kvm cannot be used: {error}");
                return None;
            }
        };
        static PERMISSION: Once = Once::new();
        PERMISSION.call_once(|| {
            // SAFETY: arch_prctl with this operation takes two numbers and touches no memory. Where
            // the host has no AMX it fails, and the tests go on without.
            unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, XTILEDATA) };
        });

        let vm = kvm.create_vm().unwrap();
        let mut memory = Box::new(Memory([0; 0x2000]));
        memory.0[CODE..][..code.len()].copy_from_slice(code);
        // Real mode: each vector's handler says its number at the port.
        for vector in 0..32 {
            let handler = HANDLERS + vector * HANDLER_BYTES;
            memory.0[vector * 4..][..2].copy_from_slice(&(handler as u16).to_le_bytes());
            // mov al, vector; out PORT, al; hlt
            let say = [0xb0, vector as u8, 0xe6, PORT as u8, 0xf4];
            memory.0[handler..][..say.len()].copy_from_slice(&say);
        }
        let region = kvm_userspace_memory_region {
            memory_size: memory.0.len() as u64,
            userspace_addr: memory.0.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: The memory is page-aligned and lives in the `Machine` for as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();

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
        let mut sregs = vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs).unwrap();
        let mut regs = vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (CODE as u64, 0x1800, 2);
        vcpu.set_regs(&regs).unwrap();
        let buffer = XsaveBuffer::new(XsaveSize::query(&vm, &vcpu).unwrap());
        Some(Self {
            driver: XfdDriver::new(&layout),
            vm,
            vcpu,
            layout,
            buffer,
            _memory: memory,
        })
    }

    pub(crate) fn run(&mut self) -> Stop {
        match self.vcpu.run().unwrap() {
            VcpuExit::X86Wrmsr(exit) => {
                assert_eq!(exit.index, 0x1c4);
                Stop::WroteXfd(exit.data)
            }
            VcpuExit::IoOut(PORT, &[vector]) => Stop::Vector(vector),
            VcpuExit::Hlt => Stop::Halted,
            exit => panic!("{exit:?}"),
        }
    }

    pub(crate) fn handle(
        &mut self,
        value: u64,
        first_use: impl FnOnce(Growth) -> Answer,
    ) -> Result<Handled, HandleError> {
        let Self {
            driver,
            vcpu,
            buffer,
            ..
        } = self;
        driver.handle(vcpu, 0x1c4, value, buffer, first_use)
    }

    pub(crate) fn capture(&mut self) -> ExtendedState<'static> {
        let capture = kvm::capture(&self.vcpu, &self.layout, &mut self.buffer).unwrap();
        capture.state.into_owned()
    }

    pub(crate) fn has_amx(&self) -> bool {
        let has = !self.layout.xfd().is_empty();
        if !has {
            println!("skipped: this host's KVM has no AMX");
        }
        has
    }

    /// Enables AMX in XCR0, as the guest's XSETBV would.
    pub(crate) fn enable_amx(&mut self) {
        self.restore(Image::initial(&self.layout));
    }

    /// Puts all components into use, the tiles among them.
    pub(crate) fn fill_tiles(&mut self) {
        let mut area = Image::initial(&self.layout).as_bytes().to_vec();
        area[512..520].copy_from_slice(&XFeatures::AMX.bits().to_le_bytes());
        let tiles = self.layout.component(xsave_state::ComponentId::XTILEDATA);
        let start = tiles.unwrap().offset().unwrap();
        area[start..].fill(0x5a);
        let image = Image::parse(&area, &self.layout).unwrap().into_owned();
        self.restore(image);
    }

    fn restore(&mut self, image: Image<'_>) {
        let registers = Registers {
            xcr0: self.layout.user(),
            ..Registers::RESET
        };
        let state = ExtendedState::new(image, registers).unwrap();
        kvm::restore(&self.vcpu, &state, &mut self.buffer).unwrap();
    }

    /// Lets the driver believe in a guest with AMX.
    pub(crate) fn claim_amx(&mut self) {
        let layout = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0x1e, 0, 0, 0],
            (0xd, 0) => [0x60003, 11008, 11008, 0],
            (0xd, 1) => [0x1f, 9088, 0, 0],
            (0xd, 17) => [64, 2752, 2, 0],
            (0xd, 18) => [8192, 2816, 6, 0],
            _ => [0; 4],
        });
        self.driver = XfdDriver::new(&layout.unwrap());
    }

    pub(crate) fn unclaim_amx(&mut self) {
        self.driver = XfdDriver::new(&self.layout);
    }
}

/// mov ecx, 0x1c4; mov eax, low; mov edx, high; wrmsr
fn wrmsr(value: u64) -> Vec<u8> {
    let mut code = vec![0x66, 0xb9];
    code.extend(0x1c4u32.to_le_bytes());
    code.extend([0x66, 0xb8]);
    code.extend((value as u32).to_le_bytes());
    code.extend([0x66, 0xba]);
    code.extend(((value >> 32) as u32).to_le_bytes());
    code.extend([0x0f, 0x30]);
    code
}

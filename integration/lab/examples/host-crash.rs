//! Puts a vCPU into the state that an unpatched host does not survive, or into the same by way of this project's crates.
//!
//! It refuses to run anywhere but in the lab. tests/host_crash.rs runs it there; SECURITY.md says what it is about.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]
#![expect(unsafe_code, reason = "a VM's memory needs it")]

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, Msrs, kvm_msr_entry, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use xsave_state::kvm::{self, MSR_IA32_XFD, XsaveBuffer, XsaveSize};
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Registers, XFeatures};

const HLT: u8 = 0xf4;

#[repr(align(4096))]
struct Page([u8; 4096]);

struct Machine {
    vcpu: VcpuFd,
    layout: Layout,
    buffer: XsaveBuffer,
    _vm: VmFd,
    /// The guest's memory; the VM goes first.
    _page: Box<Page>,
}

impl Machine {
    fn new() -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let mut page = Box::new(Page([HLT; 4096]));
        let region = kvm_userspace_memory_region {
            memory_size: 4096,
            userspace_addr: page.0.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: The page is 4,096 bytes, aligned, and lives in the `Machine` for as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let layout = Layout::from_cpuid(|leaf, subleaf| {
            let mut same = cpuid
                .as_slice()
                .iter()
                .filter(|e| e.function == leaf && e.index == subleaf);
            same.next().map_or([0; 4], |e| [e.eax, e.ebx, e.ecx, e.edx])
        })
        .unwrap();
        let buffer = XsaveBuffer::new(XsaveSize::query(&vm, &vcpu).unwrap());
        Self {
            vcpu,
            layout,
            buffer,
            _vm: vm,
            _page: page,
        }
    }

    fn restore(&mut self, state: &ExtendedState<'_>) {
        kvm::restore(&self.vcpu, state, &mut self.buffer).unwrap();
    }

    /// Runs the guest up to its HLT. For that the host loads the guest's extended state into the processor.
    fn run(&mut self) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (0, 2);
        self.vcpu.set_regs(&regs).unwrap();
        assert!(matches!(self.vcpu.run(), Ok(VcpuExit::Hlt)));
    }
}

/// Tiles that are configured and hold a pattern.
fn live_tiles(layout: &Layout) -> ExtendedState<'static> {
    let offset = |id| layout.component(id).unwrap().offset().unwrap();
    let mut area = vec![0; layout.standard_size()];
    area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
    let in_use = XFeatures::from_bits_retain(1 << 17 | 1 << 18);
    area[512..520].copy_from_slice(&in_use.bits().to_le_bytes());
    let config = offset(ComponentId::XTILECFG);
    area[config] = 1;
    for tile in 0..8 {
        area[config + 16 + 2 * tile] = 64;
        area[config + 48 + tile] = 16;
    }
    let data = offset(ComponentId::XTILEDATA);
    for (byte, number) in area[data..data + 8192].iter_mut().zip((0..=250_u8).cycle()) {
        *byte = number;
    }
    let registers = Registers {
        xcr0: layout.user(),
        xfd: XFeatures::empty(),
        xfd_err: XFeatures::empty(),
    };
    ExtendedState::new(Image::parse(&area, layout).unwrap().into_owned(), registers).unwrap()
}

fn main() {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    assert!(
        std::env::var_os("AMX_LAB").is_some() && name.trim() == "amx-lab",
        "this would crash the host: it runs in the lab only"
    );
    cpuid_amx::GuestPermission::request().unwrap();
    let tiles = XFeatures::from_bits_retain(1 << 18);
    let mut machine = Machine::new();
    let state = live_tiles(&machine.layout);
    machine.restore(&state);
    machine.run();
    println!("live tiles run");
    match std::env::args().nth(1).as_deref() {
        Some("naive") => {
            let entry = kvm_msr_entry {
                index: MSR_IA32_XFD,
                data: tiles.bits(),
                ..Default::default()
            };
            assert_eq!(
                machine
                    .vcpu
                    .set_msrs(&Msrs::from_entries(&[entry]).unwrap())
                    .unwrap(),
                1
            );
            println!("before the run");
            machine.run();
            println!("the host survived");
        }
        Some("ours") => {
            let released = kvm::write_xfd(&machine.vcpu, tiles, &mut machine.buffer).unwrap();
            assert_eq!(released, tiles);
            println!("before the run");
            machine.run();
            let saved = kvm::capture(&machine.vcpu, &machine.layout, &mut machine.buffer)
                .unwrap()
                .state
                .into_owned();
            assert_eq!(saved.registers().xfd, tiles);
            let mut other = Machine::new();
            other.restore(&saved);
            other.run();
            println!("the host survived");
        }
        _ => panic!("naive or ours"),
    }
}

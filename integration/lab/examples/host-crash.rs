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
use vcpu_realloc::Answer;
use vcpu_realloc::kvm::{Handled, Options, VmGate};
use xsave_state::kvm::{self, HostArea, MSR_IA32_XFD, VcpuLayout, XsaveBuffer};
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Registers, XFeatures};

const HLT: u8 = 0xf4;
/// Where the guest arms IA32_XFD: mov ecx, 0x1c4; mov eax, 1 << 18; xor edx, edx; wrmsr; then HLT.
const ARM: usize = 0x100;
const ARM_CODE: [u8; 17] = [
    0x66, 0xb9, 0xc4, 0x01, 0, 0, 0x66, 0xb8, 0, 0, 0x04, 0, 0x66, 0x31, 0xd2, 0x0f, 0x30,
];

#[repr(align(4096))]
struct Page([u8; 4096]);

struct Machine {
    vcpu: VcpuFd,
    layout: VcpuLayout,
    buffer: XsaveBuffer,
    vm: VmFd,
    /// The guest's memory; the VM goes first.
    _page: Box<Page>,
}

impl Machine {
    fn new() -> Self {
        let kvm = Kvm::new().unwrap();
        let vm = kvm.create_vm().unwrap();
        let mut page = Box::new(Page([HLT; 4096]));
        page.0[ARM..][..ARM_CODE.len()].copy_from_slice(&ARM_CODE);
        let region = kvm_userspace_memory_region {
            memory_size: 4096,
            userspace_addr: page.0.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: The page is 4,096 bytes, aligned, and lives in the `Machine` for as long as the VM.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let mut vcpu = vm.create_vcpu(0).unwrap();
        let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
        vcpu.set_cpuid2(&cpuid).unwrap();
        let host = HostArea::query(&vm, &vcpu).unwrap();
        Self {
            layout: VcpuLayout::query(&mut vcpu, &host).unwrap(),
            buffer: XsaveBuffer::new(&host),
            vcpu,
            vm,
            _page: page,
        }
    }

    fn restore(&mut self, state: &ExtendedState<'_>) {
        kvm::restore(&mut self.vcpu, state, &self.layout, &mut self.buffer).unwrap();
    }

    /// Runs the guest up to its HLT. For that the host loads the guest's extended state into the processor.
    fn run(&mut self) {
        self.go_to(0);
        assert!(matches!(self.vcpu.run(), Ok(VcpuExit::Hlt)));
    }

    fn go_to(&mut self, rip: usize) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rflags) = (rip as u64, 2);
        self.vcpu.set_regs(&regs).unwrap();
    }

    /// KVM_SET_MSRS of IA32_XFD and nothing else.
    fn write_xfd_naively(&self, xfd: XFeatures) {
        let entry = kvm_msr_entry {
            index: MSR_IA32_XFD,
            data: xfd.bits(),
            ..Default::default()
        };
        let msrs = Msrs::from_entries(&[entry]).unwrap();
        assert_eq!(self.vcpu.set_msrs(&msrs).unwrap(), 1);
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
    let registers = Registers::RESET.with_xcr0(layout.user());
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
    let state = live_tiles(machine.layout.layout());
    machine.restore(&state);
    machine.run();
    println!("live tiles run");
    match std::env::args().nth(1).as_deref() {
        Some("naive") => {
            machine.write_xfd_naively(tiles);
            println!("before the run");
            machine.run();
            println!("the host survived");
        }
        // The guest's own write, which leaves to us, performed naively or by the gate.
        Some(how @ ("trapped-naive" | "trapped-ours")) => {
            let gate =
                VmGate::install(&machine.vm, machine.layout.layout(), Options::default()).unwrap();
            let mut handler = gate.vcpu(0, &mut Answer::Deny).unwrap();
            machine.go_to(ARM);
            let (index, value) = match machine.vcpu.run().unwrap() {
                VcpuExit::X86Wrmsr(exit) => (exit.index, exit.data),
                exit => panic!("{exit:?}"),
            };
            assert_eq!((index, value), (MSR_IA32_XFD, tiles.bits()));
            if how == "trapped-naive" {
                machine.write_xfd_naively(tiles);
            } else {
                let vcpu = &mut machine.vcpu;
                let buffer = &mut machine.buffer;
                let handled = handler
                    .handle(index, value, vcpu, buffer, &mut Answer::Deny)
                    .unwrap();
                assert!(matches!(handled, Handled::Written { released, .. } if released == tiles));
            }
            println!("before the run");
            // Completes the guest's instruction, too.
            assert!(matches!(machine.vcpu.run(), Ok(VcpuExit::Hlt)));
            println!("the host survived");
        }
        Some("ours") => {
            let released = kvm::write_xfd(&mut machine.vcpu, tiles, &mut machine.buffer).unwrap();
            assert_eq!(released, tiles);
            println!("before the run");
            machine.run();
            let saved = kvm::capture(&mut machine.vcpu, &machine.layout, &mut machine.buffer)
                .unwrap()
                .state
                .into_owned();
            assert_eq!(saved.registers().xfd, tiles);
            let mut other = Machine::new();
            other.restore(&saved);
            other.run();
            println!("the host survived");
        }
        _ => panic!("naive, ours, trapped-naive or trapped-ours"),
    }
}

//! Reads and writes what a VM has in the kernel beside its vCPUs: interrupt controllers, timer, clock.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
};
use kvm_ioctls::VmFd;
use thiserror::Error;
use vmm_sys_util::errno;

use crate::linux::devices::State as Devices;
use crate::registers::Timer;

/// Bytes of the state of one interrupt controller, as KVM_GET_IRQCHIP has them.
pub(crate) const CHIP_BYTES: usize = 512;
/// The interrupt controllers of a PC.
const CHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The state of one interrupt controller.
pub type Chip = [u8; CHIP_BYTES];

/// The state of a VM beside its memory and its vCPUs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Platform {
    /// Both PICs and the I/O APIC.
    pub(crate) chips: [Box<Chip>; 3],
    /// The PIT.
    pub(crate) timer: Timer,
    /// kvmclock in nanoseconds.
    pub(crate) clock: u64,
    /// What this VMM emulates itself.
    pub(crate) devices: Devices,
}

impl Platform {
    /// The state of the devices that this VMM emulates itself.
    #[must_use]
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// Reads it from a VM that does not run.
    pub(crate) fn capture(vm: &VmFd, devices: Devices) -> Result<Self, PlatformError> {
        let failed = |ioctl| move |error| PlatformError { ioctl, error };
        let mut chips = [(); 3].map(|()| Box::new([0; CHIP_BYTES]));
        for (chip, id) in chips.iter_mut().zip(CHIPS) {
            **chip = read_chip(vm, id).map_err(failed("KVM_GET_IRQCHIP"))?;
        }
        Ok(Self {
            chips,
            timer: vm.get_pit2().map_err(failed("KVM_GET_PIT2"))?.into(),
            clock: vm.get_clock().map_err(failed("KVM_GET_CLOCK"))?.clock,
            devices,
        })
    }

    /// Writes it to a VM whose vCPUs have their state. The guest's clock stood still meanwhile.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), PlatformError> {
        let failed = |ioctl| move |error| PlatformError { ioctl, error };
        for (chip, id) in self.chips.iter().zip(CHIPS) {
            write_chip(vm, id, chip).map_err(failed("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.timer.into())
            .map_err(failed("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data {
            clock: self.clock,
            ..Default::default()
        };
        vm.set_clock(&clock).map_err(failed("KVM_SET_CLOCK"))
    }
}

#[allow(unsafe_code, reason = "a union of the kernel's")]
fn read_chip(vm: &VmFd, id: u32) -> Result<Chip, errno::Error> {
    let mut chip = kvm_irqchip {
        chip_id: id,
        ..Default::default()
    };
    vm.get_irqchip(&mut chip)?;
    // SAFETY: `dummy` is as long as the union. All its bytes were zero at first (kvm-bindings'
    // `Default` zeroes them) and the kernel writes whole structures of integers over them, so each
    // byte is initialised; and any byte is a valid `c_char`.
    let bytes = unsafe { chip.chip.dummy };
    Ok(bytes.map(i8::cast_unsigned))
}

fn write_chip(vm: &VmFd, id: u32, bytes: &Chip) -> Result<(), errno::Error> {
    let mut chip = kvm_irqchip {
        chip_id: id,
        ..Default::default()
    };
    chip.chip.dummy = bytes.map(u8::cast_signed);
    vm.set_irqchip(&chip)
}

/// An ioctl on the VM failed.
#[derive(Debug, Error)]
#[error("{ioctl}: {error}")]
pub struct PlatformError {
    /// Its name.
    pub ioctl: &'static str,
    /// By the kernel.
    pub error: errno::Error,
}

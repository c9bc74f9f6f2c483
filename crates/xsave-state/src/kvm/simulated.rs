//! A vCPU for what cannot be provoked on a real one: an ioctl that fails at step n, and a kernel
//! without the fixes, which takes an area that would crash the host.

use core::cell::{Cell, RefCell};
use std::string::String;
use std::vec::Vec;

use vmm_sys_util::errno::{Error as Errno, Result};

use super::buffer::XsaveBuffer;
use super::ioctl::Vcpu;
use super::size::XsaveSize;
use crate::bytes;
use crate::header::XSTATE_BV;
use crate::layout::Layout;

const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;

/// Takes what an unfixed KVM takes. What it would do to its host is seen by [`host_lives`].
///
/// [`host_lives`]: SimulatedVcpu::host_lives
pub(super) struct SimulatedVcpu {
    pub area: RefCell<Vec<u8>>,
    pub xcr0: Cell<Option<u64>>,
    pub xfd: Cell<u64>,
    pub xfd_err: Cell<u64>,
    pub has_cpuid: Cell<bool>,
    pub keeps_compacted: Cell<bool>,
    pub has_xfd: Cell<bool>,
    /// How many registers KVM_SET_MSRS takes before it refuses one.
    pub msrs_taken: Cell<usize>,
    /// Counts down; the ioctl that meets 1 fails with ENOMEM.
    pub fail_at: Cell<usize>,
    /// The ioctls done, in their order.
    pub log: RefCell<Vec<String>>,
}

impl SimulatedVcpu {
    pub(super) fn new(area: &[u8]) -> Self {
        Self {
            area: RefCell::new(area.to_vec()),
            xcr0: Cell::new(Some(1)),
            xfd: Cell::new(0),
            xfd_err: Cell::new(0),
            has_cpuid: Cell::new(true),
            keeps_compacted: Cell::new(true),
            has_xfd: Cell::new(true),
            msrs_taken: Cell::new(2),
            fail_at: Cell::new(0),
            log: RefCell::default(),
        }
    }

    pub(super) fn xstate_bv(&self) -> u64 {
        bytes::u64_at(&self.area.borrow(), XSTATE_BV)
    }

    /// Whether KVM_RUN could load this state: XRSTORS with XSTATE_BV & XFD raises #NM.
    pub(super) fn host_lives(&self) -> bool {
        self.xstate_bv() & self.xfd.get() == 0
    }

    fn ioctl(&self, name: &str) -> Result<()> {
        let left = self.fail_at.get();
        self.fail_at.set(left.saturating_sub(1));
        if left == 1 {
            return Err(Errno::new(ENOMEM));
        }
        self.log.borrow_mut().push(name.into());
        Ok(())
    }
}

impl Vcpu for SimulatedVcpu {
    fn keeps_compacted(&self) -> bool {
        self.keeps_compacted.get()
    }

    fn has_cpuid(&self) -> Result<bool> {
        self.ioctl("GET_CPUID2")?;
        Ok(self.has_cpuid.get())
    }

    fn read_area(&self, buffer: &mut XsaveBuffer) -> Result<()> {
        self.ioctl("GET_XSAVE2")?;
        buffer.area_mut().copy_from_slice(&self.area.borrow());
        Ok(())
    }

    fn write_area(&self, buffer: &XsaveBuffer) -> Result<()> {
        self.ioctl("SET_XSAVE")?;
        let mut area = self.area.borrow_mut();
        let len = area.len();
        area.copy_from_slice(&buffer.area()[..len]);
        Ok(())
    }

    fn read_xcr0(&self) -> Result<Option<u64>> {
        self.ioctl("GET_XCRS")?;
        Ok(self.xcr0.get())
    }

    fn write_xcr0(&self, value: u64) -> Result<()> {
        self.ioctl("SET_XCRS")?;
        if !self.has_cpuid.get() && value != 1 {
            return Err(Errno::new(EINVAL));
        }
        self.xcr0.set(Some(value));
        Ok(())
    }

    fn read_xfd(&self, _: &mut XsaveBuffer) -> Result<Option<(u64, u64)>> {
        self.ioctl("GET_MSRS")?;
        let both = (self.xfd.get(), self.xfd_err.get());
        Ok(self.has_xfd.get().then_some(both))
    }

    fn write_xfd(&self, _: &mut XsaveBuffer, xfd: u64, xfd_err: Option<u64>) -> Result<usize> {
        self.ioctl("SET_MSRS")?;
        if !self.has_cpuid.get() && xfd != 0 {
            return Ok(0);
        }
        let values = [(&self.xfd, Some(xfd)), (&self.xfd_err, xfd_err)];
        let mut taken = 0;
        for (register, value) in values.into_iter().take(self.msrs_taken.get()) {
            if let Some(value) = value {
                register.set(value);
                taken += 1;
            }
        }
        Ok(taken)
    }
}

/// A guest of an emulated Sapphire Rapids: XCR0 0x602e7, XFD for component 18, as KVM 7.2 in the lab
/// shows it.
pub(super) fn amx_layout() -> Layout {
    layout_of(0x1f)
}

/// The same with a CPUID that hides XFD.
pub(super) fn amx_layout_without_xfd() -> Layout {
    layout_of(0xf)
}

fn layout_of(xsave_features: u32) -> Layout {
    Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0, _) => [0x20, 0, 0, 0],
        (0xd, 0) => [0x602e7, 0x2b00, 0x2b00, 0],
        (0xd, 1) => [xsave_features, 0x2a00, 0, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 5) => [64, 1088, 0, 0],
        (0xd, 6) => [512, 1152, 0, 0],
        (0xd, 7) => [1024, 1664, 0, 0],
        (0xd, 9) => [8, 2688, 0, 0],
        (0xd, 17) => [64, 2752, 2, 0],
        (0xd, 18) => [8192, 2816, 6, 0],
        (0x1d, 0) => [1, 0, 0, 0],
        (0x1d, 1) => [0x0400_2000, 0x0008_0040, 0x10, 0],
        _ => [0; 4],
    })
    .unwrap()
}

/// An area of that layout with these components in use. Its bytes differ from place to place.
pub(super) fn amx_area(xstate_bv: u64) -> Vec<u8> {
    let mut area: Vec<u8> = (0..11_008u32).map(|i| (i % 251) as u8).collect();
    area[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    area[416..576].fill(0);
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
    area[2752..2816].fill(0);
    area[2752] = 1;
    for tile in 0..8 {
        area[2768 + 2 * tile] = 64;
        area[2800 + tile] = 16;
    }
    area
}

pub(super) fn amx_buffer() -> XsaveBuffer {
    XsaveBuffer::new(XsaveSize::from_capability(11_008).unwrap())
}

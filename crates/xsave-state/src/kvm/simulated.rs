//! A vCPU for what cannot be provoked on a real one: an ioctl that fails at step n, and a kernel
//! without the fixes, which accepts an area that would crash the host.

use std::format;
use std::string::String;
use std::vec::Vec;

use kvm_bindings::kvm_cpuid_entry2;

use super::buffer::XsaveBuffer;
use super::errno::Errno;
use super::host::HostArea;
use super::vcpu::Vcpu;
use super::vcpu_layout::VcpuLayout;
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{EXTENDED_OFFSET, XMM, XSTATE_BV};
use crate::layout::{Component, Layout, Palette};

const PKRU: usize = 2688;

/// Accepts what an unfixed KVM accepts, and copies as KVM does: components in use alone, PKRU beside
/// the area.
pub(super) struct SimulatedVcpu {
    pub area: Vec<u8>,
    pub pkru: u32,
    pub xcr0: Option<u64>,
    pub xfd: u64,
    pub xfd_err: u64,
    pub has_cpuid: bool,
    pub has_xfd: bool,
    /// How many registers KVM_SET_MSRS sets before it refuses one.
    pub msrs_accepted: usize,
    /// Counts down; the ioctl that meets 1 fails with ENOMEM.
    pub fail_at: usize,
    /// The ioctls done, in their order.
    pub log: Vec<String>,
    /// How many ioctls left the vCPU in a state with which KVM_RUN would kill the host.
    pub dangers: usize,
}

impl SimulatedVcpu {
    pub(super) fn new(area: &[u8]) -> Self {
        Self {
            area: area.to_vec(),
            pkru: 0,
            xcr0: Some(1),
            xfd: 0,
            xfd_err: 0,
            has_cpuid: true,
            has_xfd: true,
            msrs_accepted: usize::MAX,
            fail_at: 0,
            log: Vec::new(),
            dangers: 0,
        }
    }

    pub(super) fn xstate_bv(&self) -> u64 {
        bytes::u64_at(&self.area, XSTATE_BV)
    }

    /// Whether KVM_RUN could load this state: XRSTORS with XSTATE_BV & XFD raises #NM.
    pub(super) fn host_lives(&self) -> bool {
        self.xstate_bv() & self.xfd == 0
    }

    fn ioctl(&mut self, name: impl Into<String>) -> Result<(), Errno> {
        let left = self.fail_at;
        self.fail_at = left.saturating_sub(1);
        if left == 1 {
            return Err(Errno::new(libc::ENOMEM));
        }
        self.log.push(name.into());
        Ok(())
    }

    fn note_danger(&mut self) {
        self.dangers += usize::from(!self.host_lives());
    }
}

// SAFETY: There is no kernel: nothing but the buffer's own bytes is read or written.
#[allow(unsafe_code)]
unsafe impl Vcpu for SimulatedVcpu {
    fn get_cpuid2(&mut self) -> Result<Vec<kvm_cpuid_entry2>, Errno> {
        self.ioctl("GET_CPUID2")?;
        let one = self.has_cpuid.then(kvm_cpuid_entry2::default);
        Ok(one.into_iter().collect())
    }

    fn has_cpuid(&mut self) -> Result<bool, Errno> {
        self.ioctl("GET_CPUID2")?;
        Ok(self.has_cpuid)
    }

    fn get_xsave2(&mut self, buffer: &mut XsaveBuffer) -> Result<(), Errno> {
        self.ioctl("GET_XSAVE2")?;
        let len = self.area.len();
        buffer.bytes_mut()[..len].copy_from_slice(&self.area);
        Ok(())
    }

    fn set_xsave(&mut self, buffer: &XsaveBuffer) -> Result<(), Errno> {
        self.ioctl("SET_XSAVE")?;
        let from = buffer.as_bytes();
        let in_use = XFeatures::from_bits_retain(bytes::u64_at(from, XSTATE_BV));
        if in_use.contains(XFeatures::X87) {
            self.area[..XMM.start].copy_from_slice(&from[..XMM.start]);
        }
        if in_use.intersects(XFeatures::SSE | XFeatures::AVX) {
            self.area[24..32].copy_from_slice(&from[24..32]);
        }
        let layout = amx_layout();
        for component in layout.components().skip(1) {
            if !in_use.contains(component.id().bit()) {
                continue;
            }
            if let Some(range) = component.range() {
                self.area[range.clone()].copy_from_slice(&from[range]);
            }
        }
        self.area[XSTATE_BV..EXTENDED_OFFSET].copy_from_slice(&from[XSTATE_BV..EXTENDED_OFFSET]);
        if in_use.contains(XFeatures::PKRU) {
            self.pkru = bytes::u32_at(from, PKRU);
        }
        self.note_danger();
        Ok(())
    }

    fn get_xcr0(&mut self) -> Result<Option<u64>, Errno> {
        self.ioctl("GET_XCRS")?;
        Ok(self.xcr0)
    }

    fn set_xcr0(&mut self, value: u64) -> Result<(), Errno> {
        self.ioctl("SET_XCRS")?;
        if !self.has_cpuid && value != 1 {
            return Err(Errno::new(libc::EINVAL));
        }
        self.xcr0 = Some(value);
        Ok(())
    }

    fn get_msrs(&mut self, indices: [u32; 2]) -> Result<Option<[u64; 2]>, Errno> {
        assert_eq!(indices, [0x1c4, 0x1c5]);
        self.ioctl("GET_MSRS")?;
        Ok(self.has_xfd.then_some([self.xfd, self.xfd_err]))
    }

    fn set_msrs(&mut self, msrs: &[(u32, u64)]) -> Result<usize, Errno> {
        let list = msrs
            .iter()
            .map(|(index, value)| format!(" {index:x}={value:x}"));
        self.ioctl(list.fold(String::from("SET_MSRS"), |all, one| all + &one))?;
        let mut written = 0;
        for &(index, value) in msrs.iter().take(self.msrs_accepted) {
            if !self.has_cpuid && value != 0 {
                break;
            }
            match index {
                0x1c4 => self.xfd = value,
                0x1c5 => self.xfd_err = value,
                _ => break,
            }
            written += 1;
        }
        // Nothing runs between two writes of one ioctl.
        self.note_danger();
        Ok(written)
    }
}

/// A guest of an emulated Sapphire Rapids: XCR0 0x602e7, as KVM 7.2 in the lab shows it.
pub(super) fn amx_layout() -> Layout {
    layout_of(XFeatures::all())
}

fn layout_of(features: XFeatures) -> Layout {
    let parts = [
        Component::user(ComponentId::AVX, 576, 256),
        Component::user(ComponentId::OPMASK, 1088, 64),
        Component::user(ComponentId::ZMM_HI256, 1152, 512),
        Component::user(ComponentId::HI16_ZMM, 1664, 1024),
        Component::user(ComponentId::PKRU, PKRU, 8),
        Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
        Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
    ];
    let parts = parts
        .into_iter()
        .filter(|c| features.contains(c.id().bit()));
    Layout::from_parts(parts, [Palette::ONE]).unwrap()
}

pub(super) fn amx_host(is_compacted: bool) -> HostArea {
    HostArea::new(11_008, amx_layout(), is_compacted).unwrap()
}

pub(super) fn amx_vcpu_layout() -> VcpuLayout {
    vcpu_layout_of(XFeatures::all())
}

pub(super) fn vcpu_layout_of(features: XFeatures) -> VcpuLayout {
    VcpuLayout::new(&layout_of(features), &amx_host(true)).unwrap()
}

/// An area of that layout with these components in use. Its bytes differ from place to place.
pub(super) fn amx_area(xstate_bv: u64) -> Vec<u8> {
    let mut area: Vec<u8> = (0..11_008u32).map(|i| (i % 251) as u8).collect();
    area[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    area[416..576].fill(0);
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
    area[2688..2696].fill(0);
    if xstate_bv & 1 << 9 != 0 {
        area[2688] = 0x54;
    }
    area[2752..2816].fill(0);
    area[2752] = 1;
    for tile in 0..8 {
        area[2768 + 2 * tile] = 64;
        area[2800 + tile] = 16;
    }
    area
}

pub(super) fn amx_buffer() -> XsaveBuffer {
    XsaveBuffer::new(&amx_host(true))
}

//! A look into an encoded state, with no layout but its own.

use alloc::vec::Vec;

use super::buffer::Buffer;
use super::codec::Codec;
use super::error::DecodeError;
use super::frame::Frame;
use crate::area::Image;
use crate::layout::Layout;
use crate::registers::Registers;
use crate::state::ExtendedState;

/// What an encoded state says, once its format has been checked: checksum, tables and records. The
/// rules of [`ExtendedState`] come later, with [`decode`](Self::decode), so that a state that breaks
/// one can be looked at.
#[derive(Clone, Debug)]
pub struct Blob {
    vcpu: Option<u32>,
    registers: Registers,
    layout: Layout,
    area: Vec<u8>,
}

impl Blob {
    /// Checks the format of exactly `bytes`, and expands the area. What is allocated is bounded by
    /// [`MAX_AREA_BYTES`](crate::layout::MAX_AREA_BYTES) plus a constant.
    ///
    /// # Errors
    ///
    /// All of [`DecodeError`] but those of the state's own rules and of a reader's layout.
    pub fn parse(bytes: &[u8]) -> Result<Self, DecodeError> {
        Self::of(&Frame::check(bytes)?)
    }

    pub(super) fn of(frame: &Frame<'_>) -> Result<Self, DecodeError> {
        let codec = Codec::of(frame)?;
        let mut buffer = Buffer::new();
        codec.fill(frame, &mut buffer)?;
        Ok(Self {
            vcpu: frame.vcpu(),
            registers: frame.registers(),
            layout: codec.layout().clone(),
            area: buffer.into_area(),
        })
    }

    /// Returns the number of its vCPU, or `None` for a state of version 1.
    #[must_use]
    pub const fn vcpu(&self) -> Option<u32> {
        self.vcpu
    }

    /// Returns XCR0, IA32_XFD and IA32_XFD_ERR.
    #[must_use]
    pub const fn registers(&self) -> Registers {
        self.registers
    }

    /// Returns the layout that the state was encoded with, without supervisor components.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the area in the standard format, of which no rule but XCOMP_BV = 0 has been checked.
    #[must_use]
    pub fn area(&self) -> &[u8] {
        &self.area
    }

    /// Converts it into the state, without copying the area.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Image`] or [`DecodeError::State`].
    pub fn decode(self) -> Result<ExtendedState<'static>, DecodeError> {
        let image = Image::from_vec(self.area, &self.layout)?;
        Ok(ExtendedState::new(image, self.registers)?)
    }
}

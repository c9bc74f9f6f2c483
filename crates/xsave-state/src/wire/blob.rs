//! A look into an encoded state, with no layout but its own.

use super::codec::{Codec, checked_layout, require_known, require_mxcsr_in_use, require_no_mxcsr};
use super::error::DecodeError;
use super::frame::Frame;
use super::record::{Record, Records};
use crate::feature::{ComponentId, XFeatures};
use crate::layout::Layout;
use crate::state::{ExtendedState, Registers};

/// An encoded state of which the format has been checked: checksum, tables, every record. Whether
/// the state is a valid one is seen by [`decode`](Self::decode); so what is invalid can be looked at.
///
/// It borrows the bytes and builds the layout, the only thing that is allocated.
#[derive(Clone)]
pub struct Blob<'a> {
    frame: Frame<'a>,
    codec: Codec,
}

impl<'a> Blob<'a> {
    /// Checks the format of exactly `bytes`.
    ///
    /// # Errors
    ///
    /// All of [`DecodeError`] but those of the state's own rules and of a reader's layout.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let frame = Frame::check(bytes)?;
        let codec = checked_layout(&frame)?;
        let xstate_bv = frame.xstate_bv();
        require_known(xstate_bv, codec.layout().user())?;
        let mut records = Records::new(frame.body(), frame.records_at());
        let mut x87 = None;
        for (id, size) in sizes(codec.layout(), xstate_bv) {
            let record = records.next(id, size)?;
            if id == ComponentId::X87 && record.is_stored(0) {
                x87 = Some(record.stored());
            }
        }
        records.end()?;
        if let Some(first_line) = x87 {
            require_no_mxcsr(first_line)?;
        }
        require_mxcsr_in_use(frame.mxcsr(), xstate_bv)?;
        Ok(Self { frame, codec })
    }

    /// XCR0, IA32_XFD and IA32_XFD_ERR.
    #[must_use]
    pub fn registers(&self) -> Registers {
        self.frame.registers()
    }

    /// The components in use.
    #[must_use]
    pub fn xstate_bv(&self) -> XFeatures {
        self.frame.xstate_bv()
    }

    /// MXCSR; 0x1f80 where neither SSE nor AVX is in use.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        self.frame.mxcsr()
    }

    /// The layout that the state was encoded with, less its supervisor components.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        self.codec.layout()
    }

    /// The checksum, which is right.
    #[must_use]
    pub const fn checksum(&self) -> u32 {
        self.frame.checksum()
    }

    /// The records, one of each component in use, in ascending order of their numbers.
    pub fn records(&self) -> impl Iterator<Item = Record<'a>> {
        let mut records = Records::new(self.frame.body(), self.frame.records_at());
        sizes(self.layout(), self.xstate_bv())
            .map_while(move |(id, size)| records.next(id, size).ok())
    }

    /// The state, with the layout that it carries.
    ///
    /// # Errors
    ///
    /// [`DecodeError::Image`] or [`DecodeError::State`].
    pub fn decode(&self) -> Result<ExtendedState<'static>, DecodeError> {
        self.codec.decode_frame(&self.frame)
    }
}

impl core::fmt::Debug for Blob<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.debug_struct("Blob")
            .field("registers", &self.registers())
            .field("xstate_bv", &format_args!("{}", self.xstate_bv()))
            .field("mxcsr", &format_args!("{:#x}", self.mxcsr()))
            .field("layout", self.layout())
            .finish_non_exhaustive()
    }
}

fn sizes(layout: &Layout, features: XFeatures) -> impl Iterator<Item = (ComponentId, usize)> {
    features
        .components()
        .filter_map(|id| Some((id, layout.component(id)?.size())))
}

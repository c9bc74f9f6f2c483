//! States of one layout to bytes and back, with buffers that the caller keeps.

use alloc::vec::Vec;
use core::ops::Range;

use super::buffer::Buffer;
use super::error::{DecodeError, EncodeError};
use super::frame::{Frame, checksum};
use super::misfit::first_misfit;
use super::records::{Records, head_of_whole, header_of};
use super::template::{
    self, CHECKSUM_BYTES, LAYOUT, MXCSR, RECORD_HEADER_BYTES, TOTAL_BYTES, VCPU, WORD_BYTES, XCR0,
    XFD, XFD_ERR, XSTATE_BV,
};
use super::{VERSION, lines};
use crate::area::Image;
use crate::area::initial::MXCSR_HOLDERS;
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{self, INITIAL_FCW, INITIAL_MXCSR, X87_BYTES};
use crate::layout::Layout;
use crate::registers::Registers;
use crate::state::ExtendedState;

/// MXCSR and its mask, in the midst of x87's bytes: MXCSR has its place in the header.
const MXCSR_IN_X87: Range<usize> = format::MXCSR..format::MXCSR_MASK + 4;

/// Encodes and decodes states of one layout. Neither allocates once the caller's buffers are large
/// enough.
///
/// ```
/// use xsave_state::wire::{Buffer, Codec};
/// use xsave_state::{Component, ComponentId, ExtendedState, Layout};
///
/// let layout = Layout::from_parts([Component::user(ComponentId::AVX, 576, 256)], [])?;
/// let codec = Codec::new(&layout);
/// let state = ExtendedState::reset(&layout);
///
/// let mut bytes = Vec::new();
/// codec.encode(3, &state, &mut bytes)?; // of vCPU 3
/// assert_eq!(bytes.len(), 84); // header, table of one component, checksum
///
/// let mut buffer = Buffer::new();
/// assert_eq!(codec.decode(&bytes, &mut buffer)?, state);
///
/// bytes[44] ^= 1; // XSTATE_BV
/// let error = codec.decode(&bytes, &mut buffer).unwrap_err().to_string();
/// assert!(error.starts_with("the state is damaged: its checksum is 0x"));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug)]
pub struct Codec {
    layout: Layout,
    /// Header and tables of a state without its registers.
    template: Vec<u8>,
    /// The components in ascending order of their numbers.
    places: Vec<Place>,
    max_bytes: usize,
}

/// A component of the layout.
#[derive(Clone, Debug)]
struct Place {
    id: ComponentId,
    /// In an area.
    range: Range<usize>,
    /// How its record begins when every line is stored.
    whole: Vec<u8>,
}

impl Codec {
    /// Creates a codec for states of `layout`.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        let template = template::of(layout);
        let places: Vec<_> = layout
            .user()
            .components()
            .filter_map(|id| {
                let range = layout.component(id)?.range()?;
                let whole = head_of_whole(id, range.len());
                Some(Place { id, range, whole })
            })
            .collect();
        // Sizes are below 64 KiB each and in all: no sum of them saturates.
        let max_bytes = places
            .iter()
            .map(|place| place.whole.len().saturating_add(place.range.len()))
            .fold(
                template.len().saturating_add(CHECKSUM_BYTES),
                usize::saturating_add,
            );
        Self {
            layout: layout.clone(),
            template,
            places,
            max_bytes,
        }
    }

    /// Creates a codec for the layout that a state carries, if its tables are as encoding writes them.
    pub(super) fn of(frame: &Frame<'_>) -> Result<Self, DecodeError> {
        let layout = template::layout(frame.fields()).map_err(DecodeError::Layout)?;
        let codec = Self::new(&layout);
        let offset = frame.offset_of(LAYOUT);
        template::require_canonical(frame.layout(), codec.tables(), frame.version(), offset)?;
        Ok(codec)
    }

    /// Returns the layout whose states it takes and gives.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the layout's part of the template.
    fn tables(&self) -> &[u8] {
        let start = template::fields(VERSION).saturating_add(LAYOUT);
        self.template.get(start..).unwrap_or_default()
    }

    /// Appends `state`, of vCPU number `vcpu`, to `out`.
    ///
    /// # Errors
    ///
    /// The state has another layout. `out` is as it was.
    pub fn encode(
        &self,
        vcpu: u32,
        state: &ExtendedState<'_>,
        out: &mut Vec<u8>,
    ) -> Result<(), EncodeError> {
        if *state.layout() != self.layout {
            let misfit = first_misfit(state.layout(), &self.layout);
            return Err(EncodeError::OtherLayout { misfit });
        }
        self.write(vcpu, state, out);
        Ok(())
    }

    /// Appends a state that has the layout.
    pub(super) fn write(&self, vcpu: u32, state: &ExtendedState<'_>, out: &mut Vec<u8>) {
        let image = state.image();
        let Registers { xcr0, xfd, xfd_err } = state.registers();
        let start = out.len();
        out.reserve(self.max_bytes);
        out.extend_from_slice(&self.template);
        let header = out.get_mut(start..).unwrap_or_default();
        bytes::put(header, VCPU, vcpu.to_le_bytes());
        let fields = header
            .get_mut(template::fields(VERSION)..)
            .unwrap_or_default();
        bytes::put(fields, XCR0, xcr0.bits().to_le_bytes());
        bytes::put(fields, XFD, xfd.bits().to_le_bytes());
        bytes::put(fields, XFD_ERR, xfd_err.bits().to_le_bytes());
        bytes::put(fields, XSTATE_BV, image.xstate_bv().bits().to_le_bytes());
        bytes::put(fields, MXCSR, image.mxcsr().to_le_bytes());
        let area = image.as_bytes();
        for place in &self.places {
            if !image.xstate_bv().contains(place.id.bit()) {
                continue;
            }
            let component = bytes::range(area, place.range.clone());
            if place.id == ComponentId::X87 {
                let mut x87 = bytes::array::<X87_BYTES>(component, 0);
                bytes::fill(&mut x87, MXCSR_IN_X87, 0);
                place.write(&x87, out);
            } else {
                place.write(component, out);
            }
        }
        let state = out.get_mut(start..).unwrap_or_default();
        let total = state.len().saturating_add(CHECKSUM_BYTES);
        // `max_bytes` is below 72 KiB.
        let total = u32::try_from(total).unwrap_or(u32::MAX);
        bytes::put(state, TOTAL_BYTES, total.to_le_bytes());
        let checksum = checksum(state);
        out.extend_from_slice(&checksum.to_le_bytes());
    }

    /// Decodes exactly `bytes` into `buffer`, whatever the number of their vCPU is:
    /// [`Encoded::vcpu`](super::Encoded::vcpu) and [`Blob::vcpu`](super::Blob::vcpu) tell it.
    ///
    /// # Errors
    ///
    /// Any byte is not as [`encode`](Self::encode) writes it, the state was encoded with another
    /// layout, or it is not valid: see [`DecodeError`].
    pub fn decode<'a>(
        &self,
        bytes: &[u8],
        buffer: &'a mut Buffer,
    ) -> Result<ExtendedState<'a>, DecodeError> {
        self.decode_frame(&Frame::check(bytes)?, buffer)
    }

    #[inline]
    pub(super) fn decode_frame<'a>(
        &self,
        frame: &Frame<'_>,
        buffer: &'a mut Buffer,
    ) -> Result<ExtendedState<'a>, DecodeError> {
        if frame.layout() != self.tables() {
            self.require_same_layout(frame)?;
        }
        self.fill(frame, buffer)?;
        let image = Image::parse(buffer.end(frame.xstate_bv()), &self.layout)?;
        Ok(ExtendedState::new(image, frame.registers())?)
    }

    #[cold]
    fn require_same_layout(&self, frame: &Frame<'_>) -> Result<(), DecodeError> {
        let theirs = Self::of(frame)?;
        if theirs.layout != self.layout {
            let misfit = first_misfit(&theirs.layout, &self.layout);
            return Err(DecodeError::OtherLayout { misfit });
        }
        Ok(())
    }

    /// Makes of the buffer's area that of a state that has the layout: writes what is in use, and
    /// clears what is not and was.
    pub(super) fn fill(&self, frame: &Frame<'_>, buffer: &mut Buffer) -> Result<(), DecodeError> {
        let xstate_bv = frame.xstate_bv();
        require(
            "XSTATE_BV",
            frame.offset_of(XSTATE_BV),
            (xstate_bv & self.layout.user()).bits(),
            xstate_bv.bits(),
        )?;

        let (area, used) = buffer.begin(&self.layout, xstate_bv);
        let mut records = Records::new(frame.body(), frame.records_at());
        for Place { id, range, whole } in &self.places {
            if xstate_bv.contains(id.bit()) {
                // Places are within the area.
                let component = area.get_mut(range.clone()).unwrap_or_default();
                records.read(*id, whole, component)?;
            } else if used.contains(id.bit()) {
                bytes::fill(area, range.clone(), 0);
            }
        }
        records.end()?;

        if xstate_bv.contains(XFeatures::X87) {
            // x87's record is the first, and stores its first line unless that is zero.
            let line = RECORD_HEADER_BYTES + WORD_BYTES + MXCSR_IN_X87.start;
            let offset = frame.records_at().saturating_add(line);
            let actual = bytes::u64_at(area, MXCSR_IN_X87.start);
            require("MXCSR in x87", offset, 0, actual)?;
        } else {
            bytes::put(area, 0, INITIAL_FCW.to_le_bytes());
        }
        let mxcsr = frame.mxcsr();
        if !xstate_bv.intersects(MXCSR_HOLDERS) {
            let offset = frame.offset_of(MXCSR);
            require("MXCSR", offset, INITIAL_MXCSR.into(), mxcsr.into())?;
        }
        bytes::put(area, format::MXCSR, mxcsr.to_le_bytes());
        bytes::put(area, format::XSTATE_BV, xstate_bv.bits().to_le_bytes());
        Ok(())
    }
}

impl Place {
    /// Appends the record of `component`.
    #[inline]
    fn write(&self, component: &[u8], out: &mut Vec<u8>) {
        if lines::are_nonzero(component) {
            out.extend_from_slice(&self.whole);
            out.extend_from_slice(component);
        } else {
            out.extend_from_slice(&header_of(self.id, component.len()));
            lines::compress(component, out);
        }
    }
}

#[inline]
fn require(
    field: &'static str,
    offset: usize,
    expected: u64,
    actual: u64,
) -> Result<(), DecodeError> {
    if actual == expected {
        return Ok(());
    }
    Err(DecodeError::Field {
        field,
        offset,
        expected,
        actual,
    })
}

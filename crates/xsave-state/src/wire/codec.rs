//! States of one layout to bytes and back, with buffers that the caller keeps.

use alloc::vec::Vec;
use core::ops::Range;

use super::buffer::Buffer;
use super::difference::Difference;
use super::error::{DecodeError, EncodeError};
use super::frame::{Frame, checksum};
use super::record::{Records, head_of_whole, header_of};
use super::template::{CHECKSUM_BYTES, LAYOUT, MXCSR, TOTAL_BYTES, XCR0, XFD, XFD_ERR, XSTATE_BV};
use super::{lines, template};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::header;
use crate::image::Image;
use crate::initial::MXCSR_HOLDERS;
use crate::layout::Layout;
use crate::legacy::{INITIAL_FCW, INITIAL_MXCSR, MXCSR as AREA_MXCSR, XMM};
use crate::state::{ExtendedState, Registers};

/// MXCSR and its mask, in the midst of x87's bytes: MXCSR has its place in the header.
const MXCSR_IN_X87: Range<usize> = 24..32;
/// Bytes of component 0, the same in every layout.
const X87_BYTES: usize = XMM.start;

/// Encodes and decodes states of one layout. Neither allocates once the caller's buffers are large
/// enough.
///
/// ```
/// use xsave_state::wire::{Buffer, Codec};
/// use xsave_state::{ExtendedState, Layout};
/// # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
/// #     match (leaf, subleaf) {
/// #         (0, _) => [0xd, 0, 0, 0],
/// #         (0xd, 0) => [0x7, 832, 832, 0],
/// #         (0xd, 1) => [0xf, 832, 0, 0],
/// #         (0xd, 2) => [256, 576, 0, 0],
/// #         _ => [0; 4],
/// #     }
/// # }
///
/// let layout = Layout::from_cpuid(cpuid)?;
/// let codec = Codec::new(&layout);
/// let state = ExtendedState::reset(&layout);
///
/// let mut bytes = Vec::new();
/// codec.encode(&state, &mut bytes)?;
/// assert_eq!(bytes.len(), 80); // header, table of one component, checksum
///
/// let mut buffer = Buffer::new();
/// assert_eq!(codec.decode(&bytes, &mut buffer)?, state);
///
/// bytes[40] ^= 1; // XSTATE_BV
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
    /// A codec for states of `layout`.
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

    /// The layout whose states it takes and gives.
    #[must_use]
    pub const fn layout(&self) -> &Layout {
        &self.layout
    }

    /// No state of the layout has more bytes than this when it is encoded.
    #[must_use]
    pub const fn max_bytes(&self) -> usize {
        self.max_bytes
    }

    /// Appends `state` to `out`.
    ///
    /// # Errors
    ///
    /// The state has another layout. `out` is as it was.
    pub fn encode(&self, state: &ExtendedState<'_>, out: &mut Vec<u8>) -> Result<(), EncodeError> {
        if *state.layout() != self.layout
            && let Some(difference) = Difference::between(state.layout(), &self.layout)
        {
            return Err(EncodeError::Layout { difference });
        }
        self.write(state, out);
        Ok(())
    }

    /// Appends a state that has the layout.
    pub(super) fn write(&self, state: &ExtendedState<'_>, out: &mut Vec<u8>) {
        let image = state.image();
        let Registers { xcr0, xfd, xfd_err } = state.registers();
        let start = out.len();
        out.reserve(self.max_bytes);
        out.extend_from_slice(&self.template);
        let header = out.get_mut(start..).unwrap_or_default();
        bytes::put(header, XCR0, xcr0.bits().to_le_bytes());
        bytes::put(header, XFD, xfd.bits().to_le_bytes());
        bytes::put(header, XFD_ERR, xfd_err.bits().to_le_bytes());
        bytes::put(header, XSTATE_BV, image.xstate_bv().bits().to_le_bytes());
        bytes::put(header, MXCSR, image.mxcsr().to_le_bytes());
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

    /// Decodes exactly `bytes` into `buffer`.
    ///
    /// # Errors
    ///
    /// Any byte is not as [`encode`](Self::encode) writes it, the state was encoded with another
    /// layout, or it would not be valid: see [`DecodeError`].
    pub fn decode<'a>(
        &self,
        bytes: &[u8],
        buffer: &'a mut Buffer,
    ) -> Result<ExtendedState<'a>, DecodeError> {
        let frame = Frame::check(bytes)?;
        self.fill(&frame, buffer)?;
        let image = Image::parse(buffer.end(frame.xstate_bv()), &self.layout)?;
        Ok(ExtendedState::new(image, frame.registers())?)
    }

    /// The same with bytes of its own.
    ///
    /// # Errors
    ///
    /// As [`decode`](Self::decode).
    pub fn decode_owned(&self, bytes: &[u8]) -> Result<ExtendedState<'static>, DecodeError> {
        self.decode_frame(&Frame::check(bytes)?)
    }

    pub(super) fn decode_frame(
        &self,
        frame: &Frame<'_>,
    ) -> Result<ExtendedState<'static>, DecodeError> {
        let mut buffer = Buffer::new();
        self.fill(frame, &mut buffer)?;
        let image = Image::from_area(buffer.into_area(), &self.layout)?;
        Ok(ExtendedState::new(image, frame.registers())?)
    }

    /// Header and tables of any state of the layout.
    pub(super) fn template(&self) -> &[u8] {
        &self.template
    }

    /// Makes of the buffer's area that of the state: writes what is in use, and clears what is not
    /// and was.
    fn fill(&self, frame: &Frame<'_>, buffer: &mut Buffer) -> Result<(), DecodeError> {
        if frame.layout() != bytes::range(&self.template, LAYOUT..self.template.len()) {
            self.require_same_layout(frame)?;
        }
        let xstate_bv = frame.xstate_bv();
        require_known(xstate_bv, self.layout.user())?;

        let (area, used) = buffer.begin(&self.layout, xstate_bv);
        let mut records = Records::new(frame.body(), frame.records_at());
        for Place { id, range, whole } in &self.places {
            if xstate_bv.contains(id.bit()) {
                // Places are within the area.
                let component = area.get_mut(range.clone()).unwrap_or_default();
                match records.next_whole(whole, component.len()) {
                    Some(stored) => component.copy_from_slice(stored),
                    None => records.next(*id, component.len())?.expand(component),
                }
            } else if used.contains(id.bit()) {
                bytes::fill(area, range.clone(), 0);
            }
        }
        records.end()?;

        if xstate_bv.contains(XFeatures::X87) {
            require_no_mxcsr(area)?;
        } else {
            bytes::put(area, 0, INITIAL_FCW.to_le_bytes());
        }
        require_mxcsr_in_use(frame.mxcsr(), xstate_bv)?;
        bytes::put(area, AREA_MXCSR, frame.mxcsr().to_le_bytes());
        bytes::put(area, header::XSTATE_BV, xstate_bv.bits().to_le_bytes());
        Ok(())
    }

    #[cold]
    fn require_same_layout(&self, frame: &Frame<'_>) -> Result<(), DecodeError> {
        let theirs = checked_layout(frame)?;
        match Difference::between(theirs.layout(), &self.layout) {
            Some(difference) => Err(DecodeError::OtherLayout { difference }),
            None => Ok(()),
        }
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

/// A codec for the layout that a state carries, if its tables are as encoding writes them.
pub(super) fn checked_layout(frame: &Frame<'_>) -> Result<Codec, DecodeError> {
    let layout = template::layout(frame.prefix()).map_err(DecodeError::Layout)?;
    let codec = Codec::new(&layout);
    let expected = bytes::range(codec.template(), LAYOUT..codec.template().len());
    // Both have as many entries, unless two entries have the same number or one has 0 or 1: then
    // an earlier byte, the number of components, differs.
    let differs = frame.layout().iter().zip(expected).zip(LAYOUT..);
    for ((&actual, &expected), offset) in differs {
        if actual != expected {
            return Err(DecodeError::LayoutByte {
                offset,
                expected,
                actual,
            });
        }
    }
    Ok(codec)
}

/// Every component of XSTATE_BV is in the table.
pub(super) fn require_known(xstate_bv: XFeatures, known: XFeatures) -> Result<(), DecodeError> {
    let unknown = xstate_bv - known;
    if unknown.is_empty() {
        return Ok(());
    }
    match unknown.components().next() {
        Some(component) => Err(DecodeError::UnknownComponent {
            xstate_bv,
            component,
        }),
        None => Err(DecodeError::XstateBv63 { xstate_bv }),
    }
}

/// MXCSR is not among x87's bytes.
pub(super) fn require_no_mxcsr(x87: &[u8]) -> Result<(), DecodeError> {
    match bytes::u64_at(x87, MXCSR_IN_X87.start) {
        0 => Ok(()),
        value => Err(DecodeError::MxcsrInX87 { value }),
    }
}

/// MXCSR is initial unless something needs it.
pub(super) fn require_mxcsr_in_use(mxcsr: u32, xstate_bv: XFeatures) -> Result<(), DecodeError> {
    let needed = xstate_bv.intersects(MXCSR_HOLDERS);
    if mxcsr == INITIAL_MXCSR || needed {
        return Ok(());
    }
    Err(DecodeError::MxcsrNotInUse { mxcsr })
}

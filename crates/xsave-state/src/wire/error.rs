//! What encoded states cannot be.

use thiserror::Error;

use super::difference::Difference;
use super::{MAX_STATE_BYTES, VERSION};
use crate::feature::{ComponentId, XFeatures};
use crate::image::ImageError;
use crate::layout::LayoutError;
use crate::legacy::INITIAL_MXCSR;
use crate::state::StateError;

/// A state that a [`Codec`](super::Codec) cannot encode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The state has another layout than the codec.
    #[error("the state has another layout than the codec: {difference}")]
    Layout {
        /// The first difference; "encoded" is the state's.
        difference: Difference,
    },
}

/// Bytes that are not an encoded state.
///
/// All that follow [`Checksum`](Self::Checksum) have a right checksum: they are not damaged, but
/// written by something else, or made up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// They do not begin as a state does.
    #[error("no encoded state begins with the bytes {actual:02x?}")]
    Magic {
        /// The first eight, 0 where there are fewer.
        actual: [u8; 8],
    },
    /// They end within the header.
    #[error("there are {actual_bytes} bytes; an encoded state needs {required_bytes} to be told")]
    TooShort {
        /// At least.
        required_bytes: usize,
        /// What is there.
        actual_bytes: usize,
    },
    /// The version is not one that is read here.
    #[error("the format has version {version}; this reader knows version {supported}")]
    Version {
        /// Bytes 8 and 9.
        version: u16,
        /// [`VERSION`].
        supported: u16,
    },
    /// No state has this length.
    #[error(
        "the state says that it has {stated_bytes} bytes; in version {VERSION} it has at least 68 \
         and at most {MAX_STATE_BYTES}"
    )]
    ImpossibleLength {
        /// Bytes 12 to 15.
        stated_bytes: u32,
    },
    /// The length is not the one that the state says.
    #[error("the state says that it has {stated_bytes} bytes, but there are {actual_bytes}")]
    Length {
        /// Bytes 12 to 15.
        stated_bytes: usize,
        /// What is there.
        actual_bytes: usize,
    },
    /// At least one bit is not as it was written.
    #[error(
        "the state is damaged: its checksum is {stored:#010x}, that of its bytes {computed:#010x}"
    )]
    Checksum {
        /// The last four bytes.
        stored: u32,
        /// CRC-32 of all the others.
        computed: u32,
    },
    /// A flag has no meaning in this version.
    #[error("the flags are {flags:#06x}; version {VERSION} has none")]
    UnknownFlags {
        /// Bytes 10 and 11.
        flags: u16,
    },
    /// The tables end beyond the state.
    #[error(
        "{components} components and {palettes} palettes end at byte {required_bytes}, but the \
         checksum is at byte {actual_bytes}"
    )]
    TablesTooLong {
        /// Bytes 56 and 57.
        components: u16,
        /// Bytes 58 and 59.
        palettes: u16,
        /// Where the tables end.
        required_bytes: usize,
        /// Where the state ends.
        actual_bytes: usize,
    },
    /// The tables describe an area that cannot exist.
    #[error("the layout in the state cannot exist: {0}")]
    Layout(LayoutError),
    /// A byte of the tables is not as encoding their layout gives it: an unknown flag, a component
    /// out of order, an area larger than its components.
    #[error("byte {offset} (layout) is {actual:#04x}; for this layout it is {expected:#04x}")]
    LayoutByte {
        /// Offset in the state.
        offset: usize,
        /// What it would be.
        expected: u8,
        /// What is there.
        actual: u8,
    },
    /// The state was saved with another layout than the reader's.
    #[error("the state was encoded with another layout: {difference}")]
    OtherLayout {
        /// The first difference.
        difference: Difference,
    },
    /// XSTATE_BV has a component that the tables do not have.
    #[error("XSTATE_BV is {xstate_bv}; {component} is not in the table of components")]
    UnknownComponent {
        /// Bytes 40 to 47.
        xstate_bv: XFeatures,
        /// The lowest such component.
        component: ComponentId,
    },
    /// XSTATE_BV has bit 63, which is not a component.
    #[error("XSTATE_BV is {xstate_bv}; bit 63 is not a component")]
    XstateBv63 {
        /// Bytes 40 to 47.
        xstate_bv: XFeatures,
    },
    /// There is a record of no component: a section that this version does not know.
    #[error("byte {offset} begins a section of kind {kind}, which version {VERSION} does not have")]
    UnknownSection {
        /// The first two bytes of the record.
        kind: u16,
        /// Where it begins.
        offset: usize,
    },
    /// Records are not in ascending order, or one is missing.
    #[error("byte {offset} begins the record of {actual}; that of {expected} comes first")]
    RecordOrder {
        /// By XSTATE_BV.
        expected: ComponentId,
        /// What is there.
        actual: ComponentId,
        /// Where it begins.
        offset: usize,
    },
    /// There is a record of a component that is not in XSTATE_BV.
    #[error(
        "byte {offset} begins a record of {component}, which is not in XSTATE_BV or was there before"
    )]
    NotAnnounced {
        /// The component.
        component: ComponentId,
        /// Where it begins.
        offset: usize,
    },
    /// A record has another size than the table says.
    #[error("the record of {component} says {actual_bytes} bytes; the table says {expected_bytes}")]
    RecordSize {
        /// The component.
        component: ComponentId,
        /// By the table.
        expected_bytes: usize,
        /// By the record.
        actual_bytes: u32,
    },
    /// The state ends within a record.
    #[error(
        "the record of {component} needs {required_bytes} bytes at byte {offset}, but there are \
         {actual_bytes}"
    )]
    RecordTooShort {
        /// The component.
        component: ComponentId,
        /// Where they would begin.
        offset: usize,
        /// How many.
        required_bytes: usize,
        /// What is there, up to the checksum.
        actual_bytes: usize,
    },
    /// The bitmap has a bit that stands for no line.
    #[error("bit {bit} of the bitmap of {component} is set, which has {lines} lines")]
    BitBeyondComponent {
        /// The component.
        component: ComponentId,
        /// The first such bit.
        bit: usize,
        /// How many lines there are.
        lines: usize,
    },
    /// A line is stored although it is zero.
    #[error("stored line {index} of {component} is zero: such lines are left out")]
    ZeroLine {
        /// The component.
        component: ComponentId,
        /// Which of its stored lines, from 0.
        index: usize,
    },
    /// Two reserved bytes are not zero.
    #[error("bytes {offset} and the next are reserved and must be 0, but are {value:#06x}")]
    Reserved {
        /// Of the first, in the state.
        offset: usize,
        /// What is there.
        value: u16,
    },
    /// There are bytes behind the last record.
    #[error("{bytes} bytes from byte {offset} on belong to nothing")]
    Trailing {
        /// Where they begin.
        offset: usize,
        /// How many, up to the checksum.
        bytes: usize,
    },
    /// The record of x87 has bytes where MXCSR is in an area, which has its place in the header.
    #[error("bytes 24 to 31 of x87 are {value:#018x}; they are 0 in an encoded state")]
    MxcsrInX87 {
        /// Those bytes.
        value: u64,
    },
    /// MXCSR is not initial although neither SSE nor AVX is in use.
    #[error("MXCSR is {mxcsr:#x} with neither SSE nor AVX in use; it is {INITIAL_MXCSR:#x} then")]
    MxcsrNotInUse {
        /// Bytes 48 to 51.
        mxcsr: u32,
    },
    /// The area would not be valid.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registers do not go with the area.
    #[error(transparent)]
    State(#[from] StateError),
}

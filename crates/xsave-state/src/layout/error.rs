//! Errors from describing an XSAVE area that cannot exist.

use thiserror::Error;

use super::{MAX_AREA_BYTES, MAX_PALETTES, PaletteError};
use crate::feature::{ComponentId, XFeatures};
use crate::format::{HEADER_BYTES, LEGACY_BYTES};

/// Errors from describing an XSAVE area that cannot exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// x87 and SSE, which XSAVE always has, are not both there.
    #[error("CPUID.0DH.0 supports {user} in XCR0, but x87 and SSE always belong to it")]
    NoLegacy {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// Components are listed both for XCR0 and for IA32_XSS.
    #[error("CPUID.0DH lists {both} both for XCR0 and for IA32_XSS")]
    UserAndSupervisor {
        /// Those components.
        both: XFeatures,
    },
    /// Bit 63 is not a component.
    #[error(
        "CPUID.0DH lists bit 63, which is not a state component: {user} for XCR0, {supervisor} for \
         IA32_XSS"
    )]
    Bit63 {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
        /// CPUID.(EAX=0DH,ECX=1):EDX:ECX.
        supervisor: XFeatures,
    },
    /// CPUID.(EAX=0DH,ECX=n):ECX\[0\] contradicts the bitmap in which the component is listed.
    #[error(
        "{component} is listed for {}, but CPUID.(EAX=0DH,ECX={}):ECX[0] says the opposite",
        if *listed_as_supervisor { "IA32_XSS" } else { "XCR0" },
        component.number()
    )]
    Kind {
        /// The component.
        component: ComponentId,
        /// Whether it is listed for IA32_XSS.
        listed_as_supervisor: bool,
    },
    /// A component is listed twice.
    #[error("{component} is listed twice")]
    Twice {
        /// The component.
        component: ComponentId,
    },
    /// A component that is listed has no size: its sub-leaf is missing.
    #[error("{component} has no size in CPUID.(EAX=0DH,ECX={})", component.number())]
    NoSize {
        /// The component.
        component: ComponentId,
    },
    /// A component has another size than the architecture gives it.
    #[error(
        "{component} has {actual_bytes} bytes in CPUID, but {expected_bytes} by the architecture"
    )]
    Size {
        /// The component.
        component: ComponentId,
        /// By the architecture.
        expected_bytes: usize,
        /// CPUID.(EAX=0DH,ECX=n):EAX.
        actual_bytes: usize,
    },
    /// A component starts within the legacy region or the header.
    #[error(
        "{component} is at offset {offset}, within the {LEGACY_BYTES}-byte legacy region or the \
         {HEADER_BYTES}-byte header"
    )]
    OffsetInHeader {
        /// The component.
        component: ComponentId,
        /// CPUID.(EAX=0DH,ECX=n):EBX.
        offset: usize,
    },
    /// A component ends beyond [`MAX_AREA_BYTES`].
    #[error("{component} ends at byte {end_bytes}; an area has at most {MAX_AREA_BYTES} bytes")]
    TooLarge {
        /// The component.
        component: ComponentId,
        /// Its offset (0 for a supervisor component) plus its size.
        end_bytes: usize,
    },
    /// All components together, with their alignment, are more than [`MAX_AREA_BYTES`].
    #[error(
        "the components together require up to {total_bytes} bytes; an area has at most {MAX_AREA_BYTES}"
    )]
    CompactedTooLarge {
        /// The compacted format with all components, at most.
        total_bytes: usize,
    },
    /// Two components share bytes.
    #[error("{second} at offset {second_offset} overlaps {first} at offset {first_offset}")]
    Overlap {
        /// The one with the lower number.
        first: ComponentId,
        /// Its offset in bytes.
        first_offset: usize,
        /// The one with the higher number.
        second: ComponentId,
        /// Its offset in bytes.
        second_offset: usize,
    },
    /// CPUID.(EAX=0DH,ECX=0):ECX has no room for all components.
    #[error(
        "CPUID.0DH.0:ECX reports {reported_bytes} bytes; the components require {required_bytes}"
    )]
    AreaTooSmall {
        /// CPUID.(EAX=0DH,ECX=0):ECX.
        reported_bytes: usize,
        /// Where the last component ends.
        required_bytes: usize,
    },
    /// More palettes than [`MAX_PALETTES`].
    #[error("CPUID.1DH has {max_palette} palettes; at most {MAX_PALETTES} are accepted")]
    TooManyPalettes {
        /// CPUID.(EAX=1DH,ECX=0):EAX.
        max_palette: u32,
    },
    /// Palettes are not numbered 1, 2 and so on.
    #[error("palette {actual} is listed where palette {expected} is expected")]
    PaletteNumber {
        /// The number at this place.
        expected: u32,
        /// The palette that is listed.
        actual: u8,
    },
    /// A palette cannot exist.
    #[error(transparent)]
    Palette(#[from] PaletteError),
    /// The tiles of a palette do not fit into component 18.
    #[error(
        "palette {palette} has {palette_bytes} bytes of tiles; XTILEDATA has {component_bytes}"
    )]
    TileData {
        /// The palette.
        palette: u8,
        /// CPUID.(EAX=1DH,ECX=palette):EAX\[15:0\].
        palette_bytes: usize,
        /// CPUID.(EAX=0DH,ECX=18):EAX.
        component_bytes: usize,
    },
}

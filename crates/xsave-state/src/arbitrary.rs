//! Valid states from a fuzzer's bytes. Each is built through the checks that all states go through;
//! bytes that do not make one are refused, never repaired.

use alloc::vec;

use arbitrary::{Arbitrary, Error, Result, Unstructured};

use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::header;
use crate::image::Image;
use crate::layout::Layout;
use crate::legacy::MXCSR;
use crate::state::{ExtendedState, Registers};
use crate::xcr0;

/// Number, size, offset and CPUID.(EAX=0DH,ECX=n):ECX of components beyond the legacy region.
type Table = [(u32, u32, u32, u32)];

/// Processors that differ in what they have and where it lies.
const LAYOUTS: &[&Table] = &[
    // AVX-512, PKRU and AMX, as Sapphire Rapids
    &[
        (2, 256, 576, 0),
        (5, 64, 1088, 0),
        (6, 512, 1152, 0),
        (7, 1024, 1664, 0),
        (9, 8, 2688, 0),
        (17, 64, 2752, 2),
        (18, 8192, 2816, 6),
    ],
    // AVX-512 and PKRU, as Zen 4
    &[
        (2, 256, 576, 0),
        (5, 64, 832, 0),
        (6, 512, 896, 0),
        (7, 1024, 1408, 0),
        (9, 8, 2432, 0),
    ],
    // MPX, as Skylake client
    &[(2, 256, 576, 0), (3, 64, 960, 0), (4, 64, 1024, 0)],
    // nothing beyond AVX
    &[(2, 256, 576, 0)],
];

/// One of a few processors' layouts: a fuzzer that made up offsets would find the checks of
/// [`Layout::from_cpuid`] and little else.
impl<'a> Arbitrary<'a> for Layout {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let table = *u.choose(LAYOUTS)?;
        let user = table.iter().fold(3, |user, entry| user | 1u32 << entry.0);
        let ends = table.iter().map(|entry| entry.1.saturating_add(entry.2));
        let size = ends.max().unwrap_or(0);
        Self::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0x1d, 0, 0, 0],
            (0xd, 0) => [user, size, size, 0],
            (0xd, 1) => [0x10, 0, 0, 0],
            (0xd, id) => {
                let entry = table.iter().find(|entry| entry.0 == id);
                entry.map_or([0; 4], |&(_, size, offset, flags)| [size, offset, flags, 0])
            }
            (0x1d, 0) => [1, 0, 0, 0],
            (0x1d, 1) => [0x0400_2000, 0x0008_0040, 0x10, 0],
            _ => [0; 4],
        })
        .map_err(|_| Error::IncorrectFormat)
    }
}

/// A valid state of an arbitrary layout.
impl<'a> Arbitrary<'a> for ExtendedState<'static> {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let layout = Layout::arbitrary(u)?;
        ExtendedState::arbitrary_of(&layout, u)
    }
}

impl ExtendedState<'static> {
    /// A valid state of `layout` from a fuzzer's bytes: any components in use, with any content and
    /// any registers that go with them. Where the bytes run out, the rest is zero.
    ///
    /// # Errors
    ///
    /// The bytes do not make a valid state.
    pub fn arbitrary_of(layout: &Layout, u: &mut Unstructured<'_>) -> Result<Self> {
        let user = layout.user();
        let xfd = XFeatures::from_bits_retain(u.arbitrary()?) & layout.xfd();
        let xfd_err = XFeatures::from_bits_retain(u.arbitrary()?) & layout.xfd();
        let mut enabled = XFeatures::X87;
        for group in [
            XFeatures::SSE,
            XFeatures::SSE | XFeatures::AVX,
            XFeatures::SSE | XFeatures::AVX | XFeatures::AVX512,
            XFeatures::MPX,
            XFeatures::PKRU,
            XFeatures::AMX,
        ] {
            if user.contains(group) && u.arbitrary()? {
                enabled |= group;
            }
        }
        xcr0::check(enabled, user).map_err(|_| Error::IncorrectFormat)?;
        let in_use = (XFeatures::from_bits_retain(u.arbitrary()?) & user) - xfd;

        let mut area = vec![0; layout.standard_size()];
        bytes::put(&mut area, header::XSTATE_BV, in_use.bits().to_le_bytes());
        for id in in_use.components() {
            let range = layout.component(id).and_then(|component| component.range());
            let Some(content) = range.and_then(|range| area.get_mut(range)) else {
                continue;
            };
            match id {
                ComponentId::XTILECFG => tile_config(layout, u, content)?,
                _ => u.fill_buffer(content)?,
            }
        }
        let mxcsr = u.arbitrary::<u32>()? & layout.mxcsr_mask();
        bytes::put(&mut area, MXCSR, mxcsr.to_le_bytes());
        let image = Image::from_area(area, layout).map_err(|_| Error::IncorrectFormat)?;
        let registers = Registers {
            xcr0: enabled,
            xfd,
            xfd_err,
        };
        ExtendedState::new(image, registers).map_err(|_| Error::IncorrectFormat)
    }
}

/// A configuration that LDTILECFG accepts, of a palette of the layout; or the initial one.
fn tile_config(layout: &Layout, u: &mut Unstructured<'_>, content: &mut [u8]) -> Result<()> {
    let Some(palette) = layout.palettes().first() else {
        return Ok(());
    };
    if u.arbitrary()? {
        return Ok(());
    }
    bytes::put(content, 0, [palette.id(), u.arbitrary()?]);
    for tile in 0..usize::from(palette.tiles()) {
        if u.arbitrary()? {
            let row_bytes = u.int_in_range(1..=palette.row_bytes())?;
            let rows = u.int_in_range(1..=palette.rows())?;
            let colsb = tile.saturating_mul(2).saturating_add(16);
            bytes::put(content, colsb, row_bytes.to_le_bytes());
            let rows = u8::try_from(rows).map_err(|_| Error::IncorrectFormat)?;
            bytes::put(content, tile.saturating_add(48), [rows]);
        }
    }
    Ok(())
}

//! Valid states from a fuzzer's bytes. Each is built through the checks that all states go through;
//! bytes that do not make one are refused, never repaired.

use alloc::vec;

use arbitrary::{Arbitrary, Error, Result, Unstructured};

use crate::area::Image;
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{MXCSR, XSTATE_BV};
use crate::layout::{Component, Layout, Palette};
use crate::registers::Registers;
use crate::state::ExtendedState;
use crate::xcr0;

const AVX: Component = Component::user(ComponentId::AVX, 576, 256);

/// Processors that differ in what they have and where it lies.
const LAYOUTS: &[&[Component]] = &[
    // AVX-512, PKRU and AMX, as Sapphire Rapids
    &[
        AVX,
        Component::user(ComponentId::OPMASK, 1088, 64),
        Component::user(ComponentId::ZMM_HI256, 1152, 512),
        Component::user(ComponentId::HI16_ZMM, 1664, 1024),
        Component::user(ComponentId::PKRU, 2688, 8),
        Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
        Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
    ],
    // AVX-512 and PKRU, as Zen 4
    &[
        AVX,
        Component::user(ComponentId::OPMASK, 832, 64),
        Component::user(ComponentId::ZMM_HI256, 896, 512),
        Component::user(ComponentId::HI16_ZMM, 1408, 1024),
        Component::user(ComponentId::PKRU, 2432, 8),
    ],
    // MPX, as Skylake client
    &[
        AVX,
        Component::user(ComponentId::BNDREGS, 960, 64),
        Component::user(ComponentId::BNDCSR, 1024, 64),
    ],
    // nothing beyond AVX
    &[AVX],
];

/// One of a few processors' layouts: a fuzzer that made up offsets would find the checks of
/// [`Layout::from_parts`] and little else.
impl<'a> Arbitrary<'a> for Layout {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let components = u.choose(LAYOUTS)?.iter().copied();
        Self::from_parts(components, [Palette::ONE]).map_err(|_| Error::IncorrectFormat)
    }
}

/// A valid state of one of those layouts.
impl<'a> Arbitrary<'a> for ExtendedState<'static> {
    fn arbitrary(u: &mut Unstructured<'a>) -> Result<Self> {
        let layout = Layout::arbitrary(u)?;
        ExtendedState::arbitrary_of(&layout, u)
    }
}

impl ExtendedState<'static> {
    /// Builds a valid state of `layout` from a fuzzer's bytes: any components in use, with any content and
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
        bytes::put(&mut area, XSTATE_BV, in_use.bits().to_le_bytes());
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
        let image = Image::from_vec(area, layout).map_err(|_| Error::IncorrectFormat)?;
        let registers = Registers::RESET
            .with_xcr0(enabled)
            .with_xfd(xfd)
            .with_xfd_err(xfd_err);
        ExtendedState::new(image, registers).map_err(|_| Error::IncorrectFormat)
    }
}

/// Writes a tile configuration that LDTILECFG accepts, of the layout's first palette, or leaves the
/// initial one.
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

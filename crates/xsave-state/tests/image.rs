//! Areas as processors and KVM write them, and each rule that an untrusted one can break.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{ARMED, LAYOUTS, LIVE_TILES, amx, area, bits, layout};
use proptest::prelude::*;
use xsave_state::{
    CompactedError, ComponentId, ExtendedState, HeaderError, Image, ImageError, Layout,
    LegacyError, TileConfigError, XFeatures,
};

/// The error after some bytes of a valid area, with everything in use, have changed.
fn error(change: impl FnOnce(&mut Vec<u8>)) -> ImageError {
    let layout = amx();
    let mut area = area(&layout, layout.user().bits());
    Image::parse(&area, &layout).expect("valid before the change");
    change(&mut area);
    Image::parse(&area, &layout).expect_err("refused after the change")
}

#[test]
fn an_area_with_live_tiles_that_kvm_wrote_in_the_lab() {
    let layout = amx();
    let image = Image::parse(LIVE_TILES, &layout).unwrap();
    assert_eq!(image.as_bytes(), LIVE_TILES);
    assert_eq!(image.layout(), &layout);
    assert_eq!(image.xstate_bv().bits(), 0x602a2);
    assert_eq!(image.component(ComponentId::X87), None);
    assert_eq!(image.component(ComponentId::SSE).unwrap().len(), 256);
    assert_eq!(image.component(ComponentId::HI16_ZMM).unwrap().len(), 1024);
    assert_eq!(image.mxcsr(), 0x1f80);
    assert_eq!(image.legacy().mxcsr_mask(), 0xffff);
    assert_eq!(image.legacy().software()[..8], 0x602e7u64.to_le_bytes());

    let config = image.tile_config().unwrap();
    assert_eq!(config.palette().id(), 1);
    let shapes: Vec<String> = config.shapes().iter().map(ToString::to_string).collect();
    assert_eq!(shapes, ["16 x 64"; 8]);

    let tiles = image.tile_data().unwrap();
    let pattern = |i: usize| (11 * i + (i >> 8) + 3) as u8;
    let first: Vec<u8> = (0..1024).map(pattern).collect();
    let last: Vec<u8> = (1024..2048).map(pattern).collect();
    assert_eq!(tiles.tile(0).unwrap(), first);
    assert_eq!(tiles.tile(7).unwrap(), last);
    assert_eq!(tiles.row(7, 15).unwrap(), &last[960..]);
    assert!(tiles.tile(3).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn an_area_with_initial_tiles_that_kvm_wrote_in_the_lab() {
    let image = Image::parse(ARMED, &amx()).unwrap();
    assert_eq!(image.xstate_bv().bits(), 0x2a2);
    assert_eq!(image.tile_config(), None);
    assert!(image.tile_data().is_none());
    assert_eq!(image.component(ComponentId::XTILEDATA), None);
}

#[test]
fn every_layout_takes_every_component_in_use() {
    for name in LAYOUTS {
        let layout = layout(name);
        let area = area(&layout, layout.user().bits());
        let image = Image::parse(&area, &layout).unwrap();
        for component in layout.components() {
            let bytes = image.component(component.id());
            match component.offset() {
                Some(offset) => {
                    assert_eq!(bytes.unwrap(), &area[offset..offset + component.size()]);
                }
                None => assert_eq!(bytes, None),
            }
        }
    }
}

#[test]
fn what_is_beyond_the_layout_is_left_out() {
    let layout = layout("haswell-client");
    let mut area = area(&layout, 7);
    area.resize(4096, 0xaa);
    let image = Image::parse(&area, &layout).unwrap();
    assert_eq!(image.as_bytes().len(), 832);
}

#[test]
fn a_short_area_is_refused_at_every_length() {
    let layout = amx();
    let area = area(&layout, 3);
    for actual_bytes in 0..area.len() {
        assert_eq!(
            Image::parse(&area[..actual_bytes], &layout),
            Err(ImageError::TooShort {
                required_bytes: 11_008,
                actual_bytes
            })
        );
    }
}

#[test]
fn the_compacted_format_is_not_taken_for_the_standard_format() {
    assert_eq!(
        error(|area| area[527] = 0x80),
        ImageError::Compacted { xcomp_bv: 1 << 63 }
    );
    assert_eq!(
        error(|area| area[520] = 1),
        ImageError::Compacted { xcomp_bv: 1 }
    );
}

#[test]
fn components_that_the_layout_lacks_are_named() {
    for number in (0..64).filter(|number| 0x602e7 & 1u64 << number == 0) {
        let xstate_bv = bits(0x602e7 | 1 << number);
        assert_eq!(
            error(|area| area[512..520].copy_from_slice(&xstate_bv.bits().to_le_bytes())),
            ImageError::Unsupported {
                xstate_bv,
                supported: bits(0x602e7),
                unsupported: bits(1 << number),
            }
        );
    }
}

/// What a processor loads under each bit that differs, by the manual: the verdict on every single
/// bit of an area with everything in use.
#[test]
fn every_bit_flip_has_its_verdict() {
    let layout = amx();
    let mut area = area(&layout, 0x602e7);
    let mut refused = 0;
    for bit in 0..area.len() * 8 {
        let (offset, mask) = (bit / 8, 1u8 << (bit % 8));
        area[offset] ^= mask;
        let verdict = Image::parse(&area, &layout).map(|image| image.xstate_bv());
        let expected = match offset {
            // MXCSR bits 16 and up are reserved
            26 | 27 => matches!(verdict, Err(ImageError::Legacy(LegacyError::Mxcsr { .. }))),
            416..464 => matches!(
                verdict,
                Err(ImageError::Legacy(LegacyError::Reserved { offset: at, value }))
                    if at == offset && value == mask
            ),
            512..520 if 0x602e7u64.to_le_bytes()[offset - 512] & mask != 0 => verdict.is_ok(),
            512..520 => matches!(verdict, Err(ImageError::Unsupported { .. })),
            520..528 => matches!(verdict, Err(ImageError::Compacted { .. })),
            528..576 => matches!(
                verdict,
                Err(ImageError::Header(HeaderError::Reserved { offset: at, value }))
                    if at == offset && value == mask
            ),
            // palette 1 becomes 0, which is initial, or one that is not there
            2752 if mask == 1 => verdict.is_ok(),
            2752 => matches!(
                verdict,
                Err(ImageError::TileConfig(TileConfigError::Palette { .. }))
            ),
            // start_row is the guest's
            2753 => verdict.is_ok(),
            2754..2768 | 2784..2800 | 2808..2816 => matches!(
                verdict,
                Err(ImageError::TileConfig(TileConfigError::Reserved { offset: at, value }))
                    if at == offset - 2752 && value == mask
            ),
            // 64 bytes become 0 (with 16 rows), or more than 64
            2768..2784 => matches!(
                verdict,
                Err(ImageError::TileConfig(
                    TileConfigError::HalfConfigured { .. } | TileConfigError::RowBytes { .. }
                ))
            ),
            2800..2808 => matches!(
                verdict,
                Err(ImageError::TileConfig(
                    TileConfigError::HalfConfigured { .. } | TileConfigError::Rows { .. }
                ))
            ),
            _ => verdict.is_ok(),
        };
        assert!(expected, "byte {offset}, bit {mask:#04x}: {verdict:?}");
        refused += usize::from(verdict.is_err());
        area[offset] ^= mask;
    }
    // 16 bits of MXCSR, 48 reserved bytes, 55 bits of XSTATE_BV, XCOMP_BV, 48 reserved bytes, and
    // TILECFG without start_row and bit 0 of the palette.
    assert_eq!(refused, 16 + 48 * 8 + 55 + 64 + 48 * 8 + (62 * 8 + 7));
}

#[test]
fn a_tile_configuration_that_is_initial_is_not_looked_at() {
    let layout = amx();
    let mut area = area(&layout, 0x2e7);
    area[2752..2816].fill(0xff);
    let image = Image::parse(&area, &layout).unwrap();
    assert_eq!(image.tile_config(), None);
}

#[test]
fn tiles_in_use_under_an_initial_configuration_have_the_lowest_palette() {
    let layout = amx();
    let area = area(&layout, 0x40003);
    let image = Image::parse(&area, &layout).unwrap();
    assert_eq!(image.tile_config(), None);
    assert_eq!(image.tile_data().unwrap().palette().unwrap().id(), 1);
    assert_eq!(
        image.tile_data().unwrap().tile(1).unwrap(),
        &area[3840..4864]
    );
}

#[test]
fn the_misaligned_sse_bit_of_mxcsr_is_for_processors_that_have_it() {
    let set_mm = |name| {
        let layout = layout(name);
        let mut area = area(&layout, 7);
        area[26] |= 2;
        Image::parse(&area, &layout).map(|image| image.mxcsr())
    };
    assert_eq!(set_mm("amd-zen4-genoa"), Ok(0x21fa0));
    assert_eq!(
        set_mm("ice-lake-server"),
        Err(ImageError::Legacy(LegacyError::Mxcsr {
            mxcsr: 0x21fa0,
            mask: 0xffff
        }))
    );
}

#[test]
fn a_vmm_that_knows_better_sets_the_mxcsr_mask() {
    let layout = layout("ice-lake-server").with_mxcsr_mask(0xffbf);
    let mut area = area(&layout, 7);
    area[24] |= 0x40;
    assert!(matches!(
        Image::parse(&area, &layout),
        Err(ImageError::Legacy(LegacyError::Mxcsr { mask: 0xffbf, .. }))
    ));
}

/// FXSAVE's mask of 0 stands for the oldest one, and no mask forbids what every vCPU starts with.
#[test]
fn every_mxcsr_mask_has_the_initial_value() {
    for (mask, expected) in [
        (0, 0xffbf),
        (1, 0x1f81),
        (0x2_0000, 0x2_1f80),
        (u32::MAX, u32::MAX),
    ] {
        let layout = amx().with_mxcsr_mask(mask);
        assert_eq!(layout.mxcsr_mask(), expected);
        let reset = ExtendedState::reset(&layout);
        assert!(Image::parse(reset.image().as_bytes(), &layout).is_ok());
    }
}

#[test]
fn mxcsr_is_initial_where_neither_sse_nor_avx_is_in_use() {
    let layout = amx();
    let mxcsr = |xstate_bv| {
        let area = area(&layout, xstate_bv);
        Image::parse(&area, &layout).unwrap().mxcsr()
    };
    assert_eq!(mxcsr(0b001), 0x1f80);
    assert_eq!(mxcsr(0b010), 0x1fa0);
    assert_eq!(mxcsr(0b100), 0x1fa0);
}

#[test]
fn the_initial_image_is_valid_and_has_nothing_in_use() {
    for name in LAYOUTS {
        let layout = layout(name);
        let image = Image::initial(&layout);
        assert_eq!(image.xstate_bv(), XFeatures::empty());
        assert_eq!(Image::parse(image.as_bytes(), &layout).unwrap(), image);
        assert_eq!(image.legacy().fcw(), 0x37f);
        assert_eq!(image.mxcsr(), 0x1f80);
    }
}

#[test]
fn equal_images_describe_the_same_state() {
    let layout = amx();
    let first = area(&layout, 0x60203);
    let mut second = first.clone();
    second[464..512].fill(0x11); // software
    second[576..832].fill(0x22); // AVX, initial
    second[832..1088].fill(0x33); // a gap
    second[28..32].fill(0x44); // MXCSR_MASK
    let parse = |area: &[u8]| Image::parse(area, &layout).unwrap().into_owned();
    assert_eq!(parse(&first), parse(&second));

    // A byte of each component in use, and MXCSR, makes a difference.
    for offset in [0, 24, 33, 159, 160, 415, 2688, 2753, 2816, 11_007] {
        let mut other = first.clone();
        other[offset] ^= 0x20;
        assert_ne!(parse(&first), parse(&other), "offset {offset}");
    }
    let mut other = first.clone();
    other[512] ^= 4;
    assert_ne!(parse(&first), parse(&other));
}

#[test]
fn without_releases_components_and_keeps_the_others() {
    let layout = amx();
    let valid = area(&layout, 0x602e7);
    let image = Image::parse(&valid, &layout).unwrap();

    let released = image.clone().without(XFeatures::AMX);
    assert_eq!(released.xstate_bv().bits(), 0x2e7);
    assert_eq!(released.as_bytes()[..512], valid[..512]);
    assert_eq!(released.as_bytes()[576..2752], valid[576..2752]);
    assert!(released.as_bytes()[2752..].iter().all(|&byte| byte == 0));
    assert_eq!(
        Image::parse(released.as_bytes(), &layout).unwrap(),
        released
    );

    // MXCSR lives in the midst of x87's bytes and stays with SSE or AVX.
    let released = image.clone().without(XFeatures::X87);
    assert_eq!(released.mxcsr(), 0x1fa0);
    assert_eq!(released.legacy().fcw(), 0x37f);
    assert_eq!(released.legacy().st(0), Some(&[0; 10]));
    let released = image.clone().without(XFeatures::SSE | XFeatures::AVX);
    assert_eq!(released.mxcsr(), 0x1f80);
    assert_eq!(released.legacy().mxcsr(), 0x1f80);
    assert_eq!(released.legacy().xmm(0), Some(&[0; 16]));
    assert_eq!(released.legacy().st(0), image.legacy().st(0));

    assert_eq!(image.clone().without(XFeatures::PT), image);
}

#[test]
fn the_compacted_format_of_live_tiles() {
    let layout = amx();
    let area = LIVE_TILES;
    let image = Image::parse(area, &layout).unwrap();
    let compacted = image.to_compacted();
    // opmask at 576, Hi16_ZMM at 640, PKRU at 1664; aligned: XTILECFG at 1728, XTILEDATA at 1792
    assert_eq!(compacted.len(), 1792 + 8192);
    assert_eq!(compacted[512..520], 0x602a2u64.to_le_bytes());
    assert_eq!(compacted[520..528], (1 << 63 | 0x602a2u64).to_le_bytes());
    assert_eq!(compacted[576..640], area[1088..1152]);
    assert_eq!(compacted[640..1664], area[1664..2688]);
    assert_eq!(compacted[1664..1672], area[2688..2696]);
    assert_eq!(compacted[1728..1792], area[2752..2816]);
    assert_eq!(compacted[1792..], area[2816..]);
    assert_eq!(Image::from_compacted(&compacted, &layout).unwrap(), image);
}

#[test]
fn the_compacted_format_keeps_mxcsr_with_sse_alone() {
    let layout = amx();
    let area = area(&layout, 0b100);
    let image = Image::parse(&area, &layout).unwrap();
    let compacted = image.to_compacted();
    assert_eq!(compacted[512], 0b110);
    let back = Image::from_compacted(&compacted, &layout).unwrap();
    assert_eq!(back.mxcsr(), 0x1fa0);
    assert_eq!(back.component(ComponentId::SSE).unwrap(), [0; 256]);
    assert_eq!(
        back.component(ComponentId::AVX),
        image.component(ComponentId::AVX)
    );
}

#[test]
fn each_rule_of_the_compacted_format_has_its_name() {
    let layout = layout("sapphire-rapids");
    let valid = Image::parse(&area(&layout, 0x602e7), &layout)
        .unwrap()
        .to_compacted();
    let error = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut area = valid.clone();
        change(&mut area);
        Image::from_compacted(&area, &layout).unwrap_err()
    };
    assert!(matches!(
        error(&|area| area[527] = 0),
        CompactedError::Standard { xcomp_bv: 0x602e7 }
    ));
    assert!(matches!(
        error(&|area| area[525] = 1),
        CompactedError::Unsupported { unsupported, .. } if unsupported.bits() == 1 << 40
    ));
    assert!(matches!(
        error(&|area| area[520] &= !4),
        CompactedError::WithoutPlace {
            without_place: XFeatures::AVX,
            ..
        }
    ));
    assert!(matches!(
        error(&|area| {
            area[513] |= 1; // PT in XSTATE_BV
            area[521] |= 1; // and in XCOMP_BV
        }),
        CompactedError::Supervisor {
            supervisor: XFeatures::PT
        }
    ));
    assert!(matches!(
        error(&|area| area[528] = 1),
        CompactedError::Image(ImageError::Header(HeaderError::Reserved {
            offset: 528,
            ..
        }))
    ));
    assert!(matches!(
        error(&|area| area[27] = 1),
        CompactedError::Image(ImageError::Legacy(LegacyError::Mxcsr { .. }))
    ));
    for cut in [1, 8192, valid.len() - 576, valid.len() - 575, valid.len()] {
        assert!(matches!(
            error(&|area| area.truncate(valid.len() - cut)),
            CompactedError::Image(ImageError::TooShort { .. })
        ));
    }
    let tilecfg = valid.len() - 8192 - 64;
    assert!(matches!(
        error(&|area| area[tilecfg] = 9),
        CompactedError::Image(ImageError::TileConfig(TileConfigError::Palette {
            palette: 9,
            ..
        }))
    ));
}

/// A place for a supervisor component moves those behind it.
#[test]
fn supervisor_components_may_have_a_place() {
    let layout = layout("sapphire-rapids");
    let mut compacted = vec![0; 576 + 256 + 128 + 8];
    compacted[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    compacted[512..520].copy_from_slice(&0x204u64.to_le_bytes());
    // AVX at 576, PT at 832, PKRU at 960
    compacted[520..528].copy_from_slice(&(1 << 63 | 0x304u64).to_le_bytes());
    compacted[576] = 0xaa;
    compacted[832] = 0xbb;
    compacted[960] = 0xcc;
    let image = Image::from_compacted(&compacted, &layout).unwrap();
    assert_eq!(image.component(ComponentId::AVX).unwrap()[0], 0xaa);
    assert_eq!(image.component(ComponentId::PKRU).unwrap()[0], 0xcc);
}

/// The rules once more, written down without the crate's parser: which areas a processor of that
/// layout loads.
fn acceptable(area: &[u8], layout: &Layout) -> bool {
    let word = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().unwrap());
    let zero = |range: std::ops::Range<usize>| area[range].iter().all(|&byte| byte == 0);
    let tilecfg_is_valid = || {
        let Some(cfg) = layout.component(ComponentId::XTILECFG) else {
            return true;
        };
        let cfg = &area[cfg.offset().unwrap()..][..64];
        let in_use = word(512) & 1 << 17 != 0;
        if !in_use || cfg[0] == 0 {
            return true;
        }
        let shape = |i: usize| {
            (
                u16::from_le_bytes([cfg[16 + 2 * i], cfg[17 + 2 * i]]),
                cfg[48 + i],
            )
        };
        cfg[0] == 1
            && !layout.palettes().is_empty()
            && cfg[2..16].iter().all(|&byte| byte == 0)
            && (8..16).all(|i| shape(i) == (0, 0))
            && (0..8).all(|i| {
                let (colsb, rows) = shape(i);
                colsb <= 64 && rows <= 16 && (colsb == 0) == (rows == 0)
            })
    };
    area.len() >= layout.standard_size()
        && word(512) & !layout.user().bits() == 0
        && word(520) == 0
        && zero(528..576)
        && zero(416..464)
        && u32::from_le_bytes(area[24..28].try_into().unwrap()) & !layout.mxcsr_mask() == 0
        && tilecfg_is_valid()
}

/// Mostly valid areas: random changes at the places that have rules.
fn mutated(layout: Layout) -> impl Strategy<Value = (Layout, Vec<u8>)> {
    let places: Vec<usize> = (24..32).chain(412..580).chain(2750..2820).collect();
    let change = (prop::sample::select(places), any::<u8>());
    let user = layout.user().bits();
    (any::<u64>(), prop::collection::vec(change, 0..4)).prop_map(move |(xstate_bv, changes)| {
        let mut area = area(&layout, xstate_bv & user);
        for (place, value) in changes {
            if let Some(byte) = area.get_mut(place) {
                *byte = value;
            }
        }
        (layout.clone(), area)
    })
}

fn any_layout() -> impl Strategy<Value = Layout> {
    prop::sample::select(&LAYOUTS[..]).prop_map(layout)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn what_is_accepted_is_what_a_second_checker_accepts(
        (layout, area) in any_layout().prop_flat_map(mutated)
    ) {
        let verdict = Image::parse(&area, &layout);
        prop_assert_eq!(verdict.is_ok(), acceptable(&area, &layout), "{:?}", verdict);
    }

    #[test]
    fn compacted_and_back_is_the_identity(layout in any_layout(), in_use: u64) {
        let area = area(&layout, in_use & layout.user().bits());
        let image = Image::parse(&area, &layout).unwrap();
        let compacted = image.to_compacted();
        let back = Image::from_compacted(&compacted, &layout).unwrap();
        // SSE joins where MXCSR needs it; its registers are initial then.
        let joined = back.xstate_bv() - image.xstate_bv();
        prop_assert!(XFeatures::SSE.contains(joined));
        prop_assert_eq!(back.mxcsr(), image.mxcsr());
        prop_assert_eq!(back.clone().to_compacted(), compacted);
        for id in image.xstate_bv().components().filter(|&id| id != ComponentId::X87) {
            prop_assert_eq!(back.component(id), image.component(id));
        }
        for st in 0..8 {
            let x87 = image.component(ComponentId::X87).and(image.legacy().st(st));
            let back = back.component(ComponentId::X87).and(back.legacy().st(st));
            prop_assert_eq!(back, x87);
        }
    }

    #[test]
    fn no_bytes_make_either_parser_panic(
        layout in any_layout(),
        bytes in prop::collection::vec(any::<u8>(), 0..12_000),
    ) {
        let _ = Image::parse(&bytes, &layout);
        let _ = Image::from_compacted(&bytes, &layout);
    }
}

/// Where leaf 1DH is hidden a tile configuration means nothing, and tiles are bytes without a
/// geometry; they are in use all the same.
#[test]
fn live_tiles_of_a_cpuid_without_palettes_are_not_initial() {
    let hidden = layout("emerald-rapids-vm-without-tile-leaves");
    assert_eq!(hidden.palettes(), []);
    let mut tiles = area(&hidden, 0x40000);
    let image = Image::parse(&tiles, &hidden).unwrap();
    let data = image.tile_data().expect("tiles are in use");
    assert_eq!(data.bytes(), &tiles[2816..]);
    assert_eq!(data.palette(), None);
    assert_eq!((data.tile(0), data.row(0, 0)), (None, None));

    tiles[514] |= 2; // XTILECFG, palette 0
    let image = Image::parse(&tiles, &hidden).unwrap();
    assert_eq!(image.tile_config(), None);
    assert!(image.tile_data().is_some());
    drop(image);
    tiles[2752] = 1;
    assert_eq!(
        Image::parse(&tiles, &hidden),
        Err(ImageError::TileConfig(TileConfigError::NoPalettes {
            palette: 1
        }))
    );
}

#[test]
fn an_owned_area_is_kept_without_a_copy() {
    let layout = amx();
    let mut area = area(&layout, 0x602e7);
    area.extend([0xaa; 100]);
    let (bytes, address) = (area.clone(), area.as_ptr());
    let image = Image::from_vec(area, &layout).unwrap();
    assert_eq!(image.as_bytes().as_ptr(), address);
    assert_eq!(image, Image::parse(&bytes, &layout).unwrap());
    assert_eq!(image.as_bytes(), &bytes[..11_008]);
    assert_eq!(image.into_owned().as_bytes().as_ptr(), address);
    assert_eq!(
        Image::from_vec(bytes[..4096].to_vec(), &layout),
        Err(ImageError::TooShort {
            required_bytes: 11_008,
            actual_bytes: 4096
        })
    );
}

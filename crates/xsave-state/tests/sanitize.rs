//! An untrusted state becomes safe or is refused, and each change has its name.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{ARMED, LAYOUTS, LIVE_TILES, amx, area, bits, layout, registers, state};
use proptest::prelude::*;
use xsave_state::sanitize::{Change, sanitize};
use xsave_state::{
    ComponentId, ExtendedState, Image, Layout, Losses, Misfit, Registers, SanitizeError, Sanitized,
    TileConfigError, UntrustedArea, XFeatures,
};

const NOTHING: Losses = Losses::empty();

/// A valid area with everything in use, after a change: the one change that is reported.
fn one_change(change: impl FnOnce(&mut Vec<u8>), loss: Losses) -> (Sanitized, Change) {
    let mut area = area(&amx(), 0x602e7);
    change(&mut area);
    let untrusted = UntrustedArea::new(&area, registers(0x602e7, 0, 0));
    one_change_of(&untrusted, &amx(), loss)
}

/// The one change that is reported. It loses `loss`: nothing less lets it through.
fn one_change_of(
    untrusted: &UntrustedArea<'_>,
    layout: &Layout,
    loss: Losses,
) -> (Sanitized, Change) {
    let sanitized = sanitize(untrusted, layout, loss).unwrap();
    let &[change] = sanitized.report.changes() else {
        panic!("{}", sanitized.report);
    };
    assert_eq!(change.loss(), loss);
    assert_eq!(
        sanitize(untrusted, layout, Losses::all()).as_ref(),
        Ok(&sanitized)
    );
    let lost: Vec<Misfit> = sanitized.report.lost().copied().collect();
    if loss.is_empty() {
        assert_eq!(lost, []);
    } else {
        assert_eq!([change], [Change::Lost(lost[0])]);
        for allowed in [NOTHING, Losses::all() - loss] {
            assert_eq!(
                sanitize(untrusted, layout, allowed),
                Err(SanitizeError::Refused {
                    lost: lost.clone(),
                    report: sanitized.report.clone()
                })
            );
        }
    }
    (sanitized, change)
}

#[test]
fn what_is_safe_is_not_changed() {
    for (area, xfd) in [(ARMED, 0x40000), (LIVE_TILES, 0)] {
        let registers = registers(0x602e7, xfd, 0);
        let untrusted = UntrustedArea::new(area, registers);
        let sanitized = sanitize(&untrusted, &amx(), NOTHING).unwrap();
        assert_eq!(sanitized.report.changes(), []);
        assert_eq!(sanitized.report.to_string(), "nothing");
        assert_eq!(sanitized.state, state(area, &amx(), registers));
        // What means nothing does not come along: here the feature mask that KVM leaves.
        assert_ne!(area[464..472], [0; 8]);
        assert_eq!(sanitized.state.image().as_bytes()[464..472], [0; 8]);
    }
}

/// KVM leaves PKRU as it is where XSTATE_BV[9] is clear: a component with its initial value is in use
/// because somebody wrote that value, and stays in use.
#[test]
fn initial_values_in_use_stay_in_use() {
    let mut area = vec![0; 11_008];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&0x602e7u64.to_le_bytes());
    let untrusted = UntrustedArea::new(&area, registers(0x602e7, 0, 0));
    let sanitized = sanitize(&untrusted, &amx(), NOTHING).unwrap();
    assert_eq!(sanitized.report.changes(), []);
    let image = sanitized.state.image();
    assert_eq!(image.xstate_bv(), bits(0x602e7));
    assert_eq!(image.component(ComponentId::PKRU), Some(&[0; 8][..]));
}

#[test]
fn tiles_in_use_under_xfd_are_dropped() {
    let untrusted = UntrustedArea::new(LIVE_TILES, registers(0x602e7, 0x40000, 0x40000));
    let (sanitized, change) = one_change_of(&untrusted, &amx(), Losses::DISABLED);
    assert_eq!(
        change,
        Change::Lost(Misfit::Disabled {
            component: ComponentId::XTILEDATA,
            xfd: XFeatures::XTILEDATA
        })
    );
    let image = sanitized.state.image();
    assert_eq!(image.xstate_bv(), bits(0x202a2));
    assert_eq!(image.component(ComponentId::XTILEDATA), None);
    assert!(image.as_bytes()[2816..].iter().all(|&byte| byte == 0));
    assert!(image.tile_config().is_some());
    assert_eq!(
        sanitized.state.registers(),
        registers(0x602e7, 0x40000, 0x40000)
    );
}

/// Tile data that is zero is initial: dropping it loses nothing.
#[test]
fn initial_tiles_in_use_under_xfd_are_no_loss() {
    let mut area = LIVE_TILES.to_vec();
    area[2816..].fill(0);
    let untrusted = UntrustedArea::new(&area, registers(0x602e7, 0x40000, 0));
    let (sanitized, change) = one_change_of(&untrusted, &amx(), NOTHING);
    let component = ComponentId::XTILEDATA;
    assert_eq!(change, Change::Dropped { component });
    assert_eq!(sanitized.state.image().xstate_bv(), bits(0x202a2));
    // Cut off where they would be, it is not known what they were.
    let untrusted = UntrustedArea::new(&area[..4096], registers(0x602e7, 0x40000, 0));
    let sanitized = sanitize(&untrusted, &amx(), Losses::DISABLED).unwrap();
    let xfd = XFeatures::XTILEDATA;
    let lost: Vec<_> = sanitized.report.lost().collect();
    assert_eq!(lost, [&Misfit::Disabled { component, xfd }]);
}

#[test]
fn components_that_the_layout_lacks_are_dropped() {
    for number in [8, 10, 16, 19, 62] {
        let component = ComponentId::new(number).unwrap();
        let in_use = bits(0x602e7) | component.bit();
        let (sanitized, change) = one_change(
            |area| area[512..520].copy_from_slice(&in_use.bits().to_le_bytes()),
            Losses::CONTENT,
        );
        assert_eq!(change, Change::Lost(Misfit::Missing { component }));
        assert_eq!(sanitized.state.image().xstate_bv(), bits(0x602e7));
    }
}

/// Bit 63 of XSTATE_BV is no component, and still not what it was.
#[test]
fn bit_63_of_xstate_bv_is_reported() {
    let mut area = area(&amx(), 3);
    area[519] = 0x80;
    let untrusted = UntrustedArea::new(&area, registers(7, 0, 0));
    let (sanitized, change) = one_change_of(&untrusted, &amx(), NOTHING);
    assert_eq!(change, Change::Bit63);
    assert_eq!(sanitized.state.image().xstate_bv(), bits(3));
}

/// A kernel that has less than the guest's CPUID is a second step, to its layout. What the source had
/// disabled is not enabled by that.
#[test]
fn disabled_state_does_not_come_to_life_on_a_kernel_without_xfd() {
    let untrusted = UntrustedArea::new(LIVE_TILES, registers(0x602e7, 0x40000, 0x40000));
    let sanitized = sanitize(&untrusted, &amx(), Losses::DISABLED).unwrap();
    let kernel = layout("sapphire-rapids-guest-without-amx");
    let there = sanitized.state.relocate(&kernel, Losses::all()).unwrap();
    assert_eq!(there.state.registers(), registers(0x2e7, 0, 0));
    assert_eq!(there.state.image().xstate_bv() & XFeatures::AMX, bits(0));
}

/// Its CPUID.0DH.0 is zero, but FXSAVE's state is its own.
#[test]
fn a_guest_without_xsave_keeps_x87_and_sse() {
    let area = area(&amx(), 0x2e7);
    let untrusted = UntrustedArea::new(&area, Registers::RESET).of_guest_with(XFeatures::empty());
    let sanitized = sanitize(&untrusted, &Layout::legacy(), NOTHING).unwrap();
    let image = sanitized.state.image();
    assert_eq!(image.xstate_bv(), XFeatures::LEGACY);
    assert_eq!(image.as_bytes()[32..416], area[32..416]);
    assert_eq!(image.mxcsr(), 0x1fa0);
    let over_reported = (bits(0x2e7) - XFeatures::LEGACY)
        .components()
        .map(|component| Change::OverReported { component });
    assert_eq!(
        sanitized.report.changes(),
        over_reported.collect::<Vec<_>>()
    );
}

/// Old kernels report what the host has. With the guest's components known, that is no loss.
#[test]
fn images_of_kernels_that_over_report_are_masked() {
    let layout = layout("haswell-client");
    let mut area = area(&layout, 7);
    area.resize(4096, 0xaa);
    area[512..520].copy_from_slice(&0x207u64.to_le_bytes());
    let untrusted = UntrustedArea::new(&area, registers(7, 0, 0));
    let component = ComponentId::PKRU;
    let (_, change) = one_change_of(&untrusted, &layout, Losses::CONTENT);
    assert_eq!(change, Change::Lost(Misfit::Missing { component }));
    let untrusted = untrusted.of_guest_with(layout.user());
    let (sanitized, change) = one_change_of(&untrusted, &layout, NOTHING);
    assert_eq!(change, Change::OverReported { component });
    assert_eq!(sanitized.state.image().xstate_bv(), bits(7));
}

#[test]
fn reserved_bytes_are_cleared() {
    for offset in (416..464).chain(528..576) {
        let (sanitized, change) = one_change(|area| area[offset] = 9, NOTHING);
        assert_eq!(
            change,
            Change::Reserved {
                offset,
                was: 9,
                nonzero_bytes: 1
            }
        );
        assert_eq!(sanitized.state.image().as_bytes()[offset], 0);
    }
    let (_, change) = one_change(|area| area[430..464].fill(1), NOTHING);
    assert!(matches!(
        change,
        Change::Reserved {
            nonzero_bytes: 34,
            ..
        }
    ));
    let (_, change) = one_change(|area| area[522] = 1, NOTHING);
    assert_eq!(change, Change::XcompBv { was: 0x10000 });
}

#[test]
fn mxcsr_has_only_bits_of_the_layout() {
    let (sanitized, change) = one_change(|area| area[26] = 2, Losses::MXCSR);
    assert_eq!(
        change,
        Change::Lost(Misfit::Mxcsr {
            mxcsr: 0x21fa0,
            mask: 0xffff
        })
    );
    assert_eq!(sanitized.state.image().mxcsr(), 0x1fa0);
    // Where neither SSE nor AVX is in use nothing loads it, and nothing is lost.
    let mut area = area(&amx(), 0x201);
    area[26] = 2;
    let untrusted = UntrustedArea::new(&area, registers(7, 0, 0));
    let (sanitized, change) = one_change_of(&untrusted, &amx(), NOTHING);
    assert_eq!(
        change,
        Change::UnusedMxcsr {
            was: 0x21fa0,
            mask: 0xffff
        }
    );
    assert_eq!(sanitized.state.image().legacy().mxcsr(), 0x1f80);
}

/// MXCSR goes with AVX; a layout without AVX has SSE for it.
#[test]
fn mxcsr_outlives_the_component_that_held_it() {
    let mut area = area(&amx(), 4);
    area[576..832].fill(0);
    let untrusted = UntrustedArea::new(&area, registers(3, 0, 0));
    let sanitized = sanitize(&untrusted, &Layout::legacy(), Losses::CONTENT).unwrap();
    assert_eq!(sanitized.state.image().xstate_bv(), XFeatures::SSE);
    assert_eq!(sanitized.state.image().mxcsr(), 0x1fa0);
    // Over-reported by an old kernel, likewise.
    let untrusted = untrusted.of_guest_with(bits(3));
    let again = sanitize(&untrusted, &amx(), NOTHING).unwrap();
    assert_eq!(again.state.image().xstate_bv(), XFeatures::SSE);
    assert_eq!(again.state.image().mxcsr(), 0x1fa0);
    assert_eq!(
        again.state.image().component(ComponentId::SSE),
        Some(&[0; 256][..])
    );
}

#[test]
fn a_tile_configuration_that_ldtilecfg_refuses_becomes_initial() {
    let (sanitized, change) = one_change(|area| area[2752 + 48] = 17, Losses::TILE_CONFIG);
    let rule = TileConfigError::Rows {
        tile: 0,
        rows: 17,
        limit: 16,
    };
    assert_eq!(change, Change::Lost(Misfit::TileConfig { rule }));
    let image = sanitized.state.image();
    assert_eq!(image.component(ComponentId::XTILECFG), None);
    assert!(image.component(ComponentId::XTILEDATA).is_some());
}

/// State that a VMM with 4,096-byte buffers cut off.
#[test]
fn a_short_area_counts_if_everything_in_use_is_there() {
    let whole = area(&amx(), 0x602e7);
    let cut = |xstate_bv: u64, len: usize| {
        let mut area = whole[..len].to_vec();
        area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
        area
    };
    let area = cut(0x202e7, 4096);
    let untrusted = UntrustedArea::new(&area, registers(0x602e7, 0x40000, 0));
    let (sanitized, change) = one_change_of(&untrusted, &amx(), NOTHING);
    assert_eq!(
        change,
        Change::Extended {
            actual_bytes: 4096,
            required_bytes: 11_008
        }
    );
    assert_eq!(sanitized.state.image().as_bytes().len(), 11_008);

    let area = cut(0x602e7, 4096);
    let untrusted = UntrustedArea::new(&area, registers(0x602e7, 0, 0));
    assert_eq!(
        sanitize(&untrusted, &amx(), Losses::all()),
        Err(SanitizeError::Truncated {
            component: ComponentId::XTILEDATA,
            required_bytes: 11_008,
            actual_bytes: 4096
        })
    );
    for actual_bytes in 0..576 {
        let untrusted = UntrustedArea::new(&whole[..actual_bytes], registers(1, 0, 0));
        assert_eq!(
            sanitize(&untrusted, &amx(), Losses::all()),
            Err(SanitizeError::TooShort {
                required_bytes: 576,
                actual_bytes
            })
        );
    }
}

#[test]
fn registers_have_only_what_the_layout_has() {
    let area = area(&amx(), 3);
    let change = |xcr0, xfd, xfd_err, layout: &Layout, losses| {
        let untrusted = UntrustedArea::new(&area, registers(xcr0, xfd, xfd_err));
        let (sanitized, change) = one_change_of(&untrusted, layout, losses);
        (sanitized.state.registers(), change)
    };
    for (was, now) in [
        (0x602ff, 0x602e7),
        (0x20007, 7),
        (0, 1),
        (5, 1),
        (0x67, 7),
        (0xe3, 3),
    ] {
        let (registers, change) = change(was, 0, 0, &amx(), Losses::XCR0);
        assert_eq!(registers.xcr0, bits(now));
        assert_eq!(
            change,
            Change::Lost(Misfit::Xcr0 {
                xcr0: bits(was),
                largest: bits(now)
            })
        );
    }
    let (now, xfd) = change(7, 0x40004, 0, &amx(), Losses::XFD);
    assert_eq!(now, registers(7, 0x40000, 0));
    assert_eq!(
        xfd,
        Change::Lost(Misfit::Xfd {
            xfd: bits(0x40004),
            unsupported: bits(4)
        })
    );
    let (now, xfd_err) = change(7, 0, 0x60000, &amx(), Losses::XFD);
    assert_eq!(now, registers(7, 0, 0x40000));
    assert_eq!(
        xfd_err,
        Change::Lost(Misfit::XfdErr {
            xfd_err: bits(0x60000),
            unsupported: bits(0x20000)
        })
    );
    let without_amx = layout("ice-lake-server");
    let (now, _) = change(7, 0x40000, 0, &without_amx, Losses::XFD);
    assert!(now.xfd.is_empty());
}

/// The words of `kvm_xsave` are the same area as its bytes.
#[test]
fn an_area_of_words_is_an_area_of_bytes() {
    let words: Vec<u32> = LIVE_TILES
        .chunks_exact(4)
        .map(|word| u32::from_ne_bytes(word.try_into().unwrap()).to_le())
        .collect();
    let registers = registers(0x602e7, 0, 0);
    let bytes = UntrustedArea::new(LIVE_TILES, registers);
    assert_eq!(bytes.bytes(), LIVE_TILES);
    assert_eq!(bytes.registers(), registers);
    for split in [0, 1, 1024, words.len()] {
        let (region, extra) = words.split_at(split);
        let of_words = UntrustedArea::from_words(region, extra, registers);
        assert_eq!(of_words, bytes);
        assert_eq!(
            sanitize(&of_words, &amx(), NOTHING),
            sanitize(&bytes, &amx(), NOTHING)
        );
    }
}

#[test]
fn the_compacted_format_is_taken() {
    let layout = layout("sapphire-rapids");
    let standard = area(&layout, 0x602e7);
    let image = Image::parse(&standard, &layout).unwrap();
    let compacted = image.to_compacted();
    fn untrusted(area: &[u8]) -> UntrustedArea<'_> {
        UntrustedArea::new(area, registers(0x602e7, 0, 0))
    }
    let (sanitized, change) = one_change_of(&untrusted(&compacted), &layout, NOTHING);
    assert_eq!(
        change,
        Change::Compacted {
            xcomp_bv: bits(0x602e7)
        }
    );
    assert_eq!(sanitized.state.image(), &image);

    // PT in use (supervisor): it is dropped, with or without content.
    let component = ComponentId::PT;
    let mut area = vec![0; 576 + 256 + 128 + 8];
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&0x304u64.to_le_bytes());
    area[520..528].copy_from_slice(&(1 << 63 | 0x304u64).to_le_bytes());
    area[576] = 1;
    area[960] = 0x54;
    let sanitized = sanitize(&untrusted(&area), &layout, NOTHING).unwrap();
    assert_eq!(sanitized.report.changes()[1], Change::Dropped { component });
    let image = sanitized.state.image();
    assert_eq!(image.component(ComponentId::PKRU).unwrap()[0], 0x54);
    area[832] = 1;
    let error = sanitize(&untrusted(&area), &layout, NOTHING).unwrap_err();
    assert!(matches!(
        error,
        SanitizeError::Refused { lost, .. } if lost == [Misfit::Missing { component }]
    ));

    // APX, which this layout lacks, is behind everything in use; then it is not.
    let mut behind = compacted.clone();
    behind[520..528].copy_from_slice(&(1 << 63 | 0xe02e7u64).to_le_bytes());
    assert_eq!(
        sanitize(&untrusted(&behind), &layout, NOTHING)
            .unwrap()
            .state,
        state(&standard, &layout, registers(0x602e7, 0, 0))
    );
    area[520..528].copy_from_slice(&(1 << 63 | 0x30cu64).to_le_bytes());
    assert_eq!(
        sanitize(&untrusted(&area), &layout, Losses::all()),
        Err(SanitizeError::PlaceUnknown {
            xcomp_bv: bits(0x30c),
            unknown: XFeatures::BNDREGS,
            component: ComponentId::PKRU
        })
    );
    area[520..528].copy_from_slice(&(1 << 63 | 0x300u64).to_le_bytes());
    assert_eq!(
        sanitize(&untrusted(&area), &layout, Losses::all()),
        Err(SanitizeError::WithoutPlace {
            xstate_bv: bits(0x304),
            xcomp_bv: bits(0x300),
            without_place: XFeatures::AVX
        })
    );
}

#[test]
fn every_change_and_loss_can_be_read() {
    let mut area = area(&amx(), 0x602e7);
    area[512..520].copy_from_slice(&(1 << 63 | 0xe02ffu64).to_le_bytes());
    area[26] = 2;
    area[420] = 1;
    area[540] = 1;
    area[521] = 4;
    area[2752] = 9;
    let untrusted = UntrustedArea::new(&area, registers(0xe02ff, 0x40001, 0x80000))
        .of_guest_with(bits(0xe02e7));
    let refused = sanitize(&untrusted, &amx(), NOTHING).unwrap_err();
    let SanitizeError::Refused { report, .. } = &refused else {
        panic!("{refused}");
    };
    let losses = format!(
        "XTILEDATA is in use, but IA32_XFD (XTILEDATA (0x40000)) disables it: a host cannot load it; \
         the target lacks APX; \
         MXCSR is 0x21fa0; the target supports the bits 0xffff; \
         the target refuses TILECFG: TILECFG selects palette 9; the highest is 1; \
         XCR0 is {}; the target supports only {} of it; \
         IA32_XFD is x87 | XTILEDATA (0x40001); the target cannot disable x87 (0x1); \
         IA32_XFD_ERR is APX (0x80000); the target cannot disable APX (0x80000)",
        bits(0xe02ff),
        bits(0x602e7),
    );
    assert_eq!(refused.to_string(), format!("this would be lost: {losses}"));
    assert_eq!(
        report.to_string(),
        format!(
            "XCOMP_BV: 0x400, now 0; \
             XSTATE_BV: bit 63, which is no component, now 0; \
             reserved byte 420: 0x01, now 0 (1 such bytes); \
             reserved byte 540: 0x01, now 0 (1 such bytes); \
             BNDREGS: no longer in use, because the guest never had it; \
             BNDCSR: no longer in use, because the guest never had it; \
             {losses}"
        )
    );
    assert_eq!(NOTHING.to_string(), "none");
    assert_eq!((Losses::XCR0 | Losses::XFD).to_string(), "XCR0 | XFD");
}

/// The invariants once more, without the crate's code for them.
fn is_safe(state: &ExtendedState<'_>, layout: &Layout) -> bool {
    let area = state.image().as_bytes();
    let word = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().unwrap());
    let zero = |range: std::ops::Range<usize>| area[range].iter().all(|&byte| byte == 0);
    let Registers {
        xcr0, xfd, xfd_err, ..
    } = state.registers();
    let (xcr0, in_use) = (xcr0.bits(), word(512));
    let tilecfg_is_valid = || {
        let Some(offset) = layout
            .component(ComponentId::XTILECFG)
            .and_then(|component| component.offset())
        else {
            return true;
        };
        let cfg = &area[offset..offset + 64];
        cfg[0] == 0
            || cfg[0] == 1
                && cfg[2..16].iter().all(|&byte| byte == 0)
                && cfg[32..48].iter().all(|&byte| byte == 0)
                && cfg[56..].iter().all(|&byte| byte == 0)
                && (0..8).all(|tile| {
                    let colsb = u16::from_le_bytes([cfg[16 + 2 * tile], cfg[17 + 2 * tile]]);
                    let rows = cfg[48 + tile];
                    colsb <= 64 && rows <= 16 && (colsb == 0) == (rows == 0)
                })
    };
    area.len() == layout.standard_size()
        && in_use & !layout.user().bits() == 0
        && in_use & xfd.bits() == 0
        && zero(520..576)
        && zero(416..464)
        && word(24) as u32 & !layout.mxcsr_mask() == 0
        && tilecfg_is_valid()
        && xcr0 & !layout.user().bits() == 0
        && xcr0 & 1 == 1
        && xcr0 & 6 != 4
        && [0x18, 0xe0, 0x60000]
            .iter()
            .all(|&group| xcr0 & group == 0 || xcr0 & group == group)
        && (xcr0 & 0xe0 == 0 || xcr0 & 4 != 0)
        && layout.xfd().contains(xfd | xfd_err)
}

type Case = (Layout, Vec<u8>, Registers, Option<XFeatures>);

/// Areas that are mostly valid for their layout, with changes at the places that have rules.
fn case() -> impl Strategy<Value = Case> {
    let places: Vec<usize> = (24..32).chain(412..580).chain(2750..2820).collect();
    let change = (prop::sample::select(places), any::<u8>());
    let value = || {
        prop_oneof![
            prop::sample::select(vec![0u64, 1, 3, 7, 0x207, 0x2e7, 0x602e7, 0x40000]),
            any::<u64>(),
            0u64..0x100_0000,
        ]
    };
    (
        prop::sample::select(&LAYOUTS[..]),
        prop::option::of(value()),
        (value(), value(), value(), value()),
        prop::collection::vec(change, 0..4),
        prop::option::of(500..11_008usize),
        any::<bool>(),
    )
        .prop_map(|(name, guest, values, changes, len, compacted)| {
            let layout = layout(name);
            let mut area = area(&layout, values.0 & layout.user().bits());
            if compacted {
                area = Image::parse(&area, &layout).unwrap().to_compacted();
            } else {
                area[512..520].copy_from_slice(&values.0.to_le_bytes());
            }
            for (place, value) in changes {
                if let Some(byte) = area.get_mut(place) {
                    *byte = value;
                }
            }
            if let Some(len) = len {
                area.truncate(len);
            }
            let registers = registers(values.1, values.2, values.3);
            (layout, area, registers, guest.map(bits))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What comes out is safe, fits its layout, and goes through again as it is.
    #[test]
    fn what_comes_out_is_safe_and_stays_as_it_is((layout, area, registers, guest) in case()) {
        let mut untrusted = UntrustedArea::new(&area, registers);
        if let Some(guest) = guest {
            untrusted = untrusted.of_guest_with(guest);
        }
        let Ok(Sanitized { state, .. }) = sanitize(&untrusted, &layout, Losses::all()) else {
            return Ok(());
        };
        prop_assert!(is_safe(&state, &layout), "{:?}", state);
        prop_assert_eq!(state.misfits(&layout).count(), 0);
        let again = UntrustedArea::new(state.image().as_bytes(), state.registers());
        let again = sanitize(&again, &layout, NOTHING).unwrap();
        prop_assert_eq!(again.report.changes(), []);
        prop_assert_eq!(again.state.image().as_bytes(), state.image().as_bytes());
        prop_assert_eq!(&again.state, &state);
    }

    /// It refuses what is lost and not allowed, and gives the same state wherever it gives one.
    #[test]
    fn it_refuses_or_gives_the_same(
        (layout, area, registers, _) in case(),
        allowed in any::<u32>().prop_map(Losses::from_bits_truncate),
    ) {
        let untrusted = UntrustedArea::new(&area, registers);
        let Ok(all) = sanitize(&untrusted, &layout, Losses::all()) else {
            return Ok(());
        };
        for allowed in [NOTHING, allowed] {
            let not_allowed: Vec<Misfit> = all
                .report
                .lost()
                .filter(|misfit| !allowed.contains(misfit.loss()))
                .copied()
                .collect();
            match sanitize(&untrusted, &layout, allowed) {
                Ok(given) => {
                    prop_assert_eq!(not_allowed, []);
                    prop_assert_eq!(&given, &all);
                }
                Err(SanitizeError::Refused { lost, report }) => {
                    prop_assert_eq!(lost, not_allowed);
                    prop_assert_eq!(&report, &all.report);
                }
                Err(error) => panic!("{error}"),
            }
        }
    }

    /// What is not named is as it was: without a change the state is the one that came in.
    #[test]
    fn nothing_is_changed_in_silence((layout, area, registers, _) in case()) {
        let untrusted = UntrustedArea::new(&area, registers);
        let sanitized = sanitize(&untrusted, &layout, NOTHING);
        let valid = Image::parse(&area, &layout)
            .ok()
            .and_then(|image| ExtendedState::new(image, registers).ok());
        match (sanitized, valid) {
            (Ok(sanitized), Some(valid)) => {
                prop_assert_eq!(sanitized.report.changes(), []);
                prop_assert_eq!(sanitized.state, valid);
            }
            (Ok(sanitized), None) => prop_assert!(!sanitized.report.changes().is_empty()),
            (Err(_), valid) => prop_assert_eq!(valid, None),
        }
    }

    #[test]
    fn no_bytes_make_it_panic(
        name in prop::sample::select(&LAYOUTS[..]),
        area in prop::collection::vec(any::<u8>(), 0..12_000),
        (xcr0, xfd, xfd_err) in any::<(u64, u64, u64)>(),
    ) {
        let untrusted = UntrustedArea::new(&area, registers(xcr0, xfd, xfd_err));
        let _ = sanitize(&untrusted, &layout(name), Losses::all());
    }
}

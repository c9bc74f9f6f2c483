//! Foreign state becomes safe or is refused, and each change has its name.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{ARMED, LAYOUTS, LIVE_TILES, area, layout};
use proptest::prelude::*;
use xsave_state::sanitize::{
    Change, Foreign, Losses, Policy, SanitizeError, Sanitized, Target, sanitize,
};
use xsave_state::tile::TileConfigError;
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Registers, XFeatures};

const ALL: Policy = Policy::Allow(Losses::all());

fn bits(bits: u64) -> XFeatures {
    XFeatures::from_bits_retain(bits)
}

fn registers(xcr0: u64, xfd: u64, xfd_err: u64) -> Registers {
    Registers {
        xcr0: bits(xcr0),
        xfd: bits(xfd),
        xfd_err: bits(xfd_err),
    }
}

fn amx() -> Layout {
    layout("sapphire-rapids-emulated-guest")
}

/// A valid area with everything in use, after a change, and what becomes of it under each policy:
/// the one change that is reported, which loses `losses`.
fn one_change(change: impl FnOnce(&mut Vec<u8>), losses: Losses) -> (Sanitized, Change) {
    let mut area = area(&amx(), 0x602e7);
    change(&mut area);
    one_change_of(
        &Foreign::new(&area, registers(0x602e7, 0, 0)),
        &Target::new(&amx()),
        losses,
    )
}

fn one_change_of(foreign: &Foreign<'_>, target: &Target, losses: Losses) -> (Sanitized, Change) {
    let sanitized = sanitize(foreign, target, Policy::Allow(losses)).unwrap();
    let &[change] = sanitized.report.changes() else {
        panic!("{}", sanitized.report);
    };
    assert_eq!(change.losses(), losses);
    assert_eq!(sanitized.report.losses(), losses);
    // No other policy lets it through.
    let refused = |policy| match sanitize(foreign, target, policy).unwrap_err() {
        SanitizeError::Refused {
            report,
            not_allowed,
        } => {
            assert_eq!(report, sanitized.report);
            assert_eq!(not_allowed, losses);
        }
        error => panic!("{error}"),
    };
    if !matches!(change, Change::Released { .. }) {
        refused(Policy::Unchanged);
    }
    if losses.is_empty() {
        assert_eq!(
            sanitize(foreign, target, Policy::Lossless).as_ref(),
            Ok(&sanitized)
        );
    } else {
        refused(Policy::Lossless);
        refused(Policy::Allow(Losses::all() - losses));
    }
    (sanitized, change)
}

#[test]
fn what_is_safe_is_not_changed() {
    let target = Target::new(&amx());
    for (area, xfd) in [(ARMED, 0x40000), (LIVE_TILES, 0)] {
        let registers = registers(0x602e7, xfd, 0);
        let sanitized =
            sanitize(&Foreign::new(area, registers), &target, Policy::Unchanged).unwrap();
        assert_eq!(sanitized.report.changes(), []);
        assert_eq!(sanitized.report.to_string(), "nothing");
        let image = Image::parse(area, &amx()).unwrap();
        assert_eq!(
            sanitized.state,
            ExtendedState::new(image, registers).unwrap()
        );
        // What means nothing does not come along: here the feature mask that KVM leaves.
        assert_ne!(area[464..472], [0; 8]);
        assert_eq!(sanitized.state.image().as_bytes()[464..472], [0; 8]);
    }
}

#[test]
fn tiles_in_use_under_xfd_are_dropped() {
    let foreign = Foreign::new(LIVE_TILES, registers(0x602e7, 0x40000, 0x40000));
    let (sanitized, change) = one_change_of(&foreign, &Target::new(&amx()), Losses::DISABLED);
    assert_eq!(
        change,
        Change::Disabled {
            was: bits(0x602a2),
            now: bits(0x202a2),
            xfd: XFeatures::XTILEDATA,
            with_content: XFeatures::XTILEDATA
        }
    );
    let image = sanitized.state.image();
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
    let foreign = Foreign::new(&area, registers(0x602e7, 0x40000, 0));
    let (_, change) = one_change_of(&foreign, &Target::new(&amx()), Losses::empty());
    assert!(matches!(
        change,
        Change::Disabled { with_content, .. } if with_content.is_empty()
    ));
}

#[test]
fn components_that_the_target_lacks_are_dropped() {
    let lost = bits(1 << 19 | 1 << 63);
    let (_, change) = one_change(
        |area| area[512..520].copy_from_slice(&(0x602e7u64 | lost.bits()).to_le_bytes()),
        Losses::UNSUPPORTED,
    );
    assert_eq!(
        change,
        Change::Unsupported {
            was: bits(0x602e7) | lost,
            now: bits(0x602e7),
            supported: bits(0x602e7),
            with_content: lost
        }
    );
}

/// The layout has a place for them, so that it is known whether they had content.
#[test]
fn components_that_the_kernel_lacks_are_dropped_and_looked_into() {
    let target = Target::new(&amx()).with_kernel_components(bits(0x207));
    let mut area = area(&amx(), 0x602e7);
    area[2752..].fill(0);
    let foreign = Foreign::new(&area, registers(0x207, 0, 0));
    let (sanitized, change) = one_change_of(&foreign, &target, Losses::UNSUPPORTED);
    assert_eq!(
        change,
        Change::Unsupported {
            was: bits(0x602e7),
            now: bits(0x207),
            supported: bits(0x207),
            with_content: XFeatures::AVX512
        }
    );
    assert_eq!(sanitized.state.image().xstate_bv(), bits(0x207));
    let foreign = Foreign::new(&area, registers(0x602e7, 0, 0));
    let sanitized = sanitize(&foreign, &target, ALL).unwrap();
    assert_eq!(
        sanitized.report.changes()[1],
        Change::Xcr0 {
            was: bits(0x602e7),
            now: bits(0x207),
            supported: bits(0x207)
        }
    );
}

/// Its CPUID.0DH.0 is zero, but FXSAVE's state is its own.
#[test]
fn a_guest_without_xsave_keeps_x87_and_sse() {
    let area = area(&amx(), 0x2e7);
    let foreign = Foreign::new(&area, Registers::RESET).with_guest(XFeatures::empty());
    let target = Target::new(&Layout::legacy());
    let sanitized = sanitize(&foreign, &target, Policy::Lossless).unwrap();
    let image = sanitized.state.image();
    assert_eq!(image.xstate_bv(), XFeatures::LEGACY);
    assert_eq!(image.as_bytes()[32..416], area[32..416]);
    assert_eq!(image.mxcsr(), 0x1fa0);
    assert_eq!(
        sanitized.report.changes(),
        [Change::OverReported {
            was: bits(0x2e7),
            now: XFeatures::LEGACY,
            guest: XFeatures::LEGACY,
        }]
    );
}

/// Old kernels report what the host has. With the guest's components known, that is no loss.
#[test]
fn images_of_kernels_that_over_report_are_masked() {
    let layout = layout("haswell-client");
    let mut area = area(&layout, 7);
    area.resize(4096, 0xaa);
    area[512..520].copy_from_slice(&0x2e7u64.to_le_bytes());
    let foreign = Foreign::new(&area, registers(7, 0, 0));
    let (_, change) = one_change_of(&foreign, &Target::new(&layout), Losses::UNSUPPORTED);
    assert!(matches!(change, Change::Unsupported { .. }));
    let foreign = foreign.with_guest(layout.user());
    let (sanitized, change) = one_change_of(&foreign, &Target::new(&layout), Losses::empty());
    assert_eq!(
        change,
        Change::OverReported {
            was: bits(0x2e7),
            now: bits(7),
            guest: bits(7)
        }
    );
    assert_eq!(sanitized.state.image().xstate_bv(), bits(7));
}

#[test]
fn reserved_bytes_are_cleared() {
    for offset in (416..464).chain(528..576) {
        let (sanitized, change) = one_change(|area| area[offset] = 9, Losses::empty());
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
    let (_, change) = one_change(|area| area[430..464].fill(1), Losses::empty());
    assert!(matches!(
        change,
        Change::Reserved {
            nonzero_bytes: 34,
            ..
        }
    ));
    let (_, change) = one_change(|area| area[522] = 1, Losses::empty());
    assert_eq!(change, Change::XcompBv { was: 0x10000 });
}

#[test]
fn mxcsr_has_only_bits_of_the_target() {
    let (sanitized, change) = one_change(|area| area[26] = 2, Losses::MXCSR);
    assert_eq!(
        change,
        Change::Mxcsr {
            was: 0x21fa0,
            now: 0x1fa0,
            mask: 0xffff,
            loaded: true
        }
    );
    assert_eq!(sanitized.state.image().mxcsr(), 0x1fa0);
    // Where neither SSE nor AVX is in use nothing loads it, and nothing is lost.
    let mut area = area(&amx(), 0x201);
    area[26] = 2;
    let foreign = Foreign::new(&area, registers(7, 0, 0));
    let (_, change) = one_change_of(&foreign, &Target::new(&amx()), Losses::empty());
    assert!(matches!(
        change,
        Change::Mxcsr {
            loaded: false,
            now: 0x1f80,
            ..
        }
    ));
}

/// MXCSR goes with AVX; a target without AVX has SSE for it.
#[test]
fn mxcsr_outlives_the_component_that_held_it() {
    let mut area = area(&amx(), 4);
    area[576..832].fill(0);
    let foreign = Foreign::new(&area, registers(3, 0, 0));
    let target = Target::new(&amx()).with_kernel_components(bits(3));
    let sanitized = sanitize(&foreign, &target, Policy::Lossless).unwrap();
    assert_eq!(sanitized.state.image().xstate_bv(), XFeatures::SSE);
    assert_eq!(sanitized.state.image().mxcsr(), 0x1fa0);
    // Over-reported by an old kernel, likewise.
    let foreign = foreign.with_guest(bits(3));
    let again = sanitize(&foreign, &target, Policy::Lossless).unwrap();
    assert_eq!(again.state, sanitized.state);
}

#[test]
fn a_tile_configuration_that_ldtilecfg_refuses_becomes_initial() {
    let (sanitized, change) = one_change(|area| area[2752 + 48] = 17, Losses::TILE_CONFIG);
    let Change::TileConfig { was, rule } = change else {
        panic!("{change}");
    };
    assert_eq!((was[0], was[48]), (1, 17));
    assert!(matches!(
        rule,
        TileConfigError::Rows {
            tile: 0,
            rows: 17,
            limit: 16
        }
    ));
    let image = sanitized.state.image();
    assert_eq!(image.component(ComponentId::XTILECFG), None);
    assert!(image.component(ComponentId::XTILEDATA).is_some());
}

#[test]
fn initial_values_are_released() {
    let mut area = vec![0; 11_008];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&0x602e7u64.to_le_bytes());
    area[2753..2816].fill(7); // With palette 0 nothing else in TILECFG counts.
    let target = Target::new(&amx());
    let foreign = Foreign::new(&area, registers(0x602e7, 0, 0));
    let (sanitized, change) = one_change_of(&foreign, &target, Losses::empty());
    assert_eq!(
        change,
        Change::Released {
            was: bits(0x602e7),
            now: bits(0)
        }
    );
    let reset = Image::initial(&amx());
    assert_eq!(sanitized.state.image().as_bytes(), reset.as_bytes());
    // They are safe as they are.
    let unchanged = sanitize(&foreign, &target, Policy::Unchanged).unwrap();
    assert_eq!(unchanged.report.changes(), []);
    assert_eq!(unchanged.state.image().xstate_bv(), bits(0x602e7));

    // MXCSR is not initial: one component stays to hold it.
    area[24] = 0xa0;
    for (in_use, holder) in [(0x602e7u64, 2), (6, 2), (2, 2), (4, 4)] {
        area[512..520].copy_from_slice(&in_use.to_le_bytes());
        let foreign = Foreign::new(&area, registers(0x602e7, 0, 0));
        let sanitized = sanitize(&foreign, &target, Policy::Lossless).unwrap();
        assert_eq!(sanitized.state.image().xstate_bv(), bits(holder));
        assert_eq!(sanitized.state.image().mxcsr(), 0x1fa0);
    }
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
    let target = Target::new(&amx());
    let area = cut(0x202e7, 4096);
    let foreign = Foreign::new(&area, registers(0x602e7, 0x40000, 0));
    let (sanitized, change) = one_change_of(&foreign, &target, Losses::empty());
    assert_eq!(
        change,
        Change::Extended {
            actual_bytes: 4096,
            required_bytes: 11_008
        }
    );
    assert_eq!(sanitized.state.image().as_bytes().len(), 11_008);

    let area = cut(0x602e7, 4096);
    let foreign = Foreign::new(&area, registers(0x602e7, 0, 0));
    assert_eq!(
        sanitize(&foreign, &target, ALL),
        Err(SanitizeError::Truncated {
            component: ComponentId::XTILEDATA,
            required_bytes: 11_008,
            actual_bytes: 4096
        })
    );
    for actual_bytes in 0..576 {
        assert_eq!(
            sanitize(
                &Foreign::new(&whole[..actual_bytes], registers(1, 0, 0)),
                &target,
                ALL
            ),
            Err(SanitizeError::TooShort {
                required_bytes: 576,
                actual_bytes
            })
        );
    }
}

#[test]
fn registers_have_only_what_the_target_has() {
    let area = area(&amx(), 3);
    let target = Target::new(&amx());
    let change = |xcr0, xfd, xfd_err, target: &Target, losses| {
        let foreign = Foreign::new(&area, registers(xcr0, xfd, xfd_err));
        let (sanitized, change) = one_change_of(&foreign, target, losses);
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
        let (registers, change) = change(was, 0, 0, &target, Losses::XCR0);
        assert_eq!(registers.xcr0, bits(now));
        assert_eq!(
            change,
            Change::Xcr0 {
                was: bits(was),
                now: bits(now),
                supported: bits(0x602e7)
            }
        );
    }
    let (_, xfd) = change(7, 0x40004, 0, &target, Losses::XFD);
    assert_eq!(
        xfd,
        Change::Xfd {
            was: bits(0x40004),
            now: bits(0x40000),
            supported: bits(0x40000)
        }
    );
    let (_, xfd_err) = change(7, 0, 0x60000, &target, Losses::XFD);
    assert!(matches!(xfd_err, Change::XfdErr { now, .. } if now == bits(0x40000)));
    let old = target.without_xfd();
    let (registers, _) = change(7, 0x40000, 0, &old, Losses::XFD);
    assert!(registers.xfd.is_empty());
}

/// A kernel without IA32_XFD: what the source had disabled is not enabled by that.
#[test]
fn disabled_state_does_not_come_to_life_on_a_kernel_without_xfd() {
    let foreign = Foreign::new(LIVE_TILES, registers(0x602e7, 0x40000, 0));
    let target = Target::new(&amx()).without_xfd();
    let sanitized = sanitize(&foreign, &target, ALL).unwrap();
    assert_eq!(
        sanitized.state.image().component(ComponentId::XTILEDATA),
        None
    );
    assert_eq!(sanitized.report.losses(), Losses::DISABLED | Losses::XFD);
}

#[test]
fn the_compacted_format_is_taken() {
    let layout = layout("sapphire-rapids");
    let standard = area(&layout, 0x602e7);
    let image = Image::parse(&standard, &layout).unwrap();
    let compacted = image.to_compacted();
    let target = Target::new(&layout);
    fn foreign(area: &[u8]) -> Foreign<'_> {
        Foreign::new(area, registers(0x602e7, 0, 0))
    }
    let (sanitized, change) = one_change_of(&foreign(&compacted), &target, Losses::empty());
    assert_eq!(
        change,
        Change::Compacted {
            xcomp_bv: bits(0x602e7)
        }
    );
    assert_eq!(sanitized.state.image(), &image);

    // PT in use (supervisor): it is dropped, with or without content.
    let mut area = vec![0; 576 + 256 + 128 + 8];
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    area[512..520].copy_from_slice(&0x304u64.to_le_bytes());
    area[520..528].copy_from_slice(&(1 << 63 | 0x304u64).to_le_bytes());
    area[576] = 1;
    area[960] = 0x54;
    let sanitized = sanitize(&foreign(&area), &target, Policy::Lossless).unwrap();
    let image = sanitized.state.image();
    assert_eq!(image.component(ComponentId::PKRU).unwrap()[0], 0x54);
    area[832] = 1;
    let error = sanitize(&foreign(&area), &target, Policy::Lossless).unwrap_err();
    assert!(matches!(
        error,
        SanitizeError::Refused { not_allowed, .. } if not_allowed == Losses::UNSUPPORTED
    ));

    // APX, which this layout does not have, is behind everything in use; then it is not.
    let mut behind = compacted.clone();
    behind[520..528].copy_from_slice(&(1 << 63 | 0xe02e7u64).to_le_bytes());
    assert_eq!(sanitize(&foreign(&behind), &target, ALL).unwrap().state, {
        let image = Image::parse(&standard, &layout).unwrap();
        ExtendedState::new(image, registers(0x602e7, 0, 0)).unwrap()
    });
    area[520..528].copy_from_slice(&(1 << 63 | 0x30cu64).to_le_bytes());
    assert_eq!(
        sanitize(&foreign(&area), &target, ALL),
        Err(SanitizeError::PlaceUnknown {
            xcomp_bv: bits(0x30c),
            unknown: XFeatures::BNDREGS,
            component: ComponentId::PKRU
        })
    );
    area[520..528].copy_from_slice(&(1 << 63 | 0x300u64).to_le_bytes());
    assert_eq!(
        sanitize(&foreign(&area), &target, ALL),
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
    area[512..520].copy_from_slice(&0xe02ffu64.to_le_bytes());
    area[26] = 2;
    area[420] = 1;
    area[540] = 1;
    area[521] = 4;
    area[2752] = 9;
    let foreign =
        Foreign::new(&area, registers(0xe02ff, 0x40001, 0x80000)).with_guest(bits(0xe02e7));
    let refused = sanitize(&foreign, &Target::new(&amx()), Policy::Lossless).unwrap_err();
    let unchanged = sanitize(&foreign, &Target::new(&amx()), Policy::Unchanged).unwrap_err();
    assert!(
        unchanged
            .to_string()
            .starts_with("not allowed: UNSUPPORTED | ")
    );
    assert_eq!(Losses::empty().to_string(), "none");
    // A change without a loss, where none is allowed.
    let mut reserved = common::area(&amx(), 3);
    reserved[420] = 1;
    let reserved = Foreign::new(&reserved, registers(7, 0, 0));
    let refused_reserved = sanitize(&reserved, &Target::new(&amx()), Policy::Unchanged);
    assert_eq!(
        refused_reserved.unwrap_err().to_string(),
        "no change is allowed. Changes: reserved byte 420: 0x01, now 0 (1 such bytes)"
    );
    let everything = "x87 | SSE | AVX | opmask | ZMM_Hi256 | Hi16_ZMM | PKRU | XTILECFG";
    assert_eq!(
        refused.to_string(),
        format!(
            "not allowed: UNSUPPORTED | DISABLED | TILE_CONFIG | MXCSR | XCR0 | XFD. Changes: \
             XCOMP_BV: 0x400, now 0; \
             reserved byte 420: 0x01, now 0 (1 such bytes); \
             reserved byte 540: 0x01, now 0 (1 such bytes); \
             XSTATE_BV: {}, now {everything} | XTILEDATA | APX (0xe02e7): the guest had only \
             {everything} | XTILEDATA | APX (0xe02e7); \
             MXCSR: 0x21fa0, now 0x1fa0: the target has 0xffff; \
             XSTATE_BV: {everything} | XTILEDATA | APX (0xe02e7), now {everything} | XTILEDATA \
             (0x602e7): the target has {everything} | XTILEDATA (0x602e7); content of APX \
             (0x80000) is lost; \
             XSTATE_BV: {everything} | XTILEDATA (0x602e7), now {everything} (0x202e7): IA32_XFD \
             (XTILEDATA (0x40000)) disables the rest; content of XTILEDATA (0x40000) is lost; \
             TILECFG: TILECFG selects palette 9; the highest there is 1; now initial; \
             XCR0: {}, now {everything} | XTILEDATA (0x602e7): the target has {everything} | \
             XTILEDATA (0x602e7); \
             IA32_XFD: x87 | XTILEDATA (0x40001), now XTILEDATA (0x40000): the target has \
             XTILEDATA (0x40000); \
             IA32_XFD_ERR: APX (0x80000), now none: the target has XTILEDATA (0x40000)",
            bits(0xe02ff),
            bits(0xe02ff),
        )
    );
}

/// The invariants once more, without the crate's code for them.
fn is_safe(state: &ExtendedState<'_>, target: &Target) -> bool {
    let (layout, area) = (target.layout(), state.image().as_bytes());
    let word = |at: usize| u64::from_le_bytes(area[at..at + 8].try_into().unwrap());
    let zero = |range: std::ops::Range<usize>| area[range].iter().all(|&byte| byte == 0);
    let Registers { xcr0, xfd, xfd_err } = state.registers();
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
        && in_use & !target.components().bits() == 0
        && in_use & xfd.bits() == 0
        && zero(520..576)
        && zero(416..464)
        && word(24) as u32 & !layout.mxcsr_mask() == 0
        && tilecfg_is_valid()
        && xcr0 & !target.components().bits() == 0
        && xcr0 & 1 == 1
        && xcr0 & 6 != 4
        && [0x18, 0xe0, 0x60000]
            .iter()
            .all(|&group| xcr0 & group == 0 || xcr0 & group == group)
        && (xcr0 & 0xe0 == 0 || xcr0 & 4 != 0)
        && target.xfd().contains(xfd | xfd_err)
}

type Case = (Target, Vec<u8>, Registers, Option<XFeatures>);

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
        (value(), any::<bool>()),
        prop::option::of(value()),
        (value(), value(), value(), value()),
        prop::collection::vec(change, 0..4),
        prop::option::of(500..11_008usize),
        any::<bool>(),
    )
        .prop_map(|(name, kernel, guest, values, changes, len, compacted)| {
            let layout = layout(name);
            let mut target = Target::new(&layout);
            if kernel.0 != 0 {
                target = target.with_kernel_components(bits(kernel.0));
            }
            if kernel.1 {
                target = target.without_xfd();
            }
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
            (target, area, registers, guest.map(bits))
        })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn what_comes_out_is_safe_and_stays_as_it_is((target, area, registers, guest) in case()) {
        let mut foreign = Foreign::new(&area, registers);
        if let Some(guest) = guest {
            foreign = foreign.with_guest(guest);
        }
        let Ok(Sanitized { state, .. }) = sanitize(&foreign, &target, ALL) else {
            return Ok(());
        };
        prop_assert!(is_safe(&state, &target), "{:?}", state);
        let again = Foreign::new(state.image().as_bytes(), state.registers());
        for policy in [Policy::Unchanged, Policy::Lossless, ALL] {
            let again = sanitize(&again, &target, policy).unwrap();
            prop_assert_eq!(again.report.changes(), []);
            prop_assert_eq!(again.state.image().as_bytes(), state.image().as_bytes());
            prop_assert_eq!(&again.state, &state);
        }
    }

    /// Each policy gives what it allows, and the same state wherever it gives one.
    #[test]
    fn a_policy_refuses_or_gives_the_same(
        (target, area, registers, _) in case(),
        allowed in any::<u32>().prop_map(Losses::from_bits_truncate),
    ) {
        let foreign = Foreign::new(&area, registers);
        let Ok(all) = sanitize(&foreign, &target, ALL) else {
            return Ok(());
        };
        let released = matches!(all.report.changes(), [Change::Released { .. }]);
        for (policy, allows) in [
            (Policy::Unchanged, all.report.changes().is_empty() || released),
            (Policy::Lossless, all.report.losses().is_empty()),
            (Policy::Allow(allowed), allowed.contains(all.report.losses())),
        ] {
            match sanitize(&foreign, &target, policy) {
                Ok(given) => {
                    prop_assert!(allows);
                    let initial = given.state.image().initial_valued();
                    let image = given.state.image().clone().without(initial);
                    prop_assert_eq!(&image, all.state.image());
                    prop_assert_eq!(given.state.registers(), all.state.registers());
                }
                Err(error) => {
                    prop_assert!(!allows, "{:?}: {}", policy, error);
                    let refused = matches!(error, SanitizeError::Refused { .. });
                    prop_assert!(refused, "{}", error);
                }
            }
        }
    }

    #[test]
    fn no_bytes_make_it_panic(
        name in prop::sample::select(&LAYOUTS[..]),
        area in prop::collection::vec(any::<u8>(), 0..12_000),
        (xcr0, xfd, xfd_err) in any::<(u64, u64, u64)>(),
    ) {
        let foreign = Foreign::new(&area, registers(xcr0, xfd, xfd_err));
        let _ = sanitize(&foreign, &Target::new(&layout(name)), ALL);
    }
}

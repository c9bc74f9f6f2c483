//! The same state in another layout: exact, or the list of what it would lose.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{Dump, LAYOUTS, LIVE_TILES, area, layout};
use proptest::prelude::*;
use xsave_state::relayout::{Allowed, Loss, Relaid, RelayoutError, relayout};
use xsave_state::tile::TileConfigError;
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Misfit, Registers, XFeatures};

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

fn state(area: &[u8], layout: &Layout, registers: Registers) -> ExtendedState<'static> {
    let image = Image::parse(area, layout).unwrap().into_owned();
    ExtendedState::new(image, registers).unwrap()
}

fn amx() -> Layout {
    layout("sapphire-rapids-emulated-guest")
}

fn losses(state: &ExtendedState<'_>, target: &Layout, allowed: Allowed) -> Vec<Loss> {
    match relayout(state, target, allowed).unwrap_err() {
        RelayoutError::Lossy { losses } => losses,
        error => panic!("{error}"),
    }
}

/// Everything that both have moves to where the other has it, and back to where it was.
#[test]
fn from_intel_to_amd_and_back() {
    let (intel, amd) = (layout("ice-lake-server"), layout("amd-zen4-genoa"));
    let source = area(&intel, 0x2e7);
    let before = state(&source, &intel, registers(0x2e7, 0, 0));
    let there = relayout(&before, &amd, Allowed::NOTHING).unwrap();
    assert_eq!(there.lost, []);
    assert_eq!(there.state.layout(), &amd);
    assert_eq!(there.state.registers(), before.registers());
    let target = there.state.image().as_bytes();
    assert_eq!(target.len(), amd.standard_size());
    for (from, to, len) in [
        (160, 160, 256),  // SSE
        (576, 576, 256),  // AVX
        (1088, 832, 64),  // opmask
        (1152, 896, 512), // ZMM_Hi256
        (1664, 1408, 1024),
        (2688, 2432, 8), // PKRU
    ] {
        assert_eq!(target[to..to + len], source[from..from + len]);
    }
    let back = relayout(&there.state, &intel, Allowed::NOTHING).unwrap();
    assert_eq!(back.state, before);
}

#[test]
fn what_the_target_lacks_is_listed_unless_it_is_initial() {
    let (intel, old) = (amx(), layout("haswell-client"));
    let before = state(LIVE_TILES, &intel, registers(0x602e7, 0, 0x40000));
    let found = losses(&before, &old, Allowed::NOTHING);
    let missing = |number| Loss::Missing {
        component: ComponentId::new(number).unwrap(),
    };
    assert_eq!(
        found,
        [
            missing(5),
            missing(7),
            missing(9),
            missing(17),
            missing(18),
            Loss::Xcr0 {
                xcr0: bits(0x602e7),
                lost: bits(0x602e0)
            },
            Loss::XfdErr {
                xfd_err: bits(0x40000),
                lost: bits(0x40000)
            },
        ]
    );
    let text = relayout(&before, &old, Allowed::NOTHING)
        .unwrap_err()
        .to_string();
    assert!(text.starts_with(
        "the target cannot hold the state: opmask is in use and the target does not have it; "
    ));
    assert!(text.ends_with(
        "IA32_XFD_ERR is XTILEDATA (0x40000); the target cannot disable XTILEDATA (0x40000)"
    ));

    // By name.
    let allowed = |components| Allowed {
        components: bits(components),
        mxcsr: false,
    };
    assert_eq!(
        losses(&before, &old, allowed(0x60000 | 0x200)),
        [missing(5), missing(7), found[5]]
    );
    let Relaid {
        state: after, lost, ..
    } = relayout(&before, &old, allowed(0x602e0)).unwrap();
    assert_eq!(lost, found);
    assert_eq!(after.image().xstate_bv(), bits(2));
    assert_eq!(after.registers(), registers(7, 0, 0));
    assert_eq!(
        after.image().component(ComponentId::SSE),
        before.image().component(ComponentId::SSE)
    );

    // The same components in use, all of them zero.
    let mut area = LIVE_TILES.to_vec();
    area[1088..].fill(0);
    let before = state(&area, &intel, registers(7, 0, 0));
    let there = relayout(&before, &old, Allowed::NOTHING).unwrap();
    assert_eq!(there.state.image().xstate_bv(), bits(2));
}

#[test]
fn xfd_must_be_legal_on_the_target() {
    let (amx, old) = (amx(), layout("ice-lake-server"));
    let armed = state(common::ARMED, &amx, registers(7, 0x40000, 0));
    let loss = Loss::Xfd {
        xfd: bits(0x40000),
        lost: bits(0x40000),
    };
    assert_eq!(losses(&armed, &old, Allowed::NOTHING), [loss]);
    let allowed = Allowed {
        components: XFeatures::AMX,
        mxcsr: false,
    };
    let there = relayout(&armed, &old, allowed).unwrap();
    assert_eq!(there.lost, [loss]);
    assert!(there.state.registers().xfd.is_empty());
}

/// XCR0 loses the whole of a group: XSETBV takes no part of one.
#[test]
fn xcr0_stays_legal() {
    let source = layout("ice-lake-server");
    let mut dump = Dump::read("ice-lake-server");
    dump.leaf_mut(0xd, 0)[0] &= !0x80; // no Hi16_ZMM
    let target = dump.layout().unwrap();
    let before = state(&area(&source, 3), &source, registers(0x2e7, 0, 0));
    assert_eq!(
        losses(&before, &target, Allowed::NOTHING),
        [Loss::Xcr0 {
            xcr0: bits(0x2e7),
            lost: XFeatures::AVX512
        }]
    );
}

#[test]
fn mpx_is_intels_alone() {
    let (client, amd) = (layout("skylake-client"), layout("amd-zen4-genoa"));
    assert!(client.user().contains(XFeatures::MPX));
    let used = state(&area(&client, 0x1f), &client, registers(0x1f, 0, 0));
    assert_eq!(losses(&used, &amd, Allowed::NOTHING).len(), 3);
    let unused = state(&area(&client, 7), &client, registers(7, 0, 0));
    assert!(relayout(&unused, &amd, Allowed::NOTHING).is_ok());
}

#[test]
fn mxcsr_bits_that_the_target_lacks() {
    let (amd, intel) = (layout("amd-zen4-genoa"), layout("haswell-client"));
    assert_eq!(amd.mxcsr_mask(), 0x2ffff);
    let mut area = area(&amd, 7);
    area[26] = 2;
    let before = state(&area, &amd, registers(7, 0, 0));
    let loss = Loss::Mxcsr {
        mxcsr: 0x21fa0,
        mask: 0xffff,
    };
    assert_eq!(losses(&before, &intel, Allowed::NOTHING), [loss]);
    let allowed = Allowed {
        components: XFeatures::empty(),
        mxcsr: true,
    };
    let there = relayout(&before, &intel, allowed).unwrap();
    assert_eq!(there.lost, [loss]);
    assert_eq!(there.state.image().mxcsr(), 0x1fa0);
}

/// AVX is in use for MXCSR alone, and the target does not have it: SSE holds MXCSR then.
#[test]
fn mxcsr_moves_without_avx() {
    let source = amx();
    let target = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0, _) => [0xd, 0, 0, 0],
        (0xd, 0) => [3, 576, 576, 0],
        _ => [0; 4],
    })
    .unwrap();
    let mut area = area(&source, 4);
    area[576..832].fill(0);
    let before = state(&area, &source, registers(3, 0, 0));
    let there = relayout(&before, &target, Allowed::NOTHING).unwrap();
    assert_eq!(there.state.image().xstate_bv(), XFeatures::SSE);
    assert_eq!(there.state.image().mxcsr(), 0x1fa0);
}

/// A processor with twice the tile data and a second palette, and one that calls its second palette
/// the first.
fn larger(first_palette: [u32; 4]) -> Layout {
    Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0xd, 0) => [0x602e7, 0x4b00, 0x4b00, 0],
        (0xd, 18) => [0x4000, 0xb00, 6, 0],
        (0x1d, 0) => [2, 0, 0, 0],
        (0x1d, 1) => first_palette,
        (0x1d, 2) => [0x0800_4000, 0x0008_0080, 0x10, 0],
        _ => Dump::read("sapphire-rapids-emulated-guest").get(leaf, subleaf),
    })
    .unwrap()
}

const PALETTE_1: [u32; 4] = [0x0400_2000, 0x0008_0040, 0x10, 0];

#[test]
fn tiles_move_to_a_larger_component_and_back_if_they_fit() {
    let (small, large) = (amx(), larger(PALETTE_1));
    let registers = registers(0x602e7, 0, 0);
    let before = state(LIVE_TILES, &small, registers);
    let there = relayout(&before, &large, Allowed::NOTHING).unwrap().state;
    let tiles = there.image().component(ComponentId::XTILEDATA).unwrap();
    assert_eq!(tiles[..8192], LIVE_TILES[2816..]);
    assert_eq!(tiles[8192..], [0; 8192]);
    let back = relayout(&there, &small, Allowed::NOTHING).unwrap();
    assert_eq!(back.state, before);

    let mut bytes = there.image().as_bytes().to_vec();
    *bytes.last_mut().unwrap() = 1;
    let full = state(&bytes, &large, registers);
    let size = Loss::Size {
        component: ComponentId::XTILEDATA,
        source_bytes: 16384,
        target_bytes: 8192,
    };
    assert_eq!(losses(&full, &small, Allowed::NOTHING), [size]);
    let allowed = Allowed {
        components: XFeatures::XTILEDATA,
        mxcsr: false,
    };
    let there = relayout(&full, &small, allowed).unwrap();
    assert_eq!(there.lost, [size]);
    assert_eq!(there.state.image().component(ComponentId::XTILEDATA), None);
}

#[test]
fn tiles_of_a_palette_that_the_target_lacks_or_means_otherwise() {
    let (small, large) = (amx(), larger(PALETTE_1));
    let mut bytes = area(&large, 0x60000);
    bytes[2752] = 2;
    let second = state(&bytes, &large, registers(0x602e7, 0, 0));
    assert_eq!(
        losses(&second, &small, Allowed::NOTHING),
        [
            Loss::TileConfig {
                rule: TileConfigError::Palette {
                    palette: 2,
                    max_palette: 1
                }
            },
            Loss::Palette {
                component: ComponentId::XTILEDATA,
                palette: 2
            }
        ]
    );
    // Half as many rows of twice the length: the same bytes are other rows.
    let other = larger([0x0400_2000, 0x0008_0080, 0x8, 0]);
    let mut area = LIVE_TILES.to_vec();
    area[2752 + 48..][..8].fill(8); // a shape that both palettes allow
    let first = state(&area, &small, registers(0x602e7, 0, 0));
    let palette = |component| Loss::Palette {
        component,
        palette: 1,
    };
    assert_eq!(
        losses(&first, &other, Allowed::NOTHING),
        [
            palette(ComponentId::XTILECFG),
            palette(ComponentId::XTILEDATA)
        ]
    );
    // TILECFG initial: the tiles could still be looked at through any palette.
    area[512..520].copy_from_slice(&0x40000u64.to_le_bytes());
    let unconfigured = state(&area, &small, registers(0x602e7, 0, 0));
    assert_eq!(
        losses(&unconfigured, &other, Allowed::NOTHING),
        [palette(ComponentId::XTILEDATA)]
    );
    assert!(relayout(&unconfigured, &large, Allowed::NOTHING).is_ok());
}

/// Same places, and still not the same: what KVM would refuse at its last step, or not at all.
#[test]
fn each_thing_beyond_places_is_a_misfit() {
    let of = |state: &ExtendedState<'_>, target: &Layout| -> Vec<String> {
        let misfits = state.misfits(target);
        misfits.map(|misfit| misfit.to_string()).collect()
    };
    let small = amx();
    let mut bytes = LIVE_TILES.to_vec();
    bytes[2752 + 48..][..8].fill(8);
    let tiles = state(&bytes, &small, registers(0x602e7, 0, 0));
    assert_eq!(of(&tiles, &small), [""; 0]);
    let other = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0x1d, 1) => [0x0400_2000, 0x0008_0080, 0x8, 0],
        _ => Dump::read("sapphire-rapids-emulated-guest").get(leaf, subleaf),
    })
    .unwrap();
    assert_eq!(
        of(&tiles, &other),
        [
            "XTILECFG: palette 1 is another one on the target",
            "XTILEDATA: palette 1 is another one on the target"
        ]
    );

    let without_xfd = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0xd, 1) => [0xf, 0, 0, 0],
        _ => Dump::read("sapphire-rapids-emulated-guest").get(leaf, subleaf),
    })
    .unwrap();
    let armed = state(common::ARMED, &small, registers(0x602e7, 0x40000, 0x40000));
    assert_eq!(
        of(&armed, &without_xfd),
        [
            "IA32_XFD is XTILEDATA (0x40000); the target cannot disable XTILEDATA (0x40000)",
            "IA32_XFD_ERR is XTILEDATA (0x40000); the target cannot disable XTILEDATA (0x40000)"
        ]
    );
    assert_eq!(of(&tiles, &without_xfd), [""; 0]);

    let enabled = state(&area(&small, 7), &small, registers(0x602e7, 0, 0));
    let found: Vec<_> = enabled.misfits(&layout("ice-lake-server")).collect();
    assert_eq!(
        found,
        [Misfit::Loss(Loss::Xcr0 {
            xcr0: bits(0x602e7),
            lost: XFeatures::AMX
        })]
    );

    let amd = layout("amd-zen4-genoa");
    let mut bytes = area(&amd, 7);
    bytes[24..28].copy_from_slice(&0x2_1f80u32.to_le_bytes());
    let misaligned = state(&bytes, &amd, registers(7, 0, 0));
    assert_eq!(
        of(&misaligned, &small),
        ["MXCSR is 0x21f80; the target has 0xffff"]
    );
    // Nothing loads it.
    bytes[512] = 1;
    let unused = state(&bytes, &amd, registers(7, 0, 0));
    assert_eq!(of(&unused, &small), [""; 0]);
}

/// Zen 2 lists PKRU with 64 bytes.
#[test]
fn pkru_of_another_size() {
    let zen2 = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
        (0, _) => [0xd, 0, 0, 0],
        (0xd, 0) => [0x207, 896, 896, 0],
        (0xd, 2) => [256, 576, 0, 0],
        (0xd, 9) => [64, 832, 0, 0],
        _ => [0; 4],
    })
    .unwrap();
    let intel = layout("ice-lake-server");
    let before = state(&area(&intel, 0x207), &intel, registers(0x207, 0, 0));
    let there = relayout(&before, &zen2, Allowed::NOTHING).unwrap().state;
    let back = relayout(&there, &intel, Allowed::NOTHING).unwrap();
    assert_eq!(back.state, before);
}

/// A component of which nothing is known but its size.
#[test]
fn an_unknown_component_moves_only_at_its_size() {
    let with_apx = |size: u32| {
        Layout::from_cpuid(move |leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0xd, 0, 0, 0],
            (0xd, 0) => [0x80003, 2000, 2000, 0],
            (0xd, 19) => [size, 960, 0, 0],
            _ => [0; 4],
        })
        .unwrap()
    };
    let (small, large) = (with_apx(128), with_apx(256));
    let mut bytes = area(&small, 0x80000);
    let before = state(&bytes, &small, registers(3, 0, 0));
    assert_eq!(
        losses(&before, &large, Allowed::NOTHING),
        [Loss::Size {
            component: ComponentId::new(19).unwrap(),
            source_bytes: 128,
            target_bytes: 256
        }]
    );
    bytes[960..].fill(0);
    let initial = state(&bytes, &small, registers(3, 0, 0));
    assert!(relayout(&initial, &large, Allowed::NOTHING).is_ok());
}

/// States of any layout: a random part of the components in use, a random part of those initial.
fn any_state() -> impl Strategy<Value = ExtendedState<'static>> {
    (
        prop::sample::select(&LAYOUTS[..]),
        any::<(u64, u64)>(),
        prop::sample::select(vec![1u64, 3, 7, 0x1f, 0xe7, 0x207, 0x2e7, 0x602e7]),
        any::<(bool, bool)>(),
    )
        .prop_map(|(name, (in_use, zero), xcr0, (xfd, xfd_err))| {
            let layout = layout(name);
            let user = layout.user().bits();
            let only = |value: bool| if value { layout.xfd().bits() } else { 0 };
            let in_use = in_use & user & !only(xfd);
            let mut area = area(&layout, in_use);
            for component in layout.components() {
                let id = component.id();
                if let Some(offset) = component.offset()
                    && id.number() > 0
                    && zero & id.bit().bits() != 0
                {
                    area[offset..offset + component.size()].fill(0);
                }
            }
            let xcr0 = xsave_state::xcr0::largest_within(bits(xcr0), layout.user()).bits();
            state(&area, &layout, registers(xcr0, only(xfd), only(xfd_err)))
        })
}

/// What a state means, whichever component is in use to hold MXCSR: MXCSR, and the components that
/// are not initial with their bytes.
fn meaning(image: &Image<'_>) -> (u32, Vec<(ComponentId, Vec<u8>)>) {
    let mut components = Vec::new();
    for id in image.xstate_bv().components() {
        let mut bytes = image.component(id).unwrap().to_vec();
        if id == ComponentId::X87 {
            bytes[24..32].fill(0);
        }
        if bytes.iter().any(|&byte| byte != 0) {
            components.push((id, bytes));
        }
    }
    (image.mxcsr(), components)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn there_and_back_is_the_identity(
        before in any_state(),
        target in prop::sample::select(&LAYOUTS[..]),
    ) {
        let target = layout(target);
        let Ok(there) = relayout(&before, &target, Allowed::NOTHING) else {
            // Only what the target lacks can be in the way.
            let Registers { xcr0, xfd, xfd_err } = before.registers();
            let used: XFeatures = meaning(before.image()).1.iter().map(|(id, _)| id.bit()).collect();
            prop_assert!(
                !target.user().contains(xcr0 | used)
                    || !target.xfd().contains(xfd | xfd_err)
                    || before.image().mxcsr() & !target.mxcsr_mask() != 0
            );
            return Ok(());
        };
        prop_assert_eq!(there.lost, []);
        prop_assert_eq!(meaning(there.state.image()), meaning(before.image()));
        let compacted = there.state.image().to_compacted();
        let standard = Image::from_compacted(&compacted, &target).unwrap();
        prop_assert_eq!(meaning(&standard), meaning(there.state.image()));

        let back = relayout(&there.state, before.layout(), Allowed::NOTHING).unwrap();
        prop_assert_eq!(back.lost, []);
        prop_assert_eq!(back.state.registers(), before.registers());
        prop_assert_eq!(meaning(back.state.image()), meaning(before.image()));
        if target.user().contains(before.image().xstate_bv()) {
            prop_assert_eq!(back.state, before);
        }
    }

    /// A state without misfits is the same in the target's layout as it is; one that would lose
    /// something has a misfit for it.
    #[test]
    fn what_fits_needs_no_move(
        before in any_state(),
        target in prop::sample::select(&LAYOUTS[..]),
    ) {
        let target = layout(target);
        let misfits: Vec<_> = before.misfits(&target).collect();
        match relayout(&before, &target, Allowed::NOTHING) {
            Ok(there) if misfits.is_empty() => {
                let mut area = before.image().as_bytes().to_vec();
                area.resize(area.len().max(target.standard_size()), 0);
                let as_it_is = state(&area, &target, before.registers());
                prop_assert_eq!(as_it_is, there.state);
            }
            // Places alone, and components that the target lacks in their initial state.
            Ok(_) => prop_assert!(!misfits.iter().any(|misfit| matches!(misfit, Misfit::Loss(_)))),
            Err(RelayoutError::Lossy { losses }) => for loss in losses {
                let expected = match loss {
                    Loss::Missing { component } => Misfit::Missing { component },
                    Loss::Size { component, source_bytes, target_bytes } => {
                        Misfit::Size { component, source_bytes, target_bytes }
                    }
                    loss => Misfit::Loss(loss),
                };
                prop_assert!(misfits.contains(&expected), "{loss}: {misfits:?}");
            },
            Err(error) => panic!("{error}"),
        }
    }

    /// With everything allowed it always succeeds; the list is what was refused without.
    #[test]
    fn what_is_refused_is_what_would_be_lost(
        before in any_state(),
        target in prop::sample::select(&LAYOUTS[..]),
        components: u64,
        mxcsr: bool,
    ) {
        let target = layout(target);
        let all = Allowed { components: XFeatures::all(), mxcsr: true };
        let after = relayout(&before, &target, all).unwrap();
        match relayout(&before, &target, Allowed::NOTHING) {
            Ok(exact) => {
                prop_assert_eq!(&after.lost, &[]);
                prop_assert_eq!(&exact, &after);
            }
            Err(RelayoutError::Lossy { losses }) => prop_assert_eq!(losses, &after.lost[..]),
            Err(error) => panic!("{error}"),
        }
        let some = Allowed { components: bits(components), mxcsr };
        match relayout(&before, &target, some) {
            Ok(allowed) => prop_assert_eq!(allowed, after),
            Err(RelayoutError::Lossy { losses }) => {
                prop_assert!(!losses.is_empty());
                prop_assert!(losses.iter().all(|loss| after.lost.contains(loss)));
            }
            Err(error) => panic!("{error}"),
        }
    }
}

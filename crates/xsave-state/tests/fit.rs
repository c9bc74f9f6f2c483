//! What keeps a state from fitting a layout, and the same state in another one.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{ARMED, Dump, LAYOUTS, LIVE_TILES, amx, area, bits, layout, registers, state};
use proptest::prelude::*;
use xsave_state::{
    Component, ComponentId, ExtendedState, Image, Layout, Losses, Misfit, Registers, RelocateError,
    Relocated, TileConfigError, XFeatures,
};

const NOTHING: Losses = Losses::empty();

fn losses(state: &ExtendedState<'_>, target: &Layout, allowed: Losses) -> Vec<Misfit> {
    match state.relocate(target, allowed).unwrap_err() {
        RelocateError::Lossy { losses } => losses,
        error => panic!("{error}"),
    }
}

fn misfits(state: &ExtendedState<'_>, target: &Layout) -> Vec<Misfit> {
    state.misfits(target).collect()
}

/// Everything that both have moves to where the other has it, and back to where it was.
#[test]
fn from_intel_to_amd_and_back() {
    let (intel, amd) = (layout("ice-lake-server"), layout("amd-zen4-genoa"));
    let source = area(&intel, 0x2e7);
    let before = state(&source, &intel, registers(0x2e7, 0, 0));
    let there = before.relocate(&amd, NOTHING).unwrap();
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
    let back = there.state.relocate(&intel, NOTHING).unwrap();
    assert_eq!(back.state, before);
}

#[test]
fn what_the_target_lacks_is_listed_unless_it_is_initial() {
    let (intel, old) = (amx(), layout("haswell-client"));
    let before = state(LIVE_TILES, &intel, registers(0x602e7, 0, 0x40000));
    let found = losses(&before, &old, NOTHING);
    let missing = |number| Misfit::Missing {
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
            Misfit::Xcr0 {
                xcr0: bits(0x602e7),
                largest: bits(7)
            },
            Misfit::XfdErr {
                xfd_err: bits(0x40000),
                unsupported: bits(0x40000)
            },
        ]
    );
    let text = before.relocate(&old, NOTHING).unwrap_err().to_string();
    assert!(text.starts_with("the target cannot hold the state: the target lacks opmask; "));
    assert!(text.ends_with(
        "IA32_XFD_ERR is XTILEDATA (0x40000); the target cannot disable XTILEDATA (0x40000)"
    ));

    // What is allowed is not listed.
    assert_eq!(losses(&before, &old, Losses::CONTENT), found[5..]);
    assert_eq!(
        losses(&before, &old, Losses::CONTENT | Losses::XCR0),
        found[6..]
    );
    let allowed = Losses::CONTENT | Losses::XCR0 | Losses::XFD;
    let Relocated {
        state: after, lost, ..
    } = before.relocate(&old, allowed).unwrap();
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
    let there = before.relocate(&old, NOTHING).unwrap();
    assert_eq!(there.state.image().xstate_bv(), bits(2));
}

/// The layout of a host whose kernel has less than its processor is the smaller one: no XFD bit, no
/// component and no XCR0 bit beyond it comes along.
#[test]
fn nothing_comes_along_that_the_kernel_lacks() {
    let kernel = Layout::from_parts([Component::user(ComponentId::AVX, 576, 256)], []).unwrap();
    assert_eq!(kernel.user(), bits(7));
    let before = state(ARMED, &amx(), registers(0x602e7, 0x40000, 0x40000));
    let xfd = Misfit::Xfd {
        xfd: bits(0x40000),
        unsupported: bits(0x40000),
    };
    let xfd_err = Misfit::XfdErr {
        xfd_err: bits(0x40000),
        unsupported: bits(0x40000),
    };
    let found = losses(&before, &kernel, Losses::CONTENT | Losses::XCR0);
    assert_eq!(found, [xfd, xfd_err]);
    let after = before.relocate(&kernel, Losses::all()).unwrap();
    assert_eq!(after.state.registers(), registers(7, 0, 0));
    assert_eq!(after.state.image().xstate_bv() - kernel.user(), bits(0));
    assert!(after.lost.ends_with(&[xfd, xfd_err]));

    // XFD alone, in a state that is otherwise the same on both.
    let before = state(&area(&amx(), 7), &amx(), registers(7, 0x40000, 0));
    assert_eq!(misfits(&before, &kernel), [xfd]);
    assert_eq!(losses(&before, &kernel, Losses::all() - Losses::XFD), [xfd]);
    let after = before.relocate(&kernel, Losses::XFD).unwrap();
    assert!(after.state.registers().xfd.is_empty());
}

/// XCR0 loses the whole of a group: XSETBV refuses a part of one.
#[test]
fn xcr0_stays_legal() {
    let source = layout("ice-lake-server");
    let mut dump = Dump::read("ice-lake-server");
    dump.leaf_mut(0xd, 0)[0] &= !0x80; // no Hi16_ZMM
    let target = dump.layout().unwrap();
    let before = state(&area(&source, 3), &source, registers(0x2e7, 0, 0));
    let misfit = Misfit::Xcr0 {
        xcr0: bits(0x2e7),
        largest: bits(0x207),
    };
    assert_eq!(losses(&before, &target, NOTHING), [misfit]);
    assert_eq!(misfit.loss(), Losses::XCR0);
}

#[test]
fn mpx_is_intels_alone() {
    let (client, amd) = (layout("skylake-client"), layout("amd-zen4-genoa"));
    assert!(client.user().contains(XFeatures::MPX));
    let used = state(&area(&client, 0x1f), &client, registers(0x1f, 0, 0));
    assert_eq!(losses(&used, &amd, NOTHING).len(), 3);
    let unused = state(&area(&client, 7), &client, registers(7, 0, 0));
    assert!(unused.relocate(&amd, NOTHING).is_ok());
}

#[test]
fn mxcsr_bits_that_the_target_lacks() {
    let (amd, intel) = (layout("amd-zen4-genoa"), layout("haswell-client"));
    assert_eq!(amd.mxcsr_mask(), 0x2ffff);
    let mut area = area(&amd, 7);
    area[26] = 2;
    let before = state(&area, &amd, registers(7, 0, 0));
    let loss = Misfit::Mxcsr {
        mxcsr: 0x21fa0,
        mask: 0xffff,
    };
    assert_eq!(
        losses(&before, &intel, Losses::all() - Losses::MXCSR),
        [loss]
    );
    let there = before.relocate(&intel, Losses::MXCSR).unwrap();
    assert_eq!(there.lost, [loss]);
    assert_eq!(there.state.image().mxcsr(), 0x1fa0);
}

/// AVX is in use for MXCSR alone, and the target lacks it: SSE holds MXCSR then.
#[test]
fn mxcsr_moves_without_avx() {
    let source = amx();
    let mut area = area(&source, 4);
    area[576..832].fill(0);
    let before = state(&area, &source, registers(3, 0, 0));
    let there = before.relocate(&Layout::legacy(), NOTHING).unwrap();
    assert_eq!(there.state.image().xstate_bv(), XFeatures::SSE);
    assert_eq!(there.state.image().mxcsr(), 0x1fa0);
}

/// The lab's guest, with twice the tile data and a second palette.
fn larger(first_palette: [u32; 4]) -> Layout {
    let mut dump = Dump::read("sapphire-rapids-emulated-guest");
    dump.leaf_mut(0xd, 0)[2] = 0x4b00;
    dump.leaf_mut(0xd, 18)[0] = 0x4000;
    dump.leaf_mut(0x1d, 0)[0] = 2;
    *dump.leaf_mut(0x1d, 1) = first_palette;
    *dump.leaf_mut(0x1d, 2) = [0x0800_4000, 0x0008_0080, 0x10, 0];
    dump.layout().unwrap()
}

const PALETTE_1: [u32; 4] = [0x0400_2000, 0x0008_0040, 0x10, 0];
/// Half as many rows of twice the length: the same bytes are other rows.
const LONG_ROWS: [u32; 4] = [0x0400_2000, 0x0008_0080, 0x8, 0];

#[test]
fn tiles_move_to_a_larger_component_and_back_if_they_fit() {
    let (small, large) = (amx(), larger(PALETTE_1));
    let registers = registers(0x602e7, 0, 0);
    let before = state(LIVE_TILES, &small, registers);
    let there = before.relocate(&large, NOTHING).unwrap().state;
    let tiles = there.image().component(ComponentId::XTILEDATA).unwrap();
    assert_eq!(tiles[..8192], LIVE_TILES[2816..]);
    assert_eq!(tiles[8192..], [0; 8192]);
    let back = there.relocate(&small, NOTHING).unwrap();
    assert_eq!(back.state, before);

    let mut bytes = there.image().as_bytes().to_vec();
    *bytes.last_mut().unwrap() = 1;
    let full = state(&bytes, &large, registers);
    let size = Misfit::Size {
        component: ComponentId::XTILEDATA,
        source_bytes: 16384,
        target_bytes: 8192,
    };
    assert_eq!(losses(&full, &small, NOTHING), [size]);
    let there = full.relocate(&small, Losses::CONTENT).unwrap();
    assert_eq!(there.lost, [size]);
    assert_eq!(there.state.image().component(ComponentId::XTILEDATA), None);
}

#[test]
fn tiles_of_a_palette_that_the_target_lacks_or_means_otherwise() {
    let (small, large) = (amx(), larger(PALETTE_1));
    let mut bytes = area(&large, 0x60000);
    bytes[2752] = 2;
    bytes[2816 + 8192..].fill(0); // otherwise it is the size that is in the way
    let second = state(&bytes, &large, registers(0x602e7, 0, 0));
    let rule = TileConfigError::Palette {
        palette: 2,
        max_palette: 1,
    };
    let palette = |component, palette| Misfit::Palette { component, palette };
    assert_eq!(
        losses(&second, &small, NOTHING),
        [
            Misfit::TileConfig { rule },
            palette(ComponentId::XTILEDATA, 2)
        ]
    );
    // Each kind of loss by itself.
    assert_eq!(
        losses(&second, &small, Losses::TILE_CONFIG),
        [palette(ComponentId::XTILEDATA, 2)]
    );
    let other = larger(LONG_ROWS);
    let mut area = LIVE_TILES.to_vec();
    area[2752 + 48..][..8].fill(8); // a shape that both palettes allow
    let first = state(&area, &small, registers(0x602e7, 0, 0));
    let both = [
        palette(ComponentId::XTILECFG, 1),
        palette(ComponentId::XTILEDATA, 1),
    ];
    assert_eq!(losses(&first, &other, NOTHING), both);
    // TILECFG initial: the tiles could still be looked at through any palette.
    area[512..520].copy_from_slice(&0x40000u64.to_le_bytes());
    let unconfigured = state(&area, &small, registers(0x602e7, 0, 0));
    assert_eq!(losses(&unconfigured, &other, NOTHING), both[1..]);
    assert!(unconfigured.relocate(&large, NOTHING).is_ok());
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
    let mut dump = Dump::read("sapphire-rapids-emulated-guest");
    *dump.leaf_mut(0x1d, 1) = LONG_ROWS;
    assert_eq!(
        of(&tiles, &dump.layout().unwrap()),
        [
            "XTILECFG uses palette 1, which is missing on the target or has another geometry there",
            "XTILEDATA uses palette 1, which is missing on the target or has another geometry there"
        ]
    );

    let without_amx = layout("sapphire-rapids-guest-without-amx");
    let armed = state(ARMED, &small, registers(7, 0x40000, 0x40000));
    assert_eq!(
        of(&armed, &without_amx),
        [
            "IA32_XFD is XTILEDATA (0x40000); the target cannot disable XTILEDATA (0x40000)",
            "IA32_XFD_ERR is XTILEDATA (0x40000); the target cannot disable XTILEDATA (0x40000)"
        ]
    );

    let enabled = state(&area(&small, 7), &small, registers(0x602e7, 0, 0));
    assert_eq!(
        of(&enabled, &layout("ice-lake-server")),
        [format!(
            "XCR0 is {}; the target supports only {} of it",
            bits(0x602e7),
            bits(0x2e7)
        )]
    );

    let amd = layout("amd-zen4-genoa");
    let mut bytes = area(&amd, 7);
    bytes[24..28].copy_from_slice(&0x2_1f80u32.to_le_bytes());
    let misaligned = state(&bytes, &amd, registers(7, 0, 0));
    assert_eq!(
        of(&misaligned, &small),
        ["MXCSR is 0x21f80; the target supports the bits 0xffff"]
    );
    // Nothing loads it.
    bytes[512] = 1;
    let unused = state(&bytes, &amd, registers(7, 0, 0));
    assert_eq!(of(&unused, &small), [""; 0]);

    // Components: where they are, whether they are there, how large they are.
    let of_components = |source: &Layout, in_use, target: &Layout| {
        of(
            &state(&area(source, in_use), source, Registers::RESET),
            target,
        )
    };
    assert_eq!(of_components(&small, 7, &amd), [""; 0]);
    assert_eq!(
        of_components(&small, 0x60201, &amd),
        [
            "PKRU is at offset 2688 in the state and at 2432 on the target",
            "the target lacks XTILECFG",
            "the target lacks XTILEDATA",
        ]
    );
    assert_eq!(
        of_components(&small, 0x40000, &larger(PALETTE_1)),
        ["XTILEDATA has 8192 bytes in the state and 16384 on the target"]
    );
    // Where it is a supervisor component, an area has no place for it either.
    let [user, supervisor] = [
        Component::user(ComponentId::CET_U, 576, 16),
        Component::supervisor(ComponentId::CET_U, 16),
    ]
    .map(|component| Layout::from_parts([component], []).unwrap());
    assert_eq!(
        of_components(&user, 1 << 11, &supervisor),
        ["the target lacks CET_U"]
    );
}

/// Zen 2 lists PKRU with 64 bytes.
#[test]
fn pkru_of_another_size() {
    let zen2 = Layout::from_parts(
        [
            Component::user(ComponentId::AVX, 576, 256),
            Component::user(ComponentId::PKRU, 832, 64),
        ],
        [],
    )
    .unwrap();
    let intel = layout("ice-lake-server");
    let before = state(&area(&intel, 0x207), &intel, registers(0x207, 0, 0));
    let there = before.relocate(&zen2, NOTHING).unwrap().state;
    let back = there.relocate(&intel, NOTHING).unwrap();
    assert_eq!(back.state, before);
}

/// A component of which nothing is known but its size.
#[test]
fn an_unknown_component_moves_only_at_its_size() {
    let with_apx =
        |size| Layout::from_parts([Component::user(ComponentId::APX, 960, size)], []).unwrap();
    let (small, large) = (with_apx(128), with_apx(256));
    let mut bytes = area(&small, 0x80000);
    let before = state(&bytes, &small, registers(3, 0, 0));
    assert_eq!(
        losses(&before, &large, NOTHING),
        [Misfit::Size {
            component: ComponentId::APX,
            source_bytes: 128,
            target_bytes: 256
        }]
    );
    bytes[960..].fill(0);
    let initial = state(&bytes, &small, registers(3, 0, 0));
    assert!(initial.relocate(&large, NOTHING).is_ok());
}

/// Tiles of a CPUID that hides its palettes have no geometry, but they are content: they move to a
/// layout of the same kind, and are lost where there is no place for them.
#[test]
fn tiles_without_a_palette_are_content() {
    let hidden = layout("emerald-rapids-vm-without-tile-leaves");
    let before = state(&area(&hidden, 0x40000), &hidden, registers(0x600e7, 0, 0));
    assert_eq!(misfits(&before, &hidden), []);
    let there = before.relocate(&hidden, NOTHING).unwrap();
    assert_eq!(there.state, before);
    let component = ComponentId::XTILEDATA;
    let without = layout("haswell-client");
    let found = losses(&before, &without, Losses::XCR0);
    assert_eq!(found, [Misfit::Missing { component }]);
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
        let Ok(there) = before.relocate(&target, NOTHING) else {
            // Only what the target lacks can be in the way.
            let Registers { xcr0, xfd, xfd_err, .. } = before.registers();
            let used: XFeatures = meaning(before.image()).1.iter().map(|(id, _)| id.bit()).collect();
            prop_assert!(
                !target.user().contains(xcr0 | used)
                    || !target.xfd().contains(xfd | xfd_err)
                    || before.image().mxcsr() & !target.mxcsr_mask() != 0
            );
            return Ok(());
        };
        prop_assert_eq!(there.lost, []);
        prop_assert_eq!(there.state.misfits(&target).count(), 0);
        prop_assert_eq!(meaning(there.state.image()), meaning(before.image()));
        let compacted = there.state.image().to_compacted();
        let standard = Image::from_compacted(&compacted, &target).unwrap();
        prop_assert_eq!(meaning(&standard), meaning(there.state.image()));

        let back = there.state.relocate(before.layout(), NOTHING).unwrap();
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
        let misfits = misfits(&before, &target);
        match before.relocate(&target, NOTHING) {
            Ok(there) if misfits.is_empty() => {
                let mut area = before.image().as_bytes().to_vec();
                area.resize(area.len().max(target.standard_size()), 0);
                let as_it_is = state(&area, &target, before.registers());
                prop_assert_eq!(as_it_is, there.state);
            }
            // Places alone, and components that the target lacks in their initial state.
            Ok(_) => for misfit in misfits {
                prop_assert!(matches!(misfit, Misfit::Offset { .. } | Misfit::Missing { .. }), "{}", misfit);
            },
            Err(RelocateError::Lossy { losses }) => for loss in losses {
                prop_assert!(misfits.contains(&loss), "{}: {:?}", loss, misfits);
            },
            Err(error) => panic!("{error}"),
        }
    }

    /// With everything allowed it always succeeds; the list is what was refused without, and each
    /// loss needs its own permission.
    #[test]
    fn what_is_refused_is_what_would_be_lost(
        before in any_state(),
        target in prop::sample::select(&LAYOUTS[..]),
        allowed in any::<u32>().prop_map(Losses::from_bits_truncate),
    ) {
        let target = layout(target);
        let after = before.relocate(&target, Losses::all()).unwrap();
        prop_assert_eq!(after.state.misfits(&target).count(), 0);
        for allowed in [NOTHING, allowed] {
            let refused: Vec<Misfit> = after
                .lost
                .iter()
                .filter(|misfit| !allowed.contains(misfit.loss()))
                .copied()
                .collect();
            match before.relocate(&target, allowed) {
                Ok(same) => {
                    prop_assert_eq!(refused, []);
                    prop_assert_eq!(&same, &after);
                }
                Err(RelocateError::Lossy { losses }) => prop_assert_eq!(losses, refused),
                Err(error) => panic!("{error}"),
            }
        }
    }
}

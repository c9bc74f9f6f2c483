//! What an image and its registers cannot be together.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{ARMED, Dump, LAYOUTS, LIVE_TILES, amx, area, bits, layout, registers};
use proptest::prelude::*;
use xsave_state::xcr0::{RULES, Xcr0Error};
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Registers, StateError, XFeatures};

fn verdict(layout: &Layout, in_use: u64, registers: Registers) -> Result<(), StateError> {
    let area = area(layout, in_use);
    let image = Image::parse(&area, layout).unwrap();
    ExtendedState::new(image, registers).map(drop)
}

#[test]
fn the_two_states_captured_in_the_lab() {
    let layout = amx();
    for (area, xfd) in [(ARMED, 0x40000), (LIVE_TILES, 0)] {
        let image = Image::parse(area, &layout).unwrap();
        let state = ExtendedState::new(image.clone(), registers(0x602e7, xfd, 0)).unwrap();
        assert_eq!(state.image(), &image);
        assert_eq!(state.layout(), &layout);
        assert_eq!(state.registers().xfd.bits(), xfd);
        assert_eq!(state.clone().into_owned(), state);
        assert_eq!(state.into_image(), image);
    }
}

/// The live tiles with the other state's XFD are what a crafted snapshot carries.
#[test]
fn a_component_in_use_cannot_be_disabled() {
    let both = XFeatures::XTILEDATA;
    assert_eq!(
        verdict(&amx(), 0x602a2, registers(0x602e7, 0x40000, 0)),
        Err(StateError::InUseWhileDisabled {
            xstate_bv: bits(0x602a2),
            xfd: both,
            both
        })
    );
    // TILECFG alone may be in use: only component 18 is disabled.
    assert_eq!(
        verdict(&amx(), 0x202a2, registers(0x602e7, 0x40000, 0)),
        Ok(())
    );
}

#[test]
fn xcr0_must_be_one_that_xsetbv_takes() {
    assert_eq!(
        verdict(&amx(), 3, registers(0x20007, 0, 0)),
        Err(StateError::Xcr0(Xcr0Error::Rule {
            xcr0: bits(0x20007),
            rule: *RULES.last().unwrap()
        }))
    );
    assert_eq!(RULES.last().unwrap().together, XFeatures::AMX);
    let without_amx = layout("sapphire-rapids-guest-without-amx");
    assert!(matches!(
        verdict(&without_amx, 3, registers(0x60007, 0, 0)),
        Err(StateError::Xcr0(Xcr0Error::Unsupported {
            unsupported: XFeatures::AMX,
            ..
        }))
    ));
}

#[test]
fn a_component_may_be_in_use_without_being_enabled() {
    assert_eq!(verdict(&amx(), 0x602e7, registers(7, 0, 0)), Ok(()));
}

#[test]
fn only_what_has_xfd_can_be_disabled() {
    let supported = XFeatures::XTILEDATA;
    for bit in (0..64).filter(|&bit| bit != 18) {
        let value = bits(1 << bit);
        assert_eq!(
            verdict(&amx(), 0, registers(7, 1 << bit, 0)),
            Err(StateError::Xfd {
                xfd: value,
                supported
            })
        );
        assert_eq!(
            verdict(&amx(), 0, registers(7, 0, 1 << bit)),
            Err(StateError::XfdErr {
                xfd_err: value,
                supported
            })
        );
    }
    assert_eq!(
        verdict(&layout("ice-lake-server"), 0, registers(7, 1 << 18, 0)),
        Err(StateError::Xfd {
            xfd: XFeatures::XTILEDATA,
            supported: XFeatures::empty()
        })
    );
}

#[test]
fn the_reset_state_is_valid() {
    for name in LAYOUTS {
        let layout = layout(name);
        let state = ExtendedState::reset(&layout);
        assert_eq!(state.registers(), Registers::RESET);
        let again = ExtendedState::new(state.image().clone(), state.registers()).unwrap();
        assert_eq!(again, state);
    }
}

/// KVM lets a guest write IA32_XFD by XTILEDATA in XCR0 alone: it ignores what the guest's CPUID says
/// of it. A guest that was told otherwise can have the value, and must be captured with it.
#[test]
fn xtiledata_can_be_disabled_whatever_cpuid_says() {
    let hide_ecx_2 = |dump: &mut Dump| dump.leaf_mut(0xd, 18)[2] &= !4;
    let hide_xfd = |dump: &mut Dump| dump.leaf_mut(0xd, 1)[0] &= !0x10;
    let hide_both = |dump: &mut Dump| {
        hide_ecx_2(dump);
        hide_xfd(dump);
    };
    for hide in [&hide_ecx_2 as &dyn Fn(&mut Dump), &hide_xfd, &hide_both] {
        let mut dump = Dump::read("sapphire-rapids-emulated-guest");
        hide(&mut dump);
        let layout = dump.layout().unwrap();
        let tiles = layout.component(ComponentId::XTILEDATA).unwrap();
        assert!(tiles.has_xfd());
        assert_eq!(layout.xfd(), XFeatures::XTILEDATA);
        assert_eq!(layout, amx());
        let armed = registers(0x602e7, 0x40000, 0x40000);
        assert_eq!(verdict(&layout, 0x202a2, armed), Ok(()));
        assert!(matches!(
            verdict(&layout, 0x602a2, armed),
            Err(StateError::InUseWhileDisabled {
                both: XFeatures::XTILEDATA,
                ..
            })
        ));
        // Nothing else can be.
        assert_eq!(
            verdict(&layout, 0, registers(7, 0x20000, 0)),
            Err(StateError::Xfd {
                xfd: XFeatures::XTILECFG,
                supported: XFeatures::XTILEDATA
            })
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// The invariants once more, without the crate's code for them.
    #[test]
    fn what_is_accepted_is_what_a_second_checker_accepts(
        in_use: u64,
        xcr0 in prop_oneof![
            prop::sample::select(vec![1u64, 3, 7, 0xe7, 0x2e7, 0x602e7, 0x60003, 0x207]),
            0u64..0x80000,
        ],
        xfd in prop::sample::select(vec![0u64, 0x40000, 0x20000, 1 << 63]),
        xfd_err in prop::sample::select(vec![0u64, 0x40000, 4]),
    ) {
        let layout = amx();
        let in_use = in_use & 0x602e7;
        let legal = xcr0 & !0x602e7 == 0
            && xcr0 & 1 == 1
            && (xcr0 & 4 == 0 || xcr0 & 2 != 0)
            && (xcr0 & 0xe0 == 0 || xcr0 & 0xe4 == 0xe4)
            && matches!(xcr0 & 0x60000, 0 | 0x60000);
        let expected = legal
            && matches!(xfd, 0 | 0x40000)
            && matches!(xfd_err, 0 | 0x40000)
            && in_use & xfd == 0;
        let verdict = verdict(&layout, in_use, registers(xcr0, xfd, xfd_err));
        prop_assert_eq!(verdict.is_ok(), expected, "{:?}", verdict);
    }
}

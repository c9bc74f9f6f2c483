//! What the gate does, case by case and over random sequences.

use std::collections::hash_map::DefaultHasher;

use proptest::prelude::*;
use xsave_state::xcr0::Xcr0Error;
use xsave_state::{Component, ComponentId, Palette};

use super::*;

const TILES: XFeatures = XFeatures::XTILEDATA;
const NONE: XFeatures = XFeatures::empty();
const CLEAR: Event = Event::WriteXfd(NONE);
/// A second feature that IA32_XFD can disable, as no processor has it yet.
const OTHER: XFeatures = XFeatures::from_bits_retain(1 << 30);

fn amx() -> XFeatures {
    XFeatures::from_bits_retain(0x60003)
}

const TILE_COMPONENTS: [Component; 2] = [
    Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
    Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
];

pub(crate) fn amx_layout() -> Layout {
    Layout::from_parts(TILE_COMPONENTS, [Palette::ONE]).unwrap()
}

/// The same with [`OTHER`], which is 1,000 bytes.
pub(super) fn two_layout() -> Layout {
    let id = OTHER.components().next().unwrap();
    let other = Component::user(id, 11_008, 1000).aligned().with_xfd();
    let components = TILE_COMPONENTS.into_iter().chain([other]);
    Layout::from_parts(components, [Palette::ONE]).unwrap()
}

/// XFD armed, AMX enabled: as a Linux guest is after boot.
fn armed() -> Gate {
    let mut gate = Gate::new(&amx_layout());
    assert_eq!(gate.on(Event::WriteXfd(TILES)), Action::Complete);
    assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Complete);
    gate
}

fn tiles() -> Growth {
    Growth::new(&amx_layout(), TILES, NONE)
}

#[test]
fn the_sizes_are_those_of_cpuid() {
    assert_eq!((tiles().bytes(), tiles().area_bytes()), (8192, 11008));
    let layout = two_layout();
    let both = Growth::new(&layout, TILES | OTHER, NONE);
    assert_eq!((both.bytes(), both.area_bytes()), (9192, 12008));
    // An area has what was granted before as well, and everything up to it.
    let other = Growth::new(&layout, OTHER, NONE);
    assert_eq!((other.bytes(), other.area_bytes()), (1000, 12008));
    let tiles = Growth::new(&layout, TILES, OTHER);
    assert_eq!((tiles.bytes(), tiles.area_bytes()), (8192, 12008));
    assert_eq!(Gate::new(&layout).everything(), Some(both));
    let without = layout.component(ComponentId::XTILECFG).unwrap();
    assert!(!without.has_xfd());
}

#[test]
fn a_guest_that_never_arms_xfd_uses_amx_when_it_enables_it() {
    let mut gate = Gate::new(&amx_layout());
    assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Grow(tiles()));
    assert_eq!(gate.waiting_for(), Some(tiles()));
    assert_eq!(gate.xcr0(), XFeatures::X87);
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!(gate.xcr0(), amx());
    assert_eq!(gate.granted(), TILES);
}

#[test]
fn a_denied_write_has_no_effect_and_can_be_tried_again() {
    let mut gate = armed();
    let before = gate.clone();
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    let denied = Fault::Denied { features: TILES };
    assert_eq!(gate.on(Event::Deny), Action::InjectGp(denied));
    assert_eq!(gate, before);
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!(gate.xfd(), NONE);
}

#[test]
fn a_failed_growth_holds_the_write_until_it_is_retried() {
    let mut gate = armed();
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    for _ in 0..3 {
        assert_eq!(gate.on(Event::Fail), Action::Hold);
        assert_eq!(gate.xfd(), TILES);
        assert_eq!(gate.on(Event::Retry), Action::Grow(tiles()));
    }
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!(gate.xfd(), NONE);
}

#[test]
fn reserved_bits_fault_and_change_nothing() {
    let mut gate = armed();
    let before = gate.clone();
    for bit in (0..64).filter(|&bit| bit != 18) {
        let xfd = XFeatures::from_bits_retain(1 << bit);
        let fault = Fault::ReservedXfd {
            xfd,
            supported: TILES,
        };
        assert_eq!(gate.on(Event::WriteXfd(xfd)), Action::InjectGp(fault));
    }
    assert!(matches!(
        gate.on(Event::WriteXcr0(XFeatures::from_bits_retain(0x20003))),
        Action::InjectGp(Fault::Xcr0(Xcr0Error::Rule { .. }))
    ));
    assert_eq!(gate, before);
}

#[test]
fn an_observed_xcr0_counts_at_the_next_write() {
    let mut gate = Gate::new(&amx_layout());
    assert_eq!(gate.on(Event::ObserveXcr0(amx())), Action::Complete);
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    // A guest that enables AMX and arms XFD afterwards has not used it yet.
    let mut gate = Gate::new(&amx_layout());
    assert_eq!(gate.on(Event::ObserveXcr0(amx())), Action::Complete);
    assert_eq!(gate.on(Event::WriteXfd(TILES)), Action::Complete);
}

#[test]
fn what_a_capture_shows_is_asked_for_and_cannot_be_denied() {
    let mut gate = Gate::new(&amx_layout());
    let found = Event::Observe {
        xcr0: amx(),
        xfd: NONE,
        in_use: NONE,
    };
    assert_eq!(gate.on(found), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Deny), Action::Hold);
    assert_eq!(gate.on(Event::Retry), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!(gate.on(found), Action::PassThrough);
}

/// KVM performs XSETBV by itself: nobody sees that a guest enables AMX, uses a tile and disables it.
#[test]
fn what_a_guest_has_used_and_disabled_again_is_asked_for_at_a_capture() {
    let mut gate = Gate::new(&amx_layout());
    let left_behind = Event::Observe {
        xcr0: XFeatures::LEGACY,
        xfd: NONE,
        in_use: TILES,
    };
    assert_eq!(gate.on(left_behind), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Deny), Action::Hold);
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
}

#[test]
fn a_restored_vcpu_that_had_passed_is_asked_for_before_it_runs() {
    let restored = |xfd, in_use| {
        Gate::new(&amx_layout()).on(Event::Restore {
            xcr0: amx(),
            xfd,
            in_use,
            granted: NONE,
        })
    };
    assert_eq!(restored(NONE, NONE), Action::Grow(tiles()));
    assert_eq!(restored(NONE, TILES), Action::Grow(tiles()));
    assert_eq!(restored(TILES, NONE), Action::Complete);
    // A guest may have disabled AMX in XCR0 and left tiles behind.
    let mut gate = Gate::new(&amx_layout());
    let left_behind = Event::Restore {
        xcr0: XFeatures::LEGACY,
        xfd: NONE,
        in_use: TILES,
        granted: NONE,
    };
    assert_eq!(gate.on(left_behind), Action::Grow(tiles()));
}

/// Between two tasks with tiles nothing of them is in the registers. Whether the VM had its first use
/// decides, and not what the vCPU has in use.
#[test]
fn a_restored_vcpu_of_a_vm_that_was_granted_is_asked_for_before_it_runs() {
    let between_tasks = Event::Restore {
        xcr0: amx(),
        xfd: TILES,
        in_use: NONE,
        granted: TILES,
    };
    let look = Event::Observe {
        xcr0: amx(),
        xfd: TILES,
        in_use: NONE,
    };
    let mut gate = Gate::new(&amx_layout());
    assert_eq!(gate.on(between_tasks), Action::Grow(tiles()));
    // Nothing has run: the VMM gives it up, or grants. Neither a denial nor a look makes it run.
    assert_eq!(gate.on(Event::Deny), Action::Hold);
    assert_eq!(gate.on(Event::Fail), Action::Hold);
    for event in [look, Event::Init] {
        assert_eq!(gate.on(event), Action::Grow(tiles()), "{event:?}");
    }
    // A reset clears the vCPU, and not what a task of the guest has in memory.
    let mut reset = gate.clone();
    assert_eq!(reset.on(Event::Reset), Action::Complete);
    assert_eq!(reset.on(Event::WriteXcr0(amx())), Action::Grow(tiles()));
    assert_eq!(reset.on(Event::Deny), Action::Hold);
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
}

/// A task with tiles in memory may be scheduled on the vCPU that asks.
#[test]
fn after_a_first_use_in_the_vm_no_vcpu_can_be_denied() {
    let mut gate = armed();
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::GrantedElsewhere(TILES)), Action::Hold);
    assert_eq!(gate.promised(), TILES);
    for _ in 0..3 {
        assert_eq!(gate.on(Event::Deny), Action::Hold);
        assert_eq!(gate.on(Event::Retry), Action::Grow(tiles()));
    }
    // It can still fail, wait, and be taken back for a snapshot.
    assert_eq!(gate.on(Event::Fail), Action::Hold);
    assert_eq!(gate.on(Event::Withdraw), Action::Complete);
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    // What is promised is what the guest has.
    let mut gate = Gate::new(&Layout::legacy());
    let all = XFeatures::all();
    assert_eq!(gate.on(Event::GrantedElsewhere(all)), Action::PassThrough);
    assert_eq!(gate.promised(), NONE);
}

#[test]
fn reset_clears_the_registers_and_the_question_and_keeps_what_was_granted() {
    let mut gate = armed();
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Reset), Action::Complete);
    assert_eq!(gate, Gate::new(&amx_layout()));
    // An answer to the question before the reset comes late: the state is there, nothing else.
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!((gate.xcr0(), gate.xfd()), (XFeatures::X87, NONE));
    assert_eq!(gate.on(Event::Reset), Action::PassThrough);
    assert_eq!(gate.granted(), TILES);
}

#[test]
fn what_a_restored_vcpu_has_in_use_stays_asked_for_after_init_and_observation() {
    let mut gate = Gate::new(&amx_layout());
    let (xcr0, xfd) = (XFeatures::X87, XFeatures::empty());
    let in_use = TILES;
    let restored = gate.on(Event::Restore {
        xcr0,
        xfd,
        in_use,
        granted: NONE,
    });
    assert!(matches!(restored, Action::Grow(_)));
    assert_eq!(gate.on(Event::Fail), Action::Hold);
    for event in [Event::Init, Event::Observe { xcr0, xfd, in_use }] {
        assert_eq!(gate.on(event), restored, "{event:?}");
    }
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
}

#[test]
fn init_keeps_both_registers_and_takes_the_write_back() {
    let mut gate = armed();
    let before = gate.clone();
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Init), Action::Complete);
    assert_eq!(gate, before);
    // What the guest can already use it can use after INIT.
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!(gate.on(Event::Init), Action::PassThrough);
    assert_eq!((gate.xcr0(), gate.xfd()), (amx(), NONE));
}

#[test]
fn a_withdrawn_write_is_asked_for_again_when_the_guest_repeats_it() {
    let mut gate = armed();
    let before = gate.clone();
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
    assert_eq!(gate.on(Event::Withdraw), Action::Complete);
    assert_eq!(gate, before);
    assert_eq!(gate.on(CLEAR), Action::Grow(tiles()));
}

#[test]
fn features_are_granted_one_by_one() {
    let layout = two_layout();
    let mut gate = Gate::new(&layout);
    let all = Event::WriteXcr0(layout.user());
    let asked = Growth::new(&layout, TILES | OTHER, NONE);
    assert_eq!(gate.on(all), Action::Grow(asked));
    let rest = Growth::new(&layout, OTHER, TILES);
    assert_eq!(gate.on(Event::Grant(TILES)), Action::Grow(rest));
    assert_eq!(gate.waiting_for(), Some(rest));
    let denied = Fault::Denied { features: OTHER };
    assert_eq!(gate.on(Event::Deny), Action::InjectGp(denied));
    // Tiles alone need no more questions, and yet there is something left to intercept.
    assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Complete);
    assert!(!gate.has_passed());
    assert_eq!(gate.on(Event::WriteXfd(TILES)), Action::Complete);
    let rest = Growth::new(&layout, OTHER, TILES);
    assert_eq!(gate.on(all), Action::Grow(rest));
    assert_eq!(gate.on(Event::Grant(OTHER)), Action::PassThrough);
}

#[test]
fn a_grant_ahead_of_the_question_passes() {
    let mut gate = armed();
    assert_eq!(gate.on(Event::Grant(XFeatures::all())), Action::PassThrough);
    assert_eq!(gate.granted(), TILES);
    assert_eq!(gate.on(CLEAR), Action::PassThrough);
}

#[test]
fn without_features_to_disable_nothing_is_asked() {
    let mut gate = Gate::new(&Layout::legacy());
    assert!(gate.has_passed());
    assert_eq!(gate.everything(), None);
    assert_eq!(gate.on(CLEAR), Action::PassThrough);
    assert!(matches!(
        gate.on(Event::WriteXfd(TILES)),
        Action::InjectGp(Fault::ReservedXfd { .. })
    ));
}

fn event() -> impl Strategy<Value = Event> {
    let features =
        |values: &'static [u64]| prop::sample::select(values).prop_map(XFeatures::from_bits_retain);
    let xfd = || features(&[0, 1 << 18, 1 << 30, 1 << 18 | 1 << 30, 1 << 17, 1]);
    let xcr0 = || features(&[1, 3, 0x60003, 0x4000_0003, 0x4006_0003, 0x20003, 0]);
    prop_oneof![
        4 => xfd().prop_map(Event::WriteXfd),
        4 => xcr0().prop_map(Event::WriteXcr0),
        2 => xfd().prop_map(Event::Grant),
        1 => xfd().prop_map(Event::GrantedElsewhere),
        1 => Just(Event::Deny),
        1 => Just(Event::Fail),
        1 => Just(Event::Retry),
        1 => Just(Event::Withdraw),
        1 => Just(Event::Reset),
        1 => Just(Event::Init),
    ]
}

fn hash(gate: &Gate) -> u64 {
    let mut hasher = DefaultHasher::new();
    gate.hash(&mut hasher);
    hasher.finish()
}

proptest! {
    /// The rule of the design: nothing is usable before it has been granted. For those who see every
    /// write; observations and restores show what the gate has not seen.
    #[test]
    fn no_feature_is_usable_before_its_grant(events in prop::collection::vec(event(), 0..60)) {
        let layout = two_layout();
        let mut gate = Gate::new(&layout);
        for event in events {
            let before = gate.clone();
            let action = gate.on(event);
            let usable = (gate.xcr0() - gate.xfd()) & layout.xfd();
            prop_assert!(gate.granted().contains(usable));
            // What is granted stays, and only a grant grants.
            prop_assert!(gate.granted().contains(before.granted()));
            if let Event::Grant(features) = event {
                prop_assert_eq!(gate.granted(), before.granted() | (features & layout.xfd()));
            } else {
                prop_assert_eq!(gate.granted(), before.granted());
            }
            prop_assert!(gate.promised().contains(gate.granted() | before.promised()));
            if let Action::InjectGp(Fault::Denied { features }) = action {
                prop_assert!(!features.intersects(before.promised()));
            }
            // A question is for exactly what is missing, and stands until it is answered.
            match action {
                Action::Grow(growth) => {
                    prop_assert_eq!(gate.waiting_for(), Some(growth));
                    prop_assert!((growth.features() & gate.granted()).is_empty());
                }
                Action::Hold => prop_assert_eq!(gate.waiting_for(), before.waiting_for()),
                Action::Complete | Action::PassThrough | Action::InjectGp(_) => {
                    prop_assert_eq!(gate.waiting_for(), None);
                }
            }
            prop_assert_eq!(action == Action::PassThrough, gate.has_passed()
                && !matches!(action, Action::InjectGp(_)));
            prop_assert_eq!(hash(&gate), hash(&gate.clone()));
        }
    }
}

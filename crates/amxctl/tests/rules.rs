//! The rules find what breaks a state, and agree with the crate that refuses it.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::sync::LazyLock;

use amxctl::registers::Listed;
use amxctl::rules::{Rule, Verdict, check};
use amxctl::vcpu::{Owner, Places, Vcpu};
use amxctl::{Given, Subject};
use common::{cloud_hypervisor, cloud_hypervisor_with_xstate_bv, fixture, subject};
use proptest::prelude::*;
use xsave_state::{Layout, XFeatures};

fn broken(subject: &Subject) -> Vec<Rule> {
    let findings = check(subject).into_iter();
    findings
        .filter(|finding| finding.verdict == Verdict::Broken)
        .map(|finding| finding.rule)
        .collect()
}

#[test]
fn the_fixtures_break_no_rule() {
    for name in [
        "cloud-hypervisor/state.json",
        "firecracker.txt",
        "armed.xsave2",
        "live-tiles.xsave2",
    ] {
        assert_eq!(broken(&subject(&fixture(name))), [], "{name}");
    }
}

#[test]
fn tiles_in_use_while_xfd_disables_them_are_found() {
    let subject = subject(&cloud_hypervisor_with_xstate_bv(0x40000 | 0x2a2));
    assert_eq!(broken(&subject), [Rule::XfdInUse]);
    let finding = check(&subject).pop().unwrap();
    assert!(finding.values.contains("XTILEDATA"), "{}", finding.values);
    assert!(finding.rule.danger().contains("#NM"));
    // A host dies of them whatever is in them; here they are zero, so that nothing is lost without them.
    assert!(finding.is_mendable);
}

#[test]
fn an_area_shorter_than_its_cpuid_needs_is_found() {
    let subject = subject(&cloud_hypervisor(|state| {
        state["Kvm"]["xsave"]
            .as_object_mut()
            .unwrap()
            .remove("extra");
    }));
    assert_eq!(broken(&subject), [Rule::Length]);
    let finding = check(&subject).remove(0);
    assert_eq!(finding.values, "4096 bytes; its layout requires 11008");
}

#[test]
fn tiles_whose_xfd_nobody_knows_are_not_judged() {
    let subject = subject(&fixture("live-tiles.xsave2"));
    let finding = check(&subject).pop().unwrap();
    assert_eq!(
        (finding.rule, finding.verdict),
        (Rule::XfdInUse, Verdict::Unknown { option: "--xfd" })
    );
}

#[test]
fn a_compacted_area_breaks_the_format_only() {
    let standard = subject(&fixture("live-tiles.xsave2"));
    let mut compacted = standard.state().unwrap().image().to_compacted();
    compacted[464..472].copy_from_slice(&0x602e7u64.to_le_bytes());
    assert_eq!(broken(&subject(&compacted)), [Rule::Format]);
}

/// One byte of the header, the legacy region or TILECFG, or a length, or registers.
#[derive(Clone, Debug)]
enum Change {
    Byte(usize, u8),
    Length(usize),
    Xcr0(u64),
    Xfd(u64),
    XfdErr(u64),
}

fn change() -> impl Strategy<Value = Change> {
    let places = prop_oneof![0usize..32, 400usize..576, 2752usize..2816, 0usize..11_008];
    prop_oneof![
        6 => (places, any::<u8>()).prop_map(|(at, byte)| Change::Byte(at, byte)),
        1 => (0usize..12_000).prop_map(Change::Length),
        1 => prop_oneof![Just(0x602e7u64), Just(0x202e7), any::<u64>()].prop_map(Change::Xcr0),
        1 => prop_oneof![Just(0x40000u64), Just(0), Just(0x20000)].prop_map(Change::Xfd),
        1 => prop_oneof![Just(0x40000u64), Just(0), Just(0x20000)].prop_map(Change::XfdErr),
    ]
}

/// A guest's layout, and an area with tiles in it.
static KNOWN: LazyLock<(Layout, Vec<u8>)> = LazyLock::new(|| {
    let known = subject(&fixture("cloud-hypervisor/state.json"));
    (known.layout.value, fixture("live-tiles.xsave2"))
});

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn no_broken_rule_means_that_the_state_can_be_made(
        changes in proptest::collection::vec(change(), 0..4)
    ) {
        let (layout, area) = &*KNOWN;
        let mut vcpu = Vcpu {
            owner: Owner::Vcpu(0),
            area: area.clone(),
            places: Places::Layout(layout.clone()),
            listed: Listed::default(),
        };
        let mut given = Given {
            xcr0: Some(XFeatures::from_bits_retain(0x602e7)),
            xfd: Some(XFeatures::empty()),
            xfd_err: Some(XFeatures::empty()),
            ..Given::default()
        };
        for change in changes {
            match change {
                Change::Byte(at, byte) => {
                    if let Some(to) = vcpu.area.get_mut(at) {
                        *to = byte;
                    }
                }
                Change::Length(len) => vcpu.area.resize(len, 0),
                Change::Xcr0(bits) => given.xcr0 = Some(XFeatures::from_bits_retain(bits)),
                Change::Xfd(bits) => given.xfd = Some(XFeatures::from_bits_retain(bits)),
                Change::XfdErr(bits) => given.xfd_err = Some(XFeatures::from_bits_retain(bits)),
            }
        }
        let subject = vcpu.subject(&given);
        let broken = broken(&subject);
        if subject.is_compacted() {
            prop_assert!(broken.contains(&Rule::Format), "{:?}", broken);
        } else {
            prop_assert_eq!(
                subject.state().is_ok(),
                broken.is_empty(),
                "{:?} {:?}",
                subject.state().err(),
                broken
            );
        }
    }
}

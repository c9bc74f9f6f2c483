//! Guests that move: to newer hosts, to older ones, and to those that have things elsewhere.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../cpuid-amx/tests/common/mod.rs"]
mod common;

use common::{entries, fixture};
use cpuid_amx::{
    AmxFeatures, CpuidTable, Feature, FeatureSet, Level, PermissionError, Policy, Table, coherence,
};
use host_compat::Host;
use host_compat::compat::{self, Compatibility, Guest, Reason, Remedy, Verdict};
use host_compat::host::{NoKvm, Permission};
use proptest::prelude::*;
use xsave_state::relayout::Loss;
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Misfit, Registers, XFeatures};

const HIDE: Verdict = Verdict::RunsAfter {
    relayout: false,
    hide: true,
};

fn sees(table: &Table) -> FeatureSet {
    FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
}

fn host(table: &Table) -> Host {
    Host::from_cpuid("there", table.clone())
}

/// What KVM gives to guests of this generation: without supervisor components.
fn generation(level: Level) -> Table {
    let mut table = fixture("sapphire-rapids-emulated-guest");
    if level >= Level::GraniteRapids {
        let [eax, ebx, ecx, edx] = table.leaf(7, 1);
        table
            .set_leaf(7, 1, [eax | 1 << 21, ebx, ecx, edx])
            .unwrap();
    }
    Policy::level(level).apply(&mut table).unwrap();
    table
}

fn without_amx() -> Table {
    let mut table = generation(Level::SapphireRapids);
    Policy::hide_amx().apply(&mut table).unwrap();
    table
}

/// A vCPU with this XCR0 and IA32_XFD, and these components in use, their bytes 1.
fn vcpu(table: &Table, xcr0: u64, xfd: XFeatures, in_use: XFeatures) -> ExtendedState<'static> {
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).unwrap();
    let mut area = vec![0; layout.standard_size()];
    area[512..520].copy_from_slice(&in_use.bits().to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for id in (in_use - XFeatures::LEGACY).components() {
        let component = layout.component(id).unwrap();
        let at = component.offset().unwrap();
        area[at..at + component.size()].fill(1);
        if id == ComponentId::XTILECFG {
            area[at..at + 64].fill(0);
            area[at] = 1; // palette 1, no tile in use
        }
    }
    let image = Image::parse(&area, &layout).unwrap().into_owned();
    let registers = Registers {
        xcr0: XFeatures::from_bits_retain(xcr0),
        xfd,
        xfd_err: XFeatures::empty(),
    };
    ExtendedState::new(image, registers).unwrap()
}

fn moved(table: &Table, states: &[ExtendedState<'_>], to: &Host) -> Compatibility {
    let sees = sees(table);
    let compatibility = compat::check(Guest::new(&sees).running(states), to);
    for reason in &compatibility.reasons {
        println!("{reason}");
    }
    compatibility
}

const NOTHING: XFeatures = XFeatures::empty();

#[test]
fn a_guest_runs_where_it_comes_from() {
    let table = generation(Level::GraniteRapids);
    let busy = vcpu(&table, 0x602e7, NOTHING, XFeatures::AMX | XFeatures::AVX);
    let armed = vcpu(&table, 0x602e7, XFeatures::XTILEDATA, XFeatures::AVX512);
    let there = moved(&table, &[busy, armed], &host(&table));
    assert_eq!((there.verdict(), there.reasons), (Verdict::Runs, vec![]));
    assert_eq!(there.shared, sees(&table));
}

#[test]
fn from_older_to_newer_everything_runs() {
    for (from, to) in [
        (without_amx(), generation(Level::SapphireRapids)),
        (without_amx(), generation(Level::GraniteRapids)),
        (
            generation(Level::SapphireRapids),
            generation(Level::GraniteRapids),
        ),
    ] {
        let xcr0 = sees(&from).user().bits();
        let state = vcpu(&from, xcr0, NOTHING, XFeatures::from_bits_retain(xcr0));
        let there = moved(&from, &[state], &host(&to));
        assert_eq!((there.verdict(), there.reasons), (Verdict::Runs, vec![]));
    }
}

#[test]
fn from_newer_to_older_it_depends_on_xcr0() {
    let (newer, older) = (
        generation(Level::GraniteRapids),
        generation(Level::SapphireRapids),
    );
    let fp16 = |active| Reason::Feature {
        feature: Feature::Amx(AmxFeatures::FP16),
        active,
    };
    // Enabled: it may multiply FP16 at any moment.
    let enabled = vcpu(&newer, 0x602e7, XFeatures::XTILEDATA, NOTHING);
    let there = moved(&newer, &[enabled], &host(&older));
    assert_eq!(there.reasons, [fp16(true)]);
    assert_eq!(there.verdict(), Verdict::No);
    // Not enabled on any vCPU, or not started: hidden, it runs.
    let idle = vcpu(&newer, 0x2e7, NOTHING, XFeatures::AVX512 | XFeatures::AVX);
    let not_started = moved(&newer, &[], &host(&older));
    for there in [moved(&newer, &[idle], &host(&older)), not_started] {
        assert_eq!(there.reasons, [fp16(false)]);
        assert_eq!(there.verdict(), HIDE);
        let mut table = newer.clone();
        Policy::features(&there.shared).apply(&mut table).unwrap();
        assert_eq!(sees(&table).amx, Level::SapphireRapids.features());
        // And then it does.
        assert_eq!(moved(&table, &[], &host(&older)).verdict(), Verdict::Runs);
    }
}

#[test]
fn a_guest_without_amx_is_not_kept_from_a_host_without() {
    let table = generation(Level::SapphireRapids);
    let there = host(&without_amx());
    // It sees AMX, but one vCPU of the two is enough to keep it.
    let without = || vcpu(&table, 0x2e7, NOTHING, XFeatures::from_bits_retain(0x2e7));
    let with = || vcpu(&table, 0x602e7, XFeatures::XTILEDATA, NOTHING);
    assert_eq!(
        moved(&table, &[without(), without()], &there).verdict(),
        HIDE
    );
    let blocked = moved(&table, &[without(), with()], &there);
    assert_eq!(blocked.verdict(), Verdict::No);
    let losses: Vec<&Reason> = blocked
        .reasons
        .iter()
        .filter(|reason| matches!(reason, Reason::Loss { .. }))
        .collect();
    // Exactly what cannot be there: both bits of XCR0, and IA32_XFD.
    assert!(matches!(
        losses[..],
        [
            Reason::Loss { vcpu: 1, loss: Loss::Xcr0 { lost, .. } },
            Reason::Loss { vcpu: 1, loss: Loss::Xfd { .. } },
        ] if *lost == XFeatures::AMX
    ));
    // Hidden from the beginning, nothing keeps it.
    let hidden = without_amx();
    let state = vcpu(&hidden, 0x2e7, NOTHING, XFeatures::from_bits_retain(0x2e7));
    assert_eq!(moved(&hidden, &[state], &there).verdict(), Verdict::Runs);
}

#[test]
fn tiles_in_use_are_named() {
    let table = generation(Level::SapphireRapids);
    let busy = vcpu(&table, 0x602e7, NOTHING, XFeatures::AMX);
    let there = moved(&table, &[busy], &host(&without_amx()));
    assert_eq!(there.verdict(), Verdict::No);
    for component in [ComponentId::XTILECFG, ComponentId::XTILEDATA] {
        assert!(there.reasons.contains(&Reason::Loss {
            vcpu: 0,
            loss: Loss::Missing { component }
        }));
    }
}

#[test]
fn a_component_elsewhere_can_be_moved_or_hidden() {
    let table = without_amx();
    let mut other = table.clone();
    other.set_leaf(0xd, 9, [8, 2816, 0, 0]).unwrap();
    other.set_leaf(0xd, 0, [0x2e7, 2824, 2824, 0]).unwrap();
    assert!(
        coherence::check(&other)
            .iter()
            .all(|c| c.is_recomputed_by_kvm())
    );
    let there = host(&other);

    let in_use = vcpu(&table, 0x2e7, NOTHING, XFeatures::PKRU);
    let moved_there = moved(&table, &[in_use], &there);
    assert_eq!(
        moved_there.verdict(),
        Verdict::RunsAfter {
            relayout: true,
            hide: false
        }
    );
    assert!(moved_there.reasons.contains(&Reason::Misfit {
        vcpu: 0,
        misfit: Misfit::Offset {
            component: ComponentId::PKRU,
            source_offset: 2688,
            target_offset: 2816,
        }
    }));
    // Enabled, and initial: the state fits, but the guest knows the place.
    let initial = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    let there_initial = moved(&table, &[initial], &there);
    assert!(matches!(
        there_initial.reasons[..],
        [Reason::Elsewhere { active: true, .. }]
    ));
    assert_eq!(there_initial.reasons[0].remedy(), Some(Remedy::Relayout));
    // Not enabled.
    let without = vcpu(&table, 0xe7, NOTHING, NOTHING);
    assert_eq!(moved(&table, &[without], &there).verdict(), HIDE);
    assert_eq!(moved(&table, &[], &there).verdict(), HIDE);
}

#[test]
fn another_size_or_palette_is_not_helped_by_moving() {
    let table = generation(Level::SapphireRapids);
    let mut larger = table.clone();
    // 16 tiles of 1 KiB.
    larger.set_leaf(0xd, 18, [16384, 2816, 6, 0]).unwrap();
    larger.set_leaf(0xd, 0, [0x602e7, 19200, 19200, 0]).unwrap();
    larger
        .set_leaf(0x1d, 1, [0x0400_4000, 0x0010_0040, 0x10, 0])
        .unwrap();
    let there = host(&larger);
    assert_eq!(there.guest_features().amx, Level::SapphireRapids.features());

    let enabled = vcpu(&table, 0x602e7, XFeatures::XTILEDATA, NOTHING);
    let there_enabled = moved(&table, &[enabled], &there);
    assert_eq!(there_enabled.verdict(), Verdict::No);
    assert!(there_enabled.reasons.iter().any(|reason| matches!(
        reason,
        Reason::Feature {
            feature: Feature::Palette(_),
            active: true
        }
    )));
    assert!(there_enabled.reasons.iter().any(|reason| matches!(
        reason,
        Reason::Elsewhere { has, active: true, .. } if has.size == 16384
    )));
    // Live tiles: the state itself cannot move either.
    let busy = vcpu(&table, 0x602e7, NOTHING, XFeatures::AMX);
    assert!(
        moved(&table, &[busy], &there)
            .reasons
            .iter()
            .any(|reason| matches!(
                reason,
                Reason::Loss {
                    loss: Loss::Palette { .. } | Loss::TileConfig { .. },
                    ..
                }
            ))
    );
    let idle = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    assert_eq!(moved(&table, &[idle], &there).verdict(), HIDE);
}

#[test]
fn instructions_that_a_kernel_has_chosen_must_be_there() {
    let table = without_amx();
    let mut other = table.clone();
    let [eax, _, ecx, edx] = other.leaf(0xd, 1);
    // XSAVEOPT only.
    other.set_leaf(0xd, 1, [eax & 1, 0, ecx, edx]).unwrap();
    let there = host(&other);
    let state = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    assert_eq!(moved(&table, &[state], &there).verdict(), Verdict::No);
    assert_eq!(moved(&table, &[], &there).verdict(), HIDE);
}

#[test]
fn a_host_that_refuses_says_how() {
    let table = generation(Level::SapphireRapids);
    let error = PermissionError::Filtered { errno: 1 };
    let refusing = Host {
        permission: Permission::Refused(error),
        ..host(&table)
    };
    let enabled = vcpu(&table, 0x602e7, XFeatures::XTILEDATA, NOTHING);
    let there = moved(&table, &[enabled], &refusing);
    assert_eq!(there.verdict(), Verdict::No);
    assert_eq!(
        there.reasons[0],
        Reason::Permission {
            error,
            active: true
        }
    );
    // A guest that sees no AMX needs no permission.
    let none = moved(&without_amx(), &[], &refusing);
    assert_eq!((none.verdict(), none.reasons), (Verdict::Runs, vec![]));

    let no_kvm = Host {
        kvm: Err(NoKvm::NoDevice),
        ..host(&table)
    };
    let there = moved(&table, &[], &no_kvm);
    assert_eq!(there.reasons[0], Reason::NoKvm(NoKvm::NoDevice));
    assert_eq!(there.verdict(), Verdict::No);
}

#[test]
fn states_alone_are_compared_as_far_as_they_tell() {
    let table = generation(Level::GraniteRapids);
    let check = |state, to: &Table| compat::check(Guest::from_states(&[state]), &host(to));
    let busy = || vcpu(&table, 0x602e7, NOTHING, XFeatures::AMX);
    // FP16 is not seen in a state.
    let older = check(busy(), &generation(Level::SapphireRapids));
    assert_eq!(older.verdict(), Verdict::Runs);
    assert_eq!(check(busy(), &without_amx()).verdict(), Verdict::No);
    let idle = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    assert_eq!(check(idle, &without_amx()).verdict(), Verdict::Runs);
    // A host without XSAVE has no place for anything.
    let there = check(busy(), &Table::new());
    assert!(matches!(there.reasons[..], [Reason::Layout(_)]));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// A guest that has not started runs on any host, once all that it lacks is hidden; and what it
    /// then sees is coherent, and runs there as it is.
    #[test]
    fn what_hiding_promises_it_keeps(here in entries(), there in entries()) {
        let mut table: Table = here.into_iter().collect();
        Policy::expose_all().apply(&mut table).unwrap();
        let there = host(&there.into_iter().collect());
        let compatibility = compat::check(Guest::new(&sees(&table)), &there);
        let hidden = |reason: &Reason| reason.remedy() == Some(Remedy::Hide);
        prop_assert!(compatibility.reasons.iter().all(hidden));
        prop_assert_eq!(compatibility.verdict() == Verdict::Runs, sees(&table) == compatibility.shared);
        let mut guest = table.clone();
        Policy::features(&compatibility.shared).apply(&mut guest).unwrap();
        prop_assert_eq!(coherence::check(&guest), []);
        prop_assert_eq!(compat::check(Guest::new(&sees(&guest)), &there).verdict(), Verdict::Runs);
    }
}

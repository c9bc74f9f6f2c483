//! Guests that move: to newer hosts, to older ones, and to those that have things elsewhere.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../cpuid-amx/tests/common/mod.rs"]
mod common;

use std::slice;

use common::{entries, fixture};
use cpuid_amx::{
    AmxFeatures, Contradiction, CpuidTable, Entry, Feature, FeatureSet, Level, PermissionError,
    Policy, Table, coherence,
};
use host_compat::FeatureMsrs;
use host_compat::Host;
use host_compat::compat::{
    self, Compatibility, Guest, NotCompared, Reason, Remedy, Usage, Verdict,
};
use host_compat::host::{Capabilities, KvmFacts, NoKvm, Permission, Tsc};
use proptest::prelude::*;
use xsave_state::{ComponentId, ExtendedState, Image, Layout, Misfit, Registers, XFeatures};

const HIDE: Verdict = Verdict::RunsAfter {
    relayout: false,
    hide: true,
};

fn sees(table: &Table) -> FeatureSet {
    FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
}

/// A host that is described, so that what is not in its table is not there.
fn host(table: &Table) -> Host {
    let mut host = Host::from_cpuid("there", table.clone());
    host.kvm.as_mut().unwrap().capabilities = Some(Capabilities::default());
    host
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
    let registers = Registers::RESET
        .with_xcr0(XFeatures::from_bits_retain(xcr0))
        .with_xfd(xfd);
    ExtendedState::new(image, registers).unwrap()
}

fn moved(table: &Table, states: &[ExtendedState<'_>], to: &Host) -> Compatibility {
    told(compat::check(Guest::new(table).running(states), to))
}

fn told(compatibility: Compatibility) -> Compatibility {
    for reason in &compatibility.reasons {
        println!("{reason}");
    }
    compatibility
}

const NOTHING: XFeatures = XFeatures::empty();

/// A table has what the guest sees; what hides the rest is only in the list.
#[test]
fn the_list_of_entries_tells_what_hides_others() {
    let mut list: Vec<_> = generation(Level::SapphireRapids).entries().collect();
    let tiles = list.iter().position(|entry| entry.leaf == 0x1d).unwrap();
    let zeros = Entry {
        leaf: 0x1d,
        subleaf: None,
        value: [0; 4],
    };
    list.insert(tiles, zeros);
    let table: Table = list.iter().copied().collect();
    let host = host(&table);
    let hides = |guest: Guest<'_>| {
        let contradictions = compat::check(guest, &host).contradictions;
        let mut all = contradictions.iter();
        all.any(|one| matches!(one, Contradiction::Unflagged { leaf: 0x1d, .. }))
    };
    assert!(hides(Guest::new(&table).listed(&list)));
    assert!(!hides(Guest::new(&table)));
}

#[test]
fn a_guest_runs_where_it_comes_from() {
    let table = generation(Level::GraniteRapids);
    let busy = vcpu(&table, 0x602e7, NOTHING, XFeatures::AMX | XFeatures::AVX);
    let armed = vcpu(&table, 0x602e7, XFeatures::XTILEDATA, XFeatures::AVX512);
    let there = moved(&table, &[busy, armed], &host(&table));
    assert_eq!((there.verdict(), there.reasons), (Verdict::Runs, vec![]));
    assert_eq!(there.hidden, Some(table));
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
    let fp16 = |usage| Reason::Feature {
        feature: Feature::Amx(AmxFeatures::FP16),
        usage,
    };
    // Enabled: it may multiply FP16 at any moment.
    let enabled = vcpu(&newer, 0x602e7, XFeatures::XTILEDATA, NOTHING);
    let there = moved(&newer, &[enabled], &host(&older));
    assert_eq!(there.reasons, [fp16(Usage::Enabled)]);
    assert_eq!(there.verdict(), Verdict::No);
    // Not enabled on any vCPU, or not started: hidden, it runs.
    let idle = vcpu(&newer, 0x2e7, NOTHING, XFeatures::AVX512 | XFeatures::AVX);
    let not_started = moved(&newer, &[], &host(&older));
    for (there, usage) in [
        (moved(&newer, &[idle], &host(&older)), Usage::NotEnabled),
        (not_started, Usage::NotStarted),
    ] {
        assert_eq!(there.reasons, [fp16(usage)]);
        assert_eq!(there.verdict(), HIDE);
        let table = there.hidden.unwrap();
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
            Reason::Loss { vcpu: 1, loss: Misfit::Xcr0 { xcr0, largest } },
            Reason::Loss { vcpu: 1, loss: Misfit::Xfd { .. } },
        ] if *xcr0 - *largest == XFeatures::AMX
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
            loss: Misfit::Missing { component }
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

    // Its signal frames have PKRU where it has read that it lies: whether in use or not.
    let in_use = vcpu(&table, 0x2e7, NOTHING, XFeatures::PKRU);
    let initial = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    for state in [in_use.clone(), initial] {
        let there_running = moved(&table, slice::from_ref(&state), &there);
        assert_eq!(there_running.verdict(), Verdict::No);
        assert_eq!(there_running.remedy(&there_running.reasons[0]), None);
        assert!(matches!(
            there_running.reasons[0],
            Reason::Elsewhere {
                usage: Usage::Enabled,
                ..
            }
        ));
        // The same where only its layout is known.
        let guest = Guest::from_states(slice::from_ref(&state));
        let of_layout = told(compat::check(guest, &there));
        assert_eq!(of_layout.verdict(), Verdict::No);
        // For a guest that is known not to do so.
        let states = [state];
        let guest = Guest::new(&table).running(&states).with_relayout();
        let moves = told(compat::check(guest, &there));
        assert_eq!(
            moves.verdict(),
            Verdict::RunsAfter {
                relayout: true,
                hide: false
            }
        );
        assert_eq!(moves.remedy(&moves.reasons[0]), Some(Remedy::Relayout));
    }
    assert!(
        moved(&table, &[in_use], &there)
            .reasons
            .contains(&Reason::Misfit {
                vcpu: 0,
                misfit: Misfit::Offset {
                    component: ComponentId::PKRU,
                    source_offset: 2688,
                    target_offset: 2816,
                }
            })
    );
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
            usage: Usage::Enabled
        }
    )));
    assert!(there_enabled.reasons.iter().any(|reason| matches!(
        reason,
        Reason::Elsewhere { has, usage: Usage::Enabled, .. } if has.size == 16384
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
                    loss: Misfit::Palette { .. } | Misfit::TileConfig { .. },
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
            usage: Usage::Enabled
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
    // FP16 is not seen in a state: too little to say yes.
    let older = check(busy(), &generation(Level::SapphireRapids));
    assert_eq!((older.verdict(), older.reasons), (Verdict::Unknown, vec![]));
    assert!(older.not_compared.contains(&NotCompared::GuestCpuid));
    assert_eq!(check(busy(), &without_amx()).verdict(), Verdict::No);
    let idle = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    assert_eq!(check(idle, &without_amx()).verdict(), Verdict::Unknown);
    // The places of a Zen 4 are not an Intel's.
    let zen = fixture("amd-zen4-genoa");
    let foreign = vcpu(&zen, 0x2e7, NOTHING, NOTHING);
    let there = check(foreign, &without_amx());
    assert_eq!(there.verdict(), Verdict::No);
    assert!(there.reasons.iter().any(|reason| matches!(
        reason,
        Reason::Elsewhere { sees, .. } if sees.id == ComponentId::PKRU
    )));
    // A host without XSAVE has x87 and SSE alone.
    let there = check(busy(), &Table::new());
    for component in [ComponentId::XTILECFG, ComponentId::XTILEDATA] {
        assert!(there.reasons.contains(&Reason::Loss {
            vcpu: 0,
            loss: Misfit::Missing { component },
        }));
    }
    assert_eq!(there.verdict(), Verdict::No);
}

/// A register with one bit less, for each of the registers that have features.
#[test]
fn every_feature_leaf_is_compared() {
    let table = generation(Level::SapphireRapids);
    let running = [vcpu(&table, 0x2e7, NOTHING, NOTHING)];
    let with = |leaf: u32, subleaf: u32, register: usize, bits: u32| {
        let mut more = table.clone();
        let mut value = more.leaf(leaf, subleaf);
        value[register] |= bits;
        more.set_leaf(leaf, subleaf, value).unwrap();
        more
    };
    for (leaf, subleaf, register, bit, name) in [
        (1, 0, 2, 25, "AES"),
        (1, 0, 3, 11, "SEP"),
        (7, 0, 1, 29, "SHA"),
        (7, 0, 2, 8, "GFNI"),
        (7, 0, 3, 4, "FSRM"),
        (7, 1, 0, 10, "FZRM"),
        (7, 1, 3, 14, "PREFETCHI"),
        (7, 2, 3, 5, "MCDT_NO"),
        (0x4000_0001, 0, 0, 5, "STEAL_TIME"),
        (0x8000_0001, 0, 2, 5, "LZCNT"),
        (0x8000_0001, 0, 3, 27, "RDTSCP"),
        (0x8000_0007, 0, 3, 8, "invariant-TSC"),
        (0x8000_0008, 0, 1, 9, "WBNOINVD"),
        (0x8000_0021, 0, 0, 2, "LFENCE-serializes"),
    ] {
        let has = with(leaf, subleaf, register, 1 << bit);
        let mut less = has.clone();
        let mut value = less.leaf(leaf, subleaf);
        value[register] &= !(1 << bit);
        less.set_leaf(leaf, subleaf, value).unwrap();
        let there = host(&less);
        let refused = moved(&has, &running, &there);
        assert_eq!(refused.verdict(), Verdict::No, "{name}");
        assert!(
            refused.reasons[0].to_string().contains(name),
            "{:?}",
            refused.reasons
        );
        let fresh = moved(&has, &[], &there);
        assert_eq!(fresh.verdict(), HIDE, "{name}");
        let hidden = fresh.hidden.unwrap();
        assert_eq!(hidden.leaf(leaf, subleaf)[register] >> bit & 1, 0);
        assert_eq!(moved(&hidden, &[], &there).verdict(), Verdict::Runs);
        // The other way nothing is missing.
        assert_eq!(moved(&less, &running, &host(&has)).verdict(), Verdict::Runs);
    }
    for (leaf, register, larger, smaller) in [
        (0x8000_0008, 0, 0x3934, 0x392e),
        (0x8000_0008, 0, 0x3934, 0x3034),
        (0xa, 0, 0x0830_0805, 0x0830_0405),
    ] {
        let with = |value: u32| {
            let mut table = table.clone();
            let mut registers = table.leaf(leaf, 0);
            registers[register] = value;
            table.set_leaf(leaf, 0, registers).unwrap();
            table
        };
        let refused = moved(&with(larger), &running, &host(&with(smaller)));
        assert!(matches!(
            refused.reasons[..],
            [Reason::Number {
                usage: Usage::Seen,
                ..
            }]
        ));
        let runs = moved(&with(smaller), &running, &host(&with(larger)));
        assert_eq!(runs.verdict(), Verdict::Runs);
    }
}

/// What hangs on a component that XCR0 has not enabled can be hidden from a running guest, the rest not.
#[test]
fn features_that_need_a_component() {
    let table = generation(Level::SapphireRapids);
    let mut without = table.clone();
    let features = sees(&table).without_components(XFeatures::AVX512).closed();
    Policy::features(&features).apply(&mut without).unwrap();
    let there = host(&without);
    let idle = vcpu(&table, 0x207, NOTHING, NOTHING);
    assert_eq!(moved(&table, &[idle], &there).verdict(), HIDE);
    let enabled = vcpu(&table, 0x2e7, NOTHING, NOTHING);
    assert_eq!(moved(&table, &[enabled], &there).verdict(), Verdict::No);
}

fn with_cet(table: &Table) -> Table {
    let mut table = table.clone();
    let [eax, ebx, _, edx] = table.leaf(0xd, 1);
    table.set_leaf(0xd, 1, [eax, ebx, 0x1800, edx]).unwrap();
    table.set_leaf(0xd, 11, [16, 0, 1, 0]).unwrap();
    table.set_leaf(0xd, 12, [24, 0, 1, 0]).unwrap();
    let [eax, ebx, ecx, edx] = table.leaf(7, 0);
    table
        .set_leaf(7, 0, [eax, ebx, ecx | 1 << 7, edx | 1 << 20])
        .unwrap();
    Policy::expose_all().apply(&mut table).unwrap();
    table
}

/// CET is given by newer kernels. With it go shadow stacks and IBT, which need no IA32_XSS.
/// What a register says is not enabled is not said to be, and what it is guessed to be neither.
#[test]
fn what_is_in_use_and_what_is_guessed_is_not_called_enabled() {
    let table = generation(Level::SapphireRapids);
    let there = host(&without_amx());
    let usage = |states: &[ExtendedState<'_>], guessed: bool| {
        let mut guest = Guest::new(&table).running(states);
        if guessed {
            guest = guest.with_guessed_xcr0();
        }
        let found = compat::check(guest, &there).reasons;
        found.iter().find_map(|reason| match reason {
            Reason::Component { sees, usage } if sees.id == ComponentId::XTILEDATA => Some(*usage),
            _ => None,
        })
    };
    let enabled = [vcpu(&table, 0x602e7, NOTHING, NOTHING)];
    assert_eq!(usage(&enabled, false), Some(Usage::Enabled));
    assert_eq!(usage(&enabled, true), Some(Usage::NotKnown));
    for xcr0 in [0x2e7, 0x602e7] {
        let in_use = [vcpu(&table, xcr0, NOTHING, XFeatures::AMX)];
        assert_eq!(usage(&in_use, true), Some(Usage::InUse));
        let known = usage(&in_use, false);
        assert_eq!(known == Some(Usage::InUse), xcr0 == 0x2e7, "{known:?}");
    }
    let idle = [vcpu(&table, 0x2e7, NOTHING, NOTHING)];
    assert_eq!(usage(&idle, false), Some(Usage::NotEnabled));
}

#[test]
fn supervisor_components_by_ia32_xss() {
    let older = without_amx();
    let newer = with_cet(&older);
    let there = host(&older);
    let fresh = moved(&newer, &[], &there);
    assert_eq!(fresh.verdict(), HIDE);
    let hidden = fresh.hidden.unwrap();
    let [_, _, ecx, edx] = hidden.leaf(7, 0);
    assert_eq!(
        (ecx >> 7 & 1, edx >> 20 & 1, hidden.leaf(0xd, 1)[2]),
        (0, 0, 0)
    );

    let states = [vcpu(&newer, 0x2e7, NOTHING, NOTHING)];
    let usage = |guest: Guest<'_>| {
        let found = told(compat::check(guest, &there));
        assert_eq!(found.verdict(), Verdict::No);
        found.reasons.iter().find_map(|reason| match reason {
            Reason::Component { usage, .. } => Some(*usage),
            _ => None,
        })
    };
    let guest = Guest::new(&newer).running(&states);
    assert_eq!(usage(guest), Some(Usage::NotKnown));
    assert_eq!(usage(guest.xss(NOTHING)), Some(Usage::NotEnabled));
    assert_eq!(
        usage(guest.xss(XFeatures::CET_U | XFeatures::CET_S)),
        Some(Usage::Enabled)
    );
}

/// A dump can have less leaves than there are: what it does not tell is not compared.
#[test]
fn leaves_that_a_dump_does_not_have() {
    let mut table = without_amx();
    table.set_leaf(0x4000_0001, 0, [1 << 5, 0, 0, 0]).unwrap();
    table.set_leaf(0x8000_0008, 0, [0x3934, 0, 0, 0]).unwrap();
    let dump = Host::from_cpuid("dump", without_amx());
    let found = moved(&table, &[], &dump);
    assert_eq!(found.verdict(), Verdict::Runs);
    let said = [0x4000_0001, 0x8000_0008].map(NotCompared::HostLeaf);
    assert_eq!(found.not_compared[..2], said);
    assert_eq!(moved(&table, &[], &host(&without_amx())).verdict(), HIDE);
}

#[test]
fn a_kvm_that_rewrites_cpuid_hides_nothing() {
    let table = generation(Level::SapphireRapids);
    let mut there = host(&table);
    there.kvm.as_mut().unwrap().rewritten = Some(without_amx());
    let fresh = moved(&table, &[], &there);
    assert_eq!((fresh.verdict(), fresh.hidden), (Verdict::No, None));
    assert_eq!(moved(&without_amx(), &[], &there).verdict(), Verdict::Runs);
}

#[test]
fn feature_msrs_and_time() {
    let mut table = without_amx();
    let [eax, ebx, ecx, edx] = table.leaf(1, 0);
    table
        .set_leaf(1, 0, [eax, ebx, ecx | 1 << 15, edx])
        .unwrap();
    let states = [vcpu(&table, 0x2e7, NOTHING, NOTHING)];
    let msrs = |arch, perf| FeatureMsrs {
        arch_capabilities: Some(arch),
        perf_capabilities: Some(perf),
    };
    let mut there = host(&table);
    let kvm = there.kvm.as_mut().unwrap();
    *kvm = KvmFacts {
        feature_msrs: msrs(0x8_0001, 0x2005),
        tsc: Some(Tsc {
            khz: 2_000_000,
            scales: false,
        }),
        ..kvm.clone()
    };
    let guest = Guest::new(&table).running(&states);
    let none = told(compat::check(guest, &there));
    assert_eq!(none.verdict(), Verdict::Runs);
    let said = [
        NotCompared::GuestMsr("IA32_ARCH_CAPABILITIES"),
        NotCompared::GuestMsr("IA32_PERF_CAPABILITIES"),
        NotCompared::GuestTsc,
    ];
    assert_eq!(none.not_compared, said);

    let known = guest.tsc_khz(Some(2_000_100));
    let same = told(compat::check(
        known.feature_msrs(msrs(0x8_0001, 0x2005)),
        &there,
    ));
    assert_eq!((same.reasons, same.not_compared), (vec![], vec![]));
    for (arch, perf, missing) in [
        (0x8_0003, 0x2005, 2),
        // RRSBA: the guest does not know that it must protect itself.
        (0x1, 0x2005, 0x8_0000),
        (0x8_0001, 0x2006, 0x3f),
        (0x8_0001, 0x6005, 0x4000),
    ] {
        let found = told(compat::check(known.feature_msrs(msrs(arch, perf)), &there));
        let [Reason::FeatureMsr { missing: bits, .. }] = found.reasons[..] else {
            panic!("{:?}", found.reasons)
        };
        assert_eq!((bits, found.verdict()), (missing, Verdict::No));
    }
    let faster = told(compat::check(guest.tsc_khz(Some(2_100_000)), &there));
    assert!(matches!(
        faster.reasons[..],
        [Reason::Tsc {
            guest_khz: 2_100_000,
            ..
        }]
    ));
    let kvm = there.kvm.as_mut().unwrap();
    kvm.tsc.as_mut().unwrap().scales = true;
    assert_eq!(
        compat::check(guest.tsc_khz(Some(2_100_000)), &there).reasons,
        []
    );
}

/// A guest that contradicts itself is compared without what does, and it is said.
#[test]
fn contradictions_of_the_guest_are_named() {
    let mut table = generation(Level::SapphireRapids);
    table.set_leaf(0xd, 0, [0x2e7, 2696, 2696, 0]).unwrap();
    table.set_leaf(0xd, 1, [0x1f, 2440, 0, 0]).unwrap();
    let there = moved(&table, &[], &host(&table));
    assert_eq!(there.verdict(), Verdict::Runs);
    let [said] = &there.contradictions[..] else {
        panic!("{:?}", there.contradictions)
    };
    assert!(
        said.to_string()
            .contains("ask KVM again after ARCH_REQ_XCOMP_GUEST_PERM")
    );
}

/// The earlier features of AMX in CPUID.1EH.1 a second time: a guest that reads leaf 7 needs no more.
#[test]
fn a_repetition_of_leaf_7_is_not_missed() {
    let table = generation(Level::SapphireRapids);
    let mut newer = table.clone();
    newer.set_leaf(0x1e, 0, [1, 0x4010, 0, 0]).unwrap();
    let mut repeated = newer.clone();
    repeated.set_leaf(0x1e, 1, [3, 0, 0, 0]).unwrap();
    for (here, there) in [
        (&newer, &table),
        (&table, &newer),
        (&repeated, &table),
        (&newer, &repeated),
    ] {
        let found = moved(here, &[], &host(there));
        assert_eq!(found.verdict(), Verdict::Runs);
        assert_eq!(sees(&found.hidden.unwrap()).amx, sees(here).amx);
    }
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
        let compatibility = compat::check(Guest::new(&table), &there);
        let vendor = |reason: &Reason| matches!(reason, Reason::Vendor { .. });
        let can_be_hidden = |reason: &Reason| compatibility.remedy(reason) == Some(Remedy::Hide);
        for reason in &compatibility.reasons {
            prop_assert!(can_be_hidden(reason) || vendor(reason), "{reason}");
        }
        let guest = compatibility.hidden.unwrap();
        let runs = compatibility.reasons.is_empty();
        if runs {
            prop_assert_eq!(sees(&guest), sees(&table));
        } else if !compatibility.reasons.iter().all(vendor) {
            prop_assert_ne!(&guest, &table);
        }
        prop_assert_eq!(coherence::check(&guest), []);
        let again = compat::check(Guest::new(&guest), &there);
        prop_assert!(again.reasons.iter().all(vendor), "{:?}", again.reasons);
    }
}

//! Policies: what they make of real tables, and that what they make of any table has no
//! contradiction.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{Bounded, FIXTURES, diamond_rapids, entries, fixture};
use cpuid_amx::policy::Change;
use cpuid_amx::{
    Amx, AmxFeatures, CpuidTable, Entry, Feature, FeatureSet, Level, Policy, PolicyError, Register,
    Table, TableFull, Unusable, coherence,
};
use proptest::prelude::*;
use xsave_state::{ComponentId, Layout, XFeatures};

fn features(table: &impl CpuidTable) -> AmxFeatures {
    AmxFeatures::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
}

fn set(table: &impl CpuidTable) -> FeatureSet {
    FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
}

fn applied(policy: &Policy, table: &Table) -> Table {
    let mut result = table.clone();
    policy.apply(&mut result).unwrap();
    result
}

#[test]
fn a_coherent_table_exposes_what_it_has() {
    for name in FIXTURES {
        let table = fixture(name);
        if coherence::check(&table).is_empty() {
            let mut same = table.clone();
            assert_eq!(Policy::expose_all().apply(&mut same), Ok(vec![]), "{name}");
            assert_eq!(same, table, "{name}");
        }
    }
}

/// Register by register.
#[test]
fn sapphire_rapids_without_amx() {
    let mut table = fixture("sapphire-rapids");
    let changes = Policy::hide_amx().apply(&mut table).unwrap();
    let change = |leaf, subleaf, register, old, new| Change {
        leaf,
        subleaf,
        register,
        old,
        new,
    };
    use Register::{Eax, Ebx, Ecx, Edx};
    assert_eq!(
        changes,
        [
            change(7, 0, Edx, 0xffdd_4430, 0xfc9d_4430),
            change(0xd, 0, Eax, 0x602e7, 0x2e7),
            change(0xd, 0, Ebx, 0x2b00, 0xa88),
            change(0xd, 0, Ecx, 0x2b00, 0xa88),
            change(0xd, 1, Eax, 0x1f, 0xf),
            // All user and supervisor components, as the compacted format has them.
            change(0xd, 1, Ebx, 0x2a80, 0xd90),
            change(0xd, 17, Eax, 64, 0),
            change(0xd, 17, Ebx, 2752, 0),
            change(0xd, 17, Ecx, 2, 0),
            change(0xd, 18, Eax, 8192, 0),
            change(0xd, 18, Ebx, 2816, 0),
            change(0xd, 18, Ecx, 6, 0),
            change(0x1d, 0, Eax, 1, 0),
            change(0x1d, 1, Eax, 0x0400_2000, 0),
            change(0x1d, 1, Ebx, 0x0008_0040, 0),
            change(0x1d, 1, Ecx, 0x10, 0),
            change(0x1e, 0, Ebx, 0x4010, 0),
        ]
    );
    assert_eq!(
        changes[0].to_string(),
        "leaf 0x7 sub-leaf 0x0 EDX: 0xffdd4430 becomes 0xfc9d4430"
    );
    assert_eq!(coherence::check(&table), []);
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).unwrap();
    assert_eq!(layout.standard_size(), 2696);
    assert!(layout.xfd().is_empty() && layout.palettes().is_empty());
}

#[test]
fn hidden_is_as_if_it_had_never_been() {
    // Of the same processor, the one guest was given AMX by its kernel and the other was not.
    let hidden = applied(&Policy::hide_amx(), &fixture("sapphire-rapids-guest"));
    let without = applied(
        &Policy::hide_amx(),
        &fixture("sapphire-rapids-guest-without-amx"),
    );
    for leaf in [0xd, 0x1d, 0x1e] {
        for subleaf in [0, 1, 2, 17, 18]
            .into_iter()
            .filter(|s| (leaf, *s) != (0xd, 1))
        {
            let of = |table: &Table| table.leaf(leaf, subleaf);
            assert_eq!(of(&hidden), of(&without), "{leaf:#x}.{subleaf}");
        }
    }
}

#[test]
fn exactly_a_set() {
    let table = diamond_rapids();
    assert_eq!(coherence::check(&table), []);
    let all = features(&table);
    assert_eq!(all, Level::DiamondRapids.features());
    // Each set that has AMX-TILE, of all that there is.
    for bits in 0..1 << 9 {
        let wanted = AmxFeatures::from_bits_truncate(bits) & all | AmxFeatures::TILE;
        let result = applied(&Policy::exactly(wanted), &table);
        assert_eq!(features(&result), wanted);
        assert_eq!(coherence::check(&result), []);
        let amx = Amx::from_cpuid(|leaf, subleaf| result.leaf(leaf, subleaf));
        assert_eq!(amx.usable(), Ok(()));
        // Both places say the same of what both have.
        let aliased = AmxFeatures::from_leaf_1e(result.leaf(0x1e, 1)) & AmxFeatures::ALIASED;
        assert_eq!(aliased, wanted & AmxFeatures::ALIASED);
    }
    assert_eq!(
        applied(&Policy::exactly(AmxFeatures::empty()), &table),
        applied(&Policy::hide_amx(), &table)
    );
}

#[test]
fn levels_on_real_processors() {
    let level = |level, table: &Table| {
        let mut result = table.clone();
        let verdict = Policy::level(level).apply(&mut result);
        if verdict.is_err() {
            assert_eq!(result, *table);
        } else {
            assert_eq!(features(&result), level.features());
        }
        verdict
    };
    let (sapphire, granite) = (fixture("sapphire-rapids"), fixture("granite-rapids"));
    assert_eq!(level(Level::SapphireRapids, &sapphire), Ok(vec![]));
    assert_eq!(level(Level::GraniteRapids, &granite), Ok(vec![]));
    // Granite Rapids as Sapphire Rapids: one bit.
    assert_eq!(
        level(Level::SapphireRapids, &granite),
        Ok(vec![Change {
            leaf: 7,
            subleaf: 1,
            register: Register::Eax,
            old: 0x4020_1d30,
            new: 0x4000_1d30,
        }])
    );
    assert_eq!(
        level(Level::GraniteRapids, &sapphire),
        Err(PolicyError::Missing {
            wanted: Level::GraniteRapids.features(),
            missing: AmxFeatures::FP16,
            available: Level::SapphireRapids.features(),
        })
    );
    for each in Level::ALL {
        assert!(level(each, &diamond_rapids()).is_ok());
    }
}

#[test]
fn what_cannot_be_exposed_is_said_and_changes_nothing() {
    let verdict = |policy: Policy, table: &Table| {
        let mut result = table.clone();
        let error = policy.apply(&mut result).unwrap_err();
        assert_eq!(result, *table);
        error
    };
    let wanted = Level::SapphireRapids.features();
    let sapphire = fixture("sapphire-rapids");
    assert_eq!(
        verdict(Policy::exactly(AmxFeatures::INT8), &sapphire),
        PolicyError::WithoutTile {
            wanted: AmxFeatures::INT8
        }
    );
    let granted = XFeatures::from_bits_retain(0x2e7);
    assert_eq!(
        verdict(Policy::exactly(wanted).permitted(granted), &sapphire),
        PolicyError::NotPermitted { wanted, granted }
    );
    // Asked before the permission.
    let mut before = sapphire.clone();
    before.set_leaf(0xd, 0, [0x2e7, 0xa88, 0xa88, 0]).unwrap();
    assert_eq!(
        verdict(Policy::exactly(wanted), &before),
        PolicyError::Unusable {
            wanted,
            reason: Unusable::NoComponents {
                components: XFeatures::empty()
            }
        }
    );
    let without_leaves = fixture("emerald-rapids-vm-without-tile-leaves");
    assert_eq!(
        verdict(Policy::exactly(wanted), &without_leaves),
        PolicyError::Unusable {
            wanted,
            reason: Unusable::NoPalette { max_leaf: 0x1c }
        }
    );
    // What contradicts itself is not exposed: the multiply unit has no limits.
    let mut no_limits = sapphire.clone();
    no_limits.set_leaf(0x1e, 0, [0; 4]).unwrap();
    assert_eq!(
        verdict(Policy::exactly(wanted), &no_limits),
        PolicyError::Missing {
            wanted,
            missing: AmxFeatures::INT8 | AmxFeatures::BF16,
            available: AmxFeatures::TILE,
        }
    );
    // PKRU lies elsewhere on AMD.
    let intel = set(&fixture("ice-lake-server"));
    let PolicyError::MissingFeatures { missing } =
        verdict(Policy::features(&intel), &fixture("amd-zen4-genoa"))
    else {
        panic!("the layouts differ");
    };
    assert!(missing.iter().any(|feature| matches!(
        feature,
        Feature::Component(shape) if shape.id == ComponentId::PKRU && shape.offset == 2688
    )));
}

#[test]
fn without_permission_nothing_is_exposed_and_the_rest_stays() {
    let table = fixture("granite-rapids");
    let refused = Policy::expose_all().permitted(XFeatures::empty());
    assert_eq!(
        applied(&refused, &table),
        applied(&Policy::hide_amx(), &table)
    );
    let granted = Policy::expose_all().permitted(XFeatures::XTILEDATA);
    assert_eq!(applied(&granted, &table), table);
}

#[test]
fn features_go_with_the_components_that_they_need() {
    let table = fixture("sapphire-rapids");
    let without = |components| {
        let features = set(&table).without_components(components).closed();
        applied(&Policy::features(&features), &table)
    };
    let no_pkru = without(XFeatures::PKRU);
    assert_eq!(
        no_pkru.leaf(7, 0)[2],
        table.leaf(7, 0)[2] & !(1 << 3 | 1 << 4)
    );
    assert_eq!(no_pkru.leaf(0xd, 9), [0; 4]);

    let no_avx512 = without(XFeatures::OPMASK);
    let [_, ebx, ecx, edx] = no_avx512.leaf(7, 0);
    assert_eq!(ebx & 0xdc23_0000, 0);
    assert_eq!((ecx & 0x5842, edx & (1 << 8 | 1 << 23)), (0, 0));
    assert_eq!(no_avx512.leaf(7, 1)[0] & 1 << 5, 0);
    // AVX2 and AVX-VNNI need no more than AVX.
    assert_eq!(
        (ebx & 1 << 5, no_avx512.leaf(7, 1)[0] & 1 << 4),
        (1 << 5, 1 << 4)
    );

    let no_avx = without(XFeatures::AVX);
    assert_eq!(no_avx.leaf(1, 0)[2] & (1 << 12 | 1 << 28 | 1 << 29), 0);
    assert_eq!(no_avx.leaf(0xd, 0)[0], 0x60203);
    assert_eq!(coherence::check(&no_avx), []);
}

#[test]
fn a_table_without_room_stays_as_it_is() {
    // One entry for every sub-leaf of leaf 7: two are needed to say what a policy wants.
    let table = fixture("sapphire-rapids");
    let others = table.entries().filter(|entry| entry.leaf != 7);
    let every = Entry {
        leaf: 7,
        subleaf: None,
        value: table.leaf(7, 0),
    };
    let list: Vec<Entry> = others.chain([every]).collect();
    let count = list.len();
    let with_room = |limit| Bounded {
        entries: list.clone(),
        limit,
    };
    let mut table = with_room(count);
    assert_eq!(
        Policy::hide_amx().apply(&mut table),
        Err(PolicyError::Full(TableFull { limit: count }))
    );
    assert_eq!(table, with_room(count));
    // What is pushed before the table is full is taken away again.
    let mut table = with_room(count + 1);
    assert!(Policy::hide_amx().apply(&mut table).is_err());
    assert_eq!(table.entries, list);

    let mut table = with_room(count + 2);
    Policy::hide_amx().apply(&mut table).unwrap();
    assert_eq!(
        table.leaf(7, 0)[3],
        every.value[3] & !(1 << 22 | 1 << 24 | 1 << 25)
    );
    assert_eq!(table.leaf(7, 1)[1], every.value[1]);
    assert_eq!(coherence::check(&table), []);
}

fn policies() -> impl Strategy<Value = Policy> {
    let what = prop_oneof![
        Just(Policy::hide_amx()),
        Just(Policy::expose_all()),
        prop::sample::select(Level::ALL.to_vec()).prop_map(Policy::level),
        any::<u32>().prop_map(|bits| Policy::exactly(AmxFeatures::from_bits_truncate(bits))),
        (any::<u32>(), 0..FIXTURES.len()).prop_map(|(bits, index)| {
            let components = XFeatures::from_bits_retain(bits.into());
            let set = set(&fixture(FIXTURES[index])).without_components(components);
            Policy::features(&set.closed())
        }),
    ];
    let permitted = prop::option::of(prop_oneof![
        Just(XFeatures::empty()),
        Just(XFeatures::XTILEDATA)
    ]);
    (what, permitted).prop_map(|(policy, permitted)| match permitted {
        Some(granted) => policy.permitted(granted),
        None => policy,
    })
}

/// The leaves and sub-leaves that a table has, or that matter.
fn places(table: &impl CpuidTable) -> Vec<(u32, u32)> {
    let mut places: Vec<(u32, u32)> = (0..64).map(|n| (0xd, n)).collect();
    for n in 0..20 {
        places.extend([(7, n), (0x1d, n), (0x1e, n)]);
    }
    places.push((1, 0));
    places.extend(table.entries().map(|e| (e.leaf, e.subleaf.unwrap_or(0))));
    places.retain(|&(leaf, subleaf)| leaf != 1 || subleaf == 0);
    places.sort_unstable();
    places.dedup();
    places
}

fn visible(places: &[(u32, u32)], table: &impl CpuidTable) -> Vec<[u32; 4]> {
    places
        .iter()
        .map(|&(leaf, subleaf)| table.leaf(leaf, subleaf))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// All or nothing; coherent; idempotent; and it reports what it does.
    #[test]
    fn any_policy_on_any_table(entries in entries(), policy in policies()) {
        let mut table = entries.clone();
        match policy.apply(&mut table) {
            Err(error) => {
                prop_assert!(!matches!(error, PolicyError::Incoherent { .. }), "{error}");
                prop_assert_eq!(table, entries);
            }
            Ok(changes) => {
                prop_assert_eq!(coherence::check(&table), []);
                // Each register that differs is reported, and no other.
                let places = places(&entries);
                let mut told = visible(&places, &entries);
                for change in &changes {
                    let place = (change.leaf, change.subleaf);
                    let at = places.iter().position(|p| *p == place).unwrap();
                    let register = &mut told[at][change.register as usize];
                    prop_assert_eq!(*register, change.old);
                    prop_assert_ne!(change.old, change.new);
                    *register = change.new;
                }
                for (place, value) in places.into_iter().zip(told) {
                    // Sub-leaves beyond those of an entry that answered for every one are gone.
                    let every = entries.iter().any(|e| e.leaf == place.0 && e.subleaf.is_none());
                    if !every || place.0 == 1 {
                        prop_assert_eq!(table.leaf(place.0, place.1), value, "{:x?}", place);
                    }
                }
                let once = table.clone();
                prop_assert_eq!(policy.apply(&mut table), Ok(vec![]));
                prop_assert_eq!(table, once);
            }
        }
    }

    /// What cannot fail, does not; and a sorted table becomes what a list becomes.
    #[test]
    fn hiding_and_exposing_all_always_work(entries in entries()) {
        for policy in [Policy::hide_amx(), Policy::expose_all()] {
            let mut list = entries.clone();
            let mut sorted: Table = entries.iter().copied().collect();
            let in_list = policy.apply(&mut list).unwrap();
            let in_sorted = policy.apply(&mut sorted).unwrap();
            prop_assert_eq!(in_list, in_sorted);
            // The list has shown what an entry for every sub-leaf hides, the sorted table has not: the
            // sub-leaves that nobody has described are gone from the one alone.
            let every = |leaf: u32| entries.iter().any(|e| e.leaf == leaf && e.subleaf.is_none());
            let mut places = places(&entries);
            places.retain(|&(leaf, subleaf)| leaf != 7 || subleaf < 2 || !every(leaf));
            prop_assert_eq!(visible(&places, &list), visible(&places, &sorted));
        }
        let mut hidden = entries.clone();
        Policy::hide_amx().apply(&mut hidden).unwrap();
        prop_assert_eq!(features(&hidden), AmxFeatures::empty());
        prop_assert!(!set(&hidden).user().intersects(XFeatures::AMX));
        // The exposed table is no smaller than any other that a policy makes.
        let mut all = entries.clone();
        Policy::expose_all().apply(&mut all).unwrap();
        prop_assert!(set(&all).is_closed());
        for feature in set(&hidden).iter() {
            prop_assert!(set(&all).supports(&feature), "{feature}");
        }
    }

    /// A closed set is what its own registers say.
    #[test]
    fn a_closed_set_is_what_its_registers_say(entries in entries()) {
        let closed = set(&entries).closed();
        prop_assert!(closed.is_closed());
        let again = FeatureSet::from_cpuid(|leaf, subleaf| match leaf {
            0 => [0x1e, 0, 0, 0],
            7 if subleaf == 0 => {
                let [_, ebx, ecx, edx] = closed.leaf(7, 0);
                [1, ebx, ecx, edx]
            }
            _ => closed.leaf(leaf, subleaf),
        });
        prop_assert_eq!(again, closed);
    }
}

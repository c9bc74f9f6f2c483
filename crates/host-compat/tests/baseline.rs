//! Baselines: what real fleets share, and that it does not matter how a tally was made.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../cpuid-amx/tests/common/mod.rs"]
mod common;

use common::{diamond_rapids, entries, fixture};
use cpuid_amx::{
    AmxFeatures, CpuidTable, Feature, FeatureSet, Level, PermissionError, Policy, Table, coherence,
};
use host_compat::baseline::{MAX_KINDS, ObstacleKind, TooManyKinds};
use host_compat::host::Permission;
use host_compat::{Baseline, Fleet, Host};
use proptest::prelude::*;
use xsave_state::{ComponentId, XFeatures};

fn host(name: &str, table: Table) -> Host {
    let mut host = Host::from_cpuid(name, table);
    host.processor.name = format!("processor of {name}");
    host
}

fn fleet<'a>(hosts: impl IntoIterator<Item = &'a Host>) -> Fleet {
    let mut fleet = Fleet::new();
    for host in hosts {
        fleet.add(host).unwrap();
    }
    fleet
}

fn real(names: &[&str]) -> Vec<Host> {
    names.iter().map(|name| host(name, fixture(name))).collect()
}

fn loss<'a>(baseline: &'a Baseline, feature: &str) -> &'a host_compat::baseline::Loss {
    baseline
        .losses
        .iter()
        .find(|loss| loss.feature.to_string().starts_with(feature))
        .unwrap()
}

#[test]
fn no_hosts_share_nothing() {
    let baseline = Fleet::new().baseline();
    assert_eq!((baseline.hosts, baseline.losses.len()), (0, 0));
    assert_eq!(baseline.features, FeatureSet::default());
}

#[test]
fn one_generation_shares_all_that_it_has() {
    let hosts = real(&["sapphire-rapids", "sapphire-rapids"]);
    let baseline = fleet(&hosts).baseline();
    assert_eq!(baseline.hosts, 2);
    assert_eq!(baseline.features, hosts[0].guest_features());
    assert_eq!((baseline.losses, baseline.gains), (vec![], vec![]));
}

#[test]
fn the_older_generation_decides_and_is_named() {
    let mut hosts = real(&["granite-rapids", "sapphire-rapids"]);
    hosts.push(host("diamond", diamond_rapids()));
    let baseline = fleet(&hosts).baseline();
    assert_eq!(baseline.features.amx, Level::SapphireRapids.features());
    let fp16 = loss(&baseline, "AMX-FP16");
    assert_eq!(fp16.missing_on.hosts, 1);
    assert_eq!(fp16.missing_on.names, ["sapphire-rapids"]);
    assert_eq!(fp16.missing_on.processors, ["processor of sapphire-rapids"]);
    assert_eq!(loss(&baseline, "AMX-FP8").missing_on.hosts, 2);
    // HWP is a supervisor component that only the two have.
    assert_eq!(loss(&baseline, "HWP").missing_on.hosts, 1);
    // Without Sapphire Rapids there is FP16.
    let [gain] = &baseline.gains[..] else {
        panic!("{:?}", baseline.gains)
    };
    assert_eq!(gain.without.names, ["sapphire-rapids"]);
    assert!(gain.features.contains(&Feature::Amx(AmxFeatures::FP16)));
    assert!(!gain.features.contains(&Feature::Amx(AmxFeatures::FP8)));
}

#[test]
fn a_component_that_lies_elsewhere_is_not_shared() {
    let baseline = fleet(&real(&["ice-lake-server", "amd-zen4-genoa"])).baseline();
    let pkru: Vec<_> = baseline
        .losses
        .iter()
        .filter(|loss| matches!(loss.feature, Feature::Component(c) if c.id == ComponentId::PKRU))
        .collect();
    // At 2688, and at 2432: each is taken by the other.
    assert_eq!(pkru.len(), 2);
    assert!(pkru.iter().all(|loss| loss.missing_on.hosts == 1));
    assert_eq!(baseline.features.user().bits(), 0x7);
    // What needs PKRU and AVX-512 goes as well, on both.
    for name in ["ice-lake-server", "amd-zen4-genoa"] {
        let mut table = fixture(name);
        baseline.policy().apply(&mut table).unwrap();
        assert_eq!(coherence::check(&table), []);
        let [_, ebx, ecx, _] = table.leaf(7, 0);
        assert_eq!((ebx >> 16 & 1, ecx >> 3 & 1), (0, 0), "{name}");
    }
}

/// Every host has AMX, and none took it; but its data lies at two places.
#[test]
fn what_all_have_in_different_ways_is_explained() {
    let mut moved = fixture("sapphire-rapids");
    moved.set_leaf(0xd, 18, [8192, 2880, 6, 0]).unwrap();
    moved.set_leaf(0xd, 0, [0x602e7, 11072, 11072, 0]).unwrap();
    let hosts = [host("a", fixture("sapphire-rapids")), host("b", moved)];
    assert_eq!(
        hosts[1].guest_features().amx,
        Level::SapphireRapids.features()
    );
    let baseline = fleet(&hosts).baseline();
    assert_eq!(baseline.features.amx, AmxFeatures::empty());
    let tile = loss(&baseline, "AMX-TILE");
    assert_eq!(tile.missing_on.hosts, 0);
    let because = tile.because.unwrap();
    assert!(
        because
            .to_string()
            .starts_with("XTILEDATA (8192 bytes at 2")
    );
    assert_eq!(loss(&baseline, "XTILEDATA").missing_on.hosts, 1);
    assert_eq!(loss(&baseline, "XTILEDATA").because, None);
}

#[test]
fn hosts_say_why_they_have_no_amx() {
    let with = host("with", fixture("sapphire-rapids"));
    let old = Host {
        name: "old".into(),
        permission: Permission::Refused(PermissionError::KernelTooOld),
        ..with.clone()
    };
    let supported = XFeatures::from_bits_retain(0x2e7);
    let none = Host {
        name: "none".into(),
        permission: Permission::Refused(PermissionError::NotSupported { supported }),
        components: Some(supported),
        ..with.clone()
    };
    let baseline = fleet([&with, &old, &with]).baseline();
    let tile = loss(&baseline, "AMX-TILE");
    assert_eq!(tile.missing_on.names, ["old"]);
    assert_eq!(tile.missing_on.obstacle, Some(ObstacleKind::Permission));
    assert_eq!(baseline.gains[0].without.names, ["old"]);
    // Of two reasons none is told as the one.
    let baseline = fleet([&with, &none, &old]).baseline();
    assert_eq!(loss(&baseline, "AMX-TILE").missing_on.obstacle, None);
    assert_eq!(loss(&baseline, "AMX-TILE").missing_on.hosts, 2);
    // Either alone gives nothing of AMX back.
    let amx = |features: &[Feature]| features.iter().any(|f| matches!(f, Feature::Amx(_)));
    assert!(!baseline.gains.iter().any(|gain| amx(&gain.features)));
}

#[test]
fn the_first_names_are_kept_whatever_the_order() {
    let hosts: Vec<Host> = (0..40)
        .map(|n| Host::from_cpuid(format!("node-{n:02}"), fixture("haswell-client")))
        .collect();
    let forwards = fleet(&hosts);
    let backwards = fleet(hosts.iter().rev());
    assert_eq!(forwards, backwards);
    let kinds = forwards.kinds();
    assert_eq!(kinds[0].0.hosts, 40);
    let first: Vec<String> = (0..8).map(|n| format!("node-{n:02}")).collect();
    assert_eq!(kinds[0].0.names, first);
}

/// A host of its own kind: the offset of PKRU makes the difference.
fn odd(number: u32) -> Host {
    let mut table = fixture("ice-lake-server");
    let offset = 2688 + number * 8;
    table.set_leaf(0xd, 9, [8, offset, 0, 0]).unwrap();
    table
        .set_leaf(0xd, 0, [0x2e7, offset + 8, offset + 8, 0])
        .unwrap();
    Host::from_cpuid(format!("odd-{number}"), table)
}

#[test]
fn there_are_never_too_many_kinds() {
    let most = u32::try_from(MAX_KINDS).unwrap();
    let full = fleet(&(0..most).map(odd).collect::<Vec<_>>());
    assert_eq!(full.kinds().len(), MAX_KINDS);
    let one_more = odd(most);
    let error = TooManyKinds {
        kinds: MAX_KINDS + 1,
    };
    let mut fleet_of_all = full.clone();
    assert_eq!(fleet_of_all.add(&one_more), Err(error));
    assert_eq!(fleet_of_all.merge(fleet([&one_more])), Err(error));
    assert_eq!(fleet_of_all, full);
    // Those that are known still count.
    fleet_of_all.add(&odd(0)).unwrap();
    fleet_of_all.merge(fleet([&odd(1)])).unwrap();
    assert_eq!(fleet_of_all.hosts(), u64::from(most) + 2);
    let baseline = full.baseline();
    assert_eq!(baseline.losses.len() + baseline.more_losses, MAX_KINDS);
}

fn hosts() -> impl Strategy<Value = Vec<Host>> {
    let permission = prop_oneof![
        Just(Permission::NotAsked),
        Just(Permission::Granted(XFeatures::XTILEDATA)),
        Just(Permission::Refused(PermissionError::KernelTooOld)),
    ];
    let one = (entries(), "[a-d]{1,2}", permission).prop_map(|(entries, name, permission)| {
        let table: Table = entries.into_iter().collect();
        Host {
            permission,
            ..host(&name, table)
        }
    });
    prop::collection::vec(one, 1..8)
}

fn supported_by(hosts: &[&Host]) -> FeatureSet {
    hosts
        .iter()
        .map(|host| host.guest_features())
        .reduce(|a, b| a.intersection(&b))
        .unwrap_or_default()
        .closed()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    /// In parts, merged in any order and shape, it is the same as in one go.
    #[test]
    fn merges_are_associative_and_commutative(
        hosts in hosts(),
        parts in prop::collection::vec(0..4usize, 8),
        order in prop::collection::vec(any::<prop::sample::Index>(), 8),
    ) {
        let whole = fleet(&hosts);
        let mut split = vec![Fleet::new(); 4];
        for (host, part) in hosts.iter().zip(parts) {
            split[part].add(host).unwrap();
        }
        // Two at a time, whichever they are, until one is left.
        for pick in order.chunks(2) {
            if split.len() > 1 {
                let first = split.swap_remove(pick[0].index(split.len()));
                let second = pick[1].index(split.len());
                split[second].merge(first).unwrap();
            }
        }
        let mut merged = split.pop().unwrap();
        while let Some(rest) = split.pop() {
            merged.merge(rest).unwrap();
        }
        prop_assert_eq!(merged.baseline(), whole.baseline());
        prop_assert_eq!(merged.guest_cpu(), whole.guest_cpu());
        let written = |fleet| serde_json::to_string(fleet).unwrap();
        prop_assert_eq!(written(&merged), written(&whole));
        prop_assert_eq!(&merged, &whole);
        // Twice the same hosts are more, and share the same.
        merged.merge(whole.clone()).unwrap();
        prop_assert_eq!(merged.hosts(), 2 * whole.hosts());
        prop_assert_eq!(merged.baseline().features, whole.baseline().features);
        prop_assert_eq!(merged.guest_cpu(), whole.guest_cpu());
    }

    /// It is what every host supports, and nothing larger is.
    #[test]
    fn a_baseline_is_the_largest_that_all_support(mut hosts in hosts()) {
        // What is not described takes nothing away: tests/cases.rs.
        hosts.retain(Host::is_described);
        prop_assume!(!hosts.is_empty());
        for (index, host) in hosts.iter_mut().enumerate() {
            host.name = index.to_string();
        }
        let all: Vec<&Host> = hosts.iter().collect();
        let baseline = fleet(&hosts).baseline();
        prop_assert_eq!(&baseline.features, &supported_by(&all));
        prop_assert!(baseline.features.is_closed());
        for host in &hosts {
            let mut table = host.guest_cpuid().unwrap().clone();
            baseline.policy().apply(&mut table).unwrap();
            prop_assert_eq!(coherence::check(&table), []);
            let shown = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
            prop_assert_eq!(&shown, &baseline.features);
        }
        // Each feature that a host has is in it, or lost, with those who took it.
        for feature in hosts.iter().flat_map(|h| h.guest_features().iter().collect::<Vec<_>>()) {
            let loss = baseline.losses.iter().find(|loss| loss.feature == feature);
            prop_assert_eq!(loss.is_none(), baseline.features.supports(&feature));
            let takers = hosts.iter().filter(|h| !h.guest_features().supports(&feature)).count();
            if let Some(loss) = loss {
                prop_assert_eq!(loss.missing_on.hosts, takers as u64);
                prop_assert_eq!(loss.because.is_some(), takers == 0, "{}", feature);
            }
        }
        // What it gains without the hosts of a kind.
        let fleet = fleet(&hosts);
        for (kind, features) in fleet.kinds() {
            let obstacle = |h: &Host| h.obstacles().first().map(ObstacleKind::from);
            let others: Vec<&Host> = hosts
                .iter()
                .filter(|h| h.guest_features() != features || obstacle(h) != kind.obstacle)
                .collect();
            let without = supported_by(&others);
            let gained: Vec<Feature> =
                without.iter().filter(|f| !baseline.features.supports(f)).collect();
            let gain = baseline.gains.iter().find(|gain| gain.without == kind);
            prop_assert_eq!(gain.map_or(&[][..], |gain| &gain.features), &gained[..]);
        }
    }
}

/// Names, and what else a line can have, do not matter for how it is counted.
mod documents {
    use cpuid_amx::Entry;
    use host_compat::baseline::Lines;

    use super::*;

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn lines_are_counted_as_hosts_are(
            hosts in hosts(),
            names in prop::collection::vec(".{0,12}", 8),
            forms in prop::collection::vec(0..3, 8),
        ) {
            let mut lines = Lines::new();
            let mut one_by_one = Fleet::new();
            for (index, (name, form)) in names.into_iter().zip(forms).enumerate() {
                let host = Host { name, ..hosts[index % hosts.len()].clone() };
                let line = match form {
                    0 => serde_json::to_vec_pretty(&host),
                    // The fields in another order.
                    1 => serde_json::to_value(&host).and_then(|value| serde_json::to_vec(&value)),
                    _ => serde_json::to_vec(&host),
                };
                lines.add(&line.unwrap()).unwrap();
                one_by_one.add(&host).unwrap();
            }
            prop_assert_eq!(lines.into_fleet(), one_by_one);
        }

        #[test]
        fn a_part_is_read_as_it_was_written(hosts in hosts()) {
            let fleet = fleet(&hosts);
            let text = serde_json::to_string(&fleet).unwrap();
            prop_assert_eq!(serde_json::from_str::<Fleet>(&text).unwrap(), fleet);
        }
    }

    #[test]
    fn a_line_that_is_no_description_counts_for_nothing() {
        let host = host("a", fixture("sapphire-rapids"));
        let good = serde_json::to_string(&host).unwrap();
        let mut lines = Lines::new();
        for bad in [
            good.replacen("\"family\":6", "\"family\":-6", 1),
            good.replacen("\"version\":2", "\"version\":0", 1),
            good[..good.len() - 1].to_owned(),
            good.replacen("\"name\":\"a\"", "\"name\":\"a\tb\"", 1),
            good.replacen(
                "\"name\":\"a\"",
                &format!("\"name\":\"{}\"", "x".repeat(257)),
                1,
            ),
            String::new(),
        ] {
            assert_ne!(bad, good);
            assert!(lines.add(bad.as_bytes()).is_err());
            // Nor is it remembered: the second time it is read again.
            assert!(lines.add(bad.as_bytes()).is_err());
        }
        lines.add(good.as_bytes()).unwrap();
        let other = good.replacen("\"name\":\"a\"", "\"name\":\"b\"", 1);
        lines.add(other.as_bytes()).unwrap();
        let fleet = lines.into_fleet();
        assert_eq!(fleet.hosts(), 2);
        assert_eq!(fleet.kinds()[0].0.names, ["a", "b"]);
    }

    #[test]
    fn lines_of_too_many_kinds_are_refused() {
        let mut lines = Lines::new();
        let most = u32::try_from(MAX_KINDS).unwrap();
        let line = |number| serde_json::to_vec(&odd(number)).unwrap();
        for number in 0..most {
            lines.add(&line(number)).unwrap();
        }
        assert!(lines.add(&line(most)).is_err());
        lines.add(&line(0)).unwrap();
        assert_eq!(lines.into_fleet().hosts(), u64::from(most) + 1);
    }

    #[test]
    fn a_broken_part_is_refused_by_name() {
        let fleet = fleet(&real(&["sapphire-rapids", "haswell-client"]));
        let text = serde_json::to_string(&fleet).unwrap();
        for (what, instead, because) in [
            ("\"version\":3", "\"version\":9", "amx-fleet of version 9"),
            (
                "\"format\":\"amx-fleet\"",
                "\"format\":\"amx-host\"",
                "expected is \"amx-fleet\"",
            ),
            ("\"hosts\":1", "\"hosts\":0", "kinds[0]: hosts is 0"),
            ("\"hosts\":1", "\"count\":1", "unknown field `count`"),
            (
                "\"names\":[\"haswell-client\"]",
                "\"names\":[\"\"]",
                "names has empty ones",
            ),
            (
                "\"names\":[\"haswell-client\"]",
                "\"names\":[\"1\",\"2\",\"3\",\"4\",\"5\",\"6\",\"7\",\"8\",\"9\"]",
                "9 names; the limit is 8",
            ),
            (
                "\"obstacle\":\"processor\"",
                "\"obstacle\":\"luck\"",
                "unknown variant `luck`",
            ),
            (
                "\"vendors\":[\"GenuineIntel\"]",
                "\"vendors\":[\"\"]",
                "shared.vendors has empty ones",
            ),
            (
                "\"somewhere\":false,\"everywhere\":false",
                "\"somewhere\":false,\"everywhere\":true",
                "is not what hosts share",
            ),
            (
                "\"leaf\":\"0x80000021\",\"subleaf\":\"0x0\"",
                "\"leaf\":\"0x80000021\",\"subleaf\":\"0x1\"",
                "are not those that are compared",
            ),
            // An area that contradicts itself, and a register that no set of features makes.
            (
                "\"ecx\":\"0x340\"",
                "\"ecx\":\"0x341\"",
                "is not what a coherent set of features makes",
            ),
            (
                "\"leaf\":\"0x0\",\"eax\":\"0x1e\"",
                "\"leaf\":\"0x0\",\"eax\":\"0x1f\"",
                "coherent set",
            ),
        ] {
            let broken = text.replacen(what, instead, 1);
            assert_ne!(broken, text, "{what}");
            let error = serde_json::from_str::<Fleet>(&broken)
                .unwrap_err()
                .to_string();
            assert!(error.contains(because), "{error}");
        }
        // A kind that is there twice.
        let start = text.find("\"kinds\":[").unwrap() + 9;
        let end = text.find("},{\"hosts\"").unwrap() + 1;
        let twice = format!("{}{},{}", &text[..start], &text[start..end], &text[start..]);
        let error = serde_json::from_str::<Fleet>(&twice)
            .unwrap_err()
            .to_string();
        assert!(error.contains("kinds[1] is there twice"), "{error}");
    }

    #[test]
    fn names_in_any_form_are_the_same() {
        let entry = Entry {
            leaf: 0,
            subleaf: None,
            value: [1, 0, 0, 0],
        };
        let host = Host::from_cpuid("ab", [entry].into_iter().collect());
        let plain = serde_json::to_string(&host).unwrap();
        let escaped = plain.replacen("\"ab\"", "\"\\u0061b\"", 1);
        let mut lines = Lines::new();
        for line in [
            &plain,
            &escaped,
            &format!("{plain}\n"),
            &format!(" {plain}"),
        ] {
            lines.add(line.as_bytes()).unwrap();
        }
        let fleet = lines.into_fleet();
        assert_eq!(fleet.hosts(), 4);
        assert_eq!(fleet.kinds()[0].0.names, ["ab"]);
    }
}

#[test]
fn a_policy_of_a_baseline_is_refused_where_a_host_is_not_of_the_fleet() {
    let baseline = fleet(&real(&["granite-rapids"])).baseline();
    let mut table = fixture("sapphire-rapids");
    assert!(baseline.policy().apply(&mut table).is_err());
    assert_eq!(table, fixture("sapphire-rapids"));
    assert_eq!(Policy::expose_all().apply(&mut table), Ok(vec![]));
}

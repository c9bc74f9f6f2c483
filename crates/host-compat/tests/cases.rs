//! Situations from the field: each file is one, and siblings are made from it.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::path::Path;

use cpuid_amx::{AmxFeatures, Contradiction, CpuidTable, Policy, Table, coherence};
use host_compat::baseline::ObstacleKind;
use host_compat::compat::{self, Compatibility, Guest, NotCompared, Reason, Verdict};
use host_compat::host::{NoKvm, Obstacle, Permission};
use host_compat::kernel::State;
use host_compat::update::{self, Lost, Strands};
use host_compat::{Fleet, Host};
use xsave_state::{ExtendedState, Layout, XFeatures};

fn text(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cases");
    std::fs::read_to_string(path.join(name)).unwrap()
}

fn host(name: &str) -> Host {
    serde_json::from_str(&text(&format!("{name}.json"))).unwrap()
}

fn dump(name: &str) -> Table {
    text(&format!("{name}.cpuid")).parse().unwrap()
}

fn told(compatibility: Compatibility) -> Compatibility {
    for reason in &compatibility.reasons {
        println!("{reason}");
    }
    compatibility
}

/// A new guest of one host on another.
fn fresh(from: &Host, to: &Host) -> Compatibility {
    told(compat::check(Guest::of_host(from).unwrap(), to))
}

/// One that runs there, with all enabled that Linux enables.
fn running(from: &Host, to: &Host) -> Compatibility {
    let table = from.guest_cpuid().unwrap().clone();
    let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).unwrap();
    let states = [ExtendedState::reset(&layout)];
    told(compat::check(
        Guest::of_host(from).unwrap().running(&states),
        to,
    ))
}

fn all(compatibility: &Compatibility) -> String {
    let reasons = compatibility.reasons.iter().map(ToString::to_string);
    reasons.collect::<Vec<_>>().join("; ")
}

#[test]
fn other_hosts() {
    let lab = host("amx-lab");
    let poor = running(&lab, &host("poor"));
    assert_eq!(poor.verdict(), Verdict::No);
    for name in ["AES", "FMA", "AVX", "AVX2", "AVX512F", "AVX512-FP16"] {
        assert!(all(&poor).contains(name), "{name}");
    }
    let amd = fresh(&lab, &host("amd"));
    assert_eq!(amd.verdict(), Verdict::No);
    assert!(
        amd.reasons
            .iter()
            .any(|reason| matches!(reason, Reason::Vendor { .. }))
    );
}

#[test]
fn an_older_kvm_on_a_newer_processor() {
    let older = host("dmr612");
    let amx = older.guest_features().amx;
    let expected = AmxFeatures::TILE
        | AmxFeatures::INT8
        | AmxFeatures::BF16
        | AmxFeatures::FP16
        | AmxFeatures::COMPLEX;
    assert_eq!(amx, expected);
    assert_eq!(older.obstacles(), []);
    assert_eq!(running(&host("k612"), &older).verdict(), Verdict::Runs);
    // What a policy makes says so no more.
    let mut table = older.guest_cpuid().unwrap().clone();
    Policy::expose_all().apply(&mut table).unwrap();
    assert_eq!(table.leaf(0x1e, 0)[0], 0);
    assert_eq!(coherence::check(&table), []);
}

#[test]
fn backports_are_not_known_by_the_version() {
    let host = host("al8");
    assert_eq!(host.obstacles(), []);
    assert!(host.fixes().all(|(_, state)| state == State::Unknown));
    // Whatever says that there is AMX.
    let mut bare = host.clone();
    bare.processor.amx = AmxFeatures::empty();
    bare.components = None;
    bare.kvm = Err(NoKvm::NoDevice);
    assert!(bare.fixes().all(|(_, state)| state == State::Unknown));
    bare.permission = Permission::NotAsked;
    assert!(bare.fixes().any(|(_, state)| state == State::NotAffected));
}

#[test]
fn hosts_that_are_not_described_take_nothing_away() {
    let lab = host("k612");
    let alone = {
        let mut fleet = Fleet::new();
        fleet.add(&lab).unwrap();
        fleet.baseline()
    };
    for (name, obstacle) in [
        ("nokvm", ObstacleKind::Kvm),
        ("refused", ObstacleKind::Permission),
        ("prepermission", ObstacleKind::Contradiction),
    ] {
        let mut fleet = Fleet::new();
        fleet.add(&lab).unwrap();
        fleet.add(&host(name)).unwrap();
        let baseline = fleet.baseline();
        assert_eq!(baseline.hosts, 2);
        assert_eq!(baseline.features, alone.features, "{name}");
        assert_eq!(baseline.losses, []);
        assert_eq!(baseline.undescribed.len(), 1);
        assert_eq!(baseline.undescribed[0].obstacle, Some(obstacle), "{name}");
        // Merged in parts it is the same.
        let text = serde_json::to_string(&fleet).unwrap();
        let part: Fleet = serde_json::from_str(&text).unwrap();
        assert_eq!(part.baseline(), baseline);
    }
    let unknown = fresh(&lab, &host("nokvm"));
    assert_eq!(unknown.verdict(), Verdict::Unknown);
    assert!(matches!(unknown.not_compared[..], [NotCompared::Host(_)]));
}

#[test]
fn cpuid_from_before_the_permission() {
    let before = host("prepermission");
    assert!(!before.is_described());
    let obstacles: Vec<String> = before.obstacles().iter().map(ToString::to_string).collect();
    assert_eq!(obstacles.len(), 1, "{obstacles:?}");
    assert!(obstacles[0].contains("ask KVM again after ARCH_REQ_XCOMP_GUEST_PERM"));
    assert_eq!(fresh(&before, &before).verdict(), Verdict::Runs);
    // TILECFG without TILEDATA, as before Linux 6.4.
    let table = dump("before");
    let found = coherence::check(&table);
    assert!(
        found
            .iter()
            .any(|found| matches!(found, Contradiction::BeforePermission { .. }))
    );
    let of_dump = Host::from_cpuid("dump", table.clone());
    assert_eq!(fresh(&of_dump, &of_dump).verdict(), Verdict::Runs);
    let mut hidden = table;
    Policy::expose_all().apply(&mut hidden).unwrap();
    assert_eq!(hidden.leaf(0xd, 0)[0], 0x2e7);
}

#[test]
fn a_filter_is_said_and_what_to_do() {
    let refused = host("refused");
    let [Obstacle::Permission(error)] = refused.obstacles()[..] else {
        panic!("{:?}", refused.obstacles())
    };
    assert!(error.to_string().contains("seccomp"));
}

#[test]
fn a_kvm_that_rewrites_cpuid_hides_nothing() {
    let rewrites = host("rewr");
    let guest = fresh(&host("k612"), &rewrites);
    assert_eq!((guest.verdict(), guest.hidden), (Verdict::No, None));
}

#[test]
fn one_processor_and_two_kernels() {
    let (older, newer) = (host("k612"), host("k618"));
    assert_eq!(fresh(&older, &newer).verdict(), Verdict::Runs);
    let hide = Verdict::RunsAfter {
        relayout: false,
        hide: true,
    };
    let new = fresh(&newer, &older);
    assert_eq!(new.verdict(), hide);
    let hidden = new.hidden.unwrap();
    let [_, _, ecx, edx] = hidden.leaf(7, 0);
    assert_eq!((ecx >> 7 & 1, edx >> 20 & 1), (0, 0));
    assert_eq!(running(&newer, &older).verdict(), Verdict::No);

    let mut fleet = Fleet::new();
    fleet.add(&older).unwrap();
    fleet.add(&newer).unwrap();
    let baseline = fleet.baseline();
    assert!(!baseline.losses.is_empty());
    assert!(baseline.losses.iter().all(|loss| loss.by_kernel));
    // Another processor: who knows.
    let mut other = newer;
    other.processor.name = "another".into();
    let mut fleet = Fleet::new();
    fleet.add(&older).unwrap();
    fleet.add(&other).unwrap();
    assert!(fleet.baseline().losses.iter().all(|loss| !loss.by_kernel));
}

#[test]
fn contradictions_are_named_with_each_feature() {
    let host = host("no512");
    let said: Vec<String> = host.obstacles().iter().map(ToString::to_string).collect();
    let said = said.join("; ");
    for name in ["AVX512F", "PKU"] {
        assert!(said.contains(name), "{name}: {said}");
    }
    // Nobody is given what cannot be used there.
    let base = self::host("k612");
    let guest = fresh(&base, &host);
    assert!(all(&guest).contains("AVX512F"));

    let masked = dump("gnr-t2");
    let found = fresh(
        &Host::from_cpuid("t2", masked.clone()),
        &Host::from_cpuid("t2", masked),
    );
    assert_eq!(found.verdict(), Verdict::Runs);
    let contradictions = &found.contradictions;
    assert!(
        contradictions
            .iter()
            .any(|one| matches!(one, Contradiction::AreaSize { .. }))
    );
    assert!(
        contradictions
            .iter()
            .any(|one| matches!(one, Contradiction::SupervisorWithoutXsaves { .. }))
    );
}

#[test]
fn kvm_that_copies_less_than_its_cpuid_describes() {
    let mut short = host("k612");
    short
        .kvm
        .as_mut()
        .unwrap()
        .capabilities
        .as_mut()
        .unwrap()
        .xsave2 = 4096;
    assert!(matches!(
        short.obstacles()[..],
        [Obstacle::Area {
            copied_bytes: 4096,
            required_bytes: 11_008
        }]
    ));
}

/// An update gives and takes, and says whom it strands.
#[test]
fn an_update_and_whom_it_strands() {
    let (older, newer) = (host("k612"), host("k618"));
    let up = update::changes(&older, &newer);
    assert_eq!((up.lost.len(), up.undescribed), (0, false));
    assert!(!up.gained.is_empty() && up.kernels.is_some());
    assert!(
        up.fixes
            .iter()
            .all(|(_, _, after)| *after == State::Present)
    );
    let down = update::changes(&newer, &older);
    assert_eq!(down.gained, []);
    let strands = |name: &str| {
        let lost = down
            .lost
            .iter()
            .find(|lost| lost.reason.to_string().contains(name));
        lost.unwrap().strands
    };
    assert_eq!(strands("CET_U"), Strands::Enabled(XFeatures::CET_U));
    assert_eq!(strands("SHSTK"), Strands::Seen);
    let same = update::changes(&older, &older);
    assert_eq!(
        (same.lost, same.gained, same.fixes, same.kernels),
        (vec![], vec![], vec![], None)
    );
    assert!(update::changes(&older, &host("nokvm")).undescribed);
    // A component that has moved is lost where it was.
    let mut moved = older.clone();
    let cpuid = &mut moved.kvm.as_mut().unwrap().cpuid;
    let [eax, ebx, ecx, edx] = cpuid.leaf(0xd, 18);
    cpuid.set_leaf(0xd, 18, [eax, ebx + 64, ecx, edx]).unwrap();
    cpuid
        .set_leaf(0xd, 0, [0x602e7, 11_072, 11_072, 0])
        .unwrap();
    let moved = update::changes(&older, &moved);
    assert!(matches!(
        moved.lost[..],
        [Lost {
            reason: Reason::Elsewhere { .. },
            strands: Strands::Enabled(XFeatures::XTILEDATA)
        }]
    ));
    assert_eq!(moved.gained, []);
}

//! No reader panics, whatever a file has: fixtures with bytes changed, cut, doubled and exchanged.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::sync::LazyLock;

use amxctl::diff::diff;
use amxctl::open::open_bytes;
use amxctl::{Given, parts, rules};
use common::fixture;
use proptest::prelude::*;
use xsave_state::wire;

#[test]
fn text_that_is_nested_without_end_is_refused() {
    let text = format!("vcpu 0:\n{}", "A {\n".repeat(1_000_000));
    let error = open_bytes(text.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("nested deeper than 64"), "{error}");
}

#[test]
fn text_that_has_more_than_an_area_is_refused() {
    let words = "0,\n".repeat(20_000);
    let text = format!("vcpu 0:\nA {{\nxsave: B {{\nentries: [\n{words}],\n}},\n}}\n");
    let error = open_bytes(text.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("at most 65536 bytes"), "{error}");
}

#[test]
fn a_core_dump_with_a_larger_area_than_there_can_be_is_refused() {
    let mut core = fixture("process.core");
    // A second note of 70,000 bytes behind the others.
    let mut note = Vec::new();
    for word in [6u32, 70_000, 0x202] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(b"LINUX\0\0\0");
    note.resize(note.len() + 70_000, 0);
    core.extend_from_slice(&note);
    let bytes = (core.len() - 120) as u64;
    core[64 + 32..64 + 40].copy_from_slice(&bytes.to_le_bytes());
    let error = open_bytes(&core).unwrap_err().to_string();
    assert!(error.contains("at most 65536 are possible"), "{error}");
}

#[test]
fn a_snapshot_with_a_larger_area_than_there_can_be_is_refused() {
    let with_extra = |words: usize| {
        let file = common::cloud_hypervisor(|state| {
            state["Kvm"]["xsave"]["extra"] = vec![0; words].into();
        });
        open_bytes(&file)
    };
    let most = 65_536 / 4 - 1024;
    assert_eq!(with_extra(most).unwrap().vcpus[0].area.len(), 65_536);
    let error = with_extra(most + 1).unwrap_err().to_string();
    assert!(error.contains("at most 15360 numbers"), "{error}");
}

#[test]
fn a_snapshot_with_more_vcpus_than_there_can_be_is_refused() {
    let vcpu = r#"{"snapshot_data":{"state":""}}"#;
    let vcpus: Vec<String> = (0..5000).map(|id| format!("\"{id}\":{vcpu}")).collect();
    let vcpus = vcpus.join(",");
    let file = format!(r#"{{"snapshots":{{"cpu-manager":{{"snapshots":{{{vcpus}}}}}}}}}"#);
    let error = open_bytes(file.as_bytes()).unwrap_err().to_string();
    assert!(error.contains("at most 4096 vCPUs"), "{error}");
}

/// An ELF core whose program headers would be 15 GB of a hole in the file: with a limit on its memory
/// the tool dies if it takes them.
#[test]
fn a_core_dump_of_holes_takes_no_memory() {
    let mut start = fixture("process.core")[..64].to_vec();
    let (headers, sections) = (1u64 << 28, 64u64);
    start[32..40].copy_from_slice(&128u64.to_le_bytes());
    start[40..48].copy_from_slice(&sections.to_le_bytes());
    // e_phnum is PN_XNUM; e_shentsize, e_shnum.
    start[56..58].copy_from_slice(&0xffffu16.to_le_bytes());
    start[58..60].copy_from_slice(&64u16.to_le_bytes());
    start[60..62].copy_from_slice(&1u16.to_le_bytes());
    start.resize(128, 0);
    // sh_info of the first section header.
    start[64 + 44..64 + 48].copy_from_slice(&(headers as u32).to_le_bytes());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("holes.core");
    std::fs::write(&path, &start).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    if let Err(error) = file.set_len(128 + headers * 56) {
        println!("skipped: no files of 15 GB here: {error}");
        return;
    }
    let output = std::process::Command::new("sh")
        .args(["-c", "ulimit -v 1000000; exec \"$0\" inspect \"$1\""])
        .arg(snapbox::cmd::cargo_bin("amxctl"))
        .arg(&path)
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert!(said.contains("there are 268435456"), "{said}");
}

/// One file of each format.
static FILES: LazyLock<Vec<Vec<u8>>> = LazyLock::new(files);

fn files() -> Vec<Vec<u8>> {
    let subject = common::subject(&fixture("live-tiles.xsave2"));
    let state = subject.state().unwrap();
    let mut compacted = state.image().to_compacted();
    compacted[464..472].copy_from_slice(&0x602e7u64.to_le_bytes());
    vec![
        wire::encode(0, &state),
        [wire::encode(0, &state), wire::encode(1, &state)].concat(),
        fixture("live-tiles.xsave2"),
        compacted,
        fixture("cloud-hypervisor/state.json"),
        fixture("firecracker.txt"),
        fixture("process.core"),
    ]
}

#[derive(Clone, Debug)]
enum Mutation {
    Set(usize, u8),
    Flip(usize, u8),
    Number(usize, u32),
    Cut(usize),
    Copy(usize, usize, usize),
    Remove(usize, usize),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let extreme = prop_oneof![
        Just(0u32),
        Just(u32::MAX),
        Just(1 << 31),
        Just(64),
        any::<u32>()
    ];
    prop_oneof![
        (any::<usize>(), any::<u8>()).prop_map(|(at, byte)| Mutation::Set(at, byte)),
        (any::<usize>(), 0u8..8).prop_map(|(at, bit)| Mutation::Flip(at, bit)),
        (any::<usize>(), extreme).prop_map(|(at, number)| Mutation::Number(at, number)),
        any::<usize>().prop_map(Mutation::Cut),
        (any::<usize>(), any::<usize>(), 0usize..600)
            .prop_map(|(from, to, len)| Mutation::Copy(from, to, len)),
        (any::<usize>(), 0usize..200).prop_map(|(at, len)| Mutation::Remove(at, len)),
    ]
}

fn apply(bytes: &mut Vec<u8>, mutation: &Mutation) {
    let len = bytes.len();
    if len == 0 {
        return;
    }
    match *mutation {
        Mutation::Set(at, byte) => bytes[at % len] = byte,
        Mutation::Flip(at, bit) => bytes[at % len] ^= 1 << bit,
        Mutation::Number(at, number) => {
            // Headers are at the start: half of the numbers go there.
            let at = if at & 1 == 0 {
                at % len
            } else {
                (at >> 1) % len.min(600)
            };
            for (to, from) in bytes[at..].iter_mut().zip(number.to_le_bytes()) {
                *to = from;
            }
        }
        Mutation::Cut(at) => bytes.truncate(at % len),
        Mutation::Copy(from, to, count) => {
            let piece: Vec<u8> = bytes[from % len..].iter().copied().take(count).collect();
            let to = to % len;
            bytes.splice(to..to, piece);
        }
        Mutation::Remove(at, count) => {
            let at = at % len;
            bytes.drain(at..(at + count).min(len));
        }
    }
}

/// All that the tool does with a file.
fn exercise(bytes: &[u8]) {
    let snapshot = match open_bytes(bytes) {
        Ok(snapshot) => snapshot,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };
    let mut subjects = Vec::new();
    for vcpu in snapshot.vcpus {
        subjects.push(vcpu.subject(&Given::default()));
    }
    for subject in &subjects {
        let broken = |finding: &rules::Finding| finding.verdict == rules::Verdict::Broken;
        // What cannot be restored breaks a rule.
        if subject.doubt.is_none() && subject.restorable().is_err() {
            assert!(rules::check(subject).iter().any(broken));
        }
        let palette = parts::palette(subject);
        for component in subject.layout.value.components() {
            let content = subject.component(component.id());
            assert!(content.len() <= component.size());
            let _ = parts::of(component, palette.as_ref());
        }
        let _ = diff(subject, &subjects[0]);
        assert!(diff(subject, subject).is_empty());
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_mutated_file_of_any_format_is_read_or_refused(
        mutations in proptest::collection::vec(mutation(), 1..6)
    ) {
        for mut bytes in FILES.clone() {
            for mutation in &mutations {
                apply(&mut bytes, mutation);
            }
            exercise(&bytes);
        }
    }

    #[test]
    fn anything_behind_a_known_beginning_is_read_or_refused(
        start in 0usize..7,
        rest in proptest::collection::vec(any::<u8>(), 0..2000)
    ) {
        let mut bytes = FILES[start].iter().copied().take(20).collect::<Vec<u8>>();
        bytes.extend(rest);
        exercise(&bytes);
    }
}

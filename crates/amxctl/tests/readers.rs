//! Every format is read as its writer meant it, and what is broken is named with its place.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use amxctl::open::open_bytes;
use amxctl::vcpu::Places;
use amxctl::{Format, Given, OpenError};
use common::{cloud_hypervisor, fixture, fixtures, open, subject};
use cpuid_amx::CpuidTable;
use xsave_state::wire;
use xsave_state::{ComponentId, ExtendedState, XFeatures};

const AMX: u64 = 0x602e7;
const XTILEDATA: u64 = 0x40000;

#[test]
fn a_snapshot_of_cloud_hypervisor_has_all_that_it_says() {
    for path in ["cloud-hypervisor", "cloud-hypervisor/state.json"] {
        let snapshot = open(path).unwrap();
        assert_eq!(snapshot.format, Format::CloudHypervisor);
        let [vcpu] = &*snapshot.vcpus else {
            panic!("one vCPU")
        };
        assert_eq!(vcpu.area, fixture("armed.xsave2"));
        assert_eq!(vcpu.listed.xcrs.as_ref().unwrap().list[0], (0, AMX));
        assert_eq!(vcpu.listed.msr(0x1c4), Some(XTILEDATA));
        assert_eq!(vcpu.listed.msr(0x1c5), Some(0));
        assert!(vcpu.listed.is_complete && vcpu.listed.tsc_khz.is_some());
        let Places::Cpuid(cpuid) = &vcpu.places else {
            panic!("CPUID")
        };
        assert_eq!(cpuid.table.leaf(0xd, 18), [8192, 2816, 6, 0]);
    }
}

#[test]
fn vcpus_of_cloud_hypervisor_are_in_the_order_of_their_numbers() {
    let mut file: serde_json::Value =
        serde_json::from_slice(&fixture("cloud-hypervisor/state.json")).unwrap();
    let vcpus = file
        .pointer_mut("/snapshots/cpu-manager/snapshots")
        .unwrap();
    for id in [2, 10, 1] {
        vcpus[id.to_string()] = vcpus["0"].clone();
    }
    let snapshot = open_bytes(file.to_string().as_bytes()).unwrap();
    let ids: Vec<u32> = snapshot.vcpus.iter().map(|v| v.owner.id()).collect();
    assert_eq!(ids, [0, 1, 2, 10]);
}

#[test]
fn an_area_without_extra_is_as_short_as_it_is() {
    let short = cloud_hypervisor(|state| {
        state["Kvm"]["xsave"]
            .as_object_mut()
            .unwrap()
            .remove("extra");
    });
    assert_eq!(subject(&short).area.len(), 4096);
}

#[test]
fn the_text_of_firecracker_has_the_same_layout_and_no_xfd() {
    let snapshot = open("firecracker.txt").unwrap();
    assert_eq!(snapshot.format, Format::Firecracker);
    let vcpu = &snapshot.vcpus[0];
    assert_eq!(vcpu.area.len(), 11_008);
    assert_eq!(vcpu.listed.xcrs.as_ref().unwrap().list[0], (0, AMX));
    assert_eq!(vcpu.listed.msr(0x1c4), None);
    let Places::Cpuid(cpuid) = &vcpu.places else {
        panic!("CPUID")
    };
    let table = &cpuid.table;
    assert_eq!(table.len(), 61);
    assert_eq!(table.leaf(0xd, 18), [8192, 2816, 6, 0]);
    // Leaf 1 has no sub-leaves, leaf 7 has.
    assert_eq!(table.leaf(1, 99), table.leaf(1, 0));
    assert_eq!(table.leaf(7, 99), [0; 4]);
    let subject = snapshot.vcpus[0].clone().subject(&Given::default());
    assert_eq!(subject.xstate_bv().bits(), 0x2a2);
    assert!(subject.state().is_ok());
}

#[test]
fn the_xcrs_of_firecracker_are_as_many_as_it_says() {
    let text = String::from_utf8(fixture("firecracker.txt")).unwrap();
    for (count, xcr0) in [("0", 1), ("17", 1), ("1", AMX)] {
        let changed = text.replacen("nr_xcrs: 1,", &format!("nr_xcrs: {count},"), 1);
        assert_eq!(changed == text, count == "1");
        let subject = subject(changed.as_bytes());
        assert_eq!(subject.xcr0.value.bits(), xcr0, "{count}");
        let unsettled = subject.unsettled().map(|finding| finding.rule);
        let expected = (count != "1").then_some(amxctl::rules::Rule::Xcr0);
        assert_eq!(unsettled, expected, "{count}");
    }
}

#[test]
fn two_vcpus_in_the_text_of_firecracker_are_two() {
    let text = String::from_utf8(fixture("firecracker.txt")).unwrap();
    let both = format!("{text}\n{}", text.replace("vcpu 0:", "vcpu 1:"));
    let snapshot = open_bytes(both.as_bytes()).unwrap();
    let ids: Vec<u32> = snapshot.vcpus.iter().map(|v| v.owner.id()).collect();
    assert_eq!(ids, [0, 1]);
    assert_eq!(snapshot.vcpus[0].area, snapshot.vcpus[1].area);
}

#[test]
fn a_raw_area_is_guessed_as_the_cpuid_would_say() {
    let raw = subject(&fixture("armed.xsave2"));
    let known = subject(&fixture("cloud-hypervisor/state.json"));
    assert_eq!(raw.layout.value.standard_size(), 11_008);
    assert_eq!(raw.layout.value, known.layout.value);
}

#[test]
fn states_of_ours_come_back_as_they_were() {
    let subject = subject(&fixture("live-tiles.xsave2"));
    let state = subject.state().unwrap();
    let again = common::subject(&wire::encode(0, &state));
    assert_eq!(again.state().unwrap(), state);

    let reset = ExtendedState::reset(state.layout());
    let both = [wire::encode(7, &reset), wire::encode(3, &state)].concat();
    let snapshot = open_bytes(&both).unwrap();
    assert_eq!(snapshot.format, Format::State);
    let states: Vec<_> = snapshot
        .vcpus
        .into_iter()
        .map(|vcpu| (vcpu.owner.id(), vcpu.subject(&Given::default())))
        .collect();
    assert_eq!(states[0].0, 3);
    assert_eq!(states[0].1.state().unwrap(), state);
    assert_eq!(states[1].0, 7);
    assert_eq!(states[1].1.state().unwrap(), reset);
}

#[test]
fn two_states_of_the_same_vcpu_are_refused() {
    let subject = subject(&fixture("live-tiles.xsave2"));
    let state = wire::encode(3, &subject.state().unwrap());
    let error = open_bytes(&[&state[..], &state].concat()).unwrap_err();
    assert_eq!(
        error.to_string(),
        "vCPU 3 is in the file twice: only one of the two states can be its own"
    );
    // One that is damaged is named, with its place.
    let mut damaged = [&state[..], &state].concat();
    *damaged.last_mut().unwrap() ^= 1;
    let error = open_bytes(&damaged).unwrap_err().to_string();
    let place = format!(
        "the state at byte {} (vCPU 3): the state is damaged",
        state.len()
    );
    assert!(error.contains(&place), "{error}");
}

#[test]
fn a_compacted_area_is_understood() {
    let standard = subject(&fixture("live-tiles.xsave2"));
    let mut compacted = standard.state().unwrap().image().to_compacted();
    // What Linux says of its area, so that the layout can be guessed.
    compacted[464..472].copy_from_slice(&AMX.to_le_bytes());
    let subject = subject(&compacted);
    assert!(subject.is_compacted());
    assert_eq!(
        subject.component(ComponentId::XTILEDATA),
        standard.component(ComponentId::XTILEDATA)
    );
}

#[test]
fn what_is_given_comes_before_what_the_file_says() {
    let vcpu = open("cloud-hypervisor").unwrap().vcpus.remove(0);
    let given = Given {
        xfd: Some(XFeatures::empty()),
        ..Given::default()
    };
    let subject = vcpu.subject(&given);
    assert_eq!(subject.registers().xfd, XFeatures::empty());
}

#[test]
fn broken_files_are_named_with_the_byte() {
    let state = fixture("cloud-hypervisor/state.json");
    let firecracker = fixture("firecracker.txt");
    let cut = |bytes: &[u8], at: usize| bytes[..at].to_vec();
    let replaced = |bytes: &[u8], from: &str, to: &str| {
        let text = String::from_utf8(bytes.to_vec()).unwrap();
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1).into_bytes()
    };
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (
            cut(&state, 1000),
            "byte 1000 of the file: EOF while parsing a string",
        ),
        (
            replaced(&state, r#"\"eax\":32"#, r#"\"eax\":x"#),
            "byte 57 of the state of vCPU 0: expected value",
        ),
        (
            cloud_hypervisor(|state| {
                state["Kvm"]["xsave"]["region"]
                    .as_array_mut()
                    .unwrap()
                    .pop();
            }),
            "vCPU 0: expected 1024 words in xsave.region, found 1023",
        ),
        (
            cloud_hypervisor(|state| {
                state["Kvm"].as_object_mut().unwrap().remove("xcrs");
            }),
            "missing field `xcrs`",
        ),
        (
            br#"{"snapshots":{"x":{}}}"#.to_vec(),
            "expected .snapshots[\"cpu-manager\"], found the keys [\"snapshots\"]",
        ),
        (
            br#"{"snapshots":{"cpu-manager":{"snapshots":{}}}}"#.to_vec(),
            "there is no vCPU's XSAVE state in it",
        ),
        (
            br#"{"format":"amx-host","version":1}"#.to_vec(),
            "this describes a host",
        ),
        (
            cut(&firecracker, 60_000),
            "expected a closing bracket behind it",
        ),
        (
            replaced(&firecracker, "vcpu 0:", "vcpu one:"),
            "byte 0 (line 1): expected `vcpu N:`, found \"vcpu one:\"",
        ),
        (
            replaced(&firecracker, "eax: 32,", "eax: many,"),
            "(line 14): expected a number, found \"eax: many,\"",
        ),
        (
            fixture("firecracker.vmstate-start"),
            "this is a Firecracker vmstate",
        ),
        (
            b"QEVM\0\0\0\x03".to_vec(),
            "this is a QEMU migration stream",
        ),
        (
            b"LibvirtQemudSave\x02\0\0\0".to_vec(),
            "this is a save file of libvirt",
        ),
        (
            b"LibvirtQemudPart\x02\0\0\0".to_vec(),
            "this is a save file of libvirt",
        ),
        (b"KDUMP   \x06\0\0\0".to_vec(), "this is a kdump"),
        (b"DISKDUMP\x06\0\0\0".to_vec(), "this is a kdump"),
        (b"makedumpfile\0\0\0\0".to_vec(), "this is a kdump"),
        (
            b"\x19\x43\x56\x54\x47\x38\x05\x55".to_vec(),
            "this is an image of CRIU",
        ),
        (b"QFI\xfb\0\0\0\x03".to_vec(), "this is a qcow2 image"),
        (
            b"\xd2\xbe\xd2\xbe\x08\0\0\0".to_vec(),
            "a suspended state or snapshot of VMware",
        ),
        (
            b"\x7fVirtualBox SavedState V2.0\n".to_vec(),
            "a saved state of VirtualBox",
        ),
        (b"\x1f\x8b\x08\0".to_vec(), "compressed by gzip"),
        (b"BZh91AY&SY".to_vec(), "compressed by bzip2"),
        (
            vec![7; 575],
            "found 575 bytes that begin with [07, 07, 07, 07, 07, 07, 07, 07]",
        ),
        (vec![7; 65_537], "found 65537 bytes"),
        (b"".to_vec(), "found 0 bytes"),
        (
            wire::MAGIC.to_vec(),
            "not a valid state: the state at byte 0: there are 8 bytes",
        ),
        (b"\x7fELF".to_vec(), "byte 4: expected an ELF core dump"),
        (
            std::fs::read(std::env::current_exe().unwrap()).unwrap(),
            "byte 16: expected an ELF core dump of x86-64 (type 4)",
        ),
    ];
    for (bytes, expected) in cases {
        let error = open_bytes(&bytes).unwrap_err().to_string();
        assert!(error.contains(expected), "{error:?}\nwithout {expected:?}");
    }
}

#[test]
fn a_folder_without_a_snapshot_is_refused() {
    assert!(matches!(
        amxctl::open(&fixtures(), &mut |_, _| {}),
        Err(OpenError::Folder { .. })
    ));
    assert!(matches!(
        amxctl::open(&fixtures().join("none"), &mut |_, _| {}),
        Err(OpenError::Io { .. })
    ));
}

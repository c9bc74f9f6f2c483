//! What the tests share: the fixtures, and files made from them.
#![allow(dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};

use amxctl::open::open_bytes;
use amxctl::{Given, OpenError, Snapshot, Subject};

/// The folder of the fixtures.
pub fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// The bytes of one of them.
pub fn fixture(name: &str) -> Vec<u8> {
    std::fs::read(fixtures().join(name)).unwrap()
}

/// One of them, opened.
pub fn open(name: &str) -> Result<Snapshot, OpenError> {
    amxctl::open(&fixtures().join(name), &mut |_, _| {})
}

/// The only vCPU of bytes, with nothing given.
pub fn subject(bytes: &[u8]) -> Subject {
    let mut snapshot = open_bytes(bytes).unwrap();
    assert_eq!(snapshot.vcpus.len(), 1);
    snapshot.vcpus.remove(0).subject(&Given::default())
}

/// The Cloud Hypervisor fixture after a change to the state of its vCPU.
pub fn cloud_hypervisor(change: impl FnOnce(&mut serde_json::Value)) -> Vec<u8> {
    let mut file: serde_json::Value =
        serde_json::from_slice(&fixture("cloud-hypervisor/state.json")).unwrap();
    let text = file
        .pointer_mut("/snapshots/cpu-manager/snapshots/0/snapshot_data/state")
        .unwrap();
    let mut state: serde_json::Value = serde_json::from_str(text.as_str().unwrap()).unwrap();
    change(&mut state);
    *text = state.to_string().into();
    serde_json::to_vec(&file).unwrap()
}

/// The same with XSTATE_BV of its area replaced.
pub fn cloud_hypervisor_with_xstate_bv(bits: u64) -> Vec<u8> {
    cloud_hypervisor(|state| {
        state["Kvm"]["xsave"]["region"][128] = (bits & 0xffff_ffff).into();
        state["Kvm"]["xsave"]["region"][129] = (bits >> 32).into();
    })
}

/// Adds CET to the state of a vCPU: the components, shadow stacks and indirect branch tracking.
pub fn add_cet(kvm: &mut serde_json::Value, shadow_stacks: bool, ibt: bool) {
    set_bits(kvm, 0xd, 1, "ecx", 0x1800);
    set_bits(kvm, 7, 0, "ecx", u64::from(shadow_stacks) << 7);
    set_bits(kvm, 7, 0, "edx", u64::from(ibt) << 20);
    let entries = kvm["cpuid"].as_array_mut().unwrap();
    for (index, eax) in [(11, 16), (12, 24)] {
        entries.push(serde_json::json!({
            "function": 0xd, "index": index, "flags": 1, "eax": eax, "ebx": 0, "ecx": 1, "edx": 0,
            "padding": [0, 0, 0],
        }));
    }
}

/// Sets bits of a register of CPUID in the state of a vCPU.
pub fn set_bits(kvm: &mut serde_json::Value, function: u64, index: u64, register: &str, bits: u64) {
    let entries = kvm["cpuid"].as_array_mut().unwrap();
    let is =
        |entry: &&mut serde_json::Value| entry["function"] == function && entry["index"] == index;
    let register = &mut entries.iter_mut().find(is).unwrap()[register];
    *register = (register.as_u64().unwrap() | bits).into();
}

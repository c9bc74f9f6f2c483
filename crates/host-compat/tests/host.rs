//! Descriptions of hosts as documents: what is written is read, and nothing else is.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::LazyLock;

use cpuid_amx::{CpuidTable, Entry, PermissionError, Table};
use host_compat::host::{Capabilities, KvmFacts, NoKvm, Permission, Tsc};
use host_compat::kernel::Kernel;
use host_compat::{FeatureMsrs, Host};
use xsave_state::XFeatures;

/// Everything that a description can say, in one.
fn whole() -> Host {
    let mut host = Host::from_cpuid("node-17", cpuid_amx::dump::EXAMPLE.parse().unwrap());
    host.processor.name = "Intel(R) Xeon(R) Platinum 8480+".into();
    host.kernel = Some(Kernel::from_names(
        "6.12.107+deb13-amd64",
        "#1 SMP PREEMPT_DYNAMIC Debian 6.12.107-1 (2026-11-01)",
        None,
    ));
    host.components = Some(XFeatures::from_bits_retain(0x602e7));
    host.permission = Permission::Granted(XFeatures::from_bits_retain(0x602e7));
    let kvm = host.kvm.as_mut().unwrap();
    kvm.capabilities = Some(Capabilities {
        xsave: 1,
        xsave2: 11008,
        xcrs: 1,
        x86_user_space_msr: 7,
        x86_msr_filter: 1,
        sys_attributes: 1,
        immediate_exit: 1,
    });
    kvm.guest_components = Some(XFeatures::from_bits_retain(0x602e7));
    kvm.feature_msrs.arch_capabilities = Some(0x8_0001);
    kvm.tsc = Some(Tsc {
        khz: 2_000_000,
        scales: true,
    });
    host
}

fn json(host: &Host) -> String {
    serde_json::to_string(host).unwrap()
}

/// docs/host.schema.json, which is for those who read descriptions without this crate.
fn schema() -> &'static jsonschema::Validator {
    static SCHEMA: LazyLock<jsonschema::Validator> = LazyLock::new(|| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/host.schema.json");
        let text = std::fs::read_to_string(path).unwrap();
        jsonschema::validator_for(&serde_json::from_str(&text).unwrap()).unwrap()
    });
    &SCHEMA
}

fn is_valid(text: &str) -> bool {
    serde_json::from_str(text).is_ok_and(|document| schema().is_valid(&document))
}

fn error(text: &str) -> String {
    serde_json::from_str::<Host>(text).unwrap_err().to_string()
}

#[track_caller]
fn refused(host: &Host, what: &str, instead: &str, because: &str) {
    let text = json(host);
    assert!(text.contains(what), "{text}");
    let changed = text.replacen(what, instead, 1);
    let message = error(&changed);
    assert!(message.contains(because), "{message}");
    // The schema refuses what this crate refuses, as far as a schema can say it.
    let beyond_a_schema = because.contains("two entries");
    assert_eq!(is_valid(&changed), beyond_a_schema, "{changed}");
}

#[test]
fn what_is_written_is_read() {
    let features = XFeatures::from_bits_retain(1 << 63 | 0x2e7);
    let permissions = [
        Permission::NotAsked,
        Permission::Granted(features),
        Permission::Refused(PermissionError::NotSupported {
            supported: features,
        }),
        Permission::Refused(PermissionError::KernelTooOld),
        Permission::Refused(PermissionError::Locked { granted: features }),
        Permission::Refused(PermissionError::Filtered { errno: 38 }),
        Permission::Refused(PermissionError::NotGranted { granted: features }),
        Permission::Refused(PermissionError::Other { errno: -5 }),
    ];
    let everywhere = Entry {
        leaf: 0x4000_0000,
        subleaf: None,
        value: [u32::MAX; 4],
    };
    let kvms = [
        Ok(KvmFacts::default()),
        Ok(KvmFacts {
            rewritten: Some([everywhere].into_iter().collect()),
            ..whole().kvm.unwrap()
        }),
        Err(NoKvm::NoDevice),
        Err(NoKvm::NoAccess),
        Err(NoKvm::NotKvm { version: -1 }),
        Err(NoKvm::Failed {
            call: "KVM_CREATE_VM".into(),
            errno: 12,
        }),
    ];
    for permission in permissions {
        for kvm in kvms.clone() {
            for name in ["", "node-17", "a \"name\"\\ with\nall of it \u{1f600}"] {
                let host = Host {
                    name: name.into(),
                    permission,
                    kvm: kvm.clone(),
                    ..whole()
                };
                assert_eq!(serde_json::from_str::<Host>(&json(&host)).unwrap(), host);
                assert!(is_valid(&json(&host)), "{}", json(&host));
                let pretty = serde_json::to_string_pretty(&host).unwrap();
                assert_eq!(
                    serde_json::from_slice::<Host>(pretty.as_bytes()).unwrap(),
                    host
                );
            }
        }
    }
    let bare = Host::from_cpuid("", Table::new());
    assert_eq!(serde_json::from_str::<Host>(&json(&bare)).unwrap(), bare);
}

/// A file of a version stays what it is: do not just update it.
#[test]
fn versions_are_pinned() {
    let golden = |name: &str| {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
        std::fs::read_to_string(path.join(name)).unwrap()
    };
    let v2 = golden("host-v2.json");
    assert_eq!(serde_json::from_str::<Host>(&v2).unwrap(), whole());
    assert_eq!(json(&whole()), v2.trim_end());
    // Version 1 knows neither feature MSRs nor the TSC.
    let mut older = whole();
    let kvm = older.kvm.as_mut().unwrap();
    (kvm.feature_msrs, kvm.tsc) = (FeatureMsrs::default(), None);
    let v1 = golden("host-v1.json");
    assert_eq!(serde_json::from_str::<Host>(&v1).unwrap(), older);
    assert!(is_valid(&v1) && is_valid(&v2));
}

/// A newer version has fields, and names in lists, that this one does not know: they are named.
#[test]
fn what_a_newer_version_has_is_read_over_and_named() {
    for (what, instead, path) in [
        ("\"name\":", "\"label\":1,\"name\":", "label"),
        (
            "\"family\":",
            "\"cores\":[1],\"family\":",
            "processor.cores",
        ),
        ("\"release\":", "\"arch\":{},\"release\":", "kernel.?.arch"),
        ("\"xcrs\":", "\"pit\":1,\"xcrs\":", "kvm.capabilities.?.pit"),
        ("\"outcome\":", "\"when\":1,\"outcome\":", "permission.when"),
        ("\"state\":", "\"model\":1,\"state\":", "kvm.model"),
        ("\"eax\":", "\"esi\":\"0x0\",\"eax\":", "kvm.cpuid.?.0.esi"),
        ("AMX-INT8", "AMX-INT9", "AMX-INT9"),
    ] {
        let text = json(&whole()).replacen("\"version\":2", "\"version\":3", 1);
        let newer = text.replacen(what, instead, 1);
        assert_ne!(newer, text, "{what}");
        let host: Host = serde_json::from_str(&newer).unwrap();
        assert_eq!(host.unknown, [path]);
    }
    // Not without end.
    let many: Vec<String> = (0..1000).map(|n| format!("\"x{n}\":1")).collect();
    let text = json(&whole()).replacen('{', &format!("{{{},", many.join(",")), 1);
    assert_eq!(
        serde_json::from_str::<Host>(&text).unwrap().unknown.len(),
        16
    );
}

#[test]
fn other_versions_and_formats_are_refused_by_name() {
    let host = whole();
    refused(
        &host,
        "\"version\":2",
        "\"version\":0",
        "amx-host of version 0: this program reads version 2",
    );
    refused(
        &host,
        "\"format\":\"amx-host\"",
        "\"format\":\"amx-fleet\"",
        "the format is \"amx-fleet\", and expected is \"amx-host\"",
    );
    refused(&host, "\"version\":2,", "", "missing field `version`");
    refused(
        &host,
        "\"format\":\"amx-host\",",
        "",
        "missing field `format`",
    );
}

#[test]
fn what_is_broken_is_refused() {
    let host = whole();
    for (what, instead, because) in [
        (
            "\"outcome\":\"granted\"",
            "\"outcome\":\"lent\"",
            "unknown variant `lent`",
        ),
        (
            "\"state\":\"usable\"",
            "\"state\":\"idle\"",
            "unknown variant `idle`",
        ),
        (
            "\"components\":\"0x602e7\"},\"kvm\"",
            "\"x\":1},\"kvm\"",
            "missing field `permission.components`",
        ),
        ("\"rewritten\":null,", "", "missing field `kvm.rewritten`"),
        ("6.12.107\"}", "6.x\"}", "kernel.upstream is \"6.x\""),
        (
            "\"0x602e7\"",
            "\"602e7\"",
            "a hexadecimal number such as 0x602e7",
        ),
        ("\"0x602e7\"", "\"0x\"", "a hexadecimal number"),
        ("\"0x602e7\"", "\"0x+1\"", "a hexadecimal number"),
        (
            "\"0x602e7\"",
            "\"0x10000000000000000\"",
            "a hexadecimal number",
        ),
        ("\"0x602e7\"", "393959", "a hexadecimal number"),
        (
            "\"leaf\":\"0x7\"",
            "\"leaf\":\"0x100000000\"",
            "a 32-bit register",
        ),
        (
            "\"leaf\":\"0x7\",\"subleaf\":\"0x0\"",
            "\"leaf\":\"0x7\",\"subleaf\":\"0x1\"",
            "kvm.cpuid has two entries for the same leaf and sub-leaf",
        ),
    ] {
        refused(&host, what, instead, because);
    }
}

#[test]
fn nothing_is_longer_than_its_limit() {
    let long = "x".repeat(257);
    let limit = "x".repeat(256);
    let named = |name: &str| Host {
        name: name.into(),
        ..whole()
    };
    assert!(error(&json(&named(&long))).contains("name has 257 bytes; the limit is 256"));
    assert!(serde_json::from_str::<Host>(&json(&named(&limit))).is_ok());

    for (field, change) in [
        (
            "processor.vendor",
            (|host, text| host.processor.vendor = text) as fn(&mut Host, String),
        ),
        ("processor.name", |host, text| host.processor.name = text),
        ("kernel.release", |host, text| {
            host.kernel.as_mut().unwrap().release = text;
        }),
        ("kvm.call", |host, text| {
            host.kvm = Err(NoKvm::Failed {
                call: text,
                errno: 1,
            });
        }),
    ] {
        let mut host = whole();
        change(&mut host, long.clone());
        let message = error(&json(&host));
        assert!(
            message.contains(&format!("{field} has 257 bytes")),
            "{message}"
        );
    }

    let table = |entries: u32| -> Table {
        (0..entries)
            .map(|leaf| Entry {
                leaf,
                subleaf: Some(0),
                value: [1; 4],
            })
            .collect()
    };
    let most = Host::from_cpuid("", table(256));
    assert_eq!(serde_json::from_str::<Host>(&json(&most)).unwrap(), most);
    assert!(
        error(&json(&Host::from_cpuid("", table(257))))
            .contains("kvm.cpuid has 257 entries; the limit is 256")
    );
}

#[test]
fn the_cpuid_of_a_document_answers_as_the_table_did() {
    let host: Host = serde_json::from_str(&json(&whole())).unwrap();
    let table = host.guest_cpuid().unwrap();
    assert_eq!(table.leaf(0xd, 18), [8192, 2816, 6, 0]);
    assert_eq!(table.leaf(1, 99)[0], 0x806f8);
}

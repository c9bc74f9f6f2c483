//! Saved guests as VMMs of the field have written them, and what `inspect`, `verify` and `compat` say.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use amxctl::open::open_bytes;
use common::{add_cet, cloud_hypervisor, fixture, fixtures};
use serde_json::{Value, json};

/// A folder with the fixtures' guest, changed, and the host that it came from.
struct Case {
    folder: tempfile::TempDir,
}

/// What a command has printed, and its exit code.
type Said = (i32, String);

impl Case {
    fn new(change: impl FnOnce(&mut Value)) -> Self {
        let case = Self {
            folder: tempfile::tempdir().unwrap(),
        };
        case.write(
            "guest",
            &cloud_hypervisor(|state| change(&mut state["Kvm"])),
        );
        case.host_of("host.cpuid", &fixture("cloud-hypervisor/state.json"));
        case
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    /// Writes the CPUID of a snapshot as that of a host.
    fn host_of(&self, name: &str, snapshot: &[u8]) {
        let vcpu = open_bytes(snapshot).unwrap().vcpus.remove(0);
        let amxctl::vcpu::Places::Cpuid(cpuid) = vcpu.places else {
            panic!("a guest with CPUID")
        };
        self.write(name, cpuid.table.to_string().as_bytes());
    }

    /// The guest's own CPUID is that of the host.
    fn on_its_own_host(self) -> Self {
        self.host_of("host.cpuid", &fs::read(self.path("guest")).unwrap());
        self
    }

    fn run(&self, arguments: &[&str]) -> Said {
        let output = Command::new(env!("CARGO_BIN_EXE_amxctl"))
            .current_dir(self.folder.path())
            .args(arguments)
            .output()
            .unwrap();
        let text = [output.stdout, output.stderr].concat();
        // Without the breaks of lines.
        let text = String::from_utf8(text).unwrap();
        let words: Vec<&str> = text.split_whitespace().collect();
        (output.status.code().unwrap(), words.join(" "))
    }

    /// What verify says, and compat agrees with.
    fn judge(&self, more: &[&str]) -> Said {
        self.judge_on("guest", "host.cpuid", more)
    }

    fn judge_on(&self, guest: &str, host: &str, more: &[&str]) -> Said {
        let verify = self.run(&[&["verify", guest, "--on", host][..], more].concat());
        let compat = self.run(&[&["compat", guest, host][..], more].concat());
        assert_eq!(verify.0, compat.0, "{}\n{}", verify.1, compat.1);
        for command in [
            &["verify", guest, "--on", host, "--json"][..],
            &["compat", guest, host, "--json"],
        ] {
            let (code, text) = self.run(&[command, more].concat());
            assert_eq!(code, verify.0, "{text}");
            let value: Value = serde_json::from_str(&text).unwrap();
            let expected = match code {
                0 => "runs",
                1 => "no",
                3 => "runs_after",
                _ => "unknown",
            };
            let hides = value["verdict"] == "runs_after" && code == 1;
            assert!(hides || value["verdict"] == expected, "{text}");
        }
        verify
    }

    /// The description of a host of which there is CPUID.
    fn described(&self, cpuid: &str) -> Value {
        let (code, text) = self.run(&["describe", "--cpuid", cpuid]);
        assert_eq!(code, 0, "{text}");
        // Warnings may follow.
        let mut values = serde_json::Deserializer::from_str(&text).into_iter();
        values.next().unwrap().unwrap()
    }

    fn inspect(&self) -> String {
        let (code, text) = self.run(&["inspect", "guest"]);
        assert_eq!(code, 0, "{text}");
        text
    }

    /// Both name what is wrong.
    fn refuses(&self, words: &str) {
        let (code, text) = self.judge(&[]);
        assert_eq!(code, 1, "{text}");
        for text in [text, self.inspect()] {
            assert!(text.contains(words), "{words:?} is not in:\n{text}");
        }
    }

    fn accepts(&self, words: &str) {
        let (code, text) = self.judge(&[]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }
}

fn leaf(kvm: &mut Value, function: u64, index: u64) -> &mut Value {
    let entries = kvm["cpuid"].as_array_mut().unwrap();
    let is = |entry: &&mut Value| entry["function"] == function && entry["index"] == index;
    entries.iter_mut().find(is).unwrap()
}

fn change(kvm: &mut Value, function: u64, index: u64, register: &str, set: u64, clear: u64) {
    let register = &mut leaf(kvm, function, index)[register];
    *register = (register.as_u64().unwrap() & !clear | set).into();
}

fn msr(kvm: &mut Value, index: u64, data: Option<u64>) {
    let msrs = kvm["msrs"].as_array_mut().unwrap();
    msrs.retain(|msr| msr["index"] != index);
    msrs.extend(data.map(|data| json!({"index": index, "reserved": 0, "data": data})));
}

fn xstate_bv(kvm: &mut Value, bits: u64) {
    kvm["xsave"]["region"][128] = (bits & 0xffff_ffff).into();
    kvm["xsave"]["region"][129] = (bits >> 32).into();
}

fn xcr0(kvm: &mut Value, bits: u64) {
    for (at, byte) in (16..).zip(bits.to_le_bytes()) {
        kvm["xcrs"][at] = byte.into();
    }
}

const CET_MSRS: [u64; 7] = [0x6a0, 0x6a2, 0x6a4, 0x6a5, 0x6a6, 0x6a7, 0x6a8];

#[test]
fn the_guest_of_the_fixture_can_go_back_where_it_came_from() {
    Case::new(|_| {}).accepts("can be restored");
}

#[test]
fn a_snapshot_without_ia32_xss_is_refused() {
    Case::new(|kvm| add_cet(kvm, false, false))
        .on_its_own_host()
        .refuses("this file cannot hold IA32_XSS (MSR 0xda0)");
}

#[test]
fn a_snapshot_without_the_msrs_behind_ia32_xss_is_refused() {
    for left_out in CET_MSRS {
        let case = Case::new(|kvm| {
            add_cet(kvm, true, true);
            msr(kvm, 0xda0, Some(0x1800));
            for index in CET_MSRS.into_iter().filter(|index| *index != left_out) {
                msr(kvm, index, Some(0));
            }
        });
        case.on_its_own_host().refuses(&format!("({left_out:#x})"));
    }
}

#[test]
fn shadow_stacks_of_a_running_guest_are_in_no_msr() {
    let with = |shadow_stacks, cr4: u64| {
        let case = Case::new(|kvm| {
            add_cet(kvm, shadow_stacks, true);
            msr(kvm, 0xda0, Some(0x1800));
            for index in CET_MSRS {
                msr(kvm, index, Some(0));
            }
            for (at, byte) in (248..).zip(cr4.to_le_bytes()) {
                kvm["sregs"][at] = byte.into();
            }
        });
        case.on_its_own_host()
    };
    for cr4 in [0, 1 << 23] {
        with(true, cr4).refuses("KVM_GET_ONE_REG");
        // Indirect branch tracking has no pointer.
        with(false, cr4).accepts("can be restored");
    }
}

#[test]
fn cet_that_is_seen_and_not_enabled_is_not_said_to_be_in_use() {
    let guest = || {
        Case::new(|kvm| {
            add_cet(kvm, true, true);
            msr(kvm, 0xda0, Some(0));
        })
    };
    guest()
        .on_its_own_host()
        .accepts("The guest has not enabled CET");
    // An older kernel gives no CET: what the guest sees is refused, as what it is.
    let (code, text) = guest().judge(&[]);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("the guest sees these and has not enabled them: CET_U, CET_S"),
        "{text}"
    );
    assert!(text.contains("since it started and may rely on them: SHSTK"));
    assert!(text.contains("IBT"), "{text}");
    assert!(!text.contains("may use them at any moment"), "{text}");
}

/// Our own states and raw areas have no place for MSRs.
#[test]
fn ia32_xss_of_a_file_without_msrs_is_asked_for() {
    let case = Case::new(|kvm| {
        add_cet(kvm, true, true);
        msr(kvm, 0xda0, Some(0x1800));
    });
    let case = case.on_its_own_host();
    let (code, text) = case.run(&["convert", "guest", "--to", "state", "-o", "own.xstate"]);
    assert_eq!(code, 0, "{text}");
    let judge = |more: &[&str]| {
        let known = ["--cpuid", "host.cpuid"];
        case.judge_on("own.xstate", "host.cpuid", &[&known[..], more].concat())
    };
    let (code, text) = judge(&[]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("give --xss"), "{text}");
    let (code, text) = judge(&["--xss", "0x1800"]);
    assert_eq!(code, 0, "{text}");
    assert!(text.contains("does not have them"), "{text}");
}

#[test]
fn msrs_of_xfd_that_are_not_in_the_snapshot_are_missed() {
    for (index, name, option) in [
        (0x1c4, "IA32_XFD", "--xfd"),
        (0x1c5, "IA32_XFD_ERR", "--xfd-err"),
    ] {
        let case = Case::new(|kvm| msr(kvm, index, None));
        case.refuses(&format!("this file cannot hold {name} (MSR {index:#x})"));
        assert_eq!(case.judge(&[option, "0x40000"]).0, 0);
    }
    // Two values: KVM takes the last.
    let twice = Case::new(|kvm| {
        let msrs = kvm["msrs"].as_array_mut().unwrap();
        msrs.push(json!({"index": 0x1c4, "reserved": 0, "data": 0}));
    });
    twice.refuses("IA32_XFD (MSR 0x1c4) is listed twice, as 0x40000 and as 0x0");
}

#[test]
fn bytes_of_initial_components_are_pointed_out() {
    let case = Case::new(|kvm| {
        xstate_bv(kvm, 0);
        for word in 40..104 {
            kvm["xsave"]["region"][word] = 0x0101_0101.into();
        }
        for word in 144..1024 {
            kvm["xsave"]["region"][word] = 0.into();
        }
    });
    case.accepts("SSE: bytes 160 to 415");
    assert!(case.inspect().contains("SSE: bytes 160 to 415"));
}

/// What only a guess of XCR0 refuses is asked for.
#[test]
fn a_guess_of_xcr0_decides_nothing() {
    let case = Case::new(|_| {});
    let without_amx = cloud_hypervisor(|state| {
        let kvm = &mut state["Kvm"];
        change(kvm, 7, 0, "edx", 0, 1 << 22 | 1 << 24 | 1 << 25);
        change(kvm, 0xd, 0, "eax", 0x2e7, u64::MAX);
        for register in ["ebx", "ecx"] {
            change(kvm, 0xd, 0, register, 2696, u64::MAX);
        }
        change(kvm, 0xd, 1, "eax", 0xf, u64::MAX);
        let entries = kvm["cpuid"].as_array_mut().unwrap();
        entries.retain(|entry| {
            let index = entry["index"].as_u64().unwrap();
            match entry["function"].as_u64().unwrap() {
                0xd => index < 17,
                0x1d | 0x1e => false,
                _ => true,
            }
        });
    });
    case.host_of("without-amx.cpuid", &without_amx);
    case.write("raw", &fixture("armed.xsave2"));
    let judge = |host: &str, more: &[&str]| {
        let known = ["--cpuid", "host.cpuid", "--xfd", "0", "--xfd-err", "0"];
        case.judge_on("raw", host, &[&known[..], more].concat())
    };
    // Whatever it is, the guest's own host can hold it.
    assert_eq!(judge("host.cpuid", &[]).0, 0);
    let (code, text) = judge("without-amx.cpuid", &[]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("give --xcr0"), "{text}");
    assert!(text.contains("what it has enabled is not known"), "{text}");
    assert!(!text.contains("may use them at any moment"), "{text}");
    let (code, text) = judge("without-amx.cpuid", &["--xcr0", "0x602e7"]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("may use them at any moment: XFD"), "{text}");
    let (code, text) = judge("without-amx.cpuid", &["--xcr0", "0x2e7"]);
    assert_eq!(code, 1, "{text}");
    assert!(
        text.contains("sees these and has not enabled them: XFD"),
        "{text}"
    );
}

/// A guest without PKRU, whose area has it in use all the same.
fn with_pkru_that_it_never_had(pkru: u32) -> Case {
    Case::new(|kvm| {
        change(kvm, 7, 0, "ecx", 0, 1 << 3);
        change(kvm, 7, 0, "edx", 0, 1 << 22 | 1 << 24 | 1 << 25);
        change(kvm, 0xd, 0, "eax", 0xe7, u64::MAX);
        for register in ["ebx", "ecx"] {
            change(kvm, 0xd, 0, register, 2688, u64::MAX);
        }
        change(kvm, 0xd, 1, "eax", 0xf, u64::MAX);
        change(kvm, 0xd, 1, "ebx", 2432, u64::MAX);
        kvm["cpuid"].as_array_mut().unwrap().retain(|entry| {
            let index = entry["index"].as_u64().unwrap();
            match entry["function"].as_u64().unwrap() {
                0xd => index < 8,
                0x1d | 0x1e => false,
                _ => true,
            }
        });
        xcr0(kvm, 0xe7);
        xstate_bv(kvm, 0x203);
        kvm["xsave"]["region"][2688 / 4] = pkru.into();
        kvm["xsave"]["extra"] = json!([]);
        msr(kvm, 0x1c4, None);
        msr(kvm, 0x1c5, None);
    })
}

#[test]
fn a_pkru_that_the_guest_never_had_is_no_loss() {
    for pkru in [0, 5] {
        let case = with_pkru_that_it_never_had(pkru);
        case.accepts("The guest has never had it");
        let (code, text) = case.run(&["convert", "guest", "--to", "state", "-o", "guest.xstate"]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("the guest never had it"), "{text}");
        // KVM refuses it where the host has no PKRU, and kernels in between wherever.
        let own = with_pkru_that_it_never_had(pkru).on_its_own_host();
        let mut host = own.described("host.cpuid");
        host["kvm"]["capabilities"] = json!({
            "xsave": 1, "xsave2": 4096, "xcrs": 1, "x86_user_space_msr": 1, "x86_msr_filter": 1,
            "sys_attributes": 1, "immediate_exit": 1,
        });
        own.write("host.json", host.to_string().as_bytes());
        let (code, text) = own.judge_on("guest", "host.json", &[]);
        assert_eq!(code, 1, "{text}");
        assert!(text.contains("EINVAL, because the host lacks it"), "{text}");
        // A dump may be that of a guest.
        let (code, text) = own.judge(&[]);
        assert_eq!(code, 0, "{text}");
        assert!(text.contains("not known to have the fix"), "{text}");
        for (version, expected) in [("6.5.8", 1), ("6.6.0", 0), ("6.1.0", 0)] {
            let mut host = case.described("host.cpuid");
            host["kernel"] = json!({"release": version, "upstream": version});
            case.write("host.json", host.to_string().as_bytes());
            let (code, text) = case.judge_on("guest", "host.json", &[]);
            assert_eq!(code, expected, "{version}: {text}");
            let is_open = text.contains("not known to have the fix 8647c52e9504");
            assert_eq!(is_open, version == "6.1.0", "{text}");
        }
    }
    // Another component is not known to be reported by any kernel.
    let other = Case::new(|kvm| {
        change(kvm, 0xd, 0, "eax", 0, 1 << 9);
        kvm["cpuid"]
            .as_array_mut()
            .unwrap()
            .retain(|entry| (&entry["function"], &entry["index"]) != (&0xd.into(), &9.into()));
        xcr0(kvm, 0x600e7);
        xstate_bv(kvm, 1 << 3);
    });
    other.refuses("BNDREGS is in use");
}

#[test]
fn a_guest_without_xsave_can_be_restored() {
    // Leaf 0DH is missing, zero, or hidden.
    for hidden in 0..3 {
        for (xcrs, expected) in [
            (vec![], 0),
            (vec![0], 0),
            (vec![1, 0, 0, 0, 1, 0], 0),
            (vec![1, 0, 0, 0, 3, 0], 1),
        ] {
            let xcrs: Vec<u8> = xcrs.into_iter().flat_map(u32::to_le_bytes).collect();
            let case = Case::new(|kvm| {
                change(kvm, 1, 0, "ecx", 0, 1 << 26 | 1 << 27);
                let entries = kvm["cpuid"].as_array_mut().unwrap();
                match hidden {
                    0 => entries.retain(|entry| entry["function"] != 0xd),
                    1 => {
                        entries.retain(|entry| entry["function"] != 0xd);
                        entries.push(json!({
                            "function": 0xd, "index": 0, "flags": 1,
                            "eax": 0, "ebx": 0, "ecx": 0, "edx": 0, "padding": [0, 0, 0],
                        }));
                    }
                    _ => {}
                }
                kvm["xcrs"] = xcrs.clone().into();
                xstate_bv(kvm, 3);
                for index in [0x1c4, 0x1c5] {
                    msr(kvm, index, None);
                }
                kvm["xsave"]["extra"] = json!([]);
            });
            let (code, text) = case.judge(&[]);
            assert_eq!(code, expected, "{hidden} {xcrs:?}: {text}");
            // The same as a raw area, whose CPUID is given.
            case.host_of("guest.cpuid", &fs::read(case.path("guest")).unwrap());
            case.write("raw", &fixture("armed.xsave2")[..4096]);
            let raw = case.judge_on("raw", "host.cpuid", &["--cpuid", "guest.cpuid"]);
            assert_eq!(raw.0, 1, "{}", raw.1);
            let mut area = fixture("armed.xsave2")[..4096].to_vec();
            area[512..520].copy_from_slice(&3u64.to_le_bytes());
            case.write("raw", &area);
            let raw = case.judge_on("raw", "host.cpuid", &["--cpuid", "guest.cpuid"]);
            assert_eq!(raw.0, 0, "{}", raw.1);
            assert!(case.inspect().contains("x87 | SSE (0x3)"));
        }
    }
}

#[test]
fn xcr0_is_what_kvm_makes_of_the_list() {
    let header = |count: u32, flags: u32| [count.to_le_bytes(), flags.to_le_bytes()].concat();
    for (bytes, words) in [
        (header(0, 0), "the file does not list XCR0"),
        (header(17, 0), "nr_xcrs is 17"),
        (header(u32::MAX, 0), "nr_xcrs is 4294967295"),
        (header(1, 1), "flags is 0x1"),
    ] {
        let case = Case::new(|kvm| {
            for (at, byte) in (0..).zip(bytes) {
                kvm["xcrs"][at] = byte.into();
            }
        });
        case.refuses(words);
        let shown = case.inspect();
        assert!(shown.contains("XCR0 x87 (0x1)"), "{shown}");
        // Nobody writes that down as what the guest had.
        let (code, text) = case.run(&["convert", "guest", "--to", "state", "-o", "x"]);
        assert_eq!(code, 2, "{text}");
        assert_eq!(case.judge(&["--xcr0", "0x602e7"]).0, 0);
    }
    // What is cut off is zero.
    for (len, words) in [
        (0, "the file does not list XCR0"),
        (4, "XCR0 is none"),
        (16, "XCR0 is none"),
        // A legal value, and not the guest's.
        (
            17,
            "the list of extended control registers has 17 bytes, and 24 for 1 of them",
        ),
    ] {
        let case = Case::new(|kvm| kvm["xcrs"].as_array_mut().unwrap().truncate(len));
        case.refuses(words);
    }
}

#[test]
fn a_compacted_area_is_shown_as_it_is_and_can_be_converted() {
    // The fixture's vCPU as XSAVEC writes it for a process with tiles.
    let standard = common::subject(&fixture("cloud-hypervisor/state.json"));
    let state = standard.state().unwrap();
    let compacted = state.image().to_compacted();
    let case = Case::new(|kvm| {
        let mut words: Vec<u32> = compacted
            .chunks(4)
            .map(|word| {
                let mut bytes = [0; 4];
                bytes[..word.len()].copy_from_slice(word);
                u32::from_le_bytes(bytes)
            })
            .collect();
        words.resize(1024, 0);
        kvm["xsave"]["region"] = words.into();
        kvm["xsave"]["extra"] = json!([]);
    });
    case.refuses("XCOMP_BV has bit 63: the compacted format");
    case.refuses("`amxctl convert` writes a valid area with the same state");
    let shown = case.inspect();
    assert!(shown.contains("the area is compacted"), "{shown}");
    // opmask is the first behind the header.
    assert!(shown.contains("opmask in use 576 "), "{shown}");
    let (code, text) = case.run(&["convert", "guest", "--to", "state", "-o", "guest.xstate"]);
    assert_eq!(code, 0, "{text}");
    case.write("before", &fixture("cloud-hypervisor/state.json"));
    let (code, text) = case.run(&["diff", "before", "guest.xstate"]);
    assert_eq!(code, 0, "{text}");

    // Components that the guest does not have, behind all that it has.
    let case = Case::new(|kvm| {
        let xcomp_bv = 1 << 63 | 0x2e7 | 1 << 40;
        kvm["xsave"]["region"][130] = (xcomp_bv & 0xffff_ffffu64).into();
        kvm["xsave"]["region"][131] = (xcomp_bv >> 32).into();
    });
    case.refuses("it has component 40 (0x10000000000)");
    // One before others: where these are is not known.
    let case = Case::new(|kvm| {
        let xcomp_bv = 1 << 63 | 0x2e7 | 1 << 3;
        kvm["xsave"]["region"][130] = (xcomp_bv & 0xffff_ffffu64).into();
        kvm["xsave"]["region"][131] = (xcomp_bv >> 32).into();
    });
    case.refuses("the layout lacks BNDREGS (0x8)");
    assert!(
        case.inspect().contains("opmask cut off ?"),
        "{}",
        case.inspect()
    );
}

#[test]
fn entries_that_hide_others_are_named() {
    let flag = "KVM_CPUID_FLAG_SIGNIFCANT_INDEX";
    let entry = |function: u64| {
        json!({
            "function": function, "index": 0, "flags": 0,
            "eax": 0, "ebx": 0, "ecx": 0, "edx": 0, "padding": [0, 0, 0],
        })
    };
    // Before 1DH.0, as Linux 5.10 has it.
    let first = Case::new(|kvm| {
        let entries = kvm["cpuid"].as_array_mut().unwrap();
        let at = entries.iter().position(|entry| entry["function"] == 0x1d);
        entries.insert(at.unwrap(), entry(0x1d));
    });
    assert!(first.inspect().contains(flag));
    let (_, text) = first.judge(&[]);
    assert!(text.contains(flag), "{text}");
    // All flags of 0DH are missing.
    let none = Case::new(|kvm| {
        for entry in kvm["cpuid"].as_array_mut().unwrap() {
            if entry["function"] == 0xd {
                entry["flags"] = 0.into();
            }
        }
    });
    none.refuses(flag);
    none.refuses("so CPUID.0DH of the guest is invalid");
    // The same place twice.
    let twice = Case::new(|kvm| {
        let mut second = leaf(kvm, 0xd, 18).clone();
        second["eax"] = 4096.into();
        kvm["cpuid"].as_array_mut().unwrap().push(second);
    });
    twice.accepts("leaf 0xd sub-leaf 0x12 is");
}

#[test]
fn each_vcpu_is_compared_by_its_own_cpuid() {
    let case = Case::new(|_| {});
    let mut file: Value = serde_json::from_slice(&fixture("cloud-hypervisor/state.json")).unwrap();
    let other = cloud_hypervisor(|state| {
        // Bit 31 of 1:ECX, which no host of these has.
        change(&mut state["Kvm"], 7, 0, "ecx", 1 << 15, 0);
    });
    let other: Value = serde_json::from_slice(&other).unwrap();
    let vcpus = "/snapshots/cpu-manager/snapshots";
    file.pointer_mut(vcpus).unwrap()["1"] = other.pointer(vcpus).unwrap()["0"].clone();
    case.write("guest", file.to_string().as_bytes());
    let (code, text) = case.judge(&[]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("CPUID.7H.0:ECX[15]"), "{text}");
}

#[test]
fn a_guest_s_feature_msrs_and_its_clock_are_compared() {
    let case = Case::new(|kvm| {
        msr(kvm, 0x10a, Some(0x3));
        kvm["tsc_khz"] = 2_000_000.into();
    });
    let judged = |arch: &str, khz: u32| {
        let mut host = case.described("host.cpuid");
        host["kvm"]["feature_msrs"] =
            json!({"arch_capabilities": arch, "perf_capabilities": "0x0"});
        host["kvm"]["tsc"] = json!({"khz": khz, "scales": false});
        case.write("host.json", host.to_string().as_bytes());
        case.judge_on("guest", "host.json", &[])
    };
    assert_eq!(judged("0x3", 2_000_000).0, 0);
    let (code, text) = judged("0x1", 2_000_000);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("IA32_ARCH_CAPABILITIES = 0x3"), "{text}");
    let (code, text) = judged("0x3", 2_500_000);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("2500000 kHz"), "{text}");
}

#[test]
fn a_state_without_its_cpuid_is_half_compared() {
    let case = Case::new(|_| {});
    for name in ["zen4.json", "icelake.json", "icelake.cpuid"] {
        fs::copy(fixtures().join(name), case.path(name)).unwrap();
    }
    let (code, text) = case.run(&["convert", "guest", "--to", "state", "-o", "own.xstate"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = case.judge_on("own.xstate", "host.cpuid", &[]);
    assert_eq!(code, 4, "{text}");
    assert!(text.contains("give --cpuid"), "{text}");
    assert_eq!(
        case.judge_on("own.xstate", "host.cpuid", &["--cpuid", "host.cpuid"])
            .0,
        0
    );

    // The layout that the file carries counts.
    let mut area = vec![0; 4096];
    area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
    area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
    for at in [464, 512] {
        area[at..at + 8].copy_from_slice(&0xe7u64.to_le_bytes());
    }
    case.write("zen4.xsave2", &area);
    let to_state = [
        "convert",
        "zen4.xsave2",
        "--cpuid",
        "zen4.json",
        "--to",
        "state",
    ];
    let (code, text) = case.run(&[&to_state[..], &["-o", "zen4.xstate"]].concat());
    assert_eq!(code, 0, "{text}");
    assert_eq!(case.judge_on("zen4.xstate", "zen4.json", &[]).0, 4);
    let (code, text) = case.judge_on("zen4.xstate", "icelake.json", &[]);
    assert_eq!(code, 1, "{text}");
    assert!(text.contains("opmask (at 832, there 1088)"), "{text}");
    for host in ["zen4.json", "icelake.json"] {
        // What is said of the guest's CPUID does not move its bytes.
        let (code, text) = case.judge_on("zen4.xstate", host, &["--cpuid", "icelake.cpuid"]);
        assert_eq!(code, 1, "{text}");
        assert!(
            text.contains("the layout in the file is not that"),
            "{text}"
        );
    }
    assert_eq!(
        case.judge_on("zen4.xstate", "zen4.json", &["--cpuid", "zen4.json"])
            .0,
        0
    );
}

#[test]
fn an_override_says_that_a_running_guest_may_be_moved() {
    let case = Case::new(|_| {});
    let folder: &Path = case.folder.path();
    fs::copy(fixtures().join("process.core"), folder.join("core")).unwrap();
    fs::copy(fixtures().join("zen4.json"), folder.join("zen4.json")).unwrap();
    fs::copy(fixtures().join("icelake.json"), folder.join("icelake.json")).unwrap();
    let guest = ["compat", "core", "icelake.json"];
    assert_eq!(case.run(&guest).0, 1);
    let moved = case.run(&[&guest[..], &["--relayout"]].concat());
    assert_eq!(moved.0, 4, "{}", moved.1);
}

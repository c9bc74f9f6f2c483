//! Templates for other tools, read back as those tools read them: a guest made by one runs on every host
//! of its fleet.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[path = "../../cpuid-amx/tests/common/mod.rs"]
mod common;

use std::io::Write;
use std::process::{Command, Stdio};

use common::{diamond_rapids, entries, fixture};
use cpuid_amx::{CpuidTable, Policy, Table, coherence};
use host_compat::guest_cpu::NoGuestCpu;
use host_compat::render::{self, RenderError, Rendered, What};
use host_compat::{Fleet, Guest, GuestCpu, Host, Verdict, compat};
use proptest::prelude::*;
use serde::Deserialize;
use serde_json::Value;

fn host(name: &str) -> Host {
    let table = match name {
        "diamond-rapids" => diamond_rapids(),
        name => fixture(name),
    };
    let mut host = Host::from_cpuid(name, table);
    if let Ok(kvm) = &mut host.kvm {
        // RSBA on the older one; both have RDCL_NO, one has TAA_NO as well.
        let old = name == "ice-lake-server";
        kvm.feature_msrs.arch_capabilities = Some(if old { 0b101 } else { 0x101 });
    }
    host
}

fn cpu(hosts: &[Host]) -> Result<GuestCpu, NoGuestCpu> {
    let mut fleet = Fleet::new();
    for host in hosts {
        fleet.add(host).unwrap();
    }
    fleet.guest_cpu()
}

const FLEETS: [&[&str]; 6] = [
    &["sapphire-rapids"],
    &["sapphire-rapids", "granite-rapids"],
    &["sapphire-rapids", "ice-lake-server"],
    &["sapphire-rapids", "granite-rapids", "diamond-rapids"],
    &["diamond-rapids", "ice-lake-server", "haswell-client"],
    &["amd-zen4-genoa"],
];

fn hosts(names: &[&str]) -> Vec<Host> {
    names.iter().map(|name| host(name)).collect()
}

/// Firecracker's reader: the fields and the syntax of its documentation.
mod firecracker {
    use super::*;

    #[derive(Debug, Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct Template {
        pub(super) cpuid_modifiers: Vec<LeafModifier>,
        pub(super) msr_modifiers: Vec<MsrModifier>,
    }

    #[derive(Debug, Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct LeafModifier {
        pub(super) leaf: String,
        pub(super) subleaf: String,
        pub(super) flags: u32,
        pub(super) modifiers: Vec<RegisterModifier>,
    }

    #[derive(Debug, Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct RegisterModifier {
        pub(super) register: String,
        pub(super) bitmap: String,
    }

    #[derive(Debug, Clone, Deserialize)]
    #[serde(deny_unknown_fields)]
    pub(super) struct MsrModifier {
        pub(super) addr: String,
        pub(super) bitmap: String,
    }

    fn hex(text: &str) -> u32 {
        u32::from_str_radix(text.strip_prefix("0x").unwrap(), 16).unwrap()
    }

    /// The bits that are forced, and to what.
    pub(super) fn bitmap(text: &str, bits: usize) -> (u64, u64) {
        let digits = text.strip_prefix("0b").unwrap();
        assert_eq!(digits.len(), bits);
        digits.bytes().fold((0, 0), |(mask, value), digit| {
            let (forced, one) = match digit {
                b'x' => (0, 0),
                b'0' => (1, 0),
                b'1' => (1, 1),
                other => panic!("{other}"),
            };
            (mask << 1 | forced, value << 1 | one)
        })
    }

    impl Template {
        pub(super) fn parse(rendered: &Rendered) -> Self {
            serde_json::from_str(&rendered.text).unwrap()
        }

        /// What Firecracker gives to a guest on a host with this KVM; `None` where it refuses.
        pub(super) fn apply(&self, kvm: &Table) -> Option<Table> {
            let mut guest = kvm.clone();
            for modifier in &self.cpuid_modifiers {
                let (leaf, subleaf) = (hex(&modifier.leaf), hex(&modifier.subleaf));
                let entry = guest.find_leaf(leaf, subleaf)?;
                let has_subleaves = cpuid_amx::table::has_subleaves(leaf);
                assert_eq!(modifier.flags, u32::from(has_subleaves), "{leaf:#x}");
                let mut value = entry.value;
                for change in &modifier.modifiers {
                    let names = ["eax", "ebx", "ecx", "edx"];
                    let at = names
                        .iter()
                        .position(|name| **name == change.register)
                        .unwrap();
                    let (mask, forced) = bitmap(&change.bitmap, 32);
                    let half = |bits: u64| u32::try_from(bits).unwrap();
                    value[at] = value[at] & !half(mask) | half(forced);
                }
                guest.set_leaf(leaf, subleaf, value).unwrap();
            }
            Some(guest)
        }

        /// What it gives of IA32_ARCH_CAPABILITIES.
        pub(super) fn msr(&self, host: u64) -> u64 {
            self.msr_modifiers.iter().fold(host, |value, modifier| {
                assert_eq!(modifier.addr, "0x10a");
                let (mask, forced) = bitmap(&modifier.bitmap, 64);
                value & !mask | forced
            })
        }
    }
}

use firecracker::Template;

fn msr(host: &Host) -> u64 {
    let kvm = host.kvm.as_ref().unwrap();
    kvm.feature_msrs.arch_capabilities.unwrap()
}

/// The verdicts of all hosts on a guest that a template makes on one of them.
fn verdicts(template: &Template, home: &Host, hosts: &[Host]) -> Vec<Verdict> {
    let table = template.apply(home.guest_cpuid().unwrap()).unwrap();
    let mut msrs = home.kvm.as_ref().unwrap().feature_msrs;
    msrs.arch_capabilities = Some(template.msr(msr(home)));
    let guest = Guest::new(&table).feature_msrs(msrs);
    let mut found = coherence::check(&table);
    found.retain(|contradiction| !contradiction.is_recomputed_by_kvm());
    assert_eq!(found, [], "{}", home.name);
    hosts
        .iter()
        .map(|host| {
            let compatibility = compat::check(guest, host);
            if compatibility.verdict() != Verdict::Runs {
                println!(
                    "{} on {}: {:?}",
                    home.name, host.name, compatibility.reasons
                );
            }
            compatibility.verdict()
        })
        .collect()
}

#[test]
fn a_guest_of_firecracker_runs_on_every_host_of_the_fleet() {
    for names in FLEETS {
        let hosts = hosts(names);
        let cpu = cpu(&hosts).unwrap();
        for home in &hosts {
            let own = cpu.on(home).unwrap();
            let template = Template::parse(&render::firecracker(&own).unwrap());
            let runs = vec![Verdict::Runs; hosts.len()];
            assert_eq!(
                verdicts(&template, home, &hosts),
                runs,
                "{names:?}: {}",
                home.name
            );
        }
    }
}

/// Firecracker refuses a template with a leaf that its host lacks.
#[test]
fn one_template_serves_all_hosts_or_there_is_none() {
    let mut whole = 0;
    for names in FLEETS {
        let hosts = hosts(names);
        let runs = vec![Verdict::Runs; hosts.len()];
        match render::firecracker(&cpu(&hosts).unwrap()) {
            Ok(rendered) => {
                whole += 1;
                let template = Template::parse(&rendered);
                for home in &hosts {
                    assert_eq!(verdicts(&template, home, &hosts), runs, "{names:?}");
                }
            }
            Err(RenderError::LeafOfSomeHosts { leaf, subleaf }) => {
                let has = |host: &&Host| host.guest_cpuid().unwrap().leaf(leaf, subleaf) != [0; 4];
                let count = hosts.iter().filter(has).count();
                assert!(0 < count && count < hosts.len(), "{names:?}");
            }
            Err(error) => panic!("{error}"),
        }
    }
    assert!(whole >= 3, "{whole}");
}

/// Each bit that a template clears of what the other host lacks is one that has to be cleared.
#[test]
fn a_bit_that_is_left_keeps_the_guest_from_the_host_that_lacks_it() {
    let hosts = hosts(&["sapphire-rapids", "ice-lake-server"]);
    let own = cpu(&hosts).unwrap().on(&hosts[0]).unwrap();
    let template = Template::parse(&render::firecracker(&own).unwrap());
    let mut relaxed = 0;
    // SERIALIZE, CLDEMOTE and WAITPKG: features without a component.
    for (register, bit) in [("edx", 14), ("ecx", 25), ("ecx", 5)] {
        let mut broken = template.clone();
        let leaf = broken
            .cpuid_modifiers
            .iter_mut()
            .find(|leaf| leaf.leaf == "0x7" && leaf.subleaf == "0x0")
            .unwrap();
        let change = leaf
            .modifiers
            .iter_mut()
            .find(|change| change.register == register)
            .unwrap();
        let at = change.bitmap.len() - 1 - bit;
        assert_eq!(&change.bitmap[at..=at], "0", "{register} {bit}");
        change.bitmap.replace_range(at..=at, "x");
        let [here, there] = verdicts(&broken, &hosts[0], &hosts)[..] else {
            panic!()
        };
        assert_eq!(here, Verdict::Runs);
        if there != Verdict::Runs {
            relaxed += 1;
        }
    }
    assert_eq!(relaxed, 3);
}

#[test]
fn msrs_are_what_all_hosts_have() {
    let hosts = hosts(&["sapphire-rapids", "ice-lake-server"]);
    let own = cpu(&hosts).unwrap().on(&hosts[0]).unwrap();
    let template = Template::parse(&render::firecracker(&own).unwrap());
    // RDCL_NO stays, TAA_NO goes, and RSBA is told on both.
    assert_eq!([template.msr(0x101), template.msr(0b101)], [0b101, 0b101]);
    // Where it is not known of one host, it stays, and that is said.
    let mut unknown = hosts.clone();
    unknown[1]
        .kvm
        .as_mut()
        .unwrap()
        .feature_msrs
        .arch_capabilities = None;
    let own = cpu(&unknown).unwrap().on(&unknown[0]).unwrap();
    let rendered = render::firecracker(&own).unwrap();
    assert_eq!(Template::parse(&rendered).msr(0x101), 0x101);
    assert!(said(&rendered, What::FeatureMsrs).contains("is not known of every host"));
}

fn said(rendered: &Rendered, what: What) -> String {
    let not_held = rendered.not_held.iter();
    let why: Vec<&str> = not_held
        .filter(|not_held| not_held.what == what)
        .map(|not_held| &*not_held.why)
        .collect();
    why.join("\n")
}

#[test]
fn what_a_format_cannot_hold_is_said() {
    let hosts = hosts(&["diamond-rapids"]);
    let cpu = cpu(&hosts).unwrap();
    let [firecracker, qemu, cpuid] = [
        render::firecracker(&cpu).unwrap(),
        render::qemu(&cpu),
        render::cpuid(&cpu),
    ];
    for (rendered, whats) in [
        (
            &firecracker,
            &[
                What::AmxPermission,
                What::XsaveLayout,
                What::FeatureMsrs,
                What::Tsc,
            ][..],
        ),
        (
            &qemu,
            &[
                What::AmxPermission,
                What::XsaveLayout,
                What::Leaf1eh1,
                What::Cpuid,
                What::Tsc,
            ],
        ),
        (&cpuid, &[What::AmxPermission, What::FeatureMsrs, What::Tsc]),
    ] {
        for &what in whats {
            assert_ne!(said(rendered, what), "", "{what:?}");
        }
    }
    // A dump with AVX10.2, of three vector lengths.
    let mut table = diamond_rapids();
    table.set_leaf(0x24, 0, [0, 2 | 7 << 16, 0, 0]).unwrap();
    let has_avx10 = self::cpu(&[Host::from_cpuid("avx10", table)]).unwrap();
    let cpuid = render::cpuid(&has_avx10);
    assert!(
        said(&cpuid, What::Cpuid).contains("vector lengths"),
        "{cpuid:?}"
    );
    // QEMU has no name for PCONFIG.
    assert!(said(&qemu, What::Cpuid).contains("PCONFIG"), "{qemu:?}");
    // Where the guest has no AMX, nobody has to ask for it.
    let without = self::cpu(&self::hosts(&["ice-lake-server"])).unwrap();
    assert_eq!(said(&render::qemu(&without), What::AmxPermission), "");
}

#[test]
fn a_dump_is_read_back_by_this_crate_and_runs_on_every_host() {
    for names in FLEETS {
        let hosts = hosts(names);
        let cpu = cpu(&hosts).unwrap();
        let table: Table = render::cpuid(&cpu).text.parse().unwrap();
        assert_eq!(&table, cpu.cpuid());
        for host in &hosts {
            let compatibility = compat::check(Guest::new(&table), host);
            assert_eq!(compatibility.verdict(), Verdict::Runs, "{names:?}");
            assert_eq!(compatibility.contradictions, []);
        }
    }
}

#[test]
fn hosts_without_a_guest_in_common_have_no_template() {
    let error = cpu(&hosts(&["sapphire-rapids", "amd-zen4-genoa"])).unwrap_err();
    let vendors = ["AuthenticAMD", "GenuineIntel"].map(String::from).to_vec();
    assert_eq!(error, NoGuestCpu::Vendors { vendors });
    assert_eq!(cpu(&[]), Err(NoGuestCpu::NoHosts));
    // A host that is not of the fleet cannot give its CPU.
    let cpu = cpu(&hosts(&["sapphire-rapids"])).unwrap();
    let error = cpu.on(&host("ice-lake-server")).unwrap_err();
    assert!(
        error.to_string().contains("ice-lake-server cannot give"),
        "{error}"
    );
}

/// The program `cpuid` prints what it has read, if it is here.
#[test]
fn cpuid_reads_a_dump() {
    let cpu = cpu(&hosts(&["sapphire-rapids", "granite-rapids"])).unwrap();
    let mut file = std::env::temp_dir();
    file.push(format!("host-compat-render-{}.cpuid", std::process::id()));
    std::fs::write(&file, render::cpuid(&cpu).text).unwrap();
    let output = Command::new("cpuid")
        .arg("-r")
        .arg("-f")
        .arg(&file)
        .output();
    std::fs::remove_file(&file).unwrap();
    let Ok(output) = output else {
        println!("skipped: there is no program cpuid");
        return;
    };
    let text = String::from_utf8(output.stdout).unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && errors.is_empty(), "{errors}");
    let lines = text.lines().filter(|line| line.contains("eax="));
    let table: Table = lines
        .fold(String::new(), |all, line| all + line + "\n")
        .parse()
        .unwrap();
    assert_eq!(&table, cpu.cpuid());
}

/// What a QEMU with this option says of its CPU: registers of features, those that its accelerator lacks
/// among them. `None` where there is no QEMU.
fn qemu(option: &str) -> Option<Result<Vec<Value>, String>> {
    let mut child = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-machine", "pc", "-m", "16", "-nodefaults"])
        .args(["-display", "none", "-S", "-qmp", "stdio", "-cpu", option])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()?;
    let get = |property| {
        format!(
            r#"{{"execute":"qom-get","arguments":{{"path":"/machine/unattached/device[0]","property":"{property}"}}}}"#
        )
    };
    let commands = [
        r#"{"execute":"qmp_capabilities"}"#.to_owned(),
        get("feature-words"),
        get("filtered-features"),
        r#"{"execute":"quit"}"#.to_owned(),
    ];
    // Where it has ended already, its errors say why.
    let _ = child
        .stdin
        .take()
        .unwrap()
        .write_all(commands.join("\n").as_bytes());
    let output = child.wait_with_output().unwrap();
    if !output.status.success() {
        return Some(Err(String::from_utf8_lossy(&output.stderr).into_owned()));
    }
    let replies = String::from_utf8(output.stdout).unwrap();
    let replies = replies
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let words = replies.filter_map(|reply| reply.get("return")?.as_array().cloned());
    Some(Ok(words.flatten().collect()))
}

/// Each feature by name is the bit that it stands for, in QEMU itself.
#[test]
fn qemu_reads_its_option() {
    let mut seen = 0;
    for names in FLEETS {
        let cpu = cpu(&hosts(names)).unwrap();
        let rendered = render::qemu(&cpu);
        let option = rendered.text.trim().strip_prefix("-cpu ").unwrap();
        let option = option.strip_suffix(",enforce").unwrap();
        // Names that this QEMU is too old for are said to be: it refuses the first of them.
        let newer = said(&rendered, What::Cpuid);
        let newer = newer
            .lines()
            .find(|line| line.contains("does not know these names"));
        let newer: Vec<&str> = newer.map_or(vec![], |line| {
            line.rsplit(": ").next().unwrap().split(", ").collect()
        });
        let mut flags: Vec<&str> = option.split(',').collect();
        let words = loop {
            let Some(found) = qemu(&flags.join(",")) else {
                println!("skipped: there is no QEMU for x86-64");
                return;
            };
            match found {
                Ok(words) => break words,
                Err(error) => {
                    let unknown = newer
                        .iter()
                        .find(|name| error.contains(&format!(".{name}'")));
                    let unknown = unknown.unwrap_or_else(|| panic!("{names:?}: {error}"));
                    flags.retain(|flag| flag.strip_prefix('+') != Some(unknown));
                }
            }
        };
        let absent: Vec<&str> = newer
            .iter()
            .copied()
            .filter(|name| !flags.contains(&&*format!("+{name}")))
            .collect();
        for (leaf, subleaf, register, at) in [
            (1, 0, "ECX", 2),
            (1, 0, "EDX", 3),
            (7, 0, "EBX", 1),
            (7, 0, "ECX", 2),
            (7, 0, "EDX", 3),
            (7, 1, "EAX", 0),
            (0xd, 1, "EAX", 0),
            (0x8000_0001, 0, "ECX", 2),
            (0x8000_0001, 0, "EDX", 3),
            (0x8000_0008, 0, "EBX", 1),
        ] {
            let is_it = |word: &&Value| {
                word["cpuid-input-eax"] == leaf
                    && word["cpuid-register"] == register
                    && word
                        .get("cpuid-input-ecx")
                        .is_none_or(|ecx| *ecx == subleaf)
            };
            let of_qemu = words.iter().filter(is_it);
            let of_qemu = of_qemu.fold(0, |all, word| all | word["features"].as_u64().unwrap());
            let ours = u64::from(cpu.cpuid().leaf(leaf, subleaf)[at]);
            // QEMU gives no more than all hosts have, its own bits aside: APIC, TSC-deadline, hypervisor.
            let own = match (leaf, register) {
                (1, "ECX") => 1 << 24 | 1 << 31,
                (1 | 0x8000_0001, "EDX") => 1 << 9,
                _ => 0,
            };
            assert_eq!(of_qemu & !ours & !own, 0, "{names:?} {leaf:#x} {register}");
            // Whatever is missing was said to be.
            let missing = ours & !of_qemu;
            for bit in (0..32).filter(|bit| missing >> bit & 1 != 0) {
                assert!(
                    is_said(&rendered, leaf, subleaf, at, bit) || !absent.is_empty() && leaf == 7,
                    "{names:?} {leaf:#x}.{subleaf} {register} bit {bit}"
                );
            }
            seen += of_qemu.count_ones();
        }
    }
    assert!(seen > 200, "{seen}");
}

/// Whether a bit is among those without a name, or one that needs more than its name.
fn is_said(rendered: &Rendered, leaf: u32, subleaf: u32, register: usize, bit: u32) -> bool {
    let place = cpuid_amx::Bits {
        leaf,
        subleaf,
        register: cpuid_amx::Register::ALL[register],
        mask: 1 << bit,
    };
    let text = said(rendered, What::Cpuid);
    let listed =
        place.names().any(|name| text.contains(name)) || text.contains(&format!("bit {bit}"));
    let alone = matches!(
        (leaf, register, bit),
        (1, 2, 5 | 15)
            | (7, 1, 2 | 6 | 13 | 25)
            | (7, 2, 30)
            | (7, 3, 19)
            | (0x8000_0001, 2, 2 | 22)
    );
    // MONITOR, OSXSAVE, HTT and OSPKE follow from elsewhere.
    let follows = matches!(
        (leaf, register, bit),
        (1, 2, 3 | 27) | (1, 3, 28) | (7, 2, 4)
    );
    // Those of leaf 1 on AMD's processors, of which QEMU shows what its accelerator has.
    let alias = (leaf, register) == (0x8000_0001, 3) && 0x0183_f3ff >> bit & 1 != 0;
    listed || alone || follows || alias
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 128, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever hosts report, a guest with what they share runs on each, and so does one that Firecracker
    /// makes of the template on any of them.
    #[test]
    fn what_is_shared_runs_on_all(tables in prop::collection::vec(entries(), 1..4)) {
        let hosts = tables.into_iter().enumerate().map(|(index, entries)| {
            let mut table: Table = entries.into_iter().collect();
            // Firecracker reads what KVM gives; sub-leaves that answer for all are none of that.
            table.retain_leaves(|entry| {
                entry.subleaf.is_some() || !cpuid_amx::table::has_subleaves(entry.leaf)
            });
            Host::from_cpuid(index.to_string(), table)
        });
        let hosts: Vec<Host> = hosts.filter(Host::is_described).collect();
        let Ok(cpu) = cpu(&hosts) else {
            return Ok(());
        };
        for host in &hosts {
            let compatibility = compat::check(Guest::new(cpu.cpuid()), host);
            prop_assert_eq!(compatibility.verdict(), Verdict::Runs, "{:?}", compatibility.reasons);
        }
        for home in &hosts {
            let template = Template::parse(&render::firecracker(&cpu.on(home).unwrap()).unwrap());
            let table = template.apply(home.guest_cpuid().unwrap()).unwrap();
            for host in &hosts {
                let compatibility = compat::check(Guest::new(&table), host);
                prop_assert_eq!(compatibility.verdict(), Verdict::Runs, "{:?}", compatibility.reasons);
            }
        }
    }
}

#[test]
fn without_amx_there_is_a_name_less() {
    let mut table = fixture("sapphire-rapids");
    let with = cpu(&[Host::from_cpuid("a", table.clone())]).unwrap();
    Policy::hide_amx().apply(&mut table).unwrap();
    let without = cpu(&[Host::from_cpuid("a", table)]).unwrap();
    let has = |cpu: &GuestCpu| render::qemu(cpu).text.contains(",+amx-tile,");
    assert_eq!((has(&with), has(&without)), (true, false));
}

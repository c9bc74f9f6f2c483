//! Linux guests between unlike hosts: each of the lab's kernels to each, and between processors. The snapshot
//! is carried on this machine from one lab to another.
//!
//! This program starts labs and sends itself into them, so it has to be static: `cargo matrix`.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

#[path = "matrix/carry.rs"]
mod carry;
mod support;
#[path = "matrix/task.rs"]
mod task;

use amx_guest::report::{LOADS, Load};
use amx_lab::{Cpu, Kernel};
use amx_vmm::Snapshot;
use carry::{Carrier, Place};
use comfy_table::{Table, presets};
use cpuid_amx::{AmxFeatures, Feature};
use host_compat::Host;
use host_compat::compat::{self, Guest, Reason, Usage, Verdict};
use kvm_bindings::{CpuId, kvm_cpuid_entry2};
use task::{Boot, GoOn, Task, VECTORS};
use xsave_state::{ComponentId, ExtendedState, Misfit, XFeatures};

/// Kernels of guests. Bookworm's does not boot in the lab: docs/matrix.md.
const GUESTS: [Kernel; 2] = [Kernel::Trixie, Kernel::Sid];
/// Processors without AMX. Ice Lake has the same components as Tiger Lake, at the same offsets.
const WITHOUT_AMX: [Cpu; 3] = [Cpu::TigerLake, Cpu::SkylakeX, Cpu::ArrowLake];

/// The host where the guest boots, the guest's kernel, and the host where it goes on.
#[test]
#[ignore = "it runs for minutes: cargo matrix"]
fn every_kernel_to_every_kernel() {
    let Some(carrier) = Carrier::new("every_kernel_to_every_kernel") else {
        return;
    };
    let mut table = printed([
        "guest",
        "from",
        "to",
        "live at the stop",
        "rounds there",
        "rounds here",
        "the guest's verdict",
    ]);
    // What a guest sees that any of them may have to go on with.
    let others = Kernel::ALL.map(|kernel| {
        let place = Place::with(kernel);
        let (described, _) = carrier.run(place, Kernel::default(), None, &Task::Describe);
        described.description.expect("it was asked for")
    });
    let boot = Task::Boot(Boot {
        others: others.into(),
    });
    let mut rows = 0;
    for source in Kernel::ALL {
        for guest in GUESTS {
            // The first goes everywhere, the others one way.
            if guest != Kernel::default() && source != Kernel::default() {
                continue;
            }
            let (booted, snapshot) = carrier.run(Place::with(source), guest, None, &boot);
            let snapshot = snapshot.expect("the guest was stopped");
            let live: XFeatures = booted.live();
            assert!(live.contains(XFeatures::XTILEDATA), "{booted:?}");
            for destination in Kernel::ALL {
                if guest != Kernel::default() && destination != guest {
                    continue;
                }
                let end = Task::GoOn(GoOn {
                    end: true,
                    ..GoOn::default()
                });
                let place = Place::with(destination);
                let (ended, _) = carrier.run(place, guest, Some(&snapshot), &end);
                assert!(ended.went_on(&booted), "{ended:?}");
                let live = names(live);
                let (before, after) = (booted.rounds().to_string(), ended.rounds().to_string());
                println!("{guest}: {source} to {destination}: all right");
                table.add_row([
                    &booted.guest,
                    &booted.host,
                    &ended.host,
                    &live,
                    &before,
                    &after,
                    "all right",
                ]);
                rows += 1;
            }
        }
    }
    println!("{table}");
    assert_eq!(rows, 10);
}

/// From a host with AMX to each processor without, and back.
#[test]
#[ignore = "it runs for minutes: cargo matrix"]
fn between_processors() {
    let Some(carrier) = Carrier::new("between_processors") else {
        return;
    };
    let amx_host = Place::default();
    let tiles = Task::Boot(Boot::default());
    let kernel = Kernel::default();
    let (_, with_tiles) = carrier.run(amx_host, kernel, None, &tiles);
    let with_tiles = with_tiles.expect("the guest was stopped");
    let mut table = printed([
        "processor",
        "with AMX live",
        "the guest of what both have",
        "live at the stops",
        "state in bytes, there and back",
        "the guest's verdict",
    ]);
    for cpu in WITHOUT_AMX {
        let place = Place { cpu, ..amx_host };
        let (described, _) = carrier.run(place, kernel, None, &Task::Describe);
        let host: Host = described.description.expect("it was asked for");
        refuses(
            &host,
            &Snapshot::from_bytes(&with_tiles).expect("it is a snapshot"),
        );
        let (refused, _) = carrier.run(place, kernel, Some(&with_tiles), &Task::Refuse);
        println!("{cpu}: {}", refused.refused.expect("it says why"));

        let boot = Task::Boot(Boot { others: vec![host] });
        let go_on = |end| {
            Task::GoOn(GoOn {
                relayout: true,
                end,
            })
        };
        let (booted, snapshot) = carrier.run(amx_host, kernel, None, &boot);
        let (there, back) = carrier.run(place, kernel, snapshot.as_deref(), &go_on(false));
        let (ended, _) = carrier.run(amx_host, kernel, back.as_deref(), &go_on(true));
        for (now, before) in [(&there, &booted), (&ended, &there)] {
            assert!(now.went_on(before), "{now:?}");
            assert!(before.live().contains(VECTORS), "{before:?}");
            for (load, process) in LOADS.iter().zip(&now.processes) {
                assert_eq!(process.rounds > 0, *load == Load::Vectors, "{now:?}");
            }
        }
        let [Some(sent), Some(relaid), Some(returned)] =
            [&booted, &there, &ended].map(|said| said.bytes.last().copied())
        else {
            panic!("each says so");
        };
        println!("{cpu}: there and back: all right");
        table.add_row([
            cpu.to_string(),
            "refused".to_owned(),
            names(booted.xcr0()),
            format!("{}; {}", names(booted.live()), names(there.live())),
            format!("{sent} → {relaid} → {returned}"),
            "all right".to_owned(),
        ]);
    }
    println!("{table}");
}

/// A guest of what both have goes from a host with more of AMX to one with less, and back, with live tiles. One that
/// sees all of AMX is refused there.
#[test]
#[ignore = "it runs for minutes: cargo matrix"]
fn between_processors_with_amx() {
    let Some(carrier) = Carrier::new("between_processors_with_amx") else {
        return;
    };
    let (kernel, less) = (Kernel::default(), Place::default());
    let more = Place {
        cpu: Cpu::GraniteRapids,
        ..less
    };
    let all = Task::Boot(Boot::default());
    let (_, sees_all) = carrier.run(more, kernel, None, &all);
    let (refused, _) = carrier.run(less, kernel, sees_all.as_deref(), &Task::Refuse);
    let refused = refused.refused.expect("it says why");
    assert!(refused.contains("AMX-FP16"), "{refused}");

    let (described, _) = carrier.run(less, kernel, None, &Task::Describe);
    let host = described.description.expect("it was asked for");
    let boot = Task::Boot(Boot { others: vec![host] });
    let go_on = |end| {
        Task::GoOn(GoOn {
            end,
            ..GoOn::default()
        })
    };
    let (booted, snapshot) = carrier.run(more, kernel, None, &boot);
    let (there, back) = carrier.run(less, kernel, snapshot.as_deref(), &go_on(false));
    let (ended, _) = carrier.run(more, kernel, back.as_deref(), &go_on(true));
    for (now, before) in [(&there, &booted), (&ended, &there)] {
        assert!(now.went_on(before), "{now:?}");
        assert!(before.live().contains(XFeatures::XTILEDATA), "{before:?}");
        println!("{} live at the stop: all right", names(before.live()));
    }
}

/// By cpuid-amx's reasons, each typed.
fn refuses(host: &Host, snapshot: &Snapshot) {
    let [vcpu, ..] = snapshot.vcpus() else {
        panic!("it has a vCPU");
    };
    let entries: Vec<kvm_cpuid_entry2> = vcpu.cpuid().iter().copied().map(Into::into).collect();
    let cpuid = CpuId::from_entries(&entries).expect("KVM took as many");
    let sees: cpuid_amx::Table = cpuid_amx::CpuidTable::entries(&cpuid).collect();
    let states: Vec<ExtendedState<'_>> = snapshot
        .vcpus()
        .iter()
        .map(|vcpu| vcpu.extended().clone())
        .collect();
    let compatibility = compat::check(Guest::new(&sees).running(&states), host);
    for reason in &compatibility.reasons {
        println!("  {reason}");
    }
    assert_eq!(compatibility.verdict(), Verdict::No);
    for feature in [AmxFeatures::TILE, AmxFeatures::INT8, AmxFeatures::BF16] {
        let reason = Reason::Feature {
            feature: Feature::Amx(feature),
            usage: Usage::Enabled,
        };
        assert!(compatibility.reasons.contains(&reason), "{reason}");
    }
    let vcpu = states
        .iter()
        .position(|state| state.image().xstate_bv().contains(XFeatures::XTILEDATA));
    let reason = Reason::Loss {
        vcpu: u32::try_from(vcpu.expect("one has live tiles")).expect("there are few"),
        loss: Misfit::Missing {
            component: ComponentId::XTILEDATA,
        },
    };
    assert!(compatibility.reasons.contains(&reason), "{reason}");
    // No remedy would help, and what is no part of AMX is refused only where it is missing.
    assert_eq!(
        compatibility.reasons.iter().any(|reason| matches!(
            reason,
            Reason::Component { sees, usage: Usage::Enabled } if sees.id == ComponentId::PKRU
        )),
        !host.guest_features().user().contains(XFeatures::PKRU)
    );
}

/// A table as docs/matrix.md has it.
fn printed<const N: usize>(header: [&str; N]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header(header);
    table
}

/// Without the bars that separate columns.
fn names(components: XFeatures) -> String {
    components.to_string().replace(" | ", ", ")
}

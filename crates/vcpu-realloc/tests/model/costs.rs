//! What each strategy costs, counted from the functions of `fpswitch`.

use std::fmt::Write as _;

use vcpu_realloc::fpswitch::{Moment, Situation, Strategy};
use xsave_state::XFeatures;

use super::docs;
use super::kernel::bits;

/// What happens between two stretches of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    /// It exits and enters again.
    Exit,
    /// The same, and a softirq uses the FPU in between.
    Softirq,
    /// The same, and another task of the host runs in between.
    Preemption,
}

const EVENTS: [Event; 3] = [Event::Exit, Event::Softirq, Event::Preemption];

/// A guest, and what it has in its registers at an exit.
#[derive(Clone, Copy)]
struct Guest {
    xfd: bool,
    in_use: bool,
}

const GUESTS: [(&str, Guest); 4] = [
    (
        "XFD clear, tiles initial",
        Guest {
            xfd: false,
            in_use: false,
        },
    ),
    (
        "XFD clear, tiles in use",
        Guest {
            xfd: false,
            in_use: true,
        },
    ),
    (
        "XFD set, tiles initial",
        Guest {
            xfd: true,
            in_use: false,
        },
    ),
    (
        "XFD set, tiles in use",
        Guest {
            xfd: true,
            in_use: true,
        },
    ),
];

/// What was done to a processor.
#[derive(Clone, Copy, Default, Debug, PartialEq, Eq)]
struct Cost {
    /// WRMSR of IA32_XFD.
    writes: u64,
    /// XGETBV with ECX = 1: moments at which the plan depends on what is in use.
    reads: u64,
    /// The tiles were in use and have been saved as initial.
    lost: bool,
}

struct Processor {
    xfd: XFeatures,
    cost: Cost,
}

impl Processor {
    fn at(&mut self, strategy: Strategy, moment: Moment, guest: Guest) {
        let situation = |in_use| Situation {
            in_use: bits(in_use),
            guest_xfd: bits(guest.xfd),
            processor_xfd: self.xfd,
        };
        let plan = strategy.plan(moment, situation(guest.in_use));
        let depends = plan != strategy.plan(moment, situation(!guest.in_use));
        // A restore knows it from the area.
        self.cost.reads += u64::from(depends && moment != Moment::Restore);
        self.cost.lost |=
            moment == Moment::Save && guest.in_use && !plan.during(self.xfd).is_empty();
        self.cost.writes += plan.writes().count() as u64;
        self.xfd = plan.end(self.xfd);
    }
}

/// The cost of one event, from guest to guest. A host task has no AMX: XFD is set for it, by Linux's
/// own way.
fn cost(strategy: Strategy, event: Event, guest: Guest) -> Cost {
    let mut processor = Processor {
        xfd: bits(guest.xfd),
        cost: Cost::default(),
    };
    processor.at(strategy, Moment::Exit, guest);
    // What Linux saves as initial is initial when it comes back.
    let mut later = guest;
    if event != Event::Exit {
        processor.at(strategy, Moment::Save, guest);
        later.in_use &= !processor.cost.lost;
    }
    if event == Event::Preemption {
        let task = Guest {
            xfd: true,
            in_use: false,
        };
        processor.at(Strategy::Linux, Moment::Restore, task);
        processor.at(Strategy::Linux, Moment::Save, task);
    }
    if event != Event::Exit {
        processor.at(strategy, Moment::Restore, later);
    }
    processor.at(strategy, Moment::Entry, later);
    assert_eq!(processor.xfd, bits(guest.xfd));
    processor.cost
}

/// Each event's number in a second, for a guest.
struct Workload {
    name: &'static str,
    parts: &'static [(Guest, [u64; 3])],
}

const INITIAL: Guest = GUESTS[2].1;
const COMPUTES: Guest = GUESTS[1].1;
const DISABLED: Guest = GUESTS[3].1;

const WORKLOADS: [Workload; 5] = [
    Workload {
        name: "idle: 100 timer interrupts, each ends in HLT and another task of the host",
        parts: &[(INITIAL, [0, 0, 100])],
    },
    Workload {
        name: "AMX-heavy: one task computes; 1,000 exits, 20 softirqs that use the FPU, 50 preemptions",
        parts: &[(COMPUTES, [930, 20, 50])],
    },
    Workload {
        name: "AMX-heavy and switching tasks: the same, one exit in 100 between the guest's WRMSR and \
               its XRSTORS",
        parts: &[(COMPUTES, [920, 20, 50]), (DISABLED, [10, 0, 0])],
    },
    Workload {
        name: "interrupt storm: one task computes; 100,000 exits, 1,000 softirqs, 100 preemptions",
        parts: &[(COMPUTES, [98_900, 1_000, 100])],
    },
    Workload {
        name: "interrupt storm over a guest that leaves tiles in use while XFD is set",
        parts: &[(DISABLED, [98_900, 1_000, 100])],
    },
];

fn total(strategy: Strategy, workload: &Workload) -> Cost {
    let mut all = Cost::default();
    for &(guest, numbers) in workload.parts {
        for (event, number) in EVENTS.into_iter().zip(numbers) {
            let one = cost(strategy, event, guest);
            all.writes += one.writes * number;
            all.reads += one.reads * number;
            all.lost |= one.lost && number > 0;
        }
    }
    all
}

fn cell(cost: Cost) -> String {
    let lost = if cost.lost { ", tiles lost" } else { "" };
    format!("{}{lost}", cost.writes)
}

#[test]
fn what_each_strategy_writes_for_each_event() {
    let mut text = String::from(
        "| the guest has | event | Linux | option 1 | option 2 |\n|---|---|---|---|---|\n",
    );
    for (name, guest) in GUESTS {
        for event in EVENTS {
            let cells = Strategy::ALL.map(|strategy| cell(cost(strategy, event, guest)));
            let event = format!("{event:?}").to_lowercase();
            writeln!(text, "| {name} | {event} | {} |", cells.join(" | ")).unwrap();
        }
    }
    docs::check("costs per event", &text);
}

#[test]
fn what_each_strategy_costs_for_each_workload() {
    let mut text = String::from(
        "| in a second | Linux | option 1 | option 2 | XINUSE read by 1 | by 2 |\n|---|---|---|---|---|---|\n",
    );
    for workload in &WORKLOADS {
        let costs = Strategy::ALL.map(|strategy| total(strategy, workload));
        let [linux, one, two] = costs;
        writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} |",
            workload.name,
            cell(linux),
            cell(one),
            cell(two),
            one.reads,
            two.reads
        )
        .unwrap();
    }
    docs::check("costs per workload", &text);
}

#[test]
fn option_2_never_writes_more_than_option_1_and_less_where_an_exit_saves_nothing() {
    for (name, guest) in GUESTS {
        for event in EVENTS {
            let [linux, one, two] = Strategy::ALL.map(|strategy| cost(strategy, event, guest));
            assert!(two.writes <= one.writes, "{name}, {event:?}");
            assert!(two.reads <= one.reads, "{name}, {event:?}");
            assert!(!one.lost && !two.lost, "{name}, {event:?}");
            let disabled = guest.xfd && guest.in_use;
            assert_eq!(linux.lost, disabled && event != Event::Exit);
            if event == Event::Exit {
                assert_eq!((one.writes, two.writes), (if disabled { 2 } else { 0 }, 0));
            } else {
                assert_eq!(one.writes, two.writes, "{name}, {event:?}");
            }
            // Nothing is paid for what is not disabled while in use.
            if !disabled {
                assert_eq!((one.writes, two.writes), (linux.writes, linux.writes));
            }
        }
    }
}

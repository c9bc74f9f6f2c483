//! The table of transitions in the documentation, made from the code: every reachable state of gates
//! with one and with two features meets every kind of event.
//!
//! `UPDATE_TRANSITIONS=1 cargo test -p vcpu-realloc --lib transitions` writes it anew.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::tests::{amx_layout, two_layout};
use super::*;

const STATES: [&str; 4] = ["idle", "held", "found", "passed"];

/// Rows in the order of the table: event, and when.
const ROWS: [(&str, &str); 23] = [
    ("WriteXfd", "reserved bits"),
    ("WriteXfd", "first use"),
    ("WriteXfd", "otherwise"),
    ("WriteXcr0", "XSETBV refuses it"),
    ("WriteXcr0", "first use"),
    ("WriteXcr0", "otherwise"),
    ("ObserveXcr0", "always"),
    (
        "Observe",
        "first use, or in use and not granted, or owed since a restore",
    ),
    ("Observe", "otherwise"),
    (
        "Restore",
        "first use, or in use or granted before, and not granted here",
    ),
    ("Restore", "otherwise"),
    ("GrantedElsewhere", "always"),
    ("Grant", "of everything"),
    ("Grant", "of what is asked, not everything"),
    ("Grant", "of less than is asked"),
    ("Deny", "of what no vCPU of the VM was granted"),
    ("Deny", "otherwise"),
    ("Fail", "always"),
    ("Retry", "always"),
    ("Withdraw", "always"),
    ("Reset", "always"),
    ("Init", "first use by the registers as they are"),
    ("Init", "otherwise"),
];

fn state(gate: &Gate) -> &'static str {
    match gate.state.question {
        Some(Question { write: Some(_), .. }) => "held",
        Some(Question { write: None, .. }) => "found",
        None if gate.has_passed() => "passed",
        None => "idle",
    }
}

/// The row of an event, decided by the words of the documentation and not by the gate's functions.
fn row(gate: &Gate, event: Event) -> (&'static str, &'static str) {
    let layout = gate.layout();
    let missing = layout.xfd().bits() & !gate.granted().bits();
    let usable = |xcr0: XFeatures, xfd: XFeatures| xcr0.bits() & !xfd.bits() & missing != 0;
    let asked = gate
        .waiting_for()
        .map_or(0, |growth| growth.features().bits());
    match event {
        Event::WriteXfd(xfd) if xfd.bits() & !layout.xfd().bits() != 0 => ROWS[0],
        Event::WriteXfd(xfd) if usable(gate.xcr0(), xfd) => ROWS[1],
        Event::WriteXfd(_) => ROWS[2],
        Event::WriteXcr0(xcr0) if xcr0::check(xcr0, layout.user()).is_err() => ROWS[3],
        Event::WriteXcr0(xcr0) if usable(xcr0, gate.xfd()) => ROWS[4],
        Event::WriteXcr0(_) => ROWS[5],
        Event::ObserveXcr0(_) => ROWS[6],
        Event::Observe { xcr0, xfd, in_use }
            if usable(xcr0, xfd) || in_use.bits() & missing != 0 || owed(gate) =>
        {
            ROWS[7]
        }
        Event::Observe { .. } => ROWS[8],
        Event::Restore {
            xcr0,
            xfd,
            in_use,
            granted,
        } if usable(xcr0, xfd) || (in_use | granted).bits() & missing != 0 => ROWS[9],
        Event::Restore { .. } => ROWS[10],
        Event::GrantedElsewhere(_) => ROWS[11],
        Event::Grant(features) if missing & !features.bits() == 0 => ROWS[12],
        Event::Grant(features) if asked & !features.bits() == 0 => ROWS[13],
        Event::Grant(_) => ROWS[14],
        Event::Deny if asked & gate.promised().bits() == 0 => ROWS[15],
        Event::Deny => ROWS[16],
        Event::Fail => ROWS[17],
        Event::Retry => ROWS[18],
        Event::Withdraw => ROWS[19],
        Event::Reset => ROWS[20],
        Event::Init if usable(gate.xcr0(), gate.xfd()) => ROWS[21],
        Event::Init => ROWS[22],
    }
}

/// Whether a restore has asked for what the VM was granted before.
fn owed(gate: &Gate) -> bool {
    let asked = gate.waiting_for();
    state(gate) == "found"
        && asked.is_some_and(|growth| growth.features().intersects(gate.promised()))
}

fn name(action: Action) -> &'static str {
    match action {
        Action::Complete => "Complete",
        Action::PassThrough => "PassThrough",
        Action::InjectGp(_) => "InjectGp",
        Action::Grow(_) => "Grow",
        Action::Hold => "Hold",
    }
}

/// Every value of the registers that matters for a layout, legal or not.
fn events(layout: &Layout) -> Vec<Event> {
    let subsets = |of: XFeatures| -> Vec<XFeatures> {
        let bits: Vec<u64> = of.components().map(|id| id.bit().bits()).collect();
        (0..1u32 << bits.len())
            .map(|choice| {
                let chosen = bits.iter().enumerate();
                let chosen = chosen.filter(|(i, _)| choice >> i & 1 != 0);
                XFeatures::from_bits_retain(chosen.map(|(_, bit)| bit).sum())
            })
            .collect()
    };
    let xfds = subsets(layout.xfd());
    let xcr0s = subsets(layout.user());
    let legal = xcr0s
        .iter()
        .filter(|x| xcr0::check(**x, layout.user()).is_ok());
    let legal: Vec<_> = legal.copied().collect();
    let mut events = vec![
        Event::WriteXfd(XFeatures::SSE),
        Event::Deny,
        Event::Fail,
        Event::Retry,
        Event::Withdraw,
        Event::Reset,
        Event::Init,
    ];
    events.extend(xcr0s.iter().map(|xcr0| Event::WriteXcr0(*xcr0)));
    events.extend(legal.iter().map(|xcr0| Event::ObserveXcr0(*xcr0)));
    for &xfd in &xfds {
        events.extend([
            Event::WriteXfd(xfd),
            Event::Grant(xfd),
            Event::GrantedElsewhere(xfd),
        ]);
        for &xcr0 in &legal {
            for &in_use in &xfds {
                events.push(Event::Observe { xcr0, xfd, in_use });
                for &granted in &xfds {
                    events.push(Event::Restore {
                        xcr0,
                        xfd,
                        in_use,
                        granted,
                    });
                }
            }
        }
    }
    events
}

type Cells = BTreeMap<((&'static str, &'static str), &'static str), BTreeSet<String>>;

/// Walks through every state that can be reached.
fn explore(layout: &Layout, cells: &mut Cells) -> usize {
    let events = events(layout);
    let mut seen = HashSet::from([Gate::new(layout)]);
    let mut next = vec![Gate::new(layout)];
    while let Some(gate) = next.pop() {
        for &event in &events {
            let mut after = gate.clone();
            let action = name(after.on(event));
            let outcome = if state(&gate) == state(&after) {
                format!("`{action}`")
            } else {
                format!("`{action}`, {}", state(&after))
            };
            let cell = (row(&gate, event), state(&gate));
            cells.entry(cell).or_default().insert(outcome);
            if seen.insert(after.clone()) {
                next.push(after);
            }
        }
    }
    seen.len()
}

fn table() -> String {
    let mut cells = Cells::new();
    let one = explore(&amx_layout(), &mut cells);
    let two = explore(&two_layout(), &mut cells);
    println!("{one} states with one feature, {two} with two");
    let mut table = format!("| event | when | {} |\n", STATES.join(" | "));
    table += "|---|---|---|---|---|---|\n";
    for row in ROWS {
        let cell = |state| match cells.get(&(row, state)) {
            // More than one outcome would be a table that hides something.
            Some(outcomes) => outcomes.iter().cloned().collect::<Vec<_>>().join(" OR "),
            None => "-".into(),
        };
        let [idle, held, found, passed] = STATES.map(cell);
        let (event, when) = row;
        table += &format!("| `{event}` | {when} | {idle} | {held} | {found} | {passed} |\n");
    }
    table
}

#[test]
fn the_table_in_the_documentation_is_what_the_code_does() {
    let table = table();
    assert!(!table.contains(" OR "), "{table}");
    if std::env::var_os("UPDATE_TRANSITIONS").is_some() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/src/gate/transitions.md");
        std::fs::write(file, &table).unwrap();
    } else {
        assert_eq!(include_str!("transitions.md"), table);
    }
}

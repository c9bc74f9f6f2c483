//! What became of the faults, as a table.

use std::fmt::Write as _;
use std::fs;
use std::sync::OnceLock;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};

use crate::groups::Group;
pub(crate) use crate::support::lab::in_lab;
use crate::trial;

/// So many faults are promised on a machine that is not emulated.
const PROMISED: usize = 300;

/// What a fault has led to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The source has the guest, and it has computed on to right results.
    Stays,
    /// The destination has it, and it has computed on to right results.
    Moved,
    /// The process that had it was killed. The other one knows that it has none.
    EndedWithItsOwner,
    /// What was sent was refused by name, and nothing was left of it.
    Refused,
    /// What was sent is a valid guest; it is in a VM, and the host lives.
    Taken,
    /// Nobody has it.
    Lost,
    /// Both have it.
    Double,
}

const COLUMNS: [(Outcome, &str); 7] = [
    (Outcome::Stays, "source has it"),
    (Outcome::Moved, "destination has it"),
    (Outcome::EndedWithItsOwner, "ended with its owner"),
    (Outcome::Refused, "refused"),
    (Outcome::Taken, "valid, taken"),
    (Outcome::Lost, "lost"),
    (Outcome::Double, "double"),
];

/// Faults of the same sort.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    what: String,
    outcomes: [usize; COLUMNS.len()],
}

impl Row {
    pub(crate) fn new(what: impl Into<String>) -> Self {
        Self {
            what: what.into(),
            outcomes: [0; COLUMNS.len()],
        }
    }

    pub(crate) fn add(&mut self, outcome: Outcome) {
        self.outcomes[outcome as usize] += 1;
    }

    pub(crate) fn count(&self, outcome: Outcome) -> usize {
        self.outcomes[outcome as usize]
    }

    pub(crate) fn faults(&self) -> usize {
        self.outcomes.iter().sum()
    }
}

/// A table of these rows, and their sums.
pub(crate) fn print(rows: &[Row]) {
    let mut sum = Row::new("all");
    for row in rows {
        for (all, one) in sum.outcomes.iter_mut().zip(row.outcomes) {
            *all += one;
        }
    }
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY.with_rounded_corners());
    let names = COLUMNS.iter().map(|(_, name)| (*name).to_owned());
    table.set_header(
        ["fault", "faults"]
            .map(str::to_owned)
            .into_iter()
            .chain(names),
    );
    for row in rows.iter().chain([&sum]) {
        let number = |n: usize| if n == 0 { "-".into() } else { n.to_string() };
        let numbers = row.outcomes.iter().map(|n| number(*n));
        let first = [row.what.clone(), row.faults().to_string()];
        table.add_row(first.into_iter().chain(numbers));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    println!("{table}");
    trial::assert_were_midway();
    assert_eq!(sum.count(Outcome::Lost), 0, "guests were lost");
    assert_eq!(sum.count(Outcome::Double), 0, "guests ran twice");
}

/// Runs what has not run yet, prints all of it, and holds the sums against what is promised.
pub(crate) fn check_all() {
    let before = Host::look();
    let mut rows = Vec::new();
    for group in Group::ALL {
        let Some(of_group) = group.rows() else { return };
        rows.extend_from_slice(of_group);
    }
    print(&rows);
    let faults: usize = rows.iter().map(Row::faults).sum();
    println!(
        "{faults} faults, 0 lost guests, 0 double-running guests; {}",
        before.verdict()
    );
    // Under emulation not all are tried.
    assert!(faults >= PROMISED || in_lab(), "{faults} faults");
    assert!(
        rows.iter().all(|row| row.faults() > 0),
        "a sort of faults was not tried"
    );
}

/// Whether the fault with this number is tried: under emulation one of `share`.
pub(crate) fn is_tried(number: usize, share: usize) -> bool {
    !in_lab() || number.is_multiple_of(share)
}

/// The kernel that all of this runs on.
pub(crate) struct Host {
    taint: u64,
}

/// Bits of /proc/sys/kernel/tainted (Documentation/admin-guide/tainted-kernels.rst).
const DIED: u64 = 1 << 7;
const WARNED: u64 = 1 << 9;

impl Host {
    /// How it is before any fault of this process.
    pub(crate) fn look() -> &'static Self {
        static FIRST: OnceLock<Host> = OnceLock::new();
        FIRST.get_or_init(|| Self { taint: taint() })
    }

    /// What it has noted about itself since. Panics where it has had an oops or a warning.
    pub(crate) fn verdict(&self) -> String {
        let new = taint() & !self.taint;
        assert_eq!(
            new & (DIED | WARNED),
            0,
            "the host's kernel had an oops or a warning: {new:#x}"
        );
        let mut verdict = "0 oopses and warnings of the host's kernel".to_owned();
        if self.taint & (DIED | WARNED) != 0 {
            // It notes each once.
            let _ = write!(verdict, ", which had some before ({:#x})", self.taint);
        }
        verdict
    }
}

fn taint() -> u64 {
    let text = fs::read_to_string("/proc/sys/kernel/tainted").expect("/proc is there");
    text.trim().parse().expect("a number")
}

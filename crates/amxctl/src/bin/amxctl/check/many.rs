//! A fleet of hosts, checked: a table with the worst first, and counts.

use std::fmt::Write;

use host_compat::Host;
use host_compat::baseline::ObstacleKind;
use host_compat::kernel::State;
use serde_json::{Value, json};

use super::Checked;
use crate::cli::CheckArgs;
use crate::fleet;
use crate::outcome::{Answer, Outcome};
use crate::screen::{self, Mark};

/// Rows of the table; JSON has all hosts.
const SHOWN: usize = 64;

/// A row of the table: a host and what was found on it.
struct Row<'a> {
    host: &'a Host,
    checked: Checked,
}

impl Row<'_> {
    /// The worst first.
    fn rank(&self) -> (u8, usize) {
        let class = match self.checked.answer {
            Answer::No => 0,
            Answer::Yes => 2,
            _ => 1,
        };
        let fixes = self.checked.serious(State::Absent);
        (class, usize::MAX.saturating_sub(fixes))
    }

    fn mark(&self) -> Mark {
        match self.checked.answer {
            Answer::No => Mark::Bad,
            Answer::Yes => Mark::Good,
            _ => Mark::Warning,
        }
    }

    fn obstacle(&self) -> Option<ObstacleKind> {
        self.checked.obstacles.first().map(ObstacleKind::from)
    }
}

pub(super) fn run(hosts: &[Host], args: &CheckArgs, json: bool) -> anyhow::Result<Outcome> {
    let mut rows: Vec<Row<'_>> = hosts
        .iter()
        .map(|host| Row {
            host,
            checked: Checked::of(host, &args.ignore),
        })
        .collect();
    rows.sort_by_key(|row| (row.rank(), row.host.name.clone()));
    let count = |answer| {
        rows.iter()
            .filter(|row| row.checked.answer == answer)
            .count()
    };
    let counts = [
        count(Answer::Yes),
        count(Answer::Warning),
        count(Answer::No),
    ];
    let answer = match counts {
        [.., no] if no > 0 => Answer::No,
        [_, warnings, _] if warnings > 0 => Answer::Warning,
        _ => Answer::Yes,
    };
    let text = if json {
        serde_json::to_string_pretty(&as_json(&rows, counts))? + "\n"
    } else {
        text(&rows, counts)
    };
    Ok(Outcome { text, answer })
}

fn text(rows: &[Row<'_>], [ready, warnings, no]: [usize; 3]) -> String {
    let mut text = format!(
        "{}: {ready} ready, {warnings} ready but for defects, {no} not ready\n",
        screen::title(&screen::count(rows.len(), "host"))
    );
    let header = [
        "",
        "host",
        "AMX in guests",
        "what keeps it",
        "serious defects",
    ];
    let mut table = screen::table(&header);
    for row in rows.iter().take(SHOWN) {
        let missing = row.checked.serious(State::Absent);
        let unknown = row.checked.serious(State::Unknown);
        table.add_row([
            screen::mark(row.mark()),
            row.host.name.clone(),
            row.host.guest_features().amx.to_string(),
            row.obstacle().map_or("", fleet::word).to_owned(),
            format!("{missing} not fixed, {unknown} unknown"),
        ]);
    }
    text.push_str(&screen::indented(&table));
    let more = rows.len().saturating_sub(SHOWN);
    if more > 0 {
        let note = format!("{more} more; --json has them");
        let _ = writeln!(text, "  {}", screen::dim(note));
    }
    text
}

fn as_json(rows: &[Row<'_>], [ready, warnings, no]: [usize; 3]) -> Value {
    let hosts: Vec<Value> = rows
        .iter()
        .map(|row| {
            json!({
                "name": row.host.name,
                "ready": row.checked.answer != Answer::No,
                "warnings": row.checked.answer == Answer::Warning,
                "obstacles": row.checked.obstacles.iter().map(ToString::to_string).collect::<Vec<_>>(),
                "guest_amx": row.host.guest_features().amx.names().collect::<Vec<_>>(),
                "fixes_missing": row.checked.serious(State::Absent),
                "fixes_unknown": row.checked.serious(State::Unknown),
            })
        })
        .collect();
    json!({ "ready": ready, "warnings": warnings, "not_ready": no, "hosts": hosts })
}

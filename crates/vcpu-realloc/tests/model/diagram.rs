//! The gate's states as a picture, from the table of its transitions.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use super::docs;

const TABLE: &str = include_str!("../../src/gate/transitions.md");

#[test]
fn the_picture_is_that_of_the_table() {
    let mut rows = TABLE.lines().map(|line| {
        let cells = line.trim_matches('|').split('|');
        cells.map(str::trim).collect::<Vec<_>>()
    });
    let states = rows.next().unwrap().split_off(2);
    let mut arrows: BTreeMap<(&str, &str), BTreeSet<String>> = BTreeMap::new();
    for row in rows.skip(1) {
        let [event, when, outcomes @ ..] = &row[..] else {
            panic!("{row:?}");
        };
        for (&from, outcome) in states.iter().zip(outcomes) {
            let Some((_, to)) = outcome.split_once(", ") else {
                continue;
            };
            let event = event.trim_matches('`');
            let when = match *when {
                "always" | "otherwise" => String::new(),
                when => format!(" ({when})"),
            };
            if from != to {
                arrows
                    .entry((from, to))
                    .or_default()
                    .insert(format!("{event}{when}"));
            }
        }
    }
    let mut text =
        String::from("```mermaid\nstateDiagram-v2\n    direction LR\n    [*] --> idle\n");
    for ((from, to), labels) in arrows {
        let labels: Vec<_> = labels.into_iter().collect();
        writeln!(text, "    {from} --> {to}: {}", labels.join("<br>")).unwrap();
    }
    docs::check("diagram", &(text + "```"));
}

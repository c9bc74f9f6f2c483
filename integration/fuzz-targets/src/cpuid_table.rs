//! CPUID tables: text, changes to leaves against a plain model, and coherence.

use cpuid_amx::table::has_subleaves;
use cpuid_amx::{Amx, CpuidTable, Entry, Table, coherence};

use crate::input::Input;
use crate::layouts;

/// A text (first byte even), or a dump's number and changes to it (odd), in a list in any order where
/// the byte's second bit is set.
pub fn cpuid_table(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() {
        kind if kind & 1 == 0 => text(input.rest()),
        kind => {
            let mut listed: Vec<Entry> = input.pick(layouts::tables()).entries().collect();
            if kind & 2 != 0 {
                disorder(&mut input, &mut listed);
            }
            changes(input, listed);
        }
    }
}

/// More entries, anywhere: several for a place, and some that nobody sees.
fn disorder(input: &mut Input<'_>, listed: &mut Vec<Entry>) {
    for number in 0..input.u8() & 0xf {
        let leaf = *input.pick(&[1, 7, 0xd, 0x1d, 0x1e, 0x99]);
        let subleaf = input.u8().checked_sub(1).map(u32::from);
        let at = usize::from(input.u8()) % (listed.len() + 1);
        let value = [u32::from(number) + 1, 0, 0, 0];
        listed.insert(
            at,
            Entry {
                leaf,
                subleaf,
                value,
            },
        );
    }
}

/// What is read from a text is written and read again.
fn text(text: &[u8]) {
    let text = String::from_utf8_lossy(text);
    match text.parse::<Table>() {
        Ok(table) => {
            assert_eq!(table.to_string().parse(), Ok(table.clone()));
            examine(&table);
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
}

/// A table of each kind goes through the same changes; all answer as a list of questions and
/// answers does.
fn changes(mut input: Input<'_>, mut listed: Vec<Entry>) {
    let mut sorted: Table = listed.iter().copied().collect();
    let mut answers: Vec<((u32, u32), [u32; 4])> = Vec::new();
    for _ in 0..64 {
        if input.is_empty() {
            break;
        }
        let leaf = match input.u8() {
            leaf @ 0..0x80 => u32::from(leaf),
            leaf => 0x8000_0000 | u32::from(leaf & 0x7f),
        };
        let subleaf = match input.u8() {
            0xff => input.u32(),
            subleaf => u32::from(subleaf),
        };
        let value = [input.u32(), input.u32(), input.u32(), input.u32()];
        let every = sorted
            .find_leaf(leaf, subleaf)
            .is_some_and(|entry| entry.subleaf.is_none());
        sorted.set_leaf(leaf, subleaf, value).unwrap();
        listed.set_leaf(leaf, subleaf, value).unwrap();
        if every && !has_subleaves(leaf) {
            // It answers for every sub-leaf of that leaf.
            answers.retain(|((of, _), _)| *of != leaf);
        }
        answers.retain(|(place, _)| *place != (leaf, subleaf));
        answers.push(((leaf, subleaf), value));
    }
    for ((leaf, subleaf), value) in answers {
        assert_eq!(sorted.leaf(leaf, subleaf), value, "{leaf:#x}.{subleaf:#x}");
        assert_eq!(listed.leaf(leaf, subleaf), value, "{leaf:#x}.{subleaf:#x}");
    }
    let collected: Table = listed.iter().copied().collect();
    for entry in &listed {
        let subleaf = entry.subleaf.unwrap_or(0);
        let found = listed.leaf(entry.leaf, subleaf);
        assert_eq!(collected.leaf(entry.leaf, subleaf), found);
    }
    assert_eq!(collected, sorted);
    let read: Table = sorted.to_string().parse().unwrap();
    for entry in sorted.entries() {
        assert_eq!(
            read.leaf(entry.leaf, entry.subleaf.unwrap_or(0)),
            sorted.leaf(entry.leaf, entry.subleaf.unwrap_or(0))
        );
    }
    assert_eq!(coherence::check(&sorted), coherence::check(&collected));
    examine(&sorted);
}

fn examine(table: &Table) {
    for contradiction in coherence::check(table) {
        assert!(!contradiction.to_string().is_empty());
    }
    let amx = Amx::from_cpuid(layouts::leaves(table));
    if let Err(error) = amx.usable() {
        assert!(!error.to_string().is_empty());
    }
}

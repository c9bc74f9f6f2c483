//! The real gate in a model of guests, KVM, the host's kernel and a VMM: checked exhaustively within
//! bounds, and at random beyond them. docs/model.md says what it shows, and is compared with it.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod checker;
mod costs;
mod docs;
mod guest;
mod kernel;
mod mutants;
mod properties;
mod random;
mod searches;
mod setup;
mod trace;
mod vmm;
mod world;

use std::collections::BTreeMap;
use std::fmt::Write;

use xsave_state::{ExtendedState, Image, Registers, StateError, XFeatures};

use properties::{ALWAYS, SOMETIMES};

#[test]
fn every_claim_holds_in_every_state_within_the_bounds() {
    let mut table = String::from(
        "| host | guests | failed | denied | moves | resets | INITs | migrations | states |\n\
         |---|---|---|---|---|---|---|---|---|\n",
    );
    let searches = searches::all();
    let number = searches.len();
    let mut reached: BTreeMap<&str, usize> = BTreeMap::new();
    let mut states = 0;
    for searches::Search { host, setup } in searches {
        let guests: Vec<_> = setup.programs.iter().map(|p| format!("{p:?}")).collect();
        let guests = guests.join(", ");
        let left = setup.bounds;
        let searched = checker::search(setup.clone());
        println!("{host}, {guests}: {} states", searched.states);
        if let Some((claim, path)) = searched.broken.into_iter().next() {
            let shorter = checker::counterexample(&setup);
            let (claim, path) = shorter.unwrap_or((claim, path));
            let lines = trace::lines(&setup, &path.into_vec());
            panic!("{host}, {guests}: not so: {claim}\n{lines}");
        }
        for name in searched.reached {
            *reached.entry(name).or_default() += 1;
        }
        states += searched.states;
        writeln!(
            table,
            "| {host} | {guests} | {} | {} | {} | {} | {} | {} | {} |",
            left.failures,
            left.denials,
            left.moves,
            left.resets,
            left.inits,
            left.migrations,
            thousands(searched.states)
        )
        .unwrap();
    }
    writeln!(table, "| all | | | | | | | | {} |", thousands(states)).unwrap();
    docs::check("searches", &table);

    let mut list = format!("| in how many of {number} | what |\n|---|---|\n");
    for claim in SOMETIMES {
        let times = reached.get(claim.name);
        let times = times.unwrap_or_else(|| panic!("never: {}", claim.name));
        writeln!(list, "| {times} | {} |", claim.name).unwrap();
    }
    docs::check("reached", &list);
}

fn thousands(number: usize) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[test]
fn without_any_one_protection_the_checker_finds_the_way_to_what_it_prevents() {
    let mut known: Vec<trace::Known> = Vec::new();
    let mut text = String::new();
    for mutant in mutants::all() {
        let Some((claim, path)) = checker::counterexample(&mutant.setup) else {
            panic!("nothing breaks without it: {}", mutant.name);
        };
        assert_eq!(claim, mutant.breaks, "{}", mutant.name);
        let lines = trace::lines(&mutant.setup, &path.into_vec());
        let lines = trace::fold(&mut known, &mutant.name, &lines);
        writeln!(
            text,
            "### {}\n\nNot so: **{claim}**.\n\n```text\n{lines}```\n",
            upper(&mutant.name)
        )
        .unwrap();
    }
    let shared: String = known.iter().map(trace::Known::render).collect();
    docs::check("mutants", &format!("{shared}{text}"));
}

fn upper(text: &str) -> String {
    let (first, rest) = text.split_at(1);
    first.to_uppercase() + rest
}

#[test]
fn the_claims_are_those_of_the_documentation() {
    let mut table = String::from("| claim | what it means |\n|---|---|\n");
    for claim in ALWAYS {
        writeln!(table, "| **{}** | {} |", claim.name, claim.meaning).unwrap();
    }
    docs::check("claims", &table);
}

/// The model takes this for granted.
#[test]
fn the_crafted_snapshot_of_the_model_is_refused() {
    let layout = checker::layout();
    let mut area = vec![0; 11_008];
    area[512..520].copy_from_slice(&XFeatures::XTILEDATA.bits().to_le_bytes());
    let image = Image::parse(&area, &layout).unwrap();
    let registers = Registers::RESET
        .with_xcr0(XFeatures::X87 | XFeatures::SSE | XFeatures::AMX)
        .with_xfd(XFeatures::XTILEDATA);
    assert!(matches!(
        ExtendedState::new(image, registers),
        Err(StateError::InUseWhileDisabled { .. })
    ));
}

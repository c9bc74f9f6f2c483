//! Replays the committed corpora: each input once went where no other did, or made a target fail.
#![allow(missing_docs, clippy::unwrap_used)]

use std::path::Path;

use amx_fuzz_targets::TARGETS;

#[test]
fn every_input_of_the_corpora_passes() {
    let corpora = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz/corpus");
    for (name, target) in TARGETS {
        let mut inputs: Vec<_> = std::fs::read_dir(corpora.join(name))
            .unwrap_or_else(|error| panic!("the corpus of {name}: {error}"))
            .map(|entry| entry.unwrap().path())
            .collect();
        inputs.sort();
        assert!(!inputs.is_empty(), "{name} has no corpus");
        for input in &inputs {
            // The last one named is the one that fails.
            println!("{}", input.display());
            target(&std::fs::read(input).unwrap());
        }
        println!("{name}: {} inputs", inputs.len());
    }
}

/// A target that nobody runs, or a corpus that nobody replays, is a mistake.
#[test]
fn targets_corpora_and_the_list_agree() {
    let fuzz = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fuzz");
    let listed: Vec<_> = TARGETS.iter().map(|(name, _)| (*name).to_owned()).collect();
    for folder in ["fuzz_targets", "corpus"] {
        let mut found: Vec<_> = std::fs::read_dir(fuzz.join(folder))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
            .collect();
        found.sort();
        assert_eq!(found, listed, "{folder}");
    }
}

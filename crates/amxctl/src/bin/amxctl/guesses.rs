//! What nobody said of a saved state, and was taken all the same.

use amxctl::vcpu::Owner;
use amxctl::{Source, Subject};
use anyhow::bail;

use crate::screen::{self, Mark};

/// Where its components lie, if that is a guess.
pub(crate) fn layout(subject: &Subject) -> Option<String> {
    match &subject.layout.source {
        Source::Guess(why) => Some(format!("the layout: {why}")),
        _ => None,
    }
}

/// Refuses what would be wrong, and look right, if the guess of two layouts were.
pub(crate) fn only_one_layout(subject: &Subject) -> anyhow::Result<()> {
    if subject.other_layout.is_some() {
        bail!(
            "two layouts fit, and components that are looked for at the wrong places are other \
             registers. Give the guest's CPUID with --cpuid"
        );
    }
    Ok(())
}

/// Registers that are not in the file, and whose values were taken for it.
pub(crate) fn registers(subject: &Subject) -> Vec<String> {
    let mut guesses = Vec::new();
    if let Source::Guess(why) = &subject.xcr0.source {
        guesses.push(format!("XCR0 {:#x}: {why}", subject.xcr0.value.bits()));
    }
    // Where nothing can be disabled both are 0, and nobody has to say so.
    let can_be_disabled = subject.layout.value.xfd();
    let matters = subject.xstate_bv().intersects(can_be_disabled);
    // Where it decides whether the host survives it is not guessed: see `Finding::option`.
    if subject.xfd.is_none() && !can_be_disabled.is_empty() && !matters {
        guesses.push("IA32_XFD 0: not in the file; --xfd says it".to_owned());
    }
    if subject.xfd_err.is_none() && !can_be_disabled.is_empty() {
        guesses.push("IA32_XFD_ERR 0: not in the file; --xfd-err says it".to_owned());
    }
    guesses
}

/// All of it.
pub(crate) fn of(subject: &Subject) -> Vec<String> {
    layout(subject)
        .into_iter()
        .chain(registers(subject))
        .collect()
}

/// A line for each, with those whose it is where that is not everyone.
pub(crate) fn text(subjects: &[Subject]) -> String {
    let mut guesses: Vec<(String, Vec<&Subject>)> = Vec::new();
    for subject in subjects {
        for guess in of(subject) {
            match guesses.iter_mut().find(|(other, _)| *other == guess) {
                Some((_, whose)) => whose.push(subject),
                None => guesses.push((guess, vec![subject])),
            }
        }
    }
    let mut text = String::new();
    for (guess, whose) in guesses {
        let said = match whose.as_slice() {
            all if all.len() == subjects.len() => format!("guessed: {guess}"),
            [one] => format!("guessed of {}: {guess}", one.owner),
            [first, ..] => {
                let what = match first.owner {
                    Owner::Vcpu(_) => "vCPU",
                    Owner::Thread(_) => "thread",
                };
                format!("guessed of {}: {guess}", screen::count(whose.len(), what))
            }
            [] => continue,
        };
        let said = screen::wrap(&said, 4);
        text.push_str(&format!(
            "  {} {}\n",
            screen::mark(Mark::Warning),
            Mark::Warning.paint(said.trim())
        ));
    }
    text
}

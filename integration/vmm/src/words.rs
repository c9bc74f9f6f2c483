//! An error with its causes, each said once.

use std::error::Error;

/// In one line, from the outermost to the innermost. What an error has said of its cause already is not
/// repeated.
#[must_use]
pub fn in_words(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let words = cause.to_string();
        if !text.ends_with(&words) {
            text.push_str(": ");
            text.push_str(&words);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use std::io;

    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    enum Outer {
        #[error("KVM_RUN: {0}")]
        Says(#[source] io::Error),
        #[error("the guest")]
        Keeps(#[source] io::Error),
    }

    #[test]
    fn a_cause_is_said_once() {
        let cause = || io::Error::other("refused");
        assert_eq!(in_words(&Outer::Says(cause())), "KVM_RUN: refused");
        assert_eq!(in_words(&Outer::Keeps(cause())), "the guest: refused");
        let told = anyhow::Error::from(Outer::Says(cause())).context("file");
        assert_eq!(in_words(told.as_ref()), "file: KVM_RUN: refused");
    }
}

//! What a command has to say, and its answer.

/// What a command has to say, and whether the answer is yes.
pub(crate) struct Outcome {
    pub(crate) text: String,
    pub(crate) answer: Answer,
}

/// The exit codes, as `amxctl --help` lists them. Trouble is 2, as clap has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Answer {
    Yes,
    No,
    Warning,
    Unknown,
}

impl Outcome {
    pub(crate) fn yes(text: String) -> anyhow::Result<Self> {
        Ok(Self {
            text,
            answer: Answer::Yes,
        })
    }
}

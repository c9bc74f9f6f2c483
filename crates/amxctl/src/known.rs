//! Values with their sources, and what whoever asks knows beyond a file.

use std::fmt;

use xsave_state::XFeatures;

use crate::cpuid::Cpuid;

/// Where a value is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The file that holds the guest's state.
    File,
    /// Whoever asks said so: the option, or the file that it names.
    Given(String),
    /// Nobody said so: why it was taken.
    Guess(String),
    /// A restore from the file leaves the value that a new vCPU has: why.
    Reset(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => f.write_str("in the file"),
            Self::Given(by) => write!(f, "by {by}"),
            Self::Guess(why) => write!(f, "a guess: {why}"),
            Self::Reset(why) => f.write_str(why),
        }
    }
}

/// A value and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known<T> {
    /// What is known, or guessed.
    pub value: T,
    /// Where it is from.
    pub source: Source,
}

impl<T> Known<T> {
    pub(crate) fn file(value: T) -> Self {
        Self {
            value,
            source: Source::File,
        }
    }

    pub(crate) fn given(value: T, by: &str) -> Self {
        Self {
            value,
            source: Source::Given(by.to_owned()),
        }
    }

    pub(crate) fn guess(value: T, why: &str) -> Self {
        Self {
            value,
            source: Source::Guess(why.to_owned()),
        }
    }
}

/// What whoever asks knows beyond the file. It comes before what the file says.
#[derive(Clone, Debug, Default)]
pub struct Given {
    /// CPUID of the guest, and where that is from.
    pub cpuid: Option<(Cpuid, String)>,
    /// XCR0.
    pub xcr0: Option<XFeatures>,
    /// IA32_XFD.
    pub xfd: Option<XFeatures>,
    /// IA32_XFD_ERR.
    pub xfd_err: Option<XFeatures>,
    /// IA32_XSS.
    pub xss: Option<XFeatures>,
}

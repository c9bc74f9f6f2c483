//! One vCPU as a file has it, and what is known of it from where.

use std::fmt;

use cpuid_amx::{CpuidTable, Table};
use thiserror::Error;
use xsave_state::format::EXTENDED_OFFSET;
use xsave_state::{
    CompactedError, ExtendedState, Header, Image, ImageError, Layout, LayoutError, Registers,
    StateError, XFeatures,
};

use crate::bytes;
use crate::guess::{self, NoGuess};

/// Whose state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A vCPU, by its identifier.
    Vcpu(u32),
    /// A thread of a process, by its identifier: from a core dump.
    Thread(u32),
}

impl Owner {
    /// The identifier.
    #[must_use]
    pub const fn id(self) -> u32 {
        match self {
            Self::Vcpu(id) | Self::Thread(id) => id,
        }
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpu(id) => write!(f, "vCPU {id}"),
            Self::Thread(id) => write!(f, "thread {id}"),
        }
    }
}

/// Where the components of an area lie, as far as its file says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Places {
    /// The file has the CPUID of the guest.
    Cpuid(Table),
    /// The file has the layout itself.
    Layout(Layout),
    /// The file does not say.
    Unknown,
}

/// One vCPU as a file has it. Nothing has been checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Vcpu {
    /// Whose state it is.
    pub owner: Owner,
    /// The area, as long as the file has it.
    pub area: Vec<u8>,
    /// Where its components lie.
    pub places: Places,
    /// XCR0, if the file has it.
    pub xcr0: Option<XFeatures>,
    /// IA32_XFD, MSR 0x1C4, if the file has it.
    pub xfd: Option<XFeatures>,
    /// IA32_XFD_ERR, MSR 0x1C5, if the file has it.
    pub xfd_err: Option<XFeatures>,
}

/// Where a value is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// The file.
    File,
    /// Whoever asks said so: the option, or the file that it names.
    Given(String),
    /// Nobody said so: why it was taken.
    Guess(String),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File => f.write_str("in the file"),
            Self::Given(by) => write!(f, "by {by}"),
            Self::Guess(why) => write!(f, "a guess: {why}"),
        }
    }
}

/// A value and where it is from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known<T> {
    /// The value.
    pub value: T,
    /// Where it is from.
    pub source: Source,
}

impl<T> Known<T> {
    fn file(value: T) -> Self {
        Self {
            value,
            source: Source::File,
        }
    }

    fn guess(value: T, why: &str) -> Self {
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
    pub cpuid: Option<(Table, String)>,
    /// XCR0.
    pub xcr0: Option<XFeatures>,
    /// IA32_XFD.
    pub xfd: Option<XFeatures>,
    /// IA32_XFD_ERR.
    pub xfd_err: Option<XFeatures>,
}

/// A vCPU with all that is needed to judge it: each value known, given or guessed.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Whose state it is.
    pub owner: Owner,
    /// The area as it is in the file.
    pub area: Vec<u8>,
    /// Where the components lie.
    pub layout: Known<Layout>,
    /// Where they lie if not there: another layout that fits as well, where it is a guess.
    pub other_layout: Option<Layout>,
    /// The CPUID that the layout is from, if it is from one.
    pub cpuid: Option<Table>,
    /// XCR0.
    pub xcr0: Known<XFeatures>,
    /// IA32_XFD; `None`: not known.
    pub xfd: Option<Known<XFeatures>>,
    /// IA32_XFD_ERR; `None`: not known.
    pub xfd_err: Option<Known<XFeatures>>,
    /// The same in the standard format, where the area has the compacted one.
    standard: Option<Image<'static>>,
}

impl Vcpu {
    /// Puts together what the file says, what is `given`, and guesses where there is neither.
    ///
    /// # Errors
    ///
    /// Without the places of the components nothing can be said: see [`SubjectError`].
    pub fn subject(self, given: &Given) -> Result<Subject, SubjectError> {
        let owner = self.owner;
        let of = |table: &Table| {
            Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
                .map_err(|source| SubjectError::Layout { owner, source })
        };
        let mut other_layout = None;
        let (layout, cpuid) = match (&given.cpuid, self.places) {
            (Some((table, by)), _) => {
                let layout = Known {
                    value: of(table)?,
                    source: Source::Given(by.clone()),
                };
                (layout, Some(table.clone()))
            }
            (None, Places::Cpuid(table)) => (Known::file(of(&table)?), Some(table)),
            (None, Places::Layout(layout)) => (Known::file(layout), None),
            (None, Places::Unknown) => {
                let guess = guess::layout(&self.area)
                    .map_err(|source| SubjectError::NoGuess { owner, source })?;
                other_layout = guess.other;
                (Known::guess(guess.layout, &guess.why), None)
            }
        };
        let known = |given: Option<XFeatures>, own: Option<XFeatures>, option: &str| {
            let given = given.map(|value| Known {
                value,
                source: Source::Given(option.to_owned()),
            });
            given.or(own.map(Known::file))
        };
        let xcr0 = known(given.xcr0, self.xcr0, "--xcr0").unwrap_or_else(|| {
            let everything =
                xsave_state::xcr0::largest_within(layout.value.user(), layout.value.user());
            Known::guess(everything, "all that the layout has")
        });
        let standard = compacted(&self.area, &layout.value).and_then(Result::ok);
        Ok(Subject {
            owner,
            area: self.area,
            layout,
            other_layout,
            cpuid,
            xcr0,
            xfd: known(given.xfd, self.xfd, "--xfd"),
            xfd_err: known(given.xfd_err, self.xfd_err, "--xfd-err"),
            standard,
        })
    }
}

fn compacted(area: &[u8], layout: &Layout) -> Option<Result<Image<'static>, CompactedError>> {
    let header = Header {
        xstate_bv: XFeatures::empty(),
        xcomp_bv: bytes::u64_at(area, 520),
    };
    header
        .is_compacted()
        .then(|| Image::from_compacted(area, layout))
}

impl Subject {
    /// The bytes in the standard format: the file's, or what they are when expanded.
    #[must_use]
    pub fn standard(&self) -> &[u8] {
        match &self.standard {
            Some(image) => image.as_bytes(),
            None => &self.area,
        }
    }

    /// Whether the area has the compacted format, and could be expanded.
    #[must_use]
    pub fn was_compacted(&self) -> bool {
        self.standard.is_some()
    }

    /// XSTATE_BV, bytes 512 to 519; zero where they are not there.
    #[must_use]
    pub fn xstate_bv(&self) -> XFeatures {
        XFeatures::from_bits_retain(bytes::u64_at(&self.area, 512))
    }

    /// MXCSR, bytes 24 to 27.
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        bytes::u32_at(&self.area, 24)
    }

    /// The registers, with zeros for what is not known.
    #[must_use]
    pub fn registers(&self) -> Registers {
        let or_none = |known: &Option<Known<XFeatures>>| {
            known
                .as_ref()
                .map_or(XFeatures::empty(), |known| known.value)
        };
        Registers::RESET
            .with_xcr0(self.xcr0.value)
            .with_xfd(or_none(&self.xfd))
            .with_xfd_err(or_none(&self.xfd_err))
    }

    /// The bytes of a component in the standard format, also of one that is initial; fewer than its
    /// size where the area ends before.
    #[must_use]
    pub fn component(&self, id: xsave_state::ComponentId) -> &[u8] {
        let Some(component) = self.layout.value.component(id) else {
            return &[];
        };
        let Some(start) = component.offset() else {
            return &[];
        };
        bytes::range(
            self.standard(),
            start..start.saturating_add(component.size()),
        )
    }

    /// The state as a value that holds its invariants.
    ///
    /// # Errors
    ///
    /// The first that it breaks. [`rules::check`](crate::rules::check) gives all.
    pub fn state(&self) -> Result<ExtendedState<'_>, InvalidState> {
        let image = match &self.standard {
            Some(image) => image.clone(),
            None => Image::parse(&self.area, &self.layout.value)?,
        };
        Ok(ExtendedState::new(image, self.registers())?)
    }

    /// Whether there is at least a whole header.
    #[must_use]
    pub fn has_header(&self) -> bool {
        self.area.len() >= EXTENDED_OFFSET
    }
}

/// A vCPU of which not even the places of its components are known.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SubjectError {
    /// The CPUID describes an area that cannot exist.
    #[error("{owner}: its CPUID describes an area that cannot exist: {source}")]
    Layout {
        /// Whose.
        owner: Owner,
        /// Why not.
        source: LayoutError,
    },
    /// The file has no CPUID, and there is no guess.
    #[error(
        "{owner}: {source}. The guest's CPUID says where its components lie: give it with --cpuid"
    )]
    NoGuess {
        /// Whose.
        owner: Owner,
        /// Why not.
        source: NoGuess,
    },
}

/// A state that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidState {
    /// One of the area's.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// One of the area and the registers together.
    #[error(transparent)]
    State(#[from] StateError),
}

//! One vCPU as a file has it, and what is known of it from where.

use std::fmt;

use thiserror::Error;
use xsave_state::{
    CompactedError, ComponentId, ExtendedState, Image, ImageError, Layout, LayoutError, Registers,
    StateError, XFeatures,
};

use crate::bytes;
pub use crate::cpuid::Cpuid;
use crate::finding::{Finding, Rule, Verdict};
use crate::guess::{self, COMPACTED, NoGuess};
pub use crate::known::{Given, Known, Source};
use crate::registers::{self, Listed};

/// Whose state it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Owner {
    /// A vCPU, by its identifier.
    Vcpu(u32),
    /// A thread of a process, by its identifier: from a core dump.
    Thread(u32),
}

impl Owner {
    /// Returns the number of the vCPU, or the thread's identifier.
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
    Cpuid(Cpuid),
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
    /// Its registers.
    pub listed: Listed,
}

/// Why nobody knows where the components of an area lie.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum Doubt {
    /// Another layout fits as well.
    #[error(
        "two layouts fit, which have components at different places; the guest's CPUID tells: give it with \
         --cpuid"
    )]
    Other(Layout),
    /// None that is known here fits.
    #[error("{0}. The guest's CPUID says where its components lie: give it with --cpuid")]
    NoneFits(NoGuess),
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
    /// Why that is an open question, if it is one.
    pub doubt: Option<Doubt>,
    /// The guest's CPUID, if it is known.
    pub cpuid: Option<Cpuid>,
    /// XCR0.
    pub xcr0: Known<XFeatures>,
    /// IA32_XFD; `None`: not known.
    pub xfd: Option<Known<XFeatures>>,
    /// IA32_XFD_ERR; `None`: not known.
    pub xfd_err: Option<Known<XFeatures>>,
    /// IA32_XSS; `None`: not known.
    pub xss: Option<Known<XFeatures>>,
    /// All registers as the file lists them.
    pub listed: Listed,
    /// What was found when all this was put together.
    pub(crate) findings: Vec<Finding>,
}

impl Vcpu {
    /// Puts together what the file says, what is `given`, and guesses where there is neither.
    #[must_use]
    pub fn subject(self, given: &Given) -> Subject {
        let Self {
            owner,
            area,
            places,
            listed,
        } = self;
        let mut findings = Vec::new();
        let (own_layout, own_cpuid) = match places {
            Places::Cpuid(cpuid) => (None, Some(cpuid)),
            Places::Layout(layout) => (Some(layout), None),
            Places::Unknown => (None, None),
        };
        let (cpuid, source) = match &given.cpuid {
            Some((cpuid, by)) => (Some(cpuid.clone()), Source::Given(by.clone())),
            None => (own_cpuid, Source::File),
        };
        let mut doubt = None;
        let by_cpuid = cpuid.as_ref().map(Cpuid::layout);
        let has_both = own_layout.is_some() && by_cpuid.is_some();
        let layout = match (own_layout, by_cpuid) {
            // The bytes lie where the file says, whatever CPUID the guest is said to have.
            (Some(layout), None | Some(Ok(_))) => Known::file(layout),
            (None, Some(Ok(value))) => Known { value, source },
            (layout, error) => {
                let error = error.and_then(Result::err);
                if let (Some(error), Some(cpuid)) = (error, &cpuid) {
                    findings.push(Finding::broken(Rule::Cpuid, not_a_layout(error, cpuid)));
                }
                layout.map_or_else(|| guessed(&area, &mut doubt), Known::file)
            }
        };
        let has_xsave = cpuid.as_ref().map(Cpuid::has_xsave);
        let mut resolved = registers::resolve(&listed, given, &layout.value, has_xsave);
        findings.append(&mut resolved.findings);
        let mut subject = Subject {
            owner,
            area,
            layout,
            doubt,
            cpuid,
            xcr0: resolved.xcr0,
            xfd: resolved.xfd,
            xfd_err: resolved.xfd_err,
            xss: resolved.xss,
            listed,
            findings,
        };
        if has_both {
            subject.compare_layouts();
        }
        subject
    }
}

/// The layout that fits the area, with the doubt about it; x87 and SSE, which lie at the same place in all,
/// where none does.
fn guessed(area: &[u8], doubt: &mut Option<Doubt>) -> Known<Layout> {
    match guess::layout(area) {
        Ok(guess) => {
            *doubt = guess.other.map(Doubt::Other);
            Known::guess(guess.layout, &guess.why)
        }
        Err(error) => {
            // What has no header is broken, whatever its layout.
            let is_short = matches!(error, NoGuess::TooShort { .. });
            *doubt = (!is_short).then_some(Doubt::NoneFits(error));
            Known::guess(Layout::legacy(), "no layout known here fits")
        }
    }
}

/// Why there is no layout, with what hides the leaves that would make one.
fn not_a_layout(error: LayoutError, cpuid: &Cpuid) -> String {
    let causes: Vec<String> = cpuid
        .hidden_entries()
        .map(|one| format!("{one}; so "))
        .collect();
    format!(
        "{}CPUID.0DH of the guest is invalid: {error}",
        causes.concat()
    )
}

impl Subject {
    /// Whether the CPUID that the guest is said to have puts its components where the file has them.
    fn compare_layouts(&mut self) {
        let by_cpuid = self.cpuid.as_ref().map(Cpuid::layout);
        let (Some(Ok(by_cpuid)), Ok(state)) = (by_cpuid, self.state()) else {
            return;
        };
        let misfits: Vec<String> = state
            .misfits(&by_cpuid)
            .map(|misfit| misfit.to_string())
            .collect();
        if !misfits.is_empty() {
            let values = format!(
                "the layout in the file is not that of the guest's CPUID: {}",
                misfits.join("; ")
            );
            self.findings.push(Finding::broken(Rule::Layout, values));
        }
    }

    /// The first register or place that the file does not have, or has twice, without which its bytes mean
    /// something else.
    #[must_use]
    pub fn unsettled(&self) -> Option<&Finding> {
        let mut findings = self.findings.iter();
        findings.find(|finding| finding.verdict == Verdict::Broken)
    }

    /// Whether bit 63 of XCOMP_BV says that the area has the compacted format.
    #[must_use]
    pub fn is_compacted(&self) -> bool {
        self.placed().is_some()
    }

    /// The components that have a place in an area of the compacted format; `None`: it has the standard
    /// format.
    #[must_use]
    pub fn placed(&self) -> Option<XFeatures> {
        let xcomp_bv = bytes::u64_at(&self.area, 520);
        let placed = XFeatures::from_bits_retain(xcomp_bv & !COMPACTED);
        (xcomp_bv & COMPACTED != 0).then_some(placed)
    }

    /// Where a component lies in the area, in the format that the area has; `None` where the layout lacks
    /// it, or where that is not known: in the compacted format behind one of unknown size.
    #[must_use]
    pub fn place(&self, id: ComponentId) -> Option<std::ops::Range<usize>> {
        let layout = &self.layout.value;
        let component = layout.component(id)?;
        let start = component.offset()?;
        let standard = start..start.saturating_add(component.size());
        let Some(placed) = self.placed() else {
            return Some(standard);
        };
        if XFeatures::LEGACY.contains(id.bit()) {
            return Some(standard);
        }
        let unknown = placed - layout.user() - layout.supervisor();
        if unknown.components().any(|unknown| unknown < id) {
            return None;
        }
        let mut places = layout.compacted(placed);
        let found = places.find(|(component, _)| component.id() == id);
        found.map(|(_, range)| range)
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

    /// The bytes of a component, also of one that is initial; fewer than its size where the area ends
    /// before, and none where its place is not known.
    #[must_use]
    pub fn component(&self, id: ComponentId) -> &[u8] {
        self.place(id)
            .map_or(&[], |range| bytes::range(&self.area, range))
    }

    /// The state as a value that holds its invariants.
    ///
    /// # Errors
    ///
    /// The first that it breaks. [`rules::check`](crate::rules::check) gives all.
    pub fn state(&self) -> Result<ExtendedState<'_>, InvalidState> {
        let image = if self.is_compacted() {
            Image::from_compacted(&self.area, &self.layout.value)?
        } else {
            Image::parse(&self.area, &self.layout.value)?
        };
        Ok(ExtendedState::new(image, self.registers())?)
    }
}

/// A state that breaks a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum InvalidState {
    /// One of the area's.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// One of an area in the compacted format.
    #[error(transparent)]
    Compacted(#[from] CompactedError),
    /// One of the area and the registers together.
    #[error(transparent)]
    State(#[from] StateError),
}

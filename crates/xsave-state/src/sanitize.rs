//! Makes an untrusted state safe, and reports each change by name.
//!
//! Untrusted is what a file, a peer, an older kernel or another VMM provides: bytes and register
//! values that nobody has checked. [`sanitize`] turns them into an [`ExtendedState`] that the host can
//! load, or refuses them. Components stay where they are:
//! [`relocate`](ExtendedState::relocate) moves them to another layout.

mod report;
mod source;

use alloc::borrow::Cow;
use alloc::vec::Vec;

use thiserror::Error;

pub use report::{Change, Report};

use crate::area::ImageError;
use crate::feature::{ComponentId, XFeatures};
use crate::fit::{List, Losses, Misfit, not_allowed, register_misfits, supported_registers};
use crate::layout::Layout;
use crate::registers::Registers;
use crate::state::{ExtendedState, StateError};

/// Extended state that nobody has checked: an area, and the registers that came with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UntrustedArea<'a> {
    area: Cow<'a, [u8]>,
    registers: Registers,
    guest: Option<XFeatures>,
}

impl<'a> UntrustedArea<'a> {
    /// Borrows an area of the standard or of the compacted format; bit 63 of XCOMP_BV tells which.
    #[must_use]
    pub const fn new(area: &'a [u8], registers: Registers) -> Self {
        Self {
            area: Cow::Borrowed(area),
            registers,
            guest: None,
        }
    }

    /// Copies an area from the 32-bit words of `kvm_xsave`: its `region`, and `extra` behind it.
    /// Pass an empty slice for an area without `extra`.
    ///
    /// ```
    /// use xsave_state::{Registers, UntrustedArea};
    ///
    /// // As a VMM keeps them: [u32; 1024] and Vec<u32>.
    /// let (region, extra) = ([0; 1024], vec![0; 1728]);
    /// let area = UntrustedArea::from_words(&region, &extra, Registers::RESET);
    /// assert_eq!(area.bytes().len(), 11_008);
    /// ```
    #[must_use]
    pub fn from_words(region: &[u32], extra: &[u32], registers: Registers) -> Self {
        let words = region.iter().chain(extra);
        Self {
            area: Cow::Owned(words.flat_map(|word| word.to_le_bytes()).collect()),
            registers,
            guest: None,
        }
    }

    /// Names the components that the guest had where the area was saved:
    /// CPUID.(EAX=0DH,ECX=0):EDX:EAX of its own table.
    ///
    /// Kernels before 6.6 and 6.5.9 report components in XSTATE_BV that the guest never had (fixed by
    /// 8647c52e9504). Those are cleared as [`Change::OverReported`], which loses nothing. x87 and SSE
    /// always count: a guest without XSAVE, whose CPUID.0DH is zero, has them too.
    #[must_use]
    pub const fn of_guest_with(mut self, components: XFeatures) -> Self {
        self.guest = Some(components.union(XFeatures::LEGACY));
        self
    }

    /// Returns the bytes of the area.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.area
    }

    /// Returns the registers that came with the area.
    #[must_use]
    pub const fn registers(&self) -> Registers {
        self.registers
    }
}

/// A state that was made safe.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sanitized {
    /// The state.
    pub state: ExtendedState<'static>,
    /// Everything that is not as it was.
    pub report: Report,
}

/// Makes an untrusted state safe for a vCPU of `layout`, or refuses it.
///
/// `layout` is that of the guest's CPUID. The result holds all rules of [`ExtendedState`]; sanitising
/// it again changes nothing. Bytes without meaning (of initial components, between components, of the
/// software region) come out as zero; that is not a change.
///
/// No input makes it panic. It allocates the size of the layout's area and a list of changes,
/// whatever the input says.
///
/// # Errors
///
/// The area is too short or contradicts itself ([`SanitizeError::TooShort`] and the like, whatever
/// is allowed), or something would be lost that is not `allowed`: [`SanitizeError::Refused`].
///
/// ```
/// use xsave_state::sanitize::{Change, SanitizeError, UntrustedArea, sanitize};
/// use xsave_state::{Losses, Registers, XFeatures};
/// # use xsave_state::{Component, ComponentId, Layout, Palette};
/// # let layout = Layout::from_parts(
/// #     [
/// #         Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
/// #         Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
/// #     ],
/// #     [Palette::ONE],
/// # )
/// # .unwrap();
///
/// // From a snapshot: tiles in use, although IA32_XFD disables them. A host that loads it dies.
/// let mut area = vec![0; 11_008];
/// area[512..520].copy_from_slice(&0x40000u64.to_le_bytes());
/// area[2816] = 1;
/// let registers = Registers::RESET
///     .with_xcr0(XFeatures::from_bits_retain(0x60003))
///     .with_xfd(XFeatures::XTILEDATA);
/// let untrusted = UntrustedArea::new(&area, registers);
///
/// let refused = sanitize(&untrusted, &layout, Losses::empty()).unwrap_err();
/// assert_eq!(
///     refused.to_string(),
///     "this would be lost: XTILEDATA is in use, but IA32_XFD (XTILEDATA (0x40000)) disables it: a \
///      host cannot load it"
/// );
///
/// let sanitized = sanitize(&untrusted, &layout, Losses::DISABLED)?;
/// assert!(sanitized.state.image().xstate_bv().is_empty());
/// assert!(matches!(sanitized.report.changes(), [Change::Lost(_)]));
/// # Ok::<(), SanitizeError>(())
/// ```
pub fn sanitize(
    untrusted: &UntrustedArea<'_>,
    layout: &Layout,
    allowed: Losses,
) -> Result<Sanitized, SanitizeError> {
    let mut report = Report::default();
    let image = source::clean(untrusted, layout, &mut report)?;
    for misfit in register_misfits(untrusted.registers, layout) {
        report.add(Change::Lost(misfit));
    }
    let lost = not_allowed(report.lost(), allowed);
    if !lost.is_empty() {
        return Err(SanitizeError::Refused { lost, report });
    }
    let registers = supported_registers(untrusted.registers, layout);
    Ok(Sanitized {
        state: ExtendedState::new(image, registers)?,
        report,
    })
}

/// Errors from making an untrusted state safe.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SanitizeError {
    /// The area ends before its header does.
    #[error("the area has {actual_bytes} bytes; legacy region and header require {required_bytes}")]
    TooShort {
        /// Legacy region and header.
        required_bytes: usize,
        /// The length of the area.
        actual_bytes: usize,
    },
    /// A component in use lies, in part or whole, behind the end of the area.
    #[error("{component} is in use and ends at byte {required_bytes}; the area has {actual_bytes}")]
    Truncated {
        /// The first such component.
        component: ComponentId,
        /// Where it ends.
        required_bytes: usize,
        /// The length of the area.
        actual_bytes: usize,
    },
    /// In the compacted format, a component of unknown size lies before one that is in use, so the
    /// place of the latter is unknown.
    #[error(
        "XCOMP_BV is {xcomp_bv}: the layout lacks {unknown}, so the place of {component} behind it \
         is unknown"
    )]
    PlaceUnknown {
        /// XCOMP_BV without bit 63.
        xcomp_bv: XFeatures,
        /// The components that the layout lacks.
        unknown: XFeatures,
        /// The first component in use behind them.
        component: ComponentId,
    },
    /// In the compacted format, a component in use has no place.
    #[error("XSTATE_BV is {xstate_bv}, but XCOMP_BV ({xcomp_bv}) has no place for {without_place}")]
    WithoutPlace {
        /// XSTATE_BV.
        xstate_bv: XFeatures,
        /// XCOMP_BV without bit 63.
        xcomp_bv: XFeatures,
        /// The components without a place.
        without_place: XFeatures,
    },
    /// Something would be lost that the caller does not allow.
    #[error("this would be lost: {}", List(lost))]
    Refused {
        /// What would be lost and is not allowed to be.
        lost: Vec<Misfit>,
        /// All changes that would be needed.
        report: Report,
    },
    /// The cleaned area is not valid. No input is known that reaches this: it is checked because the
    /// host depends on it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The cleaned registers are not valid with the area. No input is known that reaches this: it is
    /// checked because the host depends on it.
    #[error(transparent)]
    State(#[from] StateError),
}

//! Makes foreign state safe for a target, and reports by name each change that it made.
//!
//! Foreign is what a file, a peer, an older kernel or another VMM gave: bytes of which nothing is
//! known, and register values. [`sanitize`] turns them into an [`ExtendedState`] that the target can
//! load, or refuses. What has to change is in a [`Report`]; a [`Policy`] says which changes are
//! acceptable. Components stay where they lie: to move them there is [`relayout`](crate::relayout).

use core::fmt;

use thiserror::Error;

use crate::feature::{ComponentId, XFeatures};
use crate::image::ImageError;
use crate::layout::Layout;
use crate::state::{ExtendedState, Registers, StateError};

mod area;
mod registers;
mod report;

pub use report::{Change, Losses, Report};

/// Extended state of unknown origin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Foreign<'a> {
    area: &'a [u8],
    registers: Registers,
    guest: Option<XFeatures>,
}

impl<'a> Foreign<'a> {
    /// An area of the standard or of the compacted format (bit 63 of XCOMP_BV tells), and the
    /// registers that came with it. Its components lie where the [`Target`]'s layout has them.
    #[must_use]
    pub const fn new(area: &'a [u8], registers: Registers) -> Self {
        Self {
            area,
            registers,
            guest: None,
        }
    }

    /// What the guest had where the area was saved: CPUID.(EAX=0DH,ECX=0):EDX:EAX of its own table.
    ///
    /// Kernels before 6.6 and 6.5.9 report components in XSTATE_BV that the guest never had (fixed
    /// by 8647c52e9504). With `components` known, those are cleared as [`Change::OverReported`],
    /// which loses nothing; without, as [`Change::Unsupported`], which may. x87 and SSE always count:
    /// a guest without XSAVE, whose CPUID.0DH is zero, has them too.
    #[must_use]
    pub const fn with_guest(mut self, components: XFeatures) -> Self {
        self.guest = Some(components.union(XFeatures::LEGACY));
        self
    }
}

/// Who is to load the state: a guest's layout, and what the kernel of its host supports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    layout: Layout,
    components: XFeatures,
    xfd: XFeatures,
}

impl Target {
    /// A guest of this layout, on a kernel that supports all of it.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
            components: layout.user(),
            xfd: layout.xfd(),
        }
    }

    /// The same on a kernel that has only `components` for guests: KVM_SET_XSAVE and KVM_SET_XCRS
    /// give EINVAL for others. KVM_X86_XCOMP_GUEST_SUPP and CPUID.0DH.0 of KVM_GET_SUPPORTED_CPUID
    /// say which. x87 and SSE always count.
    #[must_use]
    pub fn with_kernel_components(mut self, components: XFeatures) -> Self {
        self.components = self.layout.user() & (components | XFeatures::LEGACY);
        self
    }

    /// The same on a kernel without IA32_XFD (before Linux 5.17).
    #[must_use]
    pub fn without_xfd(mut self) -> Self {
        self.xfd = XFeatures::empty();
        self
    }

    /// Where the components lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The components that both the layout and the kernel have.
    #[must_use]
    pub fn components(&self) -> XFeatures {
        self.components
    }

    /// What IA32_XFD can disable there.
    #[must_use]
    pub fn xfd(&self) -> XFeatures {
        self.xfd
    }
}

/// Which changes are acceptable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Policy {
    /// None: state that is not safe as it is is refused.
    Unchanged,
    /// Changes that the guest cannot notice.
    Lossless,
    /// Those, and the losses that are named.
    Allow(Losses),
}

/// What [`sanitize`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Sanitized {
    /// The state, safe for the target.
    pub state: ExtendedState<'static>,
    /// What is not as it was.
    pub report: Report,
}

/// Makes foreign state safe for a target, or refuses it.
///
/// The result holds all invariants of [`ExtendedState`] and has only components, and bits of
/// registers, that the target's layout and kernel have. Sanitising it again changes nothing. Bytes
/// that mean nothing (of initial components, between components, of the software region) come out as
/// zero; that is not a change. Components that are in use with their initial value are released,
/// except under [`Policy::Unchanged`].
///
/// No input makes it panic. It allocates the size of the layout's area, whatever the input says.
///
/// # Errors
///
/// The bytes cannot be understood ([`SanitizeError::TooShort`] and the like, under every policy), or
/// a change is needed that `policy` does not allow: [`SanitizeError::Refused`] lists all changes.
///
/// ```
/// use xsave_state::sanitize::{Change, Foreign, Losses, Policy, SanitizeError, Target, sanitize};
/// use xsave_state::{Registers, XFeatures};
/// # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
/// #     match (leaf, subleaf) {
/// #         (0, _) => [0x1e, 0, 0, 0],
/// #         (0xd, 0) => [0x60003, 11008, 11008, 0],
/// #         (0xd, 1) => [0x1f, 9088, 0, 0],
/// #         (0xd, 17) => [64, 2752, 2, 0],
/// #         (0xd, 18) => [8192, 2816, 6, 0],
/// #         (0x1d, 0) => [1, 0, 0, 0],
/// #         (0x1d, 1) => [0x0400_2000, 0x0008_0040, 0x10, 0],
/// #         _ => [0; 4],
/// #     }
/// # }
/// # let layout = xsave_state::Layout::from_cpuid(cpuid).unwrap();
///
/// // From a snapshot: tiles in use, although IA32_XFD disables them. A host that loads it dies.
/// let mut area = vec![0; 11_008];
/// area[512..520].copy_from_slice(&0x40000u64.to_le_bytes());
/// area[2816] = 1;
/// let registers = Registers {
///     xcr0: XFeatures::from_bits_retain(0x60003),
///     xfd: XFeatures::XTILEDATA,
///     xfd_err: XFeatures::empty(),
/// };
///
/// let foreign = Foreign::new(&area, registers);
/// let target = Target::new(&layout);
/// let refused = sanitize(&foreign, &target, Policy::Lossless).unwrap_err();
/// assert_eq!(
///     refused.to_string(),
///     "not allowed: DISABLED. Changes: XSTATE_BV: XTILEDATA (0x40000), now none: IA32_XFD \
///      (XTILEDATA (0x40000)) disables the rest; content of XTILEDATA (0x40000) is lost"
/// );
///
/// let sanitized = sanitize(&foreign, &target, Policy::Allow(Losses::DISABLED))?;
/// assert!(sanitized.state.image().xstate_bv().is_empty());
/// assert!(matches!(sanitized.report.changes(), [Change::Disabled { .. }]));
/// # Ok::<(), SanitizeError>(())
/// ```
pub fn sanitize(
    foreign: &Foreign<'_>,
    target: &Target,
    policy: Policy,
) -> Result<Sanitized, SanitizeError> {
    let mut report = Report::default();
    let image = area::clean(foreign, target, policy, &mut report)?;
    let registers = registers::clean(foreign.registers, target, &mut report);

    let refused = match policy {
        Policy::Unchanged => !report.changes().is_empty(),
        Policy::Lossless => !report.losses().is_empty(),
        Policy::Allow(allowed) => !allowed.contains(report.losses()),
    };
    if refused {
        let allowed = match policy {
            Policy::Allow(allowed) => allowed,
            Policy::Unchanged | Policy::Lossless => Losses::empty(),
        };
        return Err(SanitizeError::Refused {
            not_allowed: report.losses().difference(allowed),
            report,
        });
    }
    Ok(Sanitized {
        state: ExtendedState::new(image, registers)?,
        report,
    })
}

/// State that cannot be made safe, or must not be by the policy.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SanitizeError {
    /// There is not even a whole header.
    #[error("the area has {actual_bytes} bytes; legacy region and header need {required_bytes}")]
    TooShort {
        /// Legacy region and header.
        required_bytes: usize,
        /// What is there.
        actual_bytes: usize,
    },
    /// A component in use lies, in part or whole, behind the end.
    #[error("{component} is in use and ends at byte {required_bytes}; the area has {actual_bytes}")]
    Truncated {
        /// The first such component.
        component: ComponentId,
        /// Where it ends.
        required_bytes: usize,
        /// What is there.
        actual_bytes: usize,
    },
    /// In the compacted format, a component of unknown size lies before one that is in use: where
    /// that one lies is not known.
    #[error(
        "XCOMP_BV is {xcomp_bv}: the size of {unknown} is not known, so neither is the place of \
         {component}"
    )]
    PlaceUnknown {
        /// XCOMP_BV without bit 63.
        xcomp_bv: XFeatures,
        /// What the layout does not have.
        unknown: XFeatures,
        /// The first component in use behind it.
        component: ComponentId,
    },
    /// In the compacted format, a component in use has no place.
    #[error("XSTATE_BV is {xstate_bv}, but XCOMP_BV ({xcomp_bv}) has no place for {without_place}")]
    WithoutPlace {
        /// XSTATE_BV.
        xstate_bv: XFeatures,
        /// XCOMP_BV without bit 63.
        xcomp_bv: XFeatures,
        /// What has no place.
        without_place: XFeatures,
    },
    /// Changes are needed that the policy does not allow.
    #[error("{}. Changes: {report}", Refusal(*not_allowed))]
    Refused {
        /// The losses that the policy does not name. None: the policy allows no change at all.
        not_allowed: Losses,
        /// All changes that would be needed.
        report: Report,
    },
    /// The cleaned area is not valid. Not known to be possible; checked because the host depends on
    /// it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The cleaned registers are not valid with the area. Not known to be possible; checked because
    /// the host depends on it.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why a policy refuses.
struct Refusal(Losses);

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("no change is allowed");
        }
        write!(f, "not allowed: {}", self.0)
    }
}

//! The same state for a guest with other offsets, sizes or features, or the exact list of what it
//! would lose.
//!
//! Offsets differ between processors: PKRU is at 2688 where MPX is known of, and at 2432 on AMD's.
//! An area of one is garbage to the other, although every component means the same on both.

use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::image::{Image, ImageError};
use crate::initial::{MXCSR_HOLDERS, is_initial};
use crate::layout::{Layout, Misfit};
use crate::legacy::INITIAL_MXCSR;
use crate::state::{ExtendedState, Registers, StateError};
use crate::tile::{TileConfig, TileConfigError};
use crate::xcr0;

/// What may be lost, by name.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Allowed {
    /// These components: their content, and their bits in XCR0, IA32_XFD and IA32_XFD_ERR.
    pub components: XFeatures,
    /// MXCSR bits that the target does not have.
    pub mxcsr: bool,
}

impl Allowed {
    /// Nothing may be lost.
    pub const NOTHING: Self = Self {
        components: XFeatures::empty(),
        mxcsr: false,
    };
}

/// What [`relayout`] gives.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Relaid {
    /// The state, in the target's layout.
    pub state: ExtendedState<'static>,
    /// What is not in it, all of it allowed.
    pub lost: Vec<Loss>,
}

/// The same state in another layout.
///
/// It is exact for all that both layouts have: with nothing lost, the way back gives the same state.
/// Components that the target does not have may be in use if their value is the initial one: they
/// are not, there. A component of another size moves if what it has fits, for components whose first
/// bytes mean the same on both (PKRU; XTILEDATA, if the palette in use is the same).
///
/// It allocates one area of the target's size, and the list of losses.
///
/// # Errors
///
/// [`RelayoutError::Lossy`] lists everything that would be lost and that `allowed` does not name.
///
/// ```
/// use xsave_state::relayout::{Allowed, Loss, RelayoutError, relayout};
/// use xsave_state::{ComponentId, ExtendedState, Image, Layout, Registers, XFeatures};
///
/// // PKRU where Intel has it, and where AMD has it; the second has no AVX.
/// fn intel(leaf: u32, subleaf: u32) -> [u32; 4] {
///     match (leaf, subleaf) {
///         (0, _) => [0xd, 0, 0, 0],
///         (0xd, 0) => [0x207, 2696, 2696, 0],
///         (0xd, 2) => [256, 576, 0, 0],
///         (0xd, 9) => [8, 2688, 0, 0],
///         _ => [0; 4],
///     }
/// }
/// fn amd(leaf: u32, subleaf: u32) -> [u32; 4] {
///     match (leaf, subleaf) {
///         (0xd, 0) => [0x203, 2440, 2440, 0],
///         (0xd, 9) => [8, 2432, 0, 0],
///         _ => intel(leaf, subleaf),
///     }
/// }
/// let (intel, amd) = (Layout::from_cpuid(intel)?, Layout::from_cpuid(amd)?);
///
/// let mut area = vec![0; 2696];
/// area[512..520].copy_from_slice(&0x206u64.to_le_bytes()); // SSE, AVX (initial), PKRU
/// area[2688] = 0x54;
/// let registers = Registers { xcr0: XFeatures::from_bits_retain(0x203), ..Registers::RESET };
/// let state = ExtendedState::new(Image::parse(&area, &intel)?, registers)?;
///
/// let moved = relayout(&state, &amd, Allowed::NOTHING)?.state;
/// assert_eq!(moved.image().as_bytes()[2432], 0x54);
///
/// area[576] = 1; // and now AVX is not initial
/// let state = ExtendedState::new(Image::parse(&area, &intel)?, registers)?;
/// let Err(RelayoutError::Lossy { losses }) = relayout(&state, &amd, Allowed::NOTHING) else {
///     panic!("the other has no AVX");
/// };
/// assert_eq!(losses, [Loss::Missing { component: ComponentId::AVX }]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn relayout(
    state: &ExtendedState<'_>,
    target: &Layout,
    allowed: Allowed,
) -> Result<Relaid, RelayoutError> {
    let image = state.image();
    let mut lost = Vec::new();
    let mut kept = XFeatures::empty();
    for id in image.xstate_bv().components() {
        match place(image, target, id) {
            Place::Fits => kept |= id.bit(),
            Place::Initial => {}
            Place::Lost(loss) => lost.push(loss),
        }
    }
    let registers = registers(state.registers(), target);
    lost.extend(lost_registers(state.registers(), registers));
    lost.extend(lost_mxcsr(image, target));
    let mxcsr = image.mxcsr() & target.mxcsr_mask();
    // MXCSR needs a component with which it is loaded; XMM is initial then, as it was.
    if mxcsr != INITIAL_MXCSR && !kept.intersects(MXCSR_HOLDERS) {
        kept |= XFeatures::SSE;
    }

    let not_allowed: Vec<Loss> = lost
        .iter()
        .copied()
        .filter(|loss| !loss.is_allowed(allowed))
        .collect();
    if !not_allowed.is_empty() {
        return Err(RelayoutError::Lossy {
            losses: not_allowed,
        });
    }
    let image = Image::of_components(target, kept, mxcsr, |id| image.component(id))?;
    Ok(Relaid {
        state: ExtendedState::new(image, registers)?,
        lost,
    })
}

/// See [`ExtendedState::misfits`].
pub(crate) fn misfits(state: &ExtendedState<'_>, target: &Layout) -> impl Iterator<Item = Misfit> {
    let image = state.image();
    let in_use = image.xstate_bv();
    let tiles = (in_use & XFeatures::AMX).components();
    let tiles = tiles.filter_map(|id| match place(image, target, id) {
        // The layouts have these already.
        Place::Lost(Loss::Missing { .. } | Loss::Size { .. }) => None,
        Place::Lost(loss) => Some(loss),
        Place::Fits | Place::Initial => None,
    });
    let was = state.registers();
    let losses = tiles
        .chain(lost_registers(was, registers(was, target)))
        .chain(lost_mxcsr(image, target));
    let places = state.layout().misfits(target, in_use);
    places.chain(losses.map(Misfit::Loss))
}

/// What becomes of a component in use.
enum Place {
    Fits,
    /// The target does not have it, or not in that size, but needs not.
    Initial,
    Lost(Loss),
}

fn place(image: &Image<'_>, target: &Layout, component: ComponentId) -> Place {
    let content = image.component(component).unwrap_or_default();
    let lost = |loss| {
        if is_initial(component, content) {
            Place::Initial
        } else {
            Place::Lost(loss)
        }
    };
    let Some(theirs) = target.component(component).filter(|c| c.offset().is_some()) else {
        return lost(Loss::Missing { component });
    };
    if component == ComponentId::XTILECFG
        && let Some(config) = image.tile_config()
    {
        let bytes = bytes::array(content, 0);
        if let Err(rule) = TileConfig::parse(&bytes, target.palettes()) {
            return Place::Lost(Loss::TileConfig { rule });
        }
        if !target.palettes().contains(config.palette()) {
            return Place::Lost(Loss::Palette {
                component,
                palette: config.palette().id(),
            });
        }
    }
    if component == ComponentId::XTILEDATA
        && let Some(tiles) = image.tile_data()
    {
        let same = match image.tile_config() {
            Some(config) => target.palettes().contains(config.palette()),
            // Whoever configures tiles again may choose any palette.
            None => is_prefix(image.layout(), target),
        };
        if !same {
            return lost(Loss::Palette {
                component,
                palette: tiles.palette().id(),
            });
        }
    }
    let (source_bytes, target_bytes) = (content.len(), theirs.size());
    let resizable = matches!(component, ComponentId::PKRU | ComponentId::XTILEDATA);
    let fits = source_bytes == target_bytes
        || resizable && bytes::first_nonzero(content, target_bytes..source_bytes).is_none();
    if fits {
        Place::Fits
    } else {
        lost(Loss::Size {
            component,
            source_bytes,
            target_bytes,
        })
    }
}

/// Whether the palettes that both have are the same. One that only one of them has does not matter:
/// nothing can look through it at tiles that come from the other.
fn is_prefix(source: &Layout, target: &Layout) -> bool {
    source
        .palettes()
        .iter()
        .zip(target.palettes())
        .all(|(ours, theirs)| ours == theirs)
}

/// What the target has of them, as a legal XCR0.
fn registers(was: Registers, target: &Layout) -> Registers {
    Registers {
        xcr0: xcr0::largest_within(was.xcr0, target.user()),
        xfd: was.xfd & target.xfd(),
        xfd_err: was.xfd_err & target.xfd(),
    }
}

fn lost_registers(was: Registers, now: Registers) -> impl Iterator<Item = Loss> {
    let xcr0 = Loss::Xcr0 {
        xcr0: was.xcr0,
        lost: was.xcr0 - now.xcr0,
    };
    let xfd = Loss::Xfd {
        xfd: was.xfd,
        lost: was.xfd - now.xfd,
    };
    let xfd_err = Loss::XfdErr {
        xfd_err: was.xfd_err,
        lost: was.xfd_err - now.xfd_err,
    };
    let lost = [
        (now.xcr0 != was.xcr0).then_some(xcr0),
        (now.xfd != was.xfd).then_some(xfd),
        (now.xfd_err != was.xfd_err).then_some(xfd_err),
    ];
    lost.into_iter().flatten()
}

fn lost_mxcsr(image: &Image<'_>, target: &Layout) -> Option<Loss> {
    let (mxcsr, mask) = (image.mxcsr(), target.mxcsr_mask());
    (mxcsr & !mask != 0).then_some(Loss::Mxcsr { mxcsr, mask })
}

/// One thing that the target cannot hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Loss {
    /// A component in use that the target does not have.
    Missing {
        /// The component.
        component: ComponentId,
    },
    /// A component in use that has another size there.
    Size {
        /// The component.
        component: ComponentId,
        /// Here.
        source_bytes: usize,
        /// There.
        target_bytes: usize,
    },
    /// A tile configuration that the target does not take.
    TileConfig {
        /// The rule of LDTILECFG that it breaks there.
        rule: TileConfigError,
    },
    /// A tile configuration, or tiles, of a palette that means something else there.
    Palette {
        /// XTILECFG or XTILEDATA.
        component: ComponentId,
        /// The palette.
        palette: u8,
    },
    /// MXCSR bits that the target does not have.
    Mxcsr {
        /// MXCSR.
        mxcsr: u32,
        /// The bits that may be set there.
        mask: u32,
    },
    /// XCR0 bits that the target does not have, and those that XSETBV does not take without them.
    Xcr0 {
        /// XCR0.
        xcr0: XFeatures,
        /// The bits.
        lost: XFeatures,
    },
    /// IA32_XFD bits that the target does not have.
    Xfd {
        /// IA32_XFD.
        xfd: XFeatures,
        /// The bits.
        lost: XFeatures,
    },
    /// IA32_XFD_ERR bits that the target does not have.
    XfdErr {
        /// IA32_XFD_ERR.
        xfd_err: XFeatures,
        /// The bits.
        lost: XFeatures,
    },
}

impl Loss {
    fn is_allowed(&self, allowed: Allowed) -> bool {
        allowed.components.contains(match *self {
            Self::Mxcsr { .. } => return allowed.mxcsr,
            Self::Missing { component }
            | Self::Size { component, .. }
            | Self::Palette { component, .. } => component.bit(),
            Self::TileConfig { .. } => XFeatures::XTILECFG,
            Self::Xcr0 { lost, .. } | Self::Xfd { lost, .. } | Self::XfdErr { lost, .. } => lost,
        })
    }
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { component } => {
                write!(f, "{component} is in use and the target does not have it")
            }
            Self::Size {
                component,
                source_bytes,
                target_bytes,
            } => write!(
                f,
                "{component} is {source_bytes} bytes in the state and {target_bytes} on the target"
            ),
            Self::TileConfig { rule } => write!(f, "the target does not take TILECFG: {rule}"),
            Self::Palette { component, palette } => {
                write!(
                    f,
                    "{component}: palette {palette} is another one on the target"
                )
            }
            Self::Mxcsr { mxcsr, mask } => {
                write!(f, "MXCSR is {mxcsr:#x}; the target has {mask:#x}")
            }
            Self::Xcr0 { xcr0, lost } => {
                write!(f, "XCR0 is {xcr0}; it cannot have {lost} on the target")
            }
            Self::Xfd { xfd, lost } => {
                write!(f, "IA32_XFD is {xfd}; the target cannot disable {lost}")
            }
            Self::XfdErr { xfd_err, lost } => {
                write!(
                    f,
                    "IA32_XFD_ERR is {xfd_err}; the target cannot disable {lost}"
                )
            }
        }
    }
}

/// State that would not be the same on the target.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RelayoutError {
    /// This would be lost.
    #[error("the target cannot hold the state: {}", List(losses))]
    Lossy {
        /// Everything that is not allowed to be lost.
        losses: Vec<Loss>,
    },
    /// The new area is not valid. Not known to be possible; checked because the host depends on it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registers are not valid with the new area. Not known to be possible; checked because the
    /// host depends on it.
    #[error(transparent)]
    State(#[from] StateError),
}

struct List<'a>(&'a [Loss]);

impl fmt::Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for loss in self.0 {
            write!(f, "{separator}{loss}")?;
            separator = "; ";
        }
        Ok(())
    }
}

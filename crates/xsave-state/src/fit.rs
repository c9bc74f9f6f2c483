//! Compares a state with another layout, and moves it there.
//!
//! Offsets differ between processors: PKRU is at 2688 on Intel's servers and at 2432 on AMD Zen 4. An
//! area of one is garbage to the other, although every component means the same on both.

use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use crate::area::initial::{MXCSR_HOLDERS, is_initial};
use crate::area::{Image, ImageError, TileConfig, TileConfigError};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::INITIAL_MXCSR;
use crate::layout::Layout;
use crate::registers::Registers;
use crate::state::{ExtendedState, StateError};
use crate::xcr0;

bitflags::bitflags! {
    /// Kinds of state that a caller allows to be lost.
    ///
    /// An empty set allows only changes that the guest cannot notice.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Losses: u32 {
        /// Content of components that the target lacks or cannot hold: [`Misfit::Missing`],
        /// [`Misfit::Size`], [`Misfit::Palette`].
        const CONTENT = 1 << 0;
        /// Content of components that IA32_XFD disables: [`Misfit::Disabled`]. Software cannot rely
        /// on it, and Linux does not keep it (SDM Vol. 1 §13.14).
        const DISABLED = 1 << 1;
        /// A tile configuration that LDTILECFG would refuse: [`Misfit::TileConfig`].
        const TILE_CONFIG = 1 << 2;
        /// MXCSR bits that the target lacks: [`Misfit::Mxcsr`].
        const MXCSR = 1 << 3;
        /// XCR0 bits that the target lacks, or refuses in that combination: [`Misfit::Xcr0`].
        const XCR0 = 1 << 4;
        /// IA32_XFD and IA32_XFD_ERR bits that the target lacks: [`Misfit::Xfd`],
        /// [`Misfit::XfdErr`].
        const XFD = 1 << 5;
    }
}

impl fmt::Display for Losses {
    /// Names joined by ` | `. No bit: `none`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return f.write_str("none");
        }
        bitflags::parser::to_writer(self, f)
    }
}

/// One reason why a state does not fit a target as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Misfit {
    /// The target lacks a component that is in use.
    Missing {
        /// The component.
        component: ComponentId,
    },
    /// A component in use has another size on the target.
    Size {
        /// The component.
        component: ComponentId,
        /// Its size in the state.
        source_bytes: usize,
        /// Its size on the target.
        target_bytes: usize,
    },
    /// A component in use has another offset on the target. [`ExtendedState::relocate`] moves it.
    Offset {
        /// The component.
        component: ComponentId,
        /// Its offset in the state, in bytes.
        source_offset: usize,
        /// Its offset on the target, in bytes.
        target_offset: usize,
    },
    /// A component is in use although IA32_XFD disables it: a host that loads it gets #NM.
    Disabled {
        /// The component.
        component: ComponentId,
        /// IA32_XFD.
        xfd: XFeatures,
    },
    /// The target's LDTILECFG would refuse the tile configuration.
    TileConfig {
        /// The rule that it breaks.
        rule: TileConfigError,
    },
    /// The palette of a tile configuration, or of tiles, is missing on the target or has another
    /// geometry there.
    Palette {
        /// XTILECFG or XTILEDATA.
        component: ComponentId,
        /// The palette.
        palette: u8,
    },
    /// MXCSR has bits that the target lacks: XRSTOR raises #GP there.
    Mxcsr {
        /// MXCSR.
        mxcsr: u32,
        /// The bits that may be set on the target.
        mask: u32,
    },
    /// The target's XSETBV would refuse XCR0.
    Xcr0 {
        /// XCR0.
        xcr0: XFeatures,
        /// The most of it that the target supports.
        largest: XFeatures,
    },
    /// IA32_XFD has bits that the target cannot disable.
    Xfd {
        /// IA32_XFD.
        xfd: XFeatures,
        /// The bits.
        unsupported: XFeatures,
    },
    /// IA32_XFD_ERR has bits that the target cannot disable.
    XfdErr {
        /// IA32_XFD_ERR.
        xfd_err: XFeatures,
        /// The bits.
        unsupported: XFeatures,
    },
    /// The layouts differ in whether the component is aligned in the compacted format, or can be disabled
    /// by IA32_XFD. Only [`wire`](crate::wire) compares that: it takes layouts that are equal.
    Properties {
        /// The component.
        component: ComponentId,
    },
    /// The layouts differ in the MXCSR bits that may be set. Only [`wire`](crate::wire) compares that: for
    /// a state the bits that are set count, [`Mxcsr`](Self::Mxcsr).
    MxcsrMask {
        /// The bits that may be set in the state's layout.
        source_mask: u32,
        /// The bits that may be set on the target.
        target_mask: u32,
    },
}

impl Misfit {
    /// Returns the kind of state that is lost on the target; none where the state only has to move.
    #[must_use]
    pub const fn loss(&self) -> Losses {
        match self {
            Self::Offset { .. } | Self::Properties { .. } | Self::MxcsrMask { .. } => {
                Losses::empty()
            }
            Self::Missing { .. } | Self::Size { .. } | Self::Palette { .. } => Losses::CONTENT,
            Self::Disabled { .. } => Losses::DISABLED,
            Self::TileConfig { .. } => Losses::TILE_CONFIG,
            Self::Mxcsr { .. } => Losses::MXCSR,
            Self::Xcr0 { .. } => Losses::XCR0,
            Self::Xfd { .. } | Self::XfdErr { .. } => Losses::XFD,
        }
    }
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing { component } => {
                write!(f, "the target lacks {component}")
            }
            Self::Size {
                component,
                source_bytes,
                target_bytes,
            } => write!(
                f,
                "{component} has {source_bytes} bytes in the state and {target_bytes} on the target"
            ),
            Self::Offset {
                component,
                source_offset,
                target_offset,
            } => write!(
                f,
                "{component} is at offset {source_offset} in the state and at {target_offset} on the \
                 target"
            ),
            Self::Disabled { component, xfd } => write!(
                f,
                "{component} is in use, but IA32_XFD ({xfd}) disables it: a host cannot load it"
            ),
            Self::TileConfig { rule } => write!(f, "the target refuses TILECFG: {rule}"),
            Self::Palette { component, palette } => write!(
                f,
                "{component} uses palette {palette}, which is missing on the target or has another \
                 geometry there"
            ),
            Self::Mxcsr { mxcsr, mask } => write!(
                f,
                "MXCSR is {mxcsr:#x}; the target supports the bits {mask:#x}"
            ),
            Self::Xcr0 { xcr0, largest } => {
                write!(
                    f,
                    "XCR0 is {xcr0}; the target supports only {largest} of it"
                )
            }
            Self::Xfd { xfd, unsupported } => {
                write!(
                    f,
                    "IA32_XFD is {xfd}; the target cannot disable {unsupported}"
                )
            }
            Self::XfdErr {
                xfd_err,
                unsupported,
            } => write!(
                f,
                "IA32_XFD_ERR is {xfd_err}; the target cannot disable {unsupported}"
            ),
            Self::Properties { component } => write!(
                f,
                "{component} is aligned otherwise on the target, or IA32_XFD can disable it in one only"
            ),
            Self::MxcsrMask {
                source_mask,
                target_mask,
            } => write!(
                f,
                "MXCSR may have the bits {source_mask:#x} in the state and {target_mask:#x} on the target"
            ),
        }
    }
}

/// A state in the layout of its target.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Relocated {
    /// The state.
    pub state: ExtendedState<'static>,
    /// What it lost, all of it allowed.
    pub lost: Vec<Misfit>,
}

impl ExtendedState<'_> {
    /// Iterates over everything that keeps this state from being restored, as it is, into a vCPU of
    /// layout `target`. Empty: it fits.
    ///
    /// ```
    /// # fn demo(state: &xsave_state::ExtendedState<'_>, target: &xsave_state::Layout) {
    /// for reason in state.misfits(target) {
    ///     eprintln!("cannot restore: {reason}");
    /// }
    /// # }
    /// ```
    pub fn misfits(&self, target: &Layout) -> impl Iterator<Item = Misfit> {
        let image = self.image();
        let components = image.xstate_bv().components();
        components
            .filter_map(|id| misfit(image, target, id))
            .chain(register_misfits(self.registers(), target))
            .chain(mxcsr_misfit(image.mxcsr(), target))
    }

    /// Builds the same state in another layout.
    ///
    /// It is exact for everything that both layouts have: with nothing lost, the way back gives the
    /// same state. A component that is in use with its initial value, and that the target lacks, is
    /// no longer in use there. A component of another size moves if its content fits and its first
    /// bytes mean the same in both (PKRU; XTILEDATA, if its palette is the same).
    ///
    /// It allocates one area of the target's size, and the list of losses.
    ///
    /// # Errors
    ///
    /// [`RelocateError::Lossy`] lists everything that would be lost and is not `allowed`.
    ///
    /// ```
    /// use xsave_state::{Component, ComponentId, ExtendedState, Image, Layout, Registers, XFeatures};
    /// use xsave_state::{Losses, Misfit, RelocateError};
    ///
    /// // PKRU where Intel has it, and where AMD has it; the second has no AVX.
    /// let avx = Component::user(ComponentId::AVX, 576, 256);
    /// let intel = Layout::from_parts([avx, Component::user(ComponentId::PKRU, 2688, 8)], [])?;
    /// let amd = Layout::from_parts([Component::user(ComponentId::PKRU, 2432, 8)], [])?;
    ///
    /// let mut area = vec![0; 2696];
    /// area[512..520].copy_from_slice(&0x206u64.to_le_bytes()); // SSE, AVX (initial), PKRU
    /// area[2688] = 0x54;
    /// let registers = Registers::RESET.with_xcr0(XFeatures::from_bits_retain(0x203));
    /// let state = ExtendedState::new(Image::parse(&area, &intel)?, registers)?;
    ///
    /// let moved = state.relocate(&amd, Losses::empty())?.state;
    /// assert_eq!(moved.image().as_bytes()[2432], 0x54);
    ///
    /// area[576] = 1; // and now AVX is not initial
    /// let state = ExtendedState::new(Image::parse(&area, &intel)?, registers)?;
    /// let Err(RelocateError::Lossy { losses }) = state.relocate(&amd, Losses::empty()) else {
    ///     panic!("the target has no AVX");
    /// };
    /// assert_eq!(losses, [Misfit::Missing { component: ComponentId::AVX }]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn relocate(&self, target: &Layout, allowed: Losses) -> Result<Relocated, RelocateError> {
        let image = self.image();
        let mut lost = Vec::new();
        let mut kept = XFeatures::empty();
        for id in image.xstate_bv().components() {
            match obstacle(image, target, id) {
                None => kept |= id.bit(),
                Some(_) if image.component(id).is_some_and(|b| is_initial(id, b)) => {}
                Some(misfit) => lost.push(misfit),
            }
        }
        lost.extend(register_misfits(self.registers(), target));
        lost.extend(mxcsr_misfit(image.mxcsr(), target));
        let mxcsr = image.mxcsr() & target.mxcsr_mask();
        // MXCSR needs a component with which it is loaded; XMM is initial then, as it was.
        if mxcsr != INITIAL_MXCSR && !kept.intersects(MXCSR_HOLDERS) {
            kept |= XFeatures::SSE;
        }
        let not_allowed = not_allowed(lost.iter(), allowed);
        if !not_allowed.is_empty() {
            return Err(RelocateError::Lossy {
                losses: not_allowed,
            });
        }
        let registers = supported_registers(self.registers(), target);
        let image = Image::of_components(target, kept, mxcsr, |id| image.component(id))?;
        Ok(Relocated {
            state: ExtendedState::new(image, registers)?,
            lost,
        })
    }
}

/// Returns the misfits whose loss is not allowed.
pub(crate) fn not_allowed<'a>(
    misfits: impl Iterator<Item = &'a Misfit>,
    allowed: Losses,
) -> Vec<Misfit> {
    misfits
        .filter(|misfit| !allowed.contains(misfit.loss()))
        .copied()
        .collect()
}

/// Compares a component in use with the target, as it is.
fn misfit(image: &Image<'_>, target: &Layout, component: ComponentId) -> Option<Misfit> {
    let theirs = target.component(component);
    let Some((theirs, target_offset)) = theirs.and_then(|c| Some((c, c.offset()?))) else {
        return Some(Misfit::Missing { component });
    };
    let ours = image.layout().component(component)?;
    let source_offset = ours.offset()?;
    let (source_bytes, target_bytes) = (ours.size(), theirs.size());
    if source_bytes != target_bytes {
        return Some(Misfit::Size {
            component,
            source_bytes,
            target_bytes,
        });
    }
    if source_offset != target_offset {
        return Some(Misfit::Offset {
            component,
            source_offset,
            target_offset,
        });
    }
    tile_misfit(image, target, component)
}

/// Returns what keeps the content of a component in use from being moved to the target.
fn obstacle(image: &Image<'_>, target: &Layout, component: ComponentId) -> Option<Misfit> {
    match misfit(image, target, component) {
        Some(Misfit::Offset { .. }) => tile_misfit(image, target, component),
        Some(size @ Misfit::Size { target_bytes, .. }) => {
            let content = image.component(component).unwrap_or_default();
            let resizable = matches!(component, ComponentId::PKRU | ComponentId::XTILEDATA);
            let cut = bytes::first_nonzero(content, target_bytes..content.len());
            if resizable && cut.is_none() {
                return tile_misfit(image, target, component);
            }
            Some(size)
        }
        other => other,
    }
}

/// Compares the palettes that a tile configuration or tiles depend on.
fn tile_misfit(image: &Image<'_>, target: &Layout, component: ComponentId) -> Option<Misfit> {
    if !XFeatures::AMX.contains(component.bit()) {
        return None;
    }
    let palettes = target.palettes();
    let other = match image.tile_config() {
        Some(config) => {
            let bytes = bytes::array(image.component(component)?, 0);
            if component == ComponentId::XTILECFG
                && let Err(rule) = TileConfig::parse(&bytes, palettes)
            {
                return Some(Misfit::TileConfig { rule });
            }
            Some(*config.palette()).filter(|ours| !palettes.contains(ours))
        }
        None if component == ComponentId::XTILECFG => None,
        // Whoever configures tiles again may choose any palette that both have.
        None => {
            let ours = image.layout().palettes().iter().copied();
            let mut pairs = ours.zip(palettes);
            pairs
                .find(|(ours, theirs)| ours != *theirs)
                .map(|(ours, _)| ours)
        }
    };
    other.map(|palette| Misfit::Palette {
        component,
        palette: palette.id(),
    })
}

/// Returns the part of the registers that the target supports, with a legal XCR0.
pub(crate) fn supported_registers(was: Registers, target: &Layout) -> Registers {
    Registers::RESET
        .with_xcr0(xcr0::largest_within(was.xcr0, target.user()))
        .with_xfd(was.xfd & target.xfd())
        .with_xfd_err(was.xfd_err & target.xfd())
}

pub(crate) fn register_misfits(was: Registers, target: &Layout) -> impl Iterator<Item = Misfit> {
    let Registers { xcr0, xfd, xfd_err } = was;
    let now = supported_registers(was, target);
    let misfits = [
        (now.xcr0 != xcr0).then_some(Misfit::Xcr0 {
            xcr0,
            largest: now.xcr0,
        }),
        (now.xfd != xfd).then_some(Misfit::Xfd {
            xfd,
            unsupported: xfd - now.xfd,
        }),
        (now.xfd_err != xfd_err).then_some(Misfit::XfdErr {
            xfd_err,
            unsupported: xfd_err - now.xfd_err,
        }),
    ];
    misfits.into_iter().flatten()
}

fn mxcsr_misfit(mxcsr: u32, target: &Layout) -> Option<Misfit> {
    let mask = target.mxcsr_mask();
    (mxcsr & !mask != 0).then_some(Misfit::Mxcsr { mxcsr, mask })
}

/// Errors from moving a state to another layout.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RelocateError {
    /// The target cannot hold the whole state.
    #[error("the target cannot hold the state: {}", List(losses))]
    Lossy {
        /// Everything that would be lost and is not allowed to be.
        losses: Vec<Misfit>,
    },
    /// The new area is not valid. No input is known that reaches this: it is checked because the
    /// host depends on it.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The registers are not valid with the new area. No input is known that reaches this: it is
    /// checked because the host depends on it.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Displays items joined by `; `.
pub(crate) struct List<'a, T>(pub(crate) &'a [T]);

impl<T: fmt::Display> fmt::Display for List<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for item in self.0 {
            write!(f, "{separator}{item}")?;
            separator = "; ";
        }
        Ok(())
    }
}

//! An image together with its registers: the whole extended state of one vCPU.

use thiserror::Error;

use crate::area::Image;
use crate::feature::XFeatures;
use crate::layout::Layout;
use crate::registers::Registers;
use crate::xcr0::{self, Xcr0Error};

/// The extended state of one vCPU, in a form that every host can load.
///
/// Beyond the rules of [`Image`], XCR0 is a combination that XSETBV accepts, IA32_XFD and
/// IA32_XFD_ERR have only components that the layout can disable, and **no component is both in use
/// and disabled** (XSTATE_BV & XFD = 0). Linux loads a guest's area with the guest's XFD in place;
/// an area that breaks the last rule makes that XRSTORS raise #NM in the host.
///
/// A component may be in use without being enabled in XCR0: a guest can clear XCR0 bits of
/// components that it has used.
///
/// ```
/// use xsave_state::{ExtendedState, Image, Registers, StateError, XFeatures};
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
/// let mut area = vec![0; 11_008];
/// area[512..520].copy_from_slice(&0x60000u64.to_le_bytes()); // tiles in use
/// area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
/// let image = Image::parse(&area, &layout).unwrap();
///
/// let registers = Registers::RESET
///     .with_xcr0(layout.user())
///     .with_xfd(XFeatures::XTILEDATA); // and disabled
/// assert!(matches!(
///     ExtendedState::new(image, registers),
///     Err(StateError::InUseWhileDisabled { .. })
/// ));
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExtendedState<'a> {
    image: Image<'a>,
    registers: Registers,
}

impl<'a> ExtendedState<'a> {
    /// Puts an image and registers together.
    ///
    /// # Errors
    ///
    /// The first rule that they break, with the values.
    #[inline]
    pub fn new(image: Image<'a>, registers: Registers) -> Result<Self, StateError> {
        let Registers { xcr0, xfd, xfd_err } = registers;
        let layout = image.layout();
        xcr0::check(xcr0, layout.user())?;
        if !layout.xfd().contains(xfd) {
            return Err(StateError::Xfd {
                xfd,
                supported: layout.xfd(),
            });
        }
        if !layout.xfd().contains(xfd_err) {
            return Err(StateError::XfdErr {
                xfd_err,
                supported: layout.xfd(),
            });
        }
        let in_use = image.xstate_bv();
        if in_use.intersects(xfd) {
            return Err(StateError::InUseWhileDisabled {
                xstate_bv: in_use,
                xfd,
                both: in_use & xfd,
            });
        }
        Ok(Self { image, registers })
    }

    /// Returns the state of a vCPU after reset.
    #[must_use]
    pub fn reset(layout: &Layout) -> ExtendedState<'static> {
        ExtendedState {
            image: Image::initial(layout),
            registers: Registers::RESET,
        }
    }

    /// Returns the area.
    #[must_use]
    pub fn image(&self) -> &Image<'a> {
        &self.image
    }

    /// Returns XCR0, IA32_XFD and IA32_XFD_ERR.
    #[must_use]
    pub fn registers(&self) -> Registers {
        self.registers
    }

    /// Returns the layout of the area.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        self.image.layout()
    }

    /// Converts this state into one that owns its bytes, copying them if borrowed.
    #[must_use]
    pub fn into_owned(self) -> ExtendedState<'static> {
        ExtendedState {
            image: self.image.into_owned(),
            registers: self.registers,
        }
    }

    /// Returns the image alone, for example to combine it with other registers.
    #[must_use]
    pub fn into_image(self) -> Image<'a> {
        self.image
    }
}

/// Errors from combining an image and registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StateError {
    /// XCR0 has a value that XSETBV refuses.
    #[error(transparent)]
    Xcr0(#[from] Xcr0Error),
    /// IA32_XFD has components that the layout cannot disable: WRMSR raises #GP.
    #[error("IA32_XFD is {xfd}; only {supported} can be disabled")]
    Xfd {
        /// IA32_XFD.
        xfd: XFeatures,
        /// The components that the layout can disable.
        supported: XFeatures,
    },
    /// IA32_XFD_ERR has components that the layout cannot disable.
    #[error("IA32_XFD_ERR is {xfd_err}; only {supported} can be disabled")]
    XfdErr {
        /// IA32_XFD_ERR.
        xfd_err: XFeatures,
        /// The components that the layout can disable.
        supported: XFeatures,
    },
    /// A component is in use and disabled: loading it would raise #NM in the host.
    #[error(
        "{both} is in use (XSTATE_BV is {xstate_bv}) and disabled (IA32_XFD is {xfd}): the host \
         could not load it"
    )]
    InUseWhileDisabled {
        /// XSTATE_BV.
        xstate_bv: XFeatures,
        /// IA32_XFD.
        xfd: XFeatures,
        /// XSTATE_BV & XFD.
        both: XFeatures,
    },
}

//! An image together with the registers that give it meaning: XCR0, IA32_XFD and IA32_XFD_ERR.

use thiserror::Error;

use crate::feature::XFeatures;
use crate::image::Image;
use crate::layout::{Layout, Misfit};
use crate::relayout;
use crate::xcr0::{self, Xcr0Error};

/// The registers that belong to the extended state of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Registers {
    /// XCR0: the user components that the guest has enabled.
    pub xcr0: XFeatures,
    /// IA32_XFD, MSR 0x1C4: components whose use raises #NM (SDM Vol. 1 §13.14).
    pub xfd: XFeatures,
    /// IA32_XFD_ERR, MSR 0x1C5: what the last such #NM was about.
    pub xfd_err: XFeatures,
}

impl Registers {
    /// After reset: XCR0 has x87 only, nothing is disabled. INIT leaves all three as they are.
    pub const RESET: Self = Self {
        xcr0: XFeatures::X87,
        xfd: XFeatures::empty(),
        xfd_err: XFeatures::empty(),
    };
}

/// The extended state of one vCPU: it cannot exist in a form that a host could choke on.
///
/// Beyond what [`Image`] holds, XCR0 is a combination that XSETBV accepts, IA32_XFD and
/// IA32_XFD_ERR have only components that the layout can disable, and **no component is both in use
/// and disabled** (XSTATE_BV & XFD = 0). Linux loads a guest's area with the guest's XFD in place;
/// an area that breaks the last rule makes that XRSTORS raise #NM in the host.
///
/// A component may be in use without being enabled in XCR0: a guest can clear XCR0 bits of
/// components that it has used.
///
/// ```
/// use xsave_state::{ExtendedState, Image, Registers, StateError, XFeatures};
/// # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
/// #     match (leaf, subleaf) {
/// #         (0, _) => [0x1e, 0, 0, 0],
/// #         (0xd, 0) => [0x60007, 11008, 11008, 0],
/// #         (0xd, 1) => [0x1f, 9088, 0, 0],
/// #         (0xd, 2) => [256, 576, 0, 0],
/// #         (0xd, 17) => [64, 2752, 2, 0],
/// #         (0xd, 18) => [8192, 2816, 6, 0],
/// #         (0x1d, 0) => [1, 0, 0, 0],
/// #         (0x1d, 1) => [0x0400_2000, 0x0008_0040, 0x10, 0],
/// #         _ => [0; 4],
/// #     }
/// # }
/// # let layout = xsave_state::Layout::from_cpuid(cpuid).unwrap();
///
/// let mut area = vec![0; 11_008];
/// area[512..520].copy_from_slice(&0x60000u64.to_le_bytes()); // tiles in use
/// area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
/// let image = Image::parse(&area, &layout).unwrap();
///
/// let registers = Registers {
///     xcr0: XFeatures::from_bits_retain(0x60007),
///     xfd: XFeatures::XTILEDATA, // and disabled
///     xfd_err: XFeatures::empty(),
/// };
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
    /// Puts both together.
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

    /// A vCPU after reset.
    #[must_use]
    pub fn reset(layout: &Layout) -> ExtendedState<'static> {
        ExtendedState {
            image: Image::initial(layout),
            registers: Registers::RESET,
        }
    }

    /// The area.
    #[must_use]
    pub fn image(&self) -> &Image<'a> {
        &self.image
    }

    /// XCR0, IA32_XFD and IA32_XFD_ERR.
    #[must_use]
    pub fn registers(&self) -> Registers {
        self.registers
    }

    /// Where the components lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        self.image.layout()
    }

    /// Everything that keeps this state from being restored, as it is, into a vCPU of layout
    /// `target`: components in use that are not there or lie elsewhere, a tile configuration or a
    /// palette, XCR0, IA32_XFD, IA32_XFD_ERR and MXCSR. Empty: it fits.
    ///
    /// `target` is the layout of the vCPU's CPUID [with the host's MXCSR
    /// mask](Layout::with_mxcsr_mask_of). What lies elsewhere,
    /// [`relayout`](crate::relayout::relayout) can move.
    ///
    /// ```
    /// # fn demo(state: &xsave_state::ExtendedState<'_>, target: &xsave_state::Layout) {
    /// for reason in state.misfits(target) {
    ///     eprintln!("cannot restore here: {reason}");
    /// }
    /// # }
    /// ```
    pub fn misfits(&self, target: &Layout) -> impl Iterator<Item = Misfit> {
        relayout::misfits(self, target)
    }

    /// The same with its own bytes. Copies them where they are borrowed.
    #[must_use]
    pub fn into_owned(self) -> ExtendedState<'static> {
        ExtendedState {
            image: self.image.into_owned(),
            registers: self.registers,
        }
    }

    /// The image alone, for example to put it together with other registers.
    #[must_use]
    pub fn into_image(self) -> Image<'a> {
        self.image
    }
}

/// An image and registers that cannot be together.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StateError {
    /// XCR0 cannot have this value.
    #[error(transparent)]
    Xcr0(#[from] Xcr0Error),
    /// IA32_XFD has components that the layout cannot disable: WRMSR raises #GP.
    #[error("IA32_XFD is {xfd}; only {supported} can be disabled")]
    Xfd {
        /// IA32_XFD.
        xfd: XFeatures,
        /// What CPUID.(EAX=0DH,ECX=n):ECX\[2\] allows.
        supported: XFeatures,
    },
    /// IA32_XFD_ERR has components that the layout cannot disable.
    #[error("IA32_XFD_ERR is {xfd_err}; only {supported} can be disabled")]
    XfdErr {
        /// IA32_XFD_ERR.
        xfd_err: XFeatures,
        /// What CPUID.(EAX=0DH,ECX=n):ECX\[2\] allows.
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

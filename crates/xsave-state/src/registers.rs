//! The registers that belong to the extended state of a vCPU: XCR0, IA32_XFD and IA32_XFD_ERR.

use core::fmt;

use thiserror::Error;

use crate::feature::XFeatures;
use crate::layout::Layout;

/// IA32_XFD: components whose use raises #NM (SDM Vol. 4).
pub const MSR_IA32_XFD: u32 = 0x1c4;
/// IA32_XFD_ERR: the components whose use raised the last such #NM (SDM Vol. 4).
pub const MSR_IA32_XFD_ERR: u32 = 0x1c5;
const XCR0: u32 = 0;
/// Entries that KVM_SET_XCRS accepts (arch/x86/include/uapi/asm/kvm.h, KVM_MAX_XCRS).
const MAX_XCRS: usize = 16;

/// The registers that belong to the extended state of a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct Registers {
    /// XCR0: the user components that the guest has enabled.
    pub xcr0: XFeatures,
    /// IA32_XFD, MSR 0x1C4: components whose use raises #NM (SDM Vol. 1 §13.14).
    pub xfd: XFeatures,
    /// IA32_XFD_ERR, MSR 0x1C5: the components whose use raised the last such #NM.
    pub xfd_err: XFeatures,
}

impl Registers {
    /// The values after reset: XCR0 has x87 only, nothing is disabled. INIT changes none of them.
    pub const RESET: Self = Self {
        xcr0: XFeatures::X87,
        xfd: XFeatures::empty(),
        xfd_err: XFeatures::empty(),
    };

    /// Replaces XCR0.
    #[must_use]
    pub const fn with_xcr0(mut self, xcr0: XFeatures) -> Self {
        self.xcr0 = xcr0;
        self
    }

    /// Replaces IA32_XFD.
    #[must_use]
    pub const fn with_xfd(mut self, xfd: XFeatures) -> Self {
        self.xfd = xfd;
        self
    }

    /// Replaces IA32_XFD_ERR.
    #[must_use]
    pub const fn with_xfd_err(mut self, xfd_err: XFeatures) -> Self {
        self.xfd_err = xfd_err;
        self
    }

    /// Finds the registers in the lists that a VMM keeps in its snapshots: (number, value) of each
    /// extended control register and of each MSR. Other registers are ignored.
    ///
    /// Without XCR0 in `xcrs` it is 1, which KVM leaves in a new vCPU. Without IA32_XFD or
    /// IA32_XFD_ERR in `msrs` it is 0, but only for a guest whose `layout` has nothing to disable:
    /// for another guest the value is not known.
    ///
    /// # Errors
    ///
    /// A register that the guest has is missing, or is listed with two values. KVM_SET_MSRS applies
    /// the last of them and KVM_SET_XCRS the first, so a check of the other one protects nothing.
    ///
    /// ```
    /// use xsave_state::{Component, ComponentId, Layout, Palette, Registers, RegistersError};
    ///
    /// let layout = Layout::from_parts(
    ///     [
    ///         Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
    ///         Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
    ///     ],
    ///     [Palette::ONE],
    /// )
    /// .unwrap();
    /// let registers = Registers::from_lists([(0, 0x60003)], [(0x1c4, 1 << 18), (0x1c5, 0)], &layout)?;
    /// assert_eq!(registers.to_string(), "XCR0 0x60003, IA32_XFD 0x40000, IA32_XFD_ERR 0x0");
    ///
    /// // Firecracker's list of MSRs lacks both. Whoever knows better adds them to the list.
    /// let lost = Registers::from_lists([(0, 0x60003)], [], &layout).unwrap_err();
    /// assert_eq!(lost, RegistersError::Missing { register: 0x1c4, disableable: layout.xfd() });
    /// # Ok::<(), RegistersError>(())
    /// ```
    pub fn from_lists(
        xcrs: impl IntoIterator<Item = (u32, u64)>,
        msrs: impl IntoIterator<Item = (u32, u64)>,
        layout: &Layout,
    ) -> Result<Self, RegistersError> {
        let mut xcr0 = None;
        for (index, entry) in xcrs.into_iter().enumerate() {
            if index >= MAX_XCRS {
                return Err(RegistersError::TooManyXcrs { limit: MAX_XCRS });
            }
            find(XCR0, entry, &mut xcr0)?;
        }
        let (mut xfd, mut xfd_err) = (None, None);
        for entry in msrs {
            find(MSR_IA32_XFD, entry, &mut xfd)?;
            find(MSR_IA32_XFD_ERR, entry, &mut xfd_err)?;
        }
        let disableable = layout.xfd();
        let required = |register, value: Option<u64>| match value {
            None if !disableable.is_empty() => Err(RegistersError::Missing {
                register,
                disableable,
            }),
            value => Ok(XFeatures::from_bits_retain(value.unwrap_or(0))),
        };
        Ok(Self {
            xcr0: xcr0.map_or(XFeatures::X87, XFeatures::from_bits_retain),
            xfd: required(MSR_IA32_XFD, xfd)?,
            xfd_err: required(MSR_IA32_XFD_ERR, xfd_err)?,
        })
    }
}

/// Notes the value of an entry that is `register`.
fn find(
    register: u32,
    (index, value): (u32, u64),
    found: &mut Option<u64>,
) -> Result<(), RegistersError> {
    if index != register {
        return Ok(());
    }
    match found.replace(value) {
        Some(first) if first != value => Err(RegistersError::TwoValues {
            register,
            first,
            second: value,
        }),
        _ => Ok(()),
    }
}

impl fmt::Display for Registers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { xcr0, xfd, xfd_err } = self;
        write!(
            f,
            "XCR0 {:#x}, IA32_XFD {:#x}, IA32_XFD_ERR {:#x}",
            xcr0.bits(),
            xfd.bits(),
            xfd_err.bits()
        )
    }
}

/// Errors from finding the registers in a VMM's lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RegistersError {
    /// A register is listed twice with different values.
    #[error("{} is listed twice, as {first:#x} and as {second:#x}: the snapshot must have one value", name(*register))]
    TwoValues {
        /// The number of the register: 0 is XCR0, others are MSRs.
        register: u32,
        /// The first value.
        first: u64,
        /// A later value.
        second: u64,
    },
    /// The guest has IA32_XFD, and a register of it is not in the list.
    #[error(
        "{} is not in the list of MSRs, but this guest can disable {disableable} with it: add the \
         value it had (0 if the guest never used AMX)",
        name(*register)
    )]
    Missing {
        /// The MSR.
        register: u32,
        /// The components that the guest can disable.
        disableable: XFeatures,
    },
    /// The list of extended control registers is longer than KVM accepts.
    #[error(
        "more than {limit} extended control registers are listed; KVM_SET_XCRS accepts {limit}"
    )]
    TooManyXcrs {
        /// KVM_MAX_XCRS.
        limit: usize,
    },
}

fn name(register: u32) -> &'static str {
    match register {
        XCR0 => "XCR0",
        MSR_IA32_XFD => "IA32_XFD (MSR 0x1c4)",
        _ => "IA32_XFD_ERR (MSR 0x1c5)",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feature::ComponentId;
    use crate::layout::{Component, Palette};

    fn with_tiles() -> Layout {
        Layout::from_parts(
            [
                Component::user(ComponentId::XTILECFG, 2752, 64),
                Component::user(ComponentId::XTILEDATA, 2816, 8192),
            ],
            [Palette::ONE],
        )
        .unwrap()
    }

    #[test]
    fn a_register_with_two_values_is_refused_wherever_it_stands() {
        let both = [(0x1c4, 0), (0x1c4, 1 << 18), (0x1c5, 0)];
        for layout in [with_tiles(), Layout::legacy()] {
            for msrs in [both, [both[1], both[2], both[0]]] {
                let error = Registers::from_lists([], msrs, &layout).unwrap_err();
                assert!(
                    matches!(
                        error,
                        RegistersError::TwoValues {
                            register: 0x1c4,
                            ..
                        }
                    ),
                    "{error}"
                );
            }
        }
        let twice = Registers::from_lists([(0, 3), (0, 7)], [], &Layout::legacy()).unwrap_err();
        assert_eq!(
            twice.to_string(),
            "XCR0 is listed twice, as 0x3 and as 0x7: the snapshot must have one value"
        );
        // The same value twice says nothing else.
        let msrs = [
            (0x1c4, 1 << 18),
            (0x10, 5),
            (0x1c4, 1 << 18),
            (0x1c5, 1 << 18),
        ];
        let registers = Registers::from_lists([(1, 9), (0, 3)], msrs, &with_tiles()).unwrap();
        assert_eq!(registers.xfd, XFeatures::XTILEDATA);
        assert_eq!(registers.xcr0, XFeatures::LEGACY);
    }

    #[test]
    fn a_missing_register_is_0_only_where_the_guest_has_none() {
        let reset = Registers::from_lists([], [(0x10, 5)], &Layout::legacy()).unwrap();
        assert_eq!(reset, Registers::RESET);
        for (msrs, missing) in [(vec![], 0x1c4), (vec![(0x1c4, 0)], 0x1c5)] {
            let error = Registers::from_lists([], msrs, &with_tiles()).unwrap_err();
            let disableable = XFeatures::XTILEDATA;
            let register = missing;
            assert_eq!(
                error,
                RegistersError::Missing {
                    register,
                    disableable
                }
            );
        }
    }

    #[test]
    fn no_more_xcrs_than_kvm_accepts() {
        let xcrs = |count| (0..count).map(|_| (0, 3));
        assert!(Registers::from_lists(xcrs(16), [], &Layout::legacy()).is_ok());
        assert_eq!(
            Registers::from_lists(xcrs(17), [], &Layout::legacy()),
            Err(RegistersError::TooManyXcrs { limit: 16 })
        );
    }
}

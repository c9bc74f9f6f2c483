//! Whether a snapshot can go on here, or every reason why not.

use std::fmt;

use thiserror::Error;
use xsave_state::{Layout, Misfit, XFeatures};

use crate::host::Host;
use crate::snapshot::{Snapshot, VcpuState};

impl Snapshot {
    /// Compares the extended state of every vCPU with what KVM supports here.
    ///
    /// # Errors
    ///
    /// All reasons why it cannot go on here.
    pub fn fit(&self, host: &Host) -> Result<(), Unfit> {
        fit_layout(&self.vcpus, host.layout())
    }
}

/// The same for vCPUs and any layout.
pub(crate) fn fit_layout(vcpus: &[VcpuState], target: &Layout) -> Result<(), Unfit> {
    let mut reasons = Vec::new();
    for (vcpu, state) in (0..).zip(vcpus) {
        let extended = &state.extended;
        let registers = extended.registers();
        let xcr0 = registers.xcr0 - target.user();
        if !xcr0.is_empty() {
            reasons.push(Reason::Xcr0 {
                vcpu,
                missing: xcr0,
            });
        }
        let xfd = (registers.xfd | registers.xfd_err) - target.xfd();
        if !xfd.is_empty() {
            reasons.push(Reason::Xfd { vcpu, missing: xfd });
        }
        let in_use = extended.image().xstate_bv();
        let misfits = extended.layout().misfits(target, in_use);
        reasons.extend(misfits.map(|misfit| Reason::Component { vcpu, misfit }));
    }
    if reasons.is_empty() {
        Ok(())
    } else {
        Err(Unfit { reasons })
    }
}

/// A snapshot cannot go on here.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub struct Unfit {
    reasons: Vec<Reason>,
}

impl Unfit {
    /// Every one of them.
    #[must_use]
    pub fn reasons(&self) -> &[Reason] {
        &self.reasons
    }
}

impl fmt::Display for Unfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the snapshot cannot go on here")?;
        let mut separator = ": ";
        for reason in &self.reasons {
            write!(f, "{separator}{reason}")?;
            separator = "; ";
        }
        Ok(())
    }
}

/// One reason why a snapshot cannot go on here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The guest has enabled components that KVM does not support here.
    Xcr0 {
        /// The vCPU.
        vcpu: u8,
        /// What is not supported.
        missing: XFeatures,
    },
    /// The guest's IA32_XFD or IA32_XFD_ERR has components that cannot be disabled here.
    Xfd {
        /// The vCPU.
        vcpu: u8,
        /// What cannot be disabled.
        missing: XFeatures,
    },
    /// A component that is in use is missing here, or lies elsewhere.
    Component {
        /// The vCPU.
        vcpu: u8,
        /// How.
        misfit: Misfit,
    },
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xcr0 { vcpu, missing } => {
                write!(
                    f,
                    "vCPU {vcpu} has enabled {missing}, which this host lacks"
                )
            }
            Self::Xfd { vcpu, missing } => {
                write!(
                    f,
                    "vCPU {vcpu} has {missing} in IA32_XFD, which this host lacks"
                )
            }
            Self::Component { vcpu, misfit } => write!(f, "vCPU {vcpu}: {misfit}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use xsave_state::{ComponentId, ExtendedState, Registers};

    use super::*;
    use crate::snapshot::tests::{cpuid, snapshot};

    /// The layout of the snapshot's own CPUID with other values of 0DH.
    fn target(changes: &[(u32, [u32; 4])]) -> Layout {
        let mut entries: Vec<kvm_bindings::kvm_cpuid_entry2> =
            cpuid().into_iter().map(Into::into).collect();
        for (subleaf, [eax, ebx, ecx, edx]) in changes {
            let entry = entries
                .iter_mut()
                .find(|entry| entry.function == 0xd && entry.index == *subleaf)
                .unwrap();
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (*eax, *ebx, *ecx, *edx);
        }
        crate::host::layout(&entries).unwrap()
    }

    #[test]
    fn it_fits_where_it_comes_from() {
        assert_eq!(fit_layout(&snapshot().vcpus, &target(&[])), Ok(()));
    }

    #[test]
    fn a_host_without_amx_is_told_everything_that_it_lacks() {
        let error =
            fit_layout(&snapshot().vcpus, &target(&[(0, [0x2e7, 2696, 2696, 0])])).unwrap_err();
        let expected: Vec<Reason> = (0..2)
            .flat_map(|vcpu| {
                let missing = |component| Reason::Component {
                    vcpu,
                    misfit: Misfit::Missing { component },
                };
                [
                    Reason::Xcr0 {
                        vcpu,
                        missing: XFeatures::AMX,
                    },
                    missing(ComponentId::XTILECFG),
                    missing(ComponentId::XTILEDATA),
                ]
            })
            .collect();
        assert_eq!(error.reasons(), expected);
        println!("{error}");
    }

    #[test]
    fn a_component_that_lies_elsewhere_is_named() {
        let moved = target(&[(9, [8, 2696, 0, 0])]);
        let error = fit_layout(&snapshot().vcpus, &moved).unwrap_err();
        assert!(matches!(
            error.reasons(),
            [
                Reason::Component {
                    vcpu: 0,
                    misfit: Misfit::Offset {
                        component: ComponentId::PKRU,
                        source_offset: 2688,
                        target_offset: 2696,
                    },
                },
                Reason::Component { vcpu: 1, .. },
            ]
        ));
    }

    #[test]
    fn armed_xfd_needs_a_host_that_has_it() {
        let armed = snapshot().map_extended(|extended| {
            let image = extended.image().clone().without(XFeatures::XTILEDATA);
            let registers = Registers {
                xfd: XFeatures::XTILEDATA,
                ..extended.registers()
            };
            ExtendedState::new(image, registers).unwrap()
        });
        assert_eq!(fit_layout(&armed.vcpus, &target(&[])), Ok(()));
        // XSAVE features without XFD
        let error = fit_layout(&armed.vcpus, &target(&[(1, [0xf, 0x2a00, 0, 0])])).unwrap_err();
        assert!(matches!(
            error.reasons(),
            [Reason::Xfd { vcpu: 0, .. }, Reason::Xfd { vcpu: 1, .. }]
        ));
    }
}

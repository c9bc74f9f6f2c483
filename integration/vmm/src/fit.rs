//! Whether a snapshot can go on here, or every reason why not.

use std::fmt;

use thiserror::Error;
use xsave_state::{Misfit, XFeatures};

use crate::host::Host;
use crate::snapshot::Snapshot;

impl Snapshot {
    /// Compares the extended state of every vCPU with what KVM supports here.
    ///
    /// # Errors
    ///
    /// All reasons why it cannot go on here.
    pub fn fit(&self, host: &Host) -> Result<(), Unfit> {
        let target = host.layout();
        let mut reasons = Vec::new();
        for (vcpu, state) in (0..).zip(&self.vcpus) {
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

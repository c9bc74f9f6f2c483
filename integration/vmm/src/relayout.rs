//! A snapshot for a host whose processor has other components, or has them elsewhere.

use thiserror::Error;
use xsave_state::{Losses, RelocateError};

use crate::host::Host;
use crate::snapshot::Snapshot;

impl Snapshot {
    /// The same with the extended state of each vCPU in the layout of `host`. Nothing is lost, or it is an
    /// error.
    ///
    /// The guest does not notice: where it uses the standard format itself, at offsets that it has read from
    /// CPUID, a host with other offsets is wrong for it. Linux keeps its own areas in the compacted format.
    ///
    /// # Errors
    ///
    /// What a vCPU would lose.
    pub fn relayout(mut self, host: &Host) -> Result<Self, CannotRelayout> {
        for (vcpu, state) in (0..).zip(&mut self.vcpus) {
            let moved = state.extended.relocate(host.layout(), Losses::empty());
            state.extended = moved.map_err(|error| CannotRelayout { vcpu, error })?.state;
        }
        Ok(self)
    }
}

/// A state has something that the other layout has no place for.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("vCPU {vcpu}: {error}")]
pub struct CannotRelayout {
    /// The vCPU.
    pub vcpu: u8,
    /// What.
    pub error: RelocateError,
}

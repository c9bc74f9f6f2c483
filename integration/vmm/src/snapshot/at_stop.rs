//! What was live in a vCPU when it was stopped.

use serde::{Deserialize, Serialize};
use xsave_state::XFeatures;

use super::VcpuState;

/// One vCPU at the moment at which its state was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AtStop {
    /// XSTATE_BV: the components that are live in its registers.
    pub in_use: u64,
    /// It was stopped in a program of the guest, not in the guest's kernel: what is live is that
    /// program's. In the kernel it may be a copy of what has been saved already.
    pub user_mode: bool,
}

impl AtStop {
    /// Of a vCPU in this state.
    pub(crate) fn of(vcpu: &VcpuState) -> Self {
        Self {
            in_use: vcpu.extended.image().xstate_bv().bits(),
            // The privilege level is SS.DPL in VMX and SVM alike.
            user_mode: vcpu.special.ss.dpl == 3,
        }
    }

    /// A program's tiles were live.
    #[must_use]
    pub fn has_live_tiles(&self) -> bool {
        self.user_mode && XFeatures::from_bits_retain(self.in_use).contains(XFeatures::XTILEDATA)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_that_the_kernel_may_have_saved_do_not_count() {
        for (in_use, user_mode, live) in [
            (XFeatures::AMX, true, true),
            (XFeatures::AMX, false, false),
            (XFeatures::XTILECFG, true, false),
            (XFeatures::empty(), true, false),
        ] {
            let in_use = in_use.bits();
            let at_stop = AtStop { in_use, user_mode };
            assert_eq!(at_stop.has_live_tiles(), live, "{at_stop:?}");
        }
    }
}

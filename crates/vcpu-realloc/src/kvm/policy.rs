//! When a VM's filter is lifted: two policies, and what they count.

use xsave_state::XFeatures;

/// Who is grown at a first use, and when the MSR filter is lifted. The filter is the VM's, not a
/// vCPU's: while it is on, the writes of every vCPU leave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Policy {
    /// The first use by any vCPU grows all of them, and lifts the filter. A guest that arms IA32_XFD
    /// once per vCPU, as Linux does, exits at most twice per vCPU in all: to arm, and to use.
    #[default]
    WholeVm,
    /// Each vCPU is grown at its own first use, and the filter is lifted when the last has passed.
    /// Until then every write of a vCPU that has passed leaves and is performed by the VMM, which
    /// costs an exit and one to three more ioctls each. A VM with a vCPU that never uses the feature
    /// pays that for ever.
    EachVcpu,
}

/// What a VM has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Progress {
    /// [`Policy::WholeVm`]: what every vCPU has state for.
    pub granted: XFeatures,
    /// What any vCPU has been granted, here or where the VM ran before.
    pub promised: XFeatures,
    /// vCPUs that have a handler.
    pub vcpus: usize,
    /// Those of them whose gate has passed.
    pub passed: usize,
}

impl Progress {
    /// Whether nobody has to be asked any more. `disableable` is what IA32_XFD can disable.
    pub(super) fn is_complete(&self, policy: Policy, disableable: XFeatures) -> bool {
        match policy {
            Policy::WholeVm => self.granted.contains(disableable),
            Policy::EachVcpu => self.vcpus > 0 && self.passed == self.vcpus,
        }
    }

    /// A vCPU comes.
    pub(super) fn enter(&mut self, has_passed: bool) {
        self.vcpus = self.vcpus.saturating_add(1);
        self.passed = self.passed.saturating_add(has_passed.into());
    }

    /// A vCPU goes.
    pub(super) fn leave(&mut self, has_passed: bool) {
        self.vcpus = self.vcpus.saturating_sub(1);
        self.passed = self.passed.saturating_sub(has_passed.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILES: XFeatures = XFeatures::XTILEDATA;

    #[test]
    fn the_whole_vm_is_complete_with_the_first_use() {
        let mut progress = Progress {
            vcpus: 4,
            ..Progress::default()
        };
        assert!(!progress.is_complete(Policy::WholeVm, TILES));
        progress.granted = TILES;
        assert!(progress.is_complete(Policy::WholeVm, TILES));
        assert!(!progress.is_complete(Policy::WholeVm, TILES | XFeatures::APX));
    }

    #[test]
    fn each_vcpu_is_complete_with_the_last() {
        let mut progress = Progress::default();
        let complete = |progress: Progress| progress.is_complete(Policy::EachVcpu, TILES);
        assert!(!complete(progress));
        progress.enter(true);
        assert!(complete(progress));
        progress.enter(false);
        assert!(!complete(progress));
        // The one that has not passed is unplugged.
        progress.leave(false);
        assert!(complete(progress));
        progress.leave(true);
        assert!(!complete(progress));
    }
}

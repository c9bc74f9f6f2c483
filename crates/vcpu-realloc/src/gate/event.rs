//! What happens to a vCPU.

use xsave_state::XFeatures;

/// What happens to a vCPU, as the [`Gate`](super::Gate) is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Event {
    /// The guest executes WRMSR of IA32_XFD with this value.
    WriteXfd(XFeatures),
    /// The guest executes XSETBV with this value for XCR0. KVM does that itself and tells nobody:
    /// its VMMs have the two observations below. Those who write hypervisors have this one.
    WriteXcr0(XFeatures),
    /// XCR0 was read from a vCPU that waits in the middle of an instruction. It is noted, and counts
    /// for the verdict on that instruction.
    ObserveXcr0(XFeatures),
    /// The vCPU stands between two instructions, and this was read from it, as at a capture. What the
    /// guest can use by the registers, and what it has in use, is asked for now.
    Observe {
        /// XCR0.
        xcr0: XFeatures,
        /// IA32_XFD.
        xfd: XFeatures,
        /// Components in use: XSTATE_BV. A guest may have disabled in XCR0 what it has used.
        in_use: XFeatures,
    },
    /// The vCPU was restored from a snapshot, with these registers. What it can use by them, and what
    /// it has state of, is asked for now.
    Restore {
        /// XCR0.
        xcr0: XFeatures,
        /// IA32_XFD.
        xfd: XFeatures,
        /// Components that the snapshot has in use: XSTATE_BV.
        in_use: XFeatures,
        /// What any vCPU of the VM had been granted where it ran before. The registers do not show it:
        /// between two tasks with tiles, XFD is armed and no tile is in use. Where nobody knows, all
        /// features.
        granted: XFeatures,
    },
    /// Another vCPU of the VM has been granted these features. They cannot be denied to this one any
    /// more: the guest may schedule here a task that has tiles in memory.
    GrantedElsewhere(XFeatures),
    /// The VMM has state for these features: its answer to the question, or ahead of it.
    Grant(XFeatures),
    /// The VMM denies the features that were asked for. After a first use in the VM that is too late:
    /// the question stands.
    Deny,
    /// The VMM could not answer, for example for lack of memory.
    Fail,
    /// The VMM wants to be asked again.
    Retry,
    /// The guest's write is taken back: the vCPU stands in front of its instruction again and will
    /// repeat it.
    Withdraw,
    /// The vCPU is reset: XCR0 is x87, IA32_XFD is 0 (SDM Vol. 3, "Processor State After Reset").
    /// What has been granted stays granted, to this vCPU and to others.
    Reset,
    /// The vCPU takes an INIT, which leaves XCR0 and IA32_XFD as they are.
    Init,
}

//! What is modelled: which guests, which host, which protections are taken out, and how far it goes.

use std::fmt;

use vcpu_realloc::fpswitch::Strategy;

/// What runs in one vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Program {
    /// A kernel like Linux, with a task that uses AMX and one that does not. It arms XFD before it
    /// enables XCR0, saves tiles before it sets XFD, and loads them after it has cleared it. Where a
    /// write of XFD faults, it goes on as if it had been done, and remembers the value: it does not
    /// write the same value again (`xfd_update_state`). A task may go on on another vCPU.
    Linux,
    /// The same kernel, but tiles stay in the registers while XFD is set for the other task. The
    /// manual advises against it.
    Lazy,
    /// Any program: XSETBV, WRMSR of IA32_XFD (also of reserved bits) and tile instructions in any
    /// order.
    Any,
}

/// What runs the vCPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Host {
    /// KVM, with the VMM's MSR filter. XSETBV never leaves it.
    Kvm {
        /// Whether it has the fix for CVE-2026-23005.
        fixed: bool,
    },
    /// A hypervisor of its own, which intercepts both registers until the vCPU has passed.
    Own(Strategy),
}

/// For whom a VMM's answer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Policy {
    /// The VM's first use grows all vCPUs and lifts the filter.
    Vm,
    /// Each vCPU is asked for; the last one lifts the filter.
    Vcpu,
}

/// How often what disturbs may happen. What is left of it is part of a state, so it is also the
/// model's memory of what has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Bounds {
    pub denials: u8,
    pub failures: u8,
    pub moves: u8,
    pub resets: u8,
    pub inits: u8,
    /// A task of a guest goes on on another vCPU.
    pub migrations: u8,
}

/// One model.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    pub programs: Vec<Program>,
    pub host: Host,
    pub policy: Policy,
    pub bounds: Bounds,
    /// How many different contents tiles can have, beside the initial one.
    pub contents: u8,
    pub without: Option<Protection>,
}

impl Setup {
    pub(crate) fn new(programs: &[Program], host: Host) -> Self {
        Self {
            programs: programs.to_vec(),
            host,
            policy: Policy::Vm,
            bounds: Bounds::default(),
            contents: 1,
            without: None,
        }
    }

    pub(crate) fn lacks(&self, protection: Protection) -> bool {
        self.without == Some(protection)
    }

    pub(crate) fn is_kvm(&self) -> bool {
        matches!(self.host, Host::Kvm { .. })
    }

    pub(crate) fn strategy(&self) -> Strategy {
        match self.host {
            Host::Kvm { .. } => Strategy::Linux,
            Host::Own(strategy) => strategy,
        }
    }

    /// Whether tiles survive that the guest disables them.
    pub(crate) fn keeps_disabled(&self) -> bool {
        !self.is_kvm()
    }
}

/// What can be taken out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Protection {
    GrantBeforeUse,
    ReleaseBeforeXfd,
    XfdBeforeXsave,
    XfdInSnapshot,
    SnapshotRule,
    AllGrownBeforeLift,
    ObserveXcr0,
    DenialHasNoEffect,
    NoDenialAfterFirstUse,
    GrantTravels,
    AskedWithoutGrant,
    RestorePassesThrough,
    FailureKeepsTheWrite,
    InitKeepsXfd,
    ResetDropsTheWrite,
    RestoreIsTold,
    MoveWithdrawsTheWrite,
    LiftAtFirstUse,
    ObserveAtInit,
    OptionAtSave,
    OptionAtRestore,
    OptionAtExit,
    OptionAtEntry,
}

impl fmt::Display for Protection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::GrantBeforeUse => "a write that asks for growth is performed without an answer",
            Self::ReleaseBeforeXfd => {
                "an emulated write of XFD is KVM_SET_MSRS alone, without XSTATE_BV &= ~XFD first"
            }
            Self::XfdBeforeXsave => "a restore does KVM_SET_XSAVE before XFD",
            Self::XfdInSnapshot => "a snapshot leaves XFD out",
            Self::SnapshotRule => "a snapshot with XSTATE_BV & XFD is taken as it is",
            Self::AllGrownBeforeLift => "the filter is lifted when the vCPU that asked has grown",
            Self::ObserveXcr0 => "XCR0 is not read at an exit",
            Self::DenialHasNoEffect => "a denial completes the write",
            Self::NoDenialAfterFirstUse => {
                "a vCPU is denied what another one of its VM was granted"
            }
            Self::GrantTravels => "a snapshot says that the VM's first use has not been, and it has",
            Self::AskedWithoutGrant => {
                "a snapshot without the grant counts as one of a VM without a first use"
            }
            Self::RestorePassesThrough => {
                "a kernel without the fix for CVE-2026-23005, and a restore that leaves XFD intercepted"
            }
            Self::FailureKeepsTheWrite => "a failed growth loses the write that is held",
            Self::InitKeepsXfd => "INIT clears XFD",
            Self::ResetDropsTheWrite => {
                "an answer to a question before a reset is applied after it"
            }
            Self::RestoreIsTold => "the gate is not told of a restore",
            Self::MoveWithdrawsTheWrite => {
                "a snapshot taken while a write is held counts the write as done"
            }
            Self::LiftAtFirstUse => "the filter stays after the VM's first use",
            Self::ObserveAtInit => {
                "an INIT on KVM is judged by the XCR0 of an earlier exit, not by the vCPU's"
            }
            Self::OptionAtSave => "option 2 around XRSTORS only",
            Self::OptionAtRestore => "option 2 around XSAVES only",
            Self::OptionAtExit => "option 1 without its clearing at exits",
            Self::OptionAtEntry => "option 1 without setting XFD again at entries",
        })
    }
}

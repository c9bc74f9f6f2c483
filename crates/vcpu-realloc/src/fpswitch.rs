//! What to do with IA32_XFD around the host's XSAVES and XRSTORS of a guest: for those who write
//! hypervisors.
//!
//! A component can be in use while IA32_XFD disables it: the guest has loaded tiles and then set
//! XFD\[18\]. To XSAVES such a component looks unused, and XRSTORS of one raises #NM (SDM Vol. 1
//! §13.14, and the descriptions of both instructions in Vol. 2). So a host that saves a guest while
//! the guest's own IA32_XFD is in the processor throws that component away. The manual permits it:
//! software is told not to rely on tiles after setting XFD\[18\] (SDM Vol. 1, "Recommendations for
//! System Software" of the AMX chapter). A hypervisor that wants its guest to see no difference to
//! the processor keeps them.
//!
//! The design mail for AMX in KVM ("Thoughts of AMX KVM support based on latest kernel", 10 November
//! 2021) has two ways to do so; Linux took neither. All three are a [`Strategy`] here, and what each
//! writes to IA32_XFD at which moment is a [`Plan`]: values and order, as data.
//!
//! | | Linux | [`AtExit`](Strategy::AtExit) | [`AroundSave`](Strategy::AroundSave) |
//! |---|---|---|---|
//! | [`Exit`](Moment::Exit) | | clears what is in use | |
//! | [`Save`](Moment::Save) | | (it is clear) | clears what is in use, then XSAVES |
//! | [`Restore`](Moment::Restore) | the guest's value, then XRSTORS | clears what is in use, then XRSTORS | clears what is in use, then XRSTORS, then the guest's value |
//! | [`Entry`](Moment::Entry) | | the guest's value | |
//! | in use while disabled | lost | kept | kept |
//!
//! A value that the processor has already is never written. What each strategy costs for which guest
//! is counted from these functions in `docs/model.md`; the model there also shows which of them loses
//! what.

use xsave_state::XFeatures;

/// What a hypervisor does about components that are in use while IA32_XFD disables them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// What Linux does: the guest's IA32_XFD stays in the processor while its state is saved, and is
    /// there before it is restored (`restore_fpregs_from_fpstate` calls `xfd_update_state` first;
    /// `save_fpregs_to_fpstate` writes nothing. arch/x86/kernel/fpu/core.c). **A component in use
    /// while disabled is lost.**
    ///
    /// The area that is restored must not have one either, or XRSTORS raises #NM in the host.
    Linux,
    /// The mail's option 1: at every exit IA32_XFD is cleared of what is in use, and set again before
    /// the guest goes on.
    AtExit,
    /// The mail's option 2: only the host's own XSAVES and XRSTORS of a guest that has the component
    /// in use are surrounded.
    AroundSave,
}

impl Strategy {
    /// All of them, in the order of the mail, Linux first.
    pub const ALL: [Self; 3] = [Self::Linux, Self::AtExit, Self::AroundSave];
}

/// When a hypervisor has to think of IA32_XFD. In the life of a vCPU: entry, exit, and between an
/// exit and the next entry any number of pairs of save and restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Moment {
    /// After a VM exit, before interrupts are enabled. IA32_XFD is the guest's and may have been
    /// written by it: read it first (`fpu_sync_guest_vmexit_xfd_state`).
    Exit,
    /// The host is about to save the guest's registers with XSAVES: the vCPU's thread is scheduled
    /// out (`switch_fpu_prepare`, in newer kernels `switch_fpu`, arch/x86/include/asm/fpu/sched.h),
    /// a softirq uses the FPU (`kernel_fpu_begin_mask`), or the host's own registers come back
    /// (`fpu_swap_kvm_fpstate`).
    Save,
    /// The host is about to load the guest's registers with XRSTORS (`restore_fpregs_from_fpstate`).
    Restore,
    /// Before VM entry, with interrupts disabled and the guest's registers in the processor.
    Entry,
}

/// What a plan depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Situation {
    /// The components of the guest that are not in their initial state. While they are in the
    /// processor that is XINUSE, which XGETBV with ECX = 1 gives; at [`Moment::Restore`] it is
    /// XSTATE_BV of the area.
    pub in_use: XFeatures,
    /// The guest's IA32_XFD: what the guest has written.
    pub guest_xfd: XFeatures,
    /// IA32_XFD as it is in the processor now: the guest's after an exit, often the host's before a
    /// restore (a Linux task without AMX has bit 18 set). Hypervisors cache it per processor, as
    /// Linux's `xfd_state` does.
    pub processor_xfd: XFeatures,
}

/// The writes of IA32_XFD around one moment's instruction: XSAVES, XRSTORS or VM entry.
/// [`Moment::Exit`] has no instruction: both writes follow the exit.
///
/// ```
/// use vcpu_realloc::fpswitch::{Moment, Plan, Situation, Strategy};
/// use xsave_state::XFeatures;
///
/// // The guest has tiles in its registers and has set XFD[18]; its thread is scheduled out.
/// let situation = Situation {
///     in_use: XFeatures::AMX,
///     guest_xfd: XFeatures::XTILEDATA,
///     processor_xfd: XFeatures::XTILEDATA,
/// };
/// let plan = Strategy::AroundSave.plan(Moment::Save, situation);
/// assert_eq!(plan, Plan { before: Some(XFeatures::empty()), after: None });
/// // Linux saves with XFD[18] set: the tiles are saved as initial.
/// assert_eq!(Strategy::Linux.plan(Moment::Save, situation), Plan::NOTHING);
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[must_use]
pub struct Plan {
    /// Write this to IA32_XFD, then execute the instruction.
    pub before: Option<XFeatures>,
    /// After the instruction, write this.
    pub after: Option<XFeatures>,
}

impl Plan {
    /// No writes.
    pub const NOTHING: Self = Self {
        before: None,
        after: None,
    };

    /// The values written, in their order: none, one or two.
    pub fn writes(self) -> impl Iterator<Item = XFeatures> {
        self.before.into_iter().chain(self.after)
    }

    /// IA32_XFD while the instruction executes, where it was `processor_xfd`.
    #[must_use]
    pub const fn during(self, processor_xfd: XFeatures) -> XFeatures {
        match self.before {
            Some(xfd) => xfd,
            None => processor_xfd,
        }
    }

    /// IA32_XFD at the end, where it was `processor_xfd`.
    #[must_use]
    pub const fn end(self, processor_xfd: XFeatures) -> XFeatures {
        match self.after {
            Some(xfd) => xfd,
            None => self.during(processor_xfd),
        }
    }
}

impl Strategy {
    /// What to write to IA32_XFD at this moment.
    ///
    /// [`Moment::Save`] leaves IA32_XFD as the XSAVES needed it: the host loads its own value with
    /// its own state, and the guest's comes with [`Moment::Restore`] or [`Moment::Entry`], whichever
    /// is first. So the guest enters with its own value after any sequence of moments, as long as
    /// each entry asks for its plan; for [`Linux`](Self::Linux) and [`AroundSave`](Self::AroundSave)
    /// that one is empty unless a save was not followed by a restore.
    ///
    /// An entry that is given up after its writes counts as an exit.
    pub const fn plan(self, moment: Moment, situation: Situation) -> Plan {
        let Situation {
            in_use,
            guest_xfd,
            processor_xfd,
        } = situation;
        // What must not be disabled while the state is saved or restored is what is in use.
        let passable = guest_xfd.difference(in_use);
        match (self, moment) {
            (Self::AtExit, Moment::Exit) => Plan {
                before: changed(processor_xfd, passable),
                after: None,
            },
            // `AtExit` has cleared it at the exit.
            (Self::Linux | Self::AroundSave, Moment::Exit)
            | (Self::Linux | Self::AtExit, Moment::Save) => Plan::NOTHING,
            (Self::AroundSave, Moment::Save) => Plan {
                before: changed(processor_xfd, processor_xfd.difference(in_use)),
                after: None,
            },
            (Self::Linux, Moment::Restore) | (_, Moment::Entry) => Plan {
                before: changed(processor_xfd, guest_xfd),
                after: None,
            },
            (Self::AtExit, Moment::Restore) => Plan {
                before: changed(processor_xfd, passable),
                after: None,
            },
            (Self::AroundSave, Moment::Restore) => Plan {
                before: changed(processor_xfd, passable),
                after: changed(passable, guest_xfd),
            },
        }
    }
}

/// A write, unless it would change nothing.
const fn changed(from: XFeatures, to: XFeatures) -> Option<XFeatures> {
    if from.bits() == to.bits() {
        None
    } else {
        Some(to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOMENTS: [Moment; 4] = [Moment::Exit, Moment::Save, Moment::Restore, Moment::Entry];

    /// Two components that XFD can disable, so that "all of them" and "each" differ.
    fn situations() -> impl Iterator<Item = Situation> {
        let sets = [0, 1 << 18, 1 << 40, 1 << 18 | 1 << 40].map(XFeatures::from_bits_retain);
        sets.into_iter().flat_map(move |in_use| {
            sets.into_iter().flat_map(move |guest_xfd| {
                sets.map(|processor_xfd| Situation {
                    in_use,
                    guest_xfd,
                    processor_xfd,
                })
            })
        })
    }

    #[test]
    fn options_1_and_2_never_save_or_restore_what_is_in_use_while_it_is_disabled() {
        for situation in situations() {
            for strategy in [Strategy::AtExit, Strategy::AroundSave] {
                // A save follows an exit, after which the processor has the guest's value.
                let exited = Situation {
                    processor_xfd: situation.guest_xfd,
                    ..situation
                };
                let exit = strategy.plan(Moment::Exit, exited);
                let saving = Situation {
                    processor_xfd: exit.end(exited.processor_xfd),
                    ..exited
                };
                for (moment, situation) in [(Moment::Save, saving), (Moment::Restore, situation)] {
                    let plan = strategy.plan(moment, situation);
                    let during = plan.during(situation.processor_xfd);
                    assert!(
                        !during.intersects(situation.in_use),
                        "{strategy:?} {moment:?} {situation:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_guest_enters_with_its_own_value_and_nothing_else_is_cleared() {
        for situation in situations() {
            for strategy in Strategy::ALL {
                let end = |moment| {
                    strategy
                        .plan(moment, situation)
                        .end(situation.processor_xfd)
                };
                assert_eq!(end(Moment::Entry), situation.guest_xfd);
                // What is not in use stays as it was: a guest's #NM is never lost by too much.
                let unused = XFeatures::all() - situation.in_use;
                assert_eq!(end(Moment::Save) & unused, situation.processor_xfd & unused);
                assert_eq!(end(Moment::Restore) & unused, situation.guest_xfd & unused);
            }
        }
    }

    #[test]
    fn no_write_changes_nothing() {
        for situation in situations() {
            for strategy in Strategy::ALL {
                for moment in MOMENTS {
                    let plan = strategy.plan(moment, situation);
                    let mut xfd = situation.processor_xfd;
                    for write in plan.writes() {
                        assert_ne!(write, xfd, "{strategy:?} {moment:?} {situation:?}");
                        xfd = write;
                    }
                    assert_eq!(xfd, plan.end(situation.processor_xfd));
                }
            }
        }
    }

    #[test]
    fn linux_writes_nothing_to_save() {
        for situation in situations() {
            assert_eq!(Strategy::Linux.plan(Moment::Save, situation), Plan::NOTHING);
            assert_eq!(
                Strategy::Linux
                    .plan(Moment::Restore, situation)
                    .during(situation.processor_xfd),
                situation.guest_xfd
            );
        }
    }
}

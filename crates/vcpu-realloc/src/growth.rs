//! The question to the VMM at a first use, and its answer.
//!
//! # A VMM that must say no
//!
//! No answer takes AMX away from a guest that can see it and stays without harm. In the order of what
//! they cost the guest:
//!
//! - **Hide AMX from its CPUID before it boots.** Then there is no question.
//! - **Hold the vCPU**: [`Answer::Later`], or an error. It does not run until it is asked again, which can
//!   be as often and as late as the VMM likes. The other vCPUs run on; a Linux guest reports a processor
//!   that stands still for long.
//! - **Stop the VM with its state saved**: [`Answer::Stop`]. The vCPU stands in front of its write again,
//!   and can be saved and go on here or elsewhere. There, too, it asks.
//! - [`Answer::Deny`] raises #GP, and only before the VM's first use. A Linux guest does not survive that
//!   well: see there.

use core::convert::Infallible;

use crate::gate::Growth;

/// A VMM, asked when a guest first uses features. A closure of [`Request`] is one.
///
/// It may allocate, refuse, take its time, or put the question to another thread and answer
/// [`Later`](Answer::Later). While it is asked, the vCPU does not run, and no other vCPU of the VM is
/// asked: so it must not call the VM's gate that asks it.
pub trait Grow {
    /// Why the VMM could not answer. It reaches the caller as it is, and the question stands.
    type Error;

    /// Answers the request. It may come again: after an error, when it is
    /// [retried](crate::Event::Retry), and from other vCPUs of the same VM while the first answer is
    /// still to come.
    ///
    /// # Errors
    ///
    /// The VMM could not answer, for example for lack of memory. Nothing is granted, the guest's
    /// instruction waits, and the same can be asked again.
    fn grow(&mut self, request: &Request) -> Result<Answer, Self::Error>;
}

impl<F, E> Grow for F
where
    F: FnMut(&Request) -> Result<Answer, E>,
{
    type Error = E;

    fn grow(&mut self, request: &Request) -> Result<Answer, E> {
        self(request)
    }
}

/// A VMM that has this answer, for example one that another thread has just given.
impl Grow for Answer {
    type Error = Infallible;

    fn grow(&mut self, _: &Request) -> Result<Answer, Infallible> {
        Ok(*self)
    }
}

/// What a VMM is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Request {
    /// The vCPU that is about to use the features, by the number that KVM_CREATE_VCPU was given.
    pub vcpu: u64,
    /// The features and their sizes, for one vCPU.
    pub growth: Growth,
    /// For whom.
    pub scope: Scope,
}

/// For whom state is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// For the vCPU that asks.
    Vcpu,
    /// For all vCPUs of the VM, because no other will ask.
    Vm,
}

/// What a VMM says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Answer {
    /// The guest may have the state.
    Grant,
    /// The guest may not have it: its write raises #GP. It is the last resort, and is refused once any
    /// vCPU of the VM has been granted the features: a task of the guest may have tiles in memory, and
    /// its kernel dies when it cannot load them (XRSTORS raises #NM in kernel mode).
    ///
    /// What Linux does (arch/x86/kernel/fpu/xstate.h, `xfd_update_state`; arch/x86/mm/extable.c,
    /// `ex_handler_msr`; seen in the lab on 6.12): it warns once (`unchecked MSR access error: WRMSR to 0x1c4`), goes
    /// on as if the write had been done, and does not write the same value again. So the task raises #NM again,
    /// without end: it gets nowhere, and nothing ends it. Tasks without tiles run on. At each context switch the VMM
    /// is asked anew.
    Deny,
    /// The vCPU is put back in front of its write, so that the VM can be saved or held. When it runs
    /// again, here or elsewhere, it asks again.
    Stop,
    /// The answer comes later, and the vCPU waits for it without running.
    Later,
}

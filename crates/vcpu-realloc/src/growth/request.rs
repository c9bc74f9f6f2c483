//! The question to the VMM and its answer.

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
    /// The state is there: the guest may have it.
    Grant,
    /// The guest may not have it: its write raises #GP.
    Deny,
    /// The answer comes later, and the vCPU waits for it without running.
    Later,
}

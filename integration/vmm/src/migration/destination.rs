//! The side that gets the guest: takes all of it into a new VM, and takes over.

use std::io;
use std::time::Duration;

use thiserror::Error;
use vm_memory::{Bytes, GuestAddress};

use super::frame::{FrameError, Incoming, Link, Message, PagesRef, VERSION};
use super::limit::{Cancel, Limited, Stream};
use super::offer::{Candidate, Offer};
use crate::fit::Unfit;
use crate::host::Host;
use crate::linux::devices::{Devices, DevicesError};
use crate::memory::{MemoryError, PAGE_BYTES, Pages};
use crate::restore::RestoreError;
use crate::snapshot::{PageError, Snapshot, SnapshotError};
use crate::vm::{Vm, VmError};

/// The other end is closed: by the other side, or with its process.
pub(super) fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

/// A guest that has come.
pub struct Received {
    /// It has not run here yet, and runs nowhere else.
    pub vm: Vm,
    /// Those of a Linux guest, in the state that they had at the source.
    pub devices: Option<Devices>,
    /// Pages that came, again and again.
    pub pages: usize,
}

/// Takes a guest from whoever is at the other end of `stream`, which has to be handed over within
/// `deadline`. When this returns, the guest is here.
///
/// # Errors
///
/// Why it has not come: then the source has it, and nothing of it is here.
pub fn receive<S: Stream>(
    host: &Host,
    stream: S,
    deadline: Duration,
) -> Result<Received, ReceiveError> {
    let (offer, cancel) = (Offer::of(host), Cancel::default());
    receive_with(host, &offer, stream, deadline, &cancel, |_| {})
}

/// As [`receive`], for guests that do with what is on `offer`, which can be less than `host` has, and
/// until it is cancelled. Tells `progress` how many pages have come so far, after each message of them.
///
/// # Errors
///
/// As [`receive`].
pub fn receive_with<S: Stream>(
    host: &Host,
    offer: &Offer,
    stream: S,
    deadline: Duration,
    cancel: &Cancel,
    progress: impl FnMut(usize),
) -> Result<Received, ReceiveError> {
    let stream = Limited::new(stream, deadline, cancel);
    take(host, offer, stream, deadline, progress, Ok)
}

/// As [`receive_with`], of Linux guests only: their devices with them.
pub(crate) fn take_linux<S: Stream>(
    host: &Host,
    offer: &Offer,
    stream: S,
    deadline: Duration,
    cancel: &Cancel,
    progress: impl FnMut(usize),
) -> Result<(Vm, Devices, usize), ReceiveError> {
    let stream = Limited::new(stream, deadline, cancel);
    take(host, offer, stream, deadline, progress, |received| {
        let devices = received.devices.ok_or(ReceiveError::Bare)?;
        Ok((received.vm, devices, received.pages))
    })
}

/// `accept` is asked before the source is told that all is in place.
fn take<S: Stream, T>(
    host: &Host,
    offer: &Offer,
    stream: Limited<S>,
    deadline: Duration,
    mut progress: impl FnMut(usize),
    accept: impl FnOnce(Received) -> Result<T, ReceiveError>,
) -> Result<T, ReceiveError> {
    let mut link = Link::new(stream);
    let arrived = arrive(host, offer, &mut link, &mut progress);
    let received = match arrived.and_then(accept) {
        Ok(received) => received,
        Err(error) => {
            link.refuse(&error);
            return Err(error);
        }
    };
    link.send(&Message::Ready)?;
    match link.receive()? {
        Message::Commit => {}
        other => return Err(ReceiveError::unexpected(other)),
    }
    link.stream().commit(deadline);
    // From here on the source does not run it, unless it sees this end closed without the answer.
    match link.send(&Message::Running) {
        Ok(()) => Ok(received),
        // The source has ended, or does not know and stands still: nobody else has the guest.
        Err(FrameError::Stream(error)) if is_closed(&error) => Ok(received),
        // The guest is dropped before the stream is, so the source runs it when it is nowhere else.
        Err(error) => Err(error.into()),
    }
}

fn arrive<S: Stream>(
    host: &Host,
    offer: &Offer,
    link: &mut Link<Limited<S>>,
    progress: &mut impl FnMut(usize),
) -> Result<Received, ReceiveError> {
    let hello = match link.receive()? {
        Message::Hello(hello) => hello,
        other => return Err(ReceiveError::unexpected(other)),
    };
    if hello.version != VERSION {
        return Err(ReceiveError::Version {
            found: hello.version,
            known: VERSION,
        });
    }
    let description = Message::Offer(Box::new(offer.clone()));
    if hello.memory_bytes > offer.memory_bytes {
        // Nothing is allocated, and the source learns of everything else that speaks against it.
        link.send(&description)?;
        return Err(match link.receive()? {
            Message::Refuse(reason) => ReceiveError::Refused { reason },
            _ => ReceiveError::Memory(MemoryError::TooLarge {
                bytes: hello.memory_bytes,
                limit_bytes: offer.memory_bytes,
            }),
        });
    }
    let mut vm = if hello.has_platform {
        Vm::with_platform(host, hello.memory_bytes)?
    } else {
        Vm::new(host, hello.memory_bytes)?
    };
    link.send(&description)?;
    let mut pages: usize = 0;
    loop {
        match link.incoming()? {
            Incoming::Pages(came) => {
                write_pages(&vm, came)?;
                pages = pages.saturating_add(came.iter().len());
                progress(pages);
            }
            Incoming::Other(Message::State(bytes)) => {
                let snapshot = Snapshot::from_parts(&bytes, Pages::default())?;
                if snapshot.platform.is_some() != hello.has_platform {
                    return Err(ReceiveError::Platform {
                        promised: hello.has_platform,
                    });
                }
                // Who sends it may not have looked.
                offer.check(&Candidate {
                    vcpus: &snapshot.vcpus,
                    memory_bytes: vm.memory_bytes,
                    tsc_khz: snapshot.tsc_khz,
                })?;
                vm.restore_into(host, &snapshot)?;
                // Behind Ready nothing may fail any more.
                let devices = snapshot
                    .platform
                    .map(|platform| Devices::restore(&vm, platform.devices()))
                    .transpose()?;
                return Ok(Received { vm, devices, pages });
            }
            Incoming::Other(other) => return Err(ReceiveError::unexpected(other)),
        }
    }
}

fn write_pages(vm: &Vm, pages: PagesRef<'_>) -> Result<(), ReceiveError> {
    let limit = vm.memory_bytes.div_euclid(PAGE_BYTES as u64);
    for (page, content) in pages.iter() {
        if u64::from(page) >= limit {
            return Err(PageError::OutOfRange { page, limit }.into());
        }
        let address = u64::from(page).saturating_mul(PAGE_BYTES as u64);
        vm.memory
            .write_slice(content, GuestAddress(address))
            .map_err(MemoryError::from)?;
    }
    Ok(())
}

/// A guest has not come.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ReceiveError {
    /// The connection, or what came over it.
    #[error("the source: {0}")]
    Frame(FrameError),
    /// It was cancelled here.
    #[error("it was cancelled")]
    Cancelled,
    /// The source speaks another version.
    #[error("the source speaks version {found} of the protocol; this program {known}")]
    Version {
        /// The source's.
        found: u32,
        /// Ours.
        known: u32,
    },
    /// The source does not send it.
    #[error("the source refuses: {reason}")]
    Refused {
        /// Its words.
        reason: String,
    },
    /// The source has said what it may not say now.
    #[error("the source has sent a message out of turn")]
    OutOfTurn,
    /// No VM of that size.
    #[error(transparent)]
    Vm(#[from] VmError),
    /// Pages that cannot be.
    #[error("guest memory: {0}")]
    Page(#[from] PageError),
    /// Guest memory could not be written.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The state is not valid.
    #[error(transparent)]
    State(#[from] SnapshotError),
    /// Interrupt controllers came that were not promised, or the other way round.
    #[error("{}", if *.promised {
        "the guest has no interrupt controllers, and they were promised"
    } else {
        "the guest has interrupt controllers, and they were not promised"
    })]
    Platform {
        /// In the first message.
        promised: bool,
    },
    /// It is a guest without the devices of a PC, and none such is wanted.
    #[error("it is a bare guest, and here only Linux guests go on")]
    Bare,
    /// The guest cannot go on here.
    #[error(transparent)]
    Unfit(#[from] Unfit),
    /// KVM has refused the state.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The devices have refused theirs.
    #[error(transparent)]
    Devices(#[from] DevicesError),
}

impl From<FrameError> for ReceiveError {
    fn from(error: FrameError) -> Self {
        match error {
            FrameError::Cancelled => Self::Cancelled,
            error => Self::Frame(error),
        }
    }
}

impl ReceiveError {
    fn unexpected(message: Message) -> Self {
        match message {
            Message::Refuse(reason) => Self::Refused { reason },
            _ => Self::OutOfTurn,
        }
    }
}

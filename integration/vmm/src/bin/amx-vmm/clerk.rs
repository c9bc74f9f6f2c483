//! Takes orders while a guest is moved: whatever the destination does, somebody answers.

use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use amx_vmm::linux::devices::Devices;
use amx_vmm::linux::guest::Verdict;
use amx_vmm::migration::Cancel;

use crate::control::{self, Order, Request};
use crate::event::{Event, State};
use crate::signals;

/// How soon a signal, and the end of the move, are seen.
const SOON: Duration = Duration::from_millis(20);

/// What can be said of a guest that is moved.
pub(crate) struct Clerk<'a> {
    pub(crate) devices: &'a Devices,
    pub(crate) vcpus: u8,
    pub(crate) memory_bytes: u64,
    pub(crate) cancel: Cancel,
}

/// Whoever is to hear how the move has ended.
#[derive(Default)]
pub(crate) struct Waiting {
    /// Have cancelled it.
    pub(crate) cancellers: Vec<UnixStream>,
    /// Want the guest to end.
    pub(crate) stoppers: Vec<UnixStream>,
}

impl Clerk<'_> {
    /// Serves until the move is over, which whoever has the other end of `over` says by dropping it.
    pub(crate) fn serve(&self, orders: Option<&Receiver<Order>>, over: &Receiver<()>) -> Waiting {
        let mut waiting = Waiting::default();
        loop {
            let order = match orders {
                Some(orders) => orders.recv_timeout(SOON).ok(),
                None => None,
            };
            let pause = if orders.is_some() {
                Duration::ZERO
            } else {
                SOON
            };
            if let Some((request, stream)) = order {
                self.answer(&request, stream, &mut waiting);
            }
            // The first signal keeps the guest here, where it is asked to switch itself off then.
            if signals::seen() > 0 {
                self.cancel.cancel();
            }
            if over.recv_timeout(pause) == Err(RecvTimeoutError::Disconnected) {
                return waiting;
            }
        }
    }

    fn answer(&self, request: &Request, stream: UnixStream, waiting: &mut Waiting) {
        let event = match request {
            Request::Status => Event::Status {
                state: State::Moving,
                vcpus: self.vcpus,
                memory_bytes: self.memory_bytes,
                verdict: Verdict::of(&self.devices.log()),
            },
            Request::Cancel => {
                self.cancel.cancel();
                waiting.cancellers.push(stream);
                return;
            }
            Request::Stop => {
                self.cancel.cancel();
                waiting.stoppers.push(stream);
                return;
            }
            Request::Save { .. } | Request::Send { .. } | Request::Resume => {
                let reason = "the guest is being moved: `amx-vmm cancel` keeps it here".to_owned();
                Event::Failed { reason }
            }
        };
        // He may not listen any more.
        let _ = control::tell(&stream, &event);
    }
}

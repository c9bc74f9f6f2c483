//! What comes from a lab, in order, on its way to whoever runs a program there.
//!
//! Frames wait for room: a program that prints faster than anybody reads then waits, as it would at a pipe, and memory stays bounded.
//! All else is rare, and goes in at once.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Frames that may wait, of up to [`crate::wire::LARGEST_PAYLOAD`] bytes each.
const MOST_FRAMES: usize = 16;

/// Something that comes from the machine.
#[derive(Debug)]
pub(crate) enum Event {
    /// A frame of the lab's init.
    Frame(u32, Vec<u8>),
    /// The kernel has begun to report a crash.
    CrashBegins,
    /// The kernel crashed: its report.
    Crash(String),
    /// The emulator has ended: how.
    Gone(String),
    /// A job could not be sent to its end, so the lab waits for the rest of it in vain.
    SendFailed(io::Error),
}

/// Nobody takes events any more.
#[derive(Debug)]
pub(crate) struct Closed;

#[derive(Debug, Default)]
struct State {
    waiting: VecDeque<Event>,
    frames: usize,
    closed: bool,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait_while<'a>(
        &self,
        state: MutexGuard<'a, State>,
        condition: impl FnMut(&mut State) -> bool,
    ) -> MutexGuard<'a, State> {
        self.changed
            .wait_while(state, condition)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// A queue of events.
pub(crate) fn queue() -> (Sender, Receiver) {
    let shared = Arc::new(Shared::default());
    (Sender(Arc::clone(&shared)), Receiver(shared))
}

/// Where events go in.
#[derive(Debug, Clone)]
pub(crate) struct Sender(Arc<Shared>);

impl Sender {
    /// Puts an event behind the others; a frame waits until there is room for it.
    pub(crate) fn send(&self, event: Event) -> Result<(), Closed> {
        let mut state = self.0.lock();
        if matches!(event, Event::Frame(..)) {
            state = self
                .0
                .wait_while(state, |state| state.frames >= MOST_FRAMES && !state.closed);
            state.frames = state.frames.saturating_add(1);
        }
        if state.closed {
            return Err(Closed);
        }
        state.waiting.push_back(event);
        self.0.changed.notify_all();
        Ok(())
    }
}

/// Where events come out.
#[derive(Debug)]
pub(crate) struct Receiver(Arc<Shared>);

impl Receiver {
    /// Waits for what comes next.
    pub(crate) fn next(&self) -> Event {
        let state = self.0.lock();
        let mut state = self.0.wait_while(state, |state| state.waiting.is_empty());
        let event = state.waiting.pop_front();
        if matches!(event, Some(Event::Frame(..))) {
            state.frames = state.frames.saturating_sub(1);
        }
        self.0.changed.notify_all();
        event.unwrap_or_else(|| Event::Gone("the emulator is gone".to_owned()))
    }

    /// Whether nothing has come that was not taken.
    pub(crate) fn is_empty(&self) -> bool {
        self.0.lock().waiting.is_empty()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.waiting.clear();
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    /// As many frames as can be, until there are so many that a bound would have shown.
    fn pour(sender: Sender) -> std::thread::JoinHandle<Result<(), Closed>> {
        std::thread::spawn(move || {
            (0..100 * MOST_FRAMES)
                .try_for_each(|number| sender.send(Event::Frame(2, number.to_le_bytes().to_vec())))
        })
    }

    #[test]
    fn frames_wait_for_room_and_news_does_not() {
        let (sender, receiver) = queue();
        let pouring = pour(sender.clone());
        let end = Instant::now() + Duration::from_millis(200);
        while !pouring.is_finished() && Instant::now() < end {
            std::thread::yield_now();
        }
        assert!(receiver.0.lock().waiting.len() <= MOST_FRAMES);
        sender.send(Event::Crash("report".to_owned())).unwrap();
        let (mut frames, mut crashes) = (0, 0);
        while frames < 100 * MOST_FRAMES || crashes == 0 {
            match receiver.next() {
                Event::Frame(_, payload) => {
                    assert_eq!(payload, frames.to_le_bytes());
                    frames += 1;
                }
                _ => crashes += 1,
            }
        }
        pouring.join().unwrap().unwrap();
        assert!(receiver.is_empty());
    }

    #[test]
    fn nobody_waits_for_a_receiver_that_is_gone() {
        let (sender, receiver) = queue();
        let pouring = pour(sender.clone());
        let Event::Frame(..) = receiver.next() else {
            panic!("a frame comes first")
        };
        drop(receiver);
        pouring.join().unwrap().unwrap_err();
        sender.send(Event::CrashBegins).unwrap_err();
    }
}

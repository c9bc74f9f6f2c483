//! Tells what happens from a thread of its own: who reads slowly, or not at all, holds up no guest.

use std::io::{Write, stderr};
use std::mem;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::thread;
use std::time::Duration;

use crate::event::Event;
use crate::screen::Screen;

/// So much waits for a reader; what comes then is missed.
const MOST: usize = 1024;
/// How long the end of the process waits for a reader.
const LAST_WORDS: Duration = Duration::from_secs(2);

/// What there is to tell.
enum Said {
    Event(Event),
    /// What the guest has written to its serial port.
    Console(Vec<u8>),
}

/// The process's mouth.
pub(crate) struct Teller {
    /// `None` when all was said.
    said: Option<SyncSender<Said>>,
    over: Receiver<()>,
    missed: u64,
}

impl Teller {
    /// Shows everything on `screen`.
    pub(crate) fn new(mut screen: Screen) -> Self {
        let (said, to_tell) = mpsc::sync_channel(MOST);
        let (telling, over) = mpsc::channel();
        thread::spawn(move || {
            for said in to_tell {
                match said {
                    Said::Event(event) => screen.show(&event),
                    // Nobody may read it.
                    Said::Console(text) => drop(stderr().write_all(&text)),
                }
            }
            screen.finish();
            // That it is gone is the sign.
            drop::<mpsc::Sender<()>>(telling);
        });
        Self {
            said: Some(said),
            over,
            missed: 0,
        }
    }

    /// Tells it, at once and without waiting.
    pub(crate) fn show(&mut self, event: Event) {
        if self.missed > 0 {
            let events = mem::take(&mut self.missed);
            self.say(Said::Event(Event::Missed { events }), events);
        }
        self.say(Said::Event(event), 1);
    }

    /// Prints what the guest has written.
    pub(crate) fn console(&mut self, text: Vec<u8>) {
        if !text.is_empty() {
            self.say(Said::Console(text), 1);
        }
    }

    /// `events` are missed where nobody reads.
    fn say(&mut self, said: Said, events: u64) {
        let sent = self.said.as_ref().map(|sender| sender.try_send(said));
        if let Some(Err(TrySendError::Full(_))) = sent {
            self.missed = self.missed.saturating_add(events);
        }
    }
}

impl Drop for Teller {
    fn drop(&mut self) {
        self.said = None;
        // It never says anything: it ends, or the time does.
        let _ = self.over.recv_timeout(LAST_WORDS);
    }
}

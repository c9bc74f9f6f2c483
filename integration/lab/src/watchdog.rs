//! Ends what takes too long, whatever else is being waited for meanwhile.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Watching,
    CalledOff,
    Bitten,
}

/// Bites once, when its time is out, unless it was called off; it is called off when this is dropped.
#[derive(Debug)]
pub(crate) struct Watchdog(Arc<(Mutex<State>, Condvar)>);

impl Watchdog {
    pub(crate) fn start(limit: Duration, bite: impl FnOnce() + Send + 'static) -> Self {
        let shared = Arc::new((Mutex::new(State::Watching), Condvar::new()));
        let watched = Arc::clone(&shared);
        std::thread::spawn(move || {
            let (state, changed) = &*watched;
            let state = state.lock().unwrap_or_else(PoisonError::into_inner);
            let (mut state, _) = changed
                .wait_timeout_while(state, limit, |state| *state == State::Watching)
                .unwrap_or_else(PoisonError::into_inner);
            if *state == State::Watching {
                *state = State::Bitten;
                drop(state);
                bite();
            }
        });
        Self(shared)
    }

    /// Whether it came in time: if so, it does not bite any more. If not, it has bitten or is about to.
    pub(crate) fn call_off(&self) -> bool {
        let (state, changed) = &*self.0;
        let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
        if *state == State::Watching {
            *state = State::CalledOff;
            changed.notify_all();
        }
        *state == State::CalledOff
    }
}

impl Drop for Watchdog {
    fn drop(&mut self) {
        self.call_off();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(1);

    #[test]
    fn bites_when_time_is_out() {
        let (sender, bitten) = mpsc::channel();
        let watchdog = Watchdog::start(SHORT, move || sender.send(()).unwrap());
        bitten.recv().unwrap();
        assert!(!watchdog.call_off());
    }

    #[test]
    fn does_not_bite_once_it_is_called_off() {
        let (sender, bitten) = mpsc::channel::<()>();
        let keep = sender.clone();
        let watchdog = Watchdog::start(Duration::from_secs(3600), move || sender.send(()).unwrap());
        assert!(watchdog.call_off() && watchdog.call_off());
        drop(keep);
        // Its thread has ended, and said nothing.
        bitten.recv().unwrap_err();
    }
}

//! A stream with an end of time for all that is read and written, and a way to end it before.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use thiserror::Error;

/// How long a read or a write waits before it looks at the time, and whether it was cancelled.
const TICK: Duration = Duration::from_millis(50);

/// A connection to the other side.
///
/// It must be a direct one: that it is closed has to mean that the other side has closed it or has
/// ended. A Unix socket between the two processes is; one that somebody forwards is not.
pub trait Stream: Read + Write {
    /// Makes each read and each write that follows fail after `time` without a byte, which is not 0, with
    /// [`io::ErrorKind::WouldBlock`] or [`io::ErrorKind::TimedOut`].
    ///
    /// # Errors
    ///
    /// The system refuses.
    fn set_timeout(&self, time: Duration) -> io::Result<()>;
}

impl Stream for UnixStream {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.set_read_timeout(Some(time))?;
        self.set_write_timeout(Some(time))
    }
}

/// Cancels a move from another thread. Once the guest is handed over it has no effect.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// Cancels it. Nothing takes this back.
    pub fn cancel(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Returns true when it was cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// A stream of which no read and no write outlasts a deadline, however the other side drips its bytes.
pub(super) struct Limited<S> {
    stream: S,
    deadline: Option<Deadline>,
    cancel: Option<Cancel>,
}

#[derive(Clone, Copy)]
struct Deadline {
    end: Instant,
    allowed: Duration,
}

impl<S: Stream> Limited<S> {
    /// Limits everything to `allowed` from now on, unless it is cancelled before.
    pub(super) fn new(stream: S, allowed: Duration, cancel: &Cancel) -> Self {
        Self {
            stream,
            deadline: Deadline::after(Instant::now(), allowed),
            cancel: Some(cancel.clone()),
        }
    }

    /// Brings the end forward, to `allowed` after `start`, where that is sooner.
    pub(super) fn limit(&mut self, start: Instant, allowed: Duration) {
        let sooner = Deadline::after(start, allowed);
        let ends = self.deadline.into_iter().chain(sooner);
        self.deadline = ends.min_by_key(|deadline| deadline.end);
    }

    /// Begins anew, with `allowed` for what is left. From here on nobody can cancel it.
    pub(super) fn commit(&mut self, allowed: Duration) {
        self.deadline = Deadline::after(Instant::now(), allowed);
        self.cancel = None;
    }

    /// Does nothing but look whether it was cancelled.
    pub(super) fn check(&self) -> io::Result<()> {
        match &self.cancel {
            Some(cancel) if cancel.is_cancelled() => Err(io::Error::other(Over::Cancelled)),
            _ => Ok(()),
        }
    }

    /// Does it for a tick, again and again, until it is done, the time is over, or it is cancelled between two.
    fn within<T>(&mut self, mut act: impl FnMut(&mut S) -> io::Result<T>) -> io::Result<T> {
        loop {
            let mut tick = TICK;
            if let Some(Deadline { end, allowed }) = self.deadline {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(io::Error::other(Over::Late { allowed }));
                }
                tick = tick.min(left);
            }
            self.stream.set_timeout(tick)?;
            match act(&mut self.stream) {
                Err(error) if is_timeout(&error) => self.check()?,
                done => return done,
            }
        }
    }
}

impl Deadline {
    /// `None` where the clock does not reach so far.
    fn after(start: Instant, allowed: Duration) -> Option<Self> {
        let end = start.checked_add(allowed)?;
        Some(Self { end, allowed })
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
    )
}

impl<S: Stream> Read for Limited<S> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        self.check()?;
        self.within(|stream| stream.read(bytes))
    }
}

/// A message that has begun comes to its end while the other side reads, whoever cancels meanwhile: a part of one
/// could not be followed by the reason.
impl<S: Stream> Write for Limited<S> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.within(|stream| stream.write(bytes))
    }

    fn flush(&mut self) -> io::Result<()> {
        self.within(Write::flush)
    }
}

/// Why a read or a write has ended although the stream has not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub(super) enum Over {
    #[error("it took longer than {} ms", allowed.as_millis())]
    Late { allowed: Duration },
    #[error("it was cancelled")]
    Cancelled,
}

impl Over {
    /// Finds it in the error that a [`Limited`] stream has returned.
    pub(super) fn of(error: &io::Error) -> Option<Self> {
        error.get_ref()?.downcast_ref().copied()
    }
}

#[cfg(test)]
mod tests {
    use std::thread;

    use super::*;

    const SHORT: Duration = Duration::from_millis(120);
    const LONG: Duration = Duration::from_secs(5);

    fn pair(allowed: Duration, cancel: &Cancel) -> (Limited<UnixStream>, UnixStream) {
        let (here, there) = UnixStream::pair().unwrap();
        (Limited::new(here, allowed, cancel), there)
    }

    fn over(result: io::Result<impl Sized>) -> Option<Over> {
        Over::of(&result.err()?)
    }

    /// Each byte comes in time, and all of them never do.
    #[test]
    fn who_drips_does_not_move_the_end() {
        let (mut stream, mut drips) = pair(SHORT, &Cancel::default());
        let dripping = thread::spawn(move || while drips.write_all(&[0]).is_ok() {});
        let mut read = 0_u64;
        let ended = loop {
            match stream.read(&mut [0]) {
                Ok(bytes) => read += bytes as u64,
                Err(error) => break Over::of(&error),
            }
        };
        assert_eq!(ended, Some(Over::Late { allowed: SHORT }));
        assert!(read > 0);
        drop(stream);
        dripping.join().unwrap();
    }

    #[test]
    fn who_does_not_read_does_not_hold_the_writer() {
        let (mut stream, _there) = pair(SHORT, &Cancel::default());
        let written = stream.write_all(&vec![0; 16 << 20]);
        assert_eq!(over(written), Some(Over::Late { allowed: SHORT }));
    }

    #[test]
    fn a_limit_is_brought_forward_and_never_put_off() {
        let (mut stream, _there) = pair(SHORT, &Cancel::default());
        stream.limit(Instant::now(), LONG);
        let late = Over::Late { allowed: SHORT };
        assert_eq!(over(stream.read(&mut [0])), Some(late));
        let (mut stream, _there) = pair(LONG, &Cancel::default());
        stream.limit(Instant::now(), SHORT);
        assert_eq!(over(stream.read(&mut [0])), Some(late));
    }

    /// A read that has begun ends with it, and a write that nobody reads; what is committed does not.
    #[test]
    fn it_is_cancelled_from_another_thread_until_it_is_committed() {
        let cancel = Cancel::default();
        let (mut stream, mut there) = pair(LONG, &cancel);
        let reading = thread::spawn(move || (over(stream.read(&mut [0])), stream));
        cancel.cancel();
        let (ended, mut stream) = reading.join().unwrap();
        assert_eq!(ended, Some(Over::Cancelled));
        assert_eq!(over(stream.check()), Some(Over::Cancelled));
        assert!(stream.write_all(&[0]).and(stream.flush()).is_ok());
        let unread = stream.write_all(&vec![0; 16 << 20]);
        assert_eq!(over(unread), Some(Over::Cancelled));
        stream.commit(LONG);
        there.write_all(&[7]).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 1);
        stream.commit(SHORT);
        let late = Over::Late { allowed: SHORT };
        assert_eq!(over(stream.read(&mut [0])), Some(late));
    }

    #[test]
    fn time_without_end_is_no_limit() {
        let (mut stream, mut there) = pair(Duration::MAX, &Cancel::default());
        there.write_all(&[7]).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap(), 1);
    }
}

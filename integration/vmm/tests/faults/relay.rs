//! One end of a connection where each message can be changed, cut, or waited at.

use std::io::{self, Cursor, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use amx_vmm::migration::Stream;

use crate::frame;

/// Where a message is, as this end sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub(crate) enum Moment {
    /// None of it is written.
    Writing,
    /// Half of it is written.
    Between,
    /// All of it is written.
    Written,
    /// It is waited for: there may be nothing of it.
    Reading,
    /// All of it is read.
    Read,
}

/// What is to happen to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    Pass,
    /// So many of its bytes pass, then the connection is closed and this end works no more.
    CutAfter(usize),
}

/// An end. The hook is asked at each moment of each message, and gets its bytes where there are some.
pub(crate) struct Relay<F> {
    stream: UnixStream,
    hook: F,
    incoming: Cursor<Vec<u8>>,
    is_cut: bool,
}

impl<F: FnMut(Moment, &mut Vec<u8>) -> Fate> Relay<F> {
    pub(crate) fn new(stream: UnixStream, hook: F) -> Self {
        Self {
            stream,
            hook,
            incoming: Cursor::default(),
            is_cut: false,
        }
    }

    fn cut(&mut self) -> io::Error {
        self.is_cut = true;
        // The other end sees this one closed.
        let _ = self.stream.shutdown(Shutdown::Both);
        io::Error::other("made to fail")
    }

    fn check(&self) -> io::Result<()> {
        if self.is_cut {
            return Err(io::Error::other("made to fail before"));
        }
        Ok(())
    }
}

impl<F: FnMut(Moment, &mut Vec<u8>) -> Fate> Write for Relay<F> {
    /// A message comes as a whole.
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.check()?;
        let mut message = bytes.to_vec();
        match (self.hook)(Moment::Writing, &mut message) {
            Fate::Pass => {}
            Fate::CutAfter(bytes) => {
                let bytes = bytes.min(message.len());
                // Nothing more is read, so that no answer slips in between.
                let _ = self.stream.shutdown(Shutdown::Read);
                self.stream.write_all(&message[..bytes])?;
                let error = self.cut();
                // A message that was written as a whole was written.
                return if bytes == message.len() {
                    Ok(bytes)
                } else {
                    Err(error)
                };
            }
        }
        let half = message.len() / 2;
        self.stream.write_all(&message[..half])?;
        (self.hook)(Moment::Between, &mut message);
        self.stream.write_all(&message[half..])?;
        (self.hook)(Moment::Written, &mut message);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl<F: FnMut(Moment, &mut Vec<u8>) -> Fate> Read for Relay<F> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.incoming.read(bytes)?;
        if read > 0 || bytes.is_empty() {
            return Ok(read);
        }
        self.check()?;
        (self.hook)(Moment::Reading, &mut Vec::new());
        let mut message = frame::read(&self.stream)?;
        match (self.hook)(Moment::Read, &mut message) {
            Fate::Pass => {}
            Fate::CutAfter(bytes) => {
                message.truncate(bytes);
                let error = self.cut();
                if bytes == 0 {
                    return Err(error);
                }
            }
        }
        self.incoming = Cursor::new(message);
        self.incoming.read(bytes)
    }
}

impl<F: FnMut(Moment, &mut Vec<u8>) -> Fate> Stream for Relay<F> {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.stream.set_timeout(time)
    }
}

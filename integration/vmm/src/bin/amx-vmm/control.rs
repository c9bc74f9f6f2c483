//! The socket on which the process that has the guest takes orders: one JSON object as a line comes in, and
//! events go out until the order is carried out.

use amx_vmm::words::in_words;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use nix::sys::stat::{Mode, umask};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::event::Event;

/// No order is longer.
const LINE_BYTES: u64 = 16 << 10;
/// How soon waiting is given up, in milliseconds.
const GIVE_UP_MS: u8 = 100;
/// Whoever connects has to say what he wants.
const PATIENCE: Duration = Duration::from_secs(5);

/// An order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Request {
    Send {
        socket: PathBuf,
        downtime_ms: u64,
        max_rounds: u32,
        max_downtime_ms: u64,
        deadline_s: u32,
        answer_s: u32,
        throttle_percent: u8,
    },
    Save {
        file: PathBuf,
    },
    Status,
    Cancel,
    Resume,
    Stop,
}

/// A socket at a path, which goes with it.
pub(crate) struct Socket {
    pub(crate) listener: UnixListener,
    path: PathBuf,
}

impl Socket {
    /// Where there is nothing yet. Nothing is tried out: to connect to a destination that waits there would
    /// be taken for the guest.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<Self> {
        let name = path.display();
        // Nobody else connects, not even before its mode could be changed.
        let mask = umask(Mode::from_bits_truncate(0o177));
        let bound = UnixListener::bind(path);
        umask(mask);
        let listener = bound.map_err(|error| {
            if error.kind() == io::ErrorKind::AddrInUse {
                anyhow!("{name} is there already: remove it if no process listens there any more")
            } else {
                anyhow!("{name}: {error}: a socket cannot be made there")
            }
        })?;
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl Socket {
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whoever connects first; `None` if `given_up` says so before.
    pub(crate) fn accept(&self, given_up: impl Fn() -> bool) -> anyhow::Result<Option<UnixStream>> {
        let failed = || format!("the socket {}", self.path.display());
        let timeout = PollTimeout::from(GIVE_UP_MS);
        while !given_up() {
            let mut ready = [PollFd::new(self.listener.as_fd(), PollFlags::POLLIN)];
            match poll(&mut ready, timeout) {
                Ok(0) | Err(Errno::EINTR) => {}
                Ok(_) => {
                    let (stream, _) = self.listener.accept().with_context(failed)?;
                    require_own(&stream).with_context(failed)?;
                    return Ok(Some(stream));
                }
                Err(error) => return Err(error).with_context(failed),
            }
        }
        Ok(None)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Nobody needs to know that it is gone already.
        let _ = fs::remove_file(&self.path);
    }
}

/// Refuses whoever is another user: a guest's memory is nobody else's. root may do anything anyway.
pub(crate) fn require_own(stream: &UnixStream) -> anyhow::Result<()> {
    let theirs = getsockopt(stream, PeerCredentials)
        .context("who is there")?
        .uid();
    let ours = Uid::effective().as_raw();
    if theirs != ours && theirs != 0 {
        bail!("user {theirs} is at the other end; this process is user {ours}'s");
    }
    Ok(())
}

/// An order, and where its answer goes.
pub(crate) type Order = (Request, UnixStream);

/// Takes orders on a thread of its own.
pub(crate) fn listen(path: &Path) -> anyhow::Result<(Socket, mpsc::Receiver<Order>)> {
    let socket = Socket::bind(path)?;
    let listener = socket.listener.try_clone().context("the control socket")?;
    let (sender, orders) = mpsc::channel();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let sender = sender.clone();
            // One who says nothing keeps nobody else from saying something.
            thread::spawn(move || match read(&stream) {
                // Without a guest nobody takes orders any more.
                Ok(request) => drop(sender.send((request, stream))),
                Err(error) => {
                    let reason = in_words(error.as_ref());
                    let _ = tell(&stream, &Event::Failed { reason });
                }
            });
        }
    });
    Ok((socket, orders))
}

fn read(stream: &UnixStream) -> anyhow::Result<Request> {
    require_own(stream)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = parse(stream)?;
    // Nobody waits for one who does not read: what has no room in the socket is not told.
    stream.set_nonblocking(true)?;
    Ok(request)
}

fn parse(stream: impl Read) -> anyhow::Result<Request> {
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES))
        .read_line(&mut line)
        .context("the order")?;
    serde_json::from_str(&line).context("no order that this program knows")
}

/// One line.
pub(crate) fn tell(mut stream: impl Write, event: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_vec(event)?;
    line.push(b'\n');
    stream.write_all(&line)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    #[test]
    fn an_order_is_read_as_it_was_given() {
        let send = Request::Send {
            socket: "/there".into(),
            downtime_ms: 300,
            max_rounds: 16,
            max_downtime_ms: 3000,
            deadline_s: 300,
            answer_s: 30,
            throttle_percent: 80,
        };
        let save = Request::Save {
            file: "/file".into(),
        };
        let others = [
            Request::Status,
            Request::Cancel,
            Request::Resume,
            Request::Stop,
        ];
        for order in [send, save].into_iter().chain(others) {
            let mut line = Vec::new();
            tell(&mut line, &order).unwrap();
            assert_eq!(parse(line.as_slice()).unwrap(), order);
            for cut in 0..line.len().saturating_sub(1) {
                assert!(parse(line.get(..cut).unwrap()).is_err(), "cut at {cut}");
            }
        }
    }

    #[test]
    fn what_is_no_order_is_refused_and_no_more_than_a_line_is_read() {
        for text in [
            "\n",
            "{}\n",
            "{\"order\":\"dance\"}\n",
            "{\"order\":\"send\"}\n",
            "\u{0}\n",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(parse(io::repeat(b'x')).is_err());
        assert!(parse(io::repeat(0xff)).is_err());
    }

    #[test]
    fn a_socket_takes_nobodys_place() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let socket = Socket::bind(&path).unwrap();
        let error = Socket::bind(&path).err().unwrap().to_string();
        assert!(error.contains("remove it"), "{error}");
        assert!(path.exists(), "it is not ours");
        drop(socket);
        assert!(!path.exists());
        fs::write(&path, "a file").unwrap();
        assert!(Socket::bind(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), b"a file", "it is not removed");
    }
}

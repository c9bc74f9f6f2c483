//! What the host program and the lab's init say to each other: frames out of the lab, one job after the other into it.
//!
//! This file is also compiled into the lab's init, so it uses nothing but the standard library.

use std::fmt;
use std::io::{self, Read, Write};

/// Physical address of the channel's registers (the emulator patch `amxlab`).
pub const REGISTERS: u64 = 0xe000_0000;
/// Physical address of the channel's window.
pub const WINDOW: u64 = 0xe010_0000;
/// Bytes of each half of the window: the lower half goes to the host, the upper half comes from it.
pub const WINDOW_HALF: usize = 1 << 20;
/// What the first register reads as.
pub const MAGIC: u32 = 0x4c58_4d41;

/// A frame's kind: the lab is up; the payload is the kernel's release.
pub const READY: u32 = 1;
/// A frame's kind: bytes of the program's standard output.
pub const STDOUT: u32 = 2;
/// A frame's kind: bytes of the program's standard error.
pub const STDERR: u32 = 3;
/// A frame's kind: the program ended; the payload is an [`Ending`].
pub const EXIT: u32 = 4;
/// A frame's kind: bytes of the archive of the out folder.
pub const FILES: u32 = 5;
/// A frame's kind: the program ended before its input did, so the input is to be ended now.
pub const INPUT_END: u32 = 8;
/// A frame's kind: a session's lab went down with a panic; the payload is the kernel's text. Never sent by init.
pub const PANIC: u32 = 6;
/// A frame's kind: a session's emulator ended; the payload says how. Never sent by init.
pub const GONE: u32 = 7;
/// A frame's kind: a lab of a session is free for this program, and is READY soon. Never sent by init.
pub const TAKEN: u32 = 9;
/// A frame's kind: the job's files could not be unpacked in the lab, so nothing was run; the payload says why.
pub const NOT_UNPACKED: u32 = 10;
/// A frame's kind: the program ended, and not all of its out folder could be sent; the payload is an [`Ending`], and then says why.
pub const OUT_INCOMPLETE: u32 = 11;

/// The largest payload of a frame.
pub const LARGEST_PAYLOAD: usize = WINDOW_HALF - 8;
/// The largest job description: arguments and environment have a limit of 2 MiB on Linux as well.
const LARGEST_JOB: u32 = 4 << 20;
const JOB_MAGIC: &[u8; 4] = b"JOB1";

/// Whether a frame of this kind is the last one of its job.
#[must_use]
pub fn ends_job(kind: u32) -> bool {
    matches!(kind, EXIT | NOT_UNPACKED | OUT_INCOMPLETE)
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It left with this status.
    Exited(i32),
    /// This signal ended it.
    Signaled(i32),
    /// It could not be started: the errno.
    NotStarted(i32),
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exited(status) => write!(f, "left with status {status}"),
            Self::Signaled(signal) => write!(f, "was ended by signal {signal}"),
            Self::NotStarted(errno) => write!(f, "was not started (errno {errno})"),
        }
    }
}

impl Ending {
    /// The payload of an `EXIT` frame.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 8] {
        let (kind, value) = match self {
            Self::Exited(status) => (0, status),
            Self::Signaled(signal) => (1, signal),
            Self::NotStarted(errno) => (2, errno),
        };
        let mut bytes = [0; 8];
        let (low, high) = bytes.split_at_mut(4);
        low.copy_from_slice(&i32::to_le_bytes(kind));
        high.copy_from_slice(&value.to_le_bytes());
        bytes
    }

    /// The inverse of [`Ending::to_bytes`]; what follows those bytes is not looked at.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (kind, value) = bytes.split_first_chunk::<4>()?;
        let value = i32::from_le_bytes(*value.first_chunk()?);
        match i32::from_le_bytes(*kind) {
            0 => Some(Self::Exited(value)),
            1 => Some(Self::Signaled(value)),
            2 => Some(Self::NotStarted(value)),
            _ => None,
        }
    }
}

/// Reads one frame; `None` at the end of the stream.
///
/// # Errors
/// When reading fails or the stream ends inside a frame.
pub fn read_frame(input: &mut impl Read) -> io::Result<Option<(u32, Vec<u8>)>> {
    let mut kind = [0; 4];
    loop {
        match input.read(&mut kind[..1]) {
            Ok(0) => return Ok(None),
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    input.read_exact(&mut kind[1..])?;
    let length = read_u32(input)?;
    if length as usize > LARGEST_PAYLOAD {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "a frame longer than the window",
        ));
    }
    let mut payload = vec![0; length as usize];
    input.read_exact(&mut payload)?;
    Ok(Some((u32::from_le_bytes(kind), payload)))
}

/// The eight bytes before a frame's payload.
#[must_use]
pub fn frame_header(kind: u32, payload_bytes: u32) -> [u8; 8] {
    let mut header = [0; 8];
    let (low, high) = header.split_at_mut(4);
    low.copy_from_slice(&kind.to_le_bytes());
    high.copy_from_slice(&payload_bytes.to_le_bytes());
    header
}

/// What is to be run; an archive of files follows it, and then, if asked for, the program's input.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct JobHeader {
    /// The host's clock: seconds and nanoseconds since 1970.
    pub time: (u64, u32),
    /// Random bytes for the lab's kernel, which may have been saved and resumed.
    pub seed: [u8; 32],
    /// Input frames follow the archive.
    pub stdin: bool,
    /// The out folder is wanted back.
    pub out: bool,
    /// Path of the program inside the lab.
    pub program: String,
    /// Working directory inside the lab.
    pub directory: String,
    /// Arguments, the name first.
    pub args: Vec<Vec<u8>>,
    /// `NAME=value` pairs.
    pub env: Vec<Vec<u8>>,
}

impl JobHeader {
    /// Writes the description.
    ///
    /// # Errors
    /// When writing fails or the description is larger than the lab takes.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        let mut body = Vec::new();
        body.extend_from_slice(&self.time.0.to_le_bytes());
        body.extend_from_slice(&self.time.1.to_le_bytes());
        body.extend_from_slice(&self.seed);
        body.push(u8::from(self.stdin));
        body.push(u8::from(self.out));
        put_bytes(&mut body, self.program.as_bytes())?;
        put_bytes(&mut body, self.directory.as_bytes())?;
        for list in [&self.args, &self.env] {
            body.extend_from_slice(&length(list.len())?.to_le_bytes());
            for item in list {
                put_bytes(&mut body, item)?;
            }
        }
        let bytes = length(body.len())?;
        out.write_all(JOB_MAGIC)?;
        out.write_all(&bytes.to_le_bytes())?;
        out.write_all(&body)
    }

    /// Reads a description.
    ///
    /// # Errors
    /// When reading fails or the bytes are not a description.
    pub fn read(input: &mut impl Read) -> io::Result<Self> {
        let mut magic = [0; 4];
        input.read_exact(&mut magic)?;
        let bytes = read_u32(input)?;
        if &magic != JOB_MAGIC || bytes > LARGEST_JOB {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "no job where one was due",
            ));
        }
        let mut body = vec![0; bytes as usize];
        input.read_exact(&mut body)?;
        let body = &mut body.as_slice();
        let mut job = Self {
            time: (
                u64::from(read_u32(body)?) | u64::from(read_u32(body)?) << 32,
                read_u32(body)?,
            ),
            ..Self::default()
        };
        body.read_exact(&mut job.seed)?;
        let mut flags = [0; 2];
        body.read_exact(&mut flags)?;
        [job.stdin, job.out] = flags.map(|flag| flag != 0);
        job.program = take_string(body)?;
        job.directory = take_string(body)?;
        for list in [&mut job.args, &mut job.env] {
            for _ in 0..read_u32(body)? {
                list.push(take_bytes(body)?);
            }
        }
        Ok(job)
    }
}

/// Reads one little-endian number.
///
/// # Errors
/// When reading fails.
pub fn read_u32(input: &mut impl Read) -> io::Result<u32> {
    let mut bytes = [0; 4];
    input.read_exact(&mut bytes)?;
    Ok(u32::from_le_bytes(bytes))
}

fn length(count: usize) -> io::Result<u32> {
    u32::try_from(count)
        .ok()
        .filter(|count| *count <= LARGEST_JOB)
        .ok_or_else(|| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                "the arguments and the environment together are too long",
            )
        })
}

fn put_bytes(body: &mut Vec<u8>, bytes: &[u8]) -> io::Result<()> {
    body.extend_from_slice(&length(bytes.len())?.to_le_bytes());
    body.extend_from_slice(bytes);
    Ok(())
}

fn take_bytes(body: &mut &[u8]) -> io::Result<Vec<u8>> {
    let bytes = read_u32(body)? as usize;
    let (item, rest) = body
        .split_at_checked(bytes)
        .ok_or(io::ErrorKind::UnexpectedEof)?;
    *body = rest;
    Ok(item.to_vec())
}

fn take_string(body: &mut &[u8]) -> io::Result<String> {
    String::from_utf8(take_bytes(body)?)
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "a path that is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_survives_the_way() {
        let job = JobHeader {
            time: (0x1_0000_0002, 3),
            seed: [7; 32],
            stdin: true,
            out: false,
            program: "/a".into(),
            directory: "/b".into(),
            args: vec![b"x".to_vec(), vec![0xff, b' ']],
            env: vec![b"K=V".to_vec()],
        };
        let mut bytes = Vec::new();
        job.write(&mut bytes).unwrap();
        assert_eq!(JobHeader::read(&mut bytes.as_slice()).unwrap(), job);
        for cut in 0..bytes.len() {
            JobHeader::read(&mut &bytes[..cut]).unwrap_err();
        }
    }

    #[test]
    fn endings_survive_the_way() {
        for ending in [
            Ending::Exited(255),
            Ending::Signaled(9),
            Ending::NotStarted(2),
        ] {
            assert_eq!(Ending::from_bytes(&ending.to_bytes()), Some(ending));
        }
        assert_eq!(Ending::from_bytes(&[9; 8]), None);
        assert_eq!(Ending::from_bytes(&[0; 7]), None);
    }

    #[test]
    fn frames_end_only_between_frames() {
        let mut bytes = frame_header(STDOUT, 2).to_vec();
        bytes.extend_from_slice(b"hi");
        let mut input = bytes.as_slice();
        assert_eq!(
            read_frame(&mut input).unwrap(),
            Some((STDOUT, b"hi".to_vec()))
        );
        assert_eq!(read_frame(&mut input).unwrap(), None);
        for cut in 1..bytes.len() {
            read_frame(&mut &bytes[..cut]).unwrap_err();
        }
        read_frame(&mut frame_header(STDOUT, u32::MAX).as_slice()).unwrap_err();
    }
}

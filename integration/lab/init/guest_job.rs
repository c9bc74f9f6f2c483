//! Runs one program as if it had been started on the host: in a fresh root, with its arguments, environment, files and streams.

use std::ffi::{CString, OsStr, OsString};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Component, Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::channel::Channel;
use crate::cpio::{self, Entry};
use crate::machine::{self, context};
use crate::sys;
use crate::wire::{self, Ending, JobHeader};

const ROOT: &str = "/job";
const OUT: &str = "/job/out";
/// How often a program's standard input is looked after. Time runs only as fast as the emulator does.
const INPUT_PERIOD: Duration = Duration::from_millis(2);

/// Waits for a job, runs it, and tells how it ended.
pub fn serve_one(channel: &Channel) -> io::Result<()> {
    let mut input = channel;
    let job = JobHeader::read(&mut input)?;
    sys::set_clock(job.time.0 as i64, i64::from(job.time.1))
        .map_err(|error| context(error, "clock"))?;
    // A resumed kernel has the random state of every other one that was resumed from the same file.
    let mut urandom = OpenOptions::new().write(true).open("/dev/urandom")?;
    urandom.write_all(&job.seed)?;
    sys::reseed(urandom.as_fd()).map_err(|error| context(error, "random"))?;
    let root = CString::new(ROOT)?;
    fs::create_dir_all(ROOT)?;
    sys::mount_fs(c"tmpfs", &root, c"size=90%,mode=755")?;
    machine::mount_below(Path::new(ROOT))?;
    fs::create_dir_all(OUT)?;
    let (kind, payload) = match unpack(&mut input, Path::new(ROOT))? {
        Ok(()) => run(channel, &job)?,
        Err(error) => {
            if job.stdin {
                drop_input(channel);
            }
            (wire::NOT_UNPACKED, error.to_string().into_bytes())
        }
    };
    sys::unmount(&root)?;
    channel.send(kind, &payload)
}

/// The kind and the payload of the job's last frame.
fn run(channel: &Channel, job: &JobHeader) -> io::Result<(u32, Vec<u8>)> {
    let killed_before = machine::killed_for_memory()?;
    let mut payload = attend(channel, job)?.to_bytes().to_vec();
    let killed = machine::killed_for_memory()? - killed_before;
    if killed > 0 {
        let said = format!(
            "amx-lab: the lab ran out of memory, and its kernel killed {killed} of the program's processes; --memory or AMX_LAB_MEMORY \
             gives it more\n"
        );
        channel.send(wire::STDERR, said.as_bytes())?;
    }
    let missing = if job.out {
        // The host program does not wait for the end of an archive that has none.
        send_out_folder(channel).unwrap_or_else(|error| Some(error.to_string()))
    } else {
        None
    };
    let kind = match missing {
        None => wire::EXIT,
        Some(what) => {
            payload.extend_from_slice(what.as_bytes());
            wire::OUT_INCOMPLETE
        }
    };
    Ok((kind, payload))
}

fn start(job: &JobHeader, stdout: Stdio, stderr: Stdio) -> io::Result<Child> {
    fs::create_dir_all(below_root(&job.directory)?)?;
    let directory = CString::new(job.directory.as_str())?;
    let mut args = job.args.iter().map(|arg| OsString::from_vec(arg.clone()));
    let mut command = Command::new(&job.program);
    if let Some(name) = args.next() {
        command.arg0(name);
    }
    command.args(args).env_clear();
    for pair in &job.env {
        if let Some(split) = pair.iter().position(|byte| *byte == b'=') {
            command.env(
                OsStr::from_bytes(&pair[..split]),
                OsStr::from_bytes(&pair[split + 1..]),
            );
        }
    }
    command
        .stdin(if job.stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(stdout)
        .stderr(stderr);
    sys::start_in(&mut command, CString::new(ROOT)?, directory);
    // The command holds our ends of its streams, and goes here.
    command.spawn()
}

/// Runs the program and carries its streams until it and all that it started have ended.
fn attend(channel: &Channel, job: &JobHeader) -> io::Result<Ending> {
    let ((stdout, to_stdout), (stderr, to_stderr)) = (io::pipe()?, io::pipe()?);
    let ended = AtomicBool::new(false);
    // Both carriers are in place before the program is: it may be quicker than they are.
    let ready = Barrier::new(3);
    std::thread::scope(|scope| {
        scope.spawn(|| carry_output(channel, wire::STDOUT, stdout, &ready));
        scope.spawn(|| carry_output(channel, wire::STDERR, stderr, &ready));
        ready.wait();
        let mut child = match start(job, to_stdout.into(), to_stderr.into()) {
            Ok(child) => child,
            Err(error) => {
                if job.stdin {
                    drop_input(channel);
                }
                return Ok(Ending::NotStarted(error.raw_os_error().unwrap_or(0)));
            }
        };
        let to_child = child.stdin.take();
        if job.stdin {
            scope.spawn(|| carry_input(channel, to_child, &ended));
        }
        let status = child.wait();
        // What it left running would keep the streams open for ever. The host program is told of the end only after this.
        sys::kill_all_others();
        ended.store(true, Ordering::Release);
        status.map(ending)
    })
}

fn ending(status: ExitStatus) -> Ending {
    match (status.code(), status.signal()) {
        (Some(code), _) => Ending::Exited(code),
        (None, Some(signal)) => Ending::Signaled(signal),
        (None, None) => Ending::NotStarted(0),
    }
}

fn carry_output(channel: &Channel, kind: u32, mut from: impl Read, ready: &Barrier) {
    // What a program has written is on its way before it goes on: its next step may be the kernel's last. Where the kernel refuses, it
    // is only later.
    let _ = sys::go_first();
    let mut buffer = vec![0; 64 << 10];
    ready.wait();
    loop {
        match from.read(&mut buffer) {
            Ok(0) | Err(_) => return,
            Ok(count) => {
                if channel.send(kind, &buffer[..count]).is_err() {
                    return;
                }
            }
        }
    }
}

/// Input comes in pieces with their lengths; an empty piece is its end. When the program ends first, the host program is told, and
/// what it had sent by then is read and dropped, so that the next job is found where it starts.
fn carry_input(mut channel: &Channel, mut to: Option<impl Write>, ended: &AtomicBool) {
    let mut told = false;
    loop {
        if ended.load(Ordering::Acquire) && !told {
            told = true;
            to = None;
            if channel.send(wire::INPUT_END, &[]).is_err() {
                return;
            }
        }
        // To wait in the channel stops the whole machine, so that is for when nothing runs any more.
        if !told && !channel.has_input() {
            std::thread::sleep(INPUT_PERIOD);
            continue;
        }
        let Ok(length) = wire::read_u32(&mut channel) else {
            return;
        };
        if length == 0 {
            return;
        }
        let mut piece = vec![0; length as usize];
        if channel.read_exact(&mut piece).is_err() {
            return;
        }
        // A program may close its input before it has read all of it.
        if to.as_mut().is_some_and(|to| to.write_all(&piece).is_err()) {
            to = None;
        }
    }
}

/// Ends the input of a program that was not started: the next job is behind it.
fn drop_input(channel: &Channel) {
    carry_input(channel, None::<io::Sink>, &AtomicBool::new(true));
}

/// A path inside the lab as seen from here. A relative one starts at the lab's root.
fn below_root(path: &str) -> io::Result<PathBuf> {
    let mut full = PathBuf::from(ROOT);
    for part in Path::new(path).components() {
        match part {
            Component::Normal(name) => full.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    "a path with .. in it",
                ));
            }
        }
    }
    Ok(full)
}

/// Unpacks the archive. If something in it finds no place, the rest is read all the same: what comes next is behind it.
///
/// # Errors
/// The outer one: it is no archive. The inner one: the first member that found no place.
fn unpack(input: &mut impl Read, root: &Path) -> io::Result<io::Result<()>> {
    let mut archive = cpio::Reader::new(input);
    let mut placed = Ok(());
    while let Some(entry) = archive.next_entry()? {
        if placed.is_ok() {
            placed = place(&mut archive, &entry, root).map_err(|error| context(error, &entry.name));
        }
    }
    Ok(placed)
}

fn place(archive: &mut impl Read, entry: &Entry, root: &Path) -> io::Result<()> {
    let path = below_root(&entry.name)?;
    debug_assert!(path.starts_with(root));
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    let permissions = fs::Permissions::from_mode(entry.mode & 0o7777);
    match entry.mode & cpio::TYPE {
        cpio::DIRECTORY => {
            fs::create_dir_all(&path)?;
            fs::set_permissions(&path, permissions)
        }
        cpio::SYMLINK => {
            let mut target = Vec::new();
            archive.read_to_end(&mut target)?;
            std::os::unix::fs::symlink(OsStr::from_bytes(&target), &path)
        }
        _ => {
            let mut file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(permissions.mode())
                .open(&path)?;
            copy(archive, &mut file)?;
            file.set_permissions(permissions)
        }
    }
}

/// Fewer and larger pieces than io::copy's: each system call is slow here.
fn copy(from: &mut impl Read, to: &mut impl Write) -> io::Result<()> {
    let mut buffer = vec![0; 256 << 10];
    loop {
        match from.read(&mut buffer)? {
            0 => return Ok(()),
            count => to.write_all(&buffer[..count])?,
        }
    }
}

/// Sends the out folder as one archive, in frames. Says what could not be sent.
fn send_out_folder(channel: &Channel) -> io::Result<Option<String>> {
    let frames = io::BufWriter::with_capacity(wire::LARGEST_PAYLOAD, Frames(channel));
    let mut archive = cpio::Writer::new(frames);
    let mut refused = Refused::default();
    pack(&mut archive, Path::new(OUT), Path::new(""), &mut refused)?;
    archive.finish()?;
    Ok(refused.said())
}

/// Names that no archive can hold.
#[derive(Default)]
struct Refused {
    first: Option<PathBuf>,
    more: usize,
}

impl Refused {
    fn add(&mut self, name: PathBuf) {
        match &self.first {
            None => self.first = Some(name),
            Some(_) => self.more += 1,
        }
    }

    fn said(self) -> Option<String> {
        let said = format!("{:?} is a name that cannot be sent", self.first?);
        Some(match self.more {
            0 => said,
            more => format!("{said}, and there are {more} more"),
        })
    }
}

fn pack(
    archive: &mut cpio::Writer<impl Write>,
    folder: &Path,
    name: &Path,
    refused: &mut Refused,
) -> io::Result<()> {
    let mut members = fs::read_dir(folder)?.collect::<io::Result<Vec<_>>>()?;
    members.sort_by_key(fs::DirEntry::file_name);
    for member in members {
        let path = member.path();
        let name = name.join(member.file_name());
        let about = fs::symlink_metadata(&path)?;
        let Some(text) = name.to_str().filter(|text| *text != cpio::TRAILER) else {
            refused.add(name);
            continue;
        };
        let mode = about.permissions().mode();
        if about.is_dir() {
            archive.add(&Entry::new(text, mode, 0), io::empty())?;
            pack(archive, &path, &name, refused)?;
        } else if about.is_symlink() {
            let target = fs::read_link(&path)?.into_os_string().into_vec();
            archive.add(
                &Entry::new(text, mode, target.len() as u64),
                target.as_slice(),
            )?;
        } else if about.is_file() {
            archive.add(&Entry::new(text, mode, about.len()), File::open(&path)?)?;
        }
    }
    Ok(())
}

struct Frames<'a>(&'a Channel);

impl Write for Frames<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.send(wire::FILES, bytes)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

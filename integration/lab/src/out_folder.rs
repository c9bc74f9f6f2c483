//! Unpacks what a program left in its out folder, inside a folder here and nowhere else.

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::{Component, Path, PathBuf};
use std::sync::mpsc::{self, Receiver, SyncSender};
use std::thread::JoinHandle;

use crate::cpio::{self, Entry, Reader};

/// Pieces that wait for a slow disk, of 1 MiB at most; then the lab waits.
const PIECES: usize = 4;

/// Unpacks an archive that comes in pieces.
#[derive(Debug)]
pub(crate) struct Unpacker {
    pieces: SyncSender<Vec<u8>>,
    thread: JoinHandle<io::Result<()>>,
}

impl Unpacker {
    /// Gets ready to unpack into `folder`, which is created if it is not there.
    pub(crate) fn start(folder: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&folder)?;
        let (pieces, receiver) = mpsc::sync_channel(PIECES);
        let thread = std::thread::spawn(move || {
            unpack(
                Pieces {
                    receiver,
                    piece: Vec::new(),
                    taken: 0,
                },
                &folder,
            )
        });
        Ok(Self { pieces, thread })
    }

    /// Takes the next piece, when there is room for it.
    pub(crate) fn take(&self, piece: Vec<u8>) {
        // If unpacking has failed, finish tells why.
        let _ = self.pieces.send(piece);
    }

    /// Waits until all is there.
    pub(crate) fn finish(self) -> io::Result<()> {
        drop(self.pieces);
        self.thread
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("unpacking the out folder panicked")))
    }
}

struct Pieces {
    receiver: Receiver<Vec<u8>>,
    piece: Vec<u8>,
    taken: usize,
}

impl Read for Pieces {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.taken >= self.piece.len() {
            let Ok(piece) = self.receiver.recv() else {
                return Ok(0);
            };
            self.piece = piece;
            self.taken = 0;
        }
        let count = self
            .piece
            .get(self.taken..)
            .unwrap_or_default()
            .read(buffer)?;
        self.taken = self.taken.saturating_add(count);
        Ok(count)
    }
}

fn unpack(pieces: impl Read, folder: &Path) -> io::Result<()> {
    let mut archive = Reader::new(pieces);
    while let Some(entry) = archive.next_entry()? {
        let path = place(folder, &entry)?;
        let mode = fs::Permissions::from_mode(entry.mode & 0o777);
        match entry.mode & cpio::TYPE {
            cpio::DIRECTORY => {
                if !path.is_dir() {
                    fs::create_dir(&path)?;
                }
                // Ours to write to, whatever it was there.
                fs::set_permissions(
                    &path,
                    fs::Permissions::from_mode(entry.mode & 0o777 | 0o700),
                )?;
            }
            cpio::SYMLINK => {
                let mut target = String::new();
                archive.read_to_string(&mut target)?;
                crate::store::remove(&path)?;
                std::os::unix::fs::symlink(target, &path)?;
            }
            _ => {
                crate::store::remove(&path)?;
                let mut file = File::create_new(&path)?;
                io::copy(&mut archive, &mut file)?;
                file.set_permissions(mode)?;
            }
        }
    }
    Ok(())
}

/// Where an entry goes. What ran in the lab chose the name, so it may only lead downwards, and through no link that it made before.
fn place(folder: &Path, entry: &Entry) -> io::Result<PathBuf> {
    let refuse = || {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{:?} would lie outside the out folder", entry.name),
        )
    };
    let mut path = folder.to_owned();
    let mut parts = Path::new(&entry.name).components().peekable();
    while let Some(part) = parts.next() {
        let Component::Normal(name) = part else {
            return Err(refuse());
        };
        path.push(name);
        if parts.peek().is_some() && fs::symlink_metadata(&path)?.is_symlink() {
            return Err(refuse());
        }
    }
    if path == folder {
        Err(refuse())
    } else {
        Ok(path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpio::{DIRECTORY, FILE, SYMLINK, Writer};

    fn unpacked(members: &[(&str, u32, &[u8])]) -> (tempfile::TempDir, io::Result<()>) {
        let mut writer = Writer::new(Vec::new());
        for (name, mode, data) in members {
            writer
                .add(&Entry::new(*name, *mode, data.len() as u64), *data)
                .unwrap();
        }
        let bytes = writer.finish().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let unpacker = Unpacker::start(folder.path().join("out")).unwrap();
        for piece in bytes.chunks(7) {
            unpacker.take(piece.to_vec());
        }
        let result = unpacker.finish();
        (folder, result)
    }

    #[test]
    fn files_arrive_unharmed() {
        let data: Vec<u8> = (0..100_000_u32).map(|number| number as u8).collect();
        let (folder, result) = unpacked(&[
            ("d", DIRECTORY | 0o555, b""),
            ("d/f", FILE | 0o640, &data),
            ("l", SYMLINK | 0o777, b"d/f"),
        ]);
        result.unwrap();
        let out = folder.path().join("out");
        assert_eq!(fs::read(out.join("l")).unwrap(), data);
        assert_eq!(
            fs::metadata(out.join("d/f")).unwrap().permissions().mode() & 0o777,
            0o640
        );
    }

    #[test]
    fn nothing_leaves_the_folder() {
        for members in [
            [("../f", FILE, b"x".as_slice()), ("g", FILE, b"")],
            [("/f", FILE, b"x"), ("g", FILE, b"")],
            [("l", SYMLINK, b".."), ("l/f", FILE, b"x")],
        ] {
            let (folder, result) = unpacked(&members);
            assert_eq!(result.unwrap_err().kind(), io::ErrorKind::InvalidData);
            assert!(!folder.path().join("f").exists());
        }
    }

    #[test]
    fn an_archive_that_breaks_off_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let unpacker = Unpacker::start(folder.path().join("out")).unwrap();
        unpacker.take(b"070701".to_vec());
        unpacker.finish().unwrap_err();
    }
}

//! The newc archive format of cpio: what the kernel unpacks at boot, and what carries files into and out of the lab.
//!
//! This file is also compiled into the lab's init, so it uses nothing but the standard library.

use std::io::{self, Read, Write};

/// File type bits of `mode`: a directory.
pub const DIRECTORY: u32 = 0o040_000;
/// File type bits of `mode`: an ordinary file.
pub const FILE: u32 = 0o100_000;
/// File type bits of `mode`: a symbolic link.
pub const SYMLINK: u32 = 0o120_000;
/// File type bits of `mode`: a character device.
pub const DEVICE: u32 = 0o020_000;
/// Mask of the file type bits.
pub const TYPE: u32 = 0o170_000;

/// The name that ends an archive, which no member can have.
pub const TRAILER: &str = "TRAILER!!!";
const HEADER_BYTES: usize = 110;
/// A name longer than this is damage, not a path.
const LONGEST_NAME: u64 = 4096;

/// One member of an archive; its `size` bytes of data follow it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Path inside the archive, without a leading slash.
    pub name: String,
    /// File type and permission bits.
    pub mode: u32,
    /// Bytes of data.
    pub size: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
}

impl Entry {
    /// An entry that is no device.
    #[must_use]
    pub fn new(name: impl Into<String>, mode: u32, size: u64) -> Self {
        Self {
            name: name.into(),
            mode,
            size,
            device: (0, 0),
        }
    }
}

/// Writes archives to anything that takes bytes.
#[derive(Debug)]
pub struct Writer<W> {
    out: W,
    number: u32,
}

impl<W: Write> Writer<W> {
    /// An archive that has no members yet.
    pub fn new(out: W) -> Self {
        Self { out, number: 0 }
    }

    /// Adds a member, with exactly `entry.size` bytes from `data`.
    ///
    /// # Errors
    /// When reading or writing fails, when `data` ends early (a file shrank), or when the format cannot hold the member (4 GiB and more).
    pub fn add(&mut self, entry: &Entry, data: impl Read) -> io::Result<()> {
        self.number = self.number.wrapping_add(1);
        let size = u32::try_from(entry.size).map_err(|_| {
            io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{}: 4 GiB or more do not fit", entry.name),
            )
        })?;
        let name_bytes = u32::try_from(entry.name.len().saturating_add(1))
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "a name that is too long"))?;
        let (major, minor) = entry.device;
        let fields = [
            self.number,
            entry.mode,
            0,
            0,
            1,
            0,
            size,
            0,
            0,
            major,
            minor,
            name_bytes,
            0,
        ];
        self.out.write_all(b"070701")?;
        for field in fields {
            write!(self.out, "{field:08x}")?;
        }
        self.out.write_all(entry.name.as_bytes())?;
        self.out.write_all(&[0])?;
        self.pad(
            HEADER_BYTES
                .saturating_add(entry.name.len())
                .saturating_add(1),
        )?;
        let copied = io::copy(&mut data.take(entry.size), &mut self.out)?;
        if copied != entry.size {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                format!("{}: ended {copied} bytes in, of {}", entry.name, entry.size),
            ));
        }
        self.pad(usize::try_from(entry.size % 4).unwrap_or(0))
    }

    /// Ends the archive.
    ///
    /// # Errors
    /// When writing fails.
    pub fn finish(mut self) -> io::Result<W> {
        self.add(&Entry::new(TRAILER, 0, 0), io::empty())?;
        self.out.flush()?;
        Ok(self.out)
    }

    fn pad(&mut self, written: usize) -> io::Result<()> {
        const ZEROS: [u8; 3] = [0; 3];
        let missing = written.wrapping_neg() % 4;
        self.out.write_all(ZEROS.get(..missing).unwrap_or_default())
    }
}

/// Reads archives from anything that gives bytes.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    left: u64,
    padding: u64,
}

impl<R: Read> Reader<R> {
    /// Starts at the first member.
    pub fn new(input: R) -> Self {
        Self {
            input,
            left: 0,
            padding: 0,
        }
    }

    /// The next member, or `None` at the end. What was not read of the last one's data is skipped.
    ///
    /// # Errors
    /// When reading fails or the bytes are not a newc archive.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let rest = self.left.saturating_add(self.padding);
        self.left = 0;
        self.padding = 0;
        skip(&mut self.input, rest)?;
        let mut header = [0_u8; HEADER_BYTES];
        self.input.read_exact(&mut header)?;
        let (magic, fields) = header.split_at(6);
        if magic != b"070701" {
            return Err(damaged("no newc header where one was due"));
        }
        let mut numbers = [0_u32; 13];
        for (number, digits) in numbers.iter_mut().zip(fields.chunks_exact(8)) {
            let digits =
                std::str::from_utf8(digits).map_err(|_| damaged("a header field is no number"))?;
            *number = u32::from_str_radix(digits, 16)
                .map_err(|_| damaged("a header field is no number"))?;
        }
        let [_, mode, _, _, _, _, size, _, _, major, minor, name_bytes, _] = numbers;
        let name_bytes = u64::from(name_bytes);
        if name_bytes == 0 || name_bytes > LONGEST_NAME {
            return Err(damaged("a name of an impossible length"));
        }
        let mut name = Vec::new();
        Read::by_ref(&mut self.input)
            .take(name_bytes)
            .read_to_end(&mut name)?;
        if name.pop() != Some(0) {
            return Err(damaged("a name without its end"));
        }
        let name = String::from_utf8(name).map_err(|_| damaged("a name that is not UTF-8"))?;
        skip(
            &mut self.input,
            (HEADER_BYTES as u64)
                .saturating_add(name_bytes)
                .wrapping_neg()
                % 4,
        )?;
        if name == TRAILER {
            return Ok(None);
        }
        self.left = u64::from(size);
        self.padding = u64::from(size).wrapping_neg() % 4;
        Ok(Some(Entry {
            name,
            mode,
            size: u64::from(size),
            device: (major, minor),
        }))
    }
}

/// Reads the data of the current member.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = Read::by_ref(&mut self.input).take(self.left).read(buffer)?;
        if count == 0 && self.left > 0 && !buffer.is_empty() {
            return Err(damaged("the archive ends inside a file"));
        }
        self.left = self.left.saturating_sub(count as u64);
        Ok(count)
    }
}

fn skip(input: &mut impl Read, bytes: u64) -> io::Result<()> {
    if io::copy(&mut input.take(bytes), &mut io::sink())? == bytes {
        Ok(())
    } else {
        Err(damaged("the archive ends early"))
    }
}

fn damaged(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn archive(members: &[(&str, u32, &[u8])]) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new());
        for (name, mode, data) in members {
            writer
                .add(&Entry::new(*name, *mode, data.len() as u64), *data)
                .unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_is_written_is_read_back() {
        let members: [(&str, u32, &[u8]); 4] = [
            ("a", DIRECTORY | 0o755, b""),
            ("a/b", FILE | 0o600, b"five!"),
            ("a/l", SYMLINK | 0o777, b"b"),
            ("ccc", FILE | 0o755, &[0; 4097]),
        ];
        let bytes = archive(&members);
        assert_eq!(bytes.len() % 4, 0);
        let mut reader = Reader::new(bytes.as_slice());
        for (name, mode, data) in members {
            assert_eq!(
                reader.next_entry().unwrap().unwrap(),
                Entry::new(name, mode, data.len() as u64)
            );
            let mut back = Vec::new();
            reader.read_to_end(&mut back).unwrap();
            assert_eq!(back, data);
        }
        assert_eq!(reader.next_entry().unwrap(), None);
    }

    #[test]
    fn unread_data_is_skipped() {
        let bytes = archive(&[("x", FILE, b"12345"), ("y", FILE, b"6")]);
        let mut reader = Reader::new(bytes.as_slice());
        reader.next_entry().unwrap();
        assert_eq!(reader.next_entry().unwrap().unwrap().name, "y");
    }

    #[test]
    fn a_cut_archive_is_an_error_at_every_length() {
        let bytes = archive(&[("x", FILE, b"12345")]);
        for cut in 0..bytes.len() - 3 {
            let mut reader = Reader::new(&bytes[..cut]);
            let whole = loop {
                match reader.next_entry() {
                    Ok(Some(_)) => {}
                    Ok(None) => break true,
                    Err(_) => break false,
                }
            };
            assert!(!whole, "{cut} bytes were taken for a whole archive");
        }
    }

    #[test]
    fn a_file_that_shrank_is_an_error() {
        let mut writer = Writer::new(Vec::new());
        let error = writer
            .add(&Entry::new("x", FILE, 9), &b"123"[..])
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

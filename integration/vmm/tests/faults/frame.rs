//! The bytes of a message, for whoever wants to change them: what `migration::frame` describes.

use std::io::{self, Read};

pub(crate) const HEADER_BYTES: usize = 16;
pub(crate) const HELLO: u32 = 1;
pub(crate) const OFFER: u32 = 2;
pub(crate) const REFUSE: u32 = 3;
pub(crate) const PAGES: u32 = 4;
pub(crate) const STATE: u32 = 5;
pub(crate) const READY: u32 = 6;
pub(crate) const COMMIT: u32 = 7;
pub(crate) const RUNNING: u32 = 8;

/// The name of a kind of message.
pub(crate) const fn name(kind: u32) -> &'static str {
    match kind {
        HELLO => "Hello",
        OFFER => "Offer",
        REFUSE => "Refuse",
        PAGES => "Pages",
        STATE => "State",
        READY => "Ready",
        COMMIT => "Commit",
        RUNNING => "Running",
        _ => "no message",
    }
}

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) kind: u32,
    pub(crate) number: u32,
    pub(crate) content: Vec<u8>,
}

impl Frame {
    /// With the right length and checksum.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let length = u32::try_from(self.content.len()).expect("it is short");
        let mut bytes: Vec<u8> = [self.kind, self.number, length]
            .into_iter()
            .flat_map(u32::to_le_bytes)
            .collect();
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&bytes);
        checksum.update(&self.content);
        bytes.extend(checksum.finalize().to_le_bytes());
        bytes.extend(&self.content);
        bytes
    }

    /// A message that is known to be right.
    pub(crate) fn parse(bytes: &[u8]) -> Self {
        Self {
            kind: field(bytes, 0),
            number: field(bytes, 4),
            content: bytes[HEADER_BYTES..].to_vec(),
        }
    }
}

/// The bytes of the next message.
pub(crate) fn read(mut stream: impl Read) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; HEADER_BYTES];
    stream.read_exact(&mut bytes)?;
    let length = usize::try_from(field(&bytes, 8)).expect("a length");
    bytes.resize(HEADER_BYTES + length, 0);
    stream.read_exact(&mut bytes[HEADER_BYTES..])?;
    Ok(bytes)
}

/// The kind of the message with these bytes.
pub(crate) fn kind(bytes: &[u8]) -> u32 {
    field(bytes, 0)
}

fn field(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

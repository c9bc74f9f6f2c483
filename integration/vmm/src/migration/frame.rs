//! Messages as bytes, and bytes of unknown origin as messages.
//!
//! | bytes | |
//! |---|---|
//! | 0..4 | kind |
//! | 4..8 | number of the message in its direction, from 0 |
//! | 8..12 | bytes of the content |
//! | 12..16 | CRC-32 of bytes 0..12 and the content |
//! | 16.. | content |
//!
//! All little-endian. A length is compared with the limit of its kind before anything is allocated.

use std::io::{self, Read, Write};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::limit::{Limited, Over, Stream};
use super::offer::Offer;
use crate::memory::PAGE_BYTES;
use crate::snapshot::header::MAX_STATE_BYTES;

/// The version of the protocol that this program speaks, and the only one.
pub const VERSION: u32 = 4;
/// Pages of one message.
pub const PAGES: usize = 128;

/// The kind of [`Message::Pages`].
const PAGES_KIND: u32 = 4;
const HEADER_BYTES: usize = 16;
const CHECKSUM_AT: usize = 12;
const PAGE_ENTRY_BYTES: usize = PAGE_BYTES + 4;
/// Bytes of a reason why.
const REASON_BYTES: usize = 4096;

/// What one side tells the other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: a guest wants to come.
    Hello(Hello),
    /// Destination: what guests may have there.
    Offer(Box<Offer>),
    /// Either: it will not be, and why.
    Refuse(String),
    /// Source: pages by their numbers, with their content one after the other.
    Pages {
        /// Ascending where this program sends them; the same page may come again.
        numbers: Vec<u32>,
        /// [`PAGE_BYTES`] for each.
        content: Vec<u8>,
    },
    /// Source: the guest is stopped, all its pages have been sent, and this is the rest.
    State(Vec<u8>),
    /// Destination: all of it is in place.
    Ready,
    /// Source: the guest is yours. From here on the source does not run it.
    Commit,
    /// Destination: it is mine. Sent before it runs.
    Running,
}

/// A guest wants to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// [`VERSION`].
    pub version: u32,
    /// Bytes of guest memory.
    pub memory_bytes: u64,
    /// It has interrupt controllers and a timer in the kernel.
    pub has_platform: bool,
}

impl Message {
    const fn kind(&self) -> u32 {
        match self {
            Self::Hello(_) => 1,
            Self::Offer(_) => 2,
            Self::Refuse(_) => 3,
            Self::Pages { .. } => PAGES_KIND,
            Self::State(_) => 5,
            Self::Ready => 6,
            Self::Commit => 7,
            Self::Running => 8,
        }
    }

    fn content(&self) -> Vec<u8> {
        // Serialising to a vector fails where a sequence does not know its length: these do.
        match self {
            Self::Hello(hello) => postcard::to_allocvec(hello).unwrap_or_default(),
            Self::Offer(offer) => postcard::to_allocvec(offer).unwrap_or_default(),
            Self::Refuse(reason) => shortened(reason).as_bytes().to_vec(),
            Self::Pages { numbers, content } => {
                let mut bytes = Vec::with_capacity(PAGE_ENTRY_BYTES.saturating_mul(numbers.len()));
                bytes.extend(numbers.iter().flat_map(|number| number.to_le_bytes()));
                bytes.extend_from_slice(content);
                bytes
            }
            Self::State(bytes) => bytes.clone(),
            Self::Ready | Self::Commit | Self::Running => Vec::new(),
        }
    }

    fn parse(kind: u32, content: Vec<u8>) -> Result<Self, FrameError> {
        Ok(match kind {
            1 => Self::Hello(whole(&content)?),
            2 => Self::Offer(Box::new(whole(&content)?)),
            3 => Self::Refuse(String::from_utf8(content).map_err(|_| FrameError::Text)?),
            PAGES_KIND => PagesRef::parse(&content)?.to_message(),
            5 => Self::State(content),
            6 => Self::Ready,
            7 => Self::Commit,
            8 => Self::Running,
            kind => return Err(FrameError::Kind { kind }),
        })
    }
}

/// As much of it as a message has room for.
fn shortened(reason: &str) -> &str {
    let ends = (0..=REASON_BYTES).rev();
    ends.filter_map(|end| reason.get(..end.min(reason.len())))
        .next()
        .unwrap_or_default()
}

/// The most bytes that the content of a message may have; `None` where there is no such kind.
fn limit(kind: u32) -> Option<usize> {
    Some(match kind {
        1 => 32,
        // Two tables of KVM_MAX_CPUID_ENTRIES, of a hundred bytes of JSON each, and a thousand MSRs.
        2 => 96 << 10,
        3 => REASON_BYTES,
        PAGES_KIND => PAGES.saturating_mul(PAGE_ENTRY_BYTES),
        5 => usize::try_from(MAX_STATE_BYTES).unwrap_or(usize::MAX),
        6..=8 => 0,
        _ => return None,
    })
}

fn whole<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, FrameError> {
    let (value, rest) = postcard::take_from_bytes(bytes)?;
    if rest.is_empty() {
        Ok(value)
    } else {
        Err(FrameError::TrailingBytes { bytes: rest.len() })
    }
}

/// The content of [`Message::Pages`] where it has come: what takes the pages copies them once.
#[derive(Clone, Copy, Debug)]
pub(super) struct PagesRef<'a> {
    numbers: &'a [[u8; 4]],
    content: &'a [u8],
}

impl<'a> PagesRef<'a> {
    fn parse(bytes: &'a [u8]) -> Result<Self, FrameError> {
        let count = bytes.len().checked_div(PAGE_ENTRY_BYTES).unwrap_or(0);
        if bytes.len() != count.saturating_mul(PAGE_ENTRY_BYTES) {
            return Err(FrameError::PartOfAPage { bytes: bytes.len() });
        }
        let (numbers, content) = bytes
            .split_at_checked(count.saturating_mul(4))
            .unwrap_or_default();
        let (numbers, _) = numbers.as_chunks();
        Ok(Self { numbers, content })
    }

    /// Each page by its number.
    pub(super) fn iter(self) -> impl ExactSizeIterator<Item = (u32, &'a [u8])> {
        let numbers = self
            .numbers
            .iter()
            .map(|number| u32::from_le_bytes(*number));
        numbers.zip(self.content.chunks_exact(PAGE_BYTES))
    }

    fn to_message(self) -> Message {
        Message::Pages {
            numbers: self.iter().map(|(number, _)| number).collect(),
            content: self.content.to_vec(),
        }
    }
}

/// A message, of which pages are still where they have come.
pub(super) enum Incoming<'a> {
    Pages(PagesRef<'a>),
    Other(Message),
}

/// One end of a stream.
pub(super) struct Link<S> {
    stream: S,
    sent: u32,
    received: u32,
    /// The last message of pages. It is kept, so that memory is neither zeroed nor mapped for each.
    buffer: Vec<u8>,
    /// A part of a message may have been sent: nothing that follows would be read as a message.
    is_cut: bool,
}

/// How long the other side may take to be told that it will not be.
const FAREWELL: Duration = Duration::from_millis(50);

impl<S: Stream> Link<Limited<S>> {
    /// Tells the other side, if it can still be told, why it will not be. Nothing else may follow.
    pub(super) fn refuse(&mut self, reason: &impl ToString) {
        self.stream.commit(FAREWELL);
        if !self.is_cut {
            let _ = self.send(&Message::Refuse(reason.to_string()));
        }
    }
}

impl<S: Read + Write> Link<S> {
    pub(super) fn new(stream: S) -> Self {
        Self {
            stream,
            sent: 0,
            received: 0,
            buffer: Vec::new(),
            is_cut: false,
        }
    }

    pub(super) fn stream(&mut self) -> &mut S {
        &mut self.stream
    }

    pub(super) fn send(&mut self, message: &Message) -> Result<(), FrameError> {
        let content = message.content();
        let bytes = encode(message.kind(), self.sent, &content);
        self.sent = self.sent.wrapping_add(1);
        self.is_cut = true;
        self.stream.write_all(&bytes)?;
        self.stream.flush()?;
        self.is_cut = false;
        Ok(())
    }

    /// Sends these pages, of which `read` puts each one's content where it is given to.
    pub(super) fn send_pages<E: From<FrameError>>(
        &mut self,
        numbers: &[u32],
        mut read: impl FnMut(u32, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let content_bytes = numbers.len().saturating_mul(PAGE_ENTRY_BYTES);
        self.buffer
            .resize(HEADER_BYTES.saturating_add(content_bytes), 0);
        let (header, content) = self.buffer.split_at_mut(HEADER_BYTES);
        let (entries, pages) = content.split_at_mut(numbers.len().saturating_mul(4));
        let places = entries
            .chunks_exact_mut(4)
            .zip(pages.chunks_exact_mut(PAGE_BYTES));
        for (&number, (entry, page)) in numbers.iter().zip(places) {
            entry.copy_from_slice(&number.to_le_bytes());
            read(number, page)?;
        }
        header.copy_from_slice(&self::header(PAGES_KIND, self.sent, content));
        self.sent = self.sent.wrapping_add(1);
        self.is_cut = true;
        let sent = self.stream.write_all(&self.buffer);
        sent.and_then(|()| self.stream.flush())
            .map_err(FrameError::from)?;
        self.is_cut = false;
        Ok(())
    }

    pub(super) fn receive(&mut self) -> Result<Message, FrameError> {
        Ok(match self.incoming()? {
            Incoming::Pages(pages) => pages.to_message(),
            Incoming::Other(message) => message,
        })
    }

    /// As [`receive`](Self::receive), without a copy of pages.
    pub(super) fn incoming(&mut self) -> Result<Incoming<'_>, FrameError> {
        let mut header = [0; HEADER_BYTES];
        self.stream.read_exact(&mut header)?;
        let [kind, number, bytes, stored] = fields(&header);
        let limit_bytes = limit(kind).ok_or(FrameError::Kind { kind })?;
        let actual_bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        if actual_bytes > limit_bytes {
            return Err(FrameError::TooLong {
                kind,
                actual_bytes,
                limit_bytes,
            });
        }
        let mut other = Vec::new();
        let content = if kind == PAGES_KIND {
            &mut self.buffer
        } else {
            &mut other
        };
        content.resize(actual_bytes, 0);
        self.stream.read_exact(content)?;
        let computed = checksum(&header, content);
        if stored != computed {
            return Err(FrameError::Checksum { stored, computed });
        }
        if number != self.received {
            return Err(FrameError::Number {
                actual: number,
                expected: self.received,
            });
        }
        self.received = self.received.wrapping_add(1);
        if kind == PAGES_KIND {
            return Ok(Incoming::Pages(PagesRef::parse(&self.buffer)?));
        }
        Message::parse(kind, other).map(Incoming::Other)
    }
}

fn encode(kind: u32, number: u32, content: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES.saturating_add(content.len()));
    bytes.extend(header(kind, number, content));
    bytes.extend_from_slice(content);
    bytes
}

fn header(kind: u32, number: u32, content: &[u8]) -> [u8; HEADER_BYTES] {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    let mut header = [0; HEADER_BYTES];
    let (places, _) = header.as_chunks_mut();
    for (place, field) in places.iter_mut().zip([kind, number, length]) {
        *place = field.to_le_bytes();
    }
    let checksum = checksum(&header, content).to_le_bytes();
    let (places, _) = header.as_chunks_mut();
    if let Some(place) = places.last_mut() {
        *place = checksum;
    }
    header
}

fn fields(header: &[u8; HEADER_BYTES]) -> [u32; 4] {
    let (fields, _) = header.as_chunks();
    let mut values = [0; 4];
    for (value, field) in values.iter_mut().zip(fields) {
        *value = u32::from_le_bytes(*field);
    }
    values
}

fn checksum(header: &[u8], content: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header.get(..CHECKSUM_AT).unwrap_or(header));
    hasher.update(content);
    hasher.finalize()
}

/// What an error of the stream means here.
fn stream(error: &io::Error) -> String {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    match error.kind() {
        UnexpectedEof | BrokenPipe | ConnectionReset => {
            "the other side has closed the connection, or has ended".to_owned()
        }
        _ => format!("the connection: {error}"),
    }
}

/// A message could not be sent or received.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum FrameError {
    /// The stream was cut.
    #[error("{}", stream(.0))]
    Stream(io::Error),
    /// The time for it is over.
    #[error("it was not done within {} ms, which is the limit", allowed.as_millis())]
    Late {
        /// The limit.
        allowed: Duration,
    },
    /// The move was cancelled on this side.
    #[error("the move was cancelled")]
    Cancelled,
    /// There is no such message.
    #[error("there is no message of kind {kind}")]
    Kind {
        /// Its number.
        kind: u32,
    },
    /// It is longer than any of its kind.
    #[error("a message of kind {kind} with {actual_bytes} bytes; the limit is {limit_bytes}")]
    TooLong {
        /// Its kind.
        kind: u32,
        /// By its header.
        actual_bytes: usize,
        /// Of its kind.
        limit_bytes: usize,
    },
    /// It was changed on its way.
    #[error("the message's checksum is {computed:#010x}, and {stored:#010x} came with it")]
    Checksum {
        /// As it came.
        stored: u32,
        /// Of what came.
        computed: u32,
    },
    /// One is missing, or came twice.
    #[error("message {actual} came, and {expected} is the next one")]
    Number {
        /// As it came.
        actual: u32,
        /// The next one.
        expected: u32,
    },
    /// Its content cannot be read.
    #[error("the message's content: {0}")]
    Postcard(#[from] postcard::Error),
    /// A reason that is no text.
    #[error("a reason that is not UTF-8")]
    Text,
    /// There is something behind its content.
    #[error("{bytes} bytes behind the message's content")]
    TrailingBytes {
        /// How many.
        bytes: usize,
    },
    /// Pages are sent whole.
    #[error("pages of {bytes} bytes in all; each has 4,100 with its number")]
    PartOfAPage {
        /// Of the content.
        bytes: usize,
    },
}

impl From<io::Error> for FrameError {
    fn from(error: io::Error) -> Self {
        match Over::of(&error) {
            Some(Over::Late { allowed }) => Self::Late { allowed },
            Some(Over::Cancelled) => Self::Cancelled,
            None => Self::Stream(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    use super::super::offer::tests::{largest_offer, small_offer};
    use super::*;

    fn all() -> Vec<Message> {
        vec![
            Message::Hello(Hello {
                version: 1,
                memory_bytes: 128 << 20,
                has_platform: true,
            }),
            Message::Offer(Box::new(small_offer())),
            Message::Refuse("no AMX here".into()),
            Message::Pages {
                numbers: vec![3, 77],
                content: (0..2 * PAGE_BYTES).map(|i| (i / 5) as u8).collect(),
            },
            Message::State(vec![7; 100]),
            Message::Ready,
            Message::Commit,
            Message::Running,
        ]
    }

    fn bytes(messages: &[Message]) -> Vec<u8> {
        let mut link = Link::new(VecDeque::new());
        for message in messages {
            link.send(message).unwrap();
        }
        link.stream.into()
    }

    fn read(bytes: &[u8]) -> (Vec<Message>, FrameError) {
        let mut link = Link::new(VecDeque::from(bytes.to_vec()));
        let mut messages = vec![];
        loop {
            match link.receive() {
                Ok(message) => messages.push(message),
                Err(error) => return (messages, error),
            }
        }
    }

    #[test]
    fn what_is_sent_is_received() {
        let (messages, end) = read(&bytes(&all()));
        assert_eq!(messages, all());
        assert!(matches!(end, FrameError::Stream(_)));
    }

    #[test]
    fn every_bit_flip_ends_the_stream_before_what_was_changed() {
        for (place, message) in all().into_iter().enumerate() {
            let before = bytes(&all()[..place]).len();
            let good = bytes(&all());
            let length = HEADER_BYTES + message.content().len();
            for bit in 0..8 * length.min(200) {
                let mut bytes = good.clone();
                bytes[before + bit / 8] ^= 1 << (bit % 8);
                let (messages, _) = read(&bytes);
                assert_eq!(messages, all()[..place], "bit {bit} of {message:?}");
            }
        }
    }

    #[test]
    fn every_cut_ends_the_stream_with_whole_messages() {
        let good = bytes(&all());
        for end in (0..good.len()).step_by(7) {
            let (messages, error) = read(&good[..end]);
            assert_eq!(messages, all()[..messages.len()]);
            assert!(matches!(error, FrameError::Stream(_)), "{error}");
        }
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        for fill in ["x", "ü", "€", "𝄞"] {
            let long = format!("y{}", fill.repeat(REASON_BYTES));
            let (messages, _) = read(&bytes(&[Message::Refuse(long.clone())]));
            let [Message::Refuse(reason)] = messages.as_slice() else {
                panic!("{messages:?}")
            };
            assert!(long.starts_with(reason) && reason.len() > REASON_BYTES - 4);
        }
    }

    #[test]
    fn the_largest_description_has_room() {
        let message = Message::Offer(Box::new(largest_offer()));
        let (messages, _) = read(&bytes(std::slice::from_ref(&message)));
        assert_eq!(messages, [message]);
    }

    #[test]
    fn messages_in_another_order_are_refused() {
        let mut twice = bytes(&[Message::Ready]);
        twice.extend(twice.clone());
        let (messages, error) = read(&twice);
        assert_eq!(messages, [Message::Ready]);
        assert!(matches!(
            error,
            FrameError::Number {
                actual: 0,
                expected: 1
            }
        ));
    }

    /// What is read in place is the same message, whatever the one before has left in the buffer.
    #[test]
    fn pages_are_sent_as_their_message_is() {
        let pages: Vec<u32> = vec![0, 3, 7, 70_000];
        let content = |number: u32| [u8::try_from(number % 251).unwrap() + 1; PAGE_BYTES];
        for lengths in [[4, 1], [1, 4], [2, 2], [0, 3]] {
            let mut link = Link::new(VecDeque::new());
            let mut messages = vec![];
            for numbers in lengths.map(|length| &pages[..length]) {
                link.send_pages(numbers, |number, page| {
                    page.copy_from_slice(&content(number));
                    Ok::<_, FrameError>(())
                })
                .unwrap();
                messages.push(Message::Pages {
                    numbers: numbers.to_vec(),
                    content: numbers.iter().copied().flat_map(content).collect(),
                });
            }
            let sent: Vec<u8> = link.stream.into_iter().collect();
            assert_eq!(sent, bytes(&messages), "{lengths:?}");
        }
    }

    #[test]
    fn lengths_beyond_the_limit_of_their_kind_allocate_nothing() {
        for kind in 0..12 {
            let mut header = vec![];
            for field in [kind, 0, u32::MAX, 0] {
                header.extend(field.to_le_bytes());
            }
            let (_, error) = read(&header);
            match limit(kind) {
                Some(_) => assert!(matches!(error, FrameError::TooLong { .. }), "{error}"),
                None => assert!(matches!(error, FrameError::Kind { .. }), "{error}"),
            }
        }
    }

    #[test]
    fn contents_that_are_made_up_are_refused_or_valid() {
        let mut rng = StdRng::seed_from_u64(3);
        let (mut refused, mut valid) = (0, 0);
        for _ in 0..20_000 {
            let kind = rng.random_range(1..9);
            let most = limit(kind).unwrap().min(9000);
            let mut content = vec![0; rng.random_range(0..=most)];
            rng.fill(content.as_mut_slice());
            let (messages, _) = read(&encode(kind, 0, &content));
            match messages.first() {
                Some(message) => {
                    valid += 1;
                    assert_eq!(read(&bytes(std::slice::from_ref(message))).0[0], *message);
                }
                None => refused += 1,
            }
        }
        assert!(
            refused > 100 && valid > 100,
            "{refused} refused, {valid} valid"
        );
    }
}

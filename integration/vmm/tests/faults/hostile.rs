//! The other side has bad intentions: its messages are whole, and what they say is made up.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::net::Shutdown;
use std::thread;
use std::time::Duration;

use amx_fuzz_targets::encoded;
use amx_vmm::migration::frame::VERSION;
use amx_vmm::migration::{ReceiveError, Received, SendError, receive, send};
use amx_vmm::{Console, Host};

use crate::frame::{self, Frame, HEADER_BYTES};
use crate::platform::{self, State};
use crate::table::{self, Outcome, Row};
use crate::trial::{self, PATIENCE};
use crate::{connection, fields};

/// A page with its number.
const PAGE_ENTRY_BYTES: usize = 4100;
/// XTILEDATA.
const TILES: u64 = 1 << 18;
/// After so many made-up guests, a real one must still be taken and compute on.
const SOMETIMES: usize = 100;

pub(crate) fn run(host: &Host) -> Vec<Row> {
    let messages = platform::messages(host, true);
    let mut rows = promises(host);
    rows.extend([hello(host, &messages), out_of_turn(host, &messages)]);
    rows.extend(state(host, &messages));
    rows.push(extended(host, &messages));
    rows.push(extended_bytes(host, &messages));
    rows.extend(destination(host));
    rows
}

/// Memory and controllers that Hello has not promised.
pub(crate) fn promises(host: &Host) -> Vec<Row> {
    let with_platform = platform::messages(host, true);
    let without = platform::messages(host, false);
    let mut row = Row::new("a hostile source: controllers");
    for (promised, other) in [(&with_platform, &without), (&without, &with_platform)] {
        let played = play(host, &with(promised, 2, other[2].content.clone()));
        let error = played.err().expect("it was promised otherwise");
        assert!(matches!(error, ReceiveError::Platform { .. }), "{error}");
        row.add(Outcome::Refused);
    }
    vec![row, pages(host, &with_platform)]
}

/// Plays a source that says all of this at once; what the destination makes of it.
pub(crate) fn play(host: &Host, messages: &[Frame]) -> Result<Received, ReceiveError> {
    let bytes = messages
        .iter()
        .map(Frame::to_bytes)
        .collect::<Vec<_>>()
        .concat();
    play_bytes(host, &bytes)
}

fn play_bytes(host: &Host, bytes: &[u8]) -> Result<Received, ReceiveError> {
    let (here, there) = trial::pair();
    thread::scope(|scope| {
        let here = &here;
        scope.spawn(move || {
            // Whoever has refused does not read on.
            let mut writer = here;
            let _ = writer.write_all(bytes);
            let _ = here.shutdown(Shutdown::Write);
        });
        scope.spawn(move || {
            let mut reader = here;
            let _ = io::copy(&mut reader, &mut io::sink());
        });
        let received = receive(host, there, PATIENCE);
        // The writer may wait for room.
        let _ = here.shutdown(Shutdown::Both);
        received
    })
}

/// What became of a guest that was made up.
fn judge(received: Result<Received, ReceiveError>) -> Outcome {
    match received {
        Err(error) => {
            assert!(!error.to_string().is_empty());
            Outcome::Refused
        }
        Ok(mut received) => {
            // In the lab it may do its worst: a host that dies of it is one of these tests alone.
            if table::in_lab() {
                let _ = received
                    .vm
                    .run(&Console::default(), Duration::from_millis(1));
            }
            Outcome::Taken
        }
    }
}

/// A guest that is real still comes, and computes on.
fn another_guest(host: &Host) {
    let (here, there) = trial::pair();
    let mut vm = trial::guest(host);
    let (sent, received) = trial::moved(host, &mut vm, here, there);
    assert_eq!(trial::outcome(host, vm, &sent, received), Outcome::Moved);
}

/// The messages with one of them replaced.
fn with(messages: &[Frame; 4], index: usize, content: Vec<u8>) -> Vec<Frame> {
    let mut messages = messages.to_vec();
    messages[index].content = content;
    messages
}

fn hello(host: &Host, messages: &[Frame; 4]) -> Row {
    let mut row = Row::new("a hostile source: Hello");
    let content = &messages[0].content;
    let mut contents = Vec::new();
    for at in 0..content.len() {
        for byte in [0, 1, 0x7f, 0x80, 0xff] {
            let mut changed = content.clone();
            changed[at] = byte;
            contents.push(changed);
        }
        contents.push(content[..at].to_vec());
    }
    contents.push([content.as_slice(), &[0]].concat());
    // A version, sizes that no memory has, whether there are controllers.
    for bytes in [
        0_u64,
        1,
        4095,
        4096,
        1 << 20,
        (256 << 20) + 4096,
        1 << 40,
        u64::MAX,
    ] {
        contents.push(postcard::to_stdvec(&(VERSION, bytes, true)).expect("plain data"));
    }
    contents.push(postcard::to_stdvec(&(u32::MAX, 2_u64 << 20, true)).expect("plain data"));
    contents.push(postcard::to_stdvec(&(VERSION, 2_u64 << 20, false)).expect("plain data"));
    contents.retain(|changed| changed != content);
    for (number, changed) in contents.into_iter().enumerate() {
        if !table::is_tried(number, 4) {
            continue;
        }
        let played = play(host, &with(messages, 0, changed));
        row.add(judge(played));
    }
    another_guest(host);
    row
}

fn pages(host: &Host, messages: &[Frame; 4]) -> Row {
    let mut row = Row::new("a hostile source: Pages");
    let content = &messages[1].content;
    let count = content.len() / PAGE_ENTRY_BYTES;
    let mut refused = Vec::new();
    // Beyond the memory, in each place.
    for at in 0..count {
        for number in [512_u32, 0x8000_0000, u32::MAX] {
            let mut changed = content.clone();
            changed[at * 4..at * 4 + 4].copy_from_slice(&number.to_le_bytes());
            refused.push(changed);
        }
    }
    // Parts of pages, and more than one message may have.
    for bytes in [1, 3, 4, 4096, 4099, content.len() - 1] {
        refused.push(content[..bytes].to_vec());
    }
    refused.push(vec![0; 129 * PAGE_ENTRY_BYTES]);
    for (number, changed) in refused.into_iter().enumerate() {
        if !table::is_tried(number, 4) {
            continue;
        }
        let error = play(host, &with(messages, 1, changed)).err();
        let error = error.expect("there is no such page");
        assert!(
            matches!(error, ReceiveError::Page(_) | ReceiveError::Frame(_)),
            "{error}"
        );
        row.add(Outcome::Refused);
    }
    // None, the same again and again, and in no order.
    let mut same = content.clone();
    same[..4 * count].fill(0);
    let mut backwards = content.clone();
    backwards[..4].copy_from_slice(&511_u32.to_le_bytes());
    for changed in [vec![], same, backwards] {
        let played = play(host, &with(messages, 1, changed));
        row.add(judge(played));
    }
    another_guest(host);
    row
}

/// Every kind of message in every place, wrong numbers, and lengths that nothing has room for.
fn out_of_turn(host: &Host, messages: &[Frame; 4]) -> Row {
    let mut row = Row::new("a hostile source: out of turn");
    let offer = Frame::parse(&connection::recorded(host)[1]).content;
    for place in 0..messages.len() {
        let number = u32::try_from(place).expect("small");
        for kind in (0..=9).filter(|kind| table::is_tried(place + *kind as usize, 3)) {
            let content = match kind {
                frame::HELLO => messages[0].content.clone(),
                frame::OFFER => offer.clone(),
                frame::REFUSE => vec![0xff; 9],
                frame::PAGES => messages[1].content.clone(),
                frame::STATE => messages[2].content.clone(),
                _ => vec![],
            };
            let mut all = messages.to_vec();
            all[place] = Frame {
                kind,
                number,
                content,
            };
            // Pages may come again, and none of them may come.
            if all.as_slice() == messages {
                continue;
            }
            let error = play(host, &all).err();
            let error = error.unwrap_or_else(|| panic!("{} as message {place}", frame::name(kind)));
            assert!(!error.to_string().is_empty());
            row.add(Outcome::Refused);
        }
        for number in [number.wrapping_sub(1), number + 1, u32::MAX] {
            let mut all = messages.to_vec();
            all[place].number = number;
            let error = play(host, &all).err().expect("it is the wrong number");
            assert!(matches!(error, ReceiveError::Frame(_)), "{error}");
            row.add(Outcome::Refused);
        }
        for kind in [1, 2, 3, 4, 5, 6, 7, 8, u32::MAX] {
            let mut bytes: Vec<u8> = messages[..place].iter().flat_map(Frame::to_bytes).collect();
            for field in [kind, number, u32::MAX, 0] {
                bytes.extend(field.to_le_bytes());
            }
            let error = play_bytes(host, &bytes).err().expect("it is too long");
            assert!(matches!(error, ReceiveError::Frame(_)), "{error}");
            row.add(Outcome::Refused);
        }
    }
    another_guest(host);
    row
}

/// Each field of State.
fn state(host: &Host, messages: &[Frame; 4]) -> Vec<Row> {
    let good = State::parse(&messages[2].content);
    let mut rows: BTreeMap<String, Row> = BTreeMap::new();
    for (turn, (path, changed)) in fields::changed(&good).into_iter().enumerate() {
        // The other vCPU's are the same fields; the states have a test of their own.
        if path.starts_with("/vcpus/1") || path.starts_with("/extended") {
            continue;
        }
        if !table::is_tried(turn, 16) {
            continue;
        }
        let part = path
            .split('/')
            .filter(|name| !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit()));
        let part = part
            .take(2)
            .collect::<Vec<_>>()
            .join(" ")
            .replace("vcpus", "vCPU");
        let played = play(host, &with(messages, 2, changed.to_bytes()));
        let row = rows
            .entry(part.clone())
            .or_insert_with(|| Row::new(format!("a hostile source: State, {part}")));
        row.add(judge(played));
        if turn % SOMETIMES == 0 {
            another_guest(host);
        }
    }
    another_guest(host);
    rows.into_values().collect()
}

/// The bytes of an encoded state, by docs/state-format.md.
const VCPU: usize = 16;
const XCR0: usize = 20;
const XFD: usize = 28;
const XFD_ERR: usize = 36;
const XSTATE_BV: usize = 44;
const MXCSR: usize = 52;
const MXCSR_MASK: usize = 56;
const COMPONENTS: usize = 60;
const PALETTES: usize = 62;
const AREA: usize = 64;
const TABLES: usize = 68;

/// The extended state, field by field: each rule is broken with right checksums, and each is refused.
fn extended(host: &Host, messages: &[Frame; 4]) -> Row {
    let mut row = Row::new("a hostile source: extended state against its rules");
    let good = State::parse(&messages[2].content);
    let state = first(&good.extended);
    let word = |at: usize| u64::from_le_bytes(state[at..at + 8].try_into().expect("eight bytes"));
    let put = |at: usize, bytes: &[u8]| {
        let mut state = state.to_vec();
        state[at..at + bytes.len()].copy_from_slice(bytes);
        state
    };
    let mut crafted: Vec<(String, Vec<u8>)> = Vec::new();
    let in_use = word(XSTATE_BV);
    for xcr0 in [
        0,
        2,
        5,
        0x27,
        0xe3,
        1 << 17 | 7,
        1 << 18 | 7,
        1 << 63 | 7,
        u64::MAX,
    ] {
        crafted.push((format!("XCR0 {xcr0:#x}"), put(XCR0, &xcr0.to_le_bytes())));
    }
    // What the host dies of: a component is in use that IA32_XFD disables.
    for xfd in [TILES, TILES | 1 << 17, in_use, 1 << 2, 1 << 63, u64::MAX] {
        // Without tiles the host has no such bit, which is refused as well.
        crafted.push((
            format!("XFD {xfd:#x}, in use {in_use:#x}"),
            put(XFD, &xfd.to_le_bytes()),
        ));
    }
    for xfd_err in [1_u64, 1 << 62, u64::MAX] {
        crafted.push((
            format!("XFD_ERR {xfd_err:#x}"),
            put(XFD_ERR, &xfd_err.to_le_bytes()),
        ));
    }
    for xstate_bv in [0, in_use | 1 << 3, in_use | 1 << 62, 1 << 63, u64::MAX] {
        crafted.push((
            format!("XSTATE_BV {xstate_bv:#x}"),
            put(XSTATE_BV, &xstate_bv.to_le_bytes()),
        ));
    }
    let mask = encoded::dword(state, MXCSR_MASK);
    for bit in (0..32).filter(|bit| mask >> bit & 1 == 0) {
        let mxcsr = 1_u32 << bit | 0x1f80;
        crafted.push((
            format!("MXCSR {mxcsr:#x}"),
            put(MXCSR, &mxcsr.to_le_bytes()),
        ));
    }
    if let Some(tilecfg) = line(state, 17) {
        // Palette, reserved, bytes of a row, rows (SDM Vol. 2A, LDTILECFG); it takes any start row.
        for (at, byte) in [
            (0, 2),
            (0, 255),
            (2, 1),
            (15, 1),
            (16, 65),
            (17, 1),
            (32, 1),
            (48, 17),
            (56, 1),
        ] {
            crafted.push((
                format!("TILECFG byte {at} = {byte}"),
                put(tilecfg + at, &[byte]),
            ));
        }
    }
    // Lengths, and what another version would have.
    for (at, what) in [
        (0, "magic"),
        (8, "version"),
        (10, "flags"),
        (12, "length"),
        (COMPONENTS, "components"),
        (PALETTES, "palettes"),
        (VCPU, "number of the vCPU"),
        (AREA, "area"),
    ] {
        crafted.push((what.to_owned(), put(at, &[state[at] ^ 1])));
    }
    for (what, state) in crafted {
        let changed = State {
            extended: replaced(&good.extended, first(&good.extended), &state),
            ..good.clone()
        };
        let error = play(host, &with(messages, 2, changed.to_bytes())).err();
        let error = error.unwrap_or_else(|| panic!("{what}: it was taken"));
        let is_named = matches!(error, ReceiveError::State(_) | ReceiveError::Unfit(_));
        assert!(is_named, "{what}: {error}");
        row.add(Outcome::Refused);
    }
    // IA32_XFD among the other MSRs, where nobody compares it with what is in use.
    for index in [0x1c4, 0x1c5] {
        let mut changed = good.clone();
        changed.vcpus[0]
            .msrs
            .push(amx_vmm::registers::Msr { index, data: TILES });
        let error = play(host, &with(messages, 2, changed.to_bytes()))
            .err()
            .expect("it is refused");
        assert!(matches!(error, ReceiveError::State(_)), "{error}");
        row.add(Outcome::Refused);
    }
    another_guest(host);
    row
}

/// Bytes of a state, with a right checksum: refused, or valid.
fn extended_bytes(host: &Host, messages: &[Frame; 4]) -> Row {
    let mut row = Row::new("a hostile source: bytes of the extended state");
    let good = State::parse(&messages[2].content);
    let state = first(&good.extended);
    let step = if table::in_lab() { 97 } else { 13 };
    for at in (0..state.len() - 4).filter(|at| *at < TABLES || at % step == 0) {
        if table::in_lab() && at < TABLES && at % 4 != 0 {
            continue;
        }
        let mut state = state.to_vec();
        state[at] ^= 0x11;
        let changed = State {
            extended: replaced(&good.extended, first(&good.extended), &state),
            ..good.clone()
        };
        let played = play(host, &with(messages, 2, changed.to_bytes()));
        row.add(judge(played));
    }
    // Without one of the states, with too much, and cut.
    let bytes = &good.extended;
    for extended in [
        vec![],
        bytes[..bytes.len() - 1].to_vec(),
        bytes[..48].to_vec(),
        [bytes.as_slice(), &[0]].concat(),
    ] {
        let changed = State {
            extended,
            ..good.clone()
        };
        let error = play(host, &with(messages, 2, changed.to_bytes()))
            .err()
            .expect("it is none");
        assert!(matches!(error, ReceiveError::State(_)), "{error}");
        row.add(Outcome::Refused);
    }
    another_guest(host);
    row
}

/// The states with another one as the first, whose checksum is made right.
fn replaced(good: &[u8], first: &[u8], state: &[u8]) -> Vec<u8> {
    let mut state = state.to_vec();
    encoded::seal_checksum(&mut state);
    [&state, &good[first.len()..]].concat()
}

/// The first of the states.
fn first(states: &[u8]) -> &[u8] {
    let bytes = encoded::dword(states, 12);
    &states[..usize::try_from(bytes).expect("short")]
}

/// Where the first line of a component's record is, if it has one.
fn line(state: &[u8], component: u16) -> Option<usize> {
    let half = |at: usize| u16::from_le_bytes([state[at], state[at + 1]]);
    let mut at = TABLES + 12 * usize::from(half(COMPONENTS)) + 12 * usize::from(half(PALETTES));
    while at + 8 < state.len() - 4 {
        let size = usize::try_from(encoded::dword(state, at + 4)).expect("short");
        let lines = size.div_ceil(64);
        let bitmap = &state[at + 8..at + 8 + 8 * lines.div_ceil(64)];
        let content = at + 8 + bitmap.len();
        if half(at) == component {
            return Some(content);
        }
        let stored = (0..lines).filter(|line| bitmap[line / 8] >> (line % 8) & 1 == 1);
        at = content + stored.map(|line| 64.min(size - 64 * line)).sum::<usize>();
    }
    None
}

/// A destination says what it should not: the source keeps the guest.
fn destination(host: &Host) -> Vec<Row> {
    let [_, offer, _, _, ready, _, running] = connection::recorded(host);
    let answers = [offer, ready, running];
    let mut before = Row::new("a hostile destination: before Commit");
    let mut behind = Row::new("a hostile destination: instead of Running");
    let step = if table::in_lab() { 16 } else { 1 };
    let offer = Frame::parse(&answers[0]);
    // The Offer's bytes, which say nothing in the end: it then closes the connection.
    for at in (0..offer.content.len()).step_by((offer.content.len() / 100).max(1) * step) {
        let mut changed = offer.clone();
        changed.content[at] ^= 0xff;
        let (outcome, undecided) = answered(host, &changed.to_bytes());
        assert!(!undecided, "byte {at} of the Offer");
        before.add(outcome);
    }
    for place in 0..answers.len() {
        let said = answers[..place].concat();
        let row = if place == 2 { &mut behind } else { &mut before };
        let number = u32::try_from(place).expect("small");
        for kind in 0..=9 {
            let right = frame::kind(&answers[place]);
            if kind == right {
                continue;
            }
            let content = match kind {
                frame::OFFER => offer.content.clone(),
                frame::HELLO => vec![1, 0, 0],
                _ => vec![],
            };
            let message = Frame {
                kind,
                number,
                content,
            }
            .to_bytes();
            let (outcome, undecided) = answered(host, &[said.as_slice(), &message].concat());
            // Whole, with a right checksum, and no word that the destination has not the guest.
            assert_eq!(
                undecided,
                place == 2,
                "{} as answer {place}",
                frame::name(kind)
            );
            row.add(outcome);
        }
        for cut in [0, 1, HEADER_BYTES - 1] {
            let cut = &answers[place][..cut];
            row.add(answered(host, &[said.as_slice(), cut].concat()).0);
        }
        for kind in [2, 3, 6, 8, u32::MAX] {
            let header = [kind, number, u32::MAX, 0].map(u32::to_le_bytes);
            row.add(answered(host, &[said.as_slice(), header.as_flattened()].concat()).0);
        }
    }
    vec![before, behind]
}

/// What becomes of a guest whose source gets this answer to all that it says; and whether that source knows that
/// it does not know who has it.
fn answered(host: &Host, bytes: &[u8]) -> (Outcome, bool) {
    let (here, there) = trial::pair();
    let mut vm = trial::guest(host);
    let sent = thread::scope(|scope| {
        let there = &there;
        scope.spawn(move || {
            let mut writer = there;
            let _ = writer.write_all(bytes);
            let _ = there.shutdown(Shutdown::Write);
            let mut reader = there;
            let _ = io::copy(&mut reader, &mut io::sink());
        });
        let console = Console::default();
        send(
            &mut vm,
            host,
            (&console, None),
            here,
            &trial::options(),
            |_| {},
        )
    });
    let Err(error) = sent else {
        return (Outcome::Lost, false);
    };
    // Where it stands still until somebody has looked: there is none, so it may run here.
    trial::assert_computes_on(host, vm);
    (Outcome::Stays, matches!(error, SendError::Undecided))
}

//! The connection is cut: at each message, at each byte of the hand-over, at random bytes; on either
//! side's end.

use amx_vmm::Host;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::frame::{self, HEADER_BYTES};
use crate::relay::{Fate, Moment, Relay};
use crate::table::{self, Outcome, Row};
use crate::trial;

/// The messages of a move in their order; the destination says 1, 4 and 6.
pub(crate) const MESSAGES: [u32; 7] = [
    frame::HELLO,
    frame::OFFER,
    frame::PAGES,
    frame::STATE,
    frame::READY,
    frame::COMMIT,
    frame::RUNNING,
];

pub(crate) fn run(host: &Host) -> Vec<Row> {
    let lengths = recorded(host).map(|message| message.len());
    let mut rng = StdRng::seed_from_u64(6);
    let mut rows = Vec::new();
    for at_source in [true, false] {
        let end = if at_source {
            "source's"
        } else {
            "destination's"
        };
        for (kind, length) in MESSAGES.into_iter().zip(lengths) {
            let mut row = Row::new(format!("{} cut, the {end} end", frame::name(kind)));
            for cut in places(kind, length, &mut rng) {
                row.add(cut_at(host, at_source, kind, cut));
            }
            rows.push(row);
        }
    }
    rows
}

/// Commit and Running at their beginnings, in the middle, and behind their ends.
pub(crate) fn hand_over(host: &Host) -> Vec<Row> {
    let mut row = Row::new("Commit or Running cut");
    for at_source in [true, false] {
        for kind in [frame::COMMIT, frame::RUNNING] {
            for cut in [0, HEADER_BYTES / 2, HEADER_BYTES] {
                row.add(cut_at(host, at_source, kind, cut));
            }
        }
    }
    vec![row]
}

/// The bytes of each message of a move that succeeds; of several Pages the first.
pub(crate) fn recorded(host: &Host) -> [Vec<u8>; 7] {
    let mut messages = Vec::new();
    let (here, there) = trial::pair();
    let relay = Relay::new(here, |moment, message| {
        if matches!(moment, Moment::Written | Moment::Read) {
            messages.push(message.clone());
        }
        Fate::Pass
    });
    let mut vm = trial::guest(host);
    let (sent, received) = trial::moved(host, &mut vm, relay, there);
    sent.expect("it is moved");
    trial::assert_computes_on(host, received.expect("it has come").vm);
    MESSAGES.map(|kind| {
        let first = messages.iter().find(|message| frame::kind(message) == kind);
        first.expect("each kind is sent").clone()
    })
}

/// After how many bytes a message is cut.
fn places(kind: u32, length: usize, rng: &mut StdRng) -> Vec<usize> {
    if matches!(kind, frame::COMMIT | frame::RUNNING) && !table::in_lab() {
        return (0..=length).collect();
    }
    let mut places = vec![
        0,
        rng.random_range(1..HEADER_BYTES),
        HEADER_BYTES,
        length - 1,
        length,
    ];
    let others = if table::in_lab() { 0 } else { 5 };
    places.extend((0..others).map(|_| rng.random_range(1..length)));
    places.sort_unstable();
    places.dedup();
    places
}

/// The first message of its kind is cut after so many bytes.
fn cut_at(host: &Host, at_source: bool, kind: u32, cut: usize) -> Outcome {
    let hook = |moment, message: &mut Vec<u8>| {
        let is_here = matches!(moment, Moment::Writing | Moment::Read);
        if is_here && frame::kind(message) == kind {
            Fate::CutAfter(cut)
        } else {
            Fate::Pass
        }
    };
    let (here, there) = trial::pair();
    let mut vm = trial::guest(host);
    let (sent, received) = if at_source {
        trial::moved(host, &mut vm, Relay::new(here, hook), there)
    } else {
        trial::moved(host, &mut vm, here, Relay::new(there, hook))
    };
    let outcome = trial::outcome(host, vm, &sent, received);
    // Before Commit is whole, nothing can be there.
    let decided = match kind {
        frame::RUNNING => true,
        frame::COMMIT => cut == HEADER_BYTES,
        _ => false,
    };
    assert!(decided || outcome == Outcome::Stays, "{outcome:?}");
    outcome
}

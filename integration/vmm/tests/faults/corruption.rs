//! Bits change on their way: in each field of each message, in both directions.

use std::time::Duration;

use amx_vmm::Host;
use amx_vmm::migration::Options;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use crate::connection::{self, MESSAGES};
use crate::frame::{self, HEADER_BYTES};
use crate::relay::{Fate, Moment, Relay};
use crate::table::{self, Outcome, Row};
use crate::trial::{self, PATIENCE};

/// A length that has grown makes the reader wait for what never comes.
const SHORT: Duration = Duration::from_millis(500);
const FIELDS: [&str; 5] = ["kind", "number", "length", "checksum", "content"];

pub(crate) fn run(host: &Host) -> Vec<Row> {
    let lengths = connection::recorded(host).map(|message| message.len());
    let mut rng = StdRng::seed_from_u64(8);
    let mut rows = Vec::new();
    for (kind, length) in MESSAGES.into_iter().zip(lengths) {
        let mut row = Row::new(format!("{}: a field changed on its way", frame::name(kind)));
        for (field, first) in FIELDS.into_iter().zip((0..).step_by(4)) {
            let end = if first == HEADER_BYTES {
                length
            } else {
                first + 4
            };
            // The lowest bit, the highest, and others.
            let mut bits = vec![first * 8, end * 8 - 1];
            if table::in_lab() {
                bits.truncate(1);
            }
            let others = if table::in_lab() { 0 } else { 3 };
            bits.extend(
                (0..others)
                    .filter(|_| end > first)
                    .map(|_| rng.random_range(first * 8..end * 8)),
            );
            for bit in bits.into_iter().filter(|_| end > first) {
                row.add(changed(host, kind, bit, field));
            }
        }
        rows.push(row);
    }
    rows
}

/// One bit of the first message of its kind is another one.
fn changed(host: &Host, kind: u32, bit: usize, field: &str) -> Outcome {
    let mut found = false;
    let (here, there) = trial::pair();
    let relay = Relay::new(here, |moment, message| {
        let is_here = matches!(moment, Moment::Writing | Moment::Read);
        if is_here && !found && frame::kind(message) == kind {
            found = true;
            // State is not always as long.
            let byte = (bit / 8).min(message.len() - 1);
            message[byte] ^= 1 << (bit % 8);
        }
        Fate::Pass
    });
    let mut vm = trial::guest(host);
    // Where the guest stays, it may as well for the time that is over; where it goes, it has to have the time.
    let deadline = if kind == frame::RUNNING {
        PATIENCE
    } else {
        SHORT
    };
    let options = Options {
        deadline,
        answer: SHORT,
        ..trial::options()
    };
    let (sent, received) = trial::moved_with(host, &mut vm, relay, there, &options);
    // What is not Running is no word that it has not the guest: it has.
    let expected = if kind == frame::RUNNING {
        Outcome::Moved
    } else {
        Outcome::Stays
    };
    let why = sent.as_ref().err().map(ToString::to_string);
    let outcome = trial::outcome(host, vm, &sent, received);
    assert_eq!(
        outcome,
        expected,
        "{}, {field}, bit {bit}: {why:?}",
        frame::name(kind)
    );
    outcome
}

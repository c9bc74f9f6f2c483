//! Tile instructions without the permission.

use std::io;

use crate::report::Event;
use crate::worker::{Outcome, Work};
use crate::{sys, tiles};

/// A process that has not asked.
pub struct Denied;

impl Denied {
    /// Takes SIGILL by itself, and goes on behind the instruction.
    pub fn start() -> io::Result<Self> {
        sys::skip_on_sigill()?;
        Ok(Self)
    }
}

impl Work for Denied {
    fn round(&mut self, round: u64) -> io::Result<Outcome> {
        let before = sys::sigills();
        // LDTILECFG itself is not refused by XFD.
        tiles::load_config(&tiles::FULL);
        tiles::zero_skippable();
        let found = tiles::store_config();
        tiles::release();
        sys::sleep();
        let raised = sys::sigills() - before;
        Ok(if raised != 1 {
            Outcome::Wrong(Event::Failed {
                round,
                what: format!("TILEZERO without permission raised {raised} SIGILL"),
            })
        } else if let Some(wrong) = tiles::difference(8, &tiles::FULL.0, &found.0, 64) {
            wrong.in_round(round)
        } else {
            Outcome::Right
        })
    }
}

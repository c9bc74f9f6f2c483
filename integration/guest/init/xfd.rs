//! Reads IA32_XFD, which is armed while a process without the permission runs.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::report::Event;
use crate::sys;
use crate::worker::{Outcome, Work};

const IA32_XFD: u64 = 0x1c4;
const XTILEDATA: u64 = 1 << 18;

/// A processor's MSRs.
pub struct Reader(File);

impl Reader {
    /// Of `processor`, on which this process then stays. Says what is missing.
    pub fn open(processor: u32) -> Result<Self, String> {
        let path = format!("/dev/cpu/{processor}/msr");
        let file = File::open(&path).map_err(|error| format!("{path}: {error}"))?;
        sys::run_on(processor).map_err(|error| format!("processor {processor}: {error}"))?;
        Ok(Self(file))
    }
}

impl Work for Reader {
    fn round(&mut self, round: u64) -> io::Result<Outcome> {
        let mut value = [0; 8];
        self.0.read_exact_at(&mut value, IA32_XFD)?;
        let value = u64::from_le_bytes(value);
        sys::sleep();
        Ok(if value == XTILEDATA {
            Outcome::Right
        } else {
            Outcome::Wrong(Event::Failed {
                round,
                what: format!("IA32_XFD is {value:#x}, and not {XTILEDATA:#x}"),
            })
        })
    }
}

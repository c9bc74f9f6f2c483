//! One process: its voice, when it has to end, and which work it does.

use std::io::{self, PipeWriter, Write};
use std::time::Duration;

use crate::report::{Event, Load, Report};
use crate::{denied, machine, product, sys, vectors, xfd};

/// What a process says goes to the init, a line at once.
pub struct Voice {
    process: u8,
    to_init: PipeWriter,
}

impl Voice {
    /// Of this process.
    pub fn new(process: u8, to_init: PipeWriter) -> Self {
        Self { process, to_init }
    }

    /// Says it.
    pub fn say(&mut self, event: Event) -> io::Result<()> {
        let process = self.process;
        let line = format!("{}\n", Report::Process { process, event });
        // Less than PIPE_BUF, so it is not mixed with what others say.
        self.to_init.write_all(line.as_bytes())
    }
}

/// How one round ended.
pub enum Outcome {
    /// All was right.
    Right,
    /// It was not.
    Wrong(Event),
}

/// Does the work of `load` until SIGTERM comes.
pub fn work(load: Load, process: u8, processors: u32, voice: &mut Voice) -> io::Result<()> {
    sys::end_on_sigterm()?;
    voice.say(Event::Start(load))?;
    if load != Load::Vectors && machine::amx_flags()?.is_empty() {
        return lacks(voice, "AMX");
    }
    match load {
        Load::Int8 => {
            // Both on one processor: the tiles change hands at each switch.
            sys::run_on(0)?;
            rounds(voice, &mut product::Bytes::start(process, false)?)
        }
        Load::Bf16 => rounds(voice, &mut product::Halves::start(process)?),
        Load::Signals => rounds(voice, &mut product::Bytes::start(process, true)?),
        Load::Denied => rounds(voice, &mut denied::Denied::start()?),
        Load::Xfd => match xfd::Reader::open(processors.saturating_sub(1)) {
            Ok(mut reader) => rounds(voice, &mut reader),
            Err(why) => lacks(voice, &why),
        },
        Load::Vectors => match vectors::Vectors::start(process) {
            Ok(mut vectors) => rounds(voice, &mut vectors),
            Err(why) => lacks(voice, why),
        },
    }
}

/// Says so again and again: a host that the guest is moved to wants to know it as well.
fn lacks(voice: &mut Voice, why: &str) -> io::Result<()> {
    while !sys::has_to_end() {
        voice.say(Event::Lacks(why.to_owned()))?;
        std::thread::sleep(Duration::from_millis(10));
    }
    voice.say(Event::End(0))
}

/// Work that goes on for ever.
pub trait Work {
    /// Does round `round`.
    fn round(&mut self, round: u64) -> io::Result<Outcome>;
}

fn rounds(voice: &mut Voice, work: &mut impl Work) -> io::Result<()> {
    let mut round = 0;
    while !sys::has_to_end() {
        round += 1;
        match work.round(round)? {
            Outcome::Right => voice.say(Event::Round(round))?,
            Outcome::Wrong(event) => voice.say(event)?,
        }
    }
    voice.say(Event::End(round))
}

//! The process that has the guest, from its arrival to its end.

use amx_vmm::words::in_words;
use std::fs;
use std::io::{Write, stderr};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use amx_guest::report::Wish;
use amx_vmm::linux::Guest;
use amx_vmm::linux::devices::Switched;
use amx_vmm::memory::PAGE_BYTES;
use amx_vmm::migration::{Options, Progress, SendError};
use amx_vmm::{Host, Linux, Snapshot, file};
use anyhow::Context;
use cpuid_amx::Policy;

use crate::cli::{Here, Receive, Restore, Run};
use crate::control::{self, Order, Request, Socket};
use crate::event::{Code, Ending, Event, State};
use crate::screen::Screen;
use crate::signals;

/// How long the guest runs before the next look at orders and at what it has said.
const SLICE: Duration = Duration::from_millis(20);
/// What there is to do with a guest that may be elsewhere.
const UNDECIDED: &str = "it is not known whether the guest is elsewhere already; `amx-vmm resume` if it is not, \
    `amx-vmm stop` if it is";
/// What is told several times within a round is told no more often.
const TELL: Duration = Duration::from_millis(200);

/// Boots a guest.
pub(crate) fn boot(run: &Run, screen: &mut Screen) -> anyhow::Result<Code> {
    let host = Host::probe_at(&run.here.kvm)?;
    let mut linux = Linux::new(&run.kernel);
    if let Some(path) = &run.initramfs {
        linux.initramfs = fs::read(path).with_context(|| path.display().to_string())?;
    }
    if let Some(words) = &run.append {
        linux.command_line.push(' ');
        linux.command_line.push_str(words);
    }
    linux.vcpus = run.vcpus;
    linux.memory_bytes = run.memory_mib << 20;
    if run.hide_amx {
        linux.policy = Policy::hide_amx();
    }
    let desk = Desk::open(&run.here)?;
    let guest = Guest::boot(&host, &linux)?;
    Owner::new(&host, guest, desk, screen).run()
}

/// Waits for one guest.
pub(crate) fn receive(receive: &Receive, screen: &mut Screen) -> anyhow::Result<Code> {
    let host = Host::probe_at(&receive.here.kvm)?;
    signals::listen();
    // Once the guest is here, nothing may keep it from running.
    let desk = Desk::open(&receive.here)?;
    let socket = Socket::bind(&receive.socket)?;
    screen.show(&Event::State {
        state: State::Waiting,
    });
    let Some(stream) = socket.accept(|| signals::seen() > 0)? else {
        return Ok(Code::Interrupted);
    };
    drop(socket);
    screen.show(&Event::State {
        state: State::Receiving,
    });
    let mut told = Instant::now();
    let came = Guest::receive(&host, stream, receive.patience(), |pages| {
        if told.elapsed() >= TELL {
            told = Instant::now();
            screen.show(&Event::Arrived { pages });
        }
    });
    match came {
        Ok((guest, pages)) => {
            screen.show(&Event::TakenOver { pages });
            Owner::new(&host, guest, desk, screen).run()
        }
        Err(error) => {
            let reason = error.to_string();
            screen.show(&Event::NotTaken { reason });
            Ok(Code::NotMoved)
        }
    }
}

/// Goes on from a file.
pub(crate) fn restore(restore: &Restore, screen: &mut Screen) -> anyhow::Result<Code> {
    let host = Host::probe_at(&restore.here.kvm)?;
    screen.show(&Event::State {
        state: State::Restoring,
    });
    let bytes = file::read(&restore.file)?;
    let name = || restore.file.display().to_string();
    let snapshot = Snapshot::from_bytes(&bytes).with_context(name)?;
    let desk = Desk::open(&restore.here)?;
    let guest = Guest::restore(&host, &snapshot).with_context(name)?;
    Owner::new(&host, guest, desk, screen).run()
}

/// Where orders come in: open before there is a guest.
struct Desk {
    orders: Option<(Socket, mpsc::Receiver<Order>)>,
    console: bool,
}

impl Desk {
    fn open(here: &Here) -> anyhow::Result<Self> {
        Ok(Self {
            orders: here.control.as_deref().map(control::listen).transpose()?,
            console: here.console,
        })
    }
}

/// A guest that is here.
struct Owner<'a> {
    host: &'a Host,
    guest: Guest,
    screen: &'a mut Screen,
    console: bool,
    orders: Option<(Socket, mpsc::Receiver<Order>)>,
    /// Whoever has given the order that is being carried out.
    asked: Option<UnixStream>,
    /// Whoever waits for the guest's end.
    stoppers: Vec<UnixStream>,
    /// It stands still: nobody knows which side has it.
    undecided: bool,
    /// Whoever wants to end it with a signal knows that.
    warned: bool,
    wrong: bool,
    stopping: bool,
}

impl<'a> Owner<'a> {
    fn new(host: &'a Host, guest: Guest, desk: Desk, screen: &'a mut Screen) -> Self {
        signals::listen();
        Self {
            host,
            guest,
            screen,
            console: desk.console,
            orders: desk.orders,
            asked: None,
            stoppers: Vec::new(),
            undecided: false,
            warned: false,
            wrong: false,
            stopping: false,
        }
    }

    /// Lets it run until it has ended or is elsewhere.
    fn run(mut self) -> anyhow::Result<Code> {
        self.state(State::Running);
        loop {
            if let Some(code) = self.signalled() {
                return Ok(code);
            }
            let order = if self.undecided {
                self.next(Some(SLICE))
            } else {
                self.guest.run(SLICE)?;
                self.listen();
                if let Some(code) = self.ended() {
                    return Ok(code);
                }
                self.next(None)
            };
            if let Some((request, stream)) = order
                && let Some(code) = self.obey(request, stream)
            {
                return Ok(code);
            }
        }
    }

    /// The next order, waiting so long for it.
    fn next(&self, time: Option<Duration>) -> Option<Order> {
        match (&self.orders, time) {
            (Some((_, orders)), None) => orders.try_recv().ok(),
            (Some((_, orders)), Some(time)) => orders.recv_timeout(time).ok(),
            (None, time) => {
                std::thread::sleep(time.unwrap_or_default());
                None
            }
        }
    }

    /// To whoever looks here, and to whoever has asked.
    fn tell(&mut self, event: &Event) {
        tell(self.screen, &mut self.asked, event);
    }

    fn state(&mut self, state: State) {
        self.tell(&Event::State { state });
    }

    /// The first signal asks the guest, the second does not.
    fn signalled(&mut self) -> Option<Code> {
        match signals::seen() {
            0 => None,
            1 => {
                if !self.undecided {
                    self.stop();
                } else if !self.warned {
                    self.warned = true;
                    let reason = UNDECIDED.to_owned();
                    self.screen.show(&Event::Undecided { reason });
                }
                None
            }
            _ => Some(Code::Interrupted),
        }
    }

    fn stop(&mut self) {
        if !self.stopping {
            self.stopping = true;
            self.guest.devices.wish(Wish::PowerOff);
            self.state(State::Stopping);
        }
    }

    /// What the guest has said since the last look.
    fn listen(&mut self) {
        if self.console {
            // Nobody may read it.
            let _ = stderr().write_all(&self.guest.devices.take_console());
        }
        if !self.wrong
            && let Some(what) = self.guest.verdict().wrong
        {
            self.wrong = true;
            self.tell(&Event::Wrong { what });
        }
    }

    fn ended(&mut self) -> Option<Code> {
        let event = Event::Ended {
            how: match self.guest.devices.switched()? {
                Switched::Off => Ending::Off,
                Switched::Reset => Ending::Reset,
            },
            verdict: self.guest.verdict(),
        };
        self.screen.show(&event);
        for stream in std::mem::take(&mut self.stoppers) {
            // He may not listen any more.
            let _ = control::tell(&stream, &event);
        }
        event.code()
    }

    /// Carries out an order. A code means that the guest is not here any more.
    fn obey(&mut self, request: Request, stream: UnixStream) -> Option<Code> {
        self.asked = Some(stream);
        match request {
            Request::Stop if self.undecided => {
                let reason = "the guest is dropped here, where it stood still".to_owned();
                self.tell(&Event::Undecided { reason });
                Some(Code::Undecided)
            }
            Request::Stop => {
                self.stopping = false;
                self.stop();
                // Who has asked for the end hears of it, whoever else asks for something meanwhile.
                self.stoppers.extend(self.asked.take());
                None
            }
            Request::Resume if !self.undecided => {
                let reason = "the guest runs already".to_owned();
                self.tell(&Event::Failed { reason });
                None
            }
            Request::Resume => {
                self.undecided = false;
                self.state(State::Running);
                None
            }
            Request::Status => {
                let event = Event::Status {
                    state: match (self.undecided, self.stopping) {
                        (true, _) => State::Undecided,
                        (false, true) => State::Stopping,
                        (false, false) => State::Running,
                    },
                    vcpus: self.guest.vm.vcpus(),
                    memory_bytes: self.guest.vm.memory_bytes(),
                    verdict: self.guest.verdict(),
                };
                self.tell(&event);
                None
            }
            _ if self.undecided => {
                let reason = UNDECIDED.to_owned();
                self.tell(&Event::Failed { reason });
                None
            }
            Request::Save { file } => self.save(&file),
            Request::Send {
                socket,
                downtime_ms,
                max_rounds,
                patience_s,
                throttle_percent,
            } => {
                let options = Options {
                    downtime: Duration::from_millis(downtime_ms),
                    max_rounds,
                    patience: Duration::from_secs(patience_s.max(1).into()),
                    throttle_percent,
                };
                self.send(&socket, &options)
            }
        }
    }

    fn save(&mut self, path: &Path) -> Option<Code> {
        self.state(State::Saving);
        let saved = self.guest.capture(self.host).map_err(anyhow::Error::from);
        let saved = saved.and_then(|snapshot| {
            let bytes = snapshot.to_bytes();
            file::write(path, &bytes)?;
            Ok(Event::Saved {
                file: path.to_owned(),
                bytes: bytes.len(),
                pages: snapshot.memory().len(),
                vcpus: snapshot.at_stop(),
            })
        });
        match saved {
            Ok(event) => {
                self.tell(&event);
                Some(Code::Good)
            }
            Err(error) => {
                let reason = in_words(error.as_ref());
                self.tell(&Event::Failed { reason });
                self.state(State::Running);
                None
            }
        }
    }

    fn send(&mut self, socket: &Path, options: &Options) -> Option<Code> {
        let stream = match UnixStream::connect(socket) {
            Ok(stream) => stream,
            Err(error) => {
                let reason = format!(
                    "{}: {error}: `amx-vmm receive` has to wait there before",
                    socket.display()
                );
                self.tell(&Event::NotMoved { reason });
                return None;
            }
        };
        self.state(State::Moving);
        let (screen, asked) = (&mut *self.screen, &mut self.asked);
        let mut told = Instant::now();
        // This thread hears of no signal meanwhile, and once the guest is handed over it may wait for ever.
        // Whoever ends this process then loses nothing: the destination has the guest, or will have it.
        let socket = self.orders.as_ref().map(|(socket, _)| socket);
        let watch = signals::exit_at_the_second(socket);
        let sent = self.guest.send(self.host, stream, options, |progress| {
            match *progress {
                Progress::Pages {
                    round,
                    stopped,
                    sent,
                    of,
                } => {
                    // The guest that stands still does not wait for whoever reads.
                    if stopped || told.elapsed() < TELL {
                        return;
                    }
                    told = Instant::now();
                    let event = Event::Pages {
                        round,
                        stopped,
                        sent,
                        of,
                    };
                    tell(screen, asked, &event);
                }
                Progress::Round(round) => {
                    let bytes = round.pages.saturating_mul(PAGE_BYTES) as u64;
                    tell(screen, asked, &Event::Round { bytes, round });
                }
            }
        });
        drop(watch);
        match sent {
            Ok(report) => {
                self.tell(&Event::HandedOver(report));
                Some(Code::Good)
            }
            Err(error @ SendError::Undecided) => {
                self.undecided = true;
                self.warned = false;
                // One that came before was not meant for a guest in this state.
                signals::forget();
                let reason = error.to_string();
                self.tell(&Event::Undecided { reason });
                None
            }
            Err(error @ SendError::Guest(_)) => {
                let reason = error.to_string();
                self.tell(&Event::Failed { reason });
                Some(Code::Failed)
            }
            // It has ended by itself, which is told next.
            Err(SendError::GuestEnded) => {
                self.stoppers.extend(self.asked.take());
                None
            }
            Err(error) => {
                let reason = error.to_string();
                self.tell(&Event::NotMoved { reason });
                self.state(State::Running);
                None
            }
        }
    }
}

/// To whoever looks here, and to whoever has asked: one who does not read is not asked again.
fn tell(screen: &mut Screen, asked: &mut Option<UnixStream>, event: &Event) {
    screen.show(event);
    if let Some(stream) = asked
        && control::tell(&*stream, event).is_err()
    {
        *asked = None;
    }
}

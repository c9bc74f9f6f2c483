//! The process that has the guest, from its arrival to its end.

use amx_vmm::words::in_words;
use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use amx_guest::report::Wish;
use amx_vmm::linux::Guest;
use amx_vmm::linux::devices::Switched;
use amx_vmm::memory::PAGE_BYTES;
use amx_vmm::migration::{self, Cancel, Options, Progress, ReceiveError, Report, SendError};
use amx_vmm::{Host, Linux, Snapshot, file};
use anyhow::{Context, anyhow};
use cpuid_amx::Policy;

use crate::clerk::{Clerk, Waiting};
use crate::cli::{Here, Receive, Restore, Run};
use crate::control::{self, Order, Request, Socket};
use crate::event::{Code, Ending, Event, State};
use crate::signals;
use crate::teller::Teller;

/// How long the guest runs before the next look at orders and at what it has said.
const SLICE: Duration = Duration::from_millis(20);
/// What there is to do with a guest that may be elsewhere.
const UNDECIDED: &str = "it is not known whether the guest is elsewhere already; `amx-vmm resume` if it is not, \
    `amx-vmm stop` if it is";
/// What is told several times within a round is told no more often.
const TELL: Duration = Duration::from_millis(200);

/// Boots a guest.
pub(crate) fn boot(run: &Run, teller: &mut Teller) -> anyhow::Result<Code> {
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
    Owner::new(&host, guest, desk, teller).run()
}

/// Waits for one guest.
pub(crate) fn receive(receive: &Receive, teller: &mut Teller) -> anyhow::Result<Code> {
    let host = Host::probe_at(&receive.here.kvm)?;
    signals::listen();
    // Once the guest is here, nothing may keep it from running.
    let desk = Desk::open(&receive.here)?;
    let socket = Socket::bind(&receive.socket)?;
    teller.show(Event::State {
        state: State::Waiting,
    });
    let Some(stream) = socket.accept(|| signals::seen() > 0)? else {
        return Ok(Code::Interrupted);
    };
    drop(socket);
    teller.show(Event::State {
        state: State::Receiving,
    });
    let cancel = Cancel::default();
    // Until the guest is here, there is none that could be asked to switch itself off.
    let watch = signals::cancel_at_the_first(&cancel);
    let mut told = Instant::now();
    let came = Guest::receive(&host, stream, receive.deadline(), &cancel, |pages| {
        if told.elapsed() >= TELL {
            told = Instant::now();
            teller.show(Event::Arrived { pages });
        }
    });
    drop(watch);
    match came {
        Ok((guest, pages)) => {
            teller.show(Event::TakenOver { pages });
            Owner::new(&host, guest, desk, teller).run()
        }
        Err(error) => {
            let cancelled = matches!(error, ReceiveError::Cancelled);
            let reason = error.to_string();
            teller.show(Event::NotTaken { reason });
            Ok(if cancelled {
                Code::Interrupted
            } else {
                Code::NotMoved
            })
        }
    }
}

/// Goes on from a file.
pub(crate) fn restore(restore: &Restore, teller: &mut Teller) -> anyhow::Result<Code> {
    let host = Host::probe_at(&restore.here.kvm)?;
    teller.show(Event::State {
        state: State::Restoring,
    });
    let bytes = file::read(&restore.file)?;
    let name = || restore.file.display().to_string();
    let snapshot = Snapshot::from_bytes(&bytes).with_context(name)?;
    let desk = Desk::open(&restore.here)?;
    let guest = Guest::restore(&host, &snapshot).with_context(name)?;
    Owner::new(&host, guest, desk, teller).run()
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
    teller: &'a mut Teller,
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
    fn new(host: &'a Host, guest: Guest, desk: Desk, teller: &'a mut Teller) -> Self {
        signals::listen();
        Self {
            host,
            guest,
            teller,
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
    fn tell(&mut self, event: Event) {
        tell(self.teller, &mut self.asked, event);
    }

    fn state(&mut self, state: State) {
        self.tell(Event::State { state });
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
                    self.teller.show(Event::Undecided { reason });
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
            self.teller.console(self.guest.devices.take_console());
        }
        if !self.wrong
            && let Some(what) = self.guest.verdict().wrong
        {
            self.wrong = true;
            self.tell(Event::Wrong { what });
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
        let code = event.code();
        tell_all(std::mem::take(&mut self.stoppers), &event);
        self.teller.show(event);
        code
    }

    /// Carries out an order. A code means that the guest is not here any more.
    fn obey(&mut self, request: Request, stream: UnixStream) -> Option<Code> {
        self.asked = Some(stream);
        match request {
            Request::Stop if self.undecided => {
                let reason = "the guest is dropped here, where it stood still".to_owned();
                self.tell(Event::Undecided { reason });
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
                self.tell(Event::Failed { reason });
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
                self.tell(event);
                None
            }
            _ if self.undecided => {
                let reason = UNDECIDED.to_owned();
                self.tell(Event::Failed { reason });
                None
            }
            Request::Cancel => {
                let reason = "the guest is not being moved".to_owned();
                self.tell(Event::Failed { reason });
                None
            }
            Request::Save { file } => self.save(&file),
            Request::Send {
                socket,
                downtime_ms,
                max_rounds,
                max_downtime_ms,
                deadline_s,
                answer_s,
                throttle_percent,
            } => {
                let options = Options {
                    downtime: Duration::from_millis(downtime_ms),
                    max_rounds,
                    max_downtime: Duration::from_millis(max_downtime_ms),
                    deadline: Duration::from_secs(deadline_s.max(1).into()),
                    answer: Duration::from_secs(answer_s.max(1).into()),
                    cancel: Cancel::default(),
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
                self.tell(event);
                Some(Code::Good)
            }
            Err(error) => {
                let reason = in_words(error.as_ref());
                self.tell(Event::Failed { reason });
                self.state(State::Running);
                None
            }
        }
    }

    fn send(&mut self, socket: &Path, options: &Options) -> Option<Code> {
        let stream = match connect(socket) {
            Ok(stream) => stream,
            Err(error) => {
                let reason = format!("{}: {}", socket.display(), in_words(error.as_ref()));
                self.tell(Event::NotMoved { reason });
                return None;
            }
        };
        self.state(State::Moving);
        let (sent, waiting) = self.sent(stream, options);
        let Waiting {
            cancellers,
            stoppers,
        } = waiting;
        let code = match sent {
            Ok(report) => {
                let event = Event::HandedOver(report);
                tell_all(cancellers, &event);
                tell_all(stoppers, &event);
                self.tell(event);
                return Some(Code::Good);
            }
            Err(error @ SendError::Undecided) => {
                self.undecided = true;
                self.warned = false;
                // One that came before was not meant for a guest in this state.
                signals::forget();
                let reason = error.to_string();
                let event = Event::Undecided { reason };
                tell_all(cancellers, &event);
                tell_all(stoppers, &event);
                self.tell(event);
                return None;
            }
            Err(error @ SendError::Guest(_)) => {
                let reason = error.to_string();
                let event = Event::Failed { reason };
                tell_all(cancellers, &event);
                tell_all(stoppers, &event);
                self.tell(event);
                return Some(Code::Failed);
            }
            // It has ended by itself, which is told next.
            Err(SendError::GuestEnded) => {
                self.stoppers.extend(self.asked.take());
                self.stoppers.extend(cancellers);
                None
            }
            Err(error) => {
                let reason = error.to_string();
                let event = Event::NotMoved { reason };
                tell_all(cancellers, &event);
                self.tell(event);
                self.state(State::Running);
                None
            }
        };
        if !stoppers.is_empty() {
            self.stopping = false;
            self.stop();
            self.stoppers.extend(stoppers);
        }
        code
    }

    /// Sends the guest, while somebody else takes orders.
    fn sent(
        &mut self,
        stream: UnixStream,
        options: &Options,
    ) -> (Result<Report, SendError>, Waiting) {
        let (host, teller, asked) = (self.host, &mut *self.teller, &mut self.asked);
        let Guest { vm, devices } = &mut self.guest;
        let devices = &*devices;
        // Once the guest is handed over, this process may wait for the destination's answer.
        // Whoever ends it then loses nothing: the destination has the guest, or will have it.
        let socket = self.orders.as_ref().map(|(socket, _)| socket);
        let watch = signals::exit_at_the_second(socket);
        let clerk = Clerk {
            devices,
            vcpus: vm.vcpus(),
            memory_bytes: vm.memory_bytes(),
            cancel: options.cancel.clone(),
        };
        let orders = self.orders.as_mut().map(|(_, orders)| orders);
        let (moving, over) = mpsc::channel::<()>();
        let mut told = Instant::now();
        let done = thread::scope(|scope| {
            let clerk = scope.spawn(move || clerk.serve(orders.as_deref(), &over));
            let guest = (devices, Some(devices));
            let sent = migration::send(vm, host, guest, stream, options, |progress| {
                match *progress {
                    Progress::Pages {
                        round,
                        stopped,
                        sent,
                        of,
                    } => {
                        // A guest that stands still waits for nobody.
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
                        tell(teller, asked, event);
                    }
                    Progress::Round(round) => {
                        let bytes = round.pages.saturating_mul(PAGE_BYTES) as u64;
                        tell(teller, asked, Event::Round { bytes, round });
                    }
                }
            });
            drop(moving);
            (sent, clerk.join().unwrap_or_default())
        });
        drop(watch);
        done
    }
}

/// To the destination, which has to be this user's.
fn connect(socket: &Path) -> anyhow::Result<UnixStream> {
    let stream = UnixStream::connect(socket)
        .map_err(|error| anyhow!("{error}: `amx-vmm receive` has to wait there before"))?;
    control::require_own(&stream)?;
    Ok(stream)
}

/// To whoever looks here, and to whoever has asked: one who does not read is not asked again.
fn tell(teller: &mut Teller, asked: &mut Option<UnixStream>, event: Event) {
    if let Some(stream) = asked
        && control::tell(&*stream, &event).is_err()
    {
        *asked = None;
    }
    teller.show(event);
}

/// To others, who may not listen any more.
fn tell_all(streams: Vec<UnixStream>, event: &Event) {
    for stream in streams {
        let _ = control::tell(&stream, event);
    }
}

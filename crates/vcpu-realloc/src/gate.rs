//! When the state of one vCPU may grow: a state machine without memory, KVM or time.
//!
//! A feature that IA32_XFD can disable (AMX's XTILEDATA) has no state until the guest can first use
//! it, which is when XCR0\[i\] = 1 and XFD\[i\] = 0. The write that makes it so is held back while the
//! VMM is asked. From its consent on, writes pass.

mod action;
mod event;
#[cfg(test)]
pub(crate) mod tests;
#[cfg(test)]
mod transitions;

use core::fmt;
use core::hash::{Hash, Hasher};

use xsave_state::{Layout, XFeatures, xcr0};

pub use action::{Action, Fault, Growth};
pub use event::Event;

/// The gate of one vCPU.
///
/// Its clone is another gate in the same state. Two gates are equal when they are for the same layout
/// and in the same state; the hash is of the state alone.
///
/// ```
/// use vcpu_realloc::{Action, Event, Gate};
/// use xsave_state::XFeatures;
/// # use xsave_state::{Component, ComponentId, Layout, Palette};
/// # let layout = Layout::from_parts(
/// #     [
/// #         Component::user(ComponentId::AVX, 576, 256),
/// #         Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
/// #         Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
/// #     ],
/// #     [Palette::ONE],
/// # )
/// # .unwrap();
/// let mut gate = Gate::new(&layout);
/// let amx = XFeatures::from_bits_retain(0x60007);
/// let tiles = XFeatures::XTILEDATA;
///
/// // A Linux guest arms XFD, then enables AMX: no state yet.
/// assert_eq!(gate.on(Event::WriteXfd(tiles)), Action::Complete);
/// assert_eq!(gate.on(Event::WriteXcr0(amx)), Action::Complete);
/// // A process uses a tile; its kernel clears XFD. That is the first use.
/// let Action::Grow(growth) = gate.on(Event::WriteXfd(XFeatures::empty())) else {
///     unreachable!()
/// };
/// assert_eq!(growth.to_string(), "XTILEDATA (0x40000), 8192 bytes, in an area of 11008 bytes");
/// // The host has no memory just now; later it has.
/// assert_eq!(gate.on(Event::Fail), Action::Hold);
/// assert_eq!(gate.on(Event::Retry), Action::Grow(growth));
/// assert_eq!(gate.on(Event::Grant(growth.features())), Action::PassThrough);
/// // From now on the guest toggles as it likes.
/// assert_eq!(gate.on(Event::WriteXfd(tiles)), Action::PassThrough);
/// assert_eq!(gate.on(Event::WriteXfd(XFeatures::empty())), Action::PassThrough);
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Gate {
    layout: Layout,
    state: State,
}

/// What of a gate changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct State {
    registers: Pair,
    granted: XFeatures,
    /// What some vCPU of the VM has been granted, here or where the VM ran before.
    promised: XFeatures,
    question: Option<Question>,
}

/// The two registers of the condition.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Pair {
    xcr0: XFeatures,
    xfd: XFeatures,
}

impl Pair {
    const RESET: Self = Self {
        xcr0: XFeatures::X87,
        xfd: XFeatures::empty(),
    };
}

/// What the VMM has been asked and has not answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Question {
    features: XFeatures,
    /// The registers as the write that is held back would make them. `None`: no write is; the guest
    /// was found to have the features already.
    write: Option<Pair>,
}

impl Gate {
    /// The gate of a vCPU after reset. `layout` is that of the guest's CPUID: what the guest does not
    /// have faults.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self {
            layout: layout.clone(),
            state: State {
                registers: Pair::RESET,
                granted: XFeatures::empty(),
                promised: XFeatures::empty(),
                question: None,
            },
        }
    }

    /// XCR0 as it was last written or observed. A write that is held back is not in it.
    #[must_use]
    pub fn xcr0(&self) -> XFeatures {
        self.state.registers.xcr0
    }

    /// IA32_XFD as it was last written or observed. A write that is held back is not in it.
    #[must_use]
    pub fn xfd(&self) -> XFeatures {
        self.state.registers.xfd
    }

    /// The features for which the VMM has state.
    #[must_use]
    pub fn granted(&self) -> XFeatures {
        self.state.granted
    }

    /// The features that some vCPU of the VM has been granted, here or where the VM ran before. They
    /// cannot be denied to this vCPU any more: a task of the guest may have tiles in memory, and may be
    /// scheduled here.
    #[must_use]
    pub fn promised(&self) -> XFeatures {
        self.state.promised
    }

    /// Whether the guest has state for every feature that IA32_XFD can disable, so that no write
    /// needs to be intercepted.
    #[must_use]
    pub fn has_passed(&self) -> bool {
        self.state.granted.contains(self.layout.xfd())
    }

    /// What the VMM has been asked and has not answered.
    #[must_use]
    pub fn waiting_for(&self) -> Option<Growth> {
        let features = self.state.question?.features;
        Some(self.growth(features))
    }

    /// The layout of the guest.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// What it takes to have state for all features that are not granted yet. `None` where there are
    /// none.
    #[must_use]
    pub fn everything(&self) -> Option<Growth> {
        self.growth_for(XFeatures::all())
    }

    /// What it takes to have state for these features, as far as IA32_XFD can disable them. `None`
    /// where all of them have been granted.
    #[must_use]
    pub fn growth_for(&self, features: XFeatures) -> Option<Growth> {
        let features = features & (self.layout.xfd() - self.state.granted);
        (!features.is_empty()).then(|| self.growth(features))
    }

    /// Takes an event and says what is to be done.
    ///
    /// *First use* is an event after which a feature that has not been granted has XCR0\[i\] = 1 and
    /// XFD\[i\] = 0. The gate is in one of these states:
    ///
    /// - **idle**: some feature is not granted, and nothing is asked;
    /// - **held**: the VMM is asked, and a write of the guest is held back;
    /// - **found**: the VMM is asked about what the guest already can use, because nobody saw the
    ///   write (KVM performs XSETBV itself) or because the vCPU was restored, and what its VM was
    ///   granted where it ran before;
    /// - **passed**: everything is granted.
    ///
    #[doc = include_str!("gate/transitions.md")]
    ///
    /// A write that comes while another is held takes its place, as when the VMM handles an exit
    /// again.
    #[inline]
    pub fn on(&mut self, event: Event) -> Action {
        match event {
            Event::WriteXfd(xfd) => {
                let supported = self.layout.xfd();
                if !supported.contains(xfd) {
                    return self.fault(Fault::ReservedXfd { xfd, supported });
                }
                self.write(Pair {
                    xfd,
                    ..self.state.registers
                })
            }
            Event::WriteXcr0(xcr0) => match xcr0::check(xcr0, self.layout.user()) {
                Ok(()) => self.write(Pair {
                    xcr0,
                    ..self.state.registers
                }),
                Err(error) => self.fault(error.into()),
            },
            Event::ObserveXcr0(xcr0) => {
                self.state.registers.xcr0 = xcr0;
                self.stand()
            }
            Event::Observe { xcr0, xfd, in_use } => {
                let owed = self.owed();
                self.look(Pair { xcr0, xfd }, in_use | owed)
            }
            Event::Restore {
                xcr0,
                xfd,
                in_use,
                granted,
            } => {
                self.promise(granted);
                self.look(Pair { xcr0, xfd }, in_use | granted)
            }
            Event::GrantedElsewhere(features) => {
                self.promise(features);
                self.stand()
            }
            Event::Grant(features) => self.grant(features),
            Event::Deny => match self.state.question {
                Some(Question {
                    features,
                    write: Some(_),
                }) if !features.intersects(self.state.promised) => {
                    self.fault(Fault::Denied { features })
                }
                // There is no instruction to fault, because the guest has the feature; or a fault would
                // take tiles from a task that has some in memory.
                _ => self.stand(),
            },
            Event::Fail => self.stand(),
            Event::Retry => match self.state.question {
                Some(Question { features, .. }) => Action::Grow(self.growth(features)),
                None => self.go(),
            },
            Event::Withdraw => {
                self.drop_write();
                self.stand()
            }
            Event::Reset => {
                self.state.registers = Pair::RESET;
                self.state.question = None;
                self.go()
            }
            Event::Init => self.look(self.state.registers, self.found()),
        }
    }

    /// A write that would make the registers so.
    fn write(&mut self, registers: Pair) -> Action {
        let features = self.first_use(registers);
        if features.is_empty() {
            self.state.registers = registers;
            self.state.question = None;
            return self.go();
        }
        self.ask(features, Some(registers))
    }

    /// The guest has these registers, and state of `in_use`.
    fn look(&mut self, registers: Pair, in_use: XFeatures) -> Action {
        self.state.registers = registers;
        self.state.question = None;
        let stateful = in_use & (self.layout.xfd() - self.state.granted);
        let features = self.first_use(registers) | stateful;
        if features.is_empty() {
            return self.go();
        }
        self.ask(features, None)
    }

    fn promise(&mut self, features: XFeatures) {
        self.state.promised |= features & self.layout.xfd();
    }

    /// What a restore has asked for and has not got, whatever the registers show.
    fn owed(&self) -> XFeatures {
        self.found() & self.state.promised
    }

    /// What the guest was found to have already, and has no grant for: it may be in use, which the
    /// registers do not show.
    fn found(&self) -> XFeatures {
        match self.state.question {
            Some(Question {
                features,
                write: None,
            }) => features,
            _ => XFeatures::empty(),
        }
    }

    fn grant(&mut self, features: XFeatures) -> Action {
        self.state.granted |= features & self.layout.xfd();
        self.promise(features);
        if let Some(Question { features, write }) = self.state.question {
            let rest = features - self.state.granted;
            if !rest.is_empty() {
                return self.ask(rest, write);
            }
            if let Some(registers) = write {
                self.state.registers = registers;
            }
            self.state.question = None;
        }
        self.go()
    }

    /// The condition of the design: XCR0\[i\] = 1 and XFD\[i\] = 0, and no state for it.
    fn first_use(&self, Pair { xcr0, xfd }: Pair) -> XFeatures {
        (xcr0 - xfd) & (self.layout.xfd() - self.state.granted)
    }

    fn ask(&mut self, features: XFeatures, write: Option<Pair>) -> Action {
        self.state.question = Some(Question { features, write });
        Action::Grow(self.growth(features))
    }

    fn growth(&self, features: XFeatures) -> Growth {
        Growth::new(&self.layout, features, self.state.granted)
    }

    fn fault(&mut self, fault: Fault) -> Action {
        self.drop_write();
        Action::InjectGp(fault)
    }

    fn drop_write(&mut self) {
        let question = self.state.question;
        self.state.question = question.filter(|question| question.write.is_none());
    }

    fn go(&self) -> Action {
        if self.has_passed() {
            Action::PassThrough
        } else {
            Action::Complete
        }
    }

    /// As before: what is asked stays asked.
    fn stand(&self) -> Action {
        match self.state.question {
            Some(_) => Action::Hold,
            None => self.go(),
        }
    }
}

impl Hash for Gate {
    /// Of the state alone: the layout of a vCPU never changes.
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.state.hash(state);
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate")
            .field("xcr0", &self.xcr0())
            .field("xfd", &self.xfd())
            .field("granted", &self.granted())
            .field("promised", &self.promised())
            .field("waiting_for", &self.waiting_for())
            .finish_non_exhaustive()
    }
}

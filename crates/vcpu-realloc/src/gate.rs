//! When the state of one vCPU may grow: a state machine without memory, KVM or time.
//!
//! A feature that IA32_XFD can disable (AMX's XTILEDATA) has no state until the guest first uses it:
//! until XCR0\[i\] = 1 and XFD\[i\] = 0. That write is held back while the VMM is asked. From its
//! consent on, writes pass.

use thiserror::Error;
use xsave_state::xcr0::{self, Xcr0Error};
use xsave_state::{Layout, Registers, XFeatures};

/// What happens to a vCPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Event {
    /// The guest executes WRMSR of IA32_XFD with this value.
    WriteXfd(XFeatures),
    /// The guest executes XSETBV with this value for XCR0. KVM does that itself and tells nobody:
    /// for its VMMs there is [`ObserveXcr0`](Self::ObserveXcr0). Those who write hypervisors have
    /// this one.
    WriteXcr0(XFeatures),
    /// XCR0 was read from the vCPU.
    ObserveXcr0(XFeatures),
    /// The VMM consents to the growth that was asked for.
    Grant,
    /// The VMM does not.
    Deny,
    /// The vCPU is reset. What has been granted stays so.
    Reset,
}

/// What is to be done about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
#[non_exhaustive]
pub enum Action {
    /// Perform the write and let the guest go on. Where nothing is held back, there is nothing to
    /// perform.
    Complete,
    /// Raise #GP at the guest's instruction, which then has no effect.
    InjectGp(Fault),
    /// Ask the VMM for the state of these features, and hold the write back until it has answered.
    /// The answer may come later, from another thread, and the question may be repeated.
    Grow(XFeatures),
}

/// Why a write raises #GP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Fault {
    /// IA32_XFD has bits that are reserved for this guest (SDM Vol. 1 §13.14).
    #[error("IA32_XFD is {xfd}; only {supported} can be disabled")]
    ReservedXfd {
        /// The value.
        xfd: XFeatures,
        /// What the guest's CPUID lets it disable.
        supported: XFeatures,
    },
    /// XCR0 cannot have this value.
    #[error(transparent)]
    Xcr0(#[from] Xcr0Error),
    /// The VMM denied the growth.
    #[error("the VMM denied state for {features}")]
    Denied {
        /// What the guest was about to use.
        features: XFeatures,
    },
}

/// A write that waits for the VMM's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Held {
    /// The registers as the write would make them.
    registers: Registers,
    features: XFeatures,
}

/// The gate of one vCPU.
///
/// ```
/// use vcpu_realloc::{Action, Event, Gate};
/// use xsave_state::XFeatures;
/// # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
/// #     match (leaf, subleaf) {
/// #         (0, _) => [0x1e, 0, 0, 0],
/// #         (0xd, 0) => [0x60007, 11008, 11008, 0],
/// #         (0xd, 1) => [0x1f, 9088, 0, 0],
/// #         (0xd, 2) => [256, 576, 0, 0],
/// #         (0xd, 17) => [64, 2752, 2, 0],
/// #         (0xd, 18) => [8192, 2816, 6, 0],
/// #         _ => [0; 4],
/// #     }
/// # }
/// # let layout = xsave_state::Layout::from_cpuid(cpuid).unwrap();
/// let mut gate = Gate::new(&layout);
/// let amx = XFeatures::from_bits_retain(0x60007);
///
/// // A Linux guest arms XFD, then enables AMX: no state yet.
/// assert_eq!(gate.on(Event::WriteXfd(XFeatures::XTILEDATA)), Action::Complete);
/// assert_eq!(gate.on(Event::WriteXcr0(amx)), Action::Complete);
/// // A process uses a tile; its kernel clears XFD. That is the first use.
/// assert_eq!(gate.on(Event::WriteXfd(XFeatures::empty())), Action::Grow(XFeatures::XTILEDATA));
/// assert_eq!(gate.on(Event::Grant), Action::Complete);
/// // From now on the guest toggles as it likes.
/// assert_eq!(gate.on(Event::WriteXfd(XFeatures::XTILEDATA)), Action::Complete);
/// assert_eq!(gate.on(Event::WriteXfd(XFeatures::empty())), Action::Complete);
/// ```
#[derive(Clone, Debug)]
pub struct Gate {
    supported: XFeatures,
    dynamic: XFeatures,
    granted: XFeatures,
    registers: Registers,
    held: Option<Held>,
}

impl Gate {
    /// The gate of a vCPU after reset, for a guest of this layout: it has what the guest's CPUID has.
    #[must_use]
    pub fn new(layout: &Layout) -> Self {
        Self {
            supported: layout.user(),
            dynamic: layout.xfd(),
            granted: XFeatures::empty(),
            registers: Registers::RESET,
            held: None,
        }
    }

    /// XCR0 and IA32_XFD as the guest has written them. A write that is held back is not in them.
    #[must_use]
    pub fn registers(&self) -> Registers {
        self.registers
    }

    /// The features for which the VMM has consented to have state.
    #[must_use]
    pub fn granted(&self) -> XFeatures {
        self.granted
    }

    /// The features of the write that waits for the VMM, where one does.
    #[must_use]
    pub fn waiting_for(&self) -> Option<XFeatures> {
        self.held.map(|held| held.features)
    }

    /// Takes an event and says what is to be done.
    ///
    /// | event | when | action |
    /// |---|---|---|
    /// | `WriteXfd(x)` | x has a bit that the guest cannot disable | `InjectGp(ReservedXfd)` |
    /// | | some feature not granted has XCR0\[i\] = 1 and x\[i\] = 0 | `Grow`, held |
    /// | | otherwise | `Complete` |
    /// | `WriteXcr0(x)` | XSETBV does not take x | `InjectGp(Xcr0)` |
    /// | | some feature not granted has x\[i\] = 1 and XFD\[i\] = 0 | `Grow`, held |
    /// | | otherwise | `Complete` |
    /// | `ObserveXcr0(x)` | always | `Complete`; the gate knows x from now on |
    /// | `Grant` | a write is held | `Complete`: its features are granted |
    /// | `Deny` | a write is held | `InjectGp(Denied)`: the write has no effect |
    /// | `Grant`, `Deny` | no write is held | `Complete`, nothing changes |
    /// | `Reset` | always | `Complete`: XCR0 is x87, XFD is 0, nothing is held |
    ///
    /// A write while another is held takes its place: the vCPU has been restored or reset meanwhile.
    pub fn on(&mut self, event: Event) -> Action {
        match event {
            Event::WriteXfd(xfd) => {
                if !self.dynamic.contains(xfd) {
                    return Action::InjectGp(Fault::ReservedXfd {
                        xfd,
                        supported: self.dynamic,
                    });
                }
                self.write(Registers {
                    xfd,
                    ..self.registers
                })
            }
            Event::WriteXcr0(xcr0) => match xcr0::check(xcr0, self.supported) {
                Ok(()) => self.write(Registers {
                    xcr0,
                    ..self.registers
                }),
                Err(error) => Action::InjectGp(error.into()),
            },
            Event::ObserveXcr0(xcr0) => {
                self.registers.xcr0 = xcr0;
                Action::Complete
            }
            Event::Grant => {
                if let Some(Held {
                    registers,
                    features,
                }) = self.held.take()
                {
                    self.granted |= features;
                    self.registers = registers;
                }
                Action::Complete
            }
            Event::Deny => match self.held.take() {
                Some(Held { features, .. }) => Action::InjectGp(Fault::Denied { features }),
                None => Action::Complete,
            },
            Event::Reset => {
                self.registers = Registers::RESET;
                self.held = None;
                Action::Complete
            }
        }
    }

    fn write(&mut self, registers: Registers) -> Action {
        let features = (registers.xcr0 - registers.xfd) & (self.dynamic - self.granted);
        if features.is_empty() {
            self.registers = registers;
            self.held = None;
            Action::Complete
        } else {
            self.held = Some(Held {
                registers,
                features,
            });
            Action::Grow(features)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TILES: XFeatures = XFeatures::XTILEDATA;

    fn amx() -> XFeatures {
        XFeatures::from_bits_retain(0x60007)
    }

    fn layout() -> Layout {
        Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0x1e, 0, 0, 0],
            (0xd, 0) => [0x60007, 11008, 11008, 0],
            (0xd, 1) => [0x1f, 9088, 0, 0],
            (0xd, 2) => [256, 576, 0, 0],
            (0xd, 17) => [64, 2752, 2, 0],
            (0xd, 18) => [8192, 2816, 6, 0],
            _ => [0; 4],
        })
        .unwrap()
    }

    /// XFD armed, AMX enabled: as a Linux guest is after boot.
    fn armed() -> Gate {
        let mut gate = Gate::new(&layout());
        assert_eq!(gate.on(Event::WriteXfd(TILES)), Action::Complete);
        assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Complete);
        gate
    }

    #[test]
    fn a_guest_that_never_arms_xfd_uses_amx_when_it_enables_it() {
        let mut gate = Gate::new(&layout());
        assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Grow(TILES));
        assert_eq!(gate.waiting_for(), Some(TILES));
        assert_eq!(gate.registers(), Registers::RESET);
        assert_eq!(gate.on(Event::Grant), Action::Complete);
        assert_eq!(gate.registers().xcr0, amx());
        assert_eq!(gate.granted(), TILES);
    }

    #[test]
    fn a_denied_write_has_no_effect_and_can_be_tried_again() {
        let mut gate = armed();
        let before = gate.registers();
        let clear = Event::WriteXfd(XFeatures::empty());
        assert_eq!(gate.on(clear), Action::Grow(TILES));
        assert_eq!(
            gate.on(Event::Deny),
            Action::InjectGp(Fault::Denied { features: TILES })
        );
        assert_eq!(gate.registers(), before);
        assert_eq!(gate.granted(), XFeatures::empty());
        assert_eq!(gate.on(clear), Action::Grow(TILES));
        assert_eq!(gate.on(Event::Grant), Action::Complete);
        assert_eq!(gate.registers().xfd, XFeatures::empty());
    }

    #[test]
    fn reserved_bits_fault_and_change_nothing() {
        let mut gate = armed();
        let before = gate.registers();
        for bit in (0..64).filter(|&bit| bit != 18) {
            let xfd = XFeatures::from_bits_retain(1 << bit);
            assert_eq!(
                gate.on(Event::WriteXfd(xfd)),
                Action::InjectGp(Fault::ReservedXfd {
                    xfd,
                    supported: TILES
                })
            );
        }
        assert!(matches!(
            gate.on(Event::WriteXcr0(XFeatures::from_bits_retain(0x20007))),
            Action::InjectGp(Fault::Xcr0(Xcr0Error::AmxSplit { .. }))
        ));
        assert_eq!(gate.registers(), before);
        assert_eq!(gate.waiting_for(), None);
    }

    #[test]
    fn an_observed_xcr0_counts_at_the_next_write() {
        let mut gate = Gate::new(&layout());
        assert_eq!(gate.on(Event::ObserveXcr0(amx())), Action::Complete);
        let clear = Event::WriteXfd(XFeatures::empty());
        assert_eq!(gate.on(clear), Action::Grow(TILES));
    }

    #[test]
    fn reset_clears_the_registers_and_keeps_what_was_granted() {
        let mut gate = armed();
        assert_eq!(
            gate.on(Event::WriteXfd(XFeatures::empty())),
            Action::Grow(TILES)
        );
        assert_eq!(gate.on(Event::Reset), Action::Complete);
        assert_eq!(gate.waiting_for(), None);
        // An answer to the question before the reset comes too late.
        assert_eq!(gate.on(Event::Grant), Action::Complete);
        assert_eq!(gate.granted(), XFeatures::empty());
        assert_eq!(gate.registers(), Registers::RESET);
        assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Grow(TILES));
        assert_eq!(gate.on(Event::Grant), Action::Complete);
        assert_eq!(gate.on(Event::Reset), Action::Complete);
        assert_eq!(gate.on(Event::WriteXcr0(amx())), Action::Complete);
    }

    fn event() -> impl Strategy<Value = Event> {
        let xfd = prop::sample::select(&[0, 0x40000, 0x20000, 1][..]);
        let xcr0 = prop::sample::select(&[1, 3, 7, 0x60007, 0x60003, 0x20007, 0][..]);
        prop_oneof![
            4 => xfd.prop_map(|bits| Event::WriteXfd(XFeatures::from_bits_retain(bits))),
            4 => xcr0.prop_map(|bits| Event::WriteXcr0(XFeatures::from_bits_retain(bits))),
            2 => Just(Event::Grant),
            1 => Just(Event::Deny),
            1 => Just(Event::Reset),
        ]
    }

    proptest! {
        /// The rule of the design: nothing is usable before it has been granted.
        #[test]
        fn no_feature_is_usable_before_its_grant(
            events in prop::collection::vec(event(), 0..60)
        ) {
            let mut gate = Gate::new(&layout());
            for event in events {
                let asked = gate.waiting_for();
                let granted = gate.granted();
                let action = gate.on(event);
                let registers = gate.registers();
                let usable = (registers.xcr0 - registers.xfd) & TILES;
                prop_assert!(gate.granted().contains(usable));
                prop_assert!(gate.granted().contains(granted));
                // Only the VMM's consent to what it was asked grants.
                if gate.granted() != granted {
                    prop_assert_eq!(event, Event::Grant);
                    prop_assert_eq!(Some(gate.granted() - granted), asked);
                }
                prop_assert_eq!(gate.waiting_for().is_some(), match action {
                    Action::Grow(features) => Some(features) == gate.waiting_for(),
                    Action::InjectGp(Fault::Denied { .. }) => false,
                    Action::InjectGp(_) => asked.is_some(),
                    Action::Complete => false,
                });
            }
        }
    }
}

//! The gate under any sequence of events: nothing is usable before its grant.

use vcpu_realloc::{Action, Event, Gate};
use xsave_state::{Registers, XFeatures};

use crate::input::Input;
use crate::layouts;

/// A layout, then events: kind (1 byte) and, for a write, the value (by a byte, or 8 bytes).
pub fn gate(data: &[u8]) {
    let mut input = Input::new(data);
    let layout = layouts::pick(&mut input);
    let mut gate = Gate::new(layout);
    let dynamic = layout.xfd();
    // What an observation of XCR0 shows is not the gate's doing.
    let mut observed = false;
    while !input.is_empty() {
        let event = match input.u8() % 6 {
            0 => Event::WriteXfd(bitmap(&mut input)),
            1 => Event::WriteXcr0(bitmap(&mut input)),
            2 => Event::ObserveXcr0(bitmap(&mut input)),
            3 => Event::Grant,
            4 => Event::Deny,
            _ => Event::Reset,
        };
        let before = gate.clone();
        let action = gate.on(event);
        observed |= matches!(event, Event::ObserveXcr0(_));
        observed &= event != Event::Reset;

        let Registers { xcr0, xfd, .. } = gate.registers();
        assert!(dynamic.contains(xfd));
        assert!(dynamic.contains(gate.granted()));
        assert!(gate.granted().contains(before.granted()));
        let usable = (xcr0 - xfd) & dynamic;
        assert!(observed || gate.granted().contains(usable), "{event:?}");
        if gate.granted() != before.granted() {
            assert_eq!(event, Event::Grant);
            let new = gate.granted() - before.granted();
            assert!(before.waiting_for().unwrap().contains(new));
        }
        match (event, action) {
            (Event::WriteXfd(value), Action::Complete) => assert_eq!(xfd, value),
            (Event::WriteXcr0(value) | Event::ObserveXcr0(value), Action::Complete) => {
                assert_eq!(xcr0, value);
            }
            (Event::WriteXfd(_) | Event::WriteXcr0(_), Action::Grow(features)) => {
                assert!(!features.is_empty());
                assert_eq!(gate.waiting_for(), Some(features));
                assert!((gate.granted() & features).is_empty());
                assert_eq!(gate.registers(), before.registers());
            }
            (Event::WriteXfd(_) | Event::WriteXcr0(_), Action::InjectGp(fault)) => {
                assert!(!fault.to_string().is_empty());
                assert_eq!(gate.registers(), before.registers());
                assert_eq!(gate.waiting_for(), before.waiting_for());
            }
            (Event::Deny, Action::InjectGp(_)) => {
                assert!(before.waiting_for().is_some());
                assert_eq!(gate.registers(), before.registers());
                assert_eq!(gate.waiting_for(), None);
            }
            (Event::Grant | Event::Deny, Action::Complete) => {
                assert_eq!(gate.waiting_for(), None);
            }
            (Event::Reset, Action::Complete) => {
                assert_eq!(gate.registers(), Registers::RESET);
                assert_eq!(gate.waiting_for(), None);
            }
            (event, action) => panic!("{action:?} after {event:?}"),
        }
    }
}

fn bitmap(input: &mut Input<'_>) -> XFeatures {
    const COMMON: [u64; 8] = [0, 1, 3, 7, 0x40000, 0x60007, 0x602e7, 0x20007];
    XFeatures::from_bits_retain(match input.u8() {
        choice @ 0..8 => COMMON[usize::from(choice)],
        _ => input.u64(),
    })
}

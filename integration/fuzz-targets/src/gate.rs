//! The gate under any sequence of events: nothing is usable before its grant, and a question stands
//! until it is answered.

use vcpu_realloc::{Action, Event, Fault, Gate, SavedGrant};
use xsave_state::XFeatures;

use crate::input::Input;
use crate::layouts;

/// A layout, then events: kind (1 byte) and, for values, each by a byte or 8 bytes.
pub fn gate(data: &[u8]) {
    let mut input = Input::new(data);
    let layout = layouts::pick(&mut input);
    let mut gate = Gate::new(layout);
    let dynamic = layout.xfd();
    if let Ok(grant) = SavedGrant::from_bytes(data, dynamic) {
        assert_eq!(grant.to_bytes(), data);
        assert!(dynamic.contains(grant.features()));
    }
    // What observations and restores show is not the gate's doing.
    let mut shown = false;
    while !input.is_empty() {
        let event = event(&mut input);
        let before = gate.clone();
        let action = gate.on(event);
        shown |= matches!(
            event,
            Event::ObserveXcr0(_) | Event::Observe { .. } | Event::Restore { .. }
        );
        shown &= event != Event::Reset;

        let (xcr0, xfd) = (gate.xcr0(), gate.xfd());
        assert!(shown || dynamic.contains(xfd));
        assert!(dynamic.contains(gate.granted()));
        let usable = (xcr0 - xfd) & dynamic;
        assert!(shown || gate.granted().contains(usable), "{event:?}");
        let granted = match event {
            Event::Grant(features) => before.granted() | (features & dynamic),
            _ => before.granted(),
        };
        assert_eq!(gate.granted(), granted, "{event:?}");
        assert!(dynamic.contains(gate.promised()));
        assert!(gate.promised().contains(before.promised() | granted));
        let same = (xcr0, xfd) == (before.xcr0(), before.xfd());
        match action {
            Action::Complete | Action::PassThrough => {
                assert_eq!(gate.waiting_for(), None);
                assert_eq!(action == Action::PassThrough, gate.has_passed());
                match event {
                    Event::WriteXfd(value) => assert_eq!(xfd, value),
                    Event::WriteXcr0(value) | Event::ObserveXcr0(value) => assert_eq!(xcr0, value),
                    Event::Deny | Event::Fail | Event::Retry => {
                        assert_eq!(before.waiting_for(), None);
                        assert!(same);
                    }
                    Event::Withdraw | Event::Init => assert!(same),
                    _ => {}
                }
            }
            Action::InjectGp(fault) => {
                assert!(!fault.to_string().is_empty());
                if let Fault::Denied { features } = fault {
                    assert!(!features.intersects(before.promised()));
                }
                assert!(same);
            }
            Action::Grow(growth) => {
                assert_eq!(gate.waiting_for(), Some(growth));
                let features = growth.features();
                assert!(!features.is_empty() && dynamic.contains(features));
                assert!(!features.intersects(gate.granted()));
                assert!(growth.area_bytes() <= layout.standard_size());
                assert!(growth.bytes() > 0);
                // A write is held back; what is found is there.
                let write = matches!(event, Event::WriteXfd(_) | Event::WriteXcr0(_));
                assert!(same || !write, "{event:?}");
            }
            Action::Hold => {
                assert!(before.waiting_for().is_some());
                assert_eq!(gate.waiting_for(), before.waiting_for());
            }
            action => panic!("{action:?} after {event:?}"),
        }
    }
}

fn event(input: &mut Input<'_>) -> Event {
    match input.u8() % 13 {
        0 => Event::WriteXfd(bitmap(input)),
        1 => Event::WriteXcr0(bitmap(input)),
        2 => Event::ObserveXcr0(bitmap(input)),
        3 => Event::Grant(bitmap(input)),
        4 => Event::Deny,
        5 => Event::Reset,
        6 => Event::Observe {
            xcr0: bitmap(input),
            xfd: bitmap(input),
            in_use: bitmap(input),
        },
        7 => Event::Restore {
            xcr0: bitmap(input),
            xfd: bitmap(input),
            in_use: bitmap(input),
            granted: bitmap(input),
        },
        8 => Event::Fail,
        9 => Event::Retry,
        10 => Event::Withdraw,
        11 => Event::GrantedElsewhere(bitmap(input)),
        _ => Event::Init,
    }
}

fn bitmap(input: &mut Input<'_>) -> XFeatures {
    const COMMON: [u64; 8] = [0, 1, 3, 7, 0x40000, 0x60007, 0x602e7, 0x20007];
    XFeatures::from_bits_retain(match input.u8() {
        choice @ 0..8 => COMMON[usize::from(choice)],
        _ => input.u64(),
    })
}

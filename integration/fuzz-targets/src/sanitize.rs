//! `sanitize`: what comes out passes the second checker, and going through again changes nothing.

use xsave_state::sanitize::sanitize as run;
use xsave_state::{
    ComponentId, ExtendedState, Image, Losses, Misfit, SanitizeError, UntrustedArea, XFeatures,
};

use crate::input::Input;
use crate::{area, checker, layouts};

const GUEST: u8 = 1;
const COMPACTED: u8 = 2;

/// A layout, flags, the guest's components where the flags say so, what may be lost (1 byte), the
/// registers (8 bytes each) and an area.
pub fn sanitize(data: &[u8]) {
    let mut input = Input::new(data);
    let layout = layouts::pick(&mut input);
    let flags = input.u8();
    let guest = (flags & GUEST != 0).then(|| XFeatures::from_bits_retain(input.u64()));
    let allowed = Losses::from_bits_truncate(u32::from(input.u8()));
    let registers = input.registers();
    let compacted = flags & COMPACTED != 0;
    let area = if compacted {
        area::compacted(&mut input, layout)
    } else {
        area::standard(&mut input, layout)
    };
    let mut untrusted = UntrustedArea::new(&area, registers);
    if let Some(guest) = guest {
        untrusted = untrusted.of_guest_with(guest);
    }

    // What is valid, and what the guest could have, is not changed.
    let valid = Image::parse(&area, layout)
        .ok()
        .and_then(|image| ExtendedState::new(image, registers).ok())
        .filter(|state| {
            let in_use = state.image().xstate_bv() - XFeatures::LEGACY;
            guest.is_none_or(|guest| guest.contains(in_use))
        });
    let sanitized = match run(&untrusted, layout, allowed) {
        Ok(sanitized) => sanitized,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(valid.is_none(), "{error}");
            match error {
                SanitizeError::Image(_) | SanitizeError::State(_) => panic!("{error}"),
                SanitizeError::Refused { lost, report } => {
                    assert!(!lost.is_empty());
                    let not_allowed = |misfit: &&Misfit| !allowed.contains(misfit.loss());
                    assert!(report.lost().filter(not_allowed).eq(&lost));
                    // The same with everything allowed.
                    let all = run(&untrusted, layout, Losses::all()).unwrap();
                    assert_eq!(all.report, report);
                }
                _ => {}
            }
            return;
        }
    };
    let (state, report) = (&sanitized.state, &sanitized.report);
    let image = state.image();

    assert_eq!(checker::area(image.as_bytes(), layout), None);
    let now = state.registers();
    let rule = checker::registers(
        [now.xcr0, now.xfd, now.xfd_err].map(|bits| bits.bits()),
        image.xstate_bv().bits(),
        layout.user().bits(),
        layout.xfd().bits(),
    );
    assert_eq!(rule, None);
    nothing_else_in_it(image);
    assert_eq!(state.misfits(layout).count(), 0);
    assert!(report.lost().all(|misfit| allowed.contains(misfit.loss())));
    for change in report.changes() {
        assert!(!change.to_string().is_empty());
    }

    let again = UntrustedArea::new(image.as_bytes(), now);
    let again = run(&again, layout, Losses::empty()).unwrap();
    assert_eq!(again.report.changes(), []);
    assert_eq!(&again.state, state);
    assert_eq!(again.state.image().as_bytes(), image.as_bytes());

    match valid {
        Some(valid) => {
            assert_eq!(report.changes(), []);
            assert_eq!(&valid, state);
        }
        None => assert_ne!(report.changes(), []),
    }
}

/// Bytes that mean nothing are zero: nothing of the source gets through there.
fn nothing_else_in_it(image: &Image<'_>) {
    let mut area = image.as_bytes().to_vec();
    for component in image.layout().components() {
        let id = component.id();
        if let Some(offset) = component.offset()
            && image.xstate_bv().contains(id.bit())
            && id != ComponentId::X87
        {
            area[offset..offset + component.size()].fill(0);
        }
    }
    if image.xstate_bv().contains(XFeatures::X87) {
        area[..24].fill(0);
        area[32..160].fill(0);
    } else {
        assert_eq!(area[..2], [0x7f, 3]);
        area[..2].fill(0);
    }
    area[24..28].fill(0);
    area[512..520].fill(0);
    assert!(area.iter().all(|&byte| byte == 0));
}

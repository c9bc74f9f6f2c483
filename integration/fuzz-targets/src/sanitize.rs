//! `sanitize`: what comes out passes the second checker, and going through again changes nothing.

use xsave_state::sanitize::{
    Change, Foreign, Losses, Policy, SanitizeError, Target, sanitize as run,
};
use xsave_state::{ComponentId, ExtendedState, Image, Registers, XFeatures};

use crate::input::Input;
use crate::{area, checker, layouts};

const KERNEL: u8 = 1;
const NO_XFD: u8 = 2;
const GUEST: u8 = 4;
const COMPACTED: u8 = 8;

/// A layout, flags, the kernel's and the guest's components where the flags say so, the policy, the
/// registers (8 bytes each) and an area.
pub fn sanitize(data: &[u8]) {
    let mut input = Input::new(data);
    let layout = layouts::pick(&mut input);
    let flags = input.u8();
    let mut target = Target::new(layout);
    if flags & KERNEL != 0 {
        target = target.with_kernel_components(XFeatures::from_bits_retain(input.u64()));
    }
    if flags & NO_XFD != 0 {
        target = target.without_xfd();
    }
    let guest = (flags & GUEST != 0).then(|| XFeatures::from_bits_retain(input.u64()));
    let policy = match input.u8() {
        0 => Policy::Unchanged,
        1 => Policy::Lossless,
        bits => Policy::Allow(Losses::from_bits_truncate(u32::from(bits) >> 2)),
    };
    let registers = Registers {
        xcr0: XFeatures::from_bits_retain(input.u64()),
        xfd: XFeatures::from_bits_retain(input.u64()),
        xfd_err: XFeatures::from_bits_retain(input.u64()),
    };
    let compacted = flags & COMPACTED != 0;
    let area = if compacted {
        area::compacted(&mut input, layout)
    } else {
        area::standard(&mut input, layout)
    };
    let mut foreign = Foreign::new(&area, registers);
    if let Some(guest) = guest {
        foreign = foreign.with_guest(guest);
    }

    // What is valid, and within the target, loses nothing.
    let valid = Image::parse(&area, layout)
        .ok()
        .and_then(|image| ExtendedState::new(image, registers).ok())
        .filter(|state| {
            let Registers { xcr0, xfd, xfd_err } = registers;
            let in_use = state.image().xstate_bv();
            target.components().contains(xcr0 | in_use)
                && target.xfd().contains(xfd | xfd_err)
                && guest.is_none_or(|guest| guest.contains(in_use))
        });
    let sanitized = match run(&foreign, &target, policy) {
        Ok(sanitized) => sanitized,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            assert!(valid.is_none(), "{error}");
            match error {
                SanitizeError::Image(_) | SanitizeError::State(_) => panic!("{error}"),
                SanitizeError::Refused { report, .. } => {
                    assert!(!report.changes().is_empty());
                    // The same with everything allowed.
                    let all = run(&foreign, &target, Policy::Allow(Losses::all())).unwrap();
                    assert!(all.report.losses().contains(report.losses()));
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
    let user = target.components().bits();
    assert_eq!(image.xstate_bv().bits() & !user, 0);
    let rule = checker::registers(
        [now.xcr0, now.xfd, now.xfd_err].map(|bits| bits.bits()),
        image.xstate_bv().bits(),
        user,
        target.xfd().bits(),
    );
    assert_eq!(rule, None);
    nothing_else_in_it(image);

    match policy {
        Policy::Unchanged => assert!(report.changes().is_empty()),
        Policy::Lossless => assert!(report.losses().is_empty()),
        Policy::Allow(losses) => assert!(losses.contains(report.losses())),
        _ => unreachable!(),
    }
    for change in report.changes() {
        assert!(!change.to_string().is_empty());
    }

    let again = Foreign::new(image.as_bytes(), now);
    let again = match policy {
        Policy::Unchanged => run(&again, &target, Policy::Unchanged).unwrap(),
        _ => run(&again, &target, Policy::Lossless).unwrap(),
    };
    assert_eq!(again.report.changes(), []);
    assert_eq!(&again.state, state);
    assert_eq!(again.state.image().as_bytes(), image.as_bytes());

    if let Some(valid) = valid {
        assert!(report.losses().is_empty(), "{report}");
        assert_eq!(state.registers(), registers);
        let released = match policy {
            Policy::Unchanged => XFeatures::empty(),
            _ => valid.image().initial_valued(),
        };
        assert_eq!(&valid.image().clone().without(released), image);
    }
    // What a change does not name is as it was.
    if report.changes().is_empty() && !compacted {
        assert_eq!(Image::parse(&area, layout).as_ref(), Ok(image));
        assert_eq!(state.registers(), registers);
    }
    let disabled = report
        .changes()
        .iter()
        .any(|change| matches!(change, Change::Disabled { .. }));
    assert!(!disabled || !registers.xfd.is_empty());
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

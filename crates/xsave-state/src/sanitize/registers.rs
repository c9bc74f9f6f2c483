//! XCR0, IA32_XFD and IA32_XFD_ERR that the target has.

use super::Target;
use super::report::{Change, Report};
use crate::state::Registers;
use crate::xcr0;

pub(super) fn clean(was: Registers, target: &Target, report: &mut Report) -> Registers {
    let now = Registers {
        xcr0: xcr0::largest_within(was.xcr0, target.components()),
        xfd: was.xfd & target.xfd(),
        xfd_err: was.xfd_err & target.xfd(),
    };
    if now.xcr0 != was.xcr0 {
        report.add(Change::Xcr0 {
            was: was.xcr0,
            now: now.xcr0,
            supported: target.components(),
        });
    }
    if now.xfd != was.xfd {
        report.add(Change::Xfd {
            was: was.xfd,
            now: now.xfd,
            supported: target.xfd(),
        });
    }
    if now.xfd_err != was.xfd_err {
        report.add(Change::XfdErr {
            was: was.xfd_err,
            now: now.xfd_err,
            supported: target.xfd(),
        });
    }
    now
}

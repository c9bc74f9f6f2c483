//! The exhaustive searches: which machines, within which bounds.

use vcpu_realloc::fpswitch::Strategy;

use super::setup::{Bounds, Host, Policy, Program, Setup};

pub(crate) struct Search {
    pub host: &'static str,
    pub setup: Setup,
}

pub(crate) fn all() -> Vec<Search> {
    use Program::{Any, Lazy, Linux};
    let once = Bounds {
        denials: 1,
        failures: 1,
        moves: 1,
        resets: 1,
        inits: 1,
    };
    let some = |failures, denials, moves, resets, inits| Bounds {
        denials,
        failures,
        moves,
        resets,
        inits,
    };
    let search = |host, programs: &[Program], kind, bounds| Search {
        host,
        setup: Setup {
            bounds,
            ..Setup::new(programs, kind)
        },
    };
    let kvm =
        |programs: &[Program], bounds| search("KVM", programs, Host::Kvm { fixed: true }, bounds);
    let each = |programs: &[Program], bounds| {
        let mut search = kvm(programs, bounds);
        search.host = "KVM, each vCPU on its own";
        search.setup.policy = Policy::Vcpu;
        search
    };
    let unfixed = |host, programs: &[Program], bounds, early_passthrough| {
        let mut search = search(host, programs, Host::Kvm { fixed: false }, bounds);
        search.setup.early_passthrough = early_passthrough;
        search
    };
    let one = |programs: &[Program], bounds| {
        search(
            "own, option 1",
            programs,
            Host::Own(Strategy::AtExit),
            bounds,
        )
    };
    let two = |programs: &[Program], bounds| {
        search(
            "own, option 2",
            programs,
            Host::Own(Strategy::AroundSave),
            bounds,
        )
    };
    let mut contents = kvm(&[Linux], once);
    contents.setup.contents = 2;
    vec![
        contents,
        kvm(&[Any], once),
        kvm(&[Linux, Linux], some(1, 1, 1, 0, 0)),
        kvm(&[Linux, Linux], some(1, 0, 1, 1, 0)),
        kvm(&[Linux, Linux], some(1, 0, 1, 0, 1)),
        kvm(&[Linux, Any], some(1, 0, 0, 0, 0)),
        each(&[Linux, Linux], some(1, 1, 1, 0, 0)),
        unfixed(
            "KVM without the fix",
            &[Linux, Linux],
            some(1, 0, 0, 1, 0),
            false,
        ),
        unfixed(
            "KVM without the fix, early passthrough",
            &[Any],
            some(1, 1, 1, 0, 0),
            true,
        ),
        unfixed(
            "KVM without the fix, early passthrough",
            &[Linux, Linux],
            some(1, 0, 1, 0, 0),
            true,
        ),
        search(
            "own, neither",
            &[Linux, Linux],
            Host::Own(Strategy::Linux),
            some(1, 0, 0, 1, 0),
        ),
        one(&[Any], once),
        one(&[Lazy, Lazy], some(1, 1, 1, 0, 0)),
        two(&[Any], once),
        two(&[Lazy, Lazy], some(1, 1, 1, 0, 0)),
    ]
}

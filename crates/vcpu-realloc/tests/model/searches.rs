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
        migrations: 0,
    };
    let some = |failures, denials, moves, resets, inits| Bounds {
        denials,
        failures,
        moves,
        resets,
        inits,
        migrations: 0,
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
    let unfixed = |programs: &[Program], bounds| {
        let host = Host::Kvm { fixed: false };
        search("KVM without the fix", programs, host, bounds)
    };
    // A task goes from one vCPU to the other, before and after a move, with a denial at any time.
    let migrating = |mut search: Search| {
        search.setup.bounds.migrations = 1;
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
        migrating(kvm(&[Linux, Linux], some(0, 1, 1, 0, 0))),
        each(&[Linux, Linux], some(1, 1, 1, 0, 0)),
        migrating(each(&[Linux, Linux], some(0, 1, 1, 0, 0))),
        unfixed(&[Linux, Linux], some(1, 0, 0, 1, 0)),
        unfixed(&[Linux, Linux], some(1, 0, 1, 0, 0)),
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

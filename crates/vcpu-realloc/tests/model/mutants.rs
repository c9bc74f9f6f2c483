//! One protection taken out at a time, and how the model then breaks.

use vcpu_realloc::fpswitch::Strategy;

use super::setup::{Bounds, Host, Policy, Program, Protection, Setup};

pub(crate) struct Mutant {
    /// What is missing.
    pub name: String,
    pub setup: Setup,
    /// The claim that breaks.
    pub breaks: &'static str,
}

const DIES: &str = "the host never takes #NM";
const GUEST_DIES: &str = "no guest's kernel takes #NM";
const LOSES: &str = "no tile is lost";
const BEFORE: &str = "nothing exists before the grant";
const WROTE: &str = "the guest has what it wrote";
const EXITS: &str = "at most two exits per vCPU, none after first use";
const ASKED: &str = "the VMM is asked at first use only";
const RETRY: &str = "every failure reaches the VMM and can be retried";

pub(crate) fn all() -> Vec<Mutant> {
    use Program::{Any, Lazy, Linux};
    let fixed = Host::Kvm { fixed: true };
    let unfixed = Host::Kvm { fixed: false };
    let bounds = |denials, failures, moves, resets, inits| Bounds {
        denials,
        failures,
        moves,
        resets,
        inits,
        migrations: 0,
    };
    let a_task_goes = Bounds {
        denials: 1,
        migrations: 1,
        ..Bounds::default()
    };
    let nothing = bounds(0, 0, 0, 0, 0);
    let a_move = bounds(0, 0, 1, 0, 0);
    let without = |protection: Protection, programs: &[Program], host, bounds, breaks| Mutant {
        name: protection.to_string(),
        setup: Setup {
            bounds,
            without: Some(protection),
            ..Setup::new(programs, host)
        },
        breaks,
    };
    let with = |name: &str, programs: &[Program], host, bounds, breaks| Mutant {
        name: name.into(),
        setup: Setup {
            bounds,
            ..Setup::new(programs, host)
        },
        breaks,
    };
    use Protection::*;
    vec![
        without(GrantBeforeUse, &[Linux], fixed, nothing, BEFORE),
        without(ObserveXcr0, &[Linux], fixed, nothing, BEFORE),
        without(AllGrownBeforeLift, &[Linux, Linux], fixed, nothing, BEFORE),
        without(LiftAtFirstUse, &[Linux], fixed, nothing, EXITS),
        without(
            DenialHasNoEffect,
            &[Linux],
            fixed,
            bounds(1, 0, 0, 0, 0),
            BEFORE,
        ),
        without(
            FailureKeepsTheWrite,
            &[Linux],
            fixed,
            bounds(0, 1, 0, 0, 0),
            RETRY,
        ),
        without(
            ResetDropsTheWrite,
            &[Linux],
            fixed,
            bounds(0, 0, 0, 1, 0),
            WROTE,
        ),
        without(InitKeepsXfd, &[Linux], fixed, bounds(0, 0, 0, 0, 1), WROTE),
        without(ObserveAtInit, &[Any], fixed, bounds(1, 0, 0, 0, 1), ASKED),
        without(ReleaseBeforeXfd, &[Any], fixed, nothing, DIES),
        without(XfdBeforeXsave, &[Linux], fixed, a_move, LOSES),
        without(XfdInSnapshot, &[Linux], fixed, a_move, WROTE),
        without(SnapshotRule, &[Linux], unfixed, a_move, DIES),
        without(RestoreIsTold, &[Linux], fixed, a_move, BEFORE),
        without(MoveWithdrawsTheWrite, &[Linux], fixed, a_move, WROTE),
        Mutant {
            name: NoDenialAfterFirstUse.to_string(),
            setup: Setup {
                policy: Policy::Vcpu,
                bounds: a_task_goes,
                without: Some(NoDenialAfterFirstUse),
                ..Setup::new(&[Linux, Linux], fixed)
            },
            breaks: GUEST_DIES,
        },
        without(
            GrantTravels,
            &[Linux],
            fixed,
            bounds(1, 0, 1, 0, 0),
            GUEST_DIES,
        ),
        without(
            AskedWithoutGrant,
            &[Linux],
            fixed,
            bounds(1, 0, 1, 0, 0),
            GUEST_DIES,
        ),
        without(RestorePassesThrough, &[Linux], unfixed, a_move, DIES),
        with(
            "a kernel without that fix, and a guest that enables AMX while XFD is clear: nothing passes \
             the register through, and the filter is lifted when it is found",
            &[Any],
            unfixed,
            nothing,
            DIES,
        ),
        with(
            "a hypervisor with neither option 1 nor 2 (option 0, as Linux), and a guest that leaves \
             tiles in the registers while XFD is set",
            &[Lazy],
            Host::Own(Strategy::Linux),
            nothing,
            LOSES,
        ),
        without(
            OptionAtRestore,
            &[Lazy],
            Host::Own(Strategy::AroundSave),
            nothing,
            DIES,
        ),
        without(
            OptionAtSave,
            &[Lazy],
            Host::Own(Strategy::AroundSave),
            nothing,
            LOSES,
        ),
        without(
            OptionAtExit,
            &[Lazy],
            Host::Own(Strategy::AtExit),
            nothing,
            LOSES,
        ),
        without(
            OptionAtEntry,
            &[Lazy],
            Host::Own(Strategy::AtExit),
            nothing,
            WROTE,
        ),
    ]
}

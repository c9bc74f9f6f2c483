//! What of the driver needs no vCPU: the trap set and lifted, with each ioctl failing in turn; a kernel
//! without the capability; vCPUs that are added and restored.

use alloc::sync::Arc;
use core::sync::atomic::Ordering::Relaxed;

use kvm_ioctls::{MsrExitReason, MsrFilterDefaultAction, MsrFilterRangeFlags};
use xsave_state::{ExtendedState, Image, Layout, Registers, XFeatures};

use super::ioctl::{Simulated, VmHandle};
use super::*;
use crate::gate::tests::amx_layout;
use crate::{Answer, Request, SavedGrant, Scope};

const TILES: XFeatures = XFeatures::XTILEDATA;
/// Of a VM that had no first use, as far as its VMM knew.
const UNUSED: Option<SavedGrant> = Some(SavedGrant::of(XFeatures::empty()));
const NOTHING: Seen = Seen {
    first_use: None,
    lifted: Ok(false),
};
const TRAPPED: [&str; 2] = ["MsrExitReason(Filter)", "1 ranges"];
const FREE: [&str; 2] = ["0 ranges", "MsrExitReason(0x0)"];

fn never(request: &Request) -> Result<Answer, &'static str> {
    panic!("{request:?}")
}

fn install(vm: &Arc<Simulated>, can_trap: bool, options: Options) -> Result<VmGate, InstallError> {
    VmGate::on(VmHandle::simulated(vm), can_trap, &amx_layout(), options)
}

fn trapping(policy: Policy) -> (Arc<Simulated>, VmGate) {
    let vm = Arc::default();
    let options = Options {
        policy,
        ..Options::default()
    };
    let gate = install(&vm, true, options).unwrap();
    assert_eq!(vm.told(), TRAPPED);
    assert_eq!(gate.mode(), Mode::Trapping);
    (vm, gate)
}

/// A vCPU that had passed: AMX enabled, XFD clear.
fn passed() -> ExtendedState<'static> {
    let layout = amx_layout();
    let registers = Registers::RESET.with_xcr0(layout.user());
    ExtendedState::new(Image::initial(&layout), registers).unwrap()
}

#[test]
fn the_exit_comes_before_the_filter_and_goes_after_it() {
    let (vm, gate) = trapping(Policy::WholeVm);
    assert_eq!(gate.lift(), Ok(false));
    let mut handler = gate.vcpu(0, &mut never).unwrap();
    let seen = handler
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert_eq!(seen.first_use.unwrap().features(), TILES);
    assert_eq!(seen.lifted, Ok(true));
    assert_eq!(vm.told(), FREE);
    assert_eq!(gate.mode(), Mode::Lifted);
    assert_eq!(gate.lift(), Ok(false));
}

#[test]
fn a_vmm_s_own_filter_and_reasons_stay() {
    let vm = Arc::default();
    let own = MsrRange::new(MsrFilterRangeFlags::READ, 0x10, 1, &[0]).unwrap();
    let options = Options {
        filter: MsrFilter::new(MsrFilterDefaultAction::ALLOW, vec![own]).unwrap(),
        exit_reasons: MsrExitReason::Unknown,
        ..Options::default()
    };
    let gate = install(&vm, true, options).unwrap();
    assert_eq!(vm.told(), ["MsrExitReason(Unknown | Filter)", "2 ranges"]);
    let mut handler = gate.vcpu(0, &mut never).unwrap();
    let _ = handler
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert_eq!(vm.told(), ["1 ranges", "MsrExitReason(Unknown)"]);
}

#[test]
fn a_vmm_s_own_filter_that_has_the_register_is_named() {
    let vm = Arc::<Simulated>::default();
    let own = MsrRange::new(MsrFilterRangeFlags::WRITE, 0x1c4, 1, &[0]).unwrap();
    let options = Options {
        filter: MsrFilter::new(MsrFilterDefaultAction::ALLOW, vec![own]).unwrap(),
        ..Options::default()
    };
    let error = install(&vm, true, options).unwrap_err();
    assert!(matches!(
        error,
        InstallError::Merge(FilterError::DeniedAlready { index: 0x1c4 })
    ));
    assert!(vm.told().is_empty());
}

#[test]
fn a_trap_that_cannot_be_set_is_named_and_leaves_nothing() {
    for step in [1, 2] {
        let vm = Arc::<Simulated>::default();
        vm.fail_at.store(step, Relaxed);
        let error = install(&vm, true, Options::default()).unwrap_err();
        match step {
            1 => assert!(matches!(
                error,
                InstallError::Trap(TrapError::ExitReasons(_))
            )),
            _ => {
                assert!(matches!(error, InstallError::Trap(TrapError::Filter(_))));
                assert_eq!(vm.told().last().unwrap(), "MsrExitReason(0x0)");
            }
        }
    }
}

#[test]
fn a_trap_that_cannot_be_lifted_is_named_and_tried_again() {
    for step in [1, 2] {
        let (vm, gate) = trapping(Policy::WholeVm);
        let mut handler = gate.vcpu(0, &mut never).unwrap();
        vm.fail_at.store(step, Relaxed);
        let seen = handler
            .restored(&passed(), UNUSED, &mut Answer::Grant)
            .unwrap();
        let error = seen.lifted.unwrap_err();
        assert_eq!(handler.gate().granted(), TILES);
        vm.told();
        match step {
            // Writes leave as before, and the next one tries again.
            1 => {
                assert!(matches!(error, TrapError::Filter(_)));
                assert_eq!(gate.mode(), Mode::Trapping);
                assert_eq!(gate.lift(), Ok(true));
                assert_eq!(vm.told(), FREE);
            }
            // No write leaves any more; what is left to do is done by itself.
            _ => {
                assert!(matches!(error, TrapError::ExitReasons(_)));
                assert_eq!(gate.mode(), Mode::Lifted);
                vm.fail_at.store(1, Relaxed);
                assert!(matches!(gate.lift(), Err(TrapError::ExitReasons(_))));
                assert_eq!(gate.lift(), Ok(true));
                assert_eq!(vm.told(), FREE[1..]);
            }
        }
        assert_eq!(gate.lift(), Ok(false));
        assert_eq!(gate.mode(), Mode::Lifted);
    }
}

/// Half a trap is none: a vCPU that comes then is trapped again all the same.
#[test]
fn a_trap_that_was_lifted_by_half_is_set_again() {
    let (vm, gate) = trapping(Policy::EachVcpu);
    let mut first = gate.vcpu(0, &mut never).unwrap();
    vm.fail_at.store(2, Relaxed);
    let seen = first
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert!(matches!(seen.lifted, Err(TrapError::ExitReasons(_))));
    assert_eq!(vm.told(), FREE[..1]);
    let mut second = gate.vcpu(1, &mut never).unwrap();
    assert_eq!(vm.told(), TRAPPED);
    assert_eq!(gate.lift(), Ok(false));
    let _ = second
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert_eq!(vm.told(), FREE);
}

#[test]
fn without_the_capability_everything_is_asked_before_cpuid() {
    let vm = Arc::default();
    let gate = install(&vm, false, Options::default()).unwrap();
    assert_eq!(gate.mode(), Mode::AtCpuidTime);
    let mut asked = Vec::new();
    for id in [0, 1] {
        let mut vmm = |request: &Request| {
            asked.push((request.vcpu, request.growth.features(), request.scope));
            Ok::<_, ()>(Answer::Grant)
        };
        let mut handler = gate.vcpu(id, &mut vmm).unwrap();
        assert!(handler.gate().has_passed());
        assert_eq!(handler.restored(&passed(), UNUSED, &mut never), Ok(NOTHING));
    }
    assert_eq!(asked, [0, 1].map(|id| (id, TILES, Scope::Vcpu)));
    let error = gate.vcpu(2, &mut Answer::Deny).unwrap_err();
    assert!(matches!(error, StartError::Denied { growth } if growth.features() == TILES));
    assert!(error.to_string().contains("hide AMX"), "{error}");
    let error = gate.vcpu(2, &mut Answer::Later).unwrap_err();
    assert!(matches!(error, StartError::Undecided { growth } if growth.features() == TILES));
    let error = gate.vcpu(2, &mut |_: &Request| Err("no memory"));
    assert_eq!(error.unwrap_err(), StartError::Vmm("no memory"));
    assert!(vm.told().is_empty());
}

#[test]
fn without_amx_nothing_is_set_up() {
    let layout = Layout::legacy();
    let vm = Arc::default();
    let handle = VmHandle::simulated(&vm);
    let gate = VmGate::on(handle, true, &layout, Options::default()).unwrap();
    assert_eq!(gate.mode(), Mode::Absent);
    let mut handler = gate.vcpu(0, &mut never).unwrap();
    let state = ExtendedState::reset(&layout);
    for grant in [UNUSED, None] {
        let seen = handler.restored(&state, grant, &mut never);
        assert_eq!(seen, Ok(NOTHING));
    }
    assert_eq!(handler.observe(&state, &mut never), Ok(NOTHING));
    assert!(!gate.saved_grant().has_been());
    assert_eq!(gate.lift(), Ok(false));
    assert!(vm.told().is_empty());
}

/// KVM lets IA32_XFD disable tiles whatever CPUID says of it, and the gate is there for all of them.
#[test]
fn a_cpuid_that_hides_xfd_has_a_gate_all_the_same() {
    for (xfd, disableable) in [(1 << 4, 1 << 2), (1 << 4, 0), (0, 1 << 2), (0, 0)] {
        let layout = Layout::from_cpuid(|leaf, subleaf| match (leaf, subleaf) {
            (0, _) => [0x1e, 0, 0, 0],
            (1, _) => [0, 0, 1 << 26, 0],
            (0xd, 0) => [0x60003, 11008, 11008, 0],
            (0xd, 1) => [0xf | xfd, 9088, 0, 0],
            (0xd, 17) => [64, 2752, 2, 0],
            (0xd, 18) => [8192, 2816, 2 | disableable, 0],
            _ => [0; 4],
        })
        .unwrap();
        for (can_trap, mode) in [(true, Mode::Trapping), (false, Mode::AtCpuidTime)] {
            let vm = Arc::default();
            let handle = VmHandle::simulated(&vm);
            let gate = VmGate::on(handle, can_trap, &layout, Options::default()).unwrap();
            assert_eq!(gate.mode(), mode, "{xfd:#x} {disableable:#x}");
        }
    }
}

/// What a restored vCPU has cannot be denied; it does not run before it is granted.
#[test]
fn what_a_vcpu_has_already_is_granted_or_the_vmm_hears_of_it() {
    let (_, gate) = trapping(Policy::WholeVm);
    let mut handler = gate.vcpu(0, &mut never).unwrap();
    let denied = handler
        .restored(&passed(), UNUSED, &mut Answer::Deny)
        .unwrap_err();
    assert!(matches!(denied, ObserveError::Denied { .. }));
    let later = handler.observe(&passed(), &mut Answer::Later).unwrap_err();
    assert!(matches!(later, ObserveError::Undecided { .. }));
    let failed = handler.observe(&passed(), &mut |_: &Request| Err("no memory"));
    assert_eq!(failed, Err(ObserveError::Vmm("no memory")));
    assert_eq!(gate.mode(), Mode::Trapping);
    assert!(
        handler
            .observe(&passed(), &mut Answer::Grant)
            .unwrap()
            .first_use
            .is_some()
    );
    assert_eq!(gate.mode(), Mode::Lifted);
}

/// A vCPU that comes after the first use is grown when it comes.
#[test]
fn a_vcpu_that_is_added_later_is_asked_for_at_once() {
    let (vm, gate) = trapping(Policy::WholeVm);
    let mut first = gate.vcpu(0, &mut never).unwrap();
    let _ = first
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    let error = gate.vcpu(1, &mut Answer::Deny).unwrap_err();
    assert!(
        matches!(error, StartError::DeniedAfterFirstUse { vcpu: 1, growth }
        if growth.features() == TILES)
    );
    // The trap would have been there to ask; the policy is why it is not.
    assert!(error.to_string().contains("Policy::EachVcpu"), "{error}");
    let error = gate.vcpu(1, &mut Answer::Later).unwrap_err();
    assert!(matches!(error, StartError::Undecided { .. }));
    let second = gate.vcpu(1, &mut Answer::Grant).unwrap();
    assert!(second.gate().has_passed());
    assert_eq!(gate.mode(), Mode::Lifted);
    assert_eq!(vm.told(), FREE);
}

#[test]
fn under_each_vcpu_a_vcpu_that_is_added_later_is_trapped_again() {
    let (vm, gate) = trapping(Policy::EachVcpu);
    let mut first = gate.vcpu(0, &mut never).unwrap();
    let _ = first
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert_eq!(vm.told(), FREE);
    let mut second = gate.vcpu(1, &mut never).unwrap();
    assert_eq!(vm.told(), TRAPPED);
    assert_eq!(gate.mode(), Mode::Trapping);
    let _ = second
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert_eq!(vm.told(), FREE);
    // One that goes without having passed is not waited for.
    let third = gate.vcpu(2, &mut never).unwrap();
    assert_eq!(gate.lift(), Ok(false));
    drop(third);
    assert_eq!(gate.lift(), Ok(true));
}

/// A vCPU of a Linux guest between two tasks with tiles: XFD armed, and none in use.
fn between_tasks() -> ExtendedState<'static> {
    let layout = amx_layout();
    let registers = Registers::RESET.with_xcr0(layout.user()).with_xfd(TILES);
    ExtendedState::new(Image::initial(&layout), registers).unwrap()
}

/// What was saved of the first use decides, and without it the answer that loses nothing.
#[test]
fn a_restored_vcpu_is_asked_about_what_its_vm_was_granted() {
    let used = Some(SavedGrant::of(TILES));
    for policy in [Policy::WholeVm, Policy::EachVcpu] {
        for (grant, asks) in [(UNUSED, false), (used, true), (None, true)] {
            let (_, gate) = trapping(policy);
            let mut handlers = [0, 1].map(|id| gate.vcpu(id, &mut never).unwrap());
            for handler in &mut handlers {
                if !asks {
                    let seen = handler.restored(&between_tasks(), grant, &mut never);
                    assert_eq!(seen, Ok(NOTHING));
                    continue;
                }
                // A refusal is heard before anything runs, as often as it is said.
                for _ in 0..2 {
                    let denied = handler.restored(&between_tasks(), grant, &mut Answer::Deny);
                    assert!(matches!(denied, Err(ObserveError::Denied { .. })));
                }
                let later = handler.observe(&between_tasks(), &mut Answer::Later);
                assert!(matches!(later, Err(ObserveError::Undecided { .. })));
                let stop = handler.observe(&between_tasks(), &mut Answer::Stop);
                assert!(matches!(stop, Err(ObserveError::Undecided { .. })));
                assert_eq!(handler.gate().promised(), TILES);
            }
            assert_eq!(gate.saved_grant().has_been(), asks);
            assert!(gate.first_uses().is_empty());
            if asks {
                let asked = handlers.iter_mut().filter_map(|handler| {
                    let grant = handler.restored(&between_tasks(), grant, &mut Answer::Grant);
                    grant.unwrap().first_use
                });
                // By the default policy the first of them is that of all.
                let times = if policy == Policy::WholeVm { 1 } else { 2 };
                assert_eq!(asked.count(), times);
                assert_eq!(gate.mode(), Mode::Lifted);
            }
        }
    }
}

/// What an operator can read, and what is saved with the VM.
#[test]
fn first_uses_are_recorded_and_saved() {
    let (_, gate) = trapping(Policy::EachVcpu);
    let mut handlers = [3, 5].map(|id| gate.vcpu(id, &mut never).unwrap());
    assert_eq!(gate.saved_grant(), SavedGrant::default());
    let _ = handlers[1].observe(&passed(), &mut Answer::Grant).unwrap();
    let _ = handlers[0]
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    let recorded: Vec<_> = gate
        .first_uses()
        .iter()
        .map(|use_| (use_.vcpu, use_.occasion, use_.growth.features()))
        .collect();
    let expected = [
        (5, Occasion::Observed, TILES),
        (3, Occasion::Restored, TILES),
    ];
    assert_eq!(recorded, expected);
    let text = gate.first_uses()[0].to_string();
    assert!(
        text.starts_with("vCPU 5, at a capture: XTILEDATA"),
        "{text}"
    );
    assert_eq!(gate.saved_grant(), SavedGrant::of(TILES));

    let (_, gate) = trapping(Policy::WholeVm);
    let mut first = gate.vcpu(0, &mut never).unwrap();
    let _ = first
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    let _added = gate.vcpu(1, &mut Answer::Grant).unwrap();
    let occasions: Vec<_> = gate.first_uses().iter().map(|u| u.occasion).collect();
    assert_eq!(occasions, [Occasion::Restored, Occasion::Created]);

    // Without the capability all is granted when the vCPU comes, and that travels, too.
    let gate = install(&Arc::default(), false, Options::default()).unwrap();
    let _vcpu = gate.vcpu(0, &mut Answer::Grant).unwrap();
    assert_eq!(gate.saved_grant(), SavedGrant::of(TILES));
}

/// A VMM's own filter that changes while the trap is set goes into it, and is what remains.
#[test]
fn a_vmm_s_own_filter_can_change_after_install() {
    let filter = |count| {
        let range = |n: u32| MsrRange::new(MsrFilterRangeFlags::READ, 0x10 + n, 1, &[0]).unwrap();
        let ranges = (0..count).map(range).collect();
        MsrFilter::new(MsrFilterDefaultAction::ALLOW, ranges).unwrap()
    };
    let (vm, gate) = trapping(Policy::WholeVm);
    gate.set_filter(filter(2), MsrExitReason::Unknown).unwrap();
    let reasons = "MsrExitReason(Unknown | Filter)";
    assert_eq!(vm.told(), [reasons, "3 ranges", reasons]);
    assert_eq!(gate.mode(), Mode::Trapping);

    // One that denies the register itself is refused, and one that KVM refuses is not in force.
    let own = MsrRange::new(MsrFilterRangeFlags::WRITE, 0x1c4, 1, &[0]).unwrap();
    let own = MsrFilter::new(MsrFilterDefaultAction::ALLOW, vec![own]).unwrap();
    let refused = gate.set_filter(own, MsrExitReason::empty());
    assert!(matches!(refused, Err(SetFilterError::Merge(_))));
    assert!(vm.told().is_empty());
    for step in [1, 2] {
        vm.fail_at.store(step, Relaxed);
        let refused = gate.set_filter(filter(5), MsrExitReason::empty());
        assert!(matches!(refused, Err(SetFilterError::Trap(_))));
        vm.told();
    }

    // It is what remains when the trap is lifted, and can still change then.
    let mut handler = gate.vcpu(0, &mut never).unwrap();
    let _ = handler
        .restored(&passed(), UNUSED, &mut Answer::Grant)
        .unwrap();
    assert_eq!(vm.told(), ["2 ranges", "MsrExitReason(Unknown)"]);
    gate.set_filter(filter(4), MsrExitReason::empty()).unwrap();
    let told = vm.told();
    assert_eq!(told[1..], ["4 ranges", "MsrExitReason(0x0)"]);
    assert_eq!(gate.mode(), Mode::Lifted);
}

/// Who prints an error with its sources reads each cause once: it is in the text, or the text is the
/// cause's own.
#[test]
fn no_error_says_its_cause_twice() {
    let errno = || vmm_sys_util::errno::Error::new(12);
    let trap = TrapError::ExitReasons(errno());
    let errors: [Box<dyn std::error::Error>; 13] = [
        Box::new(HandleError::Vmm(errno())),
        Box::new(Xcr0Error::Ioctl(errno())),
        Box::new(HandleError::<core::fmt::Error>::Rewind(RewindError::Run(
            errno(),
        ))),
        Box::new(ObserveError::Vmm(errno())),
        Box::new(SetFilterError::Trap(trap)),
        Box::new(CompleteError::<core::fmt::Error>::Run(errno())),
        Box::new(StartError::Vmm(errno())),
        Box::new(StartError::<core::fmt::Error>::Trap(trap)),
        Box::new(trap),
        Box::new(TrapError::Filter(errno())),
        Box::new(InstallError::Descriptor(errno().into())),
        Box::new(InstallError::Trap(trap)),
        Box::new(RewindError::Run(errno())),
    ];
    for error in errors {
        let text = error.to_string();
        assert!(text.contains("Cannot allocate memory"), "{text}");
        assert!(error.source().is_none(), "{text}");
    }
}

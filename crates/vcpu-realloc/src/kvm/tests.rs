//! What of the driver needs no vCPU: the trap set and lifted, with each ioctl failing in turn; a kernel
//! without the capability; vCPUs that are added and restored.

use alloc::sync::Arc;
use core::sync::atomic::Ordering::Relaxed;

use kvm_ioctls::{MsrExitReason, MsrFilterDefaultAction, MsrFilterRangeFlags};
use xsave_state::{ExtendedState, Image, Layout, Registers, XFeatures};

use super::ioctl::{Simulated, VmHandle};
use super::*;
use crate::gate::tests::amx_layout;
use crate::{Answer, Request, Scope};

const TILES: XFeatures = XFeatures::XTILEDATA;
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
    let growth = handler.restored(&passed(), &mut Answer::Grant).unwrap();
    assert_eq!(growth.unwrap().features(), TILES);
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
    handler.restored(&passed(), &mut Answer::Grant).unwrap();
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
        let error = handler.restored(&passed(), &mut Answer::Grant).unwrap_err();
        assert_eq!(handler.gate().granted(), TILES);
        vm.told();
        match step {
            // Writes leave as before, and the next one tries again.
            1 => {
                assert!(matches!(error, ObserveError::Lift(TrapError::Filter(_))));
                assert_eq!(gate.mode(), Mode::Trapping);
                assert_eq!(gate.lift(), Ok(true));
                assert_eq!(vm.told(), FREE);
            }
            // No write leaves any more; what is left to do is done by itself.
            _ => {
                assert!(matches!(
                    error,
                    ObserveError::Lift(TrapError::ExitReasons(_))
                ));
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
    let error = first.restored(&passed(), &mut Answer::Grant).unwrap_err();
    assert!(matches!(
        error,
        ObserveError::Lift(TrapError::ExitReasons(_))
    ));
    assert_eq!(vm.told(), FREE[..1]);
    let mut second = gate.vcpu(1, &mut never).unwrap();
    assert_eq!(vm.told(), TRAPPED);
    assert_eq!(gate.lift(), Ok(false));
    second.restored(&passed(), &mut Answer::Grant).unwrap();
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
        assert_eq!(handler.restored(&passed(), &mut never), Ok(None));
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
    assert_eq!(handler.restored(&state, &mut never), Ok(None));
    assert_eq!(handler.observe(&state, &mut never), Ok(None));
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
    let denied = handler.restored(&passed(), &mut Answer::Deny).unwrap_err();
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
            .is_some()
    );
    assert_eq!(gate.mode(), Mode::Lifted);
}

/// A vCPU that comes after the first use is grown when it comes.
#[test]
fn a_vcpu_that_is_added_later_is_asked_for_at_once() {
    let (vm, gate) = trapping(Policy::WholeVm);
    let mut first = gate.vcpu(0, &mut never).unwrap();
    first.restored(&passed(), &mut Answer::Grant).unwrap();
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
    first.restored(&passed(), &mut Answer::Grant).unwrap();
    assert_eq!(vm.told(), FREE);
    let mut second = gate.vcpu(1, &mut never).unwrap();
    assert_eq!(vm.told(), TRAPPED);
    assert_eq!(gate.mode(), Mode::Trapping);
    second.restored(&passed(), &mut Answer::Grant).unwrap();
    assert_eq!(vm.told(), FREE);
    // One that goes without having passed is not waited for.
    let third = gate.vcpu(2, &mut never).unwrap();
    assert_eq!(gate.lift(), Ok(false));
    drop(third);
    assert_eq!(gate.lift(), Ok(true));
}

/// Who prints an error with its sources reads each cause once: it is in the text, or the text is the
/// cause's own.
#[test]
fn no_error_says_its_cause_twice() {
    let errno = || vmm_sys_util::errno::Error::new(12);
    let trap = TrapError::ExitReasons(errno());
    let errors: [Box<dyn std::error::Error>; 12] = [
        Box::new(HandleError::Vmm(errno())),
        Box::new(HandleError::<core::fmt::Error>::Xcrs(errno())),
        Box::new(HandleError::<core::fmt::Error>::Lift(trap)),
        Box::new(ObserveError::Vmm(errno())),
        Box::new(ObserveError::<core::fmt::Error>::Lift(trap)),
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

//! Capture and restore on the /dev/kvm that is here, with AMX where the host has it.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;
#[expect(unsafe_code, reason = "a system call and a VM need it")]
mod machine;

use common::{area, layout, with_pending_exception};
use machine::program::{self, LDMXCSR, STMXCSR, XRSTOR, XSAVE};
use machine::{Machine, machine};
use xsave_state::kvm::{
    self, CaptureError, Cause, RestorePlan, Step, VcpuAfter, WriteXfdError, XsaveBuffer, XsaveSize,
};
use xsave_state::legacy::LegacyError;
use xsave_state::{ComponentId, ExtendedState, Image, ImageError, Layout, Registers, XFeatures};

/// The components that this vCPU can have, all in use, at their places.
fn full_state(layout: &Layout, xfd: XFeatures) -> ExtendedState<'static> {
    let in_use = layout.user() - xfd;
    let mut area = with_pending_exception(area(layout, in_use.bits()));
    if let Some(pkru) = layout.component(ComponentId::PKRU) {
        // KVM keeps PKRU as a number of its own: the upper half of the component is not the guest's.
        area[pkru.offset().unwrap() + 4..][..4].fill(0);
    }
    let registers = Registers {
        xcr0: layout.user(),
        xfd,
        xfd_err: xfd,
    };
    let image = Image::parse(&area, layout).unwrap().into_owned();
    ExtendedState::new(image, registers).unwrap()
}

/// Tells where two states differ, not only that they do.
#[track_caller]
fn assert_same(captured: &ExtendedState<'_>, expected: &ExtendedState<'_>) {
    let bytes = captured.image().as_bytes().iter();
    let differing: Vec<String> = bytes
        .zip(expected.image().as_bytes())
        .enumerate()
        .filter(|(_, (captured, expected))| captured != expected)
        .map(|(offset, (captured, expected))| format!("{offset}: {captured:#04x} {expected:#04x}"))
        .take(40)
        .collect();
    assert_eq!(captured, expected, "bytes that differ: {differing:?}");
}

#[test]
fn kvm_copies_no_more_than_the_size_that_was_proven() {
    let Some(machine) = machine() else { return };
    let size = XsaveSize::query(&machine.vm, &machine.vcpu).unwrap();
    let written = machine.bytes_written_by_get_xsave2();
    assert!(written <= size.bytes(), "{written} > {}", size.bytes());
    assert!(machine.layout.standard_size() <= size.bytes());
}

#[test]
fn a_new_vcpu_is_in_the_reset_state() {
    let Some(mut machine) = machine() else { return };
    let capture = machine.capture();
    assert!(
        capture.over_reported.is_empty(),
        "{}",
        capture.over_reported
    );
    assert_eq!(capture.state.registers(), Registers::RESET);
    assert!(!capture.state.image().xstate_bv().intersects(XFeatures::AMX));
}

#[test]
fn every_component_arrives_in_another_vm() {
    let (Some(mut first), Some(mut second)) = (machine(), machine()) else {
        return;
    };
    let state = full_state(&first.layout, XFeatures::empty());
    first.restore(&state).unwrap();
    let captured = first.capture().state.into_owned();
    assert_same(&captured, &state);

    second.restore(&captured).unwrap();
    second.run_to_halt();
    assert_same(&second.capture().state, &state);
}

/// After a run KVM_GET_XSAVE2 may still give the bytes that KVM_SET_XSAVE took, whatever the
/// processor made of them: XSAVES leaves out what has not changed since XRSTORS of the same area.
/// Here it cannot: the guest saves its registers, and loads them from there.
#[test]
fn each_part_of_x87_arrives_in_the_registers() {
    let Some(mut machine) = machine() else { return };
    let state = full_state(&machine.layout, XFeatures::empty());
    let program = [XSAVE, XRSTOR].map(|digit| program::instruction(digit, 0));
    // A bit of FCW, FSW, FTW, FOP, FIP and FDP, and one of each register.
    let control = [(1, 4), (3, 0x40), (4, 0x80), (6, 2), (8, 1), (16, 1)];
    let registers = (32..160).step_by(16).map(|st| (st, 2));
    for (at, bit) in control.into_iter().chain(registers) {
        let mut area = state.image().as_bytes().to_vec();
        area[at] ^= bit;
        let image = Image::parse(&area, &machine.layout).unwrap();
        let changed = ExtendedState::new(image, state.registers()).unwrap();
        assert_ne!(changed, state);
        machine.restore(&changed).unwrap();
        let seen = machine.run_program(&program, &[0; 576]);
        for part in [0..28, 32..416] {
            assert_eq!(seen[part.clone()], area[part], "byte {at} changed");
        }
        assert_same(&machine.capture().state, &changed);
    }
}

#[test]
fn a_restore_replaces_everything() {
    let Some(mut machine) = machine() else { return };
    let full = full_state(&machine.layout, XFeatures::empty());
    machine.restore(&full).unwrap();
    let reset = ExtendedState::reset(&machine.layout);
    machine.restore(&reset).unwrap();
    let captured = machine.capture().state.into_owned();
    assert_eq!(captured.registers(), Registers::RESET);
    // KVM may call x87, SSE and PKRU in use; with the values of the initial state.
    let rest = XFeatures::LEGACY | XFeatures::PKRU;
    assert!(rest.contains(captured.image().xstate_bv()));
    assert_eq!(captured.image().mxcsr(), 0x1f80);
}

#[test]
fn a_vcpu_without_cpuid_is_refused() {
    let Some(mut machine) = machine() else { return };
    let state = full_state(&machine.layout, XFeatures::empty());
    let bare = machine.vm.create_vcpu(1).unwrap();
    let error = kvm::restore(&bare, &state, &mut machine.buffer).unwrap_err();
    assert_eq!(error.step, Step::SetXcr0(state.registers().xcr0));
    assert_eq!(error.cause, Cause::NoCpuid);

    // XFD comes first, where it is armed. This needs no host with AMX.
    let armed = full_state(
        &layout("sapphire-rapids-emulated-guest"),
        XFeatures::XTILEDATA,
    );
    let error = kvm::restore(&bare, &armed, &mut machine.buffer).unwrap_err();
    assert!(matches!(error.step, Step::SetXfd { .. }), "{error}");
    assert_eq!(error.cause, Cause::NoCpuid);
    assert_eq!(error.vcpu, VcpuAfter::Unchanged);

    // KVM takes the XCR0 of the reset state without a CPUID.
    let reset = ExtendedState::reset(&machine.layout);
    let error = kvm::restore(&bare, &reset, &mut machine.buffer).unwrap_err();
    assert_eq!(error.step, Step::RequireCpuid);
    assert_eq!(error.cause, Cause::NoCpuid);
    assert_eq!(error.vcpu, VcpuAfter::Unchanged);
}

/// As of a guest whose CPUID has no XSAVE: KVM keeps x87 and SSE, and nothing else is claimed.
#[test]
fn a_vcpu_without_xsave_in_its_cpuid_moves_with_x87_and_sse() {
    let Some(machine) = machine() else { return };
    let layout = Layout::legacy();
    let image = full_state(&layout, XFeatures::empty()).into_image();
    let state = ExtendedState::new(image, Registers::RESET).unwrap();
    let mut buffer = machine.buffer;
    let vcpu = machine.vm.create_vcpu(1).unwrap();
    kvm::restore(&vcpu, &state, &mut buffer).unwrap();
    let captured = kvm::capture(&vcpu, &layout, &mut buffer).unwrap();
    assert_eq!(captured.state.registers().xcr0, XFeatures::X87);
    for id in [ComponentId::X87, ComponentId::SSE] {
        assert_eq!(
            captured.state.image().component(id),
            state.image().component(id)
        );
    }
}

#[test]
fn an_xcr0_that_the_cpuid_lacks_is_refused_by_kvm_at_its_step() {
    let Some(mut machine) = machine() else { return };
    // MPX and APX are on no host at once, so one of the two is missing.
    let skylake = layout("skylake-client");
    let missing = skylake.user() - machine.layout.user();
    if missing.is_empty() {
        println!("skipped: this host has all that Skylake has, so nothing is missing");
        return;
    }
    let state = ExtendedState::new(
        Image::initial(&skylake),
        Registers {
            xcr0: skylake.user(),
            ..Registers::RESET
        },
    )
    .unwrap();
    let error = machine.restore(&state).unwrap_err();
    assert_eq!(error.step, Step::SetXcr0(skylake.user()));
    assert_eq!(error.vcpu, VcpuAfter::Unchanged);
    assert_eq!(machine.capture().state.registers(), Registers::RESET);
}

#[test]
fn a_component_that_the_host_lacks_is_refused_by_kvm_at_its_step() {
    let Some(mut machine) = machine() else { return };
    let skylake = layout("skylake-client");
    if machine.layout.user().contains(XFeatures::MPX) {
        println!("skipped: this host has MPX");
        return;
    }
    let area = area(&skylake, 0x1b);
    let state = ExtendedState::new(
        Image::parse(&area, &skylake).unwrap(),
        Registers {
            xcr0: XFeatures::LEGACY,
            ..Registers::RESET
        },
    )
    .unwrap();
    let error = machine.restore(&state).unwrap_err();
    assert_eq!(error.step, Step::SetXsave(state.image().xstate_bv()));
    assert_eq!(error.vcpu, VcpuAfter::Discard);
    assert!(error.to_string().contains("must be discarded"), "{error}");
}

#[test]
fn the_executed_plan_is_the_printed_plan() {
    let Some(mut machine) = machine() else { return };
    let state = full_state(&machine.layout, XFeatures::empty());
    let plan = RestorePlan::new(&state);
    for step in plan.steps() {
        println!("{step}: {}", step.reason());
    }
    plan.execute(&machine.vcpu, &mut machine.buffer).unwrap();
    assert_eq!(machine.capture().state, state);
}

#[test]
fn a_host_without_xfd_refuses_to_arm_it() {
    let Some(mut machine) = machine() else { return };
    if !machine.layout.xfd().is_empty() {
        println!("skipped: this host has XFD");
        return;
    }
    let armed = XFeatures::XTILEDATA;
    let error = kvm::write_xfd(&machine.vcpu, armed, &mut machine.buffer).unwrap_err();
    assert_eq!(error, WriteXfdError::Refused { xfd: armed });
}

#[test]
fn armed_xfd_arrives_in_another_vm() {
    let (Some(mut first), Some(mut second)) = (with_amx(), with_amx()) else {
        return;
    };
    let state = full_state(&first.layout, XFeatures::XTILEDATA);
    first.restore(&state).unwrap();
    first.run_to_halt();
    let captured = first.capture().state.into_owned();
    assert_same(&captured, &state);
    second.restore(&captured).unwrap();
    second.run_to_halt();
    assert_same(&second.capture().state, &state);
}

#[test]
fn arming_xfd_releases_live_tiles_and_the_host_lives() {
    let Some(mut machine) = with_amx() else {
        return;
    };
    let live = full_state(&machine.layout, XFeatures::empty());
    machine.restore(&live).unwrap();
    let armed = XFeatures::XTILEDATA;
    let released = kvm::write_xfd(&machine.vcpu, armed, &mut machine.buffer).unwrap();
    assert_eq!(released, armed);
    machine.run_to_halt();
    let captured = machine.capture().state.into_owned();
    let registers = Registers {
        xfd: armed,
        ..live.registers()
    };
    let image = live.image().clone().without(armed);
    assert_same(&captured, &ExtendedState::new(image, registers).unwrap());
}

/// The vCPU was used before and has XFD armed. A layout whose CPUID hides XFD says nothing of it.
#[test]
fn tiles_of_a_guest_that_does_not_see_xfd_arrive_in_an_armed_vcpu() {
    let Some(mut machine) = with_amx() else {
        return;
    };
    let armed = full_state(&machine.layout, XFeatures::XTILEDATA);
    machine.restore(&armed).unwrap();
    let layout = machine.layout_without_xfd();
    let live = full_state(&layout, XFeatures::empty());
    machine.restore(&live).unwrap();
    machine.run_to_halt();
    let captured = kvm::capture(&machine.vcpu, &layout, &mut machine.buffer).unwrap();
    assert_same(&captured.state, &live);
}

/// From every kind of state to every kind, in one vCPU, which runs in between.
#[test]
fn any_state_can_follow_any_state() {
    let Some(mut machine) = machine() else { return };
    let mut states = vec![
        ExtendedState::reset(&machine.layout),
        full_state(&machine.layout, XFeatures::empty()),
    ];
    if !machine.layout.xfd().is_empty() {
        states.push(full_state(&machine.layout, machine.layout.xfd()));
    }
    for from in &states {
        for to in &states {
            machine.restore(from).unwrap();
            machine.run_to_halt();
            machine.restore(to).unwrap();
            machine.run_to_halt();
            let captured = machine.capture().state;
            assert_eq!(captured.registers(), to.registers());
        }
    }
}

#[test]
fn capture_and_restore_allocate_nothing() {
    let Some(mut machine) = machine() else { return };
    let state = full_state(&machine.layout, XFeatures::empty());
    machine.restore(&state).unwrap();
    let Machine {
        vcpu,
        layout,
        buffer,
        ..
    } = &mut machine;
    let allocated = allocation_counter::measure(|| {
        let captured = kvm::capture(vcpu, layout, buffer).unwrap();
        assert_eq!(captured.state, state);
        kvm::restore(vcpu, &state, buffer).unwrap();
        if !layout.xfd().is_empty() {
            kvm::write_xfd(vcpu, XFeatures::empty(), buffer).unwrap();
        }
    });
    assert_eq!(allocated.count_total, 0);
    // The control: the counter counts.
    let allocated = allocation_counter::measure(|| drop(XsaveBuffer::new(buffer.size())));
    assert!(allocated.count_total > 0);
}

/// The compacted format, in which most hosts' kernels keep the area, has MXCSR with SSE alone.
#[test]
fn mxcsr_arrives_with_avx_alone() {
    let Some(mut machine) = machine() else { return };
    if !machine.layout.user().contains(XFeatures::AVX) {
        println!("skipped: this host has no AVX");
        return;
    }
    let state = avx_alone(&machine.layout);
    assert_eq!(state.image().mxcsr(), 0x1fa0);
    machine.restore(&state).unwrap();
    let seen = machine.run_program(&[program::instruction(STMXCSR, 0)], &[0; 4]);
    assert_eq!(seen, 0x1fa0u32.to_le_bytes());
    let captured = machine.capture().state.into_owned();
    assert_eq!(captured.image().mxcsr(), 0x1fa0);
    let component = |state: &ExtendedState<'_>, id| state.image().component(id).map(<[u8]>::to_vec);
    assert_eq!(
        component(&captured, ComponentId::AVX),
        component(&state, ComponentId::AVX)
    );
    let xmm = component(&captured, ComponentId::SSE);
    assert!(xmm.is_none_or(|xmm| xmm == [0; 256]));
}

/// The same area from a VMM that gives it to KVM as it is: whether the kernel is to load MXCSR or
/// not, what is captured is what the guest has.
#[test]
fn the_captured_mxcsr_is_the_one_that_the_guest_has() {
    let Some(mut machine) = machine() else { return };
    if !machine.layout.user().contains(XFeatures::AVX) {
        println!("skipped: this host has no AVX");
        return;
    }
    let reset = ExtendedState::reset(&machine.layout);
    let registers = Registers {
        xcr0: machine.layout.user(),
        ..Registers::RESET
    };
    let enabled = ExtendedState::new(reset.into_image(), registers).unwrap();
    machine.restore(&enabled).unwrap();
    let image = avx_alone(&machine.layout).into_image();
    machine.set_xsave(image.as_bytes());
    let captured = machine.capture().state.image().mxcsr();
    let seen = machine.run_program(&[program::instruction(STMXCSR, 0)], &[0; 4]);
    assert_eq!(captured.to_le_bytes(), *seen);
}

/// LDMXCSR goes by the processor, not by the guest's CPUID.
#[test]
fn a_guest_that_sets_an_mxcsr_bit_of_its_host_can_be_captured() {
    let Some(mut machine) = machine() else { return };
    if machine.layout.mxcsr_mask() == 0xffff {
        println!("skipped: this host has no MXCSR bit that CPUID could hide");
        return;
    }
    let mxcsr = (machine.layout.mxcsr_mask() & !0xffff | 0x1f80).to_le_bytes();
    machine.run_program(&[program::instruction(LDMXCSR, 0)], &mxcsr);
    let seen = machine.layout.clone().with_mxcsr_mask(0xffff);
    for layout in [seen, Layout::legacy()] {
        let refused = kvm::capture(&machine.vcpu, &layout, &mut machine.buffer);
        assert!(matches!(
            refused.unwrap_err(),
            CaptureError::Image(ImageError::Legacy(LegacyError::Mxcsr { mask: 0xffff, .. }))
        ));
        let layout = layout.with_mxcsr_mask_of(&machine.layout);
        let captured = kvm::capture(&machine.vcpu, &layout, &mut machine.buffer).unwrap();
        assert_eq!(captured.state.image().mxcsr().to_le_bytes(), mxcsr);
    }
}

/// AVX in use, SSE not, and an MXCSR that is not the initial one.
fn avx_alone(layout: &Layout) -> ExtendedState<'static> {
    let image = full_state(layout, XFeatures::empty()).into_image();
    let image = image.without(layout.user() - XFeatures::AVX);
    let registers = Registers {
        xcr0: layout.user(),
        ..Registers::RESET
    };
    ExtendedState::new(image, registers).unwrap()
}

fn with_amx() -> Option<Machine> {
    let machine = machine()?;
    if machine.layout.xfd().is_empty() {
        println!("skipped: this host's KVM has no AMX");
        return None;
    }
    Some(machine)
}

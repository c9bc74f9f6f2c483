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
use kvm_ioctls::Kvm;
use machine::program::{self, LDMXCSR, STMXCSR, XRSTOR, XSAVE};
use machine::{Machine, cpuid, machine, machine_with};
use xsave_state::kvm::{
    self, CaptureError, HostArea, RestoreError, VcpuAfter, VcpuLayout, VcpuLayoutError,
    WriteXfdError, XsaveBuffer,
};
use xsave_state::sanitize::sanitize;
use xsave_state::{
    Component, ComponentId, ExtendedState, Image, Layout, Losses, Misfit, Registers, UntrustedArea,
    XFeatures,
};

const PKRU: u32 = 0xb5b5_b3b3;

/// The components that this vCPU can have, all in use, at their places.
fn full_state(layout: &Layout, xfd: XFeatures) -> ExtendedState<'static> {
    let in_use = layout.user() - xfd;
    let mut area = with_pending_exception(area(layout, in_use.bits()));
    if let Some(pkru) = layout.component(ComponentId::PKRU) {
        // KVM keeps PKRU as a number of its own: the upper half of the component is not the guest's.
        area[pkru.offset().unwrap()..][..8].copy_from_slice(&u64::from(PKRU).to_le_bytes());
    }
    let registers = Registers::RESET
        .with_xcr0(layout.user())
        .with_xfd(xfd)
        .with_xfd_err(xfd);
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

/// Compares what a guest could read: KVM may call a component in use that has its initial value.
#[track_caller]
fn assert_same_values(captured: &ExtendedState<'_>, expected: &ExtendedState<'_>) {
    assert_eq!(captured.registers(), expected.registers());
    assert_eq!(captured.image().mxcsr(), expected.image().mxcsr());
    let initial = ExtendedState::reset(expected.layout());
    for component in expected.layout().components() {
        let value = |state: &ExtendedState<'_>| {
            let offset = component.offset().unwrap();
            let in_use = state.image().component(component.id());
            let mut bytes = match in_use {
                Some(bytes) => bytes.to_vec(),
                None => initial.image().as_bytes()[offset..][..component.size()].to_vec(),
            };
            if component.id() == ComponentId::X87 {
                bytes[24..32].fill(0);
            }
            bytes
        };
        assert_eq!(value(captured), value(expected), "{}", component.id());
    }
}

#[test]
fn kvm_copies_no_more_than_the_size_that_was_proven() {
    let Some(machine) = machine() else { return };
    let written = machine.bytes_written_by_get_xsave2();
    let size = machine.host.bytes();
    assert!(written <= size, "{written} > {size}");
    assert!(machine.layout.layout().standard_size() <= size);
}

#[test]
fn a_new_vcpu_is_in_the_reset_state() {
    let Some(mut machine) = machine() else { return };
    let capture = machine.capture();
    assert!(
        capture.over_reported.is_empty(),
        "{:?}",
        capture.over_reported
    );
    assert!(capture.disabled.is_empty(), "{:?}", capture.disabled);
    assert!(!capture.pkru_unknown);
    assert_eq!(capture.state.registers(), Registers::RESET);
    assert!(!capture.state.image().xstate_bv().intersects(XFeatures::AMX));
}

#[test]
fn every_component_arrives_in_another_vm() {
    let (Some(mut first), Some(mut second)) = (machine(), machine()) else {
        return;
    };
    let state = full_state(first.layout.layout(), XFeatures::empty());
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
    let layout = machine.layout.layout().clone();
    let state = full_state(&layout, XFeatures::empty());
    let program = [XSAVE, XRSTOR].map(|digit| program::instruction(digit, 0));
    // A bit of FCW, FSW, FTW, FOP, FIP and FDP, and one of each register.
    let control = [(1, 4), (3, 0x40), (4, 0x80), (6, 2), (8, 1), (16, 1)];
    let registers = (32..160).step_by(16).map(|st| (st, 2));
    for (at, bit) in control.into_iter().chain(registers) {
        let mut area = state.image().as_bytes().to_vec();
        area[at] ^= bit;
        let image = Image::parse(&area, &layout).unwrap();
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
fn a_restore_replaces_everything_in_a_vcpu_that_was_used() {
    let Some(mut machine) = machine() else { return };
    let full = full_state(machine.layout.layout(), XFeatures::empty());
    let reset = ExtendedState::reset(machine.layout.layout());
    machine.restore(&full).unwrap();
    machine.run_to_halt();
    machine.restore(&reset).unwrap();
    assert_same_values(&machine.capture().state, &reset);
    machine.run_to_halt();
    assert_same_values(&machine.capture().state, &reset);
}

/// KVM keeps PKRU where XSTATE_BV lacks it.
#[test]
fn pkru_of_an_earlier_use_does_not_survive_a_restore() {
    let Some(mut machine) = with_pkru() else {
        return;
    };
    let full = full_state(machine.layout.layout(), XFeatures::empty());
    let without = full.image().clone().without(XFeatures::PKRU);
    let without = ExtendedState::new(without, full.registers()).unwrap();
    machine.restore(&full).unwrap();
    machine.run_to_halt();
    machine.restore(&without).unwrap();
    machine.run_to_halt();
    assert_same_values(&machine.capture().state, &without);

    // The control: KVM_SET_XSAVE alone leaves it.
    machine.restore(&full).unwrap();
    machine.run_to_halt();
    machine.set_xsave(without.image().as_bytes());
    machine.run_to_halt();
    assert_eq!(pkru_of(&machine.capture().state), PKRU);
}

/// XSTATE_BV lacks it then. Kernels before 6.3 write the value all the same; with newer ones the
/// capture says that it is unknown, and one more exit from another thread brings it back.
#[test]
fn pkru_is_not_lost_when_the_thread_had_0_at_the_last_exit() {
    let Some(mut machine) = with_pkru() else {
        return;
    };
    let full = full_state(machine.layout.layout(), XFeatures::empty());
    machine.restore(&full).unwrap();
    machine.run_to_halt_with_pkru_0();
    if machine.capture().pkru_unknown {
        machine.run_to_halt();
    }
    let captured = machine.capture();
    assert!(!captured.pkru_unknown);
    assert_eq!(pkru_of(&captured.state), PKRU);
}

fn pkru_of(state: &ExtendedState<'_>) -> u32 {
    let pkru = state.image().component(ComponentId::PKRU);
    pkru.map_or(0, |bytes| u32::from_le_bytes(*bytes.first_chunk().unwrap()))
}

#[test]
fn a_vcpu_without_cpuid_is_refused() {
    let Some(mut machine) = machine() else { return };
    let mut bare = machine.vm.create_vcpu(1).unwrap();
    let error = VcpuLayout::query(&mut bare, &machine.host).unwrap_err();
    assert_eq!(error, VcpuLayoutError::NoCpuid);
    let (layout, buffer) = (&machine.layout, &mut machine.buffer);
    let error = kvm::capture(&mut bare, layout, buffer).unwrap_err();
    assert_eq!(error, CaptureError::NoCpuid);
    let error = kvm::capture_untrusted(&mut bare, layout, buffer).unwrap_err();
    assert_eq!(error, CaptureError::NoCpuid);

    // KVM accepts the XCR0 of the reset state without a CPUID.
    let reset = ExtendedState::reset(layout.layout());
    let mut states = vec![reset, full_state(layout.layout(), XFeatures::empty())];
    if !layout.layout().xfd().is_empty() {
        states.push(full_state(layout.layout(), layout.layout().xfd()));
    }
    for state in states {
        let error = kvm::restore(&mut bare, &state, layout, buffer).unwrap_err();
        let fate = VcpuAfter::Unchanged;
        assert_eq!(error, RestoreError::NoCpuid { vcpu: fate });
    }
}

/// A guest whose CPUID has no XSAVE: KVM keeps x87 and SSE, and nothing else is claimed.
#[test]
fn a_vcpu_without_xsave_in_its_cpuid_moves_with_x87_and_sse() {
    let Some(mut machine) = machine() else { return };
    let layout = VcpuLayout::new(&Layout::legacy(), &machine.host).unwrap();
    let image = full_state(layout.layout(), XFeatures::empty()).into_image();
    let state = ExtendedState::new(image, Registers::RESET).unwrap();
    kvm::restore(&mut machine.vcpu, &state, &layout, &mut machine.buffer).unwrap();
    let captured = kvm::capture(&mut machine.vcpu, &layout, &mut machine.buffer).unwrap();
    assert_same(&captured.state, &state);
}

/// KVM accepts it with success, and the guest has other bytes in AVX.
#[test]
fn a_state_laid_out_otherwise_is_refused() {
    let Some(mut machine) = with_avx() else {
        return;
    };
    let moved = Layout::from_parts([Component::user(ComponentId::AVX, 640, 256)], []).unwrap();
    let state = full_state(&moved, XFeatures::empty());
    let error = machine.restore(&state).unwrap_err();
    let component = ComponentId::AVX;
    assert_eq!(
        error,
        RestoreError::Misfit {
            first: Misfit::Offset {
                component,
                source_offset: 640,
                target_offset: 576
            },
            others: 0
        }
    );
    assert_eq!(error.vcpu(), VcpuAfter::Unchanged);
    assert_eq!(machine.capture().state.registers(), Registers::RESET);

    // The control: it is what KVM does.
    machine.set_xsave(state.image().as_bytes());
    let captured = machine.capture().state.into_owned();
    let avx = captured.image().component(component).unwrap_or(&[0; 256]);
    assert_ne!(avx, state.image().component(component).unwrap());

    // And it is not lost: it can be moved.
    let relocated = state
        .relocate(machine.layout.layout(), Losses::empty())
        .unwrap();
    machine.restore(&relocated.state).unwrap();
    assert_eq!(
        machine.capture().state.image().component(component),
        state.image().component(component)
    );
}

#[test]
fn a_component_or_an_xcr0_that_the_vcpu_lacks_is_refused() {
    let Some(mut machine) = machine() else { return };
    let skylake = layout("skylake-client");
    if machine.layout.layout().user().contains(XFeatures::MPX) {
        println!("skipped: this host has MPX");
        return;
    }
    let registers = Registers::RESET.with_xcr0(skylake.user());
    let enabled = ExtendedState::new(Image::initial(&skylake), registers).unwrap();
    let error = machine.restore(&enabled).unwrap_err();
    assert!(
        matches!(
            error,
            RestoreError::Misfit {
                first: Misfit::Xcr0 { .. },
                ..
            }
        ),
        "{error}"
    );
    let area = area(&skylake, 0x1b);
    let image = Image::parse(&area, &skylake).unwrap();
    let in_use = ExtendedState::new(image, Registers::RESET).unwrap();
    let error = machine.restore(&in_use).unwrap_err();
    let component = ComponentId::BNDREGS;
    let first = Misfit::Missing { component };
    assert_eq!(error, RestoreError::Misfit { first, others: 1 });
    assert_eq!(machine.capture().state.registers(), Registers::RESET);
}

#[test]
fn a_host_without_xfd_refuses_to_arm_it() {
    let Some(mut machine) = machine() else { return };
    if !machine.layout.layout().xfd().is_empty() {
        println!("skipped: this host has XFD");
        return;
    }
    let armed = XFeatures::XTILEDATA;
    let error = kvm::write_xfd(&mut machine.vcpu, armed, &mut machine.buffer).unwrap_err();
    assert_eq!(error, WriteXfdError::Refused { xfd: armed });
}

#[test]
fn armed_xfd_arrives_in_another_vm() {
    let (Some(mut first), Some(mut second)) = (with_amx(), with_amx()) else {
        return;
    };
    let state = full_state(first.layout.layout(), XFeatures::XTILEDATA);
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
    let live = full_state(machine.layout.layout(), XFeatures::empty());
    machine.restore(&live).unwrap();
    let armed = XFeatures::XTILEDATA;
    let released = kvm::write_xfd(&mut machine.vcpu, armed, &mut machine.buffer).unwrap();
    assert_eq!(released, armed);
    machine.run_to_halt();
    let image = live.image().clone().without(armed);
    let expected = ExtendedState::new(image, live.registers().with_xfd(armed)).unwrap();
    assert_same(&machine.capture().state, &expected);
}

/// A vCPU in that state would panic its host at the next KVM_RUN.
#[test]
fn live_tiles_under_xfd_are_masked_at_capture_and_the_vcpu_can_be_rescued() {
    let Some(mut machine) = with_amx() else {
        return;
    };
    let live = full_state(machine.layout.layout(), XFeatures::empty());
    machine.restore(&live).unwrap();
    machine.write_xfd_naively(XFeatures::XTILEDATA.bits());
    let Machine {
        vcpu,
        layout,
        buffer,
        ..
    } = &mut machine;
    let untrusted = kvm::capture_untrusted(vcpu, layout, buffer).unwrap();
    let owned = (untrusted.bytes().to_vec(), untrusted.registers());
    let captured = machine.capture();
    assert_eq!(captured.disabled, XFeatures::XTILEDATA);
    let rescued = captured.state.into_owned();
    assert!(!rescued.image().xstate_bv().contains(XFeatures::XTILEDATA));
    machine.restore(&rescued).unwrap();
    machine.run_to_halt();
    assert_same_values(&machine.capture().state, &rescued);

    // The bytes are all there, for whoever decides otherwise.
    let untrusted = UntrustedArea::new(&owned.0, owned.1);
    let layout = machine.layout.layout();
    assert!(sanitize(&untrusted, layout, Losses::empty()).is_err());
    let sanitized = sanitize(&untrusted, layout, Losses::DISABLED).unwrap();
    assert_same_values(&sanitized.state, &rescued);
}

/// KVM ignores CPUID.0DH.18:ECX[2] and what leaf 1DH hides, and so do capture and restore.
#[test]
fn no_cpuid_keeps_a_guest_with_tiles_from_being_captured() {
    if with_amx().is_none() {
        return;
    }
    let hostile: [fn(&mut kvm_bindings::kvm_cpuid_entry2); 4] = [
        |entry| {
            if (entry.function, entry.index) == (0xd, 18) {
                entry.ecx &= !(1 << 2);
            }
        },
        |entry| {
            if (entry.function, entry.index) == (0xd, 1) {
                entry.eax &= !(1 << 4);
            }
        },
        |entry| {
            if entry.function == 0x1d {
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0);
            }
        },
        |entry| {
            if entry.function == 0 {
                entry.eax = 0xd;
            }
        },
    ];
    for change in hostile {
        let mut machine = machine_with(change).unwrap();
        let layout = machine.layout.layout().clone();
        assert_eq!(layout.xfd(), XFeatures::XTILEDATA);
        for xfd in [XFeatures::empty(), XFeatures::XTILEDATA] {
            let state = full_state(&layout, xfd);
            machine.restore(&state).unwrap();
            machine.run_to_halt();
            assert_same(&machine.capture().state, &state);
        }
    }
}

/// A guest that ran with such a CPUID could never be saved again, or computed with wrong bytes.
#[test]
fn a_cpuid_that_contradicts_the_host_is_refused_before_the_guest_runs() {
    let Some(machine) = with_amx() else { return };
    let kvm = Kvm::new().unwrap();
    let mut index = 0;
    let mut refused = |change: &dyn Fn(&mut kvm_bindings::kvm_cpuid_entry2)| {
        index += 1;
        let mut vcpu = machine.vm.create_vcpu(index).unwrap();
        vcpu.set_cpuid2(&cpuid(&kvm, change)).unwrap();
        VcpuLayout::query(&mut vcpu, &machine.host).unwrap_err()
    };
    let error = refused(&|entry| {
        if (entry.function, entry.index) == (0xd, 9) {
            entry.ebx = 20_000;
        }
        if (entry.function, entry.index) == (0xd, 0) {
            entry.ecx = 30_000;
        }
    });
    let component = ComponentId::PKRU;
    assert!(
        matches!(error, VcpuLayoutError::Place { component: id, .. } if id == component),
        "{error}"
    );
    let error = refused(&|entry| {
        if (entry.function, entry.index) == (0x1d, 1) {
            // 4 tiles of 32 bytes a row.
            (entry.eax, entry.ebx) = (0x0200_0800, 0x0004_0020);
        }
    });
    assert_eq!(error, VcpuLayoutError::Palette { palette: 1 });
}

/// From every kind of state to every kind, in one vCPU, which runs in between.
#[test]
fn any_state_can_follow_any_state() {
    let Some(mut machine) = machine() else { return };
    let layout = machine.layout.layout().clone();
    let mut states = vec![
        ExtendedState::reset(&layout),
        full_state(&layout, XFeatures::empty()),
    ];
    if !layout.xfd().is_empty() {
        states.push(full_state(&layout, layout.xfd()));
    }
    for from in &states {
        for to in &states {
            machine.restore(from).unwrap();
            machine.run_to_halt();
            machine.restore(to).unwrap();
            machine.run_to_halt();
            assert_same_values(&machine.capture().state, to);
        }
    }
}

#[test]
fn an_untrusted_area_is_loaded_or_refused() {
    let Some(mut machine) = machine() else { return };
    let layout = machine.layout.layout().clone();
    let state = full_state(&layout, XFeatures::empty());
    let (region, extra) = state.image().to_words();
    let mut load = |area: &UntrustedArea<'_>| {
        let Machine {
            vcpu,
            layout,
            buffer,
            ..
        } = &mut machine;
        kvm::load(vcpu, area, layout, Losses::empty(), buffer)
    };
    let area = UntrustedArea::from_words(&region, &extra, state.registers());
    assert!(load(&area).unwrap().changes().is_empty());
    let short = UntrustedArea::new(&state.image().as_bytes()[..575], state.registers());
    let error = load(&short).unwrap_err();
    assert_eq!(error.vcpu(), VcpuAfter::Unchanged);
    machine.run_to_halt();
    assert_same(&machine.capture().state, &state);
}

#[test]
fn capture_and_restore_allocate_nothing() {
    let Some(mut machine) = machine() else { return };
    let state = full_state(machine.layout.layout(), XFeatures::empty());
    machine.restore(&state).unwrap();
    let Machine {
        vcpu,
        host,
        layout,
        buffer,
        ..
    } = &mut machine;
    let allocated = allocation_counter::measure(|| {
        let captured = kvm::capture(vcpu, layout, buffer).unwrap();
        assert_eq!(captured.state, state);
        kvm::restore(vcpu, &state, layout, buffer).unwrap();
        if !layout.layout().xfd().is_empty() {
            kvm::write_xfd(vcpu, XFeatures::empty(), buffer).unwrap();
        }
    });
    assert_eq!(allocated.count_total, 0);
    // The control: the counter counts.
    let allocated = allocation_counter::measure(|| drop(XsaveBuffer::new(host)));
    assert!(allocated.count_total > 0);
}

/// The compacted format, in which most hosts' kernels keep the area, has MXCSR with SSE alone.
#[test]
fn mxcsr_arrives_with_avx_alone() {
    let Some(mut machine) = with_avx() else {
        return;
    };
    let state = avx_alone(machine.layout.layout());
    assert_eq!(state.image().mxcsr(), 0x1fa0);
    machine.restore(&state).unwrap();
    let seen = machine.run_program(&[program::instruction(STMXCSR, 0)], &[0; 4]);
    assert_eq!(seen, 0x1fa0u32.to_le_bytes());
    assert_same_values(&machine.capture().state, &state);
}

/// The same area from a VMM that gives it to KVM as it is: whether the kernel is to load MXCSR or
/// not, what is captured is what the guest has.
#[test]
fn the_captured_mxcsr_is_the_one_that_the_guest_has() {
    let Some(mut machine) = with_avx() else {
        return;
    };
    let layout = machine.layout.layout().clone();
    let registers = Registers::RESET.with_xcr0(layout.user());
    let reset = ExtendedState::reset(&layout).into_image();
    machine
        .restore(&ExtendedState::new(reset, registers).unwrap())
        .unwrap();
    let image = avx_alone(&layout).into_image();
    machine.set_xsave(image.as_bytes());
    let captured = machine.capture().state.image().mxcsr();
    let seen = machine.run_program(&[program::instruction(STMXCSR, 0)], &[0; 4]);
    assert_eq!(captured.to_le_bytes(), *seen);
}

/// LDMXCSR goes by the processor, not by the guest's CPUID.
#[test]
fn a_guest_that_sets_an_mxcsr_bit_of_its_host_can_be_captured() {
    let Some(mut machine) = machine() else { return };
    let mask = machine.host.layout().mxcsr_mask();
    if mask == 0xffff {
        println!("skipped: this host has no MXCSR bit that CPUID could hide");
        return;
    }
    let mxcsr = (mask & !0xffff | 0x1f80).to_le_bytes();
    machine.run_program(&[program::instruction(LDMXCSR, 0)], &mxcsr);
    let seen = machine.layout.layout().clone().with_mxcsr_mask(0xffff);
    for guest in [seen, Layout::legacy()] {
        let layout = VcpuLayout::new(&guest, &machine.host).unwrap();
        let captured = kvm::capture(&mut machine.vcpu, &layout, &mut machine.buffer).unwrap();
        assert_eq!(captured.state.image().mxcsr().to_le_bytes(), mxcsr);
    }
}

/// What creating a vCPU proves holds for the whole process.
#[test]
fn the_host_says_the_same_to_every_vm() {
    let (Some(first), Some(second)) = (machine(), machine()) else {
        return;
    };
    assert_eq!(first.host, second.host);
    assert_eq!(
        HostArea::query(&second.vm, &first.vcpu).unwrap(),
        first.host
    );
    assert_eq!(first.layout, second.layout);
}

/// AVX in use, SSE not, and an MXCSR that is not the initial one.
fn avx_alone(layout: &Layout) -> ExtendedState<'static> {
    let image = full_state(layout, XFeatures::empty()).into_image();
    let image = image.without(layout.user() - XFeatures::AVX);
    let registers = Registers::RESET.with_xcr0(layout.user());
    ExtendedState::new(image, registers).unwrap()
}

fn with_amx() -> Option<Machine> {
    with(XFeatures::AMX, "AMX")
}

fn with_avx() -> Option<Machine> {
    with(XFeatures::AVX, "AVX")
}

fn with_pkru() -> Option<Machine> {
    with(XFeatures::PKRU, "protection keys")
}

fn with(features: XFeatures, name: &str) -> Option<Machine> {
    let machine = machine()?;
    if !machine.layout.layout().user().contains(features) {
        println!("skipped: this host's KVM has no {name}");
        return None;
    }
    Some(machine)
}

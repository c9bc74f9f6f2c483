//! What has nothing to do with tiles and must be right for a kernel to live on this processor: changed code,
//! protection keys, SYSRET.

use amx_fidelity::arena::Arena;
use amx_fidelity::changing_code::write_and_call;
use amx_fidelity::component::PKRU;
use amx_fidelity::guest::{self, Exit, World};
use amx_fidelity::pattern::MXCSR_RESET;
use amx_fidelity::pkey::{DISABLE_ACCESS, DISABLE_WRITE, Key, kernel_access};
use amx_fidelity::process;
use amx_fidelity::trial::{Instruction, Processor, Trial};

#[test]
fn icache_sees_code_written_while_amx_is_enabled() {
    if !process::has_amx() {
        return;
    }
    let mut arena = Arena::new(1);
    let page = arena.take_aligned(4096, 4096);
    // In each part of a page, and across its parts.
    for at in (0..4090).step_by(23) {
        for value in [1, 2, 0xdead_beef, 4] {
            assert_eq!(
                write_and_call(&mut arena, page, at, value),
                value,
                "code at {at:#x}"
            );
        }
    }
}

#[test]
fn pkru_binds_the_kernel_on_user_pages_only() {
    if !process::has_amx() {
        return;
    }
    let Some(key) = Key::new() else {
        println!("skipped: there are no protection keys");
        return;
    };
    let mut arena = Arena::new(1);
    let page = arena.take_aligned(4096, 4096);
    key.protect(page);
    let cases = [
        (0, Ok(()), Ok(())),
        (DISABLE_WRITE, Ok(()), Err(libc::EFAULT)),
        (DISABLE_ACCESS, Err(libc::EFAULT), Err(libc::EFAULT)),
        (0, Ok(()), Ok(())),
    ];
    for (rights, reading, writing) in cases {
        key.restrict(rights);
        let actual = (kernel_access(page, false), kernel_access(page, true));
        key.restrict(0);
        assert_eq!(
            actual,
            (reading, writing),
            "rights {rights}: the kernel reads, writes"
        );
    }

    // At CPL 0 with everything forbidden to users: the guest's pages are the supervisor's.
    let Some(mut machine) = crate::machine::guest() else {
        return;
    };
    let place = machine.layout.place(PKRU).unwrap();
    let area = machine.processor.arena().bytes_mut(machine.load);
    area[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    area[place.offset..][..4].fill(0xff);
    let trial = Trial::of(Instruction::Nothing)
        .starting_from(machine.load, 1 << PKRU)
        .saving_to(machine.result);
    assert_eq!(machine.run(trial).fault(), None);
    assert_eq!(
        machine.component(PKRU),
        [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0]
    );
}

#[test]
fn guest_user_code_runs_after_sysret() {
    let Some(kvm) = guest::kvm() else { return };
    let mut arena = Arena::new(1);
    let world = World::new(&mut arena, true);
    let mut vm = crate::kernel_cases::new_vm(&kvm, &arena);
    world.enter_sysret(&vm);
    for port in [0x31, 0x32, 0x31] {
        assert_eq!(vm.run(), Exit::Port(port));
        let ss = vm.vcpu.get_sregs().unwrap().ss;
        assert_eq!(
            (ss.base, ss.limit, ss.g, ss.db),
            (0, 0xffff_ffff, 1, 1),
            "SS is flat"
        );
        assert_eq!(
            (ss.selector, ss.dpl, ss.type_, ss.s, ss.present),
            (0x1b, 3, 3, 1, 1)
        );
    }
    drop(vm);
}

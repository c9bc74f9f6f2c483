//! Signals while tiles are live (arch/x86/kernel/fpu/signal.c; Documentation/arch/x86/xstate.rst).

use std::sync::Mutex;

use amx_fidelity::component::{AMX, TILECFG, TILEDATA, TILEDATA_BIT};
use amx_fidelity::frame::{Deed, Frame, MAGIC, alternate_stack, watch};
use amx_fidelity::pattern::noise;
use amx_fidelity::process::{self, REQUEST_PERMISSION};
use amx_fidelity::sdm::tilecfg::{Config, config};
use amx_fidelity::trial::{Here, Instruction, Trial};

use crate::machine::{Machine, here};

static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

fn shapes() -> Config {
    config(&[
        (16, 64),
        (3, 8),
        (5, 20),
        (7, 28),
        (9, 36),
        (11, 44),
        (13, 52),
        (15, 60),
    ])
}

fn tiles() -> Vec<u8> {
    noise(11, 3, 8192)
}

/// A signal at a point where both components are in use; the registers afterwards are in the machine.
fn interrupted(
    machine: &mut Machine<Here>,
    deed: Deed,
    on_alternate_stack: bool,
) -> (Frame, Trial) {
    let _one = ONE_AT_A_TIME.lock().unwrap();
    let trial = machine.with_tiles(Trial::of(Instruction::Breakpoint), &shapes(), &tiles());
    let mut after = trial;
    let frame = watch(deed, on_alternate_stack, || after = machine.run(trial));
    assert_eq!(after.fault(), None);
    (frame, after)
}

fn check_frame(machine: &Machine<Here>, frame: &Frame) {
    let area = &frame.area;
    assert!(
        area.len() > 576,
        "the frame has only {} bytes of state",
        area.len()
    );
    let word = |at: usize| u32::from_le_bytes(area[at..][..4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(area[at..][..8].try_into().unwrap());
    assert_eq!(frame.address % 64, 0, "alignment");
    assert_eq!(word(464), MAGIC[0]);
    assert_eq!(
        long(472) & AMX,
        AMX,
        "the components that the frame has room for"
    );
    let size = word(480) as usize;
    assert_eq!(word(size), MAGIC[1], "at its end");
    assert!(word(468) as usize >= size + 4, "extended size");
    assert_eq!(long(512) & AMX, AMX, "XSTATE_BV");
    let place = |i| machine.layout.place(i).unwrap();
    assert_eq!(size, place(TILEDATA).offset + place(TILEDATA).size);
    assert_eq!(area[place(TILECFG).offset..][..64], shapes());
    assert!(
        area[place(TILEDATA).offset..][..8192] == tiles(),
        "the tiles"
    );
}

#[test]
fn a_signal_frame_carries_the_tiles() {
    let Some(mut machine) = here() else { return };
    let (frame, _) = interrupted(&mut machine, Deed::Look, false);
    check_frame(&machine, &frame);
}

#[test]
fn a_signal_handler_starts_with_no_tiles() {
    let Some(mut machine) = here() else { return };
    let (frame, _) = interrupted(&mut machine, Deed::Look, false);
    assert_eq!(frame.xinuse & AMX, 0);
}

#[test]
fn tiles_are_intact_after_a_signal() {
    let Some(mut machine) = here() else { return };
    for deed in [Deed::Look, Deed::Release] {
        let (_, trial) = interrupted(&mut machine, deed, false);
        assert_eq!(trial.xinuse() & AMX, AMX, "{deed:?}");
        assert_eq!(machine.component(TILECFG), shapes(), "{deed:?}");
        assert!(machine.component(TILEDATA) == tiles(), "{deed:?}");
    }
}

#[test]
fn a_handler_can_change_the_tiles_in_the_frame() {
    let Some(mut machine) = here() else { return };
    interrupted(&mut machine, Deed::Flip, false);
    let mut expected = tiles();
    expected[0] = !expected[0];
    assert!(machine.component(TILEDATA) == expected);
    assert_eq!(machine.component(TILECFG), shapes());
}

#[test]
fn a_handler_can_release_the_tiles_in_the_frame() {
    let Some(mut machine) = here() else { return };
    let (_, trial) = interrupted(&mut machine, Deed::Clear, false);
    assert_eq!(trial.xinuse() & TILEDATA_BIT, 0);
    assert!(machine.component(TILEDATA).iter().all(|&byte| byte == 0));
    assert_eq!(machine.component(TILECFG), shapes());
}

#[test]
fn a_large_alternate_stack_takes_the_frame() {
    if !process::has_amx() || !process::alone("signal::a_large_alternate_stack_takes_the_frame") {
        return;
    }
    let stack = alternate_stack(64 << 10).unwrap();
    let mut machine = here().unwrap();
    let (frame, _) = interrupted(&mut machine, Deed::Look, true);
    assert!(
        stack.contains(&frame.address),
        "{:#x} in {stack:x?}",
        frame.address
    );
    check_frame(&machine, &frame);
    assert!(machine.component(TILEDATA) == tiles());
}

#[test]
fn a_small_alternate_stack_prevents_the_permission() {
    if !process::has_amx()
        || !process::alone("signal::a_small_alternate_stack_prevents_the_permission")
    {
        return;
    }
    // Enough for all but tiles, which the kernel does not ask for before it is asked for tiles.
    alternate_stack(6 << 10).expect("without permission");
    assert_eq!(
        process::request(REQUEST_PERMISSION, TILEDATA),
        Err(libc::ENOSPC)
    );
    alternate_stack(64 << 10).unwrap();
    assert_eq!(process::request(REQUEST_PERMISSION, TILEDATA), Ok(()));
}

#[test]
fn permission_prevents_a_small_alternate_stack() {
    if !process::has_amx() || !process::alone("signal::permission_prevents_a_small_alternate_stack")
    {
        return;
    }
    process::permit_tiles();
    assert_eq!(alternate_stack(6 << 10), Err(libc::ENOMEM));
    assert_eq!(
        alternate_stack(8192 + 2048),
        Err(libc::ENOMEM),
        "less than the components alone"
    );
    assert!(alternate_stack(64 << 10).is_ok());
}

#[test]
fn a_process_without_permission_has_frames_without_tiles() {
    if !process::has_amx()
        || !process::alone("signal::a_process_without_permission_has_frames_without_tiles")
    {
        return;
    }
    let mut machine = Machine::new(Here::new());
    let trial = machine.with_tiles(Trial::of(Instruction::Breakpoint), &shapes(), &[]);
    let trial = trial.starting_from(machine.load, 1 << TILECFG);
    let frame = watch(Deed::Look, false, || {
        machine.run(trial);
    });
    let place = machine.layout.place(TILEDATA).unwrap();
    assert!(
        frame.area.len() <= place.offset + 4,
        "{} bytes",
        frame.area.len()
    );
    assert_eq!(
        machine.component(TILECFG),
        shapes(),
        "the configuration needs no permission"
    );
}

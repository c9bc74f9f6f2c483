//! IA32_XFD and IA32_XFD_ERR, in a guest at CPL 0 (SDM vol. 1, 13.14).

use amx_fidelity::component::{AMX, TILECFG, TILEDATA, TILEDATA_BIT};
use amx_fidelity::guest::{Guest, MSR_XFD, MSR_XFD_ERR};
use amx_fidelity::pattern::noise;
use amx_fidelity::sdm::tilecfg::config;
use amx_fidelity::trial::{AREA, Fault, Instruction, Trial};

use crate::machine::{Machine, guest};

/// Tile 0 is 4 rows of 32 bytes, and fits tiles 1 and 2; tile 5 is full.
const SHAPES: [(u8, u8); 8] = [
    (4, 32),
    (4, 16),
    (4, 32),
    (0, 0),
    (0, 0),
    (16, 64),
    (0, 0),
    (0, 0),
];

fn with_live_tiles(machine: &mut Machine<Guest>, instruction: Instruction) -> Trial {
    machine.set_operand(&[0; AREA]);
    let trial = machine.with_tiles(Trial::of(instruction), &config(&SHAPES), &noise(4, 4, 8192));
    trial
        .on_address(machine.operand.address(), 64)
        .requesting(AMX)
}

#[test]
fn xfd_stops_what_uses_tile_data() {
    let Some(mut machine) = guest() else { return };
    for instruction in [
        Instruction::Tilezero0,
        Instruction::Tilezero5,
        Instruction::Tileloadd0,
        Instruction::Tileloadd5,
        Instruction::Tileloaddt1,
        Instruction::Tilestored0,
        Instruction::Tilestored5,
    ]
    .into_iter()
    .chain(Instruction::products())
    {
        let trial = with_live_tiles(&mut machine, instruction);
        let trial = machine.run(trial.with_xfd(TILEDATA_BIT));
        assert_eq!(trial.fault(), Some(Fault::NM), "{instruction:?}");
        assert_eq!(
            trial.xfd_err(),
            TILEDATA_BIT,
            "IA32_XFD_ERR after {instruction:?}"
        );
        assert_eq!(
            machine.component(TILECFG),
            config(&SHAPES),
            "{instruction:?}"
        );
        assert_eq!(
            machine.component(TILEDATA),
            noise(4, 4, 8192),
            "{instruction:?} was not executed"
        );
        assert_eq!(
            machine.operand()[..2048],
            [0; 2048],
            "{instruction:?} was not executed"
        );

        let trial = with_live_tiles(&mut machine, instruction);
        let trial = machine.run(trial);
        assert_eq!(
            (trial.fault(), trial.xfd_err()),
            (None, 0),
            "{instruction:?} with IA32_XFD 0"
        );
    }
}

#[test]
fn xfd_leaves_everything_else_alone() {
    let Some(mut machine) = guest() else { return };
    for instruction in [
        Instruction::Nothing,
        Instruction::Fnop,
        Instruction::Vaddps,
        Instruction::Sttilecfg,
        Instruction::Xsave,
        Instruction::Xsaveopt,
        Instruction::Xsavec,
        Instruction::Xsaves,
    ] {
        let trial = with_live_tiles(&mut machine, instruction);
        let trial = machine.run(trial.with_xfd(TILEDATA_BIT));
        assert_eq!(
            (trial.fault(), trial.xfd_err()),
            (None, 0),
            "{instruction:?}"
        );
        assert_eq!(
            machine.component(TILECFG),
            config(&SHAPES),
            "{instruction:?}"
        );
    }
}

#[test]
fn xfd_makes_xsave_see_initial_tile_data() {
    let Some(mut machine) = guest() else { return };
    let place = machine.layout.place(TILEDATA).unwrap();
    for xfd in [0, TILEDATA_BIT] {
        let trial = with_live_tiles(&mut machine, Instruction::Xsave);
        machine.set_operand(&[0xee; AREA]);
        let trial = machine.run(trial.with_xfd(xfd));
        assert_eq!(trial.fault(), None);
        let area = machine.operand();
        let expected = if xfd == 0 {
            noise(4, 4, 8192)
        } else {
            vec![0; 8192]
        };
        assert!(
            area[place.offset..][..place.size] == expected,
            "saved with IA32_XFD {xfd:#x}"
        );
        let xstate_bv = u64::from_le_bytes(area[512..520].try_into().unwrap());
        assert_eq!(xstate_bv & TILEDATA_BIT, TILEDATA_BIT & !xfd, "XSTATE_BV");
        assert!(
            machine.component(TILEDATA) == noise(4, 4, 8192),
            "the tiles themselves stay"
        );
    }
}

#[test]
fn xfd_does_not_stop_what_initializes_tile_data() {
    let Some(mut machine) = guest() else { return };
    let new = config(&[(16, 64); 8]);
    for (instruction, expected) in [
        (Instruction::Ldtilecfg, new),
        (Instruction::Tilerelease, [0; 64]),
    ] {
        let trial = with_live_tiles(&mut machine, instruction);
        machine.set_operand(&new);
        let trial = machine.run(trial.with_xfd(TILEDATA_BIT));
        assert_eq!(
            (trial.fault(), trial.xfd_err()),
            (None, 0),
            "{instruction:?}"
        );
        assert_eq!(machine.component(TILECFG), expected, "{instruction:?}");
        assert!(
            machine.component(TILEDATA).iter().all(|&byte| byte == 0),
            "{instruction:?}"
        );
    }
}

#[test]
fn xfd_stops_xrstor_of_tile_data_in_use_only() {
    let Some(mut machine) = guest() else { return };
    let cases = [
        (AMX, AMX, Some(Fault::NM)),
        (TILEDATA_BIT, TILEDATA_BIT, Some(Fault::NM)),
        (AMX, 1 << TILECFG, None),
        (1 << TILECFG, AMX, None),
        (AMX, 0, None),
    ];
    for (instruction, formats) in [
        (Instruction::Xrstor, &[0, AMX | 1 << 63][..]),
        (Instruction::Xrstors, &[AMX | 1 << 63]),
    ] {
        for format in formats {
            for (rfbm, xstate_bv, fault) in cases {
                let trial = with_live_tiles(&mut machine, instruction);
                let mut area = vec![0; 576];
                area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
                area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
                area[520..528].copy_from_slice(&format.to_le_bytes());
                machine.set_operand(&area);
                let trial = machine.run(trial.requesting(rfbm).with_xfd(TILEDATA_BIT));
                let case = format!(
                    "{instruction:?}, RFBM {rfbm:#x}, XSTATE_BV {xstate_bv:#x}, XCOMP_BV {format:#x}"
                );
                assert_eq!(trial.fault(), fault, "{case}");
                let xfd_err = if fault.is_some() { TILEDATA_BIT } else { 0 };
                assert_eq!(trial.xfd_err(), xfd_err, "{case}");
            }
        }
    }
}

#[test]
fn xfd_err_is_not_for_device_not_available_of_other_causes() {
    let Some(mut machine) = guest() else { return };
    for xfd in [0, TILEDATA_BIT] {
        for instruction in [
            Instruction::Fnop,
            Instruction::Vaddps,
            Instruction::Xsave,
            Instruction::Xsavec,
            Instruction::Xsaves,
            Instruction::Xrstor,
            Instruction::Xrstors,
        ] {
            let trial = with_live_tiles(&mut machine, instruction);
            let mut area = vec![0; 576];
            area[512..520].copy_from_slice(&AMX.to_le_bytes());
            if instruction == Instruction::Xrstors {
                area[520..528].copy_from_slice(&(AMX | 1 << 63).to_le_bytes());
            }
            machine.set_operand(&area);
            let trial = machine.run(trial.with_xfd(xfd).with_task_switched());
            assert_eq!(
                trial.fault(),
                Some(Fault::NM),
                "{instruction:?} with CR0.TS = 1"
            );
            assert_eq!(
                trial.xfd_err(),
                0,
                "{instruction:?} with CR0.TS = 1, IA32_XFD {xfd:#x}"
            );
        }
    }
}

#[test]
fn xfd_takes_no_other_bits() {
    let Some(mut machine) = guest() else { return };
    for instruction in [Instruction::WriteXfd, Instruction::WriteXfdErr] {
        // With IA32_XFD set once, KVM lets the guest at the registers themselves.
        for first in [0, TILEDATA_BIT] {
            for bit in (0..64).filter(|&bit| bit != TILEDATA) {
                let trial = Trial::of(instruction).requesting(1 << bit).with_xfd(first);
                assert_eq!(
                    machine.run(trial).fault(),
                    Some(Fault::GP),
                    "{instruction:?}, bit {bit}"
                );
            }
            let trial = machine.run(Trial::of(instruction).requesting(0).with_xfd(first));
            assert_eq!(trial.fault(), None, "{instruction:?} of 0");
        }
    }
}

#[test]
fn xfd_err_keeps_what_is_written() {
    let Some(mut machine) = guest() else { return };
    let trial = Trial::of(Instruction::WriteXfdErr)
        .requesting(TILEDATA_BIT)
        .with_xfd(TILEDATA_BIT);
    let trial = machine.run(trial);
    assert_eq!((trial.fault(), trial.xfd_err()), (None, TILEDATA_BIT));
}

#[test]
fn xfd_is_zero_in_a_new_guest() {
    let Some(kvm) = amx_fidelity::guest::kvm() else {
        return;
    };
    let arena = amx_fidelity::arena::Arena::new(1);
    let vm = crate::kernel_cases::new_vm(&kvm, &arena);
    assert_eq!((vm.msr(MSR_XFD), vm.msr(MSR_XFD_ERR)), (0, 0));
}

//! x87, SSE, AVX and MXCSR, which is of more than one of them: every combination.

use amx_fidelity::component::{ALL_ENUMERATED, PKRU};
use amx_fidelity::guest::Guest;
use amx_fidelity::pattern::MXCSR_RESET;
use amx_fidelity::process;
use amx_fidelity::sdm::restore::Header;
use amx_fidelity::sdm::save::{Save, save};
use amx_fidelity::sdm::state::State;
use amx_fidelity::trial::{Fault, Here, Instruction, Processor, Trial};

use crate::bench::Bench;
use crate::xrstor::{self, Case};

const OTHERS: [u64; 2] = [0, 1 << PKRU];

fn saves(processor: &mut impl Processor, kinds: &[(Save, Instruction)]) {
    let mut bench = Bench::new(processor);
    let other = bench.a.mxcsr;
    for mxcsr in [MXCSR_RESET, other] {
        processor.arena().bytes_mut(bench.load)[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        bench.a.mxcsr = mxcsr;
        let cases = kinds.iter().flat_map(|&kind| {
            (0..8_u64).flat_map(move |in_use| {
                (0..8_u64).flat_map(move |rfbm| {
                    OTHERS.map(|others| (kind, in_use | others, rfbm | others))
                })
            })
        });
        bench.run(
            processor,
            false,
            cases,
            |((_, instruction), in_use, rfbm), _| {
                Trial::of(instruction)
                    .starting_from(bench.load, in_use)
                    .requesting(rfbm)
            },
            |((kind, _), in_use, rfbm), outcome| {
                assert_eq!(outcome.trial.fault(), None);
                let state = State::new(in_use, &bench.a).with_mxcsr(mxcsr);
                let mut expected = bench.background.clone();
                save(
                    kind,
                    &bench.layout,
                    &state,
                    rfbm,
                    0,
                    bench.mxcsr_mask,
                    &mut expected,
                );
                if mxcsr != MXCSR_RESET
                    && matches!(kind, Save::Xsave | Save::Xsaveopt)
                    && rfbm & 2 != 0
                {
                    // Left open when only MXCSR differs: see `Bench::registers`. XSAVEOPT then may store
                    // the XMM registers, which are zero.
                    expected[512] |= outcome.operand[512] & 2;
                    if kind == Save::Xsaveopt && outcome.operand[512] & 2 != 0 && in_use & 2 == 0 {
                        expected[160..416].fill(0);
                    }
                }
                bench.same("the area", outcome.operand, &expected)
            },
        );
    }
}

#[test]
fn saves_of_the_legacy_region() {
    if let Some(mut guest) = Guest::new() {
        let kinds = [
            (Save::Xsave, Instruction::Xsave),
            (Save::Xsaveopt, Instruction::Xsaveopt),
            (Save::Xsavec, Instruction::Xsavec),
            (Save::Xsaves, Instruction::Xsaves),
        ];
        saves(&mut guest, &kinds);
    }
    if process::has_amx() {
        process::permit_tiles();
        let kinds = [
            (Save::Xsave, Instruction::Xsave),
            (Save::Xsaveopt, Instruction::Xsaveopt),
            (Save::Xsavec, Instruction::Xsavec),
        ];
        saves(&mut Here::new(), &kinds);
    }
}

/// All of the three components that can be in the area, in the format and requested; all others before.
fn cases(supervisor: bool, compacted: bool) -> impl Iterator<Item = Case> {
    (0..8_u64).flat_map(move |xstate_bv| {
        (0..8_u64).flat_map(move |rfbm| {
            (0..8_u64)
                .filter(move |format| {
                    format & xstate_bv == xstate_bv && (compacted || *format == 7)
                })
                .map(move |format| Case {
                    supervisor,
                    before: ALL_ENUMERATED | 3,
                    header: Header {
                        xstate_bv,
                        xcomp_bv: if compacted { format | 1 << 63 } else { 0 },
                    },
                    rfbm,
                    xfd: 0,
                })
        })
    })
}

fn restores(processor: &mut impl Processor, supervisor: bool, compacted: bool) {
    let bench = Bench::new(processor);
    bench.run(
        processor,
        true,
        cases(supervisor, compacted),
        |case, area| xrstor::prepare(&bench, case, area),
        |case, outcome| xrstor::check(&bench, case, outcome),
    );
}

#[test]
fn standard_restores_of_the_legacy_region() {
    if let Some(mut guest) = Guest::new() {
        restores(&mut guest, false, false);
    }
    if process::has_amx() {
        process::permit_tiles();
        restores(&mut Here::new(), false, false);
    }
}

#[test]
fn compacted_restores_of_the_legacy_region() {
    if let Some(mut guest) = Guest::new() {
        restores(&mut guest, false, true);
    }
    if let Some(mut guest) = Guest::new() {
        restores(&mut guest, true, true);
    }
}

#[test]
fn xrstor_compacted_resets_mxcsr() {
    if !process::has_amx() {
        return;
    }
    process::permit_tiles();
    let mut here = Here::new();
    let bench = Bench::new(&mut here);
    let case = Case {
        supervisor: false,
        before: ALL_ENUMERATED | 3,
        header: Header {
            xstate_bv: 0,
            xcomp_bv: 1 << 63 | 2,
        },
        rfbm: 2,
        xfd: 0,
    };
    bench.run(
        &mut here,
        true,
        [case],
        |case, area| xrstor::prepare(&bench, case, area),
        |_, outcome| {
            let mxcsr = u32::from_le_bytes(outcome.result[24..28].try_into().unwrap());
            if mxcsr == MXCSR_RESET {
                Ok(())
            } else {
                Err(format!("MXCSR is {mxcsr:#x}"))
            }
        },
    );
}

/// Each way in which a header or MXCSR can be wrong (SDM vol. 1, 13.8.1, 13.8.2, 13.12).
fn bad_areas() -> Vec<(String, bool, Vec<u8>)> {
    let area = |xstate_bv: u64, xcomp_bv: u64| {
        let mut area = vec![0; 4096];
        area[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
        area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
        area[520..528].copy_from_slice(&xcomp_bv.to_le_bytes());
        area
    };
    let mut bad = Vec::new();
    for bit in [3, 8, 10, 19, 30, 62, 63] {
        bad.push((format!("XSTATE_BV[{bit}]"), false, area(1 << bit, 0)));
        // Bit 63 of XCOMP_BV is the format; whether XSTATE_BV may have it then, the manual does not say.
        if bit != 63 {
            bad.push((
                format!("compacted XSTATE_BV[{bit}]"),
                true,
                area(1 << bit, 1 << 63 | 7),
            ));
            bad.push((
                format!("XCOMP_BV[{bit}]"),
                true,
                area(0, 1 << 63 | 1 << bit),
            ));
        }
    }
    bad.push((
        "XSTATE_BV outside of XCOMP_BV".into(),
        true,
        area(4, 1 << 63 | 3),
    ));
    bad.push(("XCOMP_BV without bit 63".into(), false, area(0, 4)));
    for at in 528..536 {
        let mut area = area(0, 0);
        area[at] = 1;
        bad.push((format!("byte {at}"), false, area));
    }
    for at in 528..576 {
        let mut area = area(0, 1 << 63);
        area[at] = 0x80;
        bad.push((format!("compacted, byte {at}"), true, area));
    }
    let mut mxcsr = area(2, 0);
    mxcsr[26] = 1;
    bad.push(("MXCSR".into(), false, mxcsr));
    let mut mxcsr = area(2, 1 << 63 | 2);
    mxcsr[26] = 1;
    bad.push(("compacted MXCSR".into(), true, mxcsr));
    bad
}

#[test]
fn restores_refuse_what_is_reserved() {
    let Some(mut machine) = crate::machine::guest() else {
        return;
    };
    for (why, compacted, area) in bad_areas() {
        machine.set_operand(&area);
        let trial = Trial::of(Instruction::Xrstor)
            .on(machine.operand)
            .requesting(7);
        assert_eq!(machine.run(trial).fault(), Some(Fault::GP), "XRSTOR: {why}");
        if compacted {
            let trial = Trial::of(Instruction::Xrstors)
                .on(machine.operand)
                .requesting(7);
            assert_eq!(
                machine.run(trial).fault(),
                Some(Fault::GP),
                "XRSTORS: {why}"
            );
        }
    }
    let mut standard = vec![0; 4096];
    standard[24..28].copy_from_slice(&MXCSR_RESET.to_le_bytes());
    machine.set_operand(&standard);
    let trial = Trial::of(Instruction::Xrstors)
        .on(machine.operand)
        .requesting(7);
    assert_eq!(
        machine.run(trial).fault(),
        Some(Fault::GP),
        "XRSTORS of the standard format"
    );
    for instruction in [
        Instruction::Xsave,
        Instruction::Xsaveopt,
        Instruction::Xsavec,
        Instruction::Xsaves,
        Instruction::Xrstor,
        Instruction::Xrstors,
    ] {
        let trial = Trial::of(instruction)
            .on_address(machine.operand.address() + 8, 0)
            .requesting(7);
        assert_eq!(
            machine.run(trial).fault(),
            Some(Fault::GP),
            "{instruction:?} of an area that is not aligned"
        );
    }
}

#[test]
fn xsaves_and_xrstors_are_for_the_supervisor() {
    let Some(mut machine) = crate::machine::here() else {
        return;
    };
    for instruction in [Instruction::Xsaves, Instruction::Xrstors] {
        let trial = Trial::of(instruction).on(machine.operand).requesting(7);
        assert_eq!(
            machine.run(trial).fault(),
            Some(Fault::SIGSEGV),
            "{instruction:?}"
        );
    }
}

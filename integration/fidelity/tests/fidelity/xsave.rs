//! XSAVE, XSAVEOPT, XSAVEC and XSAVES: every combination of XINUSE, RFBM and XFD.

use amx_fidelity::component::{ALL_ENUMERATED, TILEDATA_BIT, subset};
use amx_fidelity::guest::Guest;
use amx_fidelity::process;
use amx_fidelity::sdm::save::{Save, save};
use amx_fidelity::sdm::state::State;
use amx_fidelity::trial::{Here, Instruction, Processor, Trial};

use crate::bench::{Bench, Outcome};

#[derive(Clone, Copy, Debug)]
struct Case {
    in_use: u64,
    rfbm: u64,
    xfd: u64,
    mxcsr: u32,
}

fn instruction(save: Save) -> Instruction {
    match save {
        Save::Xsave => Instruction::Xsave,
        Save::Xsaveopt => Instruction::Xsaveopt,
        Save::Xsavec => Instruction::Xsavec,
        Save::Xsaves => Instruction::Xsaves,
    }
}

fn compare(bench: &Bench, kind: Save, case: Case, outcome: &Outcome<'_>) -> Result<(), String> {
    if let Some(fault) = outcome.trial.fault() {
        return Err(format!("{fault:?}"));
    }
    let state = State::new(case.in_use, &bench.a).with_mxcsr(case.mxcsr);
    let mut expected = bench.background.clone();
    save(
        kind,
        &bench.layout,
        &state,
        case.rfbm,
        case.xfd,
        bench.mxcsr_mask,
        &mut expected,
    );
    bench.same("the area", outcome.operand, &expected)?;
    let xinuse = outcome.trial.xinuse() & ALL_ENUMERATED & !case.xfd;
    if xinuse != case.in_use & ALL_ENUMERATED & !case.xfd {
        return Err(format!("XGETBV(1) is {xinuse:#x}"));
    }
    Ok(())
}

fn enumerate(processor: &mut impl Processor, kind: Save) {
    let bench = Bench::new(processor);
    let xfds: &[u64] = if processor.privileged() {
        &[0, TILEDATA_BIT]
    } else {
        &[0]
    };
    let mxcsr = bench.a.mxcsr;
    let cases = xfds.iter().flat_map(|&xfd| {
        (0..128).flat_map(move |in_use| {
            (0..128).map(move |rfbm| Case {
                in_use: subset(in_use),
                rfbm: subset(rfbm),
                xfd,
                mxcsr,
            })
        })
    });
    let prepare = |case: Case, _: &mut [u8]| {
        Trial::of(instruction(kind))
            .starting_from(bench.load, case.in_use)
            .requesting(case.rfbm)
            .with_xfd(case.xfd)
    };
    bench.run(processor, false, cases, prepare, |case, outcome| {
        compare(&bench, kind, case, outcome)
    });
}

fn in_a_guest(kind: Save) {
    if let Some(mut guest) = Guest::new() {
        enumerate(&mut guest, kind);
    }
}

fn in_this_process(kind: Save) {
    if process::has_amx() {
        process::permit_tiles();
        enumerate(&mut Here::new(), kind);
    }
}

#[test]
fn xsave_at_cpl_0() {
    in_a_guest(Save::Xsave);
}

#[test]
fn xsaveopt_at_cpl_0() {
    in_a_guest(Save::Xsaveopt);
}

#[test]
fn xsavec_at_cpl_0() {
    in_a_guest(Save::Xsavec);
}

#[test]
fn xsaves_at_cpl_0() {
    in_a_guest(Save::Xsaves);
}

#[test]
fn xsave_at_cpl_3() {
    in_this_process(Save::Xsave);
}

#[test]
fn xsaveopt_at_cpl_3() {
    in_this_process(Save::Xsaveopt);
}

#[test]
fn xsavec_at_cpl_3() {
    in_this_process(Save::Xsavec);
}

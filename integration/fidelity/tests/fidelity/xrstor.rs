//! XRSTOR and XRSTORS: every combination of XSTATE_BV, RFBM and XFD, in both formats.

use amx_fidelity::component::{ALL_ENUMERATED, TILEDATA_BIT, subset};
use amx_fidelity::guest::Guest;
use amx_fidelity::process;
use amx_fidelity::sdm::restore::{Header, Refusal, restore};
use amx_fidelity::sdm::state::{self, State};
use amx_fidelity::trial::{Fault, Here, Instruction, Processor, Trial};

use crate::bench::{Bench, Outcome};

#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) supervisor: bool,
    /// Which registers have pattern A before; the others are initial.
    pub(crate) before: u64,
    pub(crate) header: Header,
    pub(crate) rfbm: u64,
    pub(crate) xfd: u64,
}

/// Fills the area with pattern B as its header says, and gives the trial.
pub(crate) fn prepare(bench: &Bench, case: Case, area: &mut [u8]) -> Trial {
    let state = State::new(case.header.xstate_bv, &bench.b);
    if case.header.is_compacted() {
        let offsets = bench.layout.compacted(case.header.xcomp_bv);
        state::write(
            &state,
            &bench.layout,
            case.header.xstate_bv,
            |i| offsets[i as usize],
            area,
        );
    } else {
        let offset = |i| bench.layout.place(i).unwrap().offset;
        state::write(&state, &bench.layout, case.header.xstate_bv, offset, area);
    }
    area[24..28].copy_from_slice(&bench.b.mxcsr.to_le_bytes());
    area[512..576].fill(0);
    area[512..520].copy_from_slice(&case.header.xstate_bv.to_le_bytes());
    area[520..528].copy_from_slice(&case.header.xcomp_bv.to_le_bytes());
    let instruction = if case.supervisor {
        Instruction::Xrstors
    } else {
        Instruction::Xrstor
    };
    Trial::of(instruction)
        .starting_from(bench.load, case.before)
        .requesting(case.rfbm)
        .with_xfd(case.xfd)
}

pub(crate) fn check(bench: &Bench, case: Case, outcome: &Outcome<'_>) -> Result<(), String> {
    let mut state = State::new(case.before, &bench.a).with_mxcsr(bench.a.mxcsr);
    let enabled = ALL_ENUMERATED | 3;
    let (fault, xfd_err) = match restore(case.supervisor, enabled, case.rfbm, case.xfd, case.header)
    {
        Ok(effect) => {
            state.set(effect.restored, Some(&bench.b));
            state.set(effect.initialized, None);
            state.mxcsr = effect.mxcsr.value(bench.a.mxcsr, bench.b.mxcsr);
            (None, 0)
        }
        Err(Refusal::GeneralProtection) => (Some(Fault::GP), 0),
        Err(Refusal::NotAvailable { xfd_err }) => (Some(Fault::NM), xfd_err),
    };
    if (outcome.trial.fault(), outcome.trial.xfd_err()) != (fault, xfd_err) {
        return Err(format!(
            "{:?} with IA32_XFD_ERR {:#x} instead of {fault:?} with {xfd_err:#x}",
            outcome.trial.fault(),
            outcome.trial.xfd_err()
        ));
    }
    bench.registers(outcome, &state)
}

fn headers(compacted: bool, xfd: u64) -> impl Iterator<Item = Header> + Clone {
    (0..128_u32).flat_map(move |xstate_bv| {
        let xstate_bv = subset(xstate_bv);
        // With all; with every second other one; with no other: so that what is skipped lies before,
        // between and behind what is restored. Places do not depend on IA32_XFD.
        let formats = [
            xstate_bv | subset(0x7f),
            xstate_bv | subset(0b0101_0101),
            xstate_bv,
        ];
        let count = if compacted && xfd == 0 { 3 } else { 1 };
        formats.into_iter().take(count).map(move |format| Header {
            xstate_bv,
            xcomp_bv: if compacted { format | 1 << 63 } else { 0 },
        })
    })
}

fn enumerate(processor: &mut impl Processor, supervisor: bool, compacted: bool) {
    let bench = Bench::new(processor);
    let xfds: &[u64] = if processor.privileged() {
        &[0, TILEDATA_BIT]
    } else {
        &[0]
    };
    let cases = xfds.iter().flat_map(|&xfd| {
        headers(compacted, xfd).flat_map(move |header| {
            (0..128).map(move |rfbm| Case {
                supervisor,
                before: ALL_ENUMERATED,
                header,
                rfbm: subset(rfbm),
                xfd,
            })
        })
    });
    bench.run(
        processor,
        true,
        cases,
        |case, area| prepare(&bench, case, area),
        |case, outcome| check(&bench, case, outcome),
    );
}

fn in_a_guest(supervisor: bool, compacted: bool) {
    if let Some(mut guest) = Guest::new() {
        enumerate(&mut guest, supervisor, compacted);
    }
}

fn in_this_process(compacted: bool) {
    if process::has_amx() {
        process::permit_tiles();
        enumerate(&mut Here::new(), false, compacted);
    }
}

#[test]
fn xrstor_standard_at_cpl_0() {
    in_a_guest(false, false);
}

#[test]
fn xrstor_compacted_at_cpl_0() {
    in_a_guest(false, true);
}

#[test]
fn xrstors_at_cpl_0() {
    in_a_guest(true, true);
}

#[test]
fn xrstor_standard_at_cpl_3() {
    in_this_process(false);
}

#[test]
fn xrstor_compacted_at_cpl_3() {
    in_this_process(true);
}

//! Runs many cases in batches and names those that fail.

use amx_fidelity::arena::Piece;
use amx_fidelity::component::ALL_ENUMERATED;
use amx_fidelity::cpuid::Layout;
use amx_fidelity::pattern::{MXCSR_RESET, Pattern, noise};
use amx_fidelity::sdm::save::{Save, save};
use amx_fidelity::sdm::state::{self, State};
use amx_fidelity::trial::{AREA, Instruction, Processor, Trial};

/// Cases in flight.
const BATCH: usize = 128;
/// So many failures are printed.
const SHOWN: usize = 12;
/// A case fails when it fails this often in a row. Linux does not keep tiles that are live while XFD
/// disables them when it preempts a guest or a task (architecturally they may be lost), so that one
/// of 65,536 cases can meet an interrupt at that moment. What the processor does wrong, it does always.
const ATTEMPTS: u32 = 3;

/// Areas and patterns for a processor.
pub(crate) struct Bench {
    pub(crate) layout: Layout,
    /// What registers have before.
    pub(crate) a: Pattern,
    /// What memory has.
    pub(crate) b: Pattern,
    /// What an area has that nothing was written to.
    pub(crate) background: Vec<u8>,
    /// All of pattern `a`, in the standard format.
    pub(crate) load: Piece,
    pub(crate) mxcsr_mask: u32,
    operands: Vec<Piece>,
    results: Vec<Piece>,
}

/// What is known about a case when it has run.
pub(crate) struct Outcome<'a> {
    pub(crate) trial: &'a Trial,
    pub(crate) operand: &'a [u8],
    pub(crate) result: &'a [u8],
}

impl Bench {
    pub(crate) fn new(processor: &mut impl Processor) -> Self {
        let layout = Layout::here();
        let (a, b) = (Pattern::new(&layout, 1), Pattern::new(&layout, 2));
        let arena = processor.arena();
        let load = arena.take(AREA);
        let all = State::new(ALL_ENUMERATED | 3, &a).with_mxcsr(a.mxcsr);
        state::write(
            &all,
            &layout,
            all.xinuse(),
            |i| layout.place(i).unwrap().offset,
            arena.bytes_mut(load),
        );
        arena.bytes_mut(load)[24..28].copy_from_slice(&a.mxcsr.to_le_bytes());
        let mut background = noise(0x77, 0, AREA);
        // XSAVE need not write the reserved bytes of the eight x87 registers.
        for register in background[32..160].chunks_exact_mut(16) {
            register[10..].fill(0);
        }
        let mut take = || (0..BATCH).map(|_| arena.take(AREA)).collect::<Vec<_>>();
        let (operands, results) = (take(), take());
        for result in &results {
            // XSAVE of everything writes all but what must be compared with this.
            arena.bytes_mut(*result).copy_from_slice(&background);
        }
        let mut trial = [Trial::of(Instruction::Xsave).requesting(2).on(operands[0])];
        processor.run(&mut trial);
        let saved = processor.arena().bytes(operands[0]);
        let mxcsr_mask = u32::from_le_bytes(saved[28..32].try_into().unwrap());
        Self {
            layout,
            a,
            b,
            background,
            load,
            mxcsr_mask,
            operands,
            results,
        }
    }

    /// Runs all cases. `prepare` fills a case's operand, which starts as the background, and makes its
    /// trial; `check` says what is wrong. With `saving`, all registers are saved after it.
    pub(crate) fn run<P: Processor, C: Copy + std::fmt::Debug>(
        &self,
        processor: &mut P,
        saving: bool,
        cases: impl IntoIterator<Item = C>,
        mut prepare: impl FnMut(C, &mut [u8]) -> Trial,
        mut check: impl FnMut(C, &Outcome<'_>) -> Result<(), String>,
    ) {
        let mut cases = cases.into_iter();
        let (mut count, mut failed, mut shown) = (0, 0, Vec::new());
        loop {
            let batch: Vec<C> = cases.by_ref().take(BATCH).collect();
            if batch.is_empty() {
                break;
            }
            count += batch.len();
            let mut failures = self.attempt(processor, saving, &batch, &mut prepare, &mut check);
            for _ in 1..ATTEMPTS {
                if failures.is_empty() {
                    break;
                }
                let again: Vec<C> = failures.into_iter().map(|(case, _)| case).collect();
                failures = self.attempt(processor, saving, &again, &mut prepare, &mut check);
            }
            failed += failures.len();
            for (case, why) in failures {
                if shown.len() < SHOWN {
                    shown.push(format!("{case:x?}: {why}"));
                }
            }
        }
        println!("{count} cases");
        assert!(
            failed == 0,
            "{failed} of {count} cases fail:\n{}",
            shown.join("\n")
        );
    }

    /// Runs these cases, and gives those that fail.
    fn attempt<P: Processor, C: Copy>(
        &self,
        processor: &mut P,
        saving: bool,
        batch: &[C],
        prepare: &mut impl FnMut(C, &mut [u8]) -> Trial,
        check: &mut impl FnMut(C, &Outcome<'_>) -> Result<(), String>,
    ) -> Vec<(C, String)> {
        let mut trials = Vec::with_capacity(batch.len());
        for (i, case) in batch.iter().enumerate() {
            let arena = processor.arena();
            let operand = arena.bytes_mut(self.operands[i]);
            operand.copy_from_slice(&self.background);
            let trial = prepare(*case, operand);
            let trial = trial.on(self.operands[i]);
            trials.push(if saving {
                trial.saving_to(self.results[i])
            } else {
                trial
            });
        }
        processor.run(&mut trials);
        let mut failures = Vec::new();
        for (i, case) in batch.iter().enumerate() {
            let arena = processor.arena();
            let outcome = Outcome {
                trial: &trials[i],
                operand: arena.bytes(self.operands[i]),
                result: arena.bytes(self.results[i]),
            };
            if let Err(why) = check(*case, &outcome) {
                failures.push((*case, why));
            }
        }
        failures
    }

    /// Compares the registers that a trial left with the model's.
    pub(crate) fn registers(&self, outcome: &Outcome<'_>, state: &State<'_>) -> Result<(), String> {
        let mut area = self.background.clone();
        let (all, mask) = (ALL_ENUMERATED | 3, self.mxcsr_mask);
        save(Save::Xsave, &self.layout, state, all, 0, mask, &mut area);
        if state.mxcsr != MXCSR_RESET {
            // XINUSE[1] is about the XMM registers (SDM vol. 1, 13.6), but what XSAVE does with it when
            // only MXCSR differs from its initial value, the manual leaves open.
            area[512] |= outcome.result[512] & 2;
        }
        self.same("the registers", outcome.result, &area)
    }

    /// Where two areas differ first.
    pub(crate) fn same(&self, what: &str, actual: &[u8], expected: &[u8]) -> Result<(), String> {
        if actual == expected {
            return Ok(());
        }
        let at = actual
            .iter()
            .zip(expected)
            .position(|(a, b)| a != b)
            .unwrap();
        let word = |bytes: &[u8]| u64::from_le_bytes(bytes[at / 8 * 8..][..8].try_into().unwrap());
        Err(format!(
            "{what}: byte {at} is {:#x} instead of {:#x} (of {:#x}, {:#x})",
            actual[at],
            expected[at],
            word(actual),
            word(expected)
        ))
    }
}

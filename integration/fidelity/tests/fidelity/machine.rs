//! A processor with room for single trials.

use amx_fidelity::arena::Piece;
use amx_fidelity::component::{AMX, TILECFG, TILEDATA};
use amx_fidelity::cpuid::Layout;
use amx_fidelity::guest::Guest;
use amx_fidelity::process;
use amx_fidelity::sdm::tilecfg::Config;
use amx_fidelity::trial::{AREA, Here, Processor, Trial};

/// A processor, an area to load its registers from, an operand, and an area for what comes out.
pub(crate) struct Machine<P> {
    pub(crate) processor: P,
    pub(crate) layout: Layout,
    pub(crate) load: Piece,
    pub(crate) operand: Piece,
    pub(crate) result: Piece,
}

/// This process, with the permission for tiles; `None` where the test is skipped.
pub(crate) fn here() -> Option<Machine<Here>> {
    if !process::has_amx() {
        return None;
    }
    process::permit_tiles();
    Some(Machine::new(Here::new()))
}

/// A guest; `None` where the test is skipped.
pub(crate) fn guest() -> Option<Machine<Guest>> {
    Guest::new().map(Machine::new)
}

impl<P: Processor> Machine<P> {
    pub(crate) fn new(mut processor: P) -> Self {
        let arena = processor.arena();
        let [load, operand, result] = [(); 3].map(|()| arena.take(AREA));
        Self {
            layout: Layout::here(),
            processor,
            load,
            operand,
            result,
        }
    }

    /// Starts from these tiles and saves everything afterwards.
    pub(crate) fn with_tiles(&mut self, trial: Trial, config: &Config, tiles: &[u8]) -> Trial {
        let offsets = [TILECFG, TILEDATA].map(|i| self.layout.place(i).unwrap().offset);
        let area = self.processor.arena().bytes_mut(self.load);
        area[24..28].copy_from_slice(&0x1f80_u32.to_le_bytes());
        area[offsets[0]..][..64].copy_from_slice(config);
        area[offsets[1]..][..tiles.len()].copy_from_slice(tiles);
        trial.starting_from(self.load, AMX).saving_to(self.result)
    }

    pub(crate) fn set_operand(&mut self, bytes: &[u8]) {
        self.processor.arena().bytes_mut(self.operand)[..bytes.len()].copy_from_slice(bytes);
    }

    pub(crate) fn operand(&mut self) -> Vec<u8> {
        self.processor.arena().bytes(self.operand).to_vec()
    }

    /// Runs one trial.
    pub(crate) fn run(&mut self, trial: Trial) -> Trial {
        let mut trials = [trial];
        self.processor.run(&mut trials);
        trials[0]
    }

    /// XSTATE_BV of the registers after the trial.
    pub(crate) fn in_use(&mut self) -> u64 {
        let area = self.processor.arena().bytes(self.result);
        u64::from_le_bytes(area[512..520].try_into().unwrap())
    }

    /// A component of the registers after the trial.
    pub(crate) fn component(&mut self, number: u32) -> Vec<u8> {
        let place = self.layout.place(number).unwrap();
        self.processor.arena().bytes(self.result)[place.offset..][..place.size].to_vec()
    }

    /// A tile after the trial.
    pub(crate) fn tile(&mut self, tile: usize) -> Vec<u8> {
        self.component(TILEDATA)[tile * 1024..][..1024].to_vec()
    }
}

//! One vCPU's task: its input, its code, and whether its result is right.

use std::fmt;
use std::sync::OnceLock;

use rand::{Rng, RngExt, SeedableRng, rngs::StdRng};

use crate::area::{self, AREA_BYTES};
use crate::model::{Control, Narrow, Tiles, Wide};
use crate::{code, machine};

/// What a payload keeps its state in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Kind {
    /// TMM0 to TMM7 and TILECFG.
    Tiles,
    /// ZMM0 to ZMM31 and k0 to k7.
    Avx512,
    /// YMM0 to YMM15.
    Avx2,
    /// XMM0 to XMM15.
    Sse,
}

impl Kind {
    /// All, the one with the most state first.
    pub const ALL: [Self; 4] = [Self::Tiles, Self::Avx512, Self::Avx2, Self::Sse];

    /// Its name, as [`parse`](Self::parse) reads it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tiles => "tiles",
            Self::Avx512 => "avx512",
            Self::Avx2 => "avx2",
            Self::Sse => "sse",
        }
    }

    /// The kind of that name.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.name() == name)
    }

    /// What it depends on, in words.
    #[must_use]
    pub const fn registers(self) -> &'static str {
        match self {
            Self::Tiles => "TMM0-7, TILECFG, MXCSR, x87",
            Self::Avx512 => "ZMM0-31, k0-7, MXCSR, x87",
            Self::Avx2 => "YMM0-15, MXCSR, x87",
            Self::Sse => "XMM0-15, MXCSR, x87",
        }
    }

    /// The XCR0 that it needs.
    #[must_use]
    pub const fn xcr0(self) -> u64 {
        match self {
            Self::Tiles => 0x6_0007,
            Self::Avx512 => 0xe7,
            Self::Avx2 => 0x7,
            Self::Sse => 0x3,
        }
    }

    /// The components that hold its state, as a bitmap. MXCSR, which has none of its own, comes on
    /// top.
    #[must_use]
    pub const fn components(self) -> u64 {
        match self {
            Self::Tiles => 0x6_0001,
            _ => self.xcr0(),
        }
    }

    /// Whether a guest with this XCR0 can run it on a processor with this CPUID.
    pub fn runs_with(self, xcr0: u64, mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> bool {
        let [_, leaf7_ebx, _, leaf7_edx] = cpuid(7, 0);
        let [_, _, leaf1_ecx, _] = cpuid(1, 0);
        let instructions = match self {
            // AMX-TILE and AMX-INT8
            Self::Tiles => leaf7_edx >> 24 & 3 == 3,
            // AVX512F and AVX512BW
            Self::Avx512 => leaf7_ebx >> 16 & 1 == 1 && leaf7_ebx >> 30 & 1 == 1,
            Self::Avx2 => leaf7_ebx >> 5 & 1 == 1,
            // SSSE3
            Self::Sse => leaf1_ecx >> 9 & 1 == 1,
        };
        instructions && xcr0 & self.xcr0() == self.xcr0()
    }

    /// The machine code of its body.
    #[must_use]
    pub fn body(self) -> &'static [u8] {
        match self {
            Self::Tiles => code::amx(),
            Self::Avx512 => code::avx512(),
            Self::Avx2 => code::avx2(),
            Self::Sse => code::sse(),
        }
    }

    /// Rounds that take a guest some tens of milliseconds on hardware of today.
    #[must_use]
    pub const fn default_rounds(self) -> u64 {
        match self {
            Self::Tiles => 200,
            Self::Avx512 | Self::Avx2 | Self::Sse => 30_000,
        }
    }

    /// PAUSE instructions of a round, or of one of the eight steps of a round with tiles.
    const fn pauses(self) -> u64 {
        match self {
            Self::Tiles => 1000,
            Self::Avx512 | Self::Avx2 | Self::Sse => 50,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A register that does not hold what the model says.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Difference {
    /// Its name.
    pub register: String,
    /// Its bytes by the model, lowest first.
    pub expected: Vec<u8>,
    /// Its bytes as the guest stored them.
    pub actual: Vec<u8>,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = self
            .expected
            .iter()
            .zip(&self.actual)
            .position(|(expected, actual)| expected != actual)
            .unwrap_or_default();
        let byte = |bytes: &[u8]| bytes.get(at).copied().unwrap_or_default();
        write!(
            f,
            "{} byte {at}: expected {:#04x}, found {:#04x}",
            self.register,
            byte(&self.expected),
            byte(&self.actual)
        )
    }
}

/// One vCPU's task.
#[derive(Clone, Debug)]
pub struct Workload {
    kind: Kind,
    rounds: u64,
    pauses: u64,
    input: State,
    shuffle: [[u8; 16]; 2],
    /// Each register at the end: name, offset in the area, bytes. The model runs once.
    expected: OnceLock<Vec<(String, usize, Vec<u8>)>>,
}

#[derive(Clone, Debug)]
enum State {
    Tiles(Box<Tiles>),
    Wide(Box<Wide>),
    Narrow(Box<Narrow>),
}

impl Workload {
    /// A task whose registers start with values from `seed`. No rounds count as one.
    #[must_use]
    pub fn new(kind: Kind, seed: u64, rounds: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        // Rounding control and sticky flags of any value, all exceptions masked. Flush-to-zero is
        // on and nothing sets it, so an MXCSR that was reset shows for good.
        let mxcsr = 0x9f80 | rng.next_u32() & 0x605f;
        // Single or double precision, which nothing sets either.
        let fcw = 0x7f | rng.random::<u16>() & 0xe00;
        let control = Control::new(rng.next_u64(), mxcsr, fcw, rng.random());
        let mut shuffle = [[0; 16]; 2];
        for (half, turn) in shuffle.iter_mut().zip([5, 11]) {
            for (to, from) in half.iter_mut().zip((0..16u8).cycle().skip(turn)) {
                *to = from;
            }
        }
        let input = match kind {
            Kind::Tiles => State::Tiles(Box::new(tiles(&mut rng, control))),
            Kind::Avx512 => State::Wide(Box::new(Wide {
                zmm: core::array::from_fn(|_| rng.random()),
                opmask: rng.random(),
                control,
            })),
            Kind::Avx2 | Kind::Sse => State::Narrow(Box::new(Narrow {
                vectors: core::array::from_fn(|_| rng.random()),
                lanes: if kind == Kind::Avx2 { 4 } else { 2 },
                shuffle,
                control,
            })),
        };
        Self {
            kind,
            rounds: rounds.max(1),
            pauses: kind.pauses(),
            input,
            shuffle,
            expected: OnceLock::new(),
        }
    }

    /// The same, waiting `factor` times as long in each round, for hosts on which PAUSE is short.
    #[must_use]
    pub fn slower(mut self, factor: u64) -> Self {
        self.pauses = self.pauses.saturating_mul(factor.max(1));
        self
    }

    /// What it keeps its state in.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// How many rounds it computes.
    #[must_use]
    pub fn rounds(&self) -> u64 {
        self.rounds
    }

    /// Whether a vCPU at `rip`, with `rcx`, is between its first and its last round: then everything
    /// that its result needs is in its registers.
    #[must_use]
    pub fn is_midway(&self, rip: u64, rcx: u64) -> bool {
        let end = machine::body().saturating_add(self.kind.body().len() as u64);
        (machine::body()..end).contains(&rip) && (1..self.rounds).contains(&rcx)
    }

    /// What vCPU `index`'s area holds at the start. The guest enables `xcr0`.
    #[must_use]
    pub fn area(&self, index: u8, xcr0: u64) -> Vec<u8> {
        let mut bytes = Bytes(vec![0; AREA_BYTES]);
        bytes.put(area::XCR0, &xcr0.to_le_bytes());
        bytes.put(area::ROUNDS, &self.rounds.to_le_bytes());
        bytes.put(area::PAUSES, &self.pauses.to_le_bytes());
        bytes.put(area::ENTRY, &machine::body().to_le_bytes());
        bytes.put(area::SHUFFLE, self.shuffle.as_flattened());
        bytes.put(area::MESSAGE, message(index).as_bytes());
        let control = self.input.control();
        bytes.put(area::ACC, &control.acc.to_le_bytes());
        bytes.put(area::IN_MXCSR, &control.mxcsr.to_le_bytes());
        bytes.put(area::IN_FCW, &control.fcw.to_le_bytes());
        let mut pushed = control.popped();
        pushed.reverse();
        bytes.put_u64s(area::IN_X87, &pushed);
        match &self.input {
            State::Tiles(tiles) => {
                bytes.put(area::ROWS, &(tiles.rows as u64).to_le_bytes());
                bytes.put(area::IN_TILECFG, &tile_config(tiles.rows));
                for (tile, at) in tiles.tiles.iter().zip(slots(area::IN_VECTORS, 1024)) {
                    bytes.put(at, tile.as_flattened());
                }
            }
            State::Wide(wide) => {
                bytes.put_u64s(area::IN_OPMASK, &wide.opmask);
                for (zmm, at) in wide.zmm.iter().zip(slots(area::IN_VECTORS, 64)) {
                    bytes.put_u64s(at, zmm);
                }
            }
            State::Narrow(narrow) => {
                for (vector, at) in narrow.vectors.iter().zip(slots(area::IN_VECTORS, 64)) {
                    bytes.put_u64s(at, vector.get(..narrow.lanes).unwrap_or_default());
                }
            }
        }
        bytes.0
    }

    /// Compares what the guest left in its area with the model: the registers that are wrong.
    ///
    /// The first call runs the model.
    #[must_use]
    pub fn check(&self, area: &[u8]) -> Vec<Difference> {
        self.expected
            .get_or_init(|| self.compute())
            .iter()
            .filter_map(|(register, at, expected)| {
                let at = *at;
                let end = at.saturating_add(expected.len());
                let actual = area.get(at..end).unwrap_or_default().to_vec();
                let same = if at == area::OUT_FSW {
                    top_of_stack(&actual) == top_of_stack(expected)
                } else {
                    actual == *expected
                };
                (!same).then(|| Difference {
                    register: register.clone(),
                    expected: expected.clone(),
                    actual,
                })
            })
            .collect()
    }

    fn compute(&self) -> Vec<(String, usize, Vec<u8>)> {
        let mut end = self.input.clone();
        match &mut end {
            State::Tiles(tiles) => tiles.run(self.rounds),
            State::Wide(wide) => wide.run(self.rounds),
            State::Narrow(narrow) => narrow.run(self.rounds),
        }
        let control = end.control();
        let mut all = vec![
            ("DONE".into(), area::DONE, vec![1]),
            ("R8".into(), area::OUT_ACC, control.acc.to_le_bytes().into()),
            (
                "MXCSR".into(),
                area::OUT_MXCSR,
                control.mxcsr.to_le_bytes().into(),
            ),
            (
                "FCW".into(),
                area::OUT_FCW,
                control.fcw.to_le_bytes().into(),
            ),
            (
                "FSW.TOP".into(),
                area::OUT_FSW,
                (u16::from(control.top) << 11).to_le_bytes().into(),
            ),
        ];
        let mut add = |name: &str, number: usize, at: usize, bytes: Vec<u8>| {
            all.push((format!("{name}{number}"), at, bytes));
        };
        for ((number, value), at) in (0..).zip(control.popped()).zip(slots(area::OUT_X87, 8)) {
            add("ST", number, at, value.to_le_bytes().into());
        }
        let vectors = |size| (0..).zip(slots(area::OUT_VECTORS, size));
        match &end {
            State::Tiles(tiles) => {
                add(
                    "TILECFG",
                    0,
                    area::OUT_TILECFG,
                    tile_config(tiles.rows).into(),
                );
                for (tile, (number, at)) in tiles.tiles.iter().zip(vectors(1024)) {
                    add("TMM", number, at, tile.as_flattened().into());
                }
            }
            State::Wide(wide) => {
                for ((number, k), at) in (0..).zip(wide.opmask).zip(slots(area::OUT_OPMASK, 8)) {
                    add("K", number, at, k.to_le_bytes().into());
                }
                for (zmm, (number, at)) in wide.zmm.iter().zip(vectors(64)) {
                    add("ZMM", number, at, flat(zmm));
                }
            }
            State::Narrow(narrow) => {
                let name = if narrow.lanes == 4 { "YMM" } else { "XMM" };
                for (vector, (number, at)) in narrow.vectors.iter().zip(vectors(64)) {
                    let lanes = vector.get(..narrow.lanes).unwrap_or_default();
                    add(name, number, at, flat(lanes));
                }
            }
        }
        all
    }
}

impl State {
    fn control(&self) -> &Control {
        match self {
            Self::Tiles(tiles) => &tiles.control,
            Self::Wide(wide) => &wide.control,
            Self::Narrow(narrow) => &narrow.control,
        }
    }
}

/// The line that vCPU `index` writes to the serial port when it is done.
#[must_use]
pub fn message(index: u8) -> String {
    format!("vCPU {index} is done\n")
}

/// What the counting payload's area holds for `counts` counts.
#[must_use]
pub fn counter_area(index: u8, counts: u64) -> Vec<u8> {
    let mut bytes = Bytes(vec![0; AREA_BYTES]);
    bytes.put(area::ROUNDS, &counts.max(1).to_le_bytes());
    bytes.put(area::MESSAGE, counter_string(index).as_bytes());
    bytes.0
}

/// What the XFD payload's area holds: a tile to be loaded, and the configuration for it.
#[must_use]
pub fn armed_area(xcr0: u64) -> Vec<u8> {
    let mut bytes = Bytes(vec![0; AREA_BYTES]);
    bytes.put(area::XCR0, &xcr0.to_le_bytes());
    bytes.put(area::EXPECTS_NM, &[1]);
    bytes.put(area::IN_TILECFG, &tile_config(ARMED_ROWS));
    bytes.put(area::IN_VECTORS, &armed_tile());
    bytes.0
}

/// What the area of the payload with the kernel's cases holds: a tile to be loaded, and the
/// configuration for it.
#[must_use]
pub fn kernel_cases_area(xcr0: u64) -> Vec<u8> {
    let mut bytes = Bytes(vec![0; AREA_BYTES]);
    bytes.put(area::XCR0, &xcr0.to_le_bytes());
    bytes.put(area::IN_TILECFG, &tile_config(ARMED_ROWS));
    bytes.put(area::IN_VECTORS, &armed_tile());
    bytes.0
}

/// What is wrong in the area that the XFD payload left: nothing, where XFD was armed throughout, #NM
/// came with the right IA32_XFD_ERR, and the tile went through a register unharmed.
#[must_use]
pub fn check_armed(area: &[u8]) -> Vec<Difference> {
    const TILES: u32 = 1 << 18;
    let expected = [
        ("DONE", area::DONE, vec![1]),
        (
            "IA32_XFD_ERR",
            area::OUT_XFD_ERR,
            TILES.to_le_bytes().into(),
        ),
        ("IA32_XFD", area::OUT_XFD, TILES.to_le_bytes().into()),
        ("TMM0", area::OUT_VECTORS, armed_tile()),
    ];
    let wrong = expected.into_iter().filter_map(|(register, at, expected)| {
        let end = at.saturating_add(expected.len());
        let actual = area.get(at..end).unwrap_or_default().to_vec();
        (actual != expected).then(|| Difference {
            register: register.into(),
            expected,
            actual,
        })
    });
    wrong.collect()
}

const ARMED_ROWS: usize = 16;

fn armed_tile() -> Vec<u8> {
    (0..=u8::MAX).cycle().step_by(7).take(1024).collect()
}

/// The sixteen bytes that the counting payload writes as a string after every count.
#[must_use]
pub fn counter_string(index: u8) -> String {
    format!("vCPU {index:<2} counting")
}

fn tiles(rng: &mut StdRng, control: Control) -> Tiles {
    let rows = rng.random_range(4..=16usize);
    let mut tiles = [[[0; 64]; 16]; 8];
    for row in tiles.iter_mut().flat_map(|tile| tile.iter_mut().take(rows)) {
        rng.fill_bytes(row.get_mut(..rows.saturating_mul(4)).unwrap_or_default());
    }
    Tiles {
        tiles,
        rows,
        control,
    }
}

/// SDM Vol. 1 §18.2.2 (LDTILECFG): palette 1, eight tiles of `rows` rows of as many elements.
fn tile_config(rows: usize) -> [u8; 64] {
    let mut bytes = Bytes(vec![0; 64]);
    bytes.put(0, &[1]);
    let rows = u8::try_from(rows).unwrap_or_default();
    for (row_bytes_at, rows_at) in slots(16, 2).zip(slots(48, 1)).take(8) {
        bytes.put(row_bytes_at, &[rows.saturating_mul(4)]);
        bytes.put(rows_at, &[rows]);
    }
    bytes.0.first_chunk().copied().unwrap_or([0; 64])
}

fn top_of_stack(status: &[u8]) -> Option<u16> {
    Some(u16::from_le_bytes(*status.first_chunk()?) >> 11 & 7)
}

fn flat(lanes: &[u64]) -> Vec<u8> {
    lanes.iter().flat_map(|lane| lane.to_le_bytes()).collect()
}

fn slots(first: usize, size: usize) -> impl Iterator<Item = usize> {
    (first..).step_by(size)
}

/// Bytes to be filled at offsets. What does not fit is left out: the offsets are constants, and
/// the tests of the models would show it.
struct Bytes(Vec<u8>);

impl Bytes {
    fn put(&mut self, at: usize, bytes: &[u8]) {
        for (slot, byte) in self.0.iter_mut().skip(at).zip(bytes) {
            *slot = *byte;
        }
    }

    fn put_u64s(&mut self, at: usize, values: &[u64]) {
        self.put(at, &flat(values));
    }
}

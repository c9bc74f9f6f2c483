//! Matrix products on tiles, checked each round against plain code.
//!
//! The accumulators, a pattern and the configuration stay in the tile registers for as long as the process lives: whoever loses them
//! between any two instructions is found out at the end of the round.

use std::io;

use crate::sys;
use crate::tiles::{self, Difference, ROW, TILE, Tile};
use crate::worker::{Outcome, Work};

/// The tiles that no product changes, with a pattern.
const PATTERN: [u8; 4] = [2, 3, 6, 7];
const ROWS: usize = 16;
const COLUMNS: usize = 16;
/// Elements of four bytes in a row.
const DEPTH: usize = 16;

/// Numbers that look random (xorshift64*).
struct Numbers(u64);

impl Numbers {
    fn of(process: u8) -> Self {
        Self(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(u64::from(process) + 1))
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn tile(&mut self, mut element: impl FnMut(u64) -> [u8; 8]) -> Tile {
        let mut tile = Tile([0; TILE]);
        for chunk in tile.0.chunks_exact_mut(8) {
            chunk.copy_from_slice(&element(self.next()));
        }
        tile
    }
}

/// What the tile registers hold throughout.
struct Held {
    pattern: Tile,
}

impl Held {
    fn start(numbers: &mut Numbers) -> io::Result<Self> {
        sys::request_tiles()?;
        let held = Self {
            pattern: numbers.tile(u64::to_le_bytes),
        };
        held.load();
        Ok(held)
    }

    fn load(&self) {
        tiles::load_config(&tiles::FULL);
        for tile in PATTERN {
            tiles::load(tile, &self.pattern);
        }
    }

    fn difference(&self) -> Option<Difference> {
        let config = tiles::store_config();
        let mut wrong = tiles::difference(8, &tiles::FULL.0, &config.0, 64);
        for tile in PATTERN {
            wrong = Difference::and(wrong, compare(tile, &self.pattern));
        }
        wrong
    }
}

fn compare(number: u8, expected: &Tile) -> Option<Difference> {
    tiles::difference(number, &expected.0, &tiles::store(number).0, ROW)
}

/// System calls and other processes between a product and its check.
fn give_way(round: u64) {
    sys::give_way();
    if round.is_multiple_of(4) {
        sys::sleep();
    }
}

/// Products of bytes.
pub struct Bytes {
    numbers: Numbers,
    held: Held,
    /// What tiles 0 and 1 should hold, row by row.
    signed: Vec<i32>,
    unsigned: Vec<u32>,
    signals: bool,
}

impl Bytes {
    /// Asks for the permission and loads the tiles. With `signals`, handlers that use tiles come in between.
    pub fn start(process: u8, signals: bool) -> io::Result<Self> {
        let mut numbers = Numbers::of(process);
        let held = Held::start(&mut numbers)?;
        if signals {
            sys::disturb()?;
        }
        let mut this = Self {
            numbers,
            held,
            signed: Vec::new(),
            unsigned: Vec::new(),
            signals,
        };
        this.clear();
        Ok(this)
    }

    fn clear(&mut self) {
        let zero = Tile([0; TILE]);
        tiles::load(0, &zero);
        tiles::load(1, &zero);
        self.signed = vec![0; ROWS * COLUMNS];
        self.unsigned = vec![0; ROWS * COLUMNS];
    }
}

impl Work for Bytes {
    fn round(&mut self, round: u64) -> io::Result<Outcome> {
        let first = self.numbers.tile(u64::to_le_bytes);
        let second = self.numbers.tile(u64::to_le_bytes);
        tiles::load(4, &first);
        tiles::load(5, &second);
        tiles::signed();
        tiles::unsigned();
        if self.signals {
            sys::disturb_now()?;
        }
        give_way(round);
        // With the tiles live; this takes most of the time.
        for row in 0..ROWS {
            for column in 0..COLUMNS {
                let at = row * COLUMNS + column;
                for k in 0..DEPTH {
                    for byte in 0..4 {
                        let x = first.0[row * ROW + k * 4 + byte];
                        let y = second.0[k * ROW + column * 4 + byte];
                        let product = i32::from(x as i8) * i32::from(y as i8);
                        self.signed[at] = self.signed[at].wrapping_add(product);
                        let product = u32::from(x) * u32::from(y);
                        self.unsigned[at] = self.unsigned[at].wrapping_add(product);
                    }
                }
            }
        }
        let signed = tile(self.signed.iter().map(|value| value.to_le_bytes()));
        let unsigned = tile(self.unsigned.iter().map(|value| value.to_le_bytes()));
        let mut wrong = compare(0, &signed);
        for (number, expected) in [(1, &unsigned), (4, &first), (5, &second)] {
            wrong = Difference::and(wrong, compare(number, expected));
        }
        let wrong = Difference::and(wrong, self.held.difference());
        Ok(if let Some(wrong) = wrong {
            // From here on as if all had been right.
            self.held.load();
            self.clear();
            wrong.in_round(round)
        } else {
            Outcome::Right
        })
    }
}

/// Products of bfloat16 numbers.
pub struct Halves {
    numbers: Numbers,
    held: Held,
    sums: Vec<f32>,
}

/// So many rounds add up exactly: each adds at most 32 products of at most 64, and 2^24 is the limit.
const EXACT_ROUNDS: u64 = 256;

impl Halves {
    /// Asks for the permission and loads the tiles.
    pub fn start(process: u8) -> io::Result<Self> {
        let mut numbers = Numbers::of(process);
        let held = Held::start(&mut numbers)?;
        let mut this = Self {
            numbers,
            held,
            sums: Vec::new(),
        };
        this.clear();
        Ok(this)
    }

    fn clear(&mut self) {
        tiles::load(0, &Tile([0; TILE]));
        self.sums = vec![0.0; ROWS * COLUMNS];
    }

    /// Integers from -8 to 7 as bfloat16: the upper half of a single-precision number.
    fn operand(&mut self) -> Tile {
        self.numbers.tile(|random| {
            let mut bytes = [0; 8];
            for (half, place) in random
                .to_le_bytes()
                .into_iter()
                .zip(bytes.chunks_exact_mut(2))
            {
                let [.., low, high] = (f32::from(half % 16) - 8.0).to_le_bytes();
                place.copy_from_slice(&[low, high]);
            }
            bytes
        })
    }
}

impl Work for Halves {
    fn round(&mut self, round: u64) -> io::Result<Outcome> {
        if round.is_multiple_of(EXACT_ROUNDS) {
            self.clear();
        }
        let first = self.operand();
        let second = self.operand();
        tiles::load(4, &first);
        tiles::load(5, &second);
        tiles::halves();
        give_way(round);
        for row in 0..ROWS {
            for column in 0..COLUMNS {
                for k in 0..DEPTH {
                    for half in 0..2 {
                        let x = value(&first, row * ROW + k * 4 + half * 2);
                        let y = value(&second, k * ROW + column * 4 + half * 2);
                        self.sums[row * COLUMNS + column] += x * y;
                    }
                }
            }
        }
        let sums = tile(self.sums.iter().map(|value| value.to_le_bytes()));
        let mut wrong = compare(0, &sums);
        for (number, expected) in [(4, &first), (5, &second)] {
            wrong = Difference::and(wrong, compare(number, expected));
        }
        let wrong = Difference::and(wrong, self.held.difference());
        Ok(if let Some(wrong) = wrong {
            self.held.load();
            self.clear();
            wrong.in_round(round)
        } else {
            Outcome::Right
        })
    }
}

fn value(tile: &Tile, at: usize) -> f32 {
    f32::from_le_bytes([0, 0, tile.0[at], tile.0[at + 1]])
}

fn tile(elements: impl Iterator<Item = [u8; 4]>) -> Tile {
    let mut tile = Tile([0; TILE]);
    for (place, element) in tile.0.chunks_exact_mut(4).zip(elements) {
        place.copy_from_slice(&element);
    }
    tile
}

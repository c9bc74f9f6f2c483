//! The tile payload: TMM0 to TMM7, in integers.

use super::Control;

/// Bytes of a tile's row in memory.
const ROW_BYTES: usize = 64;
/// The most rows of a tile.
const ROWS: usize = 16;

/// Whether the bytes of the two factors are signed.
type Signs = (bool, bool);
/// TDPBSSD, TDPBUUD, TDPBSUD, TDPBUSD.
const PRODUCTS: [Signs; 4] = [(true, true), (false, false), (true, false), (false, true)];

/// One tile at its full size; what its configuration leaves out is zero.
type Tile = [[u8; ROW_BYTES]; ROWS];

/// All registers of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// TMM0 to TMM7.
    pub tiles: [[[u8; ROW_BYTES]; ROWS]; 8],
    /// Rows of each tile, and 32-bit elements in each row. At least 4, at most 16.
    pub rows: usize,
    /// MXCSR, x87 and the accumulator.
    pub control: Control,
}

impl Tiles {
    /// Computes `rounds` rounds of eight steps.
    pub fn run(&mut self, rounds: u64) {
        for _ in 0..rounds {
            for step in 0..8 {
                self.step(step);
            }
        }
    }

    fn step(&mut self, step: usize) {
        let mut c = self.tiles[step];
        self.product(
            &mut c,
            &self.tiles[(step + 1) % 8],
            &self.tiles[(step + 2) % 8],
            PRODUCTS[step % 4],
        );
        self.tiles[step] = c;

        let moved = &mut self.tiles[(step + 4) % 8];
        moved[..self.rows].rotate_left(1);
        let [row, ..] = moved;
        let (first, rest) = row.split_at_mut(8);
        for (byte, acc) in first.iter_mut().zip(self.control.acc.to_le_bytes()) {
            *byte ^= acc;
        }
        let second = rest.first_chunk().map_or(0, |b| u64::from_le_bytes(*b));

        self.control.mix();
        self.control.acc = self.control.acc.wrapping_add(second);
        self.control.convert(second);
    }

    /// `c += a * b` with sums of four products of bytes (SDM Vol. 2, TDPBSSD).
    fn product(&self, c: &mut Tile, a: &Tile, b: &Tile, signs: Signs) {
        let (signed_a, signed_b) = signs;
        for (c, a) in c.iter_mut().zip(a).take(self.rows) {
            for (a, b) in a.chunks_exact(4).zip(b).take(self.rows) {
                let sums = c.chunks_exact_mut(4).zip(b.chunks_exact(4));
                for (sum, b) in sums.take(self.rows) {
                    let mut total = i32::from_le_bytes([sum[0], sum[1], sum[2], sum[3]]);
                    for (&a, &b) in a.iter().zip(b) {
                        let product = extend(a, signed_a) * extend(b, signed_b);
                        total = total.wrapping_add(product);
                    }
                    sum.copy_from_slice(&total.to_le_bytes());
                }
            }
        }
    }
}

fn extend(byte: u8, signed: bool) -> i32 {
    if signed {
        i32::from(byte.cast_signed())
    } else {
        i32::from(byte)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_product_by_hand() {
        let tiles = Tiles {
            tiles: [[[0; 64]; 16]; 8],
            rows: 4,
            control: Control::new(0, 0, 0, [0; 8]),
        };
        let mut a = [[0; 64]; 16];
        let mut b = [[0; 64]; 16];
        let mut c = [[0; 64]; 16];
        // a[1][4*2..] times b[2][4*3..] goes to c[1][3]
        a[1][8..12].copy_from_slice(&[0xff, 2, 3, 4]);
        b[2][12..16].copy_from_slice(&[5, 0xfe, 7, 8]);
        c[1][12..16].copy_from_slice(&1000i32.to_le_bytes());
        let sum = |signs| {
            let mut c = c;
            tiles.product(&mut c, &a, &b, signs);
            i32::from_le_bytes([c[1][12], c[1][13], c[1][14], c[1][15]])
        };
        assert_eq!(sum((true, true)), 1000 - 5 - 4 + 21 + 32);
        assert_eq!(sum((false, false)), 1000 + 255 * 5 + 2 * 254 + 21 + 32);
        assert_eq!(sum((true, false)), 1000 - 5 + 2 * 254 + 21 + 32);
        assert_eq!(sum((false, true)), 1000 + 255 * 5 - 4 + 21 + 32);
    }
}

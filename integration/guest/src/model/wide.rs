//! The AVX-512 payload: ZMM0 to ZMM31 and k0 to k7.

use super::Control;

/// Left rotation of each vector register's 64-bit lanes in a round.
const ROTATE: [u32; 32] = [
    6, 17, 28, 39, 50, 61, 9, 20, 31, 42, 53, 1, 12, 23, 34, 45, 56, 4, 15, 26, 37, 48, 59, 7, 18,
    29, 40, 51, 62, 10, 21, 32,
];
/// Left rotation of each opmask in a round.
const ROTATE_OPMASK: [u32; 8] = [3, 8, 13, 18, 23, 28, 33, 38];

/// All registers of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wide {
    /// ZMM0 to ZMM31 as eight 64-bit lanes.
    pub zmm: [[u64; 8]; 32],
    /// k0 to k7.
    pub opmask: [u64; 8],
    /// MXCSR, x87 and the accumulator.
    pub control: Control,
}

impl Wide {
    /// Computes `rounds` rounds.
    pub fn run(&mut self, rounds: u64) {
        for _ in 0..rounds {
            self.round();
        }
    }

    fn round(&mut self) {
        self.control.mix();
        self.control.convert(self.zmm[0][0]);
        self.control.acc ^= self.opmask[0];
        let acc = self.control.acc;

        for (k, rotate) in ROTATE_OPMASK.into_iter().enumerate() {
            self.opmask[k] = self.opmask[k]
                .rotate_left(rotate)
                .wrapping_add(acc)
                .wrapping_add(self.opmask[(k + 1) % 8]);
        }

        for lane in &mut self.zmm[0] {
            *lane = lane.wrapping_add(acc);
        }
        for (register, rotate) in ROTATE.into_iter().enumerate() {
            let next = self.zmm[(register + 1) % 32];
            for (lane, other) in self.zmm[register].iter_mut().zip(next) {
                *lane = lane.wrapping_add(other).rotate_left(rotate);
            }
        }
        for k in 1..8 {
            let from = self.zmm[(4 * k + 9) % 32];
            add_selected_bytes(&mut self.zmm[4 * k - 1], from, self.opmask[k]);
        }
        self.zmm[9].rotate_left(3);
    }
}

/// Adds byte *i* of `from` to byte *i* of `to` where bit *i* of `mask` is set.
fn add_selected_bytes(to: &mut [u64; 8], from: [u64; 8], mask: u64) {
    const TOP_BITS: u64 = 0x8080_8080_8080_8080;
    for (lane, selected) in mask.to_le_bytes().into_iter().enumerate() {
        let addend = from[lane] & BYTES_OF_BITS[usize::from(selected)];
        let low = (to[lane] & !TOP_BITS) + (addend & !TOP_BITS);
        to[lane] = low ^ (to[lane] ^ addend) & TOP_BITS;
    }
}

/// Byte *i* of entry *n* is 0xff where bit *i* of *n* is set.
static BYTES_OF_BITS: [u64; 256] = {
    let mut table = [0; 256];
    let mut bits = 0;
    while bits < 256 {
        let mut bit = 0;
        while bit < 8 {
            if bits >> bit & 1 == 1 {
                table[bits] |= 0xff << (8 * bit);
            }
            bit += 1;
        }
        bits += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_added_alone_and_only_where_selected() {
        let from = [0x01ff_0203_8080_ff01; 8];
        let mut to = [0xff01_fe05_8081_ff00; 8];
        let before = to;
        let mask = 0x0f_aa_ff_00_81_01_fe_55;
        add_selected_bytes(&mut to, from, mask);
        for lane in 0..8 {
            let (old, add, new) = (
                before[lane].to_le_bytes(),
                from[lane].to_le_bytes(),
                to[lane].to_le_bytes(),
            );
            for byte in 0..8 {
                let selected = mask >> (8 * lane + byte) & 1 == 1;
                let expected = if selected {
                    old[byte].wrapping_add(add[byte])
                } else {
                    old[byte]
                };
                assert_eq!(new[byte], expected, "lane {lane} byte {byte}");
            }
        }
    }
}

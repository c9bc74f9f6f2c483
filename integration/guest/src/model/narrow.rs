//! The AVX2 and SSE payloads: sixteen registers of four or two 64-bit lanes.

use super::Control;

/// All registers of the payload.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Narrow {
    /// YMM0 to YMM15 as four 64-bit lanes; of XMM0 to XMM15 the first two.
    pub vectors: [[u64; 4]; 16],
    /// Four for AVX2, two for SSE.
    pub lanes: usize,
    /// Where byte *i* of each 128-bit half comes from, by half.
    pub shuffle: [[u8; 16]; 2],
    /// MXCSR, x87 and the accumulator.
    pub control: Control,
}

impl Narrow {
    /// Computes `rounds` rounds.
    pub fn run(&mut self, rounds: u64) {
        for _ in 0..rounds {
            self.round();
        }
    }

    fn round(&mut self) {
        self.control.mix();
        self.control.convert(self.vectors[0][0]);
        let acc = self.control.acc;
        for lane in &mut self.vectors[0][..self.lanes] {
            *lane = lane.wrapping_add(acc);
        }
        for register in 0..16 {
            let next = self.vectors[(register + 1) % 16];
            let vector = &mut self.vectors[register][..self.lanes];
            for (lane, other) in vector.iter_mut().zip(next) {
                *lane = lane.wrapping_add(other);
            }
            for (half, from) in vector.chunks_exact_mut(2).zip(self.shuffle) {
                shuffle(half, from);
            }
        }
    }
}

fn shuffle(half: &mut [u64], from: [u8; 16]) {
    let old = u128::from(half[0]) | u128::from(half[1]) << 64;
    let old = old.to_le_bytes();
    let new = u128::from_le_bytes(from.map(|source| old[usize::from(source & 15)]));
    half[0] = low(new);
    half[1] = low(new >> 64);
}

#[expect(clippy::cast_possible_truncation, reason = "the lower half is meant")]
fn low(value: u128) -> u64 {
    value as u64
}

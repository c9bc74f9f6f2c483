//! MXCSR, the x87 control word, the x87 stack and the accumulator.

/// MXCSR.RC, bits 13 and 14 (SDM Vol. 1 §10.2.3).
const MXCSR_RC: u32 = 0x6000;
/// MXCSR.PE, bit 5: a result was rounded.
const MXCSR_PE: u32 = 1 << 5;
/// The x87 rounding control, bits 10 and 11 (SDM Vol. 1 §8.1.5).
const FCW_RC: u16 = 0xc00;
/// Bits of a converted value behind the point.
const FRACTION_BITS: u32 = 12;

/// What all payloads share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Control {
    /// The accumulator, R8.
    pub acc: u64,
    /// MXCSR.
    pub mxcsr: u32,
    /// The x87 control word.
    pub fcw: u16,
    /// The x87 data registers by physical number.
    pub x87: [u64; 8],
    /// The x87 top of stack.
    pub top: u8,
}

impl Control {
    /// The x87 registers after `pushed` was pushed in this order on an empty stack.
    #[must_use]
    pub fn new(acc: u64, mxcsr: u32, fcw: u16, pushed: [u64; 8]) -> Self {
        let mut x87 = pushed;
        // The first push goes to register 7.
        x87.reverse();
        Self {
            acc,
            mxcsr,
            fcw,
            x87,
            top: 0,
        }
    }

    /// The x87 stack from the top, as eight pops give it.
    #[must_use]
    pub fn popped(&self) -> [u64; 8] {
        let mut stack = self.x87;
        stack.rotate_left(usize::from(self.top & 7));
        stack
    }

    /// Both control words go into the accumulator, both rounding controls step on, and the stack
    /// turns by one.
    pub(super) fn mix(&mut self) {
        self.acc = self.acc.rotate_left(13) ^ u64::from(self.mxcsr);
        self.mxcsr = self.mxcsr & !MXCSR_RC | self.mxcsr.wrapping_add(0x2000) & MXCSR_RC;
        self.acc = self.acc.rotate_left(7).wrapping_add(u64::from(self.fcw));
        self.fcw = self.fcw & !FCW_RC | self.fcw.wrapping_add(0x400) & FCW_RC;
        self.top = self.top.wrapping_add(1) & 7;
    }

    /// `bits` as sign and fraction of a double between 2^40 and 2^41 is rounded to an integer.
    pub(super) fn convert(&mut self, bits: u64) {
        let negative = bits >> 63 != 0;
        let magnitude = 1 << 52 | bits & ((1 << 52) - 1);
        let whole = magnitude >> FRACTION_BITS;
        let fraction = magnitude & ((1 << FRACTION_BITS) - 1);
        let half = 1 << (FRACTION_BITS - 1);
        let away = match (self.mxcsr & MXCSR_RC) >> 13 {
            // to nearest, ties to even
            0 => fraction > half || fraction == half && whole & 1 == 1,
            // down
            1 => negative && fraction != 0,
            // up
            2 => !negative && fraction != 0,
            // towards zero
            _ => false,
        };
        if fraction != 0 {
            self.mxcsr |= MXCSR_PE;
        }
        let rounded = whole.wrapping_add(u64::from(away));
        self.acc = if negative {
            self.acc.wrapping_sub(rounded)
        } else {
            self.acc.wrapping_add(rounded)
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `bits` converted under rounding control `rc`, and whether it was exact.
    fn convert(rc: u32, bits: u64) -> (i64, bool) {
        let mut control = Control::new(0, rc << 13, 0, [0; 8]);
        control.convert(bits);
        (control.acc.cast_signed(), control.mxcsr & MXCSR_PE == 0)
    }

    #[test]
    fn all_four_rounding_modes() {
        const BASE: i64 = 1 << 40;
        const NEGATIVE: u64 = 1 << 63;
        // 2^40 + 3 + 0.5: a tie between 3 and 4
        let tie = 3 << 12 | 1 << 11;
        assert_eq!(convert(0, tie), (BASE + 4, false));
        assert_eq!(convert(0, tie - (1 << 12)), (BASE + 2, false));
        assert_eq!(convert(1, tie), (BASE + 3, false));
        assert_eq!(convert(2, tie), (BASE + 4, false));
        assert_eq!(convert(3, tie), (BASE + 3, false));
        assert_eq!(convert(1, NEGATIVE | tie), (-BASE - 4, false));
        assert_eq!(convert(2, NEGATIVE | tie), (-BASE - 3, false));
        assert_eq!(convert(3, NEGATIVE | tie), (-BASE - 3, false));
        for rc in 0..4 {
            assert_eq!(convert(rc, 5 << 12), (BASE + 5, true));
        }
    }

    #[test]
    fn the_stack_is_popped_last_in_first_out() {
        let mut control = Control::new(0, 0, 0, [10, 11, 12, 13, 14, 15, 16, 17]);
        assert_eq!(control.popped(), [17, 16, 15, 14, 13, 12, 11, 10]);
        control.mix();
        assert_eq!(control.popped(), [16, 15, 14, 13, 12, 11, 10, 17]);
    }
}

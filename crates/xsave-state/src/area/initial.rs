//! The initial value of each component (SDM Vol. 1 §13.6).

use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{INITIAL_FCW, MXCSR};

/// SSE and AVX: MXCSR is saved and loaded with either (SDM Vol. 1 §13.7, §13.8).
pub(crate) const MXCSR_HOLDERS: XFeatures = XFeatures::SSE.union(XFeatures::AVX);

/// Returns true when `bytes` are the initial value of a component. MXCSR, in the midst of x87's, is
/// ignored.
pub(crate) fn is_initial(id: ComponentId, bytes: &[u8]) -> bool {
    let zero = |range| bytes::first_nonzero(bytes, range).is_none();
    match id {
        ComponentId::X87 => {
            bytes::u16_at(bytes, 0) == INITIAL_FCW && zero(2..MXCSR) && zero(32..bytes.len())
        }
        // They start with bits set.
        ComponentId::HDC | ComponentId::HWP => false,
        // With palette 0 nothing else in TILECFG counts.
        ComponentId::XTILECFG => bytes::u8_at(bytes, 0) == 0,
        _ => zero(0..bytes.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn x87_is_initial_with_its_control_word_and_any_mxcsr() {
        let mut x87 = [0; 160];
        assert!(!is_initial(ComponentId::X87, &x87));
        x87[..2].copy_from_slice(&INITIAL_FCW.to_le_bytes());
        assert!(is_initial(ComponentId::X87, &x87));
        for offset in 0..160 {
            let mut changed = x87;
            changed[offset] ^= 0x80;
            let mxcsr = (24..32).contains(&offset);
            assert_eq!(
                is_initial(ComponentId::X87, &changed),
                mxcsr,
                "offset {offset}"
            );
        }
    }

    #[test]
    fn other_components_are_initial_when_zero() {
        assert!(is_initial(ComponentId::AVX, &[0; 256]));
        assert!(!is_initial(ComponentId::PKRU, &[0, 0, 0, 1, 0, 0, 0, 0]));
        assert!(!is_initial(ComponentId::HDC, &[0; 8]));
        let mut tilecfg = [7; 64];
        assert!(!is_initial(ComponentId::XTILECFG, &tilecfg));
        tilecfg[0] = 0;
        assert!(is_initial(ComponentId::XTILECFG, &tilecfg));
    }
}

//! XSAVE, XSAVEOPT, XSAVEC and XSAVES (SDM vol. 1, 13.7 to 13.11; vol. 2, the operation of each).

use crate::component::{AVX, SSE};
use crate::cpuid::Layout;
use crate::pattern::MXCSR_RESET;
use crate::sdm::state::{self, State};

/// Which instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Save {
    /// XSAVE.
    Xsave,
    /// XSAVEOPT.
    Xsaveopt,
    /// XSAVEC.
    Xsavec,
    /// XSAVES.
    Xsaves,
}

/// What the instruction makes of the area. The modified optimization is not modelled: it needs an
/// XRSTOR or XRSTORS of the same area before.
///
/// `rfbm` is already within XCR0 | IA32_XSS.
pub fn save(
    instruction: Save,
    layout: &Layout,
    state: &State<'_>,
    rfbm: u64,
    xfd: u64,
    mxcsr_mask: u32,
    area: &mut [u8],
) {
    // 13.14: the instructions of the XSAVE family treat what IA32_XFD disables as initial.
    let mut visible = *state;
    visible.set(xfd, None);
    let in_use = visible.xinuse() & rfbm;
    let old_xstate_bv = u64::from_le_bytes(area[512..520].try_into().unwrap());
    let (to_be_saved, store_mxcsr, xstate_bv);
    match instruction {
        Save::Xsave | Save::Xsaveopt => {
            to_be_saved = if instruction == Save::Xsave {
                rfbm
            } else {
                in_use
            };
            store_mxcsr = rfbm & (1 << SSE | 1 << AVX) != 0;
            xstate_bv = old_xstate_bv & !rfbm | in_use;
            let offset = |i| layout.place(i).unwrap().offset;
            state::write(&visible, layout, to_be_saved, offset, area);
        }
        Save::Xsavec | Save::Xsaves => {
            let sse = u64::from(state.mxcsr != MXCSR_RESET) << SSE & rfbm;
            to_be_saved = in_use | sse;
            store_mxcsr = to_be_saved & 1 << SSE != 0;
            xstate_bv = to_be_saved;
            let offsets = layout.compacted(rfbm);
            state::write(&visible, layout, to_be_saved, |i| offsets[i as usize], area);
            area[520..528].copy_from_slice(&(rfbm | 1 << 63).to_le_bytes());
        }
    }
    if store_mxcsr {
        area[24..28].copy_from_slice(&state.mxcsr.to_le_bytes());
        area[28..32].copy_from_slice(&mxcsr_mask.to_le_bytes());
    }
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::component::{ALL_ENUMERATED, TILEDATA_BIT};
    use crate::pattern::Pattern;

    #[test]
    fn the_headers_follow_from_rfbm_and_xinuse() {
        let layout = Layout::here();
        let pattern = Pattern::new(&layout, 1);
        let state = State::new(0b100, &pattern);
        let mut area = vec![0xee; 12 << 10];
        save(Save::Xsavec, &layout, &state, 0b110, 0, 0xffff, &mut area);
        assert_eq!(area[512..520], 0b100_u64.to_le_bytes());
        assert_eq!(area[520..528], (1 << 63 | 0b110_u64).to_le_bytes());
        // Neither MXCSR nor the reserved part of the header.
        assert_eq!((area[24], area[528]), (0xee, 0xee));
        save(Save::Xsave, &layout, &state, 0b110, 0, 0xffff, &mut area);
        assert_eq!(area[24..28], MXCSR_RESET.to_le_bytes());
        assert_eq!(area[512..520], 0b100_u64.to_le_bytes());
    }

    #[test]
    fn what_xfd_disables_counts_as_initial() {
        let layout = Layout::here();
        let pattern = Pattern::new(&layout, 1);
        let state = State::new(ALL_ENUMERATED, &pattern);
        let mut area = vec![0xee; 12 << 10];
        let rfbm = ALL_ENUMERATED;
        save(
            Save::Xsavec,
            &layout,
            &state,
            rfbm,
            TILEDATA_BIT,
            0xffff,
            &mut area,
        );
        assert_eq!(area[512..520], (rfbm & !TILEDATA_BIT).to_le_bytes());
    }
}

//! `Image::from_compacted` against the manual's rules, and there and back.

use xsave_state::{CompactedError, Image, Layout};

use crate::input::Input;
use crate::{area, checker, layouts};

/// A layout and a compacted area.
pub fn compacted_parse(data: &[u8]) {
    let mut input = Input::new(data);
    let layout = layouts::pick(&mut input);
    let area = area::compacted(&mut input, layout);
    let rule = rule(&area, layout);
    let image = match (Image::from_compacted(&area, layout), rule) {
        (Ok(image), None) => image,
        (Err(error), Some(_)) => {
            assert!(!error.to_string().is_empty());
            let standard = matches!(error, CompactedError::Standard { .. });
            assert!(!standard || area[527] & 0x80 == 0);
            return;
        }
        (parsed, rule) => panic!("parsed: {parsed:?}; the second checker says {rule:?}"),
    };
    assert_eq!(checker::area(image.as_bytes(), layout), None);
    let again = image.to_compacted();
    let back = Image::from_compacted(&again, layout).unwrap();
    assert_eq!(back, image);
    assert_eq!(back.to_compacted(), again);
}

/// The rule that the area breaks (SDM Vol. 1 §13.8.2, §13.12), or that a guest's area breaks.
fn rule(area: &[u8], layout: &Layout) -> Option<&'static str> {
    if area.len() < 576 {
        return Some("length");
    }
    let (xstate_bv, xcomp_bv) = (checker::word(area, 512), checker::word(area, 520));
    if xcomp_bv >> 63 == 0 {
        return Some("the standard format");
    }
    let placed = xcomp_bv & (u64::MAX >> 1);
    if placed & !(layout.user() | layout.supervisor()).bits() != 0 {
        return Some("XCOMP_BV");
    }
    if xstate_bv & !placed != 0 {
        return Some("XSTATE_BV without a place");
    }
    if xstate_bv & layout.supervisor().bits() != 0 {
        return Some("supervisor state in use");
    }
    if area[528..576].iter().any(|&byte| byte != 0) {
        return Some("reserved bytes of the header");
    }
    let mut end = 576usize;
    let mut config = None;
    for component in layout.components() {
        let number = component.id().number();
        if number < 2 || placed & 1 << number == 0 {
            continue;
        }
        if component.is_aligned() {
            end = end.next_multiple_of(64);
        }
        if number == 17 {
            config = Some(end);
        }
        end += component.size();
    }
    if area.len() < end {
        return Some("length");
    }
    // The compacted format loads MXCSR with SSE alone.
    if xstate_bv & 2 != 0 && checker::word(area, 24) as u32 & !layout.mxcsr_mask() != 0 {
        return Some("MXCSR");
    }
    if xstate_bv & 1 << 17 != 0 {
        let place = config?;
        if !checker::tilecfg(&area[place..place + 64], layout) {
            return Some("TILECFG");
        }
    }
    None
}

//! Valid states from an input.

use arbitrary::Unstructured;
use xsave_state::sanitize::sanitize;
use xsave_state::{ExtendedState, Layout, Losses, Registers, UntrustedArea};

use crate::area;
use crate::input::Input;

/// By the `arbitrary` feature of xsave-state; otherwise registers and an area, made safe.
const ARBITRARY: u8 = 1;

/// A state of `layout`: the number of bytes that say which (1 byte), and those: flags, then what
/// the flags say.
pub fn any(input: &mut Input<'_>, layout: &Layout) -> Option<ExtendedState<'static>> {
    let len = usize::from(input.u8());
    let mut input = Input::new(input.bytes(len));
    if input.u8() & ARBITRARY != 0 {
        let mut bytes = Unstructured::new(input.rest());
        return ExtendedState::arbitrary_of(layout, &mut bytes).ok();
    }
    let registers = input.registers();
    let area = area::standard(&mut input, layout);
    sanitized(&area, layout, registers)
}

/// The state that an area and registers are, or what can be kept of it.
pub fn sanitized(
    area: &[u8],
    layout: &Layout,
    registers: Registers,
) -> Option<ExtendedState<'static>> {
    let untrusted = UntrustedArea::new(area, registers);
    sanitize(&untrusted, layout, Losses::all())
        .ok()
        .map(|sanitized| sanitized.state)
}

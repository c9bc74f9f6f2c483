//! `ExtendedState::relocate`: the second checker takes what comes out, and there and back is the identity.

use xsave_state::{ComponentId, Image, Losses, RelocateError};

use crate::input::Input;
use crate::{area, checker, layouts, states};

/// Two layouts, what may be lost (1 byte), registers (8 bytes each) and an area.
pub fn relocate(data: &[u8]) {
    let mut input = Input::new(data);
    let source = layouts::pick(&mut input);
    let target = layouts::pick(&mut input);
    let allowed = Losses::from_bits_truncate(u32::from(input.u8()));
    let registers = input.registers();
    let area = area::standard(&mut input, source);
    let Some(state) = states::sanitized(&area, source, registers) else {
        return;
    };

    let all = state.relocate(target, Losses::all()).unwrap();
    let not_allowed = all
        .lost
        .iter()
        .filter(|misfit| !allowed.contains(misfit.loss()));
    let relocated = match state.relocate(target, allowed) {
        Ok(relocated) => relocated,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            let RelocateError::Lossy { losses } = &error else {
                panic!("{error}");
            };
            assert!(!losses.is_empty() && losses.iter().eq(not_allowed));
            assert!(source != target, "{error}");
            return;
        }
    };
    assert_eq!(not_allowed.count(), 0);
    assert_eq!(relocated, all);
    assert_eq!(relocated.state.misfits(target).count(), 0);
    let image = relocated.state.image();
    assert_eq!(checker::area(image.as_bytes(), target), None);
    let now = relocated.state.registers();
    let rule = checker::registers(
        [now.xcr0, now.xfd, now.xfd_err].map(|bits| bits.bits()),
        image.xstate_bv().bits(),
        target.user().bits(),
        target.xfd().bits(),
    );
    assert_eq!(rule, None);

    // Byte by byte, without the crate's notion of equality.
    for ours in source.components() {
        let id = ours.id();
        if id.number() == 0 || !image.xstate_bv().contains(id.bit()) {
            continue;
        }
        if let Some(content) = state.image().component(id) {
            let len = content.len().min(image.component(id).unwrap().len());
            assert_eq!(content[..len], image.component(id).unwrap()[..len]);
            assert!(content[len..].iter().all(|&byte| byte == 0));
        }
    }
    if !relocated.lost.is_empty() {
        for loss in &relocated.lost {
            assert!(!loss.to_string().is_empty());
        }
        return;
    }
    assert_eq!(now, state.registers());
    assert_eq!(image.mxcsr(), state.image().mxcsr());
    let back = relocated.state.relocate(source, Losses::empty()).unwrap();
    assert_eq!(back.lost, []);
    assert_eq!(back.state.registers(), state.registers());
    assert_eq!(meaning(image), meaning(state.image()));
    assert_eq!(meaning(back.state.image()), meaning(state.image()));
    if target.user().contains(state.image().xstate_bv()) && source == target {
        assert_eq!(back.state, state);
    }
    let compacted = image.to_compacted();
    let parsed = Image::from_compacted(&compacted, target).unwrap();
    assert_eq!(meaning(&parsed), meaning(image));
}

/// What a state means, whichever component is in use to hold MXCSR: MXCSR, and the components that
/// are not initial with their bytes, up to the last that is not zero.
fn meaning(image: &Image<'_>) -> (u32, Vec<(ComponentId, Vec<u8>)>) {
    let mut components = Vec::new();
    for id in image.xstate_bv().components() {
        let mut bytes = image.component(id).unwrap().to_vec();
        match id {
            ComponentId::X87 => bytes[24..32].fill(0),
            // With palette 0 nothing else in TILECFG counts.
            ComponentId::XTILECFG if bytes[0] == 0 => bytes.fill(0),
            _ => {}
        }
        let len = bytes
            .iter()
            .rposition(|&byte| byte != 0)
            .map_or(0, |last| last + 1);
        bytes.truncate(len);
        let initial = match id {
            ComponentId::X87 => bytes == [0x7f, 3],
            _ => bytes.is_empty(),
        };
        if !initial {
            components.push((id, bytes));
        }
    }
    (image.mxcsr(), components)
}

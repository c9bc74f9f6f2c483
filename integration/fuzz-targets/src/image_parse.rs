//! `Image::parse` against the second checker, and everything an image gives.

use xsave_state::{ComponentId, ExtendedState, Image};

use crate::input::Input;
use crate::{area, checker, layouts};

/// A layout, an area, and registers for it.
pub fn image_parse(data: &[u8]) {
    let mut input = Input::new(data);
    let layout = layouts::pick(&mut input);
    let registers = input.registers();
    let area = area::standard(&mut input, layout);
    let image = match (Image::parse(&area, layout), checker::area(&area, layout)) {
        (Ok(image), None) => image,
        (Err(error), Some(_)) => {
            assert!(!error.to_string().is_empty());
            return;
        }
        (parsed, rule) => panic!("parsed: {parsed:?}; the second checker says {rule:?}"),
    };
    assert_eq!(image.as_bytes(), &area[..layout.standard_size()]);
    assert_eq!(image.xstate_bv().bits(), checker::word(&area, 512));
    for number in 0..63 {
        let id = ComponentId::new(number).unwrap();
        let in_use = image.xstate_bv().contains(id.bit());
        assert_eq!(image.component(id).is_some(), in_use);
    }
    let config = image.tile_config();
    if let Some(tiles) = image.tile_data() {
        let palette = tiles.palette();
        assert_eq!(palette.is_none(), layout.palettes().is_empty());
        let (number, size) = palette.map_or((0, 0), |p| (p.tiles(), p.tile_bytes()));
        for tile in 0..=number {
            let len = tiles.tile(usize::from(tile)).map(<[u8]>::len);
            assert_eq!(len, (tile < number).then_some(usize::from(size)));
            let _ = tiles.row(usize::from(tile), usize::from(tile));
        }
    }
    for shape in config.iter().flat_map(|config| config.shapes()) {
        assert!(!shape.to_string().is_empty());
    }
    let legacy = image.legacy();
    let _ = (
        legacy.st(7),
        legacy.xmm(15),
        legacy.software(),
        image.mxcsr(),
    );

    let verdict = checker::registers(
        [registers.xcr0, registers.xfd, registers.xfd_err].map(|bits| bits.bits()),
        image.xstate_bv().bits(),
        layout.user().bits(),
        layout.xfd().bits(),
    );
    let state = ExtendedState::new(image.clone(), registers);
    assert_eq!(state.is_ok(), verdict.is_none(), "{state:?}; {verdict:?}");

    let dropped = registers.xcr0;
    let without = image.clone().without(dropped);
    assert_eq!(checker::area(without.as_bytes(), layout), None);
    assert_eq!(without.xstate_bv(), image.xstate_bv() - dropped);
    for id in without
        .xstate_bv()
        .components()
        .filter(|id| id.number() != 0)
    {
        assert_eq!(without.component(id), image.component(id));
    }
    assert_eq!(without.clone().without(dropped), without);
    assert_eq!(image.clone().into_owned(), image);
    assert_eq!(Image::from_vec(area.clone(), layout).as_ref(), Ok(&image));

    let compacted = image.to_compacted();
    let back = Image::from_compacted(&compacted, layout).unwrap();
    assert_eq!(back.mxcsr(), image.mxcsr());
    assert!(back.xstate_bv().contains(image.xstate_bv()));
    for id in image.xstate_bv().components().filter(|id| id.number() != 0) {
        assert_eq!(back.component(id), image.component(id));
    }
}

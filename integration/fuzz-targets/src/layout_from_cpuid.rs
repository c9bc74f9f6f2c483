//! `Layout::from_cpuid` on CPUID that lies: whatever it accepts must be an area that can exist.

use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::{ComponentId, ExtendedState, Image, Layout, XFeatures};

use crate::input::Input;
use crate::layouts;

/// The leaves that a layout is made of.
const LEAVES: [u32; 6] = [0xd, 0x1d, 0, 0x8000_0000, 0x8000_0001, 1];

/// The number of a dump, then changes: leaf, sub-leaf and register (1 byte each), value (4 bytes).
pub fn layout_from_cpuid(data: &[u8]) {
    let mut input = Input::new(data);
    let table = input.pick(layouts::tables());
    let mut changes = Vec::new();
    while !input.is_empty() {
        let leaf = *input.pick(&LEAVES);
        changes.push((leaf, u32::from(input.u8()), input.u8() % 4, input.u32()));
    }
    let cpuid = |leaf, subleaf| {
        let mut value = layouts::leaves(table)(leaf, subleaf);
        for &(_, _, register, new) in changes
            .iter()
            .filter(|change| (change.0, change.1) == (leaf, subleaf))
        {
            value[usize::from(register)] = new;
        }
        value
    };
    let layout = match Layout::from_cpuid(cpuid) {
        Ok(layout) => layout,
        Err(error) => {
            assert!(!error.to_string().is_empty());
            return;
        }
    };

    let [low, _, reported_bytes, high] = cpuid(0xd, 0);
    let has_xsave = cpuid(0, 0)[0] >= 0xd && cpuid(1, 0)[2] & 1 << 26 != 0;
    if !has_xsave || (low, high) == (0, 0) {
        let legacy = Layout::legacy().with_mxcsr_mask(layout.mxcsr_mask());
        assert_eq!(layout, legacy);
        assert_eq!(layout.supervisor(), XFeatures::empty());
        return;
    }

    let mut places: Vec<(usize, usize)> = Vec::new();
    for component in layout.components() {
        let id = component.id();
        assert!((layout.user() | layout.supervisor()).contains(id.bit()));
        assert!(component.size() > 0);
        assert_eq!(layout.component(id), Some(component));
        let [eax, ebx, ecx, _] = cpuid(0xd, u32::from(id.number()));
        if let Some(offset) = component.offset() {
            places.push((offset, offset + component.size()));
            if id.number() > 1 {
                assert!(offset >= 576);
                assert_eq!((eax as usize, ebx as usize), (component.size(), offset));
                assert_eq!(ecx & 1, 0);
            }
        } else {
            assert_eq!(ecx & 1, 1);
        }
    }
    assert_eq!(
        layout.components().count(),
        (layout.user() | layout.supervisor()).components().count()
    );
    assert!((layout.user() & layout.supervisor()).is_empty());
    assert!(layout.user().contains(layout.xfd()));
    let tiles = layout.user() & XFeatures::XTILEDATA;
    assert!(layout.xfd().contains(tiles));
    places.sort_unstable();
    assert!(
        places.windows(2).all(|pair| pair[0].1 <= pair[1].0),
        "{places:?}"
    );
    let end = places.iter().map(|place| place.1).max().unwrap().max(576);
    assert_eq!(layout.standard_size(), end);
    assert_eq!(layout.standard_size_of(layout.user()), end);
    assert!(end <= MAX_AREA_BYTES && end <= reported_bytes as usize);

    let mut next = 576;
    for (component, range) in layout.compacted(XFeatures::all()) {
        assert!(range.start >= next && range.start < next + 64);
        assert!(!component.is_aligned() || range.start % 64 == 0);
        assert_eq!(range.len(), component.size());
        next = range.end;
    }
    assert_eq!(layout.compacted_size(XFeatures::all()), next);
    assert!(next <= MAX_AREA_BYTES);

    let data_bytes = layout
        .component(ComponentId::XTILEDATA)
        .map_or(usize::MAX, |component| component.size());
    for palette in layout.palettes() {
        let bytes = usize::from(palette.row_bytes())
            * usize::from(palette.rows())
            * usize::from(palette.tiles());
        assert!(bytes > 0 && bytes <= data_bytes);
    }
    let extended = layout.components().filter(|c| c.id().number() > 1);
    let parts = Layout::from_parts(extended.copied(), layout.palettes().iter().copied());
    assert_eq!(parts.unwrap().with_mxcsr_mask(layout.mxcsr_mask()), layout);
    let reset = ExtendedState::reset(&layout);
    assert_eq!(reset.misfits(&layout).count(), 0);
    let initial = Image::initial(&layout);
    assert_eq!(Image::parse(initial.as_bytes(), &layout).unwrap(), initial);
    assert!(!format!("{layout:?}").is_empty());
}

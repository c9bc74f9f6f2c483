//! Where the components lie when nobody says so.
//!
//! Offsets come from CPUID. A raw dump has none; but all server processors so far have one of two
//! layouts, and Linux writes to bytes 464 to 471 which components it saved (KVM: those of its host;
//! a core dump: those of the process). A guess is said to be one, wherever it is used, and nothing is
//! guessed of an area whose length no such layout has: it may have been cut.

use cpuid_amx::Table;
use thiserror::Error;
use xsave_state::format::EXTENDED_OFFSET;
use xsave_state::{ComponentId, Layout, XFeatures};

use crate::bytes;

/// A layout that nobody has stated.
#[derive(Clone, Debug)]
pub struct Guess {
    /// The layout that fits the area.
    pub layout: Layout,
    /// Another one that fits as well, and has components elsewhere.
    pub other: Option<Layout>,
    /// Why this one.
    pub why: String,
}

/// There is no layout to guess.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum NoGuess {
    /// A component that no known layout has, or two at the same place.
    #[error(
        "bytes 512 to 519 are {:#018x}, which would be XSTATE_BV of components that no layout known \
         here has: is this an XSAVE area?",
        components.bits()
    )]
    Components {
        /// What the area seems to have.
        components: XFeatures,
    },
    /// No known layout ends there: the area may have been cut.
    #[error(
        "the area has {actual_bytes} bytes; no layout known here with its components has that \
         length, nor is it the {KVM_BYTES} bytes of KVM_GET_XSAVE"
    )]
    Length {
        /// What is there.
        actual_bytes: usize,
    },
    /// There is not even a header.
    #[error("the area has {actual_bytes} bytes; legacy region and header need {EXTENDED_OFFSET}")]
    TooShort {
        /// What is there.
        actual_bytes: usize,
    },
}

/// Of KVM_GET_XSAVE, and the least of KVM_GET_XSAVE2.
const KVM_BYTES: usize = 4096;
/// Bit 63 of XCOMP_BV: the area has the compacted format.
pub(crate) const COMPACTED: u64 = 1 << 63;

/// A component's number, size in bytes, offset in bytes and CPUID.(EAX=0DH,ECX=n):ECX.
type Place = (u8, u32, u32, u32);

/// Where Intel's server processors have them, since Skylake.
const INTEL: &[Place] = &[
    (2, 256, 576, 0),
    (3, 64, 960, 0),
    (4, 64, 1024, 0),
    (5, 64, 1088, 0),
    (6, 512, 1152, 0),
    (7, 1024, 1664, 0),
    (9, 8, 2688, 0),
    (17, 64, 2752, 2),
    (18, 8192, 2816, 6),
];
/// With APX, which has the place of MPX.
const INTEL_APX: Place = (19, 128, 960, 0);
/// Where AMD's have them, since Zen 4.
const AMD: &[Place] = &[
    (2, 256, 576, 0),
    (5, 64, 832, 0),
    (6, 512, 896, 0),
    (7, 1024, 1408, 0),
    (9, 8, 2432, 0),
];

/// The layout that an area most likely has.
///
/// # Errors
///
/// It has components of which no place is known: see [`NoGuess`].
pub fn layout(area: &[u8]) -> Result<Guess, NoGuess> {
    if area.len() < EXTENDED_OFFSET {
        return Err(NoGuess::TooShort {
            actual_bytes: area.len(),
        });
    }
    let stated = XFeatures::from_bits_retain(bytes::u64_at(area, 464));
    let in_use = XFeatures::from_bits_retain(bytes::u64_at(area, 512));
    let xcomp_bv = bytes::u64_at(area, 520);
    let is_compacted = xcomp_bv & COMPACTED != 0;
    let placed = XFeatures::from_bits_retain(xcomp_bv & !COMPACTED);
    // Zero, or no bitmap of components: whoever wrote it did not mean Linux's.
    let is_stated = stated.contains(XFeatures::LEGACY) && stated.bits() >> 20 == 0;
    // KVM states the components of its host, of which a guest with an area of the least length may
    // have fewer. What is in use is less than what there is: no length can be read off it.
    let candidates = [
        (is_compacted, placed, "of XCOMP_BV"),
        (is_stated && !is_compacted, stated, "of bytes 464 to 471"),
        (
            !is_compacted && (!is_stated || area.len() == KVM_BYTES),
            in_use,
            "of XSTATE_BV",
        ),
    ];
    // Where components lie is read off the length, so only a length that a layout has will do.
    let fits = |layout: &Layout| {
        let size = layout.standard_size();
        if is_compacted {
            layout.compacted_size(placed) <= area.len()
        } else {
            size == area.len() || area.len() == KVM_BYTES && size <= KVM_BYTES
        }
    };
    let mut is_known = false;
    for (_, components, from) in candidates.into_iter().filter(|(counts, ..)| *counts) {
        let user = components | XFeatures::LEGACY;
        let all = [
            ("Intel's server processors", intel(user)),
            ("AMD's processors", places(AMD, user).ok()),
        ];
        let known = all.iter().filter_map(|(places, table)| {
            let layout = of(table.as_ref()?).ok()?;
            Some((*places, layout))
        });
        let known: Vec<_> = known.collect();
        is_known |= !known.is_empty();
        let mut fitting = known.into_iter().filter(|(_, layout)| fits(layout));
        let Some((places, layout)) = fitting.next() else {
            continue;
        };
        let mut why = format!("the components {from}, placed as on {places}");
        let other = fitting.next().filter(|(_, other)| *other != layout);
        if let Some((places, _)) = &other {
            why.push_str(&format!("; {places} would fit as well"));
        }
        return Ok(Guess {
            layout,
            other: other.map(|(_, other)| other),
            why,
        });
    }
    if is_known {
        return Err(NoGuess::Length {
            actual_bytes: area.len(),
        });
    }
    Err(NoGuess::Components { components: in_use })
}

pub(crate) fn of(table: &Table) -> Result<Layout, xsave_state::LayoutError> {
    use cpuid_amx::CpuidTable;
    Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
}

fn intel(user: XFeatures) -> Option<Table> {
    if user.contains(XFeatures::APX) {
        let mut list: Vec<Place> = INTEL
            .iter()
            .copied()
            .filter(|&(id, ..)| id != 3 && id != 4)
            .collect();
        list.push(INTEL_APX);
        return places(&list, user).ok();
    }
    places(INTEL, user).ok()
}

/// CPUID.(EAX=0DH,ECX=n):ECX where it is known.
pub(crate) fn flags(id: ComponentId) -> u32 {
    let known = INTEL.iter().find(|place| place.0 == id.number());
    known.map_or(0, |&(.., flags)| flags)
}

/// CPUID of a processor with `user` components at these places, as far as their layout goes.
pub(crate) fn places(list: &[Place], user: XFeatures) -> Result<Table, NoGuess> {
    let mut entries = Vec::new();
    let mut leaf = |leaf, subleaf, value| {
        entries.push(cpuid_amx::Entry {
            leaf,
            subleaf,
            value,
        });
    };
    let mut end = 576u32;
    let mut xfd = 0;
    for id in (user - XFeatures::LEGACY).components() {
        let Some(&(_, size, offset, ecx)) = list.iter().find(|place| place.0 == id.number()) else {
            return Err(NoGuess::Components { components: user });
        };
        end = end.max(offset.saturating_add(size));
        xfd |= ecx & 4;
        leaf(0xd, Some(u32::from(id.number())), [size, offset, ecx, 0]);
    }
    let [low, high] = halves(user.bits());
    leaf(0, None, [0x1e, 0, 0, 0]);
    leaf(1, None, [0, 0, 1 << 26, 0]); // XSAVE
    leaf(0xd, Some(0), [low, end, end, high]);
    // XFD where something has it; the rest of 0DH.1 does not matter here.
    leaf(0xd, Some(1), [if xfd == 0 { 0xf } else { 0x1f }, 0, 0, 0]);
    if user.contains(ComponentId::XTILECFG.bit()) {
        leaf(0x1d, Some(0), [1, 0, 0, 0]);
        leaf(0x1d, Some(1), [0x0400_2000, 0x0008_0040, 0x10, 0]);
    }
    Ok(entries.into_iter().collect())
}

fn halves(bits: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = bits.to_le_bytes();
    [
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn area(len: usize, stated: u64, in_use: u64) -> Vec<u8> {
        let mut area = vec![0; len];
        area[464..472].copy_from_slice(&stated.to_le_bytes());
        area[512..520].copy_from_slice(&in_use.to_le_bytes());
        area
    }

    fn offset(guess: &Guess, id: ComponentId) -> usize {
        guess.layout.component(id).unwrap().offset().unwrap()
    }

    #[test]
    fn linux_says_which_components_there_are() {
        let guess = layout(&area(11_008, 0x602e7, 2)).unwrap();
        assert_eq!(guess.layout.user().bits(), 0x602e7);
        assert_eq!(guess.layout.standard_size(), 11_008);
        assert_eq!(guess.layout.palettes().len(), 1);
        assert_eq!(guess.layout.xfd(), XFeatures::XTILEDATA);
        assert!(guess.why.contains("464"), "{}", guess.why);
    }

    #[test]
    fn the_length_tells_amd_from_intel() {
        let guess = layout(&area(2440, 0x2e7, 2)).unwrap();
        assert_eq!(offset(&guess, ComponentId::PKRU), 2432);
        let guess = layout(&area(2696, 0x2e7, 2)).unwrap();
        assert_eq!(offset(&guess, ComponentId::PKRU), 2688);
    }

    #[test]
    fn where_the_length_does_not_tell_there_is_another_one() {
        let guess = layout(&area(4096, 0x2e7, 2)).unwrap();
        assert_eq!(offset(&guess, ComponentId::PKRU), 2688);
        let other = guess.other.unwrap();
        assert_eq!(
            other.component(ComponentId::PKRU).unwrap().offset(),
            Some(2432)
        );
        assert!(guess.why.contains("AMD"), "{}", guess.why);
        // It does where one fits exactly, where only one has the components, and where both have
        // them at the same places.
        for (len, components) in [(2440, 0x2e7), (2696, 0x2e7), (11_008, 0x602e7), (4096, 7)] {
            let guess = layout(&area(len, components, 2)).unwrap();
            assert_eq!(guess.other, None, "{len} {components:#x}");
        }
    }

    #[test]
    fn without_a_bitmap_what_is_in_use_counts() {
        let guess = layout(&area(4096, 0, 0x204)).unwrap();
        assert_eq!(guess.layout.user().bits(), 0x207);
        let guess = layout(&area(4096, u64::MAX, 4)).unwrap();
        assert_eq!(guess.layout.user().bits(), 7);
    }

    #[test]
    fn a_guest_may_have_fewer_components_than_linux_states() {
        let guess = layout(&area(4096, 0x602e7, 7)).unwrap();
        assert_eq!(guess.layout.user().bits(), 7);
    }

    #[test]
    fn a_length_that_no_layout_has_is_not_guessed() {
        for (len, components) in [
            (2688, 0x2e7),
            (2695, 0x2e7),
            (2697, 0x2e7),
            (4095, 0x2e7),
            (4097, 0x2e7),
            (11_007, 0x602e7),
            (11_009, 0x602e7),
            (12_288, 0x602e7),
        ] {
            for stated in [components, 0] {
                let guess = layout(&area(len, stated, components));
                assert!(
                    matches!(guess, Err(NoGuess::Length { actual_bytes }) if actual_bytes == len),
                    "{len}: {guess:?}"
                );
            }
        }
    }

    #[test]
    fn what_nobody_knows_is_not_guessed() {
        assert!(matches!(
            layout(&area(4096, 0, 1 << 40)),
            Err(NoGuess::Components { .. })
        ));
        // MPX and APX have the same place.
        assert!(matches!(
            layout(&area(4096, 0, 0x80008)),
            Err(NoGuess::Components { .. })
        ));
        assert!(matches!(
            layout(&[0; 575]),
            Err(NoGuess::TooShort { actual_bytes: 575 })
        ));
    }
}

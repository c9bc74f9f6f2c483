//! Where the components lie when nobody says so.
//!
//! Offsets come from CPUID. A raw dump has none; but all server processors so far have one of two
//! layouts, and Linux writes to bytes 464 to 471 which components it saved (KVM: those of its host;
//! a core dump: those of the process). A guess is said to be one, wherever it is used.

use cpuid_amx::Table;
use thiserror::Error;
use xsave_state::format::EXTENDED_OFFSET;
use xsave_state::{ComponentId, Layout, XFeatures};

use crate::bytes;

/// A layout that nobody has stated.
#[derive(Clone, Debug)]
pub struct Guess {
    /// The layout.
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
    /// There is not even a header.
    #[error("the area has {actual_bytes} bytes; legacy region and header need {EXTENDED_OFFSET}")]
    TooShort {
        /// What is there.
        actual_bytes: usize,
    },
}

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
    // Zero, or no bitmap of components: whoever wrote it did not mean Linux's.
    let plausible = stated.contains(XFeatures::LEGACY) && stated.bits() >> 20 == 0;
    let user = if plausible {
        stated
    } else {
        in_use | XFeatures::LEGACY
    };
    let from = if plausible {
        "of bytes 464 to 471"
    } else {
        "of XSTATE_BV"
    };
    let intel = ("Intel's server processors", intel(user));
    let amd = ("AMD's processors", places(AMD, user).ok());
    let fits = |table: &Table, exactly: bool| {
        let layout = of(table).ok()?;
        let size = layout.standard_size();
        let suits = if exactly {
            size == area.len()
        } else {
            size <= area.len()
        };
        suits.then_some(layout)
    };
    let by = |places: &str| format!("the components {from}, placed as on {places}");
    // A core dump is exactly as long as it must be; KVM's areas are rounded up.
    for exactly in [true, false] {
        let mut fitting = [&intel, &amd].into_iter().filter_map(|(places, table)| {
            let layout = fits(table.as_ref()?, exactly)?;
            Some((*places, layout))
        });
        let Some((places, layout)) = fitting.next() else {
            continue;
        };
        let mut why = by(places);
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
    // It is too short for either: that is for the rules to say.
    let (places, table) = intel;
    let layout = table.as_ref().and_then(|table| of(table).ok());
    layout
        .map(|layout| Guess {
            layout,
            other: None,
            why: by(places),
        })
        .ok_or(NoGuess::Components { components: in_use })
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

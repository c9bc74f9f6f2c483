//! Layouts from CPUID as real processors and guests report it, and from parts; and each fault that is
//! named.
//!
//! The dumps are in `fixtures/cpuid`; the first lines of each say where its numbers come from.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use common::{Dump, bits};
use xsave_state::{Component, ComponentId, Layout, LayoutError, Palette, PaletteError, XFeatures};

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

struct Expected {
    name: &'static str,
    user: u64,
    supervisor: u64,
    xfd: u64,
    /// Number, offset and size of the user components behind the header.
    places: &'static [(u8, usize, usize)],
    /// Number and size of the supervisor components.
    supervisors: &'static [(u8, usize)],
    standard_size: usize,
    /// With XCOMP_BV = all user components; and with the supervisor components too.
    compacted_sizes: [usize; 2],
    mxcsr_mask: u32,
    palettes: usize,
}

const AVX512_INTEL: [(u8, usize, usize); 4] = [
    (2, 576, 256),
    (5, 1088, 64),
    (6, 1152, 512),
    (7, 1664, 1024),
];
const SERVER_INTEL: [(u8, usize, usize); 5] = [
    AVX512_INTEL[0],
    AVX512_INTEL[1],
    AVX512_INTEL[2],
    AVX512_INTEL[3],
    (9, 2688, 8),
];
const AMX_INTEL: [(u8, usize, usize); 7] = [
    AVX512_INTEL[0],
    AVX512_INTEL[1],
    AVX512_INTEL[2],
    AVX512_INTEL[3],
    (9, 2688, 8),
    (17, 2752, 64),
    (18, 2816, 8192),
];

const EXPECTED: &[Expected] = &[
    Expected {
        name: "sapphire-rapids",
        user: 0x602e7,
        supervisor: 0xdd00,
        xfd: 0x40000,
        places: &AMX_INTEL,
        supervisors: &[(8, 128), (10, 8), (11, 16), (12, 24), (14, 48), (15, 808)],
        standard_size: 11008,
        compacted_sizes: [10752, 11776],
        mxcsr_mask: 0xffff,
        palettes: 1,
    },
    Expected {
        name: "sapphire-rapids-guest",
        user: 0x602e7,
        supervisor: 0x1800,
        xfd: 0x40000,
        places: &AMX_INTEL,
        supervisors: &[(11, 16), (12, 24)],
        standard_size: 11008,
        compacted_sizes: [10752, 10752],
        mxcsr_mask: 0xffff,
        palettes: 1,
    },
    Expected {
        name: "sapphire-rapids-emulated-guest",
        user: 0x602e7,
        supervisor: 0,
        xfd: 0x40000,
        places: &AMX_INTEL,
        supervisors: &[],
        standard_size: 11008,
        compacted_sizes: [10752, 10752],
        mxcsr_mask: 0xffff,
        palettes: 1,
    },
    Expected {
        name: "sapphire-rapids-guest-without-amx",
        user: 0x2e7,
        supervisor: 0,
        xfd: 0,
        places: &SERVER_INTEL,
        supervisors: &[],
        standard_size: 2696,
        compacted_sizes: [2440, 2440],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
    Expected {
        name: "emerald-rapids-vm-without-tile-leaves",
        user: 0x600e7,
        supervisor: 0,
        xfd: 0x40000,
        places: &[
            AVX512_INTEL[0],
            AVX512_INTEL[1],
            AVX512_INTEL[2],
            AVX512_INTEL[3],
            (17, 2752, 64),
            (18, 2816, 8192),
        ],
        supervisors: &[],
        standard_size: 11008,
        compacted_sizes: [10688, 10688],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
    // CPUID.1:ECX.XSAVE is clear, although leaf 0DH has AVX-512.
    Expected {
        name: "emerald-rapids-kvm-supported",
        user: 3,
        supervisor: 0,
        xfd: 0,
        places: &[],
        supervisors: &[],
        standard_size: 576,
        compacted_sizes: [576, 576],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
    Expected {
        name: "granite-rapids",
        user: 0x602e7,
        supervisor: 0x1dd00,
        xfd: 0x40000,
        places: &AMX_INTEL,
        supervisors: &[
            (8, 128),
            (10, 8),
            (11, 16),
            (12, 24),
            (14, 48),
            (15, 808),
            (16, 8),
        ],
        standard_size: 11008,
        compacted_sizes: [10752, 11776],
        mxcsr_mask: 0xffff,
        palettes: 1,
    },
    Expected {
        name: "ice-lake-server",
        user: 0x2e7,
        supervisor: 0x100,
        xfd: 0,
        places: &SERVER_INTEL,
        supervisors: &[(8, 128)],
        standard_size: 2696,
        compacted_sizes: [2440, 2568],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
    Expected {
        name: "amd-zen4-genoa",
        user: 0x2e7,
        supervisor: 0x1800,
        xfd: 0,
        places: &[
            (2, 576, 256),
            (5, 832, 64),
            (6, 896, 512),
            (7, 1408, 1024),
            (9, 2432, 8),
        ],
        supervisors: &[(11, 16), (12, 24)],
        standard_size: 2440,
        compacted_sizes: [2440, 2480],
        mxcsr_mask: 0x2ffff,
        palettes: 0,
    },
    Expected {
        name: "skylake-client",
        user: 0x1f,
        supervisor: 0x100,
        xfd: 0,
        places: &[(2, 576, 256), (3, 960, 64), (4, 1024, 64)],
        supervisors: &[(8, 128)],
        standard_size: 1088,
        compacted_sizes: [960, 1088],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
    Expected {
        name: "alder-lake-client",
        user: 0x207,
        supervisor: 0x19900,
        xfd: 0,
        places: &[(2, 576, 256), (9, 2688, 8)],
        supervisors: &[(8, 128), (11, 16), (12, 24), (15, 808), (16, 8)],
        standard_size: 2696,
        compacted_sizes: [840, 1824],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
    Expected {
        name: "haswell-client",
        user: 0x7,
        supervisor: 0,
        xfd: 0,
        places: &[(2, 576, 256)],
        supervisors: &[],
        standard_size: 832,
        compacted_sizes: [832, 832],
        mxcsr_mask: 0xffff,
        palettes: 0,
    },
];

#[test]
fn each_fixture_has_the_layout_of_its_processor() {
    for expected in EXPECTED {
        let name = expected.name;
        let layout = Dump::read(name).layout().unwrap();
        assert_eq!(layout.user().bits(), expected.user, "{name}");
        assert_eq!(layout.supervisor().bits(), expected.supervisor, "{name}");
        assert_eq!(layout.xfd().bits(), expected.xfd, "{name}");
        assert_eq!(layout.mxcsr_mask(), expected.mxcsr_mask, "{name}");
        assert_eq!(layout.palettes().len(), expected.palettes, "{name}");

        let mut places = vec![];
        let mut supervisors = vec![];
        for component in layout.components() {
            let number = component.id().number();
            match component.offset() {
                Some(offset) => places.push((number, offset, component.size())),
                None => supervisors.push((number, component.size())),
            }
            assert_eq!(
                component.is_aligned(),
                number == 17 || number == 18,
                "{name}"
            );
            assert_eq!(component.has_xfd(), number == 18, "{name}");
        }
        let legacy = [(0, 0, 160), (1, 160, 256)];
        assert_eq!(places, [&legacy, expected.places].concat(), "{name}");
        assert_eq!(supervisors, expected.supervisors, "{name}");

        assert_eq!(layout.standard_size(), expected.standard_size, "{name}");
        assert_eq!(
            layout.standard_size_of(layout.user()),
            expected.standard_size,
            "{name}"
        );
        let all = layout.user() | layout.supervisor();
        assert_eq!(
            [
                layout.compacted_size(layout.user()),
                layout.compacted_size(all)
            ],
            expected.compacted_sizes,
            "{name}"
        );
    }
}

/// Independent of the numbers above: what the processor itself says of its sizes.
#[test]
fn sizes_are_those_that_the_processor_reports() {
    // The components that were enabled in IA32_XSS when the dump was taken.
    let enabled_supervisor = |name: &str| match name {
        "sapphire-rapids" | "granite-rapids" | "ice-lake-server" | "skylake-client" => {
            XFeatures::PT
        }
        "alder-lake-client" => XFeatures::PT | XFeatures::CET_U,
        "amd-zen4-genoa" => XFeatures::CET_U,
        _ => XFeatures::empty(),
    };
    // XCR0 then, where it was not all that there is.
    let enabled_user = |name: &str, user: XFeatures| match name {
        "sapphire-rapids-guest" | "sapphire-rapids-guest-without-amx" => XFeatures::X87,
        "ice-lake-server" | "amd-zen4-genoa" | "alder-lake-client" => user - XFeatures::PKRU,
        _ => user,
    };
    let with_xsave = EXPECTED.iter().filter(|expected| expected.user != 3);
    for Expected { name, .. } in with_xsave {
        let dump = Dump::read(name);
        let layout = dump.layout().unwrap();
        let [_, enabled_size, size, _] = dump.get(0xd, 0);
        assert_eq!(layout.standard_size(), size as usize, "{name}");
        let user = enabled_user(name, layout.user());
        assert_eq!(
            layout.standard_size_of(user),
            enabled_size as usize,
            "{name}"
        );
        let [features, compacted_size, ..] = dump.get(0xd, 1);
        if features & 1 << 1 != 0 {
            assert_eq!(
                layout.compacted_size(user | enabled_supervisor(name)),
                compacted_size as usize,
                "{name}"
            );
        }
    }
}

#[test]
fn the_palette_of_amx_is_read() {
    let layout = Dump::read("granite-rapids").layout().unwrap();
    let [palette] = layout.palettes() else {
        panic!("{:?}", layout.palettes());
    };
    assert_eq!(*palette, Palette::ONE);
    assert_eq!(
        layout.component(ComponentId::XTILEDATA).unwrap().size(),
        usize::from(palette.total_bytes())
    );
}

/// XTILEDATA needs no bit: KVM lets a guest disable it whatever the guest's CPUID says.
#[test]
fn other_components_need_both_bits_for_xfd() {
    for (features, flags, xfd) in [
        (0x10, 4, XFeatures::XTILEDATA | XFeatures::APX),
        (0, 4, XFeatures::XTILEDATA),
        (0x10, 0, XFeatures::XTILEDATA),
    ] {
        let mut dump = Dump::read("sapphire-rapids");
        dump.leaf_mut(0xd, 0)[EAX] |= 1 << 19;
        *dump.leaf_mut(0xd, 19) = [128, 960, flags, 0];
        dump.leaf_mut(0xd, 18)[ECX] = 2 | flags;
        dump.leaf_mut(0xd, 1)[EAX] = features;
        let layout = dump.layout().unwrap();
        assert_eq!(layout.xfd(), xfd);
        for component in layout.components() {
            let in_xfd = xfd.contains(component.id().bit());
            assert_eq!(component.has_xfd(), in_xfd, "{component:?}");
        }
    }
}

/// XSAVE hidden in leaf 1, no leaf 0DH, or one of zeros: x87 and SSE, whatever else CPUID says.
#[test]
fn a_guest_without_xsave_has_x87_and_sse() {
    let hidden = |dump: &mut Dump| dump.leaf_mut(1, 0)[ECX] &= !(1 << 26);
    let missing = |dump: &mut Dump| dump.leaf_mut(0, 0)[EAX] = 0xc;
    let zero = |dump: &mut Dump| *dump.leaf_mut(0xd, 0) = [0; 4];
    for name in ["sapphire-rapids", "amd-zen4-genoa", "haswell-client"] {
        for change in [&hidden as &dyn Fn(&mut Dump), &missing, &zero] {
            let mut dump = Dump::read(name);
            change(&mut dump);
            let layout = dump.layout().unwrap();
            let mask = Dump::read(name).layout().unwrap().mxcsr_mask();
            assert_eq!(layout, Layout::legacy().with_mxcsr_mask(mask), "{name}");
            assert_eq!(layout.user(), XFeatures::LEGACY);
            assert_eq!(layout.supervisor(), XFeatures::empty());
            assert_eq!(layout.standard_size(), 576);
        }
    }
    // Not an error either where the leaves behind are wrong.
    let mut dump = Dump::read("sapphire-rapids");
    hidden(&mut dump);
    dump.leaf_mut(0xd, 2)[EAX] = 7;
    assert_eq!(dump.layout(), Ok(Layout::legacy()));
    assert_eq!(Layout::from_cpuid(|_, _| [0; 4]), Ok(Layout::legacy()));
}

/// What CPUID says, said in parts, is the same layout.
#[test]
fn a_layout_of_parts_is_that_of_its_cpuid() {
    for expected in EXPECTED {
        let name = expected.name;
        let users = expected.places.iter().map(|&(number, offset, size)| {
            let component = Component::user(ComponentId::new(number).unwrap(), offset, size);
            match number {
                17 | 18 => component.aligned(),
                _ => component,
            }
        });
        let supervisors = expected
            .supervisors
            .iter()
            .map(|&(number, size)| Component::supervisor(ComponentId::new(number).unwrap(), size));
        let palettes = vec![Palette::ONE; expected.palettes];
        // In any order.
        let parts = Layout::from_parts(supervisors.chain(users).rev(), palettes)
            .unwrap()
            .with_mxcsr_mask(expected.mxcsr_mask);
        let layout = Dump::read(name).layout().unwrap();
        assert_eq!(parts, layout, "{name}");
        assert!(parts.components().eq(layout.components()), "{name}");
        assert_eq!(parts.user(), layout.user(), "{name}");
        assert_eq!(parts.supervisor(), layout.supervisor(), "{name}");
        assert_eq!(parts.xfd(), layout.xfd(), "{name}");
        assert_eq!(parts.standard_size(), layout.standard_size(), "{name}");
        let all = layout.user() | layout.supervisor();
        assert!(parts.compacted(all).eq(layout.compacted(all)), "{name}");
    }
}

/// An area of the standard format has no place for supervisor components; everything else counts.
#[test]
fn layouts_are_equal_whatever_supervisor_components_they_have() {
    let host = spr().layout().unwrap();
    assert!(!host.supervisor().is_empty());
    let guest = Dump::read("sapphire-rapids-emulated-guest")
        .layout()
        .unwrap();
    assert!(guest.supervisor().is_empty());
    assert_eq!(host, guest);

    let pkru = |offset| Component::user(ComponentId::PKRU, offset, 8);
    let of = |component| Layout::from_parts([component], []).unwrap();
    let apx = Component::user(ComponentId::APX, 960, 128);
    for (left, right) in [
        (of(pkru(2688)), of(pkru(2432))),
        (of(pkru(576)), Layout::legacy()),
        (of(apx), of(apx.aligned())),
        (of(apx), of(apx.with_xfd())),
        (of(apx), of(Component::user(ComponentId::APX, 960, 256))),
        (host.clone(), host.with_mxcsr_mask(0x2_ffff)),
        (
            guest,
            Dump::read("emerald-rapids-vm-without-tile-leaves")
                .layout()
                .unwrap(),
        ),
    ] {
        assert_ne!(left, right);
    }
}

#[test]
fn misaligned_sse_counts_only_below_the_highest_extended_leaf() {
    let mut dump = Dump::read("amd-zen4-genoa");
    dump.leaf_mut(0x8000_0000, 0)[EAX] = 0x8000_0000;
    assert_eq!(dump.layout().unwrap().mxcsr_mask(), 0xffff);
}

#[test]
fn no_fixture_is_left_out() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/cpuid");
    let mut files: Vec<String> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let mut names: Vec<String> = EXPECTED
        .iter()
        .map(|e| format!("{}.txt", e.name))
        .chain(["amd-zen2-rome.txt".into()])
        .collect();
    names.sort();
    assert_eq!(files, names);
}

/// A real processor gives 64 bytes to a component that it lists but cannot enable.
#[test]
fn zen_2_lists_pkru_with_64_bytes() {
    let layout = Dump::read("amd-zen2-rome").layout().unwrap();
    assert_eq!(layout.component(ComponentId::PKRU).unwrap().size(), 64);
    assert_eq!(layout.standard_size(), 896);
    // The 64 bytes are for PKRU alone.
    assert!(matches!(
        spr().error(0xd, 5, EAX, 8),
        LayoutError::Size {
            expected_bytes: 64,
            actual_bytes: 8,
            ..
        }
    ));
}

// Each fault, provoked by one change to what a real processor reports.

fn spr() -> Dump {
    Dump::read("sapphire-rapids")
}

#[test]
fn compacted_too_large() {
    let mut dump = spr();
    // Two supervisor components, each of which would fit alone.
    dump.leaf_mut(0xd, 14)[EAX] = 30_000;
    assert_eq!(
        dump.error(0xd, 15, EAX, 30_000),
        LayoutError::CompactedTooLarge {
            total_bytes: 71_691
        }
    );
}

#[test]
fn no_legacy() {
    for user in [0x602e5, 0x602e6, 0x602e4] {
        assert_eq!(
            spr().error(0xd, 0, EAX, user),
            LayoutError::NoLegacy {
                user: bits(u64::from(user))
            }
        );
    }
}

#[test]
fn user_and_supervisor() {
    assert_eq!(
        spr().error(0xd, 1, ECX, 0xdd00 | 1 << 9 | 1),
        LayoutError::UserAndSupervisor {
            both: XFeatures::PKRU | XFeatures::X87
        }
    );
}

#[test]
fn bit_63() {
    let layout = spr().layout().unwrap();
    let bit_63 = bits(1 << 63);
    for (subleaf, user, supervisor) in [
        (0, layout.user() | bit_63, layout.supervisor()),
        (1, layout.user(), layout.supervisor() | bit_63),
    ] {
        assert_eq!(
            spr().error(0xd, subleaf, EDX, 1 << 31),
            LayoutError::Bit63 { user, supervisor }
        );
    }
}

#[test]
fn kind() {
    assert_eq!(
        spr().error(0xd, 9, ECX, 1),
        LayoutError::Kind {
            component: ComponentId::PKRU,
            listed_as_supervisor: false
        }
    );
    assert_eq!(
        spr().error(0xd, 15, ECX, 0),
        LayoutError::Kind {
            component: ComponentId::new(15).unwrap(),
            listed_as_supervisor: true
        }
    );
}

#[test]
fn no_size() {
    assert_eq!(
        spr().error(0xd, 18, EAX, 0),
        LayoutError::NoSize {
            component: ComponentId::XTILEDATA
        }
    );
    // Component 19 is listed, and its sub-leaf is not there.
    assert_eq!(
        spr().error(0xd, 0, EAX, 0x602e7 | 1 << 19),
        LayoutError::NoSize {
            component: ComponentId::new(19).unwrap()
        }
    );
    assert_eq!(
        spr().error(0xd, 0, EDX, 1 << 30),
        LayoutError::NoSize {
            component: ComponentId::new(62).unwrap()
        }
    );
}

#[test]
fn size() {
    for (number, expected_bytes) in [(2, 256), (5, 64), (6, 512), (7, 1024), (9, 8), (17, 64)] {
        for actual_bytes in [expected_bytes - 1, expected_bytes + 1] {
            assert_eq!(
                spr().error(0xd, number, EAX, actual_bytes as u32),
                LayoutError::Size {
                    component: ComponentId::new(number as u8).unwrap(),
                    expected_bytes,
                    actual_bytes
                }
            );
        }
    }
    for number in [3, 4] {
        assert_eq!(
            Dump::read("skylake-client").error(0xd, number, EAX, 128),
            LayoutError::Size {
                component: ComponentId::new(number as u8).unwrap(),
                expected_bytes: 64,
                actual_bytes: 128
            }
        );
    }
}

#[test]
fn offset_in_header() {
    for offset in [0, 512, 575] {
        assert_eq!(
            spr().error(0xd, 2, EBX, offset),
            LayoutError::OffsetInHeader {
                component: ComponentId::AVX,
                offset: offset as usize
            }
        );
    }
}

#[test]
fn too_large() {
    assert_eq!(
        spr().error(0xd, 18, EBX, 0x10000 - 8192 + 1),
        LayoutError::TooLarge {
            component: ComponentId::XTILEDATA,
            end_bytes: 0x10001
        }
    );
    assert_eq!(
        spr().error(0xd, 18, EBX, u32::MAX),
        LayoutError::TooLarge {
            component: ComponentId::XTILEDATA,
            end_bytes: u32::MAX as usize + 8192
        }
    );
    // A supervisor component has no offset: its size alone counts.
    assert_eq!(
        spr().error(0xd, 15, EAX, 0x10001),
        LayoutError::TooLarge {
            component: ComponentId::new(15).unwrap(),
            end_bytes: 0x10001
        }
    );
}

#[test]
fn overlap() {
    assert_eq!(
        spr().error(0xd, 17, EBX, 2688 + 7),
        LayoutError::Overlap {
            first: ComponentId::PKRU,
            first_offset: 2688,
            second: ComponentId::XTILECFG,
            second_offset: 2695
        }
    );
    // The one with the higher number may lie below.
    assert_eq!(
        spr().error(0xd, 9, EBX, 1088 - 1),
        LayoutError::Overlap {
            first: ComponentId::OPMASK,
            first_offset: 1088,
            second: ComponentId::PKRU,
            second_offset: 1087
        }
    );
}

#[test]
fn area_too_small() {
    assert_eq!(
        spr().error(0xd, 0, ECX, 11007),
        LayoutError::AreaTooSmall {
            reported_bytes: 11007,
            required_bytes: 11008
        }
    );
}

#[test]
fn too_many_palettes() {
    for max_palette in [9, u32::MAX] {
        assert_eq!(
            spr().error(0x1d, 0, EAX, max_palette),
            LayoutError::TooManyPalettes { max_palette }
        );
    }
}

#[test]
fn palette() {
    assert_eq!(
        spr().error(0x1d, 1, ECX, 15),
        LayoutError::Palette(PaletteError::TileBytes {
            palette: 1,
            reported_bytes: 1024,
            row_bytes: 64,
            rows: 15
        })
    );
    assert_eq!(
        spr().error(0x1d, 1, EBX, 0x0007_0040),
        LayoutError::Palette(PaletteError::TotalBytes {
            palette: 1,
            reported_bytes: 8192,
            computed_bytes: 7168
        })
    );
    // Palette 2 is listed, and its sub-leaf is not there.
    assert_eq!(
        spr().error(0x1d, 0, EAX, 2),
        LayoutError::Palette(PaletteError::Tiles {
            palette: 2,
            tiles: 0
        })
    );
}

#[test]
fn tile_data() {
    assert_eq!(
        spr().error(0xd, 18, EAX, 8191),
        LayoutError::TileData {
            palette: 1,
            palette_bytes: 8192,
            component_bytes: 8191
        }
    );
}

// What only parts can say.

#[test]
fn twice() {
    let component = ComponentId::PKRU;
    for second in [
        Component::user(component, 700, 8),
        Component::supervisor(component, 8),
    ] {
        assert_eq!(
            Layout::from_parts([Component::user(component, 576, 8), second], []),
            Err(LayoutError::Twice { component })
        );
    }
    // x87 and SSE are always there.
    assert!(Layout::from_parts([Component::supervisor(ComponentId::SSE, 256)], []).is_err());
}

#[test]
fn palette_number() {
    let config = Component::user(ComponentId::XTILECFG, 2752, 64);
    let (eax, ebx, ecx) = (0x0400_2000, 0x0008_0040, 0x10);
    let palette = |id| Palette::from_leaf(id, [eax, ebx, ecx, 0]).unwrap();
    for (palettes, expected, actual) in [
        (vec![palette(1), palette(1)], 2, 1),
        (vec![palette(2)], 1, 2),
        (vec![palette(0)], 1, 0),
    ] {
        assert_eq!(
            Layout::from_parts([config], palettes),
            Err(LayoutError::PaletteNumber { expected, actual })
        );
    }
    assert!(Layout::from_parts([config], (1..=8).map(palette)).is_ok());
    assert_eq!(
        Layout::from_parts([config], (1..=9).map(palette)),
        Err(LayoutError::TooManyPalettes { max_palette: 9 })
    );
    // Without XTILECFG they mean nothing.
    let without = Layout::from_parts([], [Palette::ONE]).unwrap();
    assert_eq!(without.palettes(), []);
}

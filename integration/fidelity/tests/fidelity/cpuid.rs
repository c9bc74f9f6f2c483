//! CPUID leaves 0DH, 1DH and 1EH (SDM vol. 1, 13.2; vol. 2, CPUID).

use amx_fidelity::component::{AMX, TILECFG, TILEDATA};
use amx_fidelity::cpuid::{Layout, cpuid};
use amx_fidelity::process;
use amx_fidelity::sdm::tilecfg::Palette;

#[test]
fn leaf_7_announces_amx() {
    if process::has_amx() {
        let [.., edx] = cpuid(7, 0);
        for (bit, name) in [(22, "AMX-BF16"), (24, "AMX-TILE"), (25, "AMX-INT8")] {
            assert!(edx >> bit & 1 != 0, "{name}");
        }
    }
}

#[test]
fn leaf_0d_has_the_architectures_sizes() {
    if !process::has_amx() {
        return;
    }
    let layout = Layout::here();
    for (number, size) in [
        (2, 256),
        (5, 64),
        (6, 512),
        (7, 1024),
        (9, 8),
        (TILECFG, 64),
        (TILEDATA, 8192),
    ] {
        assert_eq!(
            layout.place(number).unwrap().size,
            size,
            "component {number}"
        );
    }
}

#[test]
fn leaf_0d_places_do_not_overlap_and_fill_the_size() {
    if !process::has_amx() {
        return;
    }
    let layout = Layout::here();
    let mut places: Vec<_> = layout
        .components()
        .map(|(i, place)| (place.offset, place.size, i))
        .collect();
    places.sort_unstable();
    let mut end = 576;
    for (offset, size, i) in places {
        assert!(offset >= end, "component {i} at {offset}, behind {end}");
        end = offset + size;
    }
    assert_eq!(layout.size, end, "CPUID.0DH.0:ECX");
}

#[test]
fn leaf_0d_size_of_what_is_enabled_follows_xcr0() {
    if process::has_amx() {
        // Linux enables all that the processor and it know, once, and it knows no fewer here.
        let [_, enabled, all, _] = cpuid(0xd, 0);
        assert!(
            enabled <= all && enabled >= 2816 + 8192,
            "{enabled} of {all}"
        );
    }
}

#[test]
fn compacted_tile_components_are_aligned() {
    if process::has_amx() {
        let layout = Layout::here();
        for number in [TILECFG, TILEDATA] {
            assert!(layout.place(number).unwrap().aligned, "component {number}");
            assert_eq!(
                layout.place(number).unwrap().offset % 64,
                0,
                "component {number}"
            );
        }
    }
}

#[test]
fn leaf_0d_compacted_size_follows_from_the_components() {
    if !process::has_amx() {
        return;
    }
    let [_, size, low, high] = cpuid(0xd, 1);
    let layout = Layout::here();
    let enabled = process::query(process::GET_SUPPORTED).unwrap();
    if (low, high) != (0, 0) {
        println!("IA32_XSS is not known here: only a lower limit is checked");
    }
    let offsets = layout.compacted(enabled);
    let end = |i: u32| offsets[i as usize] + layout.place(i).unwrap().size;
    let expected = layout
        .components()
        .filter(|(i, _)| enabled >> i & 1 != 0)
        .map(|(i, _)| end(i))
        .max()
        .unwrap();
    if (low, high) == (0, 0) {
        assert_eq!(size as usize, expected, "CPUID.0DH.1:EBX");
    } else {
        assert!(
            size as usize >= expected,
            "CPUID.0DH.1:EBX {size}, {expected}"
        );
    }
}

#[test]
fn xfd_is_announced_for_tile_data_alone() {
    if process::has_amx() {
        let [features, ..] = cpuid(0xd, 1);
        assert!(features >> 4 & 1 != 0, "CPUID.0DH.1:EAX[4]");
        let layout = Layout::here();
        let disabled: Vec<u32> = layout
            .components()
            .filter(|(_, place)| place.xfd)
            .map(|(i, _)| i)
            .collect();
        assert_eq!(disabled, [TILEDATA]);
    }
}

#[test]
fn leaf_0d_announces_the_instructions_under_test() {
    if process::has_amx() {
        let [features, ..] = cpuid(0xd, 1);
        for (bit, name) in [
            (0, "XSAVEOPT"),
            (1, "XSAVEC"),
            (2, "XGETBV with ECX = 1"),
            (3, "XSAVES"),
        ] {
            assert!(features >> bit & 1 != 0, "{name}");
        }
    }
}

#[test]
fn leaf_0d_subleaves_of_what_is_not_there_are_zero() {
    if !process::has_amx() {
        return;
    }
    let layout = Layout::here();
    let [_, _, low, high] = cpuid(0xd, 1);
    let known = layout.user | u64::from(high) << 32 | u64::from(low);
    for number in (2..63).filter(|i| known >> i & 1 == 0) {
        assert_eq!(cpuid(0xd, number), [0; 4], "component {number}");
    }
    assert_eq!(layout.user & AMX, AMX);
}

#[test]
fn leaf_1d_describes_palette_1() {
    if !process::has_amx() {
        return;
    }
    let palette = Palette::here();
    assert!(palette.max_palette >= 1);
    let [eax, ..] = cpuid(0x1d, 1);
    let (total, per_tile) = (eax & 0xffff, eax >> 16);
    assert_eq!(
        u32::from(palette.bytes_per_row) * u32::from(palette.rows),
        per_tile
    );
    assert_eq!(per_tile * u32::try_from(palette.names).unwrap(), total);
    assert_eq!(total as usize, Layout::here().place(TILEDATA).unwrap().size);
    assert_eq!(
        (palette.names, palette.bytes_per_row, palette.rows),
        (8, 64, 16)
    );
    assert_eq!(cpuid(0x1d, 0)[1..], [0; 3]);
}

#[test]
fn leaf_1e_describes_tmul() {
    if process::has_amx() {
        let [_, ebx, ecx, edx] = cpuid(0x1e, 0);
        let (max_k, max_n) = (ebx & 0xff, ebx >> 8 & 0xffff);
        assert_eq!((max_k, max_n), (16, 64));
        assert_eq!((ebx >> 24, ecx, edx), (0, 0, 0));
    }
}

#[test]
fn leaf_1e_has_no_more_subleaves_than_it_says() {
    if process::has_amx() {
        let [last, ..] = cpuid(0x1e, 0);
        for subleaf in last + 1..last + 8 {
            assert_eq!(cpuid(0x1e, subleaf), [0; 4], "sub-leaf {subleaf} of {last}");
        }
    }
}

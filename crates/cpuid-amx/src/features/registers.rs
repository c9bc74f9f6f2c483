//! The registers that say what a set of features says.

use xsave_state::Palette;
use xsave_state::format::EXTENDED_OFFSET;
use xsave_state::{ComponentId, XFeatures};

use crate::amx::{AmxFeatures, LEAF_7};
use crate::features::{ComponentShape, FeatureSet, XsaveFeatures};

/// Leaf 7: sub-leaf 0 or 1.
pub(super) fn leaf_7(amx: AmxFeatures, subleaf: u32) -> [u32; 4] {
    let bit = |feature, bit: u32| if amx.contains(feature) { 1 << bit } else { 0 };
    if subleaf == 0 {
        let edx =
            bit(AmxFeatures::BF16, 22) | bit(AmxFeatures::TILE, 24) | bit(AmxFeatures::INT8, 25);
        [0, 0, 0, edx]
    } else {
        [
            bit(AmxFeatures::FP16, 21),
            0,
            0,
            bit(AmxFeatures::COMPLEX, 8),
        ]
    }
}

pub(super) fn leaf_xsave(set: &FeatureSet, subleaf: u32) -> [u32; 4] {
    let low_high = |bitmap: XFeatures| {
        let [a, b, c, d, e, f, g, h] = bitmap.bits().to_le_bytes();
        (
            u32::from_le_bytes([a, b, c, d]),
            u32::from_le_bytes([e, f, g, h]),
        )
    };
    match subleaf {
        0 => {
            let (low, high) = low_high(set.user());
            if low == 0 {
                return [0; 4];
            }
            let size = standard_size(set);
            [low, size, size, high]
        }
        1 => {
            let (low, high) = low_high(set.supervisor());
            let features = set.xsave & XsaveFeatures::IN_0DH;
            let size = if features.intersects(XsaveFeatures::XSAVEC | XsaveFeatures::XSAVES) {
                compacted_size(set)
            } else {
                0
            };
            [features.bits(), size, low, high]
        }
        _ => {
            let id = u8::try_from(subleaf).ok().and_then(ComponentId::new);
            id.and_then(|id| set.components.get(&id))
                .map_or([0; 4], |shape| {
                    let flags = u32::from(shape.supervisor)
                        | u32::from(shape.aligned) << 1
                        | u32::from(shape.xfd) << 2;
                    [shape.size, shape.offset, flags, 0]
                })
        }
    }
}

fn extended(set: &FeatureSet) -> impl Iterator<Item = &ComponentShape> {
    set.components
        .values()
        .filter(|shape| !XFeatures::LEGACY.contains(shape.id.bit()))
}

fn standard_size(set: &FeatureSet) -> u32 {
    extended(set)
        .filter(|shape| !shape.supervisor)
        .map(|shape| shape.offset.saturating_add(shape.size))
        .max()
        .unwrap_or(0)
        .max(end_of_header())
}

/// With all of XCR0 and IA32_XSS (SDM Vol. 1 §13.4.3).
fn compacted_size(set: &FeatureSet) -> u32 {
    extended(set).fold(end_of_header(), |end, shape| {
        let start = if shape.aligned {
            end.checked_next_multiple_of(64).unwrap_or(end)
        } else {
            end
        };
        start.saturating_add(shape.size)
    })
}

fn end_of_header() -> u32 {
    const { assert!(EXTENDED_OFFSET == 576) };
    576
}

pub(super) fn leaf_tiles(set: &FeatureSet, subleaf: u32) -> [u32; 4] {
    if subleaf == 0 {
        let last = set.palettes.last().map_or(0, Palette::id);
        return [u32::from(last), 0, 0, 0];
    }
    let find = |palette: &&Palette| u32::from(palette.id()) == subleaf;
    set.palettes.iter().find(find).map_or([0; 4], |palette| {
        [
            u32::from(palette.total_bytes()) | u32::from(palette.tile_bytes()) << 16,
            u32::from(palette.row_bytes()) | u32::from(palette.tiles()) << 16,
            u32::from(palette.rows()),
            0,
        ]
    })
}

pub(super) fn leaf_tmul(set: &FeatureSet, subleaf: u32) -> [u32; 4] {
    let max_subleaf = u32::from(set.has_1eh_1);
    if subleaf == 0 {
        let limits = set.tmul.map_or(0, |limits| {
            u32::from(limits.maxk) | u32::from(limits.maxn) << 8
        });
        [max_subleaf, limits, 0, 0]
    } else if set.has_1eh_1 {
        [(set.amx & AmxFeatures::IN_LEAF_1EH).bits(), 0, 0, 0]
    } else {
        [0; 4]
    }
}

/// Features elsewhere in CPUID that need components: without them software must not find the
/// features either (SDM Vol. 1 §13.3, §14.3, §15.2; Vol. 2, CPUID; AMD APM Vol. 3, appendix E). Of those
/// that need a supervisor component, shadow stacks and indirect branch tracking: KVM takes them away
/// where IA32_XSS lacks CET (arch/x86/kvm/x86.c, `kvm_setup_xss_caps`). The others work without XSAVES.
pub(crate) fn dependents() -> impl Iterator<Item = (XFeatures, u32, u32, [u32; 4])> {
    let avx512 = XFeatures::AVX512.union(XFeatures::AVX);
    [
        // FMA, AVX, F16C
        (XFeatures::AVX, 1, 0, [0, 0, 1 << 12 | 1 << 28 | 1 << 29, 0]),
        // AVX2; VAES, VPCLMULQDQ
        (XFeatures::AVX, LEAF_7, 0, [0, 1 << 5, 1 << 9 | 1 << 10, 0]),
        // SHA512, SM3, SM4, AVX-VNNI, AVX-IFMA; AVX-VNNI-INT8, AVX-NE-CONVERT, AVX-VNNI-INT16
        (
            XFeatures::AVX,
            LEAF_7,
            1,
            [
                1 << 0 | 1 << 1 | 1 << 2 | 1 << 4 | 1 << 23,
                0,
                0,
                1 << 4 | 1 << 5 | 1 << 10,
            ],
        ),
        // XOP, FMA4
        (XFeatures::AVX, 0x8000_0001, 0, [0, 0, 1 << 11 | 1 << 16, 0]),
        // F, DQ, IFMA, PF, ER, CD, BW, VL; VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ; 4VNNIW, 4FMAPS,
        // VP2INTERSECT, FP16
        (
            avx512,
            LEAF_7,
            0,
            [
                0,
                1 << 16 | 1 << 17 | 1 << 21 | 1 << 26 | 1 << 27 | 1 << 28 | 1 << 30 | 1 << 31,
                1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14,
                1 << 2 | 1 << 3 | 1 << 8 | 1 << 23,
            ],
        ),
        // BF16; AVX10
        (avx512, LEAF_7, 1, [1 << 5, 0, 0, 1 << 19]),
        (XFeatures::MPX, LEAF_7, 0, [0, 1 << 14, 0, 0]),
        // PKU, OSPKE
        (XFeatures::PKRU, LEAF_7, 0, [0, 0, 1 << 3 | 1 << 4, 0]),
        // APX_F
        (XFeatures::APX, LEAF_7, 1, [0, 0, 0, 1 << 21]),
        // The version of AVX10 and what belongs to it.
        (avx512, 0x24, 0, [u32::MAX; 4]),
        (avx512, 0x24, 1, [u32::MAX; 4]),
        // SHSTK; IBT
        (
            XFeatures::CET_U.union(XFeatures::CET_S),
            LEAF_7,
            0,
            [0, 0, 1 << 7, 1 << 20],
        ),
        // With XSAVE goes OSXSAVE.
        (XFeatures::LEGACY, 1, 0, [0, 0, 1 << 27, 0]),
    ]
    .into_iter()
}

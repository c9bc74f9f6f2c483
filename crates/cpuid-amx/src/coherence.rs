//! Every way in which the leaves of a table can contradict each other.
//!
//! A guest believes each leaf on its own: one part of it looks for AMX in leaf 7, another sizes its
//! buffers by 0DH, a third configures tiles by 1DH. Tables come apart because KVM filters only 0DH
//! by permission, because VMMs clear bits in leaf 7 and leave the rest, and because hosts which are
//! guests themselves get such tables from below.

use alloc::vec::Vec;

use thiserror::Error;
use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::{ComponentId, Layout, LayoutError, XFeatures};

use crate::amx::{self, AmxFeatures, LEAF_7, LEAF_TILES, LEAF_TMUL, Leaves, TmulLimits};
use crate::table::CpuidTable;

/// Bytes of the legacy region and the header, of which every area has at least as many.
const MIN_AREA_BYTES: usize = xsave_state::header::EXTENDED_OFFSET;
const XSAVEC: u32 = 1 << 1;
const XSAVES: u32 = 1 << 3;
const XFD: u32 = 1 << 4;

/// Finds every contradiction in a table. None: the table is coherent.
///
/// ```
/// use cpuid_amx::{Contradiction, CpuidTable, Table, coherence};
///
/// let mut table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// assert_eq!(coherence::check(&table), []);
///
/// // Hide AMX as it is often done: in leaf 7 only.
/// let [eax, ebx, ecx, edx] = table.leaf(7, 0);
/// table.set_leaf(7, 0, [eax, ebx, ecx, edx & !(1 << 22 | 1 << 24 | 1 << 25)])?;
/// for contradiction in coherence::check(&table) {
///     println!("{contradiction}");
/// }
/// assert_eq!(coherence::check(&table).len(), 3);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[must_use]
pub fn check(table: &impl CpuidTable) -> Vec<Contradiction> {
    let mut found = check_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
    duplicates(table, &mut found);
    found
}

/// The same for CPUID that is not a table: `cpuid(leaf, subleaf)` gives `[eax, ebx, ecx, edx]`, and
/// zeros for what is not there. No input makes it panic.
///
/// The CPUID instruction of Intel processors gives the highest basic leaf for what is above it: ask
/// for zeros there.
#[must_use]
pub fn check_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Vec<Contradiction> {
    let leaves = Leaves::read(&mut cpuid);
    let mut found = Vec::new();
    xsave(&leaves, &mut cpuid, &mut found);
    components(&leaves, &mut found);
    levels(&leaves, &mut found);
    tiles(&leaves, &mut cpuid, &mut found);
    found
}

/// 0DH itself: places, groups and sizes.
fn xsave(
    leaves: &Leaves,
    cpuid: &mut impl FnMut(u32, u32) -> [u32; 4],
    found: &mut Vec<Contradiction>,
) {
    let user = leaves.user();
    if !leaves.has_xsave() && user.is_empty() && leaves.in_leaf_7().is_empty() {
        // A processor without XSAVE needs no 0DH.
        return;
    }
    if !leaves.has_xsave() && !user.is_empty() {
        found.push(Contradiction::Xsave { user });
    }
    for required in [XFeatures::MPX, XFeatures::AVX512 | XFeatures::AVX] {
        // AVX alone is no part of AVX-512.
        let present = user & required;
        if !present.is_empty() && present != required && present != XFeatures::AVX {
            found.push(Contradiction::Group { present, required });
        }
    }
    let [features, reported_compacted, ..] = leaves.xsave_1;
    let supervisor = leaves.supervisor();
    if features & XSAVES == 0 && !supervisor.is_empty() {
        found.push(Contradiction::SupervisorWithoutXsaves { supervisor });
    }

    let layout = match Layout::from_cpuid(&mut *cpuid) {
        Ok(layout) => layout,
        Err(error) => {
            found.push(Contradiction::Layout(error));
            return;
        }
    };
    let [_, enabled, size, _] = leaves.xsave_0;
    let (enabled, size) = (bytes(enabled), bytes(size));
    if size != layout.standard_size() {
        found.push(Contradiction::AreaSize {
            reported_bytes: size,
            computed_bytes: layout.standard_size(),
        });
    }
    if !standard_sizes(&layout).any(|possible| possible == enabled) {
        found.push(Contradiction::EnabledSize {
            reported_bytes: enabled,
            all_bytes: layout.standard_size(),
        });
    }
    let all = if features & XSAVES != 0 {
        user | supervisor
    } else {
        user
    };
    let compacted = bytes(reported_compacted);
    let possible = if features & (XSAVEC | XSAVES) == 0 {
        compacted == 0
    } else {
        is_compacted_size(&layout, all, compacted)
    };
    if !possible {
        found.push(Contradiction::CompactedSize {
            reported_bytes: compacted,
            all_bytes: if features & (XSAVEC | XSAVES) == 0 {
                0
            } else {
                layout.compacted_size(all)
            },
        });
    }
}

/// The user components that XCR0 enables together, each set with all that it needs (SDM Vol. 1
/// §13.3): a legal XCR0 is x87 and any number of these.
fn groups(user: XFeatures) -> impl Iterator<Item = XFeatures> {
    let known = [
        XFeatures::MPX,
        XFeatures::AVX512 | XFeatures::AVX,
        XFeatures::AMX,
    ];
    let single = user - (XFeatures::MPX | XFeatures::AVX512 | XFeatures::AMX);
    known
        .into_iter()
        .filter(move |&group| user.contains(group))
        .chain(single.components().map(ComponentId::bit))
}

/// What CPUID.(EAX=0DH,ECX=0):EBX is for the legal values of XCR0: the area ends where the last of
/// the enabled groups ends.
fn standard_sizes(layout: &Layout) -> impl Iterator<Item = usize> {
    groups(layout.user())
        .map(|group| layout.standard_size_of(group))
        .chain([MIN_AREA_BYTES])
}

/// Whether CPUID.(EAX=0DH,ECX=1):EBX can be `reported` for some legal XCR0 | IA32_XSS within `all`.
///
/// Goes through the components in the order in which the compacted format has them, with the ends
/// that are possible so far: the same walk as [`Layout::compacted`], each group with and without.
/// Ends beyond `reported` lead nowhere, so that there are never more than 64 Ki of them.
fn is_compacted_size(layout: &Layout, all: XFeatures, reported: usize) -> bool {
    if reported > MAX_AREA_BYTES {
        return false;
    }
    // AVX-512 needs AVX: its components can follow only ends that AVX is part of.
    let without_avx = layout_ends(
        layout,
        all - XFeatures::AVX - XFeatures::AVX512,
        reported,
        false,
    );
    if without_avx.contains(&reported) {
        return true;
    }
    all.contains(XFeatures::AVX) && layout_ends(layout, all, reported, true).contains(&reported)
}

fn layout_ends(layout: &Layout, all: XFeatures, limit: usize, avx: bool) -> Vec<usize> {
    let mut ends = alloc::vec![MIN_AREA_BYTES];
    let mut rest = all - XFeatures::LEGACY;
    while let Some(id) = rest.components().next() {
        let group = [XFeatures::MPX, XFeatures::AVX512, XFeatures::AMX]
            .into_iter()
            .find(|group| group.contains(id.bit()))
            .unwrap_or(id.bit());
        rest -= group;
        if !all.contains(group) {
            continue;
        }
        // The numbers of a group are consecutive: nothing comes between its components.
        let with = |&end: &usize| {
            group
                .components()
                .filter_map(|id| layout.component(id))
                .fold(end, |end, component| {
                    let start = if component.is_aligned() {
                        end.next_multiple_of(64)
                    } else {
                        end
                    };
                    start.saturating_add(component.size())
                })
        };
        let added: Vec<usize> = ends.iter().map(with).filter(|&end| end <= limit).collect();
        if avx && id == ComponentId::AVX {
            ends = added;
        } else {
            ends.extend(added);
        }
        ends.sort();
        ends.dedup();
    }
    ends
}

/// Leaf 7 against the components of 0DH.
fn components(leaves: &Leaves, found: &mut Vec<Contradiction>) {
    let features = leaves.in_leaf_7();
    let user = leaves.user();
    let has_tile = features.contains(AmxFeatures::TILE);
    let [xsave_features, ..] = leaves.xsave_1;
    let xfd = xsave_features & XFD != 0;

    let all_features = features | leaves.enumerated_1e();
    if !has_tile && !all_features.is_empty() {
        found.push(Contradiction::FeaturesWithoutTile {
            features: all_features,
        });
    }
    if !has_tile && user.intersects(XFeatures::AMX) {
        found.push(Contradiction::ComponentsWithoutTile { user });
    }
    if has_tile && !user.contains(XFeatures::XTILEDATA) && xfd {
        found.push(Contradiction::BeforePermission { features, user });
    } else if has_tile && !user.intersects(XFeatures::AMX) {
        found.push(Contradiction::ComponentsMissing { features, user });
    }
    match (
        user.contains(XFeatures::XTILECFG),
        user.contains(XFeatures::XTILEDATA),
    ) {
        (true, false) => found.push(Contradiction::TileDataMissing { user }),
        (false, true) => found.push(Contradiction::TileConfigMissing { user }),
        _ => {}
    }
    if user.contains(XFeatures::XTILEDATA) {
        let [_, _, ecx, _] = leaves.tile_data;
        let component = ecx & 1 << 2 != 0;
        if !(xfd && component) {
            found.push(Contradiction::Xfd { xfd, component });
        }
    }
}

/// What is there, but above the highest leaf or sub-leaf that CPUID names.
fn levels(leaves: &Leaves, found: &mut Vec<Contradiction>) {
    let max_leaf = leaves.max_leaf;
    let features = leaves.in_leaf_7() | leaves.enumerated_1e();
    let needs = [
        (LEAF_7, !features.is_empty()),
        (LEAF_TILES, features.contains(AmxFeatures::TILE)),
        (LEAF_TMUL, features.intersects(AmxFeatures::TMUL)),
    ];
    for (leaf, needed) in needs {
        if needed && leaf > max_leaf {
            found.push(Contradiction::MaxLeaf {
                leaf,
                max_leaf,
                features,
            });
        }
    }
    let [max_7, ..] = leaves.leaf_7_0;
    let [max_1e, ..] = leaves.tmul_0;
    let subleaves = [
        (
            LEAF_7,
            max_7,
            AmxFeatures::from_leaf_7([0; 4], leaves.leaf_7_1),
        ),
        (LEAF_TMUL, max_1e, AmxFeatures::from_leaf_1e(leaves.tmul_1)),
    ];
    for (leaf, max_subleaf, features) in subleaves {
        if max_subleaf < 1 && !features.is_empty() {
            found.push(Contradiction::MaxSubleaf {
                leaf,
                max_subleaf,
                features,
            });
        }
    }
}

/// 1DH and 1EH against leaf 7 and component 18.
fn tiles(
    leaves: &Leaves,
    cpuid: &mut impl FnMut(u32, u32) -> [u32; 4],
    found: &mut Vec<Contradiction>,
) {
    let features = leaves.in_leaf_7() | leaves.enumerated_1e();
    let has_tile = features.contains(AmxFeatures::TILE);
    let [max_palette, ..] = leaves.tiles_0;
    let limits = TmulLimits::from_leaf(leaves.tmul_0);

    if !has_tile {
        if max_palette != 0 {
            found.push(Contradiction::PalettesWithoutTile { max_palette });
        }
        if let Some(limits) = limits {
            found.push(Contradiction::TmulWithoutTile { limits });
        }
    } else if max_palette == 0 && leaves.max_leaf >= LEAF_TILES {
        found.push(Contradiction::NoPalette { features });
    }
    if limits.is_none() && features.intersects(AmxFeatures::TMUL) && leaves.max_leaf >= LEAF_TMUL {
        found.push(Contradiction::NoTmul { features });
    }

    match amx::palettes(&mut *cpuid) {
        Ok(palettes) => {
            let palette_bytes = palettes.iter().map(|p| usize::from(p.total_bytes())).max();
            let [component_bytes, ..] = leaves.tile_data;
            if let Some(palette_bytes) = palette_bytes
                && leaves.user().contains(XFeatures::XTILEDATA)
                // Larger ones are `LayoutError::TileData`.
                && palette_bytes < bytes(component_bytes)
            {
                found.push(Contradiction::PaletteSize {
                    palette_bytes,
                    component_bytes: bytes(component_bytes),
                });
            }
            let rows = palettes.iter().map(|p| p.rows()).max();
            let row_bytes = palettes.iter().map(|p| p.row_bytes()).max();
            if let (Some(limits), Some(rows), Some(row_bytes)) = (limits, rows, row_bytes)
                && (u16::from(limits.maxk) > rows || limits.maxn > row_bytes)
            {
                found.push(Contradiction::TmulBeyondTiles {
                    limits,
                    rows,
                    row_bytes,
                });
            }
        }
        Err(error) => {
            // The layout has said so already where it has looked: with XTILECFG.
            let said =
                |c: &Contradiction| matches!(c, Contradiction::Layout(said) if *said == error);
            if !found.iter().any(said) {
                found.push(Contradiction::Layout(error));
            }
        }
    }

    if leaves.has_tmul_1() {
        let leaf_7 = leaves.in_leaf_7() & AmxFeatures::ALIASED;
        let leaf_1e = leaves.enumerated_1e() & AmxFeatures::ALIASED;
        if leaf_7 != leaf_1e {
            found.push(Contradiction::Aliases { leaf_7, leaf_1e });
        }
    }
}

/// Entries that answer for the same sub-leaf with different values: KVM takes the first, a map the
/// last.
fn duplicates(table: &impl CpuidTable, found: &mut Vec<Contradiction>) {
    for (index, entry) in table.entries().enumerate() {
        let earlier = table
            .entries()
            .take(index)
            .find(|e| e.leaf == entry.leaf && e.subleaf == entry.subleaf);
        if let Some(first) = earlier.filter(|e| e.value != entry.value) {
            found.push(Contradiction::Duplicate {
                leaf: entry.leaf,
                subleaf: entry.subleaf.unwrap_or(0),
                first: first.value,
                second: entry.value,
            });
        }
    }
}

fn bytes(register: u32) -> usize {
    usize::try_from(register).unwrap_or(usize::MAX)
}

/// Two leaves, or two numbers in one, that cannot both be true.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Contradiction {
    /// 0DH is there without XSAVE.
    #[error("CPUID.1:ECX.XSAVE[26] is 0, but CPUID.0DH.0 has {user}")]
    Xsave {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// 0DH has a part of components that XCR0 enables together (SDM Vol. 1 §13.3): KVM takes the
    /// table, and the guest can never enable them.
    #[error("CPUID.0DH.0 has {present}, but XCR0 takes only {required} together")]
    Group {
        /// Those of `required` that are there.
        present: XFeatures,
        /// Those that belong together.
        required: XFeatures,
    },
    /// There are supervisor components, but no IA32_XSS to enable them: CPUID.0DH.1:EAX.XSAVES\[3\]
    /// is clear.
    #[error("CPUID.0DH.1 has {supervisor} for IA32_XSS, but EAX.XSAVES[3] is 0")]
    SupervisorWithoutXsaves {
        /// CPUID.(EAX=0DH,ECX=1):EDX:ECX.
        supervisor: XFeatures,
    },
    /// 0DH or 1DH describes an area or tiles that cannot exist.
    #[error(transparent)]
    Layout(#[from] LayoutError),
    /// CPUID.(EAX=0DH,ECX=0):ECX is more than the components need; less is
    /// [`LayoutError::AreaTooSmall`]. Components were taken out without a new sum.
    #[error("CPUID.0DH.0:ECX gives {reported_bytes} bytes; the components make {computed_bytes}")]
    AreaSize {
        /// CPUID.(EAX=0DH,ECX=0):ECX.
        reported_bytes: usize,
        /// Where the last component ends.
        computed_bytes: usize,
    },
    /// CPUID.(EAX=0DH,ECX=0):EBX is not the size of any legal XCR0.
    ///
    /// It changes with XCR0, so that the check asks for any, not for the current one. KVM
    /// [writes it anew](Self::is_recomputed_by_kvm).
    #[error(
        "CPUID.0DH.0:EBX gives {reported_bytes} bytes for the components that are enabled, which \
         no XCR0 makes; all of them make {all_bytes}"
    )]
    EnabledSize {
        /// CPUID.(EAX=0DH,ECX=0):EBX.
        reported_bytes: usize,
        /// With all components.
        all_bytes: usize,
    },
    /// CPUID.(EAX=0DH,ECX=1):EBX is not the size of the compacted format for any legal
    /// XCR0 | IA32_XSS; or not 0 where there is neither XSAVEC nor XSAVES.
    ///
    /// It changes with both, so that the check asks for any values, not for the current ones. KVM
    /// [writes it anew](Self::is_recomputed_by_kvm).
    #[error(
        "CPUID.0DH.1:EBX gives {reported_bytes} bytes for the components that are enabled, which \
         no XCR0 and IA32_XSS make; all of them make {all_bytes}"
    )]
    CompactedSize {
        /// CPUID.(EAX=0DH,ECX=1):EBX.
        reported_bytes: usize,
        /// With all components; 0 where there is no compacted format.
        all_bytes: usize,
    },
    /// There are AMX features without AMX-TILE, CPUID.(EAX=07H,ECX=0):EDX\[24\].
    #[error("CPUID has {features}, but not AMX-TILE (CPUID.7.0:EDX[24])")]
    FeaturesWithoutTile {
        /// Those features, of leaves 7 and 1EH.
        features: AmxFeatures,
    },
    /// 0DH has components of AMX without AMX-TILE: AMX was hidden in leaf 7 only.
    #[error("CPUID.0DH.0 has {user}, but CPUID.7.0:EDX.AMX-TILE[24] is 0")]
    ComponentsWithoutTile {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// There are AMX features and XFD, but not the component that needs XFD:
    /// KVM_GET_SUPPORTED_CPUID was asked before the permission, and filters only 0DH by it
    /// (arch/x86/kvm/cpuid.c, `__do_cpuid_func`). Kernels before 6.4 leave XTILECFG there.
    #[error(
        "CPUID.7 has {features} and CPUID.0DH.1 has XFD, but CPUID.0DH.0 has {user} without \
         XTILEDATA: KVM was asked before the permission was requested"
    )]
    BeforePermission {
        /// The AMX features of leaf 7.
        features: AmxFeatures,
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// There are AMX features, but neither of the components.
    #[error("CPUID.7 has {features}, but CPUID.0DH.0 has {user} without XTILECFG and XTILEDATA")]
    ComponentsMissing {
        /// The AMX features of leaf 7.
        features: AmxFeatures,
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// There is XTILECFG without XTILEDATA: XCR0 takes only both.
    #[error("CPUID.0DH.0 has XTILECFG without XTILEDATA: {user}")]
    TileDataMissing {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// There is XTILEDATA without XTILECFG: XCR0 takes only both.
    #[error("CPUID.0DH.0 has XTILEDATA without XTILECFG: {user}")]
    TileConfigMissing {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// IA32_XFD cannot disable XTILEDATA, which it can on every processor that has it. Linux does
    /// not use tiles then.
    #[error(
        "CPUID.0DH.0 has XTILEDATA, but XFD (CPUID.0DH.1:EAX[4]) is {}, and CPUID.0DH.18:ECX[2] \
         is {}",
        u8::from(*xfd),
        u8::from(*component)
    )]
    Xfd {
        /// CPUID.(EAX=0DH,ECX=1):EAX\[4\].
        xfd: bool,
        /// CPUID.(EAX=0DH,ECX=18):ECX\[2\].
        component: bool,
    },
    /// A leaf that the features need is above the highest.
    #[error("CPUID has {features}, which need leaf {leaf:#x}; the highest is {max_leaf:#x}")]
    MaxLeaf {
        /// The leaf.
        leaf: u32,
        /// CPUID.0H:EAX.
        max_leaf: u32,
        /// The features of leaves 7 and 1EH.
        features: AmxFeatures,
    },
    /// Features are reported in a sub-leaf above the highest, where no software looks.
    #[error("CPUID.{leaf:X}H.1 has {features}, but the highest sub-leaf is {max_subleaf}")]
    MaxSubleaf {
        /// The leaf, 7 or 1EH.
        leaf: u32,
        /// CPUID.(EAX=leaf,ECX=0):EAX.
        max_subleaf: u32,
        /// The features of sub-leaf 1.
        features: AmxFeatures,
    },
    /// 1DH has palettes without AMX-TILE.
    #[error("CPUID.1DH.0 has palettes up to {max_palette}, but CPUID.7.0:EDX.AMX-TILE[24] is 0")]
    PalettesWithoutTile {
        /// CPUID.(EAX=1DH,ECX=0):EAX.
        max_palette: u32,
    },
    /// 1EH has limits without AMX-TILE.
    #[error("CPUID.1EH.0 has {limits}, but CPUID.7.0:EDX.AMX-TILE[24] is 0")]
    TmulWithoutTile {
        /// CPUID.(EAX=1EH,ECX=0):EBX.
        limits: TmulLimits,
    },
    /// There is AMX-TILE, but 1DH has no palette: no tile can be configured.
    #[error("CPUID has {features}, but CPUID.1DH.0:EAX has no palette")]
    NoPalette {
        /// The features of leaves 7 and 1EH.
        features: AmxFeatures,
    },
    /// There are features that multiply, but 1EH has no limits.
    #[error("CPUID has {features}, but CPUID.1EH.0:EBX has no limits")]
    NoTmul {
        /// The features of leaves 7 and 1EH.
        features: AmxFeatures,
    },
    /// The largest palette has fewer bytes than component 18; more is [`LayoutError::TileData`].
    #[error("the tiles of CPUID.1DH make {palette_bytes} bytes; XTILEDATA has {component_bytes}")]
    PaletteSize {
        /// The largest CPUID.(EAX=1DH,ECX=n):EAX\[15:0\].
        palette_bytes: usize,
        /// CPUID.(EAX=0DH,ECX=18):EAX.
        component_bytes: usize,
    },
    /// The multiply unit takes larger tiles than any palette has.
    #[error("CPUID.1EH.0 has {limits}, but tiles have at most {rows} rows of {row_bytes} bytes")]
    TmulBeyondTiles {
        /// CPUID.(EAX=1EH,ECX=0):EBX.
        limits: TmulLimits,
        /// The most rows of a palette.
        rows: u16,
        /// The most bytes per row of a palette.
        row_bytes: u16,
    },
    /// Leaf 7 and CPUID.(EAX=1EH,ECX=1), which repeats its features, differ.
    #[error("CPUID.7 has {leaf_7}, but CPUID.1EH.1 has {leaf_1e} of the features in both")]
    Aliases {
        /// Those of [`AmxFeatures::ALIASED`] in leaf 7.
        leaf_7: AmxFeatures,
        /// Those of [`AmxFeatures::ALIASED`] in leaf 1EH.
        leaf_1e: AmxFeatures,
    },
    /// Two entries of a table give different values for the same leaf and sub-leaf. KVM takes the
    /// first.
    #[error("leaf {leaf:#x} sub-leaf {subleaf:#x} is {first:x?}, and a second time {second:x?}")]
    Duplicate {
        /// The leaf.
        leaf: u32,
        /// The sub-leaf.
        subleaf: u32,
        /// `[eax, ebx, ecx, edx]` of the first.
        first: [u32; 4],
        /// `[eax, ebx, ecx, edx]` of the one that differs.
        second: [u32; 4],
    },
}

impl Contradiction {
    /// Whether KVM writes this value itself, at KVM_SET_CPUID2 and whenever XCR0 or IA32_XSS
    /// changes (arch/x86/kvm/cpuid.c, `kvm_update_cpuid_runtime`): the guest never sees it as it is
    /// in the table.
    #[must_use]
    pub const fn is_recomputed_by_kvm(&self) -> bool {
        match self {
            Self::EnabledSize { .. } => true,
            // Where there is no compacted format KVM does not touch it.
            Self::CompactedSize { all_bytes, .. } => *all_bytes != 0,
            _ => false,
        }
    }
}

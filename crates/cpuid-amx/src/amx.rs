//! AMX in CPUID: features, palettes, TMUL limits, and whether a guest could use it.

use alloc::vec::Vec;
use core::fmt;

use bitflags::bitflags;
use thiserror::Error;
use xsave_state::Palette;
use xsave_state::layout::MAX_PALETTES;
use xsave_state::{LayoutError, XFeatures};

pub(crate) const XSAVE_BIT: u32 = 1 << 26;
pub(crate) const LEAF_7: u32 = 7;
pub(crate) const LEAF_XSAVE: u32 = 0xd;
pub(crate) const LEAF_TILES: u32 = 0x1d;
pub(crate) const LEAF_TMUL: u32 = 0x1e;

bitflags! {
    /// What a processor or a guest has of AMX. Bits 0 to 8 are those of CPUID.(EAX=1EH,ECX=1):EAX
    /// (Intel Architecture Instruction Set Extensions Programming Reference, CPUID leaf 1EH).
    ///
    /// ```
    /// use cpuid_amx::AmxFeatures;
    ///
    /// let features = AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16;
    /// assert_eq!(features.to_string(), "AMX-TILE, AMX-INT8, AMX-BF16");
    /// ```
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct AmxFeatures: u32 {
        /// 8-bit integers. CPUID.(EAX=07H,ECX=0):EDX\[25\] and CPUID.(EAX=1EH,ECX=1):EAX\[0\].
        const INT8 = 1 << 0;
        /// bfloat16. CPUID.(EAX=07H,ECX=0):EDX\[22\] and CPUID.(EAX=1EH,ECX=1):EAX\[1\].
        const BF16 = 1 << 1;
        /// Complex FP16. CPUID.(EAX=07H,ECX=1):EDX\[8\] and CPUID.(EAX=1EH,ECX=1):EAX\[2\].
        const COMPLEX = 1 << 2;
        /// FP16. CPUID.(EAX=07H,ECX=1):EAX\[21\] and CPUID.(EAX=1EH,ECX=1):EAX\[3\].
        const FP16 = 1 << 3;
        /// FP8. CPUID.(EAX=1EH,ECX=1):EAX\[4\].
        const FP8 = 1 << 4;
        /// Transposing loads and products. CPUID.(EAX=1EH,ECX=1):EAX\[5\].
        const TRANSPOSE = 1 << 5;
        /// TF32 (FP19). CPUID.(EAX=1EH,ECX=1):EAX\[6\].
        const TF32 = 1 << 6;
        /// Rows of tiles to and from AVX-512 registers. CPUID.(EAX=1EH,ECX=1):EAX\[7\].
        const AVX512 = 1 << 7;
        /// Loads with a read-shared hint. CPUID.(EAX=1EH,ECX=1):EAX\[8\].
        const MOVRS = 1 << 8;
        /// Tiles and their configuration, without which nothing else works.
        /// CPUID.(EAX=07H,ECX=0):EDX\[24\].
        const TILE = 1 << 16;

        /// Those that leaf 7 and CPUID.(EAX=1EH,ECX=1) both report.
        const ALIASED =
            Self::INT8.bits() | Self::BF16.bits() | Self::COMPLEX.bits() | Self::FP16.bits();
        /// Those that leaf 7 does not report.
        const ONLY_IN_1EH = Self::FP8.bits()
            | Self::TRANSPOSE.bits()
            | Self::TF32.bits()
            | Self::AVX512.bits()
            | Self::MOVRS.bits();
        /// Those of CPUID.(EAX=1EH,ECX=1):EAX.
        const IN_LEAF_1EH = Self::ALIASED.bits() | Self::ONLY_IN_1EH.bits();
        /// Those that multiply tiles, for which CPUID.(EAX=1EH,ECX=0) gives the limits.
        const TMUL = Self::ALIASED.bits() | Self::FP8.bits() | Self::TF32.bits();
    }
}

impl AmxFeatures {
    /// The features that sub-leaves 0 and 1 of leaf 7 report, each as `[eax, ebx, ecx, edx]`.
    ///
    /// ```
    /// use cpuid_amx::AmxFeatures;
    ///
    /// // Granite Rapids
    /// let features = AmxFeatures::from_leaf_7(
    ///     [2, 0xf3bf_bffb, 0xbb41_7fee, 0xffdd_4430],
    ///     [0x4020_1d30, 1, 0, 0x000e_4000],
    /// );
    /// assert_eq!(features.to_string(), "AMX-TILE, AMX-INT8, AMX-BF16, AMX-FP16");
    /// ```
    #[must_use]
    pub fn from_leaf_7(subleaf_0: [u32; 4], subleaf_1: [u32; 4]) -> Self {
        let [.., edx_0] = subleaf_0;
        let [eax_1, _, _, edx_1] = subleaf_1;
        let mut features = Self::empty();
        features.set(Self::BF16, edx_0 & 1 << 22 != 0);
        features.set(Self::TILE, edx_0 & 1 << 24 != 0);
        features.set(Self::INT8, edx_0 & 1 << 25 != 0);
        features.set(Self::FP16, eax_1 & 1 << 21 != 0);
        features.set(Self::COMPLEX, edx_1 & 1 << 8 != 0);
        features
    }

    /// The features that CPUID.(EAX=1EH,ECX=1), given as `[eax, ebx, ecx, edx]`, reports.
    #[must_use]
    pub fn from_leaf_1e([eax, ..]: [u32; 4]) -> Self {
        Self::from_bits_truncate(eax) & Self::IN_LEAF_1EH
    }

    /// Each feature with its name in the manuals.
    const NAMES: [(Self, &'static str); 10] = [
        (Self::TILE, "AMX-TILE"),
        (Self::INT8, "AMX-INT8"),
        (Self::BF16, "AMX-BF16"),
        (Self::FP16, "AMX-FP16"),
        (Self::COMPLEX, "AMX-COMPLEX"),
        (Self::FP8, "AMX-FP8"),
        (Self::TRANSPOSE, "AMX-TRANSPOSE"),
        (Self::TF32, "AMX-TF32"),
        (Self::AVX512, "AMX-AVX512"),
        (Self::MOVRS, "AMX-MOVRS"),
    ];

    /// The names of the manuals: `AMX-TILE`, `AMX-INT8`, ...
    pub fn names(self) -> impl Iterator<Item = &'static str> {
        Self::NAMES
            .into_iter()
            .filter(move |(feature, _)| self.contains(*feature))
            .map(|(_, name)| name)
    }

    /// The feature of that name: the manual's, `AMX-TILE`, or that of /proc/cpuinfo, `amx_tile`.
    ///
    /// ```
    /// use cpuid_amx::AmxFeatures;
    ///
    /// assert_eq!(AmxFeatures::by_name("AMX-FP16"), Some(AmxFeatures::FP16));
    /// assert_eq!(AmxFeatures::by_name("amx_fp16"), Some(AmxFeatures::FP16));
    /// assert_eq!(AmxFeatures::by_name("avx512_fp16"), None);
    /// ```
    #[must_use]
    pub fn by_name(name: &str) -> Option<Self> {
        let same = |known: &str| {
            known.len() == name.len()
                && known.bytes().zip(name.bytes()).all(|(ours, theirs)| {
                    ours.eq_ignore_ascii_case(&theirs) || ours == b'-' && theirs == b'_'
                })
        };
        Self::NAMES
            .into_iter()
            .find(|(_, known)| same(known))
            .map(|(feature, _)| feature)
    }

    /// All features that software finds: those of leaf 7 and of leaf 1EH, each sub-leaf only where
    /// sub-leaf 0 says that it is there, each leaf only up to CPUID.0H:EAX.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let leaves = Leaves::read(&mut cpuid);
        leaves.enumerated_7() | leaves.enumerated_1e()
    }
}

impl fmt::Display for AmxFeatures {
    /// The names of the manuals, joined by `, `; `none` where there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for name in self.names() {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        if separator.is_empty() {
            f.write_str("none")?;
        }
        Ok(())
    }
}

/// The largest tiles that the multiply unit takes, CPUID.(EAX=1EH,ECX=0):EBX.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TmulLimits {
    /// Most rows or columns, EBX\[7:0\] (`tmul_maxk`).
    pub maxk: u8,
    /// Most bytes of a column, EBX\[23:8\] (`tmul_maxn`).
    pub maxn: u16,
}

impl TmulLimits {
    /// Reads CPUID.(EAX=1EH,ECX=0), given as `[eax, ebx, ecx, edx]`. `None` where either limit is
    /// 0: there is no multiply unit.
    ///
    /// ```
    /// use cpuid_amx::TmulLimits;
    ///
    /// let limits = TmulLimits::from_leaf([0, 0x4010, 0, 0]);
    /// assert_eq!(limits, Some(TmulLimits { maxk: 16, maxn: 64 }));
    /// assert_eq!(TmulLimits::from_leaf([0; 4]), None);
    /// ```
    #[must_use]
    pub const fn from_leaf([_, ebx, ..]: [u32; 4]) -> Option<Self> {
        let [maxk, low, high, _] = ebx.to_le_bytes();
        let maxn = u16::from_le_bytes([low, high]);
        if maxk == 0 || maxn == 0 {
            return None;
        }
        Some(Self { maxk, maxn })
    }
}

impl fmt::Display for TmulLimits {
    /// `maxk 16, maxn 64`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "maxk {}, maxn {}", self.maxk, self.maxn)
    }
}

/// The palettes of CPUID.1DH in ascending order; empty where the leaf is not there.
///
/// Unlike [`Layout::palettes`](xsave_state::Layout::palettes) it does not ask whether 0DH has the
/// components.
///
/// # Errors
///
/// [`LayoutError::TooManyPalettes`] or [`LayoutError::Palette`].
pub fn palettes(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Result<Vec<Palette>, LayoutError> {
    let [max_leaf, ..] = cpuid(0, 0);
    if max_leaf < LEAF_TILES {
        return Ok(Vec::new());
    }
    let [max_palette, ..] = cpuid(LEAF_TILES, 0);
    if max_palette > MAX_PALETTES {
        return Err(LayoutError::TooManyPalettes { max_palette });
    }
    (1..=max_palette)
        .map(|number| {
            let id = u8::try_from(number).unwrap_or(u8::MAX);
            Ok(Palette::from_leaf(id, cpuid(LEAF_TILES, number))?)
        })
        .collect()
}

/// AMX as CPUID describes it, and whether software can use it.
///
/// ```
/// use cpuid_amx::{Amx, CpuidTable, Table, Unusable};
///
/// let mut table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
/// assert_eq!(amx.usable(), Ok(()));
/// assert_eq!(amx.palettes()[0].tiles(), 8);
///
/// // Without permission KVM leaves the components out, and nothing else.
/// table.set_leaf(0xd, 0, [0x2e7, 0xa88, 0xa88, 0])?;
/// let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
/// assert!(matches!(amx.usable(), Err(Unusable::NoComponents { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Amx {
    features: AmxFeatures,
    components: XFeatures,
    xsave: bool,
    xfd: bool,
    palettes: Result<Vec<Palette>, LayoutError>,
    tmul: Option<TmulLimits>,
    max_leaf: u32,
}

impl Amx {
    /// Reads leaves 0, 1, 7, 0DH, 1DH and 1EH through `cpuid(leaf, subleaf)`, which gives
    /// `[eax, ebx, ecx, edx]`, and zeros for what is not there. No input makes it panic.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let leaves = Leaves::read(&mut cpuid);
        let has_xsave_leaf = leaves.max_leaf >= LEAF_XSAVE;
        let [xsave_features, ..] = leaves.xsave_1;
        Self {
            features: leaves.enumerated_7() | leaves.enumerated_1e(),
            components: if has_xsave_leaf {
                leaves.user() & XFeatures::AMX
            } else {
                XFeatures::empty()
            },
            xsave: leaves.has_xsave(),
            xfd: has_xsave_leaf && xsave_features & 1 << 4 != 0,
            palettes: palettes(&mut cpuid),
            tmul: TmulLimits::from_leaf(leaves.tmul_0).filter(|_| leaves.max_leaf >= LEAF_TMUL),
            max_leaf: leaves.max_leaf,
        }
    }

    /// What there is of AMX.
    #[must_use]
    pub const fn features(&self) -> AmxFeatures {
        self.features
    }

    /// Which of [`XFeatures::AMX`] XCR0 can enable, CPUID.(EAX=0DH,ECX=0):EAX.
    #[must_use]
    pub const fn components(&self) -> XFeatures {
        self.components
    }

    /// Whether there is IA32_XFD, CPUID.(EAX=0DH,ECX=1):EAX\[4\]. Tiles work without it, but Linux
    /// gives them to processes only with it (arch/x86/kernel/fpu/xstate.c,
    /// `fpu__init_system_xstate`).
    #[must_use]
    pub const fn has_xfd(&self) -> bool {
        self.xfd
    }

    /// The palettes in ascending order; empty where there are none or where one cannot exist.
    #[must_use]
    pub fn palettes(&self) -> &[Palette] {
        self.palettes.as_deref().unwrap_or_default()
    }

    /// The limits of the multiply unit; `None` where there is none.
    #[must_use]
    pub const fn tmul(&self) -> Option<TmulLimits> {
        self.tmul
    }

    /// Whether software that goes by CPUID can use tiles.
    ///
    /// # Errors
    ///
    /// The first reason why not, in the order in which software looks (SDM Vol. 1 §18.3, §13.2).
    pub fn usable(&self) -> Result<(), Unusable> {
        if !self.features.contains(AmxFeatures::TILE) {
            return Err(Unusable::NoTile {
                features: self.features,
            });
        }
        if !self.xsave {
            return Err(Unusable::NoXsave);
        }
        if self.components != XFeatures::AMX {
            return Err(Unusable::NoComponents {
                components: self.components,
            });
        }
        match &self.palettes {
            Err(error) => Err(Unusable::Palettes(*error)),
            Ok(palettes) if palettes.is_empty() => Err(Unusable::NoPalette {
                max_leaf: self.max_leaf,
            }),
            Ok(_) => Ok(()),
        }
    }
}

/// Why software that goes by CPUID cannot use tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum Unusable {
    /// There is no AMX: CPUID.(EAX=07H,ECX=0):EDX.AMX-TILE\[24\] is clear.
    #[error("CPUID.7.0:EDX.AMX-TILE[24] is 0 (other AMX features: {features})")]
    NoTile {
        /// Those that are there nevertheless.
        features: AmxFeatures,
    },
    /// There is no XSAVE: CPUID.1:ECX.XSAVE\[26\] is clear.
    #[error("CPUID.1:ECX.XSAVE[26] is 0, and tiles need XCR0")]
    NoXsave,
    /// XCR0 cannot enable both components, CPUID.(EAX=0DH,ECX=0):EAX.
    #[error("CPUID.0DH.0 has {components}; tiles need XTILECFG and XTILEDATA")]
    NoComponents {
        /// Which of the two are there.
        components: XFeatures,
    },
    /// There is no palette, CPUID.(EAX=1DH,ECX=0):EAX.
    #[error("CPUID.1DH has no palette (the highest basic leaf is {max_leaf:#x})")]
    NoPalette {
        /// CPUID.0H:EAX.
        max_leaf: u32,
    },
    /// CPUID.1DH describes palettes that cannot exist.
    #[error(transparent)]
    Palettes(LayoutError),
}

/// The leaves that describe AMX, as they are in a table.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Leaves {
    pub(crate) max_leaf: u32,
    pub(crate) leaf_1: [u32; 4],
    pub(crate) leaf_7_0: [u32; 4],
    pub(crate) leaf_7_1: [u32; 4],
    pub(crate) xsave_0: [u32; 4],
    pub(crate) xsave_1: [u32; 4],
    pub(crate) tile_data: [u32; 4],
    pub(crate) tiles_0: [u32; 4],
    pub(crate) tmul_0: [u32; 4],
    pub(crate) tmul_1: [u32; 4],
}

impl Leaves {
    pub(crate) fn read(cpuid: &mut impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let [max_leaf, ..] = cpuid(0, 0);
        Self {
            max_leaf,
            leaf_1: cpuid(1, 0),
            leaf_7_0: cpuid(LEAF_7, 0),
            leaf_7_1: cpuid(LEAF_7, 1),
            xsave_0: cpuid(LEAF_XSAVE, 0),
            xsave_1: cpuid(LEAF_XSAVE, 1),
            tile_data: cpuid(LEAF_XSAVE, 18),
            tiles_0: cpuid(LEAF_TILES, 0),
            tmul_0: cpuid(LEAF_TMUL, 0),
            tmul_1: cpuid(LEAF_TMUL, 1),
        }
    }

    pub(crate) fn has_xsave(&self) -> bool {
        let [_, _, ecx, _] = self.leaf_1;
        ecx & XSAVE_BIT != 0
    }

    /// CPUID.(EAX=0DH,ECX=0):EDX:EAX
    pub(crate) fn user(&self) -> XFeatures {
        let [low, _, _, high] = self.xsave_0;
        XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
    }

    /// CPUID.(EAX=0DH,ECX=1):EDX:ECX
    pub(crate) fn supervisor(&self) -> XFeatures {
        let [_, _, low, high] = self.xsave_1;
        XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
    }

    /// The AMX features of leaf 7, whether software would look there or not.
    pub(crate) fn in_leaf_7(&self) -> AmxFeatures {
        AmxFeatures::from_leaf_7(self.leaf_7_0, self.leaf_7_1)
    }

    pub(crate) fn enumerated_7(&self) -> AmxFeatures {
        let [max_subleaf, ..] = self.leaf_7_0;
        if self.max_leaf < LEAF_7 {
            AmxFeatures::empty()
        } else if max_subleaf < 1 {
            AmxFeatures::from_leaf_7(self.leaf_7_0, [0; 4])
        } else {
            self.in_leaf_7()
        }
    }

    pub(crate) fn enumerated_1e(&self) -> AmxFeatures {
        if self.has_tmul_1() {
            AmxFeatures::from_leaf_1e(self.tmul_1)
        } else {
            AmxFeatures::empty()
        }
    }

    /// Sub-leaf 1 is there where sub-leaf 0 gives it as the highest in EAX, and it says something.
    /// Sapphire Rapids and Granite Rapids have sub-leaf 0 only. KVM before it knew sub-leaf 1 (up to
    /// about Linux 6.18) passes EAX of newer processors on, and no sub-leaf 1 (arch/x86/kvm/cpuid.c,
    /// `__do_cpuid_func`): leaf 7 alone counts there.
    pub(crate) fn has_tmul_1(&self) -> bool {
        let [max_subleaf, ..] = self.tmul_0;
        self.max_leaf >= LEAF_TMUL && max_subleaf >= 1 && self.tmul_1 != [0; 4]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::table::{CpuidTable, Table};

    fn example() -> Table {
        crate::dump::EXAMPLE.parse().unwrap()
    }

    fn amx(table: &Table) -> Amx {
        Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf))
    }

    fn changed(leaf: u32, subleaf: u32, value: [u32; 4]) -> Amx {
        let mut table = example();
        table.set_leaf(leaf, subleaf, value).unwrap();
        amx(&table)
    }

    #[test]
    fn sapphire_rapids() {
        let amx = amx(&example());
        assert_eq!(
            amx.features(),
            AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16
        );
        assert_eq!(amx.components(), XFeatures::AMX);
        assert!(amx.has_xfd());
        assert_eq!(amx.palettes().len(), 1);
        assert_eq!(amx.tmul(), Some(TmulLimits { maxk: 16, maxn: 64 }));
        assert_eq!(amx.usable(), Ok(()));
    }

    #[test]
    fn each_bit_is_its_feature() {
        let zero = [0; 4];
        for (subleaf_0, subleaf_1, feature) in [
            ([0, 0, 0, 1 << 22], zero, AmxFeatures::BF16),
            ([0, 0, 0, 1 << 24], zero, AmxFeatures::TILE),
            ([0, 0, 0, 1 << 25], zero, AmxFeatures::INT8),
            (zero, [1 << 21, 0, 0, 0], AmxFeatures::FP16),
            (zero, [0, 0, 0, 1 << 8], AmxFeatures::COMPLEX),
            (
                [u32::MAX, u32::MAX, u32::MAX, 0],
                zero,
                AmxFeatures::empty(),
            ),
            (zero, [0, u32::MAX, u32::MAX, 0], AmxFeatures::empty()),
        ] {
            assert_eq!(AmxFeatures::from_leaf_7(subleaf_0, subleaf_1), feature);
        }
        for (bit, feature) in [
            AmxFeatures::INT8,
            AmxFeatures::BF16,
            AmxFeatures::COMPLEX,
            AmxFeatures::FP16,
            AmxFeatures::FP8,
            AmxFeatures::TRANSPOSE,
            AmxFeatures::TF32,
            AmxFeatures::AVX512,
            AmxFeatures::MOVRS,
        ]
        .into_iter()
        .enumerate()
        {
            assert_eq!(AmxFeatures::from_leaf_1e([1 << bit, 0, 0, 0]), feature);
        }
        assert_eq!(
            AmxFeatures::from_leaf_1e([!0x1ff, u32::MAX, u32::MAX, u32::MAX]),
            AmxFeatures::empty()
        );
        assert_eq!(
            AmxFeatures::all().to_string(),
            "AMX-TILE, AMX-INT8, AMX-BF16, AMX-FP16, AMX-COMPLEX, AMX-FP8, AMX-TRANSPOSE, \
             AMX-TF32, AMX-AVX512, AMX-MOVRS"
        );
        assert_eq!(AmxFeatures::empty().to_string(), "none");
    }

    #[test]
    fn features_count_only_where_cpuid_says_that_they_are_there() {
        let features = |table: &Table| AmxFeatures::from_cpuid(|l, s| table.leaf(l, s));
        let mut table = example();
        table.set_leaf(7, 1, [1 << 21, 0, 0, 1 << 8]).unwrap();
        table.set_leaf(0x1e, 0, [1, 0x4010, 0, 0]).unwrap();
        table.set_leaf(0x1e, 1, [0x1f0, 0, 0, 0]).unwrap();
        assert_eq!(features(&table), AmxFeatures::all());

        let [_, b, c, d] = table.leaf(7, 0);
        let mut no_7_1 = table.clone();
        no_7_1.set_leaf(7, 0, [0, b, c, d]).unwrap();
        let in_7_1 = AmxFeatures::FP16 | AmxFeatures::COMPLEX;
        assert_eq!(features(&no_7_1), AmxFeatures::all() - in_7_1);

        let leaf_7 = AmxFeatures::ALIASED | AmxFeatures::TILE;
        let mut no_1e_1 = table.clone();
        no_1e_1.set_leaf(0x1e, 0, [0, 0x4010, 0, 0]).unwrap();
        assert_eq!(features(&no_1e_1), leaf_7);
        table.set_leaf(0, 0, [0x1d, 0, 0, 0]).unwrap();
        assert_eq!(features(&table), leaf_7);
        assert_eq!(amx(&table).tmul(), None);
        table.set_leaf(0, 0, [6, 0, 0, 0]).unwrap();
        assert_eq!(features(&table), AmxFeatures::empty());
    }

    #[test]
    fn each_reason_has_its_name() {
        assert_eq!(
            changed(7, 0, [2, 0, 0, 1 << 25]).usable(),
            Err(Unusable::NoTile {
                features: AmxFeatures::INT8
            })
        );
        assert_eq!(
            changed(1, 0, [0, 0, !XSAVE_BIT, 0]).usable(),
            Err(Unusable::NoXsave)
        );
        for (eax, components) in [
            (0x402e7, XFeatures::XTILEDATA),
            (0x202e7, XFeatures::XTILECFG),
            (0x2e7, XFeatures::empty()),
        ] {
            assert_eq!(
                changed(0xd, 0, [eax, 0x2b00, 0x2b00, 0]).usable(),
                Err(Unusable::NoComponents { components })
            );
        }
        assert_eq!(
            changed(0, 0, [0xc, 0, 0, 0]).usable(),
            Err(Unusable::NoComponents {
                components: XFeatures::empty()
            })
        );
        assert!(!changed(0, 0, [0xc, 0, 0, 0]).has_xfd());
        assert!(!changed(0xd, 1, [0xf, 0x2a00, 0, 0]).has_xfd());
        assert_eq!(
            changed(0, 0, [0x1c, 0, 0, 0]).usable(),
            Err(Unusable::NoPalette { max_leaf: 0x1c })
        );
        assert_eq!(
            changed(0x1d, 0, [0; 4]).usable(),
            Err(Unusable::NoPalette { max_leaf: 0x20 })
        );
        assert_eq!(
            changed(0x1d, 0, [9, 0, 0, 0]).usable(),
            Err(Unusable::Palettes(LayoutError::TooManyPalettes {
                max_palette: 9
            }))
        );
        let amx = changed(0x1d, 1, [0x0400_2000, 0x0008_0040, 0x11, 0]);
        assert!(matches!(
            amx.usable(),
            Err(Unusable::Palettes(LayoutError::Palette(_)))
        ));
        assert!(amx.palettes().is_empty());
    }

    #[test]
    fn tmul_needs_both_limits() {
        assert_eq!(
            TmulLimits::from_leaf([u32::MAX, 0x10, u32::MAX, u32::MAX]),
            None
        );
        assert_eq!(TmulLimits::from_leaf([0, 0x4000, 0, 0]), None);
        assert_eq!(
            TmulLimits::from_leaf([0, 0xff12_3456, 0, 0]),
            Some(TmulLimits {
                maxk: 0x56,
                maxn: 0x1234
            })
        );
    }
}

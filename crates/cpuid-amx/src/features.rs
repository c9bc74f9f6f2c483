//! The XSAVE and AMX features of a CPUID table as a set: what can be compared between hosts, shared by
//! a fleet, and hidden from a guest.
//!
//! A table says the same thing in many registers. A [`FeatureSet`] says it once, and
//! [`FeatureSet::leaf`] gives the registers that say it: the two cannot come apart.

use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use core::cmp::Ordering;
use core::fmt;

use bitflags::bitflags;
use xsave_state::Palette;
use xsave_state::layout::MAX_PALETTES;
use xsave_state::{ComponentId, XFeatures};

use crate::amx::{
    AmxFeatures, LEAF_7, LEAF_TILES, LEAF_TMUL, LEAF_XSAVE, Leaves, TmulLimits, XSAVE_BIT,
};

use crate::table::{Entry, Table, has_subleaves};

mod closure;
mod registers;

pub(crate) use registers::dependents;

bitflags! {
    /// XSAVE itself, CPUID.1H:ECX\[26\], and what CPUID.(EAX=0DH,ECX=1):EAX has of it.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
    pub struct XsaveFeatures: u32 {
        /// XSAVEOPT, EAX\[0\].
        const XSAVEOPT = 1 << 0;
        /// XSAVEC and the compacted format, EAX\[1\].
        const XSAVEC = 1 << 1;
        /// XGETBV with ECX = 1, EAX\[2\].
        const XGETBV1 = 1 << 2;
        /// XSAVES, XRSTORS and IA32_XSS, EAX\[3\].
        const XSAVES = 1 << 3;
        /// IA32_XFD and IA32_XFD_ERR, EAX\[4\].
        const XFD = 1 << 4;
        /// XSAVE, XRSTOR, XSETBV and XGETBV, CPUID.1H:ECX\[26\].
        const XSAVE = 1 << 31;

        /// Those of CPUID.(EAX=0DH,ECX=1):EAX.
        const IN_0DH = Self::XSAVEOPT.bits()
            | Self::XSAVEC.bits()
            | Self::XGETBV1.bits()
            | Self::XSAVES.bits()
            | Self::XFD.bits();
    }
}

impl XsaveFeatures {
    const NAMES: [(Self, &'static str); 6] = [
        (Self::XSAVE, "XSAVE"),
        (Self::XSAVEOPT, "XSAVEOPT"),
        (Self::XSAVEC, "XSAVEC"),
        (Self::XGETBV1, "XGETBV1"),
        (Self::XSAVES, "XSAVES"),
        (Self::XFD, "XFD"),
    ];

    fn singles(self) -> impl Iterator<Item = Self> {
        Self::NAMES
            .into_iter()
            .map(|(feature, _)| feature)
            .filter(move |feature| self.contains(*feature))
    }
}

impl fmt::Display for XsaveFeatures {
    /// The names of the manuals, joined by `, `; `none` where there is none.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut separator = "";
        for (_, name) in Self::NAMES.iter().filter(|(one, _)| self.contains(*one)) {
            write!(f, "{separator}{name}")?;
            separator = ", ";
        }
        if separator.is_empty() {
            f.write_str("none")?;
        }
        Ok(())
    }
}

/// A state component as CPUID.(EAX=0DH,ECX=n) has it: `[eax, ebx, ecx]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ComponentShape {
    /// Its number.
    pub id: ComponentId,
    /// Its size in bytes, EAX.
    pub size: u32,
    /// Its offset in the standard format in bytes, EBX; 0 for a supervisor component.
    pub offset: u32,
    /// Whether IA32_XSS enables it, not XCR0, ECX\[0\].
    pub supervisor: bool,
    /// Whether the compacted format puts it at a multiple of 64 bytes, ECX\[1\].
    pub aligned: bool,
    /// Whether IA32_XFD can disable it, ECX\[2\].
    pub xfd: bool,
}

impl ComponentShape {
    fn read(id: ComponentId, subleaf: impl FnOnce(u32) -> [u32; 4]) -> Self {
        // x87 and SSE have no sub-leaf of their own, and the same place everywhere.
        let [size, offset, flags, _] = match id {
            ComponentId::X87 => [160, 0, 0, 0],
            ComponentId::SSE => [256, 160, 0, 0],
            _ => subleaf(u32::from(id.number())),
        };
        Self {
            id,
            size,
            offset,
            supervisor: flags & 1 != 0,
            aligned: flags & 1 << 1 != 0,
            xfd: flags & 1 << 2 != 0,
        }
    }
}

impl fmt::Display for ComponentShape {
    /// `XTILEDATA (8192 bytes at 2816, XFD)`
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} bytes", self.id, self.size)?;
        if self.supervisor {
            f.write_str(", supervisor")?;
        } else {
            write!(f, " at {}", self.offset)?;
        }
        if self.xfd {
            f.write_str(", XFD")?;
        }
        f.write_str(")")
    }
}

/// One feature of a [`FeatureSet`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Feature {
    /// One bit of [`XsaveFeatures`].
    Xsave(XsaveFeatures),
    /// A state component at its place: elsewhere, or with another size, it is another feature.
    Component(ComponentShape),
    /// One bit of [`AmxFeatures`].
    Amx(AmxFeatures),
    /// A palette: with other tiles it is another feature.
    Palette(Palette),
    /// Rows that the multiply unit takes at least, `tmul_maxk`.
    TmulRows(u8),
    /// Bytes of a column that the multiply unit takes at least, `tmul_maxn`.
    TmulBytes(u16),
}

impl Feature {
    /// The components without which it cannot be used: itself, those of AMX, or x87 and SSE for a
    /// feature of XSAVE.
    #[must_use]
    pub fn needs(&self) -> XFeatures {
        match self {
            Self::Component(shape) => shape.id.bit(),
            Self::Xsave(XsaveFeatures::XFD)
            | Self::Amx(_)
            | Self::Palette(_)
            | Self::TmulRows(_)
            | Self::TmulBytes(_) => XFeatures::AMX,
            Self::Xsave(_) => XFeatures::LEGACY,
        }
    }

    /// The order of reports: XSAVE, components by number, AMX, palettes, limits.
    fn key(&self) -> (u8, u64, u64, u64) {
        match self {
            Self::Xsave(feature) => (0, feature.bits().into(), 0, 0),
            Self::Component(shape) => (
                1,
                shape.id.number().into(),
                u64::from(shape.offset) << 32 | u64::from(shape.size),
                u64::from(shape.supervisor)
                    | u64::from(shape.aligned) << 1
                    | u64::from(shape.xfd) << 2,
            ),
            Self::Amx(feature) => (2, feature.bits().into(), 0, 0),
            // The rest follows from these.
            Self::Palette(palette) => (
                3,
                palette.id().into(),
                u64::from(palette.tiles()),
                u64::from(palette.rows()) << 16 | u64::from(palette.row_bytes()),
            ),
            Self::TmulRows(rows) => (4, (*rows).into(), 0, 0),
            Self::TmulBytes(bytes) => (5, (*bytes).into(), 0, 0),
        }
    }
}

impl Ord for Feature {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Feature {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl fmt::Display for Feature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Xsave(feature) => feature.fmt(f),
            Self::Component(shape) => shape.fmt(f),
            Self::Amx(feature) => feature.fmt(f),
            Self::Palette(palette) => write!(
                f,
                "palette {} ({} tiles of {} rows of {} bytes)",
                palette.id(),
                palette.tiles(),
                palette.rows(),
                palette.row_bytes()
            ),
            Self::TmulRows(rows) => write!(f, "products of {rows} rows"),
            Self::TmulBytes(bytes) => write!(f, "products of columns of {bytes} bytes"),
        }
    }
}

/// The XSAVE and AMX features of a table.
///
/// ```
/// use cpuid_amx::{CpuidTable, FeatureSet, Table};
///
/// let table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let features = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
/// assert_eq!(features.amx.to_string(), "AMX-TILE, AMX-INT8, AMX-BF16");
/// assert_eq!(features.leaf(0xd, 18), [8192, 2816, 6, 0]);
/// assert!(features.is_closed());
/// # Ok::<(), cpuid_amx::dump::DumpError>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct FeatureSet {
    /// XSAVE and what there is of it.
    pub xsave: XsaveFeatures,
    /// The state components.
    pub components: BTreeMap<ComponentId, ComponentShape>,
    /// The AMX features.
    pub amx: AmxFeatures,
    /// The palettes, from 1 upwards without a gap.
    pub palettes: Vec<Palette>,
    /// The limits of the multiply unit.
    pub tmul: Option<TmulLimits>,
    /// Whether there is CPUID.(EAX=1EH,ECX=1), where the later AMX features are, and the earlier
    /// ones again. Not where it is all zeros.
    pub has_1eh_1: bool,
}

impl FeatureSet {
    /// Reads leaves 0, 1, 7, 0DH, 1DH and 1EH through `cpuid(leaf, subleaf)`, as software finds
    /// them: nothing above the highest leaf or sub-leaf, and of 1DH only what can exist. No input
    /// makes it panic. See [`closed`](Self::closed) for a table that contradicts itself.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Self {
        let leaves = Leaves::read(&mut cpuid);
        let mut set = Self {
            amx: leaves.enumerated_7() | leaves.enumerated_1e(),
            tmul: TmulLimits::from_leaf(leaves.tmul_0).filter(|_| leaves.max_leaf >= LEAF_TMUL),
            has_1eh_1: leaves.has_tmul_1(),
            ..Self::default()
        };
        if set.has_1eh_1 {
            // Both places must say so.
            let differing = leaves.enumerated_7() ^ leaves.enumerated_1e();
            set.amx.remove(differing & AmxFeatures::ALIASED);
        }
        set.xsave.set(XsaveFeatures::XSAVE, leaves.has_xsave());
        if leaves.max_leaf >= LEAF_XSAVE {
            let [eax, ..] = leaves.xsave_1;
            set.xsave |= XsaveFeatures::from_bits_truncate(eax) & XsaveFeatures::IN_0DH;
            let (user, supervisor) = (leaves.user(), leaves.supervisor());
            // What is listed in both is in neither.
            for id in (user ^ supervisor).components() {
                let leaf = |subleaf| cpuid(LEAF_XSAVE, subleaf);
                set.components.insert(id, ComponentShape::read(id, leaf));
            }
            // Without those whose own leaf denies the bitmap that lists them.
            set.components
                .retain(|id, shape| shape.supervisor == supervisor.contains(id.bit()));
        }
        if leaves.max_leaf >= LEAF_TILES {
            let [max_palette, ..] = leaves.tiles_0;
            let count = max_palette.min(MAX_PALETTES);
            set.palettes = (1..=count)
                .map_while(|number| {
                    let id = u8::try_from(number).ok()?;
                    Palette::from_leaf(id, cpuid(LEAF_TILES, number)).ok()
                })
                .collect();
        }
        set
    }

    /// Each feature.
    pub fn iter(&self) -> impl Iterator<Item = Feature> + '_ {
        let amx = self.amx.iter().map(Feature::Amx);
        self.xsave
            .singles()
            .map(Feature::Xsave)
            .chain(self.components.values().copied().map(Feature::Component))
            .chain(amx)
            .chain(self.palettes.iter().copied().map(Feature::Palette))
            .chain(self.tmul.into_iter().flat_map(|limits| {
                [
                    Feature::TmulRows(limits.maxk),
                    Feature::TmulBytes(limits.maxn),
                ]
            }))
    }

    /// Whether a guest that needs this feature finds it here. Larger limits of the multiply unit
    /// serve as well.
    #[must_use]
    pub fn supports(&self, feature: &Feature) -> bool {
        match feature {
            Feature::Xsave(features) => self.xsave.contains(*features),
            Feature::Component(shape) => self.components.get(&shape.id) == Some(shape),
            Feature::Amx(features) => self.amx.contains(*features),
            Feature::Palette(palette) => self.palettes.contains(palette),
            Feature::TmulRows(rows) => self.tmul.is_some_and(|limits| limits.maxk >= *rows),
            Feature::TmulBytes(bytes) => self.tmul.is_some_and(|limits| limits.maxn >= *bytes),
        }
    }

    /// What both have. It may not be [closed](Self::is_closed).
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        Self {
            xsave: self.xsave & other.xsave,
            components: self
                .components
                .iter()
                .filter(|(id, shape)| other.components.get(id) == Some(shape))
                .map(|(id, shape)| (*id, *shape))
                .collect(),
            amx: self.amx & other.amx,
            palettes: self
                .palettes
                .iter()
                .zip(&other.palettes)
                .map_while(|(ours, theirs)| (ours == theirs).then_some(*ours))
                .collect(),
            tmul: self.tmul.zip(other.tmul).map(|(ours, theirs)| TmulLimits {
                maxk: ours.maxk.min(theirs.maxk),
                maxn: ours.maxn.min(theirs.maxn),
            }),
            has_1eh_1: self.has_1eh_1 && other.has_1eh_1,
        }
    }

    /// The components that XCR0 enables.
    #[must_use]
    pub fn user(&self) -> XFeatures {
        self.bitmap(false)
    }

    /// The components that IA32_XSS enables.
    #[must_use]
    pub fn supervisor(&self) -> XFeatures {
        self.bitmap(true)
    }

    fn bitmap(&self, supervisor: bool) -> XFeatures {
        self.components
            .values()
            .filter(|shape| shape.supervisor == supervisor)
            .map(|shape| shape.id.bit())
            .collect()
    }

    /// Without these components; what needs them is still there until it is [closed](Self::closed).
    #[must_use]
    pub fn without_components(mut self, components: XFeatures) -> Self {
        self.components
            .retain(|id, _| !components.contains(id.bit()));
        self
    }

    /// Without AMX, and without XFD if nothing else needs it.
    #[must_use]
    pub fn without_amx(mut self) -> Self {
        self.amx = AmxFeatures::empty();
        self.closed()
    }

    /// The smallest table that says all of it: the leaves of [`leaf`](Self::leaf), and those that
    /// say how many there are. [`from_cpuid`](Self::from_cpuid) of it is the same set, if the set is
    /// [closed](Self::is_closed).
    #[must_use]
    pub fn to_table(&self) -> Table {
        let mut places: Vec<(u32, u32)> =
            [(1, 0), (LEAF_7, 1), (LEAF_TMUL, 0), (LEAF_TMUL, 1)].into();
        places.extend((0..u32::from(ComponentId::COUNT)).map(|subleaf| (LEAF_XSAVE, subleaf)));
        places.extend((0..=MAX_PALETTES).map(|subleaf| (LEAF_TILES, subleaf)));
        let entry = |leaf: u32, subleaf: u32, value| Entry {
            leaf,
            subleaf: has_subleaves(leaf).then_some(subleaf),
            value,
        };
        let [_, ebx, ecx, edx] = self.leaf(LEAF_7, 0);
        let counts = [
            entry(0, 0, [LEAF_TMUL, 0, 0, 0]),
            entry(LEAF_7, 0, [1, ebx, ecx, edx]),
        ];
        places
            .into_iter()
            .map(|(leaf, subleaf)| entry(leaf, subleaf, self.leaf(leaf, subleaf)))
            .filter(|entry| entry.value != [0; 4])
            .chain(counts)
            .collect()
    }

    /// `[eax, ebx, ecx, edx]` of leaf 1, 7, 0DH, 1DH or 1EH, as this set makes them: every bit that
    /// the set does not describe is 0, and so is every other leaf. The sizes in EBX are those with
    /// all components enabled.
    #[must_use]
    pub fn leaf(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        match (leaf, subleaf) {
            (1, _) if self.xsave.contains(XsaveFeatures::XSAVE) => [0, 0, XSAVE_BIT, 0],
            (LEAF_7, 0..=1) => registers::leaf_7(self.amx, subleaf),
            (LEAF_XSAVE, _) => registers::leaf_xsave(self, subleaf),
            (LEAF_TILES, _) => registers::leaf_tiles(self, subleaf),
            (LEAF_TMUL, 0..=1) => registers::leaf_tmul(self, subleaf),
            _ => [0; 4],
        }
    }
}

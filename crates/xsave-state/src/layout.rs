//! Where each state component lies, from CPUID.0DH.
//!
//! Offsets differ between processors (PKRU is at 2688 on Intel's server processors and at 2432 on
//! AMD Zen 4), so they come from CPUID and never from a table.

use alloc::sync::Arc;
use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::header::{EXTENDED_OFFSET, HEADER_BYTES, LEGACY_BYTES};
use crate::legacy::INITIAL_MXCSR;
use crate::relayout::Loss;
use crate::tile::{Palette, PaletteError, TILECFG_BYTES};

/// No area may be larger than this many bytes. The largest known today is 11,008.
pub const MAX_AREA_BYTES: usize = 64 * 1024;
/// CPUID.(EAX=1DH,ECX=0):EAX may name at most this many palettes. There is one today.
pub const MAX_PALETTES: u32 = 8;

const SLOTS: usize = ComponentId::COUNT as usize;
const CPUID_XSAVE: u32 = 0xd;
const CPUID_TILES: u32 = 0x1d;
const CPUID_EXTENDED: u32 = 0x8000_0000;
const CPUID_EXTENDED_FEATURES: u32 = 0x8000_0001;
/// What every processor with XSAVE implements: bits 0 to 15 (SDM Vol. 1 §10.2.3, §11.6.6).
const MXCSR_MASK: u32 = 0xffff;
/// What a mask of 0 stands for: all but MXCSR.DAZ, which the first processors with SSE do not have.
const MXCSR_MASK_OF_0: u32 = 0xffbf;
/// MXCSR.MM, there where CPUID.80000001H:ECX.MisAlignSse\[7\] is set (AMD APM Vol. 1 §4.2.2).
const MXCSR_MM: u32 = 1 << 17;

/// Whether a component is managed by XCR0 or by IA32_XSS, and where it lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ComponentKind {
    /// Enabled in XCR0; part of the standard format.
    User {
        /// Offset in the standard format in bytes, CPUID.(EAX=0DH,ECX=n):EBX.
        offset: usize,
    },
    /// Enabled in IA32_XSS; in the compacted format only.
    Supervisor,
}

/// One state component as CPUID.(EAX=0DH,ECX=n) describes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Component {
    id: ComponentId,
    size: usize,
    kind: ComponentKind,
    aligned: bool,
    xfd: bool,
}

impl Component {
    /// Its number.
    #[must_use]
    pub const fn id(&self) -> ComponentId {
        self.id
    }

    /// Its size in bytes, CPUID.(EAX=0DH,ECX=n):EAX.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// User with its offset, or supervisor, CPUID.(EAX=0DH,ECX=n):ECX\[0\].
    #[must_use]
    pub const fn kind(&self) -> ComponentKind {
        self.kind
    }

    /// Offset in the standard format in bytes; `None` for a supervisor component.
    #[must_use]
    pub const fn offset(&self) -> Option<usize> {
        match self.kind {
            ComponentKind::User { offset } => Some(offset),
            ComponentKind::Supervisor => None,
        }
    }

    /// Whether the compacted format puts it at a multiple of 64 bytes,
    /// CPUID.(EAX=0DH,ECX=n):ECX\[1\].
    #[must_use]
    pub const fn is_aligned(&self) -> bool {
        self.aligned
    }

    /// Whether IA32_XFD can disable it, CPUID.(EAX=0DH,ECX=n):ECX\[2\].
    #[must_use]
    pub const fn has_xfd(&self) -> bool {
        self.xfd
    }

    pub(crate) fn range(&self) -> Option<core::ops::Range<usize>> {
        let offset = self.offset()?;
        Some(offset..offset.saturating_add(self.size))
    }
}

/// The state components of a processor or a guest: number, size, offset, alignment and kind of each.
///
/// Built from CPUID once; cloning it costs a reference count.
///
/// ```
/// use xsave_state::{ComponentId, Layout, XFeatures};
///
/// // Any source of CPUID will do: the processor, KVM's table, a snapshot, a file.
/// fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
///     match (leaf, subleaf) {
///         (0, _) => [0xd, 0, 0, 0],
///         (0xd, 0) => [0x7, 832, 832, 0],
///         (0xd, 1) => [0xf, 832, 0, 0],
///         (0xd, 2) => [256, 576, 0, 0],
///         _ => [0; 4],
///     }
/// }
///
/// let layout = Layout::from_cpuid(cpuid)?;
/// assert_eq!(layout.user().to_string(), "x87 | SSE | AVX (0x7)");
/// assert_eq!(layout.component(ComponentId::AVX).unwrap().offset(), Some(576));
/// assert_eq!(layout.standard_size(), 832);
/// # Ok::<(), xsave_state::LayoutError>(())
/// ```
#[derive(Clone, PartialEq, Eq)]
pub struct Layout(Arc<Inner>);

#[derive(Clone, PartialEq, Eq)]
struct Inner {
    components: [Option<Component>; SLOTS],
    user: XFeatures,
    supervisor: XFeatures,
    xfd: XFeatures,
    standard_size: usize,
    mxcsr_mask: u32,
    palettes: Vec<Palette>,
}

impl Layout {
    /// Reads leaves 0, 0DH, 1DH and 80000001H through `cpuid(leaf, subleaf)`, which gives
    /// `[eax, ebx, ecx, edx]`, and zeros for what is not there.
    ///
    /// CPUID may be the host's or the guest's: what the guest cannot have does not belong into its
    /// layout. CPUID.0DH.0:EBX is not used, because it depends on the current XCR0. The MXCSR mask
    /// is 0xffff, with MXCSR.MM where this CPUID has misaligned SSE;
    /// [`with_mxcsr_mask_of`](Self::with_mxcsr_mask_of) takes the host's, which is what counts where
    /// a guest's CPUID hides it.
    ///
    /// # Errors
    ///
    /// The leaves describe an area that cannot exist: see [`LayoutError`]. No input makes it panic,
    /// and it allocates a constant amount.
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Result<Self, LayoutError> {
        let [max_leaf, ..] = cpuid(0, 0);
        if max_leaf < CPUID_XSAVE {
            return Err(LayoutError::NoXsaveLeaf { max_leaf });
        }
        let [low, _, reported_size, high] = cpuid(CPUID_XSAVE, 0);
        let user = bitmap(low, high);
        if !user.contains(XFeatures::LEGACY) {
            return Err(LayoutError::NoLegacy { user });
        }
        let [xsave_features, _, low, high] = cpuid(CPUID_XSAVE, 1);
        let supervisor = bitmap(low, high);
        let both = user & supervisor;
        if !both.is_empty() {
            return Err(LayoutError::UserAndSupervisor { both });
        }
        let beyond = (user | supervisor).bits() >> ComponentId::COUNT;
        if beyond != 0 {
            return Err(LayoutError::Bit63 { user, supervisor });
        }

        let mut components = [None; SLOTS];
        for (number, slot) in (0..).zip(&mut components) {
            let Some(id) = ComponentId::new(number) else {
                break;
            };
            *slot = legacy_component(id);
            if slot.is_none() && (user | supervisor).contains(id.bit()) {
                let leaf = cpuid(CPUID_XSAVE, u32::from(number));
                *slot = Some(component(id, leaf, supervisor.contains(id.bit()))?);
            }
        }
        let standard_size = check_places(&components, reported_size)?;
        check_compacted(&components)?;

        // CPUID.0DH.1:EAX.XFD[4]: without it there is no IA32_XFD to disable anything.
        let mut xfd = XFeatures::empty();
        if xsave_features & 1 << 4 != 0 {
            for component in components.iter().flatten().filter(|c| c.xfd) {
                xfd |= component.id.bit();
            }
        }

        let palettes = palettes(max_leaf, &components, &mut cpuid)?;
        let mut mxcsr_mask = MXCSR_MASK;
        let [max_extended, ..] = cpuid(CPUID_EXTENDED, 0);
        if max_extended >= CPUID_EXTENDED_FEATURES {
            let [_, _, ecx, _] = cpuid(CPUID_EXTENDED_FEATURES, 0);
            if ecx & 1 << 7 != 0 {
                mxcsr_mask |= MXCSR_MM;
            }
        }
        Ok(Self(Arc::new(Inner {
            components,
            user,
            supervisor,
            xfd,
            standard_size,
            mxcsr_mask,
            palettes,
        })))
    }

    /// x87 and SSE alone: the layout of a guest whose CPUID has no XSAVE. KVM saves and restores such
    /// a vCPU in the same area, of which 576 bytes mean something (SDM Vol. 1 §13.4.1).
    ///
    /// [`from_cpuid`](Self::from_cpuid) does not choose it by itself: zeros where leaf 0DH should be
    /// are more often a table that was looked up in the wrong way.
    ///
    /// ```
    /// use xsave_state::{Layout, LayoutError, XFeatures};
    ///
    /// # let cpuid = |_: u32, _: u32| [0; 4];
    /// let layout = match Layout::from_cpuid(cpuid) {
    ///     Err(LayoutError::NoXsaveLeaf { .. }) => Layout::legacy(),
    ///     other => other?,
    /// };
    /// assert_eq!(layout.user(), XFeatures::X87 | XFeatures::SSE);
    /// assert_eq!(layout.standard_size(), 576);
    /// # Ok::<(), LayoutError>(())
    /// ```
    #[must_use]
    pub fn legacy() -> Self {
        let mut components = [None; SLOTS];
        for (number, slot) in (0..).zip(&mut components) {
            *slot = ComponentId::new(number).and_then(legacy_component);
        }
        Self(Arc::new(Inner {
            components,
            user: XFeatures::LEGACY,
            supervisor: XFeatures::empty(),
            xfd: XFeatures::empty(),
            standard_size: EXTENDED_OFFSET,
            mxcsr_mask: MXCSR_MASK,
            palettes: Vec::new(),
        }))
    }

    /// The same layout with another mask of valid MXCSR bits: bytes 28 to 31 of an area that the
    /// processor wrote with FXSAVE or XSAVE, where a VMM knows better than CPUID.
    ///
    /// 0 stands for 0xffbf, as there (SDM Vol. 1 §11.6.6). The bits of the initial MXCSR, 0x1f80,
    /// belong to every mask.
    #[must_use]
    pub fn with_mxcsr_mask(mut self, mask: u32) -> Self {
        let mask = if mask == 0 { MXCSR_MASK_OF_0 } else { mask };
        Arc::make_mut(&mut self.0).mxcsr_mask = mask | INITIAL_MXCSR;
        self
    }

    /// The same layout with the MXCSR mask of `host`, where the guest's CPUID hides what the host's
    /// processor has: LDMXCSR goes by the processor, so a guest on AMD's can set MXCSR.MM without
    /// seeing MisAlignSse, and its state would not be valid.
    ///
    /// `host` is the layout of KVM_GET_SUPPORTED_CPUID.
    ///
    /// ```
    /// # use xsave_state::{Image, ImageError, Layout};
    /// # fn demo(area: &[u8], host: &Layout) -> Result<(), ImageError> {
    /// let layout = Layout::legacy().with_mxcsr_mask_of(host);
    /// let image = Image::parse(area, &layout)?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn with_mxcsr_mask_of(self, host: &Self) -> Self {
        self.with_mxcsr_mask(host.mxcsr_mask())
    }

    /// The same layout with the tile palettes of `host`, where the guest's CPUID hides leaf 1DH: that
    /// does not keep the guest from configuring tiles, and without palettes no configuration is
    /// valid. A layout without XTILECFG has none and stays as it is.
    ///
    /// Better is a guest that has the leaf, because its programs look there for what they may
    /// configure.
    ///
    /// ```
    /// # use xsave_state::{Image, Layout, LayoutError};
    /// # fn demo(area: &[u8], guest: Layout, host: &Layout) -> Result<(), Box<dyn std::error::Error>> {
    /// let layout = guest.with_palettes_of(host)?;
    /// let image = Image::parse(area, &layout)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    ///
    /// The tiles of a palette do not fit into this layout's XTILEDATA.
    pub fn with_palettes_of(mut self, host: &Self) -> Result<Self, LayoutError> {
        if self.component(ComponentId::XTILECFG).is_none() {
            return Ok(self);
        }
        let data = self.component(ComponentId::XTILEDATA);
        for palette in host.palettes() {
            require_room(palette, data)?;
        }
        Arc::make_mut(&mut self.0).palettes = host.palettes().to_vec();
        Ok(self)
    }

    /// The components that XCR0 can enable, CPUID.(EAX=0DH,ECX=0):EDX:EAX.
    #[must_use]
    pub fn user(&self) -> XFeatures {
        self.0.user
    }

    /// The components that IA32_XSS can enable, CPUID.(EAX=0DH,ECX=1):EDX:ECX.
    #[must_use]
    pub fn supervisor(&self) -> XFeatures {
        self.0.supervisor
    }

    /// The components that IA32_XFD can disable. Empty without CPUID.(EAX=0DH,ECX=1):EAX.XFD\[4\].
    #[must_use]
    pub fn xfd(&self) -> XFeatures {
        self.0.xfd
    }

    /// The component of that number, where this layout has it.
    #[must_use]
    pub fn component(&self, id: ComponentId) -> Option<&Component> {
        self.0.components.get(usize::from(id.number()))?.as_ref()
    }

    /// All components, user and supervisor, in ascending order of their numbers.
    pub fn components(&self) -> impl Iterator<Item = &Component> {
        self.0.components.iter().flatten()
    }

    /// Bytes of the standard format with all user components: the legacy region, the header, and up
    /// to the end of the component that ends last. It is what CPUID.(EAX=0DH,ECX=0):ECX should say.
    #[must_use]
    pub fn standard_size(&self) -> usize {
        self.0.standard_size
    }

    /// Bytes of the standard format up to the end of the last of `features`.
    /// Components that the layout does not have are left out.
    #[must_use]
    pub fn standard_size_of(&self, features: XFeatures) -> usize {
        features
            .components()
            .filter_map(|id| self.component(id)?.range())
            .map(|range| range.end)
            .max()
            .unwrap_or(EXTENDED_OFFSET)
            .max(EXTENDED_OFFSET)
    }

    /// Where each of `features` lies in the compacted format when XCOMP_BV is `features`
    /// (SDM Vol. 1 §13.4.3): ascending from byte 576, aligned ones at multiples of 64 bytes. Legacy
    /// components, and those that the layout does not have, are left out.
    pub fn compacted(
        &self,
        features: XFeatures,
    ) -> impl Iterator<Item = (&Component, core::ops::Range<usize>)> {
        let mut next = EXTENDED_OFFSET;
        (features - XFeatures::LEGACY)
            .components()
            .filter_map(|id| self.component(id))
            .map(move |component| {
                let start = if component.aligned {
                    next.next_multiple_of(64)
                } else {
                    next
                };
                next = start.saturating_add(component.size);
                (component, start..next)
            })
    }

    /// Bytes of the compacted format when XCOMP_BV is `features`.
    #[must_use]
    pub fn compacted_size(&self, features: XFeatures) -> usize {
        self.compacted(features)
            .last()
            .map_or(EXTENDED_OFFSET, |(_, range)| range.end)
    }

    /// The MXCSR bits that may be set.
    #[must_use]
    pub fn mxcsr_mask(&self) -> u32 {
        self.0.mxcsr_mask
    }

    /// The tile palettes of CPUID.1DH in ascending order; none without XTILECFG.
    #[must_use]
    pub fn palettes(&self) -> &[Palette] {
        &self.0.palettes
    }

    /// Which of the components `in_use` are not in `target`, or not at the same place with the same
    /// size. Others do not matter: their bytes mean nothing.
    ///
    /// Whether a state fits depends on more than places: see
    /// [`ExtendedState::misfits`](crate::ExtendedState::misfits), which has all of it.
    pub fn misfits(&self, target: &Self, in_use: XFeatures) -> impl Iterator<Item = Misfit> {
        (in_use - XFeatures::LEGACY).components().filter_map(|id| {
            let Some(theirs) = target.component(id).filter(|c| c.offset().is_some()) else {
                return Some(Misfit::Missing { component: id });
            };
            let ours = self.component(id)?;
            if ours.size != theirs.size {
                return Some(Misfit::Size {
                    component: id,
                    source_bytes: ours.size,
                    target_bytes: theirs.size,
                });
            }
            let (source_offset, target_offset) = (ours.offset()?, theirs.offset()?);
            (source_offset != target_offset).then_some(Misfit::Offset {
                component: id,
                source_offset,
                target_offset,
            })
        })
    }
}

impl fmt::Debug for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Layout")
            .field("user", &format_args!("{}", self.user()))
            .field("supervisor", &format_args!("{}", self.supervisor()))
            .field("xfd", &format_args!("{}", self.xfd()))
            .field("standard_size", &self.standard_size())
            .field("mxcsr_mask", &format_args!("{:#x}", self.mxcsr_mask()))
            .finish_non_exhaustive()
    }
}

fn bitmap(low: u32, high: u32) -> XFeatures {
    XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
}

/// Offset and size of the two components that every processor has at the same place. Bytes 24 to 31
/// (MXCSR and its mask) lie within the first and belong to SSE and AVX (SDM Vol. 1 §13.4.1).
fn legacy_component(id: ComponentId) -> Option<Component> {
    let (offset, size) = match id {
        ComponentId::X87 => (0, 160),
        ComponentId::SSE => (160, 256),
        _ => return None,
    };
    Some(Component {
        id,
        size,
        kind: ComponentKind::User { offset },
        aligned: false,
        xfd: false,
    })
}

/// The size of components whose content this crate or its users read, by the architecture
/// (SDM Vol. 1 §13.5). XTILEDATA's follows from the palette.
fn architectural_size(id: ComponentId) -> Option<usize> {
    Some(match id.number() {
        2 => 256,
        3 | 4 => 64,
        5 => 64,
        6 => 512,
        7 => 1024,
        9 => 8,
        17 => TILECFG_BYTES,
        _ => return None,
    })
}

fn component(
    id: ComponentId,
    [eax, ebx, ecx, _]: [u32; 4],
    supervisor: bool,
) -> Result<Component, LayoutError> {
    let size = usize::try_from(eax).unwrap_or(usize::MAX);
    if size == 0 {
        return Err(LayoutError::NoSize { component: id });
    }
    if (ecx & 1 != 0) != supervisor {
        return Err(LayoutError::Kind {
            component: id,
            listed_as_supervisor: supervisor,
        });
    }
    // AMD Zen 2, which has no PKRU to enable, lists it with 64 bytes.
    let zen_2_pkru = id == ComponentId::PKRU && size == 64;
    if let Some(expected_bytes) = architectural_size(id).filter(|&expected| expected != size)
        && !zen_2_pkru
    {
        return Err(LayoutError::Size {
            component: id,
            expected_bytes,
            actual_bytes: size,
        });
    }
    let kind = if supervisor {
        ComponentKind::Supervisor
    } else {
        let offset = usize::try_from(ebx).unwrap_or(usize::MAX);
        if offset < EXTENDED_OFFSET {
            return Err(LayoutError::OffsetInHeader {
                component: id,
                offset,
            });
        }
        ComponentKind::User { offset }
    };
    let end = match kind {
        ComponentKind::User { offset } => offset.saturating_add(size),
        ComponentKind::Supervisor => size,
    };
    if end > MAX_AREA_BYTES {
        return Err(LayoutError::TooLarge {
            component: id,
            end_bytes: end,
        });
    }
    Ok(Component {
        id,
        size,
        kind,
        aligned: ecx & 1 << 1 != 0,
        xfd: ecx & 1 << 2 != 0,
    })
}

/// User components must not overlap, and CPUID.0DH.0:ECX must have room for all. Gives the size.
fn check_places(
    components: &[Option<Component>; SLOTS],
    reported_size: u32,
) -> Result<usize, LayoutError> {
    let mut end = EXTENDED_OFFSET;
    for (index, second) in components.iter().flatten().enumerate() {
        let Some(range) = second.range() else {
            continue;
        };
        for first in components.iter().flatten().take(index) {
            let Some(other) = first.range() else {
                continue;
            };
            if range.start < other.end && other.start < range.end {
                return Err(LayoutError::Overlap {
                    first: first.id,
                    first_offset: other.start,
                    second: second.id,
                    second_offset: range.start,
                });
            }
        }
        end = end.max(range.end);
    }
    let reported_bytes = usize::try_from(reported_size).unwrap_or(usize::MAX);
    if reported_bytes < end {
        return Err(LayoutError::AreaTooSmall {
            reported_bytes,
            required_bytes: end,
        });
    }
    Ok(end)
}

/// All components together, each at the next multiple of 64 bytes at most, must fit into an area.
fn check_compacted(components: &[Option<Component>; SLOTS]) -> Result<(), LayoutError> {
    let extended = components.iter().flatten().skip(2);
    let total_bytes = extended
        .map(|component| component.size.saturating_add(63))
        .fold(EXTENDED_OFFSET, usize::saturating_add);
    if total_bytes > MAX_AREA_BYTES {
        return Err(LayoutError::CompactedTooLarge { total_bytes });
    }
    Ok(())
}

/// The palettes of CPUID.1DH, each no larger than component 18.
fn palettes(
    max_leaf: u32,
    components: &[Option<Component>; SLOTS],
    cpuid: &mut impl FnMut(u32, u32) -> [u32; 4],
) -> Result<Vec<Palette>, LayoutError> {
    let find = |id: ComponentId| components.get(usize::from(id.number()))?.as_ref();
    if find(ComponentId::XTILECFG).is_none() || max_leaf < CPUID_TILES {
        return Ok(Vec::new());
    }
    let [max_palette, ..] = cpuid(CPUID_TILES, 0);
    if max_palette > MAX_PALETTES {
        return Err(LayoutError::TooManyPalettes { max_palette });
    }
    let data = find(ComponentId::XTILEDATA);
    (1..=max_palette)
        .map(|number| {
            let id = bytes::low_byte(number);
            let palette = Palette::from_leaf(id, cpuid(CPUID_TILES, number))?;
            require_room(&palette, data)?;
            Ok(palette)
        })
        .collect()
}

/// The tiles of `palette` fit into XTILEDATA, where the layout has it.
fn require_room(palette: &Palette, data: Option<&Component>) -> Result<(), LayoutError> {
    let palette_bytes = usize::from(palette.total_bytes());
    match data {
        Some(data) if palette_bytes > data.size => Err(LayoutError::TileData {
            palette: palette.id(),
            palette_bytes,
            component_bytes: data.size,
        }),
        _ => Ok(()),
    }
}

/// CPUID describes an XSAVE area that cannot exist.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no leaf 0DH. A guest without XSAVE has [`Layout::legacy`].
    #[error("CPUID has no leaf 0DH (XSAVE): the highest basic leaf is {max_leaf:#x}")]
    NoXsaveLeaf {
        /// CPUID.0H:EAX.
        max_leaf: u32,
    },
    /// x87 and SSE, which XSAVE always has, are not both there.
    #[error("CPUID.0DH.0 supports {user} in XCR0, but x87 and SSE always belong to it")]
    NoLegacy {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
    },
    /// Components are listed both for XCR0 and for IA32_XSS.
    #[error("CPUID.0DH lists {both} both for XCR0 and for IA32_XSS")]
    UserAndSupervisor {
        /// Those components.
        both: XFeatures,
    },
    /// Bit 63 is not a component.
    #[error(
        "CPUID.0DH lists bit 63, which is not a state component: {user} for XCR0, {supervisor} for \
         IA32_XSS"
    )]
    Bit63 {
        /// CPUID.(EAX=0DH,ECX=0):EDX:EAX.
        user: XFeatures,
        /// CPUID.(EAX=0DH,ECX=1):EDX:ECX.
        supervisor: XFeatures,
    },
    /// CPUID.(EAX=0DH,ECX=n):ECX\[0\] contradicts the bitmap in which the component is listed.
    #[error(
        "{component} is listed for {}, but CPUID.(EAX=0DH,ECX={}):ECX[0] says the other",
        if *listed_as_supervisor { "IA32_XSS" } else { "XCR0" },
        component.number()
    )]
    Kind {
        /// The component.
        component: ComponentId,
        /// Whether it is listed for IA32_XSS.
        listed_as_supervisor: bool,
    },
    /// A component that is listed has no size: its sub-leaf is missing.
    #[error("{component} has no size in CPUID.(EAX=0DH,ECX={})", component.number())]
    NoSize {
        /// The component.
        component: ComponentId,
    },
    /// A component has not the size that the architecture gives it.
    #[error("{component} is {actual_bytes} bytes in CPUID; the architecture says {expected_bytes}")]
    Size {
        /// The component.
        component: ComponentId,
        /// By the architecture.
        expected_bytes: usize,
        /// CPUID.(EAX=0DH,ECX=n):EAX.
        actual_bytes: usize,
    },
    /// A component starts within the legacy region or the header.
    #[error(
        "{component} is at offset {offset}, within the {LEGACY_BYTES}-byte legacy region or the \
         {HEADER_BYTES}-byte header"
    )]
    OffsetInHeader {
        /// The component.
        component: ComponentId,
        /// CPUID.(EAX=0DH,ECX=n):EBX.
        offset: usize,
    },
    /// A component ends beyond [`MAX_AREA_BYTES`].
    #[error("{component} ends at byte {end_bytes}; no area has more than {MAX_AREA_BYTES}")]
    TooLarge {
        /// The component.
        component: ComponentId,
        /// Its offset (0 for a supervisor component) plus its size.
        end_bytes: usize,
    },
    /// All components together, with their alignment, are more than [`MAX_AREA_BYTES`].
    #[error(
        "the components together need up to {total_bytes} bytes; no area has more than {MAX_AREA_BYTES}"
    )]
    CompactedTooLarge {
        /// The compacted format with all components, at most.
        total_bytes: usize,
    },
    /// Two components share bytes.
    #[error("{second} at offset {second_offset} overlaps {first} at offset {first_offset}")]
    Overlap {
        /// The one with the lower number.
        first: ComponentId,
        /// Its offset in bytes.
        first_offset: usize,
        /// The one with the higher number.
        second: ComponentId,
        /// Its offset in bytes.
        second_offset: usize,
    },
    /// CPUID.(EAX=0DH,ECX=0):ECX has no room for all components.
    #[error("CPUID.0DH.0:ECX gives {reported_bytes} bytes; the components need {required_bytes}")]
    AreaTooSmall {
        /// CPUID.(EAX=0DH,ECX=0):ECX.
        reported_bytes: usize,
        /// Where the last component ends.
        required_bytes: usize,
    },
    /// More palettes than [`MAX_PALETTES`].
    #[error("CPUID.1DH has {max_palette} palettes; more than {MAX_PALETTES} are not believed")]
    TooManyPalettes {
        /// CPUID.(EAX=1DH,ECX=0):EAX.
        max_palette: u32,
    },
    /// A palette cannot exist.
    #[error(transparent)]
    Palette(#[from] PaletteError),
    /// The tiles of a palette do not fit into component 18.
    #[error(
        "palette {palette} has {palette_bytes} bytes of tiles; XTILEDATA has {component_bytes}"
    )]
    TileData {
        /// The palette.
        palette: u8,
        /// CPUID.(EAX=1DH,ECX=palette):EAX\[15:0\].
        palette_bytes: usize,
        /// CPUID.(EAX=0DH,ECX=18):EAX.
        component_bytes: usize,
    },
}

/// Why a state, or a component of it, cannot be given to another layout as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Misfit {
    /// The target does not have it.
    Missing {
        /// The component.
        component: ComponentId,
    },
    /// It has another size there.
    Size {
        /// The component.
        component: ComponentId,
        /// Here.
        source_bytes: usize,
        /// There.
        target_bytes: usize,
    },
    /// It lies elsewhere there.
    Offset {
        /// The component.
        component: ComponentId,
        /// Here, in bytes.
        source_offset: usize,
        /// There, in bytes.
        target_offset: usize,
    },
    /// The target cannot hold something else: [`relayout`](crate::relayout::relayout) would lose it.
    /// From [`ExtendedState::misfits`](crate::ExtendedState::misfits) alone, and never
    /// [`Loss::Missing`] or [`Loss::Size`], which are [`Missing`](Self::Missing) and
    /// [`Size`](Self::Size).
    Loss(Loss),
}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Loss(loss) => loss.fmt(f),
            Self::Missing { component } => {
                write!(f, "{component} is in use and the target does not have it")
            }
            Self::Size {
                component,
                source_bytes,
                target_bytes,
            } => write!(
                f,
                "{component} is {source_bytes} bytes in the state and {target_bytes} on the target"
            ),
            Self::Offset {
                component,
                source_offset,
                target_offset,
            } => write!(
                f,
                "{component} is at offset {source_offset} in the state and at {target_offset} on \
                 the target"
            ),
        }
    }
}

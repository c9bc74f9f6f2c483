//! Reads a layout from CPUID.

use alloc::vec::Vec;

use super::{Component, Layout, LayoutError, MAX_PALETTES, Palette};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};

const FEATURES: u32 = 1;
const XSAVE: u32 = 0xd;
const TILES: u32 = 0x1d;
const EXTENDED: u32 = 0x8000_0000;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
/// MXCSR.MM, which processors with CPUID.80000001H:ECX.MisAlignSse\[7\] have (AMD APM Vol. 1 §4.2.2).
const MXCSR_MM: u32 = 1 << 17;

impl Layout {
    /// Reads leaves 0, 1, 0DH, 1DH and 80000001H through `cpuid(leaf, subleaf)`, which returns
    /// `[eax, ebx, ecx, edx]`, and zeros for a missing entry.
    ///
    /// CPUID may be the host's or a guest's. A guest without XSAVE (CPUID.01H:ECX.XSAVE\[26\] clear,
    /// leaf 0DH missing or zero) has [`Layout::legacy`]. CPUID.0DH.0:EBX is not used, because it
    /// depends on the current XCR0. The MXCSR mask is 0xffff, with MXCSR.MM where this CPUID has
    /// misaligned SSE.
    ///
    /// # Errors
    ///
    /// The leaves describe an area that cannot exist: see [`LayoutError`]. No input makes it panic,
    /// and it allocates a constant amount.
    ///
    /// ```
    /// use xsave_state::Layout;
    ///
    /// // Any source of CPUID will do: the processor, KVM's table, a snapshot, a file.
    /// fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    ///     match (leaf, subleaf) {
    ///         (0, _) => [0xd, 0, 0, 0],
    ///         (1, _) => [0, 0, 1 << 26, 0],
    ///         (0xd, 0) => [0x7, 832, 832, 0],
    ///         (0xd, 2) => [256, 576, 0, 0],
    ///         _ => [0; 4],
    ///     }
    /// }
    ///
    /// let layout = Layout::from_cpuid(cpuid)?;
    /// assert_eq!(layout.user().to_string(), "x87 | SSE | AVX (0x7)");
    /// assert_eq!(layout.standard_size(), 832);
    /// # Ok::<(), xsave_state::LayoutError>(())
    /// ```
    pub fn from_cpuid(mut cpuid: impl FnMut(u32, u32) -> [u32; 4]) -> Result<Self, LayoutError> {
        let mxcsr_mask = super::MXCSR_MASK | misaligned_sse(&mut cpuid);
        let [max_leaf, ..] = cpuid(0, 0);
        let [_, _, features, _] = cpuid(FEATURES, 0);
        let has_xsave = max_leaf >= XSAVE && features & 1 << 26 != 0;
        let [low, _, reported_size, high] = if has_xsave { cpuid(XSAVE, 0) } else { [0; 4] };
        let user = bitmap(low, high);
        if user.is_empty() {
            return Ok(Self::legacy().with_mxcsr_mask(mxcsr_mask));
        }
        if !user.contains(XFeatures::LEGACY) {
            return Err(LayoutError::NoLegacy { user });
        }
        let [xsave_features, _, low, high] = cpuid(XSAVE, 1);
        let supervisor = bitmap(low, high);
        let both = user & supervisor;
        if !both.is_empty() {
            return Err(LayoutError::UserAndSupervisor { both });
        }
        let listed = user | supervisor;
        if listed.bits() >> ComponentId::COUNT != 0 {
            return Err(LayoutError::Bit63 { user, supervisor });
        }
        let has_xfd = xsave_features & 1 << 4 != 0;
        let components = (listed - XFeatures::LEGACY)
            .components()
            .map(|id| {
                let leaf = cpuid(XSAVE, u32::from(id.number()));
                component(id, leaf, supervisor.contains(id.bit()), has_xfd)
            })
            .collect::<Result<Vec<_>, _>>()?;
        let palettes = if max_leaf >= TILES && user.contains(XFeatures::XTILECFG) {
            palettes(&mut cpuid)?
        } else {
            Vec::new()
        };
        let layout = Self::from_parts(components, palettes)?;
        let reported_bytes = usize::try_from(reported_size).unwrap_or(usize::MAX);
        if reported_bytes < layout.standard_size() {
            return Err(LayoutError::AreaTooSmall {
                reported_bytes,
                required_bytes: layout.standard_size(),
            });
        }
        Ok(layout.with_mxcsr_mask(mxcsr_mask))
    }
}

fn bitmap(low: u32, high: u32) -> XFeatures {
    XFeatures::from_bits_retain(u64::from(high) << 32 | u64::from(low))
}

/// Returns MXCSR.MM where the processor has it.
fn misaligned_sse(cpuid: &mut impl FnMut(u32, u32) -> [u32; 4]) -> u32 {
    let [max_extended, ..] = cpuid(EXTENDED, 0);
    if max_extended < EXTENDED_FEATURES {
        return 0;
    }
    let [_, _, ecx, _] = cpuid(EXTENDED_FEATURES, 0);
    if ecx & 1 << 7 == 0 { 0 } else { MXCSR_MM }
}

fn component(
    id: ComponentId,
    [eax, ebx, ecx, _]: [u32; 4],
    supervisor: bool,
    has_xfd: bool,
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
    let mut component = if supervisor {
        Component::supervisor(id, size)
    } else {
        let offset = usize::try_from(ebx).unwrap_or(usize::MAX);
        Component::user(id, offset, size)
    };
    if ecx & 1 << 1 != 0 {
        component = component.aligned();
    }
    // Without CPUID.0DH.1:EAX.XFD[4] there is no IA32_XFD that a guest could write.
    if has_xfd && ecx & 1 << 2 != 0 {
        component = component.with_xfd();
    }
    Ok(component)
}

fn palettes(cpuid: &mut impl FnMut(u32, u32) -> [u32; 4]) -> Result<Vec<Palette>, LayoutError> {
    let [max_palette, ..] = cpuid(TILES, 0);
    if max_palette > MAX_PALETTES {
        return Err(LayoutError::TooManyPalettes { max_palette });
    }
    (1..=max_palette)
        .map(|number| {
            let leaf = cpuid(TILES, number);
            Ok(Palette::from_leaf(bytes::low_byte(number), leaf)?)
        })
        .collect()
}

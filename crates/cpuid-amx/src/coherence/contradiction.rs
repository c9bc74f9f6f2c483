//! The contradictions by name, each with both values.

use thiserror::Error;
#[cfg(doc)]
use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::{LayoutError, XFeatures};

use crate::amx::{AmxFeatures, TmulLimits};
use crate::bits::Bits;

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
    /// There is XSAVE, but 0DH has no component: the leaf is empty, or above the highest.
    #[error(
        "CPUID.1:ECX.XSAVE[26] is 1, but CPUID.0DH.0 has no component (the highest leaf is \
         {max_leaf:#x})"
    )]
    XsaveWithoutComponents {
        /// CPUID.0H:EAX.
        max_leaf: u32,
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
        "CPUID.0DH.0:EBX (bytes for the current XCR0) is {reported_bytes}, which no legal XCR0 \
         produces; all components produce {all_bytes}"
    )]
    EnabledSize {
        /// CPUID.(EAX=0DH,ECX=0):EBX.
        reported_bytes: usize,
        /// With all components.
        all_bytes: usize,
    },
    /// CPUID.(EAX=0DH,ECX=1):EBX is not the size of the compacted format for any legal
    /// XCR0 | IA32_XSS; or not 0 where there is neither XSAVEC nor XSAVES. More than
    /// [`MAX_AREA_BYTES`] is never believed.
    ///
    /// It changes with both, so that the check asks for any values, not for the current ones. KVM
    /// [writes it anew](Self::is_recomputed_by_kvm).
    #[error(
        "CPUID.0DH.1:EBX (bytes for the current XCR0 and IA32_XSS) is {reported_bytes}, which no \
         legal values produce; all components produce {all_bytes}"
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
         XTILEDATA: this CPUID was read before the permission; ask KVM again after \
         ARCH_REQ_XCOMP_GUEST_PERM"
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
    /// There is AMX-AVX512, CPUID.(EAX=1EH,ECX=1):EAX\[7\], whose instructions move rows between tiles
    /// and ZMM registers, but 0DH does not have these.
    #[error("CPUID.1EH.1 has AMX-AVX512, but CPUID.0DH.0 has {user} without AVX-512")]
    WithoutAvx512 {
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
    /// Features need components that are not there: software that goes by the feature alone gets #UD.
    #[error("CPUID has {features}, but CPUID.0DH lacks {missing}, which they need")]
    Dependents {
        /// The features.
        features: Bits,
        /// The components.
        missing: XFeatures,
    },
    /// A leaf has an entry without the sub-leaf flag (KVM_CPUID_FLAG_SIGNIFCANT_INDEX) beside others.
    /// KVM takes the first that answers: what stands behind it, the guest never sees.
    #[error(
        "leaf {leaf:#x} has {entries} entries, and one of them lacks the sub-leaf flag \
         (KVM_CPUID_FLAG_SIGNIFCANT_INDEX): it answers for every sub-leaf, and hides {hidden} of the \
         others"
    )]
    Unflagged {
        /// The leaf.
        leaf: u32,
        /// All entries of the leaf.
        entries: usize,
        /// Those behind it with other values.
        hidden: usize,
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

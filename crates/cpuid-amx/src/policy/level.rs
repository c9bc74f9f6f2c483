//! The AMX features of classes of processors.

use core::fmt;
use core::str::FromStr;

use thiserror::Error;

use crate::amx::AmxFeatures;

/// A class of processors, by the AMX features that came with it.
///
/// The source of each is the table of recent instruction set extensions and the processors that
/// introduce them in Intel's Architecture Instruction Set Extensions Programming Reference
/// (319433), chapter 1. LLVM's target processors of these names have the same AMX features
/// (`rustc --print cfg -C target-cpu=diamondrapids`, of a nightly compiler). Diamond Rapids is
/// announced, and its CPUID was seen nowhere.
///
/// ```
/// use cpuid_amx::Level;
///
/// let level: Level = "granite-rapids".parse()?;
/// assert_eq!(level.features().to_string(), "AMX-TILE, AMX-INT8, AMX-BF16, AMX-FP16");
/// # Ok::<(), cpuid_amx::policy::UnknownLevel>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Level {
    /// Sapphire Rapids and Emerald Rapids: AMX-TILE, AMX-INT8, AMX-BF16. Both processors' CPUID is
    /// among the fixtures of these crates.
    SapphireRapids,
    /// Granite Rapids: AMX-FP16 too. Its CPUID is among the fixtures.
    GraniteRapids,
    /// Granite Rapids D: AMX-COMPLEX too.
    GraniteRapidsD,
    /// Diamond Rapids: AMX-FP8, AMX-TF32, AMX-AVX512 and AMX-MOVRS too. AMX-TRANSPOSE, which
    /// earlier editions of the reference list with them, is not among them: KVM does not give it to
    /// guests (arch/x86/kvm/cpuid.c, `kvm_initialize_cpu_caps`, CPUID_1E_1_EAX).
    DiamondRapids,
}

impl Level {
    /// All of them, the one with the fewest features first.
    pub const ALL: [Self; 4] = [
        Self::SapphireRapids,
        Self::GraniteRapids,
        Self::GraniteRapidsD,
        Self::DiamondRapids,
    ];

    /// The features.
    #[must_use]
    pub const fn features(self) -> AmxFeatures {
        const SAPPHIRE: AmxFeatures = AmxFeatures::TILE
            .union(AmxFeatures::INT8)
            .union(AmxFeatures::BF16);
        const GRANITE: AmxFeatures = SAPPHIRE.union(AmxFeatures::FP16);
        const GRANITE_D: AmxFeatures = GRANITE.union(AmxFeatures::COMPLEX);
        const DIAMOND: AmxFeatures = GRANITE_D
            .union(AmxFeatures::FP8)
            .union(AmxFeatures::TF32)
            .union(AmxFeatures::AVX512)
            .union(AmxFeatures::MOVRS);
        match self {
            Self::SapphireRapids => SAPPHIRE,
            Self::GraniteRapids => GRANITE,
            Self::GraniteRapidsD => GRANITE_D,
            Self::DiamondRapids => DIAMOND,
        }
    }

    /// Its name on a command line or in a file: `sapphire-rapids`, ...
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SapphireRapids => "sapphire-rapids",
            Self::GraniteRapids => "granite-rapids",
            Self::GraniteRapidsD => "granite-rapids-d",
            Self::DiamondRapids => "diamond-rapids",
        }
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Level {
    type Err = UnknownLevel;

    fn from_str(name: &str) -> Result<Self, UnknownLevel> {
        Self::ALL
            .into_iter()
            .find(|level| level.name() == name)
            .ok_or_else(|| UnknownLevel { name: name.into() })
    }
}

/// No level has this name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "there is no level {name:?}: the levels are sapphire-rapids, granite-rapids, granite-rapids-d \
     and diamond-rapids"
)]
pub struct UnknownLevel {
    /// The name.
    pub name: alloc::string::String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_more_than_the_one_before() {
        for pair in Level::ALL.windows(2) {
            assert!(pair[1].features().contains(pair[0].features()));
            assert_ne!(pair[1].features(), pair[0].features());
        }
        for level in Level::ALL {
            assert_eq!(level.to_string().parse(), Ok(level));
            assert!(!level.features().contains(AmxFeatures::TRANSPOSE));
        }
        let error = "sapphire".parse::<Level>().unwrap_err().to_string();
        for level in Level::ALL {
            assert!(error.contains(level.name()));
        }
    }
}

//! The processors that the emulator can be: which of them a lab may have.

use std::fmt;
use std::str::FromStr;

/// A processor of a lab. All have VMX, so that KVM runs on each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
#[non_exhaustive]
pub enum Cpu {
    /// Sapphire Rapids: AMX, XFD, AVX-512.
    #[default]
    SapphireRapids,
    /// Granite Rapids: AMX-FP16 and AVX10.1 too.
    GraniteRapids,
    /// Granite Rapids D: AMX-COMPLEX too.
    GraniteRapidsD,
    /// Tiger Lake: AVX-512 and protection keys, no AMX.
    TigerLake,
    /// Ice Lake: the same with fewer instructions.
    IceLake,
    /// Skylake-X: the first AVX-512.
    SkylakeX,
    /// Arrow Lake: AVX2 and protection keys, no AVX-512.
    ArrowLake,
}

/// No processor has this name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no processor is called {name:?}: there are {}", Cpu::ALL.map(Cpu::name).join(", "))]
pub struct UnknownCpu {
    /// The name that was given.
    pub name: String,
}

impl Cpu {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::SapphireRapids,
        Self::GraniteRapids,
        Self::GraniteRapidsD,
        Self::TigerLake,
        Self::IceLake,
        Self::SkylakeX,
        Self::ArrowLake,
    ];

    /// Its name in options.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::SapphireRapids => "sapphire-rapids",
            Self::GraniteRapids => "granite-rapids",
            Self::GraniteRapidsD => "granite-rapids-d",
            Self::TigerLake => "tiger-lake",
            Self::IceLake => "ice-lake",
            Self::SkylakeX => "skylake-x",
            Self::ArrowLake => "arrow-lake",
        }
    }

    /// The emulator's name of it.
    pub(crate) const fn model(self) -> &'static str {
        match self {
            Self::SapphireRapids => "sapphire_rapids",
            Self::GraniteRapids => "granite_rapids",
            Self::GraniteRapidsD => "granite_rapids_d",
            Self::TigerLake => "tigerlake",
            Self::IceLake => "corei7_icelake_u",
            Self::SkylakeX => "corei7_skylake_x",
            Self::ArrowLake => "arrow_lake",
        }
    }
}

impl fmt::Display for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Cpu {
    type Err = UnknownCpu;

    fn from_str(name: &str) -> Result<Self, UnknownCpu> {
        Self::ALL
            .into_iter()
            .find(|cpu| cpu.name() == name)
            .ok_or_else(|| UnknownCpu {
                name: name.to_owned(),
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for cpu in Cpu::ALL {
            assert_eq!(cpu.to_string().parse::<Cpu>().unwrap(), cpu);
        }
        let unknown = "z80".parse::<Cpu>().unwrap_err();
        assert!(unknown.to_string().contains("tiger-lake"));
    }
}

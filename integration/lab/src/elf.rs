//! Whether a program can run in the lab: x86-64, and static, because the lab has no libraries.

use object::LittleEndian;
use object::elf::{EM_X86_64, ET_DYN, ET_EXEC, FileHeader64, PT_INTERP};
use object::read::elf::{FileHeader, ProgramHeader};

/// Why a file cannot run in the lab.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ElfError {
    /// Not a program of this kind at all.
    #[error("not an x86-64 Linux program ({reason})")]
    NotAProgram {
        /// What it is instead.
        reason: String,
    },
    /// It needs a dynamic linker.
    #[error(
        "not static: it asks for {interpreter}, and the lab has no libraries. Build it with RUSTFLAGS=\"-C target-feature=+crt-static\" \
         and --target x86_64-unknown-linux-gnu (C: -static)"
    )]
    NotStatic {
        /// The dynamic linker that it names.
        interpreter: String,
    },
}

/// Checks a program's bytes.
pub(crate) fn check_static(bytes: &[u8]) -> Result<(), ElfError> {
    let not_a_program = |reason: &str| ElfError::NotAProgram {
        reason: reason.to_owned(),
    };
    let header = FileHeader64::<LittleEndian>::parse(bytes)
        .map_err(|error| not_a_program(&error.to_string()))?;
    let endian = LittleEndian;
    if header.e_machine(endian) != EM_X86_64 {
        return Err(not_a_program("for another processor"));
    }
    if ![ET_EXEC, ET_DYN].contains(&header.e_type(endian)) {
        return Err(not_a_program("not an executable"));
    }
    let segments = header
        .program_headers(endian, bytes)
        .map_err(|error| not_a_program(&error.to_string()))?;
    match segments
        .iter()
        .find(|segment| segment.p_type(endian) == PT_INTERP)
    {
        None => Ok(()),
        Some(segment) => {
            let name = segment.data(endian, bytes).unwrap_or_default();
            Err(ElfError::NotStatic {
                interpreter: String::from_utf8_lossy(name)
                    .trim_end_matches('\0')
                    .to_owned(),
            })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dynamic_program_is_told_from_a_static_one() {
        // This test itself is either; sh is dynamic on every Debian.
        let shell = std::fs::read("/bin/sh").unwrap();
        assert!(
            matches!(check_static(&shell), Err(ElfError::NotStatic { interpreter }) if interpreter.contains("ld-linux"))
        );
        assert!(matches!(
            check_static(b"#!/bin/sh\n"),
            Err(ElfError::NotAProgram { .. })
        ));
        let mut other = shell;
        other[18] = 183; // EM_AARCH64
        assert!(matches!(
            check_static(&other),
            Err(ElfError::NotAProgram { .. })
        ));
    }
}

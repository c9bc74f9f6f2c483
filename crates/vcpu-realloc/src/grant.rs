//! What of a VM's gate travels with its state: whether its first use has been.
//!
//! The registers of a vCPU do not tell. A guest that has tasks with tiles in memory, and runs another one
//! at the moment, has IA32_XFD armed and no tile in use. A VMM that did not know would ask such a guest
//! anew, and a denial would then cost it what lives in its memory.

use thiserror::Error;
use xsave_state::XFeatures;

const VERSION: u16 = 1;

/// The features that any vCPU of a VM has been granted.
///
/// A VMM saves it with the VM, in its own format by [`to_bytes`](Self::to_bytes) and
/// [`from_bytes`](Self::from_bytes), and hands it to each vCPU's gate when that is restored. A snapshot
/// without it is one of a VM of which nobody knows: the VMM is then asked before anything runs, when a
/// refusal still loses nothing.
///
/// ```
/// use vcpu_realloc::{SavedGrant, SavedGrantError};
/// use xsave_state::XFeatures;
///
/// let saved = SavedGrant::of(XFeatures::XTILEDATA).to_bytes();
/// let read = SavedGrant::from_bytes(&saved, XFeatures::XTILEDATA)?;
/// assert!(read.has_been());
/// // A host that gives its guests less than was granted.
/// assert!(matches!(
///     SavedGrant::from_bytes(&saved, XFeatures::empty()),
///     Err(SavedGrantError::Features { .. })
/// ));
/// # Ok::<(), SavedGrantError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SavedGrant(XFeatures);

impl SavedGrant {
    /// Bytes of the encoded value: the version (2), zeros (6), the features (8), each little-endian.
    pub const BYTES: usize = 16;

    /// The record of a VM that has been granted these features. Without any, it has not had its first use.
    #[must_use]
    pub const fn of(features: XFeatures) -> Self {
        Self(features)
    }

    /// Whether any vCPU has been granted anything.
    #[must_use]
    pub fn has_been(self) -> bool {
        !self.0.is_empty()
    }

    /// What has been granted.
    #[must_use]
    pub const fn features(self) -> XFeatures {
        self.0
    }

    /// The value as bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::BYTES] {
        let value = u128::from(self.0.bits()) << 64 | u128::from(VERSION);
        value.to_le_bytes()
    }

    /// Reads what [`to_bytes`](Self::to_bytes) has written. `disableable` is what IA32_XFD can disable for
    /// this guest, [`Layout::xfd`](xsave_state::Layout::xfd): nothing else can have been granted.
    ///
    /// # Errors
    ///
    /// They are not such bytes, or not of this version or this guest.
    pub fn from_bytes(bytes: &[u8], disableable: XFeatures) -> Result<Self, SavedGrantError> {
        let actual_bytes = bytes.len();
        let bytes = <[u8; Self::BYTES]>::try_from(bytes)
            .map_err(|_| SavedGrantError::Length { actual_bytes })?;
        let value = u128::from_le_bytes(bytes);
        let (low, high) = (value & u128::from(u64::MAX), value >> 64);
        let version = low & u128::from(u16::MAX);
        if version != u128::from(VERSION) {
            let version = u16::try_from(version).unwrap_or(u16::MAX);
            return Err(SavedGrantError::Version { version });
        }
        if low != version {
            return Err(SavedGrantError::Reserved {
                reserved: u64::try_from(low >> 16).unwrap_or(u64::MAX),
            });
        }
        let features = XFeatures::from_bits_retain(u64::try_from(high).unwrap_or(u64::MAX));
        if !disableable.contains(features) {
            return Err(SavedGrantError::Features {
                features,
                disableable,
            });
        }
        Ok(Self(features))
    }
}

/// Bytes are not a [`SavedGrant`] of this guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SavedGrantError {
    /// They are too few or too many.
    #[error(
        "the saved grant has {actual_bytes} bytes, not {}: save it anew, or restore without it",
        SavedGrant::BYTES
    )]
    Length {
        /// How many there are.
        actual_bytes: usize,
    },
    /// They are of another version.
    #[error(
        "the saved grant has version {version}; this program reads version {VERSION}: use one that reads it, or restore without it"
    )]
    Version {
        /// Theirs.
        version: u16,
    },
    /// Bits that must be zero are not.
    #[error("the saved grant has {reserved:#x} where it must have 0: it is damaged")]
    Reserved {
        /// What is there.
        reserved: u64,
    },
    /// Features are named that this guest cannot have been granted.
    #[error(
        "the saved grant has {features}; this guest can only have been granted {disableable}: restore where the guest has the CPUID that it ran with"
    )]
    Features {
        /// What was granted, by the record.
        features: XFeatures,
        /// What IA32_XFD can disable for the guest.
        disableable: XFeatures,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    const TILES: XFeatures = XFeatures::XTILEDATA;

    #[test]
    fn what_is_written_is_read() {
        for features in [XFeatures::empty(), TILES] {
            let record = SavedGrant::of(features);
            let read = SavedGrant::from_bytes(&record.to_bytes(), TILES);
            assert_eq!(read, Ok(record));
            assert_eq!(record.has_been(), features == TILES);
        }
    }

    /// The format is for others' files: it stays as it is.
    #[test]
    fn the_bytes_of_version_1() {
        let mut bytes = [0; 16];
        (bytes[0], bytes[10]) = (1, 4);
        assert_eq!(SavedGrant::of(TILES).to_bytes(), bytes);
    }

    /// Each bit that is changed is read as what it says, or refused by name.
    #[test]
    fn hostile_bytes_are_refused() {
        use SavedGrantError::{Features, Length, Reserved, Version};
        let good = SavedGrant::of(TILES).to_bytes();
        for bit in 0..128 {
            let mut bytes = good;
            bytes[bit / 8] ^= 1 << (bit % 8);
            let read = SavedGrant::from_bytes(&bytes, TILES);
            match bit {
                0..16 => assert!(matches!(read, Err(Version { .. })), "{bit}"),
                16..64 => assert!(matches!(read, Err(Reserved { .. })), "{bit}"),
                82 => assert_eq!(read, Ok(SavedGrant::default())),
                _ => assert!(matches!(read, Err(Features { .. })), "{bit}"),
            }
            if let Err(error) = read {
                assert!(error.to_string().contains("saved grant"));
            }
        }
        for actual_bytes in (0..40).filter(|&len| len != 16) {
            let bytes = vec![1; actual_bytes];
            let read = SavedGrant::from_bytes(&bytes, TILES);
            assert_eq!(read, Err(Length { actual_bytes }));
        }
    }
}

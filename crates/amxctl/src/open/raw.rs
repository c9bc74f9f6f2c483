//! Raw areas: the bytes of KVM_GET_XSAVE2 or of an XSAVE instruction, and nothing else.

use super::OpenError;
use crate::bytes;
use crate::registers::Listed;
use crate::vcpu::{Owner, Places, Vcpu};

/// Legacy region and header.
pub(super) const MIN_BYTES: u64 = 576;

/// The bits of MXCSR that a processor can have: 0 to 15, and AMD's 17.
const MXCSR_BITS: u32 = 0x2_ffff;

/// A raw area has no beginning of its own, and almost any file could have its length. What no
/// processor and no kernel writes is none; whatever else is wrong with it is for the rules to say.
pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Vcpu>, OpenError> {
    let mxcsr = bytes::u32_at(bytes, 24);
    // MXCSR is always written, with 0x1f80 for a start, and Linux states its components.
    let is_blank = mxcsr == 0 && bytes::u64_at(bytes, 464) == 0;
    if is_blank || mxcsr & !MXCSR_BITS != 0 {
        return Err(OpenError::NotAnArea {
            file_bytes: bytes.len(),
            mxcsr,
        });
    }
    Ok(vec![Vcpu {
        owner: Owner::Vcpu(0),
        area: bytes.to_vec(),
        places: Places::Unknown,
        listed: Listed::default(),
    }])
}

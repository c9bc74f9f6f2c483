//! Raw areas: the bytes of KVM_GET_XSAVE2 or of an XSAVE instruction, and nothing else.

use crate::vcpu::{Owner, Places, Vcpu};

/// Legacy region and header.
pub(super) const MIN_BYTES: u64 = 576;

pub(super) fn parse(bytes: &[u8]) -> Vec<Vcpu> {
    vec![Vcpu {
        owner: Owner::Vcpu(0),
        area: bytes.to_vec(),
        places: Places::Unknown,
        xcr0: None,
        xfd: None,
        xfd_err: None,
    }]
}

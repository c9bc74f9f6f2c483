//! The states of xsave-state, one behind the other.

use xsave_state::registers::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use xsave_state::wire::{self, Blob};

use super::OpenError;
use crate::registers::{Listed, Xcrs};
use crate::vcpu::{Owner, Places, Vcpu};

pub(super) fn parse(bytes: &[u8]) -> Result<Vec<Vcpu>, OpenError> {
    let mut vcpus: Vec<Vcpu> = Vec::new();
    // A state of version 1 has no number; it was alone in its file.
    for (place, encoded) in (0..).zip(wire::states(bytes)) {
        let encoded = encoded.map_err(OpenError::State)?;
        let blob = encoded.blob().map_err(OpenError::State)?;
        vcpus.push(vcpu(encoded.vcpu().unwrap_or(place), &blob));
    }
    vcpus.sort_by_key(|vcpu| vcpu.owner);
    let mut pairs = vcpus.iter().zip(vcpus.iter().skip(1));
    if let Some((twice, _)) = pairs.find(|(a, b)| a.owner == b.owner) {
        return Err(OpenError::Twice { owner: twice.owner });
    }
    Ok(vcpus)
}

/// The area as it would be, although the state may break a rule: so it can be looked at.
fn vcpu(id: u32, blob: &Blob) -> Vcpu {
    let registers = blob.registers();
    Vcpu {
        owner: Owner::Vcpu(id),
        area: blob.area().to_vec(),
        places: Places::Layout(blob.layout().clone()),
        listed: Listed {
            xcrs: Some(Xcrs::of_xcr0(registers.xcr0)),
            msrs: vec![
                (MSR_IA32_XFD, registers.xfd.bits()),
                (MSR_IA32_XFD_ERR, registers.xfd_err.bits()),
            ],
            ..Listed::default()
        },
    }
}

//! The states and containers of xsave-state.

use xsave_state::ComponentId;
use xsave_state::wire::{Blob, Container, Record};

use super::OpenError;
use crate::vcpu::{Owner, Places, Vcpu};

const LINE_BYTES: usize = 64;

pub(super) fn state(bytes: &[u8]) -> Result<Vec<Vcpu>, OpenError> {
    let blob = Blob::parse(bytes).map_err(OpenError::State)?;
    Ok(vec![vcpu(0, &blob)])
}

pub(super) fn container(bytes: &[u8]) -> Result<Vec<Vcpu>, OpenError> {
    let container = Container::open(bytes).map_err(OpenError::Container)?;
    container
        .members()
        .map(|member| {
            let blob = member.blob().map_err(OpenError::Member)?;
            Ok(vcpu(member.vcpu(), &blob))
        })
        .collect()
}

/// The area as it would be, although the state may break a rule: so it can be looked at.
fn vcpu(id: u32, blob: &Blob<'_>) -> Vcpu {
    let layout = blob.layout().clone();
    let mut area = vec![0; layout.standard_size()];
    put(
        &mut area,
        0,
        &xsave_state::legacy::INITIAL_FCW.to_le_bytes(),
    );
    for record in blob.records() {
        let offset = layout.component(record.id()).and_then(|c| c.offset());
        if let Some(offset) = offset {
            expand(&record, area.get_mut(offset..).unwrap_or_default());
        }
    }
    put(&mut area, 24, &blob.mxcsr().to_le_bytes());
    put(&mut area, 512, &blob.xstate_bv().bits().to_le_bytes());
    let registers = blob.registers();
    Vcpu {
        owner: Owner::Vcpu(id),
        area,
        places: Places::Layout(layout),
        xcr0: Some(registers.xcr0),
        xfd: Some(registers.xfd),
        xfd_err: Some(registers.xfd_err),
    }
}

fn expand(record: &Record<'_>, component: &mut [u8]) {
    // XMM lies behind x87: no line of x87 may reach into it.
    let size = record.size().min(component.len());
    let component = component.get_mut(..size).unwrap_or_default();
    let mut stored = record.stored();
    for (number, line) in component.chunks_mut(LINE_BYTES).enumerate() {
        if record.is_stored(number) {
            let (first, rest) = stored.split_at(line.len().min(stored.len()));
            put(line, 0, first);
            stored = rest;
        } else if record.id() == ComponentId::X87 {
            line.fill(0);
        }
    }
}

fn put(bytes: &mut [u8], at: usize, value: &[u8]) {
    let there = bytes.get_mut(at..).unwrap_or_default();
    for (to, &from) in there.iter_mut().zip(value) {
        *to = from;
    }
}

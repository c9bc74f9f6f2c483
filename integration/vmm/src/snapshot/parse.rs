//! Bytes become a snapshot, or a named error.
//!
//! The bytes may come from anybody. The order: header, length, checksum, structure, then every
//! vCPU's CPUID and the extended state that it must fit.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use thiserror::Error;
use xsave_state::{
    ExtendedState, Image, ImageError, LayoutError, Registers, StateError, XFeatures,
};

use super::header::{HEADER_BYTES, Header, HeaderError};
use super::wire::{Extended, State, Vcpu};
use super::{Snapshot, VcpuState};
use crate::capture::is_extended_state;
use crate::host;
use crate::memory::Pages;
use crate::registers::CpuidEntry;
use crate::vm::MAX_VCPUS;

/// The most MSRs that one vCPU may have. KVM's own list has about a hundred.
const MAX_MSRS: usize = 1024;

impl Snapshot {
    /// Reads the bytes of a snapshot file.
    ///
    /// # Errors
    ///
    /// The first rule that they break. Nothing makes it panic, and it allocates no more than a
    /// constant and a small multiple of what `file` has.
    pub fn from_bytes(file: &[u8]) -> Result<Self, SnapshotError> {
        let header = Header::parse(file)?;
        let (_, body) = file.split_at_checked(HEADER_BYTES).unwrap_or_default();
        let computed = crc32fast::hash(body);
        if computed != header.body_checksum {
            return Err(SnapshotError::Checksum {
                stored: header.body_checksum,
                computed,
            });
        }
        // `Header::parse` has compared the sum of these lengths with the file's.
        let (state, rest) = body
            .split_at_checked(header.state_bytes)
            .unwrap_or_default();
        let (numbers, content) = rest
            .split_at_checked(header.numbers_bytes())
            .unwrap_or_default();
        Ok(Self {
            vcpus: vcpus(state)?,
            memory: pages(&header, numbers, content)?,
        })
    }
}

fn vcpus(bytes: &[u8]) -> Result<Vec<VcpuState>, SnapshotError> {
    let (state, rest) = postcard::take_from_bytes::<State<'_>>(bytes)?;
    if !rest.is_empty() {
        return Err(SnapshotError::TrailingBytes { bytes: rest.len() });
    }
    if state.vcpus.is_empty() || state.vcpus.len() > usize::from(MAX_VCPUS) {
        return Err(SnapshotError::VcpuCount {
            vcpus: state.vcpus.len(),
            limit: MAX_VCPUS,
        });
    }
    (0..)
        .zip(state.vcpus)
        .map(|(vcpu, state)| self::vcpu(state).map_err(|cause| SnapshotError::Vcpu { vcpu, cause }))
        .collect()
}

fn vcpu(vcpu: Vcpu<'_>) -> Result<VcpuState, VcpuCause> {
    if vcpu.cpuid.len() > KVM_MAX_CPUID_ENTRIES {
        return Err(VcpuCause::CpuidEntries {
            entries: vcpu.cpuid.len(),
            limit: KVM_MAX_CPUID_ENTRIES,
        });
    }
    if vcpu.msrs.len() > MAX_MSRS {
        return Err(VcpuCause::Msrs {
            msrs: vcpu.msrs.len(),
            limit: MAX_MSRS,
        });
    }
    if let Some(msr) = vcpu.msrs.iter().find(|msr| is_extended_state(msr.index)) {
        return Err(VcpuCause::MsrOfExtendedState { index: msr.index });
    }
    Ok(VcpuState {
        extended: extended(&vcpu.extended, &vcpu.cpuid)?,
        cpuid: vcpu.cpuid,
        general: vcpu.general,
        special: vcpu.special,
        debug: vcpu.debug,
        events: vcpu.events,
        mp_state: vcpu.mp_state,
        msrs: vcpu.msrs,
    })
}

fn extended(
    saved: &Extended<'_>,
    cpuid: &[CpuidEntry],
) -> Result<ExtendedState<'static>, VcpuCause> {
    let entries: Vec<kvm_cpuid_entry2> = cpuid.iter().copied().map(Into::into).collect();
    let layout = host::layout(&entries)?;
    // The file leaves out what is behind the last component in use. The layout's size is bounded.
    if saved.area.len() > layout.standard_size() {
        return Err(VcpuCause::AreaTooLong {
            actual_bytes: saved.area.len(),
            limit_bytes: layout.standard_size(),
        });
    }
    let mut area = saved.area.to_vec();
    area.resize(layout.standard_size(), 0);
    let image = Image::parse(&area, &layout)?;
    let required_bytes = layout.standard_size_of(image.xstate_bv());
    if saved.area.len() != required_bytes {
        return Err(VcpuCause::AreaLength {
            required_bytes,
            actual_bytes: saved.area.len(),
        });
    }
    let registers = Registers {
        xcr0: XFeatures::from_bits_retain(saved.xcr0),
        xfd: XFeatures::from_bits_retain(saved.xfd),
        xfd_err: XFeatures::from_bits_retain(saved.xfd_err),
    };
    Ok(ExtendedState::new(image, registers)?.into_owned())
}

fn pages(header: &Header, numbers: &[u8], content: &[u8]) -> Result<Pages, PageError> {
    let limit = header.memory_bytes / 4096;
    let (numbers, _) = numbers.as_chunks();
    let numbers: Vec<u32> = numbers.iter().map(|n| u32::from_le_bytes(*n)).collect();
    if let Some(&page) = numbers.iter().find(|number| u64::from(**number) >= limit) {
        return Err(PageError::OutOfRange { page, limit });
    }
    for (&page, &next) in numbers.iter().zip(numbers.iter().skip(1)) {
        if next <= page {
            return Err(PageError::Order { page, next });
        }
    }
    Ok(Pages {
        memory_bytes: header.memory_bytes,
        numbers,
        content: content.to_vec(),
    })
}

/// Bytes that are no snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum SnapshotError {
    /// The header.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// What is behind the header was changed.
    #[error("the content's checksum is {computed:#010x}, and {stored:#010x} is stored")]
    Checksum {
        /// In the header.
        stored: u32,
        /// Of what is there.
        computed: u32,
    },
    /// The registers cannot be read.
    #[error("the vCPUs' registers: {0}")]
    Postcard(#[from] postcard::Error),
    /// There is something behind the registers.
    #[error("{bytes} bytes behind the vCPUs' registers")]
    TrailingBytes {
        /// How many.
        bytes: usize,
    },
    /// None, or more than the limit.
    #[error("{vcpus} vCPUs; a VM has 1 to {limit}")]
    VcpuCount {
        /// The file's.
        vcpus: usize,
        /// [`MAX_VCPUS`].
        limit: u8,
    },
    /// Guest memory.
    #[error("guest memory: {0}")]
    Page(#[from] PageError),
    /// One vCPU's state.
    #[error("vCPU {vcpu}: {cause}")]
    Vcpu {
        /// The vCPU.
        vcpu: u8,
        /// Why.
        #[source]
        cause: VcpuCause,
    },
}

/// Pages that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PageError {
    /// Outside of memory.
    #[error("page {page} of {limit}")]
    OutOfRange {
        /// Its number.
        page: u32,
        /// How many there are.
        limit: u64,
    },
    /// Not in ascending order, or twice.
    #[error("page {next} behind page {page}")]
    Order {
        /// The one before.
        page: u32,
        /// The one behind it.
        next: u32,
    },
}

/// Why one vCPU's state is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum VcpuCause {
    /// More than KVM takes.
    #[error("{entries} CPUID entries; the limit is {limit}")]
    CpuidEntries {
        /// The file's.
        entries: usize,
        /// KVM_MAX_CPUID_ENTRIES.
        limit: usize,
    },
    /// More than there can be.
    #[error("{msrs} MSRs; the limit is {limit}")]
    Msrs {
        /// The file's.
        msrs: usize,
        /// The limit.
        limit: usize,
    },
    /// It belongs to the extended state, where its value is checked.
    #[error("MSR {index:#x} is among the others; it belongs to the extended state")]
    MsrOfExtendedState {
        /// The MSR.
        index: u32,
    },
    /// The CPUID describes an area that cannot exist.
    #[error("its CPUID: {0}")]
    Layout(#[from] LayoutError),
    /// The area is longer than the CPUID allows.
    #[error("an area of {actual_bytes} bytes; its CPUID has room for {limit_bytes}")]
    AreaTooLong {
        /// The file's.
        actual_bytes: usize,
        /// By the CPUID.
        limit_bytes: usize,
    },
    /// The area is not valid.
    #[error("its area: {0}")]
    Image(#[from] ImageError),
    /// The area does not end with the last component in use.
    #[error("an area of {actual_bytes} bytes; what is in use needs {required_bytes}")]
    AreaLength {
        /// By XSTATE_BV and the CPUID.
        required_bytes: usize,
        /// The file's.
        actual_bytes: usize,
    },
    /// The registers are not valid, or not with the area.
    #[error("its extended state: {0}")]
    State(#[from] StateError),
}

//! Bytes become a snapshot, or a named error.
//!
//! The bytes may come from anybody. The order: header, length, checksum, structure, then every
//! vCPU's CPUID and the extended state that it must fit.

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use thiserror::Error;
use xsave_state::wire::{self, DecodeError, Encoded, Unreadable};
use xsave_state::{ExtendedState, Layout, LayoutError, Misfit, XFeatures};

use super::header::{HEADER_BYTES, Header, HeaderError};
use super::wire::{Platform, State, Vcpu};
use super::{LocalApic, Snapshot, VcpuState};
use crate::capture::is_extended_state;
use crate::memory::Pages;
use crate::platform::{self, CHIP_BYTES, Chip};
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
        Self::from_parts(state, pages(&header, numbers, content)?)
    }

    /// Reads what [`state_bytes`](Self::state_bytes) has written.
    pub(crate) fn from_parts(state: &[u8], memory: Pages) -> Result<Self, SnapshotError> {
        let (state, rest) = postcard::take_from_bytes::<State<'_>>(state)?;
        if !rest.is_empty() {
            return Err(SnapshotError::TrailingBytes { bytes: rest.len() });
        }
        let platform = state.platform.map(platform).transpose()?;
        Ok(Self {
            vcpus: vcpus(state.vcpus, state.extended, platform.is_some())?,
            memory,
            tsc_khz: state.tsc_khz,
            platform,
        })
    }
}

fn vcpus(
    vcpus: Vec<Vcpu<'_>>,
    extended: &[u8],
    has_platform: bool,
) -> Result<Vec<VcpuState>, SnapshotError> {
    if vcpus.is_empty() || vcpus.len() > usize::from(MAX_VCPUS) {
        return Err(SnapshotError::VcpuCount {
            vcpus: vcpus.len(),
            limit: MAX_VCPUS,
        });
    }
    let states = states(extended, vcpus.len())?;
    (0..)
        .zip(vcpus.into_iter().zip(states))
        .map(|(index, (state, encoded))| {
            vcpu(state, &encoded, has_platform)
                .map_err(|cause| SnapshotError::Vcpu { vcpu: index, cause })
        })
        .collect()
}

/// Finds the states of vCPUs 0 to `vcpus`, in this order and without any other.
fn states(extended: &[u8], vcpus: usize) -> Result<Vec<Encoded<'_>>, SnapshotError> {
    let states = wire::states(extended).take(vcpus.saturating_add(1));
    let states = states.collect::<Result<Vec<_>, _>>()?;
    if !states
        .iter()
        .map(Encoded::vcpu)
        .eq((0..).take(vcpus).map(Some))
    {
        return Err(SnapshotError::States { vcpus });
    }
    Ok(states)
}

fn vcpu(vcpu: Vcpu<'_>, encoded: &Encoded<'_>, has_platform: bool) -> Result<VcpuState, VcpuCause> {
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
    if vcpu.lapic.is_some() != has_platform {
        return Err(VcpuCause::LocalApic { has_platform });
    }
    Ok(VcpuState {
        extended: extended(encoded, &vcpu.cpuid)?,
        lapic: vcpu.lapic.map(lapic).transpose()?,
        cpuid: vcpu.cpuid,
        general: vcpu.general,
        special: vcpu.special,
        debug: vcpu.debug,
        events: vcpu.events,
        mp_state: vcpu.mp_state,
        msrs: vcpu.msrs,
    })
}

fn lapic(bytes: &[u8]) -> Result<Box<LocalApic>, VcpuCause> {
    let lapic = <&LocalApic>::try_from(bytes).map_err(|_| VcpuCause::LocalApicBytes {
        actual_bytes: bytes.len(),
    })?;
    Ok(Box::new(*lapic))
}

/// Decodes a state, whose layout is that of the host where it was captured, and compares it with the vCPU's
/// CPUID: what it has in use and enabled must be there, at the same place. Palettes and MXCSR bits are the
/// host's, whatever CPUID says of them.
fn extended(
    encoded: &Encoded<'_>,
    cpuid: &[CpuidEntry],
) -> Result<ExtendedState<'static>, VcpuCause> {
    let blob = encoded.blob().map_err(|unreadable| unreadable.error)?;
    let state = blob.decode()?;
    let entries: Vec<kvm_cpuid_entry2> = cpuid.iter().copied().map(Into::into).collect();
    let guest = Layout::from_kvm_cpuid(&entries)?;
    let components = guest.components().copied();
    let components = components.filter(|c| !XFeatures::LEGACY.contains(c.id().bit()));
    let palettes = state.layout().palettes().iter().copied();
    let expected =
        Layout::from_parts(components, palettes)?.with_mxcsr_mask(state.layout().mxcsr_mask());
    let misfit = state.misfits(&expected).next();
    misfit.map_or(Ok(state), |misfit| Err(VcpuCause::Misfit(misfit)))
}

fn platform(platform: Platform<'_>) -> Result<platform::Platform, SnapshotError> {
    let mut chips = [(); 3].map(|()| Box::new([0; CHIP_BYTES]));
    for (chip, bytes) in chips.iter_mut().zip(platform.chips) {
        let bytes = <&Chip>::try_from(bytes).map_err(|_| SnapshotError::ChipBytes {
            actual_bytes: bytes.len(),
        })?;
        **chip = *bytes;
    }
    Ok(platform::Platform {
        chips,
        timer: platform.timer,
        clock: platform.clock,
        devices: platform.devices,
    })
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
    /// The state cannot be read.
    #[error("the state of vCPUs and devices: {0}")]
    Postcard(#[from] postcard::Error),
    /// There is something behind it.
    #[error("{bytes} bytes behind the state of vCPUs and devices")]
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
    /// The extended states are damaged.
    #[error("the extended states: {0}")]
    Extended(#[from] Unreadable),
    /// There is not exactly one extended state for each vCPU, in their order.
    #[error("the extended states are not those of vCPU 0 and on, one for each of {vcpus} vCPUs")]
    States {
        /// The vCPUs of the VM.
        vcpus: usize,
    },
    /// An interrupt controller has another length.
    #[error("an interrupt controller of {actual_bytes} bytes; it has 512")]
    ChipBytes {
        /// In the file.
        actual_bytes: usize,
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
    /// The extended state is not valid.
    #[error(transparent)]
    Extended(#[from] DecodeError),
    /// The extended state does not fit its CPUID.
    #[error("the extended state does not fit the vCPU's CPUID: {0}")]
    Misfit(Misfit),
    /// A local APIC without the other interrupt controllers, or the other way round.
    #[error("{}", if *.has_platform {
        "it has no local APIC, and the VM has interrupt controllers"
    } else {
        "it has a local APIC, and the VM has no other interrupt controllers"
    })]
    LocalApic {
        /// The VM has interrupt controllers.
        has_platform: bool,
    },
    /// The local APIC has another length.
    #[error("a local APIC of {actual_bytes} bytes; it has 1024")]
    LocalApicBytes {
        /// In the file.
        actual_bytes: usize,
    },
}

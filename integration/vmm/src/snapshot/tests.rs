//! Snapshot bytes that were cut, changed or made up. No KVM is needed.
//!
//! The guest is one of Sapphire Rapids with live tiles, so that every rule of the extended state has
//! something to bite on.

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use xsave_state::wire::DecodeError;
use xsave_state::{
    ComponentId, ExtendedState, Image, Layout, Misfit, Registers, StateError, XFeatures,
};

use super::header::{HEADER_BYTES, HeaderError};
use super::wire::{Platform as WirePlatform, State, Vcpu, extended as encoded};
use super::*;
use crate::linux::devices;
use crate::memory::PAGE_BYTES;
use crate::platform::CHIP_BYTES;
use crate::registers::Timer;

const HEADER_CHECKSUM: usize = 60;
const BODY_CHECKSUM: usize = 40;
/// How much of the file the single-bit tests change.
const FIRST: usize = 4096;

/// The leaves of Sapphire Rapids that say where its components lie: layout.rs of xsave-state tests
/// them against the processor.
pub(crate) fn cpuid() -> Vec<CpuidEntry> {
    const LEAVES: [(u32, u32, [u32; 4]); 15] = [
        (0x0, 0, [0x20, 0x756e_6547, 0x6c65_746e, 0x4965_6e69]),
        (0x1, 0, [0x806f8, 0x800, 1 << 26, 0]),
        (0x7, 0, [2, 0xf1bf_27eb, 0x1841_5f6e, 0xbfc0_4410]),
        (0xd, 0, [0x602e7, 0x2b00, 0x2b00, 0]),
        (0xd, 1, [0x1f, 0x2a00, 0, 0]),
        (0xd, 2, [256, 576, 0, 0]),
        (0xd, 5, [64, 1088, 0, 0]),
        (0xd, 6, [512, 1152, 0, 0]),
        (0xd, 7, [1024, 1664, 0, 0]),
        (0xd, 9, [8, 2688, 0, 0]),
        (0xd, 17, [64, 2752, 2, 0]),
        (0xd, 18, [8192, 2816, 6, 0]),
        (0x1d, 0, [1, 0, 0, 0]),
        (0x1d, 1, [0x0400_2000, 0x0008_0040, 0x10, 0]),
        (0x1e, 0, [0, 0x4010, 0, 0]),
    ];
    let entry = |(function, index, [eax, ebx, ecx, edx]): (u32, u32, [u32; 4])| CpuidEntry {
        function,
        index,
        flags: u32::from(matches!(function, 0x7 | 0xd | 0x1d | 0x1e)),
        eax,
        ebx,
        ecx,
        edx,
    };
    LEAVES.map(entry).to_vec()
}

fn extended(seed: u8) -> ExtendedState<'static> {
    let entries: Vec<_> = cpuid().into_iter().map(Into::into).collect();
    let layout = Layout::from_kvm_cpuid(&entries).unwrap();
    let mut area = vec![seed; layout.standard_size()];
    area[24..28].copy_from_slice(&0x9fc0u32.to_le_bytes());
    area[416..576].fill(0);
    area[512..520].copy_from_slice(&0x602e7u64.to_le_bytes());
    area[2752..2816].fill(0);
    area[2752] = 1;
    for tile in 0..8 {
        area[2752 + 16 + 2 * tile] = 64;
        area[2752 + 48 + tile] = 16;
    }
    let registers = Registers::RESET.with_xcr0(XFeatures::from_bits_retain(0x602e7));
    let image = Image::parse(&area, &layout).unwrap();
    ExtendedState::new(image, registers).unwrap().into_owned()
}

pub(crate) fn snapshot() -> Snapshot {
    let vcpu = |seed: u8| VcpuState {
        cpuid: cpuid(),
        extended: extended(seed),
        general: General {
            rip: u64::from(seed),
            ..General::default()
        },
        special: Special::default(),
        debug: Debug::default(),
        events: Events::default(),
        mp_state: MpState::default(),
        msrs: vec![Msr {
            index: 0x10,
            data: 77,
        }],
        lapic: None,
    };
    Snapshot {
        vcpus: vec![vcpu(3), vcpu(4)],
        memory: Pages {
            memory_bytes: 64 * PAGE_BYTES as u64,
            numbers: vec![1, 63],
            content: (0..2 * PAGE_BYTES).map(|i| (i / 7) as u8).collect(),
        },
        tsc_khz: Some(2_000_000),
        platform: None,
    }
}

/// The same with interrupt controllers, timer, clock and devices.
pub(crate) fn linux_snapshot() -> Snapshot {
    let mut snapshot = snapshot();
    for (fill, vcpu) in (1..).zip(&mut snapshot.vcpus) {
        vcpu.lapic = Some(Box::new([fill; 1024]));
    }
    snapshot.platform = Some(Platform {
        chips: [1, 2, 3].map(|fill| Box::new([fill; CHIP_BYTES])),
        timer: Timer {
            flags: 2,
            ..Timer::default()
        },
        clock: 12_345_678_901,
        devices: devices::State::default(),
    });
    snapshot
}

/// A smaller one, for the tests that read it tens of thousands of times: the tiles of the first
/// vCPU are initial, and it has no second.
fn small() -> Snapshot {
    let mut small = snapshot();
    small.vcpus.truncate(1);
    small.memory.numbers.truncate(1);
    small.memory.content.truncate(PAGE_BYTES);
    small.map_extended(|extended| {
        let image = extended.image().clone();
        let image = image.without(ComponentId::XTILEDATA.bit());
        ExtendedState::new(image, extended.registers()).unwrap()
    })
}

/// Makes both checksums right again: what somebody with bad intentions would do.
fn seal(bytes: &mut [u8]) {
    if bytes.len() < HEADER_BYTES {
        return;
    }
    let body = crc32fast::hash(&bytes[HEADER_BYTES..]);
    bytes[BODY_CHECKSUM..BODY_CHECKSUM + 4].copy_from_slice(&body.to_le_bytes());
    let header = crc32fast::hash(&bytes[..HEADER_CHECKSUM]);
    bytes[HEADER_CHECKSUM..HEADER_BYTES].copy_from_slice(&header.to_le_bytes());
}

/// What was accepted must hold every invariant.
fn assert_holds(bytes: &[u8]) {
    let Ok(snapshot) = Snapshot::from_bytes(bytes) else {
        return;
    };
    assert!((1..=usize::from(crate::vm::MAX_VCPUS)).contains(&snapshot.vcpus.len()));
    for vcpu in &snapshot.vcpus {
        let extended = &vcpu.extended;
        let layout = extended.layout();
        let entries: Vec<_> = vcpu.cpuid.iter().copied().map(Into::into).collect();
        let guest = Layout::from_kvm_cpuid(&entries).unwrap();
        let palettes = layout.palettes().to_vec();
        let components = guest.components().skip(2).copied();
        let guest = Layout::from_parts(components, palettes).unwrap();
        let guest = guest.with_mxcsr_mask(layout.mxcsr_mask());
        assert_eq!(extended.misfits(&guest).next(), None);
        let image = Image::parse(extended.image().as_bytes(), layout).unwrap();
        assert_eq!(
            ExtendedState::new(image, extended.registers()).unwrap(),
            *extended
        );
        let in_use = extended.image().xstate_bv();
        assert!(layout.user().contains(in_use));
        assert!(!in_use.intersects(extended.registers().xfd));
        assert!(
            vcpu.msrs
                .iter()
                .all(|msr| !matches!(msr.index, 0x1c4 | 0x1c5))
        );
    }
    let pages = snapshot.memory.memory_bytes / PAGE_BYTES as u64;
    assert!(snapshot.memory.numbers.is_sorted_by(|a, b| a < b));
    assert!(
        snapshot
            .memory
            .numbers
            .iter()
            .all(|n| u64::from(*n) < pages)
    );
    assert_eq!(
        snapshot.memory.content.len(),
        snapshot.memory.len() * PAGE_BYTES
    );
}

#[test]
fn what_is_written_is_what_is_read() {
    let bytes = snapshot().to_bytes();
    assert_eq!(Snapshot::from_bytes(&bytes), Ok(snapshot()));
    assert_eq!(snapshot().to_bytes(), bytes);
    assert_holds(&bytes);
    let bytes = linux_snapshot().to_bytes();
    assert_eq!(Snapshot::from_bytes(&bytes), Ok(linux_snapshot()));
    assert_holds(&bytes);
}

#[test]
fn every_single_bit_flip_is_refused() {
    let good = small().to_bytes();
    assert!(good.len() > FIRST);
    let mut bytes = good.clone();
    for bit in 0..8 * FIRST {
        bytes[bit / 8] ^= 1 << (bit % 8);
        let error = Snapshot::from_bytes(&bytes).unwrap_err();
        let named = matches!(
            (bit / 8, &error),
            (0..8, SnapshotError::Header(HeaderError::Magic { .. }))
                | (8..12, SnapshotError::Header(HeaderError::Version { .. }))
                | (12..64, SnapshotError::Header(HeaderError::Checksum { .. }))
                | (64.., SnapshotError::Checksum { .. })
        );
        assert!(named, "bit {bit}: {error:?}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    assert_eq!(bytes, good);
}

#[test]
fn every_single_bit_flip_with_right_checksums_is_refused_or_valid() {
    let good = small().to_bytes();
    for bit in 0..8 * FIRST {
        let mut bytes = good.clone();
        bytes[bit / 8] ^= 1 << (bit % 8);
        seal(&mut bytes);
        assert_holds(&bytes);
    }
}

#[test]
fn ten_thousand_random_changes_are_refused() {
    let good = small().to_bytes();
    let mut rng = StdRng::seed_from_u64(1);
    for round in 0..10_000 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..8) {
            let at = rng.random_range(0..bytes.len());
            bytes[at] = rng.random();
        }
        if bytes != good {
            let result = Snapshot::from_bytes(&bytes);
            assert!(result.is_err(), "round {round}");
        }
    }
}

#[test]
fn ten_thousand_random_changes_with_right_checksums_are_refused_or_valid() {
    let good = small().to_bytes();
    let mut rng = StdRng::seed_from_u64(2);
    let (mut refused, mut accepted) = (0, 0);
    for _ in 0..10_000 {
        let mut bytes = good.clone();
        for _ in 0..rng.random_range(1..4) {
            // Where there is something to break, more often than in the pages' content.
            let end = match rng.random_range(0..10) {
                0..5 => 600,  // the header, CPUID, XCR0
                5..8 => 1300, // the legacy region and the header of the first area
                _ => bytes.len(),
            };
            let start = rng.random_range(0..end);
            let len = rng.random_range(1..=16.min(bytes.len() - start));
            match rng.random_range(0..4) {
                0 => rng.fill(&mut bytes[start..start + len]),
                1 => bytes[start..start + len].fill(0xff),
                2 => bytes[start..start + len].fill(0),
                _ => {
                    let from = rng.random_range(0..bytes.len() - len);
                    bytes.copy_within(from..from + len, start);
                }
            }
        }
        seal(&mut bytes);
        assert_holds(&bytes);
        match Snapshot::from_bytes(&bytes) {
            Ok(snapshot) => {
                accepted += 1;
                let again = Snapshot::from_bytes(&snapshot.to_bytes());
                assert_eq!(again, Ok(snapshot));
            }
            Err(_) => refused += 1,
        }
    }
    println!("{refused} refused, {accepted} valid");
    assert!(refused > 1000, "{refused} refused: the changes hit nothing");
    assert!(
        accepted > 1000,
        "{accepted} accepted: the changes hit the same check always"
    );
}

#[test]
fn every_truncation_is_refused() {
    let good = snapshot().to_bytes();
    for len in 0..good.len() {
        let cut = &good[..len];
        let error = Snapshot::from_bytes(cut).unwrap_err();
        let named = if len < HEADER_BYTES {
            matches!(error, SnapshotError::Header(HeaderError::TooShort { .. }))
        } else {
            matches!(error, SnapshotError::Header(HeaderError::Length { .. }))
        };
        assert!(named, "{len} bytes: {error:?}");
    }
}

#[test]
fn truncations_that_the_header_agrees_with_are_refused_or_valid() {
    let good = snapshot().to_bytes();
    let state_end = good.len() - 2 * (PAGE_BYTES + 4);
    for len in HEADER_BYTES..state_end {
        // The registers end early; numbers and pages follow as before.
        let mut bytes = good[..len].to_vec();
        bytes.extend_from_slice(&good[state_end..]);
        let state_bytes = (len - HEADER_BYTES) as u64;
        bytes[16..24].copy_from_slice(&state_bytes.to_le_bytes());
        seal(&mut bytes);
        let error = Snapshot::from_bytes(&bytes).unwrap_err();
        assert!(
            matches!(error, SnapshotError::Postcard(_)),
            "{len}: {error:?}"
        );
    }
}

#[test]
fn whatever_is_appended_is_refused() {
    for extra in [1, 4, 64, 4096, 1 << 20] {
        let mut bytes = snapshot().to_bytes();
        bytes.resize(bytes.len() + extra, 0);
        for sealed in [false, true] {
            if sealed {
                seal(&mut bytes);
            }
            assert!(matches!(
                Snapshot::from_bytes(&bytes),
                Err(SnapshotError::Header(HeaderError::Length { .. }))
            ));
        }
    }
}

#[test]
fn each_field_of_the_header_has_its_error() {
    fn error(at: usize, value: &[u8]) -> HeaderError {
        let mut bytes = snapshot().to_bytes();
        bytes[at..at + value.len()].copy_from_slice(value);
        seal(&mut bytes);
        match Snapshot::from_bytes(&bytes) {
            Err(SnapshotError::Header(error)) => error,
            other => panic!("{other:?}"),
        }
    }
    let huge = u64::MAX.to_le_bytes();
    assert!(matches!(error(0, b"x"), HeaderError::Magic { .. }));
    assert!(matches!(
        error(8, &[5]),
        HeaderError::Version { found: 5, .. }
    ));
    assert!(matches!(
        error(12, &[65]),
        HeaderError::HeaderBytes { found: 65 }
    ));
    assert!(matches!(error(16, &huge), HeaderError::StateBytes { .. }));
    assert!(matches!(error(24, &huge), HeaderError::MemoryBytes { .. }));
    assert!(matches!(error(24, &[1]), HeaderError::MemoryBytes { .. }));
    assert!(matches!(
        error(24, &[0; 8]),
        HeaderError::MemoryBytes { found: 0, .. }
    ));
    assert!(matches!(
        error(32, &[65]),
        HeaderError::Pages { found: 65, .. }
    ));
    assert!(matches!(error(32, &[0xff; 4]), HeaderError::Pages { .. }));
    assert!(matches!(error(36, &[1]), HeaderError::PageBytes { .. }));
    assert!(matches!(error(44, &[1]), HeaderError::Reserved));
    assert!(matches!(error(59, &[1]), HeaderError::Reserved));
    assert!(matches!(error(32, &[4]), HeaderError::Length { .. }));
}

/// The file with the registers changed, and right in all else.
fn with_state(
    snapshot: &Snapshot,
    change: impl FnOnce(&mut State<'_>),
) -> Result<Snapshot, SnapshotError> {
    let extended = encoded(&snapshot.vcpus);
    let mut state = State {
        vcpus: snapshot.vcpus.iter().map(Vcpu::from).collect(),
        extended: &extended,
        tsc_khz: snapshot.tsc_khz,
        platform: snapshot.platform.as_ref().map(WirePlatform::from),
    };
    change(&mut state);
    file(snapshot, &postcard::to_allocvec(&state).unwrap())
}

/// The same with vCPU 1's changed.
fn with(change: impl FnOnce(&mut Vcpu<'_>)) -> Result<Snapshot, SnapshotError> {
    with_state(&snapshot(), |state| change(state.vcpus.last_mut().unwrap()))
}

/// `state` with the memory of `snapshot`, read.
fn file(snapshot: &Snapshot, state: &[u8]) -> Result<Snapshot, SnapshotError> {
    let good = snapshot.to_bytes();
    let mut bytes = good[..HEADER_BYTES].to_vec();
    bytes[16..24].copy_from_slice(&(state.len() as u64).to_le_bytes());
    bytes.extend_from_slice(state);
    bytes.extend_from_slice(&good[HEADER_BYTES + snapshot.state_bytes().len()..]);
    seal(&mut bytes);
    Snapshot::from_bytes(&bytes)
}

fn cause(change: impl FnOnce(&mut Vcpu<'_>)) -> VcpuCause {
    match with(change) {
        Err(SnapshotError::Vcpu { vcpu: 1, cause }) => cause,
        other => panic!("{other:?}"),
    }
}

#[test]
fn hostile_registers_are_named() {
    assert_eq!(with(|_| {}), Ok(snapshot()));
    assert!(matches!(
        cause(|vcpu| vcpu.cpuid.resize(257, CpuidEntry::default())),
        VcpuCause::CpuidEntries { entries: 257, .. }
    ));
    assert!(matches!(
        cause(|vcpu| vcpu.msrs.resize(1025, Msr::default())),
        VcpuCause::Msrs { msrs: 1025, .. }
    ));
    for index in [0x1c4, 0x1c5] {
        assert_eq!(
            cause(|vcpu| vcpu.msrs.push(Msr { index, data: 0 })),
            VcpuCause::MsrOfExtendedState { index }
        );
    }
    // Without CPUID a guest has x87 and SSE.
    assert!(matches!(
        cause(|vcpu| vcpu.cpuid.clear()),
        VcpuCause::Misfit(Misfit::Missing { .. })
    ));
    assert!(matches!(
        cause(|vcpu| vcpu.cpuid.retain(|e| (e.function, e.index) != (0xd, 9))),
        VcpuCause::Layout(_)
    ));
    assert_eq!(
        cause(|vcpu| vcpu.lapic = Some(&[0; 1024])),
        VcpuCause::LocalApic {
            has_platform: false
        }
    );
}

#[test]
fn hostile_interrupt_controllers_are_named() {
    let linux = linux_snapshot();
    assert_eq!(with_state(&linux, |_| {}), Ok(linux_snapshot()));
    let error = with_state(&linux, |state| state.vcpus[1].lapic = None).unwrap_err();
    let cause = VcpuCause::LocalApic { has_platform: true };
    assert_eq!(error, SnapshotError::Vcpu { vcpu: 1, cause });
    let error = with_state(&linux, |state| state.vcpus[0].lapic = Some(&[0; 1023])).unwrap_err();
    let cause = VcpuCause::LocalApicBytes { actual_bytes: 1023 };
    assert_eq!(error, SnapshotError::Vcpu { vcpu: 0, cause });
    let error = with_state(&linux, |state| {
        state.platform.as_mut().unwrap().chips[2] = &[0; 513];
    });
    assert_eq!(error, Err(SnapshotError::ChipBytes { actual_bytes: 513 }));
    let error = with_state(&linux, |state| state.platform = None).unwrap_err();
    let cause = VcpuCause::LocalApic {
        has_platform: false,
    };
    assert_eq!(error, SnapshotError::Vcpu { vcpu: 0, cause });
}

/// The states of `snapshot` with the first one changed, and its checksum right: where
/// docs/state-format.md has them.
fn forged(snapshot: &Snapshot, change: impl FnOnce(&mut [u8])) -> Vec<u8> {
    let mut bytes = encoded(&snapshot.vcpus);
    let total = u32::from_le_bytes(bytes[12..16].try_into().unwrap());
    let state = &mut bytes[..usize::try_from(total).unwrap()];
    change(state);
    let (body, stored) = state.split_at_mut(state.len() - 4);
    stored.copy_from_slice(&crc32fast::hash(body).to_le_bytes());
    bytes
}

/// Reads `snapshot` with these extended states.
fn with_extended(snapshot: &Snapshot, extended: Vec<u8>) -> Result<Snapshot, SnapshotError> {
    with_state(snapshot, |state| {
        // It lives as long as the process.
        state.extended = Box::leak(extended.into_boxed_slice());
    })
}

#[test]
fn hostile_extended_state_is_named() {
    /// Where docs/state-format.md has them.
    const XCR0: usize = 20;
    const XFD: usize = 28;
    let error = |at: usize, value: u64| {
        let snapshot = snapshot();
        let extended = forged(&snapshot, |state| {
            state[at..at + 8].copy_from_slice(&value.to_le_bytes());
        });
        with_extended(&snapshot, extended)
    };
    assert_eq!(error(XCR0, 0x602e7), Ok(snapshot()), "XCR0 as it was");
    // Tiles in use and disabled: the state that takes unfixed hosts down.
    for (at, value) in [(XFD, 1 << 18), (XFD, 1 << 17), (XCR0, 0xe3), (XCR0, 0)] {
        let error = error(at, value).unwrap_err();
        let SnapshotError::Vcpu {
            vcpu: 0,
            cause: VcpuCause::Extended(rule),
        } = error
        else {
            panic!("{at}: {error:?}")
        };
        println!("{rule}");
        let disabled = matches!(
            rule,
            DecodeError::State(StateError::InUseWhileDisabled { .. })
        );
        assert_eq!(disabled, (at, value) == (XFD, 1 << 18), "{rule}");
    }
}

#[test]
fn there_is_one_extended_state_for_each_vcpu() {
    let all = snapshot();
    let mut one = snapshot();
    one.vcpus.truncate(1);
    let (first, both) = (encoded(&one.vcpus), encoded(&all.vcpus));
    for (vcpus, extended) in [
        (&all, first.clone()),
        (&all, [&first[..], &first].concat()),
        (&all, [&both[first.len()..], &first].concat()),
        (&one, both.clone()),
        (&all, Vec::new()),
    ] {
        let expected = SnapshotError::States {
            vcpus: vcpus.vcpus.len(),
        };
        assert_eq!(with_extended(vcpus, extended), Err(expected));
    }
    for damaged in [vec![0; 64], both[..both.len() - 1].to_vec()] {
        let error = with_extended(&all, damaged);
        assert!(
            matches!(error, Err(SnapshotError::Extended(_))),
            "{error:?}"
        );
    }
}

/// Its own layout is that of the host where it was captured; what is in use must be where the CPUID has it.
#[test]
fn a_state_of_another_layout_than_its_cpuid_is_named() {
    let change = |subleaf, change: fn(&mut CpuidEntry)| {
        cause(|vcpu| {
            let mut entries = vcpu.cpuid.iter_mut();
            let entry = entries.find(|e| (e.function, e.index) == (0xd, subleaf));
            change(entry.unwrap());
        })
    };
    assert_eq!(
        change(9, |pkru| pkru.ebx = 2696),
        VcpuCause::Misfit(Misfit::Offset {
            component: ComponentId::PKRU,
            source_offset: 2688,
            target_offset: 2696
        })
    );
    assert_eq!(
        change(0, |user| user.eax &= !(1 << 9)),
        VcpuCause::Misfit(Misfit::Missing {
            component: ComponentId::PKRU
        })
    );
}

/// The palettes and MXCSR bits of a state are those of the processor, whatever the guest's CPUID hides.
#[test]
fn a_guest_whose_cpuid_hides_palettes_has_a_snapshot() {
    let mut hidden = snapshot();
    for vcpu in &mut hidden.vcpus {
        vcpu.cpuid.retain(|entry| entry.function != 0x1d);
    }
    assert_eq!(Snapshot::from_bytes(&hidden.to_bytes()), Ok(hidden));
}

#[test]
fn the_number_of_vcpus_is_limited() {
    for vcpus in [0, 17, 100] {
        let mut snapshot = snapshot();
        let all = vec![snapshot.vcpus[0].clone(); vcpus];
        snapshot.vcpus.clear();
        let state = State {
            vcpus: all.iter().map(Vcpu::from).collect(),
            extended: &[],
            tsc_khz: None,
            platform: None,
        };
        let state = postcard::to_allocvec(&state).unwrap();
        assert_eq!(
            file(&snapshot, &state),
            Err(SnapshotError::VcpuCount { vcpus, limit: 16 })
        );
    }
}

#[test]
fn lengths_that_nothing_follows_allocate_nothing() {
    let mut empty = snapshot();
    empty.vcpus.clear();
    // A postcard length of 2^63 vCPUs, or CPUID entries of the first.
    let huge = [0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f];
    for state in [huge.to_vec(), [&[1][..], &huge].concat()] {
        assert!(matches!(
            file(&empty, &state),
            Err(SnapshotError::Postcard(_))
        ));
    }
    // Something behind the last vCPU.
    let mut state = snapshot().state_bytes();
    state.push(0);
    assert_eq!(
        file(&empty, &state),
        Err(SnapshotError::TrailingBytes { bytes: 1 })
    );
}

#[test]
fn page_numbers_ascend_within_memory() {
    for (numbers, expected) in [
        (
            [5, 64],
            PageError::OutOfRange {
                page: 64,
                limit: 64,
            },
        ),
        (
            [5, u32::MAX],
            PageError::OutOfRange {
                page: u32::MAX,
                limit: 64,
            },
        ),
        ([5, 5], PageError::Order { page: 5, next: 5 }),
        ([5, 1], PageError::Order { page: 5, next: 1 }),
    ] {
        let mut snapshot = snapshot();
        snapshot.memory.numbers = numbers.to_vec();
        let bytes = snapshot.to_bytes();
        assert_eq!(
            Snapshot::from_bytes(&bytes),
            Err(SnapshotError::Page(expected))
        );
    }
}

#[test]
fn the_area_ends_with_what_is_in_use() {
    let full = snapshot().to_bytes().len();
    let small = snapshot().map_extended(|extended| {
        let image = extended
            .image()
            .clone()
            .without(ComponentId::XTILEDATA.bit());
        ExtendedState::new(image, extended.registers()).unwrap()
    });
    let bytes = small.to_bytes();
    assert!(
        bytes.len() <= full - 2 * 8192,
        "tiles that are initial take no room"
    );
    assert_eq!(Snapshot::from_bytes(&bytes), Ok(small));
}

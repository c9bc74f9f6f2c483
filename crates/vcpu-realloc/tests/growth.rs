//! The VMM's memory and accounts: with an allocator that fails at each step, and one that counts.
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

#[expect(unsafe_code, reason = "a global allocator needs it")]
mod allocator;

use allocator::{failing_at, live_bytes};
use vcpu_realloc::growth::{
    Answer, Grow, Ledger, LedgerError, LoadError, Request, Scope, StateMemory, StoreError,
};
use vcpu_realloc::{Action, Event, Gate, Growth};
use xsave_state::{
    Component, ComponentId, ExtendedState, Image, Layout, Palette, Registers, XFeatures,
};

const TILES: XFeatures = XFeatures::XTILEDATA;

/// A guest of a Sapphire Rapids.
fn layout() -> Layout {
    Layout::from_parts(
        [
            Component::user(ComponentId::AVX, 576, 256),
            Component::user(ComponentId::OPMASK, 1088, 64),
            Component::user(ComponentId::ZMM_HI256, 1152, 512),
            Component::user(ComponentId::HI16_ZMM, 1664, 1024),
            Component::user(ComponentId::PKRU, 2688, 8),
            Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
        ],
        [Palette::ONE],
    )
    .unwrap()
}

fn growth(layout: &Layout) -> Growth {
    Gate::new(layout).everything().unwrap()
}

fn request(vcpu: u64, scope: Scope) -> Request {
    let growth = growth(&layout());
    Request {
        vcpu,
        growth,
        scope,
    }
}

/// A state with these components in use; their bytes differ from place to place.
fn state(layout: &Layout, in_use: u64, seed: u8) -> ExtendedState<'static> {
    let mut area: Vec<u8> = (0..11_008u32).map(|i| (i % 251) as u8 ^ seed).collect();
    area[24..32].copy_from_slice(&[0x80, 0x1f, 0, 0, 0xff, 0xff, 0, 0]);
    area[416..576].fill(0);
    area[512..520].copy_from_slice(&in_use.to_le_bytes());
    area[2752..2816].fill(0);
    let registers = Registers::RESET.with_xcr0(layout.user());
    let image = Image::parse(&area, layout).unwrap().into_owned();
    ExtendedState::new(image, registers).unwrap()
}

#[test]
fn a_state_is_kept_before_and_after_growth() {
    let layout = layout();
    let mut memory = StateMemory::try_new(&layout).unwrap();
    let mut scratch = vec![0xaa; 11_008];
    let loaded =
        |memory: &StateMemory, scratch: &mut [u8]| memory.load(scratch).unwrap().into_owned();
    assert_eq!(loaded(&memory, &mut scratch), ExtendedState::reset(&layout));

    let without_tiles = state(&layout, 0x202e7, 1);
    memory.store(&without_tiles).unwrap();
    assert_eq!(memory.bytes(), 2816);
    assert_eq!(loaded(&memory, &mut scratch), without_tiles);

    // Tiles have no room yet, and what was stored stays.
    let with_tiles = state(&layout, 0x602e7, 2);
    assert_eq!(
        memory.store(&with_tiles),
        Err(StoreError::NotGranted {
            in_use: XFeatures::from_bits_retain(0x602e7),
            missing: TILES
        })
    );
    assert_eq!(loaded(&memory, &mut scratch), without_tiles);

    memory.grow(&growth(&layout)).unwrap();
    assert_eq!((memory.bytes(), memory.granted()), (11_008, TILES));
    assert_eq!(loaded(&memory, &mut scratch), without_tiles);
    memory.store(&with_tiles).unwrap();
    assert_eq!(loaded(&memory, &mut scratch), with_tiles);
    // Nothing of a state stays behind in the next.
    memory.store(&without_tiles).unwrap();
    assert_eq!(loaded(&memory, &mut scratch), without_tiles);
    memory.clear();
    assert_eq!(loaded(&memory, &mut scratch), ExtendedState::reset(&layout));

    assert_eq!(
        memory.load(&mut scratch[..11_007]).unwrap_err(),
        LoadError::TooShort {
            required_bytes: 11_008,
            actual_bytes: 11_007
        }
    );
}

#[test]
fn a_state_of_another_layout_is_refused() {
    let mut memory = StateMemory::try_new(&layout()).unwrap();
    let other = layout().with_mxcsr_mask(0x2ffff);
    let state = ExtendedState::reset(&other);
    assert_eq!(memory.store(&state), Err(StoreError::Layout));
}

/// Each allocation of each operation fails in turn: an error, nothing has changed, and the next try
/// succeeds.
#[test]
fn every_allocation_can_fail() {
    let layout = layout();
    let mut steps = 0;
    for step in 1.. {
        let result = failing_at(step, || StateMemory::try_new(&layout).map(drop));
        if result.is_ok() {
            break;
        }
        steps += 1;
    }
    for step in 1.. {
        let mut ledger = Ledger::<u64>::new();
        let result = failing_at(step, || ledger.add(0, &layout));
        if result.is_ok() {
            break;
        }
        assert!(matches!(result, Err(LedgerError::OutOfMemory(_))));
        assert_eq!(ledger.bytes(), 0);
        ledger.add(0, &layout).unwrap();
        steps += 1;
    }
    for scope in [Scope::Vcpu, Scope::Vm] {
        for step in 1.. {
            let mut ledger = Ledger::new();
            for vcpu in 0..4 {
                ledger.add(vcpu, &layout).unwrap();
                let memory = ledger.memory_mut(vcpu).unwrap();
                memory.store(&state(&layout, 0x202e7, vcpu as u8)).unwrap();
            }
            let request = request(2, scope);
            let before = live_bytes();
            let result = failing_at(step, || ledger.grow(&request, 77));
            if result.is_ok() {
                break;
            }
            // All or nothing.
            assert_eq!(live_bytes(), before);
            assert_eq!((ledger.live(), ledger.bytes()), (0, 4 * 2816));
            assert_eq!(ledger.first_use(), None);
            ledger.grow(&request, 78).unwrap();
            assert_eq!(ledger.first_use(), Some((2, 78)));
            let mut scratch = vec![0; 11_008];
            for vcpu in 0..4 {
                let kept = ledger.memory(vcpu).unwrap().load(&mut scratch).unwrap();
                assert_eq!(kept, state(&layout, 0x202e7, vcpu as u8));
            }
            steps += 1;
        }
    }
    // One for a memory, two to add, and the list and one per vCPU to grow.
    assert_eq!(steps, 1 + 2 + 2 + 5);
}

/// The whole way: the guest's first use, no memory at step n, the VMM's error, a retry.
#[test]
fn out_of_memory_at_first_use_is_retried() {
    let layout = layout();
    let mut ledger = Ledger::new();
    ledger.add(0, &layout).unwrap();
    let mut gate = Gate::new(&layout);
    let enable = Event::WriteXcr0(layout.user());
    let Action::Grow(growth) = gate.on(enable) else {
        panic!()
    };
    let request = Request {
        vcpu: 0,
        growth,
        scope: Scope::Vcpu,
    };
    let mut vmm = |request: &Request| ledger.grow(request, 5).map(|()| Answer::Grant);
    for step in [1, 2, 1] {
        let answer = failing_at(step, || vmm.grow(&request));
        let error = answer.unwrap_err();
        assert!(
            error.to_string().contains("free some, then retry"),
            "{error}"
        );
        assert_eq!(gate.on(Event::Fail), Action::Hold);
        assert_eq!(gate.on(Event::Retry), Action::Grow(growth));
    }
    assert_eq!(vmm.grow(&request), Ok(Answer::Grant));
    assert_eq!(gate.on(Event::Grant(TILES)), Action::PassThrough);
    assert_eq!((ledger.live(), ledger.live_since(0)), (1, Some(5)));
}

#[test]
fn the_accounts_say_who_is_live_and_since_when() {
    let layout = layout();
    let mut ledger = Ledger::new();
    for vcpu in [7, 3, 5] {
        ledger.add(vcpu, &layout).unwrap();
    }
    assert_eq!(ledger.add(3, &layout), Err(LedgerError::Known { vcpu: 3 }));
    let unknown = Err(LedgerError::Unknown { vcpu: 4 });
    assert_eq!(ledger.grow(&request(4, Scope::Vm), 1), unknown);
    ledger.grow(&request(5, Scope::Vcpu), 10).unwrap();
    ledger.grow(&request(5, Scope::Vcpu), 20).unwrap();
    let since = |ledger: &Ledger<u64>| [3, 5, 7].map(|vcpu| ledger.live_since(vcpu));
    assert_eq!(since(&ledger), [None, Some(10), None]);
    assert_eq!((ledger.live(), ledger.bytes()), (1, 2 * 2816 + 11_008));
    ledger.grow(&request(7, Scope::Vm), 30).unwrap();
    assert_eq!(since(&ledger), [Some(30), Some(10), Some(30)]);
    assert_eq!(ledger.first_use(), Some((5, 10)));
    assert!(ledger.remove(5));
    assert!(!ledger.remove(5));
    assert_eq!((ledger.live(), ledger.bytes()), (2, 2 * 11_008));
    assert!(ledger.memory(5).is_none());
}

/// The goal: at most 4 KiB per vCPU before its first use, and 12 KiB and 256 bytes after it, all
/// included.
#[test]
fn a_vcpu_costs_little_before_its_first_use() {
    let layout = layout();
    let before = live_bytes();
    let mut ledger = Ledger::new();
    let mut gates = Vec::new();
    for vcpu in 0..128 {
        ledger.add(vcpu, &layout).unwrap();
        gates.push(Gate::new(&layout));
    }
    let idle = (live_bytes() - before) / 128;
    ledger.grow(&request(0, Scope::Vm), 1).unwrap();
    let grown = (live_bytes() - before) / 128;
    println!("{idle} bytes per vCPU before its first use, {grown} after");
    assert!(idle <= 4096, "{idle}");
    assert!(grown <= 12 * 1024 + 256, "{grown}");
    assert!(idle >= 2816 && grown >= 11_008, "counted nothing");
}

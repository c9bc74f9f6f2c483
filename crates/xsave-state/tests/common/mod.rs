//! CPUID dumps and areas that the tests share.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::collections::BTreeMap;

use xsave_state::{ExtendedState, Image, Layout, LayoutError, Registers, XFeatures};

/// The layouts that the tests go through: Intel with and without AMX, MPX and AVX-512, and AMD.
pub(crate) const LAYOUTS: [&str; 8] = [
    "sapphire-rapids",
    "sapphire-rapids-emulated-guest",
    "sapphire-rapids-guest-without-amx",
    "granite-rapids",
    "ice-lake-server",
    "amd-zen4-genoa",
    "skylake-client",
    "haswell-client",
];

/// The dumps are compiled in: the tests also run where the sources are not, as in the AMX lab.
macro_rules! dumps {
    ($($name:literal)*) => {
        const DUMPS: &[(&str, &str)] =
            &[$(($name, include_str!(concat!("../fixtures/cpuid/", $name, ".txt")))),*];
    };
}
dumps! {
    "alder-lake-client" "amd-zen2-rome" "amd-zen4-genoa" "emerald-rapids-kvm-supported"
    "emerald-rapids-vm-without-tile-leaves" "granite-rapids" "haswell-client" "ice-lake-server"
    "sapphire-rapids" "sapphire-rapids-emulated-guest" "sapphire-rapids-guest"
    "sapphire-rapids-guest-without-amx" "skylake-client"
}

/// A dump in the format of `cpuid -r`, with `#` for comments. What is not there is zero.
#[derive(Clone)]
pub(crate) struct Dump(BTreeMap<(u32, u32), [u32; 4]>);

impl Dump {
    pub(crate) fn read(name: &str) -> Self {
        let (_, text) = DUMPS.iter().find(|(of, _)| *of == name).unwrap();
        let mut leaves = BTreeMap::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let numbers: Vec<u32> = line
                .split([' ', ':', '='])
                .filter_map(|word| word.strip_prefix("0x"))
                .map(|digits| u32::from_str_radix(digits, 16).unwrap())
                .collect();
            let [leaf, subleaf, eax, ebx, ecx, edx] = numbers[..] else {
                panic!("{name}: {line:?} is not a leaf");
            };
            let before = leaves.insert((leaf, subleaf), [eax, ebx, ecx, edx]);
            assert_eq!(
                before, None,
                "{name}: {leaf:#x}.{subleaf:#x} is there twice"
            );
        }
        Self(leaves)
    }

    pub(crate) fn get(&self, leaf: u32, subleaf: u32) -> [u32; 4] {
        self.0.get(&(leaf, subleaf)).copied().unwrap_or_default()
    }

    /// A leaf, to be changed.
    pub(crate) fn leaf_mut(&mut self, leaf: u32, subleaf: u32) -> &mut [u32; 4] {
        self.0.entry((leaf, subleaf)).or_default()
    }

    pub(crate) fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::from_cpuid(|leaf, subleaf| self.get(leaf, subleaf))
    }

    /// The error after register `register` (0 to 3: EAX to EDX) of a leaf has become `value`.
    pub(crate) fn error(
        mut self,
        leaf: u32,
        subleaf: u32,
        register: usize,
        value: u32,
    ) -> LayoutError {
        self.layout().expect("sound before the change");
        self.leaf_mut(leaf, subleaf)[register] = value;
        self.layout().expect_err("refused after the change")
    }
}

/// The layout of a dump.
pub(crate) fn layout(name: &str) -> Layout {
    Dump::read(name).layout().unwrap()
}

/// What the AMX lab's guest has.
pub(crate) fn amx() -> Layout {
    layout("sapphire-rapids-emulated-guest")
}

pub(crate) fn bits(bits: u64) -> XFeatures {
    XFeatures::from_bits_retain(bits)
}

pub(crate) fn registers(xcr0: u64, xfd: u64, xfd_err: u64) -> Registers {
    Registers::RESET
        .with_xcr0(bits(xcr0))
        .with_xfd(bits(xfd))
        .with_xfd_err(bits(xfd_err))
}

/// An area and registers that are valid together.
pub(crate) fn state(area: &[u8], layout: &Layout, registers: Registers) -> ExtendedState<'static> {
    let image = Image::parse(area, layout).unwrap().into_owned();
    ExtendedState::new(image, registers).unwrap()
}

/// Captured in the lab: XFD armed, the tiles initial. See `fixtures/areas/README.md`.
pub(crate) const ARMED: &[u8] = include_bytes!("../fixtures/areas/armed.xsave2");
/// Captured in the lab: live tiles.
pub(crate) const LIVE_TILES: &[u8] = include_bytes!("../fixtures/areas/live-tiles.xsave2");

/// A valid area of `layout` with all of `xstate_bv` in use: bytes differ from place to place, all
/// tiles of the first palette are configured at their full size.
pub(crate) fn area(layout: &Layout, xstate_bv: u64) -> Vec<u8> {
    let mut area: Vec<u8> = (0..layout.standard_size())
        .map(|i| (i % 251) as u8 | 1)
        .collect();
    area[24..28].copy_from_slice(&0x1fa0u32.to_le_bytes());
    area[28..32].copy_from_slice(&layout.mxcsr_mask().to_le_bytes());
    // Values that the processor gives back as they are: it normalises others when it loads x87. FIP
    // is an exception on AMD's: see `with_pending_exception`.
    area[..24].fill(0);
    area[..6].copy_from_slice(&[0x7f, 0x02, 0, 0, 0xff, 0]); // FCW, FSW, FTW
    area[8..12].copy_from_slice(&0x1234_5678u32.to_le_bytes()); // FIP
    for st in area[32..160].chunks_exact_mut(16) {
        st[10..].fill(0); // reserved, and 0 when the processor has been through it
    }
    area[416..576].fill(0);
    area[512..520].copy_from_slice(&xstate_bv.to_le_bytes());
    let tilecfg = layout.component(xsave_state::ComponentId::XTILECFG);
    if let Some(start) = tilecfg.and_then(|component| component.offset()) {
        area[start..start + 64].fill(0);
        if let Some(palette) = layout.palettes().first() {
            area[start] = palette.id();
            for tile in 0..usize::from(palette.tiles()) {
                let colsb = palette.row_bytes().to_le_bytes();
                area[start + 16 + 2 * tile..][..2].copy_from_slice(&colsb);
                area[start + 48 + tile] = palette.rows() as u8;
            }
        }
    }
    area
}

/// The area with an x87 exception pending (IM clear; B, ES and IE set), for processors to load and
/// save. Where none is, AMD's processors save FOP, FIP and FDP as 0, and what KVM gives of them after
/// a run depends on whether the kernel had to save the registers anew.
pub(crate) fn with_pending_exception(mut area: Vec<u8>) -> Vec<u8> {
    area[..4].copy_from_slice(&[0x7e, 0x02, 0x81, 0x80]); // FCW, FSW
    area[6..8].copy_from_slice(&0x0123u16.to_le_bytes()); // FOP
    area[16..20].copy_from_slice(&0x2345_6789u32.to_le_bytes()); // FDP
    area
}

//! Contents of components that can be told from each other, from zero and from what lay there before.

use crate::component::{PKRU, SSE, TILECFG, TILEDATA, X87};
use crate::cpuid::Layout;

/// MXCSR after reset (SDM vol. 1, 10.2.3).
pub const MXCSR_RESET: u32 = 0x1f80;

/// One value for each component.
#[derive(Clone, Debug)]
pub struct Pattern {
    components: Vec<Vec<u8>>,
    /// The value of MXCSR.
    pub mxcsr: u32,
}

impl Pattern {
    /// The pattern of this seed. No component of it is in its initial configuration.
    #[must_use]
    pub fn new(layout: &Layout, seed: u8) -> Self {
        let components = (0..63)
            .map(|i| match i {
                X87 => x87(seed),
                SSE => noise(seed, i, 256),
                PKRU => {
                    // Key 0 stays usable: this process lives on pages with that key.
                    let rights = 0x5555_5550 | u32::from(seed & 3) << 2 | 1 << 31;
                    [rights.to_le_bytes(), [0; 4]].concat()
                }
                TILECFG => tilecfg(seed),
                _ => noise(seed, i, layout.place(i).map_or(0, |place| place.size)),
            })
            .collect();
        Self {
            components,
            mxcsr: MXCSR_RESET | u32::from(seed & 3) << 13 | 0x8000,
        }
    }

    /// The bytes of a component. x87 has 160, of which 24 to 31 mean nothing.
    #[must_use]
    pub fn bytes(&self, component: u32) -> &[u8] {
        &self.components[component as usize]
    }

    /// The tiles alone, 1,024 bytes each.
    #[must_use]
    pub fn tiles(&self) -> &[u8] {
        self.bytes(TILEDATA)
    }
}

/// A component's initial configuration (SDM vol. 1, 13.6).
#[must_use]
pub fn initial(component: u32, size: usize) -> Vec<u8> {
    let mut bytes = vec![0; size];
    if component == X87 {
        bytes[..2].copy_from_slice(&0x37f_u16.to_le_bytes());
    }
    bytes
}

/// Bytes without a zero among them.
#[must_use]
pub fn noise(seed: u8, stream: u32, size: usize) -> Vec<u8> {
    let mut state = u32::from(seed) << 24 | stream << 8 | 1;
    (0..size)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let [.., byte] = state.to_be_bytes();
            let [high, ..] = state.to_be_bytes();
            (high ^ byte) | 1
        })
        .collect()
}

/// FCW, FSW, FTW, FOP, FIP, FDP and the eight registers, as FXSAVE64 has them.
fn x87(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; 160];
    bytes[0..2].copy_from_slice(&(0x37f_u16 | u16::from(seed & 3) << 10).to_le_bytes());
    // C3, C0: conditions only, so that no exception is pending. Registers 0 to 7 are all valid.
    bytes[2..4].copy_from_slice(&0x4100_u16.to_le_bytes());
    bytes[4] = 0xff;
    bytes[6..8].copy_from_slice(&(0x100 | u16::from(seed)).to_le_bytes());
    bytes[8..16].copy_from_slice(&(0x1234_5678_0000 | u64::from(seed)).to_le_bytes());
    bytes[16..24].copy_from_slice(&(0x2345_6789_0000 | u64::from(seed)).to_le_bytes());
    for (register, value) in bytes[32..].chunks_exact_mut(16).enumerate() {
        // A normal number: the integer bit is set, the exponent is near that of 1.
        value[..8]
            .copy_from_slice(&(1 << 63 | u64::from(seed) << 8 | register as u64).to_le_bytes());
        value[8..10].copy_from_slice(&0x3fff_u16.to_le_bytes());
    }
    bytes
}

/// A valid configuration of palette 1, another one for each seed.
fn tilecfg(seed: u8) -> Vec<u8> {
    let mut bytes = vec![0; 64];
    bytes[0] = 1;
    bytes[1] = seed & 7;
    for tile in 0..8 {
        let rows = 1 + (seed + tile * 3) % 16;
        let columns = 4 * (1 + (seed + tile * 5) % 16);
        bytes[16 + usize::from(tile) * 2] = columns;
        bytes[48 + usize::from(tile)] = rows;
    }
    bytes
}

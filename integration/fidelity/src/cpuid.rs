//! The CPUID instruction, and the XSAVE layout that it describes.

use std::arch::x86_64::__cpuid_count;

/// EAX, EBX, ECX and EDX of a leaf of the processor that this runs on.
#[must_use]
#[allow(unused_unsafe, unsafe_code, reason = "safe in newer compilers only")]
pub fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
    // SAFETY: CPUID exists on every x86-64 processor and touches four registers only.
    let result = unsafe { __cpuid_count(leaf, subleaf) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// One component as sub-leaf *i* of leaf 0DH describes it.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Bytes.
    pub size: usize,
    /// Offset in the standard format.
    pub offset: usize,
    /// ECX\[1\]: at a multiple of 64 bytes in the compacted format.
    pub aligned: bool,
    /// ECX\[2\]: IA32_XFD can disable it.
    pub xfd: bool,
}

/// The places of all user components.
#[derive(Clone, Debug)]
pub struct Layout {
    places: [Option<Place>; 63],
    /// What XCR0 can enable.
    pub user: u64,
    /// Bytes of the standard format with all of them.
    pub size: usize,
}

impl Layout {
    /// Of the processor that this runs on.
    #[must_use]
    pub fn here() -> Self {
        let [low, _, size, high] = cpuid(0xd, 0);
        let user = u64::from(high) << 32 | u64::from(low);
        let places = std::array::from_fn(|i| {
            let [size, offset, flags, _] = cpuid(0xd, u32::try_from(i).unwrap());
            (i >= 2 && user >> i & 1 != 0).then_some(Place {
                size: size as usize,
                offset: offset as usize,
                aligned: flags & 2 != 0,
                xfd: flags & 4 != 0,
            })
        });
        Self {
            places,
            user,
            size: size as usize,
        }
    }

    /// The place of a component from 2 on.
    #[must_use]
    pub fn place(&self, component: u32) -> Option<Place> {
        self.places[component as usize]
    }

    /// The components from 2 on in ascending order.
    pub fn components(&self) -> impl Iterator<Item = (u32, Place)> + '_ {
        (0..63).filter_map(|i| Some((i, self.place(i)?)))
    }

    /// Offsets in the compacted format of this XCOMP_BV (SDM vol. 1, 13.4.3).
    #[must_use]
    pub fn compacted(&self, xcomp_bv: u64) -> [usize; 63] {
        let mut offsets = [0; 63];
        let mut next = 576_usize;
        for (i, place) in self.components() {
            if xcomp_bv >> i & 1 != 0 {
                if place.aligned {
                    next = next.next_multiple_of(64);
                }
                offsets[i as usize] = next;
                next += place.size;
            }
        }
        offsets
    }
}

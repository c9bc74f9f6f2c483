//! The machine code as bytes.
//!
//! Assembled into this program's read-only data, and copied from there into a guest. All code is
//! independent of its position and finds the vCPU's area in RDI.

// Each body is one `global_asm!`; the bytes between its two symbols are read as a slice.
#![allow(unsafe_code, reason = "global_asm! and the symbols around it")]

mod amx;
mod armed;
mod avx512;
mod control;
mod counter;
mod kernel_cases;
mod narrow;
mod stub;

pub use stub::{VECTOR_BYTES, VECTORS_OFFSET};

/// Makes `$name() -> &'static [u8]` from what lies between two symbols of a `global_asm!`.
macro_rules! code {
    ($(#[$doc:meta])* $name:ident, $start:ident, $end:ident) => {
        $(#[$doc])*
        #[must_use]
        pub fn $name() -> &'static [u8] {
            unsafe extern "C" {
                safe static $start: u8;
                safe static $end: u8;
            }
            let start: *const u8 = &raw const $start;
            let len = (&raw const $end).addr().saturating_sub(start.addr());
            // SAFETY: both symbols are defined in one `global_asm!` of this crate, in this order
            // and in one read-only section, so `len` bytes from `start` are initialised, never
            // written, and live as long as the program.
            unsafe { core::slice::from_raw_parts(start, len) }
        }
    };
}

code!(
    /// CPL0: enables XCR0, enters the body at CPL3, and takes its exceptions.
    stub, amx_guest_stub, amx_guest_stub_end
);
code!(
    /// CPL3: all of AVX-512.
    avx512, amx_guest_avx512, amx_guest_avx512_end
);
code!(
    /// CPL3: YMM0 to YMM15.
    avx2, amx_guest_avx2, amx_guest_avx2_end
);
code!(
    /// CPL3: XMM0 to XMM15.
    sse, amx_guest_sse, amx_guest_sse_end
);
code!(
    /// CPL3: eight tiles.
    amx, amx_guest_amx, amx_guest_amx_end
);
code!(
    /// CPL0: arms IA32_XFD and uses a tile.
    armed, amx_guest_armed, amx_guest_armed_end
);
code!(
    /// CPL0: the cases of the kernel's own test, stage by stage.
    kernel_cases, amx_guest_kernel_cases, amx_guest_kernel_cases_end
);
code!(
    /// CPL0: counts through a port, one string and one split memory access per count.
    counter, amx_guest_counter, amx_guest_counter_end
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_body_is_there_and_ends_as_it_should() {
        for body in [avx512(), avx2(), sse(), amx()] {
            assert_eq!(body[body.len() - 2..], [0x0f, 0x0b], "UD2");
            assert!(body.len() < crate::machine::BODY_BYTES);
        }
        assert!(stub().len() > VECTORS_OFFSET + 32 * VECTOR_BYTES);
        assert!(stub().len() < crate::machine::STUB_BYTES);
        assert!(armed().len() < crate::machine::BODY_BYTES);
        assert!(kernel_cases().len() < crate::machine::BODY_BYTES);
        assert!(counter().len() < crate::machine::STUB_BYTES);
    }
}

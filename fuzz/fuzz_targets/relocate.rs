//! See `amx_fuzz_targets::relocate`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amx_fuzz_targets::relocate(data));

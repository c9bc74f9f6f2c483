//! See `amx_fuzz_targets::sanitize`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amx_fuzz_targets::sanitize(data));

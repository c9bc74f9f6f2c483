//! See `amx_fuzz_targets::wire_states`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amx_fuzz_targets::wire_states(data));

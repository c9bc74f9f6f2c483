//! See `amx_fuzz_targets::compacted_parse`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amx_fuzz_targets::compacted_parse(data));

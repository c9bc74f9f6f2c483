//! See `amx_fuzz_targets::image_parse`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amx_fuzz_targets::image_parse(data));

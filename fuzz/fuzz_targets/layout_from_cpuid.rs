//! See `amx_fuzz_targets::layout_from_cpuid`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| amx_fuzz_targets::layout_from_cpuid(data));

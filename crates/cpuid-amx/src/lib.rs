//! cpuid-amx

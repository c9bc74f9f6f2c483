//! Valid states from a fuzzer's bytes: every one of them can exist, and nothing is repaired.

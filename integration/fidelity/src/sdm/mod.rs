//! Models of the manual's operation sections, in plain Rust and with no knowledge of any processor.

pub mod restore;
pub mod save;
pub mod state;
pub mod tilecfg;
pub mod tmul;

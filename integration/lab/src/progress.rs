//! How the library says what it is doing, for whoever wants to show it.

/// Hears of the steps of something that takes a while.
pub trait Progress {
    /// A step begins; `total` is its length, where that is known.
    fn step(&self, what: &str, total: Option<u64>);
    /// So much of the step is done.
    fn at(&self, done: u64);
    /// The step is over.
    fn done(&self);
}

/// Says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Progress for Quiet {
    fn step(&self, _what: &str, _total: Option<u64>) {}
    fn at(&self, _done: u64) {}
    fn done(&self) {}
}

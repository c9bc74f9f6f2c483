//! Times, and their median and 99th percentile.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::job::Times;

/// The times of one step over all moves.
pub(crate) struct Series(Histogram<u64>);

/// What is said of one step.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Summary {
    pub(crate) median_ns: u64,
    pub(crate) p99_ns: u64,
    pub(crate) count: u64,
}

impl Series {
    fn new() -> anyhow::Result<Self> {
        // Three digits; it grows to the largest value.
        Ok(Self(Histogram::new(3)?))
    }

    fn add(&mut self, time: Duration) {
        let nanos = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // It resizes itself; a value beyond its 64 bits cannot be.
        let _ = self.0.record(nanos);
    }

    pub(crate) fn summary(&self) -> Summary {
        Summary {
            median_ns: self.0.value_at_quantile(0.5),
            p99_ns: self.0.value_at_quantile(0.99),
            count: self.0.len(),
        }
    }
}

/// The times of all steps.
pub(crate) struct Steps {
    pub(crate) capture: Series,
    pub(crate) write: Series,
    pub(crate) read: Series,
    pub(crate) check: Series,
    pub(crate) restore: Series,
    /// All of them together, for one move.
    pub(crate) all: Series,
}

impl Steps {
    pub(crate) fn new() -> anyhow::Result<Self> {
        Ok(Self {
            capture: Series::new()?,
            write: Series::new()?,
            read: Series::new()?,
            check: Series::new()?,
            restore: Series::new()?,
            all: Series::new()?,
        })
    }

    /// Takes in one move: how one process saved, and how the next restored.
    pub(crate) fn add(&mut self, saved: &Times, restored: &Times) {
        let parts = [
            (&mut self.capture, saved.capture),
            (&mut self.write, saved.write),
            (&mut self.read, restored.read),
            (&mut self.check, restored.check),
            (&mut self.restore, restored.restore),
        ];
        let mut all = Duration::ZERO;
        for (series, time) in parts {
            let time = time.unwrap_or_default();
            series.add(time);
            all = all.saturating_add(time);
        }
        self.all.add(all);
    }
}

//! Shows progress on standard error: bars on a terminal, a line for each step elsewhere.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use crate::Progress;

/// [`Progress`] for a person, or for a log.
#[derive(Debug, Default)]
pub struct Show {
    bar: Mutex<Option<ProgressBar>>,
}

impl Show {
    fn set(&self, bar: Option<ProgressBar>) {
        let mut current = self.bar.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(old) = current.take() {
            old.finish_and_clear();
        }
        *current = bar;
    }
}

impl Progress for Show {
    fn step(&self, what: &str, total: Option<u64>) {
        let target = ProgressDrawTarget::stderr();
        if target.is_hidden() {
            eprintln!("amx-lab: {what} ...");
            return;
        }
        let bar = ProgressBar::with_draw_target(total, target).with_message(what.to_owned());
        let template = match total {
            Some(_) => "{msg} [{bar:30}] {pos}/{len} files, {elapsed}",
            None => "{msg} {spinner} {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        self.set(Some(bar));
    }

    fn at(&self, done: u64) {
        if let Some(bar) = &*self.bar.lock().unwrap_or_else(PoisonError::into_inner) {
            bar.set_position(done);
        }
    }

    fn done(&self) {
        self.set(None);
    }
}

impl Drop for Show {
    fn drop(&mut self) {
        self.set(None);
    }
}

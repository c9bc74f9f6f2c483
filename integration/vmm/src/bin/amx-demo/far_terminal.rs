//! A terminal that is not this process's own: standard error goes to one elsewhere.

use std::io::{self, Write, stderr};

use indicatif::TermLike;

/// Draws on standard error, which is a pipe, for a terminal of that many columns.
#[derive(Debug)]
pub(crate) struct FarTerminal {
    pub(crate) columns: u16,
}

impl FarTerminal {
    fn escape(count: usize, command: char) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        write!(stderr(), "\x1b[{count}{command}")
    }
}

impl TermLike for FarTerminal {
    fn width(&self) -> u16 {
        self.columns
    }

    fn move_cursor_up(&self, n: usize) -> io::Result<()> {
        Self::escape(n, 'A')
    }

    fn move_cursor_down(&self, n: usize) -> io::Result<()> {
        Self::escape(n, 'B')
    }

    fn move_cursor_right(&self, n: usize) -> io::Result<()> {
        Self::escape(n, 'C')
    }

    fn move_cursor_left(&self, n: usize) -> io::Result<()> {
        Self::escape(n, 'D')
    }

    fn write_line(&self, text: &str) -> io::Result<()> {
        writeln!(stderr(), "{text}")
    }

    fn write_str(&self, text: &str) -> io::Result<()> {
        write!(stderr(), "{text}")
    }

    fn clear_line(&self) -> io::Result<()> {
        write!(stderr(), "\r\x1b[2K")
    }

    fn flush(&self) -> io::Result<()> {
        stderr().flush()
    }
}

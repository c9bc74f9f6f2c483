//! Watches the console of the lab's kernel for its death.

use std::io::{BufRead, BufReader, Read};

/// How much of the console is kept.
const KEPT_LINES: usize = 400;

/// What a line of the console means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Meaning {
    Ordinary,
    /// The report of a crash begins or goes on; the kernel will not live on (oops=panic).
    Crash,
    /// The report's last line.
    CrashEnd,
}

fn meaning(line: &str) -> Meaning {
    // Every exception that the kernel dies of is counted in its first line: "...: 0000 [#1] ...".
    const SIGNS: [&str; 4] = [
        "Kernel panic - not syncing",
        "Oops: ",
        "kernel BUG at ",
        " [#1] ",
    ];
    if line.contains("---[ end Kernel panic") {
        Meaning::CrashEnd
    } else if SIGNS.iter().any(|sign| line.contains(sign)) {
        Meaning::Crash
    } else {
        Meaning::Ordinary
    }
}

/// What the watcher tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum News {
    /// The kernel began to report a crash.
    CrashBegins,
    /// This is the whole report.
    Crash(String),
}

/// Reads the console to its end, giving each line to `each` and the news to `tell`.
pub(crate) fn watch(console: impl Read, mut each: impl FnMut(&str), mut tell: impl FnMut(News)) {
    let mut report: Option<Vec<String>> = None;
    let mut reader = BufReader::new(console);
    let mut bytes = Vec::new();
    // Console bytes are not always UTF-8, so no lines().
    while matches!(reader.read_until(b'\n', &mut bytes), Ok(count) if count > 0) {
        let line = String::from_utf8_lossy(&bytes).trim_end().to_owned();
        bytes.clear();
        each(&line);
        let meaning = meaning(&line);
        if report.is_none() && meaning != Meaning::Ordinary {
            tell(News::CrashBegins);
            report = Some(Vec::new());
        }
        let Some(lines) = &mut report else { continue };
        if lines.len() < KEPT_LINES {
            lines.push(line);
        }
        if meaning == Meaning::CrashEnd {
            tell(News::Crash(lines.join("\n")));
            return drain(reader);
        }
    }
    if let Some(lines) = report {
        tell(News::Crash(lines.join("\n")));
    }
}

/// Reads on, so that the emulator does not wait for its console.
fn drain(mut reader: impl Read) {
    // An error is the console's end as well.
    let _ = std::io::copy(&mut reader, &mut std::io::sink());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn news(text: &str) -> Vec<News> {
        let mut all = Vec::new();
        watch(text.as_bytes(), |_| {}, |news| all.push(news));
        all
    }

    #[test]
    fn ordinary_lines_are_no_news() {
        assert_eq!(
            news(
                "[    0.07] Failed to access perfctr msr (MSR c8 is 0)\r\nunchecked MSR access error\n"
            ),
            []
        );
    }

    #[test]
    fn a_report_is_told_when_it_begins_and_when_it_is_whole() {
        let text = "before\n[ 1.1] Oops: unexpected #NM exception: 0000 [#1]\n[ 1.2] RIP: x\n[ 1.3] Kernel panic - not syncing: Fatal\n\
                    [ 1.4] ---[ end Kernel panic - not syncing: Fatal ]---\nafter\n";
        let all = news(text);
        assert_eq!(all[0], News::CrashBegins);
        let News::Crash(report) = &all[1] else {
            panic!("{all:?}")
        };
        assert!(report.starts_with("[ 1.1] Oops") && report.ends_with("]---"));
        assert_eq!(all.len(), 2);
    }

    #[test]
    fn older_kernels_do_not_say_oops() {
        let all = news("[    0.9] unexpected #NM exception: 0000 [#1] PREEMPT SMP NOPTI\n");
        assert_eq!(all[0], News::CrashBegins);
    }

    #[test]
    fn a_report_that_breaks_off_is_told_as_well() {
        assert_eq!(
            news("Kernel panic - not syncing: x")[1],
            News::Crash("Kernel panic - not syncing: x".into())
        );
    }
}

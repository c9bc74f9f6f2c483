//! Prints descriptions of a made-up fleet, one a line: `fleet HOSTS KINDS | amxctl baseline`.
//!
//! The kinds differ in where XTILEDATA lies, in their features, and in the kernel; a name is all
//! that differs within a kind.

use std::io::{self, BufWriter, Write};

use cpuid_amx::{CpuidTable, Table};
use host_compat::Host;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut numbers = std::env::args().skip(1).map(|text| text.parse::<u64>());
    let hosts = numbers.next().unwrap_or(Ok(1_000_000))?;
    let kinds = numbers.next().unwrap_or(Ok(1_000))?.max(1);
    let lines = (0..kinds).map(kind).collect::<Result<Vec<_>, _>>()?;
    let mut out = BufWriter::with_capacity(1 << 20, io::stdout().lock());
    for host in 0..hosts {
        // Names are spread over the kinds in no order.
        let spread = host.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let line = spread
            .checked_rem(kinds)
            .and_then(|kind| lines.get(usize::try_from(kind).ok()?));
        let Some((before, after)) = line else {
            break;
        };
        writeln!(out, "{before}node-{host}{after}")?;
    }
    out.flush()?;
    Ok(())
}

/// What is before the name and behind it.
fn kind(number: u64) -> Result<(String, String), Box<dyn std::error::Error>> {
    let mut table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
    let shift = u32::try_from(number % 256)?.saturating_mul(64);
    let (config, data) = (2752u32.saturating_add(shift), 2816u32.saturating_add(shift));
    let size = data.saturating_add(8192);
    table.set_leaf(0xd, 0, [0x602e7, size, size, 0])?;
    table.set_leaf(0xd, 17, [64, config, 2, 0])?;
    table.set_leaf(0xd, 18, [8192, data, 6, 0])?;
    let later = u32::try_from(number / 256 % 4)?;
    table.set_leaf(7, 1, [0x1c30 | (later & 1) << 21, 0, 0, (later & 2) << 7])?;
    let mut host = Host::from_cpuid("@", table);
    host.processor.stepping = u32::try_from(number / 1024)?;
    let line = serde_json::to_string(&host)?;
    let (before, after) = line.split_once('@').ok_or("there is no name")?;
    Ok((before.to_owned(), after.to_owned()))
}

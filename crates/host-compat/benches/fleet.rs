//! A fleet from JSON lines: a thousand kinds of hosts, each line parsed, or each kind of line once.
//!
//! `cargo bench -p host-compat --bench fleet`. With `FLEET_HOSTS=1000000` it counts so
//! many lines once instead, and says how long that took and how much memory it needs.
#![allow(missing_docs, reason = "criterion's macros make public items")]
#![allow(clippy::arithmetic_side_effects)]

use std::hint::black_box;
use std::time::{Duration, Instant};

use cpuid_amx::{CpuidTable, Table};
use criterion::{Criterion, Throughput, criterion_group};
use host_compat::baseline::Lines;
use host_compat::kernel::Kernel;
use host_compat::{Fleet, Host};

const KINDS: u32 = 1000;

/// What stands before and behind the name in the line of each kind: ten processors with a thousand
/// kernels, which give guests a hundred different sets of features.
fn kinds() -> Vec<(String, String)> {
    const NAME: &str = "THE-NAME";
    let cpuid: Table = cpuid_amx::dump::EXAMPLE.parse().expect("the example");
    (0..KINDS)
        .map(|kind| {
            let mut table = cpuid.clone();
            // With other offsets each is a kind of its own.
            let offset = 11_008 + 64 * (kind % 100);
            let _ = table.set_leaf(0xd, 9, [8, offset, 0, 0]);
            let _ = table.set_leaf(0xd, 0, [0x602e7, offset + 8, offset + 8, 0]);
            // As many leaves as KVM gives.
            for leaf in 0x4000_0000..0x4000_0018 {
                let _ = table.set_leaf(leaf, 0, [leaf, kind, 0x1234_5678, 0x9abc_def0]);
            }
            let mut host = Host::from_cpuid(NAME, table);
            host.processor.name = format!("Processor {}", kind % 10);
            host.kernel = Some(Kernel::from_names(&format!("6.12.{kind}"), "", None));
            let line = serde_json::to_string(&host).expect("a description");
            let (before, behind) = line.split_once(NAME).expect("the name is in it");
            (before.to_owned(), behind.to_owned())
        })
        .collect()
}

fn count(lines: &mut Lines, kinds: &[(String, String)], hosts: usize) -> usize {
    let mut line = Vec::new();
    let mut bytes = 0;
    for (host, (before, behind)) in (0..hosts).zip(kinds.iter().cycle()) {
        line.clear();
        line.extend_from_slice(before.as_bytes());
        line.extend_from_slice(format!("node-{host:07}").as_bytes());
        line.extend_from_slice(behind.as_bytes());
        bytes += line.len();
        lines.add(&line).expect("a description");
    }
    bytes
}

fn fleet(c: &mut Criterion) {
    let kinds = kinds();
    let hosts = 10_000;
    let mut group = c.benchmark_group("fleet of 10,000 lines");
    group.throughput(Throughput::Elements(10_000));
    group
        .sample_size(10)
        .measurement_time(Duration::from_secs(5));
    group.bench_function("each kind of line parsed once", |b| {
        b.iter(|| {
            let mut lines = Lines::new();
            count(&mut lines, &kinds, hosts);
            black_box(lines.into_fleet())
        });
    });
    group.bench_function("each line parsed", |b| {
        b.iter(|| {
            let mut fleet = Fleet::new();
            for (host, (before, behind)) in (0..hosts).zip(kinds.iter().cycle()) {
                let line = format!("{before}node-{host:07}{behind}");
                let host: Host = serde_json::from_str(&line).expect("a description");
                fleet.add(&host).expect("few kinds");
            }
            black_box(fleet)
        });
    });
    let mut lines = Lines::new();
    count(&mut lines, &kinds, hosts);
    let fleet = lines.into_fleet();
    group.bench_function("the baseline of 100 kinds", |b| b.iter(|| fleet.baseline()));
    group.finish();
}

criterion_group!(benches, fleet);

fn main() {
    let Some(hosts) = std::env::var("FLEET_HOSTS")
        .ok()
        .and_then(|text| text.parse().ok())
    else {
        benches();
        Criterion::default().configure_from_args().final_summary();
        return;
    };
    let kinds = kinds();
    let start = Instant::now();
    let mut lines = Lines::new();
    let bytes = count(&mut lines, &kinds, hosts);
    let baseline = lines.into_fleet().baseline();
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{} hosts, {} MB of lines, {KINDS} kinds of lines: {seconds:.1} s",
        baseline.hosts,
        bytes / 1_000_000
    );
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines().filter(|line| line.starts_with("VmHWM")) {
        println!("{line}");
    }
}

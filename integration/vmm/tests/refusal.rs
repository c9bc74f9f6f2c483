//! Guests that would not fit: refused before a page is sent, with every reason as data at the source and
//! as text at the destination, while the guest runs on.
//!
//! The destination is this host, whose description says less than it has. Bare guests on any live
//! /dev/kvm; those with AMX in the lab.

#![allow(clippy::arithmetic_side_effects, clippy::indexing_slicing)]

mod support;

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

use amx_guest::{Kind, Workload};
use amx_vmm::fit::Reason;
use amx_vmm::migration::{
    Cancel, MAX_THROTTLE_PERCENT, Offer, Options, ReceiveError, SendError, Stream, receive,
    receive_with, send,
};
use amx_vmm::{Console, Host, Vm};
use cpuid_amx::features::XsaveFeatures;
use cpuid_amx::{AmxFeatures, Bits, CpuidTable, Feature, PermissionError, Policy, Register, Table};
use host_compat::compat::{Reason as Compat, Usage};
use host_compat::host::{NoKvm, Permission, Tsc};
use support::lab::skip;
use support::midway::{is_midway, midway, outlasting, slower};
use support::{amx_host, finish, host, workloads};
use xsave_state::{ComponentId, Misfit, Palette, XFeatures};

const PATIENCE: Duration = Duration::from_secs(20);
const VCPUS: u8 = 2;
/// More than any guest here is refused, and longer than it runs meanwhile.
const REFUSALS: u32 = 8;
const SLICE: Duration = Duration::from_millis(10);
/// So often a guest is moved until it arrives with work left.
const TRIES: u32 = 12;

/// A host, and a guest of it in the middle of its work.
struct Guest {
    host: Host,
    kind: Kind,
    vm: Vm,
    workloads: Vec<Workload>,
}

impl Guest {
    fn new(host: Host) -> Self {
        let kind = host.best_kind().expect("any processor has SSE");
        let workloads = workloads(kind, VCPUS, 7, kind.default_rounds());
        // Some hosts compute faster than their timers tick. It is to have work left where it is moved to, also
        // where it runs while it is refused.
        let slow = outlasting(&host, &workloads, |mut vm| {
            let time = REFUSALS * SLICE;
            vm.run(&Console::default(), time).expect("it runs");
            moved(&host, &mut vm, &Options::within(PATIENCE))
        });
        let guest = midway(&host, &slower(&workloads, slow));
        Self {
            kind,
            vm: guest.vm,
            workloads: guest.workloads,
            host,
        }
    }

    /// The reasons why it does not go where all is as here but for `change`. They are the same on both
    /// sides.
    fn refused(&mut self, what: &str, change: impl FnOnce(&mut Offer)) -> Vec<Reason> {
        let mut offer = Offer::of(&self.host);
        change(&mut offer);
        let (here, there) = UnixStream::pair().expect("a socket");
        let (options, never) = (Options::within(PATIENCE), Cancel::default());
        let (sent, received) = thread::scope(|scope| {
            let received =
                scope.spawn(|| receive_with(&self.host, &offer, there, PATIENCE, &never, |_| {}));
            let console = Console::default();
            let rounds = |_: &_| panic!("no page may be sent");
            let sent = send(
                &mut self.vm,
                &self.host,
                (&console, None),
                here,
                &options,
                rounds,
            );
            (sent, received.join().expect("it does not panic"))
        });
        let unfit = match sent {
            Err(SendError::Unfit(unfit)) => unfit,
            other => panic!("{what}: {other:?}"),
        };
        println!("{what}:");
        for reason in unfit.reasons() {
            println!("  {reason}");
        }
        match received {
            Err(ReceiveError::Refused { reason }) => {
                let text = unfit.to_string();
                // As much as a message has room for.
                assert!(text.starts_with(&reason) && reason.len() >= text.len().min(4093));
            }
            other => panic!("{what}: the destination {:?}", other.err()),
        }
        unfit.reasons().to_vec()
    }

    /// It has not noticed anything: it moves to where it fits, and computes on there.
    fn goes_on(mut self) {
        let here = self.vm.capture(&self.host).expect("it is captured");
        // It hardly runs on the way, and less than when it was found out how slow it has to be.
        let options = Options {
            max_rounds: 1,
            throttle_percent: MAX_THROTTLE_PERCENT,
            ..Options::within(PATIENCE)
        };
        for _ in 0..TRIES {
            let mut there = moved(&self.host, &mut self.vm, &options);
            if is_midway(&self.host, &mut there, &self.workloads) {
                let right = vec![[""; 0]; self.workloads.len()];
                assert_eq!(finish(&mut there, &self.workloads), right);
                return;
            }
            // It was let run here to its end, which a busy machine may do: the same guest again.
            self.vm = Vm::restore(&self.host, &here).expect("it is restored");
        }
        panic!("it has never any work left where it is moved to");
    }
}

/// Where the guest of `vm` is then.
fn moved(host: &Host, vm: &mut Vm, options: &Options) -> Vm {
    let (here, there) = UnixStream::pair().expect("a socket");
    thread::scope(|scope| {
        let received = scope.spawn(|| receive(host, there, PATIENCE));
        let console = Console::default();
        let sent = send(vm, host, (&console, None), here, options, |_| {});
        sent.expect("it is moved");
        let received = received.join().expect("it does not panic");
        received.expect("it has come").vm
    })
}

/// What guests see at the destination.
fn cpuid(offer: &mut Offer) -> &mut Table {
    let kvm = offer.host.kvm.as_mut().expect("it has KVM");
    kvm.rewritten.as_mut().unwrap_or(&mut kvm.cpuid)
}

fn change(offer: &mut Offer, leaf: u32, subleaf: u32, change: fn([u32; 4]) -> [u32; 4]) {
    let table = cpuid(offer);
    let value = change(table.leaf(leaf, subleaf));
    table
        .set_leaf(leaf, subleaf, value)
        .expect("a table has room");
}

/// Those of cpuid-amx, without the others.
fn extended(reasons: &[Reason]) -> Vec<Compat> {
    let extended = reasons.iter().filter_map(|reason| match reason {
        Reason::Host(reason) => Some(reason.clone()),
        _ => None,
    });
    extended.collect()
}

/// The features that the host lacks, by name; all must be in use by the guest, or none.
fn features(reasons: &[Compat], in_use: bool) -> BTreeSet<String> {
    let features = reasons.iter().filter_map(|reason| match reason {
        Compat::Feature { feature, usage } => {
            assert_eq!(*usage == Usage::Enabled, in_use, "{reason}");
            Some(feature.to_string())
        }
        Compat::Component { sees, usage } => {
            assert_eq!(*usage == Usage::Enabled, in_use, "{reason}");
            Some(sees.id.to_string())
        }
        _ => None,
    });
    features.collect()
}

/// What the vCPUs would lose.
fn losses(reasons: &[Compat], vcpu: u32) -> Vec<Misfit> {
    let losses = reasons.iter().filter_map(|reason| match reason {
        Compat::Loss { vcpu: of, loss } if *of == vcpu => Some(*loss),
        _ => None,
    });
    losses.collect()
}

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(ToString::to_string).collect()
}

#[test]
fn what_every_guest_relies_on() {
    let Some(host) = host() else { return };
    let mut guest = Guest::new(host);

    // SSSE3, which all payloads need.
    let hidden = guest.refused("a hidden feature", |offer| {
        change(offer, 1, 0, |[a, b, c, d]| [a, b, c & !(1 << 9), d]);
    });
    let bits = Bits {
        leaf: 1,
        subleaf: 0,
        register: Register::Ecx,
        mask: 1 << 9,
    };
    let usage = Usage::Seen;
    assert_eq!(hidden, [Compat::Bits { bits, usage }.into()]);

    let unknown = guest.refused("an MSR that KVM there does not have", |offer| {
        offer.msrs.retain(|index| *index != 0x10);
    });
    for (vcpu, reason) in (0..).zip(&unknown) {
        let of = |value| Reason::Msr {
            vcpu,
            index: 0x10,
            value,
        };
        assert!(matches!(reason, Reason::Msr { value, .. } if *reason == of(*value)));
    }
    assert_eq!(unknown.len(), usize::from(VCPUS));

    let few = guest.refused("fewer vCPUs", |offer| offer.vcpus = 1);
    assert_eq!(few, [Reason::Vcpus { vcpus: 2, limit: 1 }]);

    let memory = guest.refused("less memory", |offer| offer.memory_bytes = 1 << 20);
    assert!(matches!(
        memory[..],
        [Reason::Memory {
            limit_bytes: 0x10_0000,
            ..
        }]
    ));

    if let Some(guest_khz) = guest.host.tsc_khz() {
        let host_khz = guest_khz / 10 * 11;
        let tsc = guest.refused("a faster TSC that is not scaled", |offer| {
            let kvm = offer.host.kvm.as_mut().expect("it has one");
            kvm.tsc = Some(Tsc {
                khz: host_khz,
                scales: false,
            });
        });
        assert_eq!(
            tsc,
            [Reason::Host(Compat::Tsc {
                guest_khz,
                host_khz
            })]
        );
    } else {
        println!("KVM does not know the frequency of the TSC here");
    }

    let none = guest.refused("no KVM", |offer| offer.host.kvm = Err(NoKvm::NoDevice));
    assert!(none.contains(&Compat::NoKvm(NoKvm::NoDevice).into()));
    let unknown = guest.refused("a KVM that nobody could ask", |offer| {
        offer.host.kvm = Err(NoKvm::NoAccess);
    });
    assert!(matches!(unknown[0], Reason::NotCompared(_)));
    guest.goes_on();
}

#[test]
fn components_that_are_elsewhere_or_nowhere() {
    let Some(host) = host() else { return };
    if !host.layout().user().contains(XFeatures::AVX512) {
        skip(&"guests of this host have no AVX-512");
        return;
    }
    let mut guest = Guest::new(host);
    // Tiles alone have XCR0 without AVX-512.
    let enabled = guest.kind == Kind::Avx512;

    let place = guest.host.layout().component(ComponentId::HI16_ZMM);
    let place = place.and_then(|c| c.offset()).expect("it has one");
    let moved = guest.refused("Hi16_ZMM elsewhere", |offer| {
        change(offer, 0xd, 7, |[a, b, c, d]| [a, b + 0x8000, c, d]);
    });
    let (first, rest) = moved.split_first().expect("there is one");
    match first {
        Reason::Host(Compat::Elsewhere { sees, has, usage }) => {
            let is_enabled = *usage == Usage::Enabled;
            assert_eq!((sees.id, is_enabled), (ComponentId::HI16_ZMM, enabled));
            assert_eq!(
                (sees.offset as usize, has.offset as usize),
                (place, place + 0x8000)
            );
        }
        other => panic!("{other}"),
    }
    let misfits: Vec<Reason> = (0..u32::from(VCPUS))
        .filter(|_| enabled)
        .map(|vcpu| {
            Reason::Host(Compat::Misfit {
                vcpu,
                misfit: Misfit::Offset {
                    component: ComponentId::HI16_ZMM,
                    source_offset: place,
                    target_offset: place + 0x8000,
                },
            })
        })
        .collect();
    assert_eq!(rest, misfits);

    let gone = guest.refused("XCR0 without AVX-512", |offer| {
        change(offer, 0xd, 0, |[a, b, c, d]| [a & !0xe0, b, c, d]);
    });
    let gone = extended(&gone);
    assert_eq!(
        features(&gone, enabled),
        names(&["opmask", "ZMM_Hi256", "Hi16_ZMM"])
    );
    for vcpu in (0..u32::from(VCPUS)).filter(|_| enabled) {
        let losses = losses(&gone, vcpu);
        let lost = losses.iter().find_map(|loss| match loss {
            Misfit::Xcr0 { xcr0, largest } => Some(*xcr0 - *largest),
            _ => None,
        });
        assert_eq!(lost, Some(XFeatures::AVX512));
        for component in XFeatures::AVX512.components() {
            assert!(losses.contains(&Misfit::Missing { component }));
        }
    }
    guest.goes_on();
}

/// The end of a source that hears another offer than was made.
struct Deaf {
    stream: UnixStream,
    hears: io::Cursor<Vec<u8>>,
}

impl Deaf {
    fn new(stream: UnixStream, offer: &Offer) -> Self {
        let content = postcard::to_allocvec(offer).expect("it has its lengths");
        // Kind 2, the first message: docs of migration::frame.
        let mut hears = [2, 0, u32::try_from(content.len()).expect("it is short")]
            .map(u32::to_le_bytes)
            .as_flattened()
            .to_vec();
        let mut checksum = crc32fast::Hasher::new();
        checksum.update(&hears);
        checksum.update(&content);
        hears.extend(checksum.finalize().to_le_bytes());
        hears.extend(content);
        let hears = io::Cursor::new(hears);
        Self { stream, hears }
    }
}

impl Read for Deaf {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.hears.position() == 0 {
            // What was really offered.
            let mut header = [0; 16];
            self.stream.read_exact(&mut header)?;
            let [_, _, length, _] = *header.as_chunks::<4>().0 else {
                panic!("it has four fields")
            };
            let mut content = vec![0; u32::from_le_bytes(length) as usize];
            self.stream.read_exact(&mut content)?;
        }
        match self.hears.read(bytes)? {
            0 => self.stream.read(bytes),
            read => Ok(read),
        }
    }
}

impl Write for Deaf {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Stream for Deaf {
    fn set_timeout(&self, time: Duration) -> io::Result<()> {
        self.stream.set_timeout(time)
    }
}

/// The destination does not rely on the source to have looked.
#[test]
fn a_guest_that_is_sent_all_the_same_is_not_taken() {
    let Some(host) = host() else { return };
    let mut guest = Guest::new(host);
    let all = Offer::of(&guest.host);
    let (mut small, mut few) = (all.clone(), all.clone());
    small.memory_bytes = 1 << 20;
    few.vcpus = 1;
    for (offer, expected) in [
        (&few, "the guest has 2 vCPUs; there it has at most 1"),
        (
            &small,
            "2097152 bytes of guest memory; the limit is 1048576",
        ),
    ] {
        let (here, there) = UnixStream::pair().expect("a socket");
        let stream = Deaf::new(here, &all);
        let (options, never) = (Options::within(PATIENCE), Cancel::default());
        let (sent, received) = thread::scope(|scope| {
            let received =
                scope.spawn(|| receive_with(&guest.host, offer, there, PATIENCE, &never, |_| {}));
            let console = Console::default();
            let idle = (&console, None);
            let sent = send(&mut guest.vm, &guest.host, idle, stream, &options, |_| {});
            (sent, received.join().expect("it does not panic"))
        });
        assert!(sent.is_err());
        let error = received.err().expect("it is not taken");
        println!("{error}");
        assert!(error.to_string().ends_with(expected), "{error}");
        assert!(matches!(
            error,
            ReceiveError::Unfit(_) | ReceiveError::Memory(_)
        ));
    }
    guest.goes_on();
}

/// The names of what a guest with AMX sees of it on this processor.
const AMX: [&str; 9] = [
    "XFD",
    "XTILECFG",
    "XTILEDATA",
    "AMX-TILE",
    "AMX-INT8",
    "AMX-BF16",
    "palette 1 (8 tiles of 16 rows of 64 bytes)",
    "products of 16 rows",
    "products of columns of 64 bytes",
];

#[test]
fn a_guest_with_live_tiles() {
    let Some(host) = amx_host() else { return };
    let mut guest = Guest::new(host);
    assert_eq!(guest.kind, Kind::Tiles);

    let gone = guest.refused("no AMX", |offer| {
        Policy::hide_amx().apply(cpuid(offer)).expect("it can be");
    });
    // Everything, and each vCPU's tiles.
    let all_gone = |reasons: &[Reason]| {
        let reasons = extended(reasons);
        assert_eq!(features(&reasons, true), names(&AMX));
        for vcpu in 0..u32::from(VCPUS) {
            let losses = losses(&reasons, vcpu);
            for component in [ComponentId::XTILECFG, ComponentId::XTILEDATA] {
                assert!(
                    losses.contains(&Misfit::Missing { component }),
                    "{losses:?}"
                );
            }
        }
        reasons
    };
    all_gone(&gone);
    assert_eq!(extended(&gone).len(), gone.len(), "AMX is named once");

    let no_xfd = guest.refused("no XFD", |offer| {
        change(offer, 0xd, 1, |[a, b, c, d]| [a & !(1 << 4), b, c, d]);
    });
    // Without XFD there is no tile data, and without that no AMX.
    assert!(all_gone(&no_xfd).contains(&Compat::Feature {
        feature: Feature::Xsave(XsaveFeatures::XFD),
        usage: Usage::Enabled
    }));

    let error = PermissionError::Filtered { errno: 1 };
    let refused = guest.refused("no permission", |offer| {
        offer.host.permission = Permission::Refused(error);
    });
    let usage = Usage::Enabled;
    assert!(all_gone(&refused).contains(&Compat::Permission { error, usage }));

    let palette = guest.refused("another palette", |offer| {
        // Eight rows in each of sixteen tiles.
        change(offer, 0x1d, 1, |_| [512 << 16 | 8192, 16 << 16 | 64, 8, 0]);
    });
    let palette = extended(&palette);
    let theirs = features(&palette, true);
    assert!(theirs.contains(AMX[6]), "{theirs:?}");
    let sixteen_rows = Palette::from_leaf(1, [0x0400_2000, 0x0008_0040, 0x10, 0]);
    let sixteen_rows = Feature::Palette(sixteen_rows.expect("it is one"));
    assert!(palette.contains(&Compat::Feature {
        feature: sixteen_rows,
        usage
    }));
    for vcpu in 0..u32::from(VCPUS) {
        let losses = losses(&palette, vcpu);
        let configuration = losses.iter().any(|loss| {
            matches!(
                loss,
                Misfit::Palette { palette: 1, .. } | Misfit::TileConfig { .. }
            )
        });
        assert!(configuration, "{losses:?}");
    }

    let elsewhere = guest.refused("XTILEDATA elsewhere", |offer| {
        change(offer, 0xd, 18, |[a, b, c, d]| [a, b + 64, c, d]);
    });
    let misfit = |vcpu| {
        Reason::Host(Compat::Misfit {
            vcpu,
            misfit: Misfit::Offset {
                component: ComponentId::XTILEDATA,
                source_offset: 2816,
                target_offset: 2880,
            },
        })
    };
    assert_eq!(elsewhere[1..], [misfit(0), misfit(1)]);

    let part = guest.refused("AMX-INT8 hidden", |offer| {
        change(offer, 7, 0, |[a, b, c, d]| [a, b, c, d & !(1 << 25)]);
    });
    let feature = Feature::Amx(AmxFeatures::INT8);
    assert_eq!(part, [Compat::Feature { feature, usage }.into()]);
    guest.goes_on();
}

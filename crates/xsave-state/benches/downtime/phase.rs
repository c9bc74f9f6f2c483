//! The vCPU phase: from the state of one VM's vCPUs to the same on another's.

use std::hint::black_box;

use serde::{Deserialize, Serialize};
use xsave_state::kvm::{self, XsaveBuffer, XsaveSize};
use xsave_state::wire::{Buffer, Codec, Container, Writer};
use xsave_state::{ExtendedState, Layout};

use super::machine::{Bare, Machine, Rest};

/// With the container.
pub(crate) struct Ours {
    vcpus: usize,
    codec: Codec,
    buffer: XsaveBuffer,
    decoded: Buffer,
    writer: Writer,
    file: Vec<u8>,
    /// What was captured last.
    states: Vec<ExtendedState<'static>>,
}

impl Ours {
    pub(crate) fn new(layout: &Layout, size: XsaveSize, vcpus: usize) -> Self {
        Self {
            vcpus,
            codec: Codec::new(layout),
            buffer: XsaveBuffer::new(size),
            decoded: Buffer::new(),
            writer: Writer::new(),
            file: Vec::new(),
            states: Vec::new(),
        }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.file.len()
    }

    pub(crate) fn phase(&mut self, from: &Machine, to: &Machine) {
        self.file.clear();
        let mut rests = Vec::with_capacity(self.vcpus);
        let first = self.states.is_empty();
        for (index, vcpu) in (0..).zip(&from.vcpus[..self.vcpus]) {
            rests.push(from.rest(vcpu));
            let captured = kvm::capture(vcpu, &from.layout, &mut self.buffer).unwrap();
            let piece = self.writer.push(index, &self.codec, &captured.state);
            self.file.extend_from_slice(piece.unwrap());
            if first {
                self.states.push(captured.state.into_owned());
            }
        }
        self.file.extend_from_slice(self.writer.finish());

        let container = Container::open(&self.file).unwrap();
        let vcpus = to.vcpus.iter().zip(&rests);
        for (member, (vcpu, rest)) in container.members().zip(vcpus) {
            let state = member.decode(&self.codec, &mut self.decoded).unwrap();
            kvm::restore(vcpu, &state, &mut self.buffer).unwrap();
            rest.set(vcpu);
        }
    }

    /// The same without an ioctl: what the container takes.
    pub(crate) fn there_and_back(&mut self) {
        self.file.clear();
        for (index, state) in (0..).zip(&self.states) {
            let piece = self.writer.push(index, &self.codec, black_box(state));
            self.file.extend_from_slice(piece.unwrap());
        }
        self.file.extend_from_slice(self.writer.finish());
        let container = Container::open(black_box(&self.file)).unwrap();
        for member in container.members() {
            drop(member.decode(&self.codec, &mut self.decoded).unwrap());
        }
    }
}

/// How an area of fixed length is stored.
#[derive(Clone, Copy)]
pub(crate) enum Format {
    /// It is not: the ioctls alone.
    None,
    /// As it is.
    Copy,
    /// As Firecracker does: bytes.
    Bitcode,
    /// As Cloud Hypervisor does: numbers, `extra` beyond the first 4,096 bytes.
    Json,
}

#[derive(Serialize, Deserialize)]
struct Bytes {
    area: Vec<u8>,
    registers: [u64; 3],
}

#[derive(Serialize, Deserialize)]
struct Numbers {
    region: Vec<u32>,
    extra: Vec<u32>,
    registers: [u64; 3],
}

impl Format {
    pub(crate) const ALL: [Self; 4] = [Self::None, Self::Copy, Self::Bitcode, Self::Json];

    /// Bytes of an area with its registers.
    pub(crate) fn bytes_of(self, area: &[u8], registers: [u64; 3]) -> usize {
        match self {
            Self::Json => {
                let (words, _) = area.as_chunks();
                let mut region: Vec<u32> = words.iter().map(|&w| u32::from_le_bytes(w)).collect();
                let extra = region.split_off(1024);
                let numbers = Numbers {
                    region,
                    extra,
                    registers,
                };
                serde_json::to_vec(&numbers).unwrap().len()
            }
            Self::Bitcode => {
                let area = area.to_vec();
                bitcode::serialize(&Bytes { area, registers })
                    .unwrap()
                    .len()
            }
            Self::Copy | Self::None => area.len(),
        }
    }
}

pub(crate) fn registers(state: &ExtendedState<'_>) -> [u64; 3] {
    let registers = state.registers();
    [registers.xcr0, registers.xfd, registers.xfd_err].map(|features| features.bits())
}

/// With areas of fixed length, which nobody checks.
pub(crate) struct Blobs {
    vcpus: usize,
    file: Vec<u8>,
}

impl Blobs {
    pub(crate) fn new(vcpus: usize) -> Self {
        Self {
            vcpus,
            file: Vec::new(),
        }
    }

    pub(crate) fn phase(&mut self, from: &Machine, to: &Machine, format: Format) {
        let mut all: Vec<(Rest, Bare)> = from.vcpus[..self.vcpus]
            .iter()
            .map(|vcpu| (from.rest(vcpu), Bare::get(from, vcpu)))
            .collect();
        self.store_and_load(&mut all, format);
        for ((rest, bare), vcpu) in all.iter().zip(&to.vcpus) {
            bare.set(vcpu);
            rest.set(vcpu);
        }
    }

    fn store_and_load(&mut self, all: &mut [(Rest, Bare)], format: Format) {
        self.file.clear();
        // The registers are as long in all formats, and left where they are.
        let registers = [0x602e7, 0, 0];
        match format {
            Format::None => {}
            Format::Copy => {
                let mut words = Vec::new();
                for (_, bare) in all.iter() {
                    let (region, extra) = bare.words();
                    words.extend_from_slice(region);
                    words.extend_from_slice(extra);
                }
                let words = black_box(words);
                let mut rest = words.as_slice();
                for (_, bare) in all {
                    let extra = bare.words().1.len();
                    let (area, behind) = rest.split_at(1024 + extra);
                    bare.set_words(&area[..1024], &area[1024..]);
                    rest = behind;
                }
            }
            Format::Bitcode => {
                let stored: Vec<Bytes> = all
                    .iter()
                    .map(|(_, bare)| {
                        let (region, extra) = bare.words();
                        let words = region.iter().chain(extra);
                        Bytes {
                            area: words.flat_map(|word| word.to_le_bytes()).collect(),
                            registers,
                        }
                    })
                    .collect();
                self.file = bitcode::serialize(&stored).unwrap();
                let loaded: Vec<Bytes> = bitcode::deserialize(black_box(&self.file)).unwrap();
                for ((_, bare), bytes) in all.iter_mut().zip(loaded) {
                    let (words, _) = bytes.area.as_chunks();
                    let words: Vec<u32> = words.iter().map(|&w| u32::from_le_bytes(w)).collect();
                    bare.set_words(&words[..1024], &words[1024..]);
                }
            }
            Format::Json => {
                let stored: Vec<Numbers> = all
                    .iter()
                    .map(|(_, bare)| {
                        let (region, extra) = bare.words();
                        Numbers {
                            region: region.to_vec(),
                            extra: extra.to_vec(),
                            registers,
                        }
                    })
                    .collect();
                serde_json::to_writer(&mut self.file, &stored).unwrap();
                let loaded: Vec<Numbers> = serde_json::from_slice(black_box(&self.file)).unwrap();
                for ((_, bare), numbers) in all.iter_mut().zip(loaded) {
                    bare.set_words(&numbers.region, &numbers.extra);
                }
            }
        }
    }
}

/// Captures all vCPUs, on so many threads.
pub(crate) fn capture_on(machine: &Machine, threads: usize) {
    let capture = |vcpus: &[_]| {
        let mut buffer = XsaveBuffer::new(machine.size);
        for vcpu in vcpus {
            let rest = machine.rest(vcpu);
            let captured = kvm::capture(vcpu, &machine.layout, &mut buffer).unwrap();
            black_box((rest, captured.state.into_owned()));
        }
    };
    if threads == 1 {
        capture(&machine.vcpus);
        return;
    }
    let each = machine.vcpus.len().div_ceil(threads);
    std::thread::scope(|scope| {
        for vcpus in machine.vcpus.chunks(each) {
            scope.spawn(move || capture(vcpus));
        }
    });
}

//! The processor's own verdict: areas are loaded with XRSTOR, and what faults there must be refused
//! here, what loads there must be taken here, with the same state in the registers.
//!
//! Where this crate is stricter than the processor, [`Exception`] names the rule and the reason; a
//! name that nothing needs fails the test.
#![cfg(all(target_os = "linux", target_arch = "x86_64"))]
#![allow(
    missing_docs,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use std::collections::BTreeMap;

use common::{area, with_pending_exception};
use processor::{Processor, Verdict};
use xsave_state::{ComponentId, Image, Layout, TileConfig, XFeatures};

/// What the processor takes and this crate does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Exception {
    /// Bytes 416 to 463 of the legacy region, standard format. XRSTOR does not look at them (SDM
    /// Vol. 1 §13.4.1), nor does KVM. Here they must be zero, so that nothing rides along unseen. Of a
    /// compacted area they are not taken over.
    LegacyReserved,
    /// Bytes 24 to 63 of the header, standard format. XRSTOR checks bytes 8 to 23 alone (SDM Vol. 1
    /// §13.8.1); KVM_SET_XSAVE gives EINVAL for all (`validate_user_xstate_header`).
    HeaderBeyond24,
    /// A TILECFG that LDTILECFG refuses. XRSTOR makes it initial without a fault, so the guest would
    /// lose it in silence.
    TileConfig,
    /// Bit 63 of XSTATE_BV, compacted format. The manual asks for XSTATE_BV within XCOMP_BV, whose
    /// bit 63 is set (SDM Vol. 1 §13.8.2): the lab's emulator loads it. Silicon faults. It is no
    /// component, and here it is refused.
    Bit63,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Format {
    Standard,
    Compacted,
}

struct Oracle {
    processor: Processor,
    layout: Layout,
    seen: BTreeMap<(Format, Option<Exception>, bool), usize>,
}

impl Oracle {
    /// `None`, with the reason, where this machine has no XSAVE.
    fn new() -> Option<Self> {
        let Some(processor) = Processor::new() else {
            println!("skipped: the processor or the operating system has no XSAVE");
            return None;
        };
        // The layout that XRSTOR goes by: what XCR0 enables, and no supervisor components.
        let xcr0 = processor.xcr0();
        let [max_leaf, ..] = processor::cpuid(0, 0);
        let has_tile_leaves = max_leaf >= 0x1d && processor::cpuid(0x1d, 0)[0] != 0;
        let layout = Layout::from_cpuid(|leaf, subleaf| {
            let [eax, ebx, ecx, edx] = processor::cpuid(leaf, subleaf);
            match (leaf, subleaf) {
                (0xd, 0) => [eax & xcr0 as u32, ebx, ecx, edx & (xcr0 >> 32) as u32],
                (0xd, 1) => [eax, ebx, 0, 0],
                // Hypervisors that hide the tile leaves still run on a processor with palette 1.
                (0, 0) if !has_tile_leaves => [eax.max(0x1d), ebx, ecx, edx],
                (0x1d, 0) if !has_tile_leaves => [1, 0, 0, 0],
                (0x1d, 1) if !has_tile_leaves => [0x0400_2000, 0x0008_0040, 0x10, 0],
                _ => [eax, ebx, ecx, edx],
            }
        })
        .unwrap();
        assert_eq!(layout.user().bits(), xcr0);
        println!("XCR0 {}, tile leaves: {has_tile_leaves}", layout.user());
        Some(Self {
            processor,
            layout,
            seen: BTreeMap::new(),
        })
    }

    fn parse(&self, area: &[u8]) -> (Format, Result<Image<'static>, String>) {
        if area[527] & 0x80 != 0 {
            let image = Image::from_compacted(area, &self.layout);
            (Format::Compacted, image.map_err(|error| error.to_string()))
        } else {
            let image = Image::parse(area, &self.layout).map(Image::into_owned);
            (Format::Standard, image.map_err(|error| error.to_string()))
        }
    }

    /// Takes out of the area what only this crate minds.
    fn forgive(&self, area: &mut [u8]) -> Option<Exception> {
        let mut exception = None;
        let compacted = area[527] & 0x80 != 0;
        if !compacted && area[416..464].iter().any(|&byte| byte != 0) {
            area[416..464].fill(0);
            exception = Some(Exception::LegacyReserved);
        }
        let word = |area: &[u8], at| u64::from_le_bytes(area[at..at + 8].try_into().unwrap());
        if !compacted && area[536..576].iter().any(|&byte| byte != 0) {
            area[536..576].fill(0);
            exception = Some(Exception::HeaderBeyond24);
        }
        if word(area, 512) & 1 << 17 != 0 {
            let placed = XFeatures::from_bits_retain(word(area, 520) & (u64::MAX >> 1));
            let start = if compacted {
                let mut places = self.layout.compacted(placed);
                places
                    .find(|(component, _)| component.id() == ComponentId::XTILECFG)
                    .map(|(_, range)| range.start)
            } else {
                let component = self.layout.component(ComponentId::XTILECFG);
                component.and_then(|component| component.offset())
            };
            let config = start.and_then(|start| area.get(start..)?.first_chunk());
            if let Some(config) = config
                && TileConfig::parse(config, self.layout.palettes()).is_err()
            {
                area[514] &= !2;
                exception = Some(Exception::TileConfig);
            }
        }
        exception
    }

    /// Both verdicts on an area, and what each makes of it.
    fn check(&mut self, area: &[u8], what: &str) {
        let verdict = self.processor.load(area);
        let mut forgiven = area.to_vec();
        let exception = self.forgive(&mut forgiven);
        if exception.is_some() {
            let (_, strict) = self.parse(area);
            strict.expect_err(what);
        }
        let (format, ours) = self.parse(&forgiven);
        let loaded = matches!(verdict, Verdict::Loaded(_));
        if format == Format::Compacted && area[519] & 0x80 != 0 {
            ours.expect_err(what);
            let key = (format, Some(Exception::Bit63), loaded);
            *self.seen.entry(key).or_default() += 1;
            return;
        }
        assert_eq!(
            ours.is_ok(),
            loaded,
            "{what} ({format:?}, {exception:?}): here {:?}",
            ours.as_ref().err()
        );
        *self.seen.entry((format, exception, loaded)).or_default() += 1;
        if let (Ok(ours), Verdict::Loaded(saved)) = (ours, verdict) {
            self.compare(&ours, &saved, what);
        }
    }

    /// What XSAVE stores after XRSTOR is what the image says. x87 is left to `areas`' users: the
    /// processor normalises it.
    fn compare(&self, ours: &Image<'_>, saved: &[u8], what: &str) {
        let mut saved = saved.to_vec();
        self.put_pkru(&mut saved);
        let theirs = Image::parse(&saved, &self.layout).unwrap();
        let value = |image: &Image<'_>, id: ComponentId| -> Option<Vec<u8>> {
            let bytes = image.component(id)?;
            // PKRU is a register of 32 bits; the other four bytes are reserved.
            let bytes = match id {
                ComponentId::PKRU => &bytes[..4],
                _ => bytes,
            };
            let initial = match id {
                // With palette 0 the rest of TILECFG means nothing.
                ComponentId::XTILECFG => bytes[0] == 0,
                // Comparing slices is fast without optimisation too, and under emulation.
                _ => bytes == &vec![0; bytes.len()][..],
            };
            (!initial).then(|| bytes.to_vec())
        };
        for id in self.layout.user().components().skip(1) {
            assert!(value(ours, id) == value(&theirs, id), "{what}: {id}");
        }
        if ours.xstate_bv().intersects(XFeatures::SSE | XFeatures::AVX) {
            assert_eq!(ours.mxcsr(), theirs.legacy().mxcsr(), "{what}: MXCSR");
        }
    }

    /// The child could not let XSAVE store PKRU: see `load_and_exit`.
    fn put_pkru(&self, saved: &mut [u8]) {
        let pkru: [u8; 4] = *saved.last_chunk().unwrap();
        let component = self.layout.component(ComponentId::PKRU);
        if let Some(offset) = component.and_then(|component| component.offset()) {
            saved[offset..offset + 4].copy_from_slice(&pkru);
            saved[offset + 4..offset + 8].fill(0);
            saved[513] |= 2;
        }
    }

    /// Valid areas of both formats with these components in use.
    fn areas(&self, xstate_bv: u64) -> [Vec<u8>; 2] {
        let standard = with_pending_exception(area(&self.layout, xstate_bv));
        let image = Image::parse(&standard, &self.layout).unwrap();
        let compacted = image.to_compacted();
        [standard, compacted]
    }

    fn report(&self) {
        for ((format, exception, loaded), number) in &self.seen {
            let verdict = if *loaded { "loads" } else { "faults" };
            match exception {
                None => println!("{format:?}: {number} areas, the processor {verdict}, as here"),
                Some(exception) => {
                    println!("{format:?}: {number} areas, the processor {verdict}, {exception:?}");
                }
            }
        }
    }

    fn saw(&self, exception: Option<Exception>, loaded: bool) -> bool {
        let mut seen = self.seen.keys();
        seen.any(|key| (key.1, key.2) == (exception, loaded))
    }
}

/// Subsets of what the processor has: all, none, each alone, all but each.
fn subsets(user: XFeatures) -> Vec<u64> {
    let mut subsets = vec![user.bits(), 0];
    for id in user.components() {
        subsets.push(id.bit().bits());
        subsets.push((user - id.bit()).bits());
    }
    subsets
}

#[test]
fn the_processor_agrees_on_every_bit_of_the_header() {
    let Some(mut oracle) = Oracle::new() else {
        return;
    };
    let user = oracle.layout.user().bits();
    for base in [user, 3] {
        for area in oracle.areas(base) {
            oracle.check(&area, "a valid area");
            for bit in 512 * 8..576 * 8 {
                let mut area = area.clone();
                area[bit / 8] ^= 1 << (bit % 8);
                // A longer area: a compacted one may now have more places in it.
                area.resize(oracle.layout.standard_size() + 4096, 0);
                oracle.check(&area, &format!("XSTATE_BV {base:#x}, bit {bit} changed"));
            }
        }
    }
    oracle.report();
    assert!(oracle.saw(Some(Exception::HeaderBeyond24), true));
}

#[test]
fn the_processor_agrees_on_every_bit_of_mxcsr() {
    let Some(mut oracle) = Oracle::new() else {
        return;
    };
    for base in [0, 1, 2, 4, 7] {
        for area in oracle.areas(base) {
            for bit in 0..32 {
                let mut area = area.clone();
                area[24..28].copy_from_slice(&(0x1f80u32 ^ 1 << bit).to_le_bytes());
                oracle.check(
                    &area,
                    &format!("XSTATE_BV {base:#x}, MXCSR bit {bit} changed"),
                );
            }
        }
    }
    oracle.report();
    assert!(oracle.saw(None, true) && oracle.saw(None, false));
}

#[test]
fn the_processor_holds_what_both_formats_say() {
    let Some(mut oracle) = Oracle::new() else {
        return;
    };
    for base in subsets(oracle.layout.user()) {
        let [standard, compacted] = oracle.areas(base);
        let what = format!("XSTATE_BV {base:#x}");
        oracle.check(&standard, &what);
        oracle.check(&compacted, &what);
        // x87 too, which `areas` fills with values that the processor gives back.
        for area in [&standard, &compacted] {
            let Verdict::Loaded(saved) = oracle.processor.load(area) else {
                panic!("{what}");
            };
            let theirs = Image::parse(&saved, &oracle.layout).unwrap();
            if base & 1 != 0 {
                for part in [0..24, 32..160] {
                    assert_eq!(saved[part.clone()], area[part], "{what}");
                }
            } else {
                assert_eq!(theirs.legacy().fcw(), 0x37f);
                assert_eq!(theirs.component(ComponentId::X87), None);
            }
        }
    }
    oracle.report();
}

#[test]
fn the_processor_does_not_mind_reserved_bytes_of_the_legacy_region() {
    let Some(mut oracle) = Oracle::new() else {
        return;
    };
    for area in oracle.areas(3) {
        for offset in (416..512).step_by(5) {
            let mut area = area.clone();
            area[offset] = 0xff;
            oracle.check(&area, &format!("byte {offset}"));
        }
    }
    oracle.report();
    assert!(oracle.saw(Some(Exception::LegacyReserved), true));
}

/// Every byte of TILECFG through some values: XRSTOR never faults, and holds exactly what this crate
/// takes.
#[test]
fn the_processor_makes_a_tile_configuration_initial_that_ldtilecfg_refuses() {
    let Some(mut oracle) = Oracle::new() else {
        return;
    };
    let Some(offset) = oracle.layout.component(ComponentId::XTILECFG) else {
        println!("skipped: XCR0 has no XTILECFG");
        return;
    };
    let offset = offset.offset().unwrap();
    for base in [0x20000, 0x60000] {
        let [standard, compacted] = oracle.areas(base);
        // XTILECFG comes first of both.
        for (area, start) in [(standard, offset), (compacted, 576)] {
            for byte in 0..64 {
                for value in [0, 1, 17, 65] {
                    let mut area = area.clone();
                    area[start + byte] = value;
                    let what = format!("XSTATE_BV {base:#x}, TILECFG byte {byte} = {value}");
                    oracle.check(&area, &what);
                }
            }
        }
    }
    oracle.report();
    assert!(oracle.saw(Some(Exception::TileConfig), true));
    assert!(!oracle.saw(Some(Exception::TileConfig), false));
}

/// Anything at the places that have rules, in both formats.
#[test]
fn the_processor_agrees_on_random_areas() {
    let Some(mut oracle) = Oracle::new() else {
        return;
    };
    let user = oracle.layout.user().bits();
    let size = oracle.layout.standard_size() + 4096;
    let tilecfg = oracle
        .layout
        .component(ComponentId::XTILECFG)
        .and_then(|component| component.offset());
    // xorshift64
    let mut state = 0x2545_f491_4f6c_dd1du64;
    let mut random = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    for round in 0..1500 {
        let in_use = random() & user & (random() | 3);
        let mut area = oracle.areas(in_use)[usize::from(random() & 1 == 0)].clone();
        area.resize(size, 0);
        for _ in 0..random() % 4 {
            let value = match random() % 3 {
                0 => 1 << (random() % 8),
                1 => 0,
                _ => random() as u8,
            };
            let place = match random() % 8 {
                0 => 24 + random() as usize % 8,
                1 => 412 + random() as usize % 100,
                2 | 3 => 512 + random() as usize % 16,
                4 => 528 + random() as usize % 48,
                5 => tilecfg.unwrap_or(576) + random() as usize % 64,
                _ => 512 + random() as usize % 3,
            };
            area[place] = value;
        }
        oracle.check(&area, &format!("round {round}"));
    }
    oracle.report();
    for loaded in [true, false] {
        assert!(oracle.saw(None, loaded));
    }
}

/// XRSTOR and XSAVE in a child process, which is lost when they fault.
#[allow(unsafe_code, reason = "instructions that Rust has no safe form of")]
mod processor {
    use std::arch::asm;

    /// What the processor makes of an area.
    pub(crate) enum Verdict {
        /// XRSTOR took it. What XSAVE stored right after it.
        Loaded(Vec<u8>),
        /// XRSTOR raised #GP, which the kernel turns into SIGSEGV.
        Fault,
    }

    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XTILEDATA: libc::c_long = 18;
    /// More than any area here has.
    const BYTES: usize = 32 * 1024;

    /// Two pages of memory that the child shares: an area to load, and one to store to.
    pub(crate) struct Processor {
        load: *mut u8,
        store: *mut u8,
        xcr0: u64,
        has_pkru: bool,
    }

    pub(crate) fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
        #[allow(unused_unsafe, reason = "newer compilers call it safe")]
        // SAFETY: every processor that runs this target has CPUID, and it changes nothing.
        let result = unsafe { std::arch::x86_64::__cpuid_count(leaf, subleaf) };
        [result.eax, result.ebx, result.ecx, result.edx]
    }

    impl Processor {
        /// `None` where the operating system has not enabled XSAVE.
        pub(crate) fn new() -> Option<Self> {
            const OSXSAVE: u32 = 1 << 27;
            const OSPKE: u32 = 1 << 4;
            if cpuid(1, 0)[2] & OSXSAVE == 0 {
                return None;
            }
            let (low, high): (u32, u32);
            // SAFETY: OSXSAVE is set, so XGETBV is there, and register 0 always exists. It writes
            // EAX and EDX only, which are declared.
            unsafe {
                asm!("xgetbv", in("ecx") 0, out("eax") low, out("edx") high, options(nomem, nostack));
            }
            let xcr0 = u64::from(high) << 32 | u64::from(low);
            if xcr0 & 1 << 18 != 0 {
                // SAFETY: arch_prctl with this operation takes a number and touches no memory.
                let error =
                    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) };
                assert_eq!(error, 0, "no permission for tile data in this process");
            }
            let map = || {
                // SAFETY: a new mapping at an address of the kernel's choice replaces nothing.
                let memory = unsafe {
                    libc::mmap(
                        std::ptr::null_mut(),
                        BYTES,
                        libc::PROT_READ | libc::PROT_WRITE,
                        libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                        -1,
                        0,
                    )
                };
                assert_ne!(memory, libc::MAP_FAILED);
                memory.cast::<u8>()
            };
            Some(Self {
                load: map(),
                store: map(),
                xcr0,
                has_pkru: cpuid(7, 0)[2] & OSPKE != 0,
            })
        }

        pub(crate) fn xcr0(&self) -> u64 {
            self.xcr0
        }

        /// Loads an area in a child process, and stores what it has then.
        pub(crate) fn load(&mut self, area: &[u8]) -> Verdict {
            assert!(area.len() <= BYTES);
            // SAFETY: the mapping has BYTES bytes, nobody else has a reference into it, and no child
            // runs: each is waited for below.
            let load = unsafe { std::slice::from_raw_parts_mut(self.load, BYTES) };
            load.fill(0);
            load[..area.len()].copy_from_slice(area);
            // SAFETY: as above, for the other mapping.
            let store = unsafe { std::slice::from_raw_parts_mut(self.store, BYTES) };
            store.fill(0);

            // SAFETY: the child calls only setrlimit and signal, which are safe after fork in a
            // process with threads, and then `load_and_exit`, which never returns to code of Rust.
            let child = unsafe { libc::fork() };
            if child == 0 {
                let none = libc::rlimit {
                    rlim_cur: 0,
                    rlim_max: 0,
                };
                // SAFETY: `none` lives through the call. A core file of each fault is of no use.
                unsafe { libc::setrlimit(libc::RLIMIT_CORE, &none) };
                // SAFETY: the default action needs no handler to live.
                unsafe { libc::signal(libc::SIGSEGV, libc::SIG_DFL) };
                // SAFETY: both mappings have BYTES bytes at multiples of 4,096, more than any area
                // with the components of XCR0 needs (`Layout` has bounded and `new` compared them).
                unsafe { load_and_exit(self.load, self.store, u64::from(self.has_pkru)) };
            }
            assert!(child > 0, "fork failed");
            let mut status = 0;
            // SAFETY: `status` lives through the call, and `child` is our child.
            let waited = unsafe { libc::waitpid(child, &mut status, 0) };
            assert_eq!(waited, child);
            if libc::WIFSIGNALED(status) {
                assert_eq!(libc::WTERMSIG(status), libc::SIGSEGV, "another signal");
                return Verdict::Fault;
            }
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 0);
            // SAFETY: as above; the child that wrote to it has ended.
            let store = unsafe { std::slice::from_raw_parts(self.store, BYTES) };
            Verdict::Loaded(store.to_vec())
        }
    }

    /// XRSTOR, XSAVE, exit_group(0), with no code of Rust in between: every register of the extended
    /// state has a foreign value there.
    ///
    /// The area's PKRU may forbid every access to memory. So it is read (RDPKRU) and made 0 before
    /// XSAVE, and stored in the last four bytes of `store`.
    ///
    /// # Safety
    ///
    /// `load` is readable and `store` writable for BYTES bytes, more than XCR0's components need in
    /// either format; both are multiples of 64. `has_pkru` is 0 where CPUID.7.0:ECX.OSPKE is clear.
    unsafe fn load_and_exit(load: *const u8, store: *mut u8, has_pkru: u64) -> ! {
        // SAFETY: the caller has provided the memory. Nothing returns from here: the process ends in
        // the system call, or by the signal of a fault.
        unsafe {
            asm!(
                "xrstor64 [{load}]",
                "xor r8d, r8d",
                "test {has_pkru}, {has_pkru}",
                "jz 2f",
                "xor ecx, ecx",
                "rdpkru",
                "mov r8d, eax",
                "xor eax, eax",
                "xor edx, edx",
                "wrpkru",
                "2:",
                "mov eax, -1",
                "mov edx, -1",
                "xsave64 [{store}]",
                "mov dword ptr [{store} + {last}], r8d",
                "mov eax, {exit_group}",
                "xor edi, edi",
                "syscall",
                "ud2",
                load = in(reg) load,
                store = in(reg) store,
                has_pkru = in(reg) has_pkru,
                last = const BYTES - 4,
                exit_group = const libc::SYS_exit_group,
                in("eax") u32::MAX,
                in("edx") u32::MAX,
                in("ecx") 0,
                in("r8") 0,
                options(noreturn),
            )
        }
    }
}

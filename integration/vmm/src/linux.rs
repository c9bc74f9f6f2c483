//! Boots a Linux kernel as a guest, by the 64-bit boot protocol (Documentation/arch/x86/boot.rst).
//!
//! | module | its one job |
//! |---|---|
//! | [`acpi`] | the tables that tell the kernel of its processors, serial port and switch |
//! | [`cpu`] | the CPUID of each vCPU, and the registers of the first |
//! | [`devices`] | serial port, switch, and the port of the guest's init |
//! | [`guest`] | a guest with its devices: where it comes from, and what it has to say |
//! | [`initramfs`] | the guest's initial file system |
//! | [`log`] | what the guest's init has reported |
//! | [`params`] | boot_params: memory map, command line, initial file system |

pub mod acpi;
pub mod cpu;
pub mod devices;
pub mod guest;
pub mod initramfs;
pub mod log;
pub mod params;

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use cpuid_amx::Policy;
use cpuid_amx::policy::PolicyError;
use host_compat::{FeatureMsrs, RestrictError};
use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::bzimage::BzImage;
use linux_loader::loader::elf::Elf;
use linux_loader::loader::{self, Cmdline, KernelLoader};
use thiserror::Error;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::host::Host;
use crate::vm::{self, Vm, VmError};
pub use guest::{Guest, GuestError};
use params::{Place, Places};

/// Where the command line lies.
const COMMAND_LINE: u64 = 0x2_0000;
/// Bytes that it may have, its end included (COMMAND_LINE_SIZE of x86).
const COMMAND_LINE_BYTES: usize = 2048;
/// No kernel is loaded below.
const HIGH_MEMORY: u64 = 0x10_0000;
/// From the load address of a bzImage to its 64-bit entry.
const ENTRY_64: u64 = 0x200;

/// What every guest's kernel is told. Each word saves time or keeps a guest of this VMM from waiting
/// for devices that it has not:
/// - console, quiet: what is wrong is seen, each further line on the serial port costs time.
/// - nokaslr, mitigations=off, clearcpuid=smap: a guest of an emulated host is slow enough.
/// - tsc=reliable, no_timer_check, nowatchdog: time as the host has it, taken as it is.
/// - cryptomgr.notests, random.trust_cpu=on, audit=0, rcupdate.rcu_expedited=1: nothing is waited for that the
///   guest's work does not need.
/// - pci=off, i8042.*: there is no PCI bus and no keyboard.
/// - reboot=a: through the reset register; the kernel's default is a BIOS, which there is not.
/// - oops=panic, panic=-1: a guest that has crashed ends, with its report on the serial port.
pub const COMMAND_LINE_TEXT: &str = "console=ttyS0 quiet nokaslr mitigations=off clearcpuid=smap tsc=reliable \
    no_timer_check cryptomgr.notests random.trust_cpu=on pci=off i8042.nokbd i8042.noaux audit=0 \
    rcupdate.rcu_expedited=1 nowatchdog oops=panic reboot=a panic=-1";

/// A Linux guest to be booted.
#[derive(Clone, Debug)]
pub struct Linux {
    /// The kernel: an ELF file (vmlinux) or a bzImage.
    pub kernel: PathBuf,
    /// The initial file system, a cpio archive.
    pub initramfs: Vec<u8>,
    /// Words for the kernel; see [`COMMAND_LINE_TEXT`].
    pub command_line: String,
    /// How many vCPUs, up to [`MAX_VCPUS`](Self::MAX_VCPUS).
    pub vcpus: u8,
    /// Bytes of memory.
    pub memory_bytes: u64,
    /// What it sees of AMX, of what KVM supports.
    pub policy: Policy,
    /// Hosts that it may be moved to: it sees what all of them have.
    pub others: Vec<host_compat::Host>,
}

impl Linux {
    /// The most vCPUs of a Linux guest.
    pub const MAX_VCPUS: u8 = 8;
    /// Bytes of memory in which Debian's cloud kernels boot.
    pub const MEMORY_BYTES: u64 = 128 << 20;

    /// A guest of one vCPU with our init and what it needs.
    #[must_use]
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initramfs: initramfs::with_init(&[]),
            command_line: COMMAND_LINE_TEXT.to_owned(),
            vcpus: 1,
            memory_bytes: Self::MEMORY_BYTES,
            policy: Policy::expose_all(),
            others: Vec::new(),
        }
    }
}

impl Vm {
    /// A VM with in-kernel interrupt controllers and timer, whose first vCPU is about to enter a Linux
    /// kernel. The others wait for it.
    ///
    /// # Errors
    ///
    /// The step that failed.
    pub fn boot_linux(host: &Host, linux: &Linux) -> Result<Self, LinuxError> {
        if !(1..=Linux::MAX_VCPUS).contains(&linux.vcpus) {
            return Err(LinuxError::VcpuCount {
                vcpus: linux.vcpus,
                limit: Linux::MAX_VCPUS,
            });
        }
        let mut vm = Self::with_platform(host, linux.memory_bytes)?;
        let entry = vm.load(linux)?;
        acpi::write(&vm.memory, linux.vcpus)?;
        let mut supported = host.cpuid().clone();
        linux.policy.apply(&mut supported)?;
        if !linux.others.is_empty() {
            host_compat::restrict(&mut supported, &linux.others)?;
        }
        for index in 0..linux.vcpus {
            let cpuid = cpu::cpuid(host, supported.as_slice(), index, linux.vcpus)
                .ok_or(LinuxError::CpuidFull)?;
            vm.add_vcpu(host, index, &cpuid)?;
        }
        cpu::write_tables(&vm.memory)?;
        for (index, vcpu) in (0..).zip(&vm.vcpus) {
            if !linux.others.is_empty() {
                let msrs = feature_msrs(host).shared_with(&linux.others);
                cpu::set_msrs(&vcpu.fd, msrs.entries(&supported))
                    .map_err(|error| VmError::Boot { vcpu: index, error })?;
            }
            cpu::set_registers(&vcpu.fd, (index == 0).then_some(entry))
                .map_err(|error| VmError::Boot { vcpu: index, error })?;
        }
        Ok(vm)
    }

    /// Loads kernel, initial file system, command line and boot_params; gives the first instruction.
    fn load(&self, linux: &Linux) -> Result<u64, LinuxError> {
        let kernel = load_kernel(self, &linux.kernel)?;
        let mut command_line = Cmdline::new(COMMAND_LINE_BYTES)?;
        command_line.insert_str(&linux.command_line)?;
        loader::load_cmdline(&self.memory, GuestAddress(COMMAND_LINE), &command_line)?;
        let bytes = linux.initramfs.len() as u64;
        let initramfs = params::initramfs_place(linux.memory_bytes, bytes)
            .filter(|place| place.address >= kernel.end)
            .ok_or(LinuxError::NoRoom {
                kernel_end: kernel.end,
                initramfs_bytes: bytes,
                memory_bytes: linux.memory_bytes,
            })?;
        self.memory
            .write_slice(&linux.initramfs, GuestAddress(initramfs.address))?;
        let places = Places {
            command_line: Place {
                address: COMMAND_LINE,
                bytes: linux.command_line.len() as u64,
            },
            initramfs,
            rsdp: acpi::RSDP,
            memory_bytes: linux.memory_bytes,
        };
        params::write(&self.memory, kernel.header, &places)?;
        Ok(kernel.entry)
    }
}

/// What KVM gives every vCPU of this host.
fn feature_msrs(host: &Host) -> FeatureMsrs {
    let kvm = host.description().kvm.as_ref();
    kvm.map_or(FeatureMsrs::default(), |kvm| kvm.feature_msrs)
}

struct Loaded {
    entry: u64,
    end: u64,
    header: Option<setup_header>,
}

fn load_kernel(vm: &Vm, path: &Path) -> Result<Loaded, LinuxError> {
    let io = |error| LinuxError::Kernel {
        path: path.to_owned(),
        error,
    };
    let mut file = File::open(path).map_err(io)?;
    let high = Some(GuestAddress(HIGH_MEMORY));
    // What is no ELF file has to be a bzImage; an ELF file that is damaged is not tried as one.
    let loaded = match Elf::load(&vm.memory, None, &mut file, high) {
        Err(loader::Error::Elf(loader::elf::Error::InvalidElfMagicNumber)) => {
            let result = BzImage::load(&vm.memory, None, &mut file, high)?;
            let header = result.setup_header;
            // It is unpacked from its preferred address on, in so many bytes.
            let end = header.map_or(0, |header| {
                header.pref_address.saturating_add(header.init_size.into())
            });
            Loaded {
                entry: result.kernel_load.0.saturating_add(ENTRY_64),
                end: end.max(result.kernel_end),
                header,
            }
        }
        other => {
            let result = other?;
            Loaded {
                entry: result.kernel_load.0,
                end: result.kernel_end,
                header: None,
            }
        }
    };
    Ok(loaded)
}

/// A Linux guest could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum LinuxError {
    /// None, or more than the limit.
    #[error("a Linux guest of {vcpus} vCPUs; it has 1 to {limit}")]
    VcpuCount {
        /// Asked for.
        vcpus: u8,
        /// [`Linux::MAX_VCPUS`].
        limit: u8,
    },
    /// The kernel cannot be read.
    #[error("{}: {error}", .path.display())]
    Kernel {
        /// The file.
        path: PathBuf,
        /// By the system.
        error: io::Error,
    },
    /// The host cannot carry what the guest is to see of AMX.
    #[error(transparent)]
    Policy(#[from] PolicyError),
    /// The kernel is none, or does not fit.
    #[error("the kernel: {0}")]
    Loader(#[from] loader::Error),
    /// The command line is too long or has a byte that it may not have.
    #[error("the command line: {0}")]
    CommandLine(#[from] linux_loader::cmdline::Error),
    /// Kernel and initial file system do not fit together.
    #[error(
        "the kernel ends at {kernel_end:#x}, and {initramfs_bytes} bytes of initial file system do \
         not fit between there and the end of {memory_bytes} bytes of memory: give the guest more"
    )]
    NoRoom {
        /// Where the kernel ends.
        kernel_end: u64,
        /// Of the initial file system.
        initramfs_bytes: u64,
        /// Of the guest.
        memory_bytes: u64,
    },
    /// The host's CPUID table is full.
    #[error("KVM's CPUID table has no room for the guest's processors")]
    CpuidFull,
    /// What all hosts share cannot be put into the table.
    #[error(transparent)]
    Restrict(#[from] RestrictError),
    /// An address outside of guest memory.
    #[error("guest memory: {0}")]
    Memory(#[from] GuestMemoryError),
    /// No VM, or no vCPU.
    #[error(transparent)]
    Vm(#[from] VmError),
}

const _: () = assert!(Linux::MAX_VCPUS <= vm::MAX_VCPUS);

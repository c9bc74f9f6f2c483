//! What `danger` says of KVM_SET_XSAVE is what the /dev/kvm that is here does.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    missing_docs
)]

use amxctl::rules::Rule;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_xcrs, kvm_xsave};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

const EINVAL: i32 = 22;
const SSE: u64 = 1 << 1;
const AVX: u64 = 1 << 2;
const OPMASK: u64 = 1 << 5;
const AVX512: u64 = 0b111 << 5;

/// A vCPU of 4,096 bytes, whose guest does not have the components `hidden`.
struct Machine {
    vcpu: VcpuFd,
    _vm: VmFd,
}

fn machine(hidden: u64) -> Option<Machine> {
    let Ok(kvm) = Kvm::new() else {
        println!("skipped: no /dev/kvm");
        return None;
    };
    let vm = kvm.create_vm().unwrap();
    let vcpu = vm.create_vcpu(0).unwrap();
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).unwrap();
    let mut entries = supported.as_slice().to_vec();
    for entry in &mut entries {
        if (entry.function, entry.index) == (0xd, 0) {
            // Nobody has asked for the permission of tiles: they are not in it either.
            entry.eax &= !(hidden as u32);
        }
    }
    vcpu.set_cpuid2(&CpuId::from_entries(&entries).unwrap())
        .unwrap();
    Some(Machine { vcpu, _vm: vm })
}

impl Machine {
    fn area(&self) -> Vec<u8> {
        let xsave = self.vcpu.get_xsave().unwrap();
        xsave
            .region
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }

    /// The errno of KVM_SET_XSAVE, 0 where it takes the area.
    #[expect(unsafe_code, reason = "KVM may copy more than kvm_xsave has")]
    fn set(&self, area: &[u8]) -> i32 {
        let mut xsave = kvm_xsave::default();
        for (word, bytes) in xsave.region.iter_mut().zip(area.chunks_exact(4)) {
            *word = u32::from_le_bytes(bytes.try_into().unwrap());
        }
        // SAFETY: KVM copies as many bytes as the vCPU's own area has (kvm_vcpu_ioctl_x86_set_xsave,
        // fpu->guest_fpu.uabi_size). That is 4,096, the size of kvm_xsave, unless its CPUID has a
        // dynamic component, which KVM_SET_CPUID2 refuses without the permission; this process never
        // asks for it.
        let result = unsafe { self.vcpu.set_xsave(&xsave) };
        result.map_or_else(|error| error.errno(), |()| 0)
    }

    /// The same of an area with another XSTATE_BV and MXCSR.
    fn set_in_use(&self, in_use: u64, mxcsr: u32) -> i32 {
        let mut area = self.area();
        area[512..520].copy_from_slice(&in_use.to_le_bytes());
        area[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        self.set(&area)
    }
}

#[test]
fn of_the_reserved_bytes_kvm_looks_at_those_of_the_header() {
    let Some(machine) = machine(0) else { return };
    for (at, errno) in [(416, 0), (463, 0), (528, EINVAL), (575, EINVAL)] {
        let mut area = machine.area();
        area[at] = 1;
        assert_eq!(machine.set(&area), errno, "byte {at}");
    }
    assert!(
        Rule::Reserved
            .danger()
            .contains("does not look at bytes 416 to 463")
    );
}

#[test]
fn another_format_is_refused() {
    let Some(machine) = machine(0) else { return };
    let mut area = machine.area();
    area[520] = 1;
    assert_eq!(machine.set(&area), EINVAL);
    assert!(Rule::Format.danger().contains("EINVAL"));
}

#[test]
fn components_count_by_the_host_and_not_by_the_guests_cpuid() {
    let Some(machine) = machine(AVX512) else {
        return;
    };
    let host = u64::from_le_bytes(machine.area()[464..472].try_into().unwrap());
    if host & AVX512 == AVX512 {
        assert_eq!(machine.set_in_use(SSE | AVX512, 0x1f80), 0);
    } else {
        println!("skipped: a host without AVX-512 has nothing to hide");
    }
    assert_eq!(machine.set_in_use(1 << 40, 0x1f80), EINVAL);
    // Tiles have no place in an area of 4,096 bytes, whatever the host has.
    assert_eq!(machine.set_in_use(1 << 18, 0x1f80), EINVAL);
    assert!(
        Rule::Components
            .danger()
            .contains("whatever the guest's CPUID says")
    );
}

#[test]
fn mxcsr_counts_where_x87_sse_or_avx_is_in_use() {
    let Some(machine) = machine(0) else { return };
    for in_use in [1, SSE, AVX] {
        assert_eq!(machine.set_in_use(in_use, u32::MAX), EINVAL, "{in_use:#x}");
    }
    assert_eq!(machine.set_in_use(0, u32::MAX), 0);
    let host = u64::from_le_bytes(machine.area()[464..472].try_into().unwrap());
    if host & OPMASK != 0 {
        assert_eq!(machine.set_in_use(OPMASK, u32::MAX), 0);
    }
    assert!(
        Rule::Mxcsr
            .danger()
            .contains("where x87, SSE or AVX is in use")
    );
}

/// The errno of KVM_SET_XCRS, and XCR0 afterwards.
fn set_xcrs(machine: &Machine, xcrs: &kvm_xcrs) -> (i32, u64) {
    let result = machine.vcpu.set_xcrs(xcrs);
    let errno = result.map_or_else(|error| error.errno(), |()| 0);
    let after = machine.vcpu.get_xcrs().unwrap();
    (errno, after.xcrs[0].value)
}

/// What src/registers.rs makes of a list.
#[test]
fn lists_of_xcrs_have_the_effect_that_is_stated() {
    let Some(machine) = machine(0) else { return };
    let list = |nr_xcrs, flags, xcr, value| {
        let mut xcrs = kvm_xcrs {
            nr_xcrs,
            flags,
            ..Default::default()
        };
        xcrs.xcrs[0].xcr = xcr;
        xcrs.xcrs[0].value = value;
        xcrs
    };
    for xcrs in [list(17, 0, 0, 3), list(1, 1, 0, 3), list(1, 0, 0, 0)] {
        assert_eq!(set_xcrs(&machine, &xcrs), (EINVAL, 1), "{xcrs:?}");
    }
    for xcrs in [list(0, 0, 0, 3), list(1, 0, 1, 3)] {
        assert_eq!(set_xcrs(&machine, &xcrs), (0, 1), "{xcrs:?}");
    }
    // The first counts.
    let mut twice = list(2, 0, 0, 3);
    twice.xcrs[1].value = 7;
    assert_eq!(set_xcrs(&machine, &twice), (0, 3));
}

#[test]
fn a_guest_without_xsave_has_xcr0_1() {
    let Some(machine) = machine(u64::MAX) else {
        return;
    };
    let told = machine.vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).unwrap();
    let is_leaf = |entry: &&kvm_cpuid_entry2| (entry.function, entry.index) == (0xd, 0);
    if told
        .as_slice()
        .iter()
        .find(is_leaf)
        .is_some_and(|leaf| leaf.eax != 0)
    {
        println!("skipped: this KVM rewrites CPUID, so that no guest is without XSAVE");
        return;
    }
    let list = |value| {
        let mut xcrs = kvm_xcrs {
            nr_xcrs: 1,
            ..Default::default()
        };
        xcrs.xcrs[0].value = value;
        xcrs
    };
    assert_eq!(set_xcrs(&machine, &list(1)), (0, 1));
    assert_eq!(set_xcrs(&machine, &list(3)), (EINVAL, 1));
    // And its x87 and SSE are restored like any other's.
    assert_eq!(machine.set_in_use(1 | SSE, 0x1f80), 0);
}

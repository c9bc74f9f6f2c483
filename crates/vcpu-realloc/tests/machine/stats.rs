//! KVM's own counters of a vCPU: how often it left the guest, whoever handled that.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VcpuFd;

/// _IO(KVMIO, 0xce)
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// The counter `name` of the binary statistics (Documentation/virt/kvm/api.rst, 4.133). `None`: this
/// KVM has none of that name.
pub(crate) fn counter(vcpu: &VcpuFd, name: &str) -> Option<u64> {
    // SAFETY: The ioctl takes no argument, touches no memory of this process, and gives a new
    // descriptor.
    let fd = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
    if fd < 0 {
        return None;
    }
    // SAFETY: `fd` has just been opened for us and nobody else has it.
    let file = unsafe { File::from_raw_fd(fd) };
    let words = |at: u64| -> [u32; 6] {
        let mut bytes = [0; 24];
        file.read_exact_at(&mut bytes, at).unwrap();
        std::array::from_fn(|i| u32::from_le_bytes(bytes[i * 4..][..4].try_into().unwrap()))
    };
    // kvm_stats_header: flags, name_size, num_desc, id_offset, desc_offset, data_offset
    let [_, name_bytes, descriptors, _, first, data] = words(0);
    for n in 0..descriptors {
        // kvm_stats_desc: flags, exponent and size, offset, bucket_size, then the name
        let at = u64::from(first) + u64::from(n) * u64::from(16 + name_bytes);
        let [_, _, offset, ..] = words(at);
        let mut text = vec![0; name_bytes as usize];
        file.read_exact_at(&mut text, at + 16).unwrap();
        let end = text.iter().position(|&byte| byte == 0).unwrap();
        if &text[..end] == name.as_bytes() {
            let mut value = [0; 8];
            let at = u64::from(data) + u64::from(offset);
            file.read_exact_at(&mut value, at).unwrap();
            return Some(u64::from_le_bytes(value));
        }
    }
    None
}

/// VM exits, also those that never reach the VMM.
pub(crate) fn exits(vcpu: &VcpuFd) -> u64 {
    counter(vcpu, "exits").expect("KVM counts exits")
}

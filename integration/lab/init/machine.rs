//! Brings the machine up: file systems, kernel modules, the loopback interface.

use std::ffi::{CStr, CString};
use std::io;
use std::net::UdpSocket;
use std::os::fd::AsFd;
use std::path::Path;

use crate::sys;

/// The file systems of the machine, and of the root that each program gets.
const MOUNTS: [(&CStr, &str, &CStr); 6] = [
    (c"proc", "proc", c""),
    (c"sysfs", "sys", c""),
    (c"devtmpfs", "dev", c""),
    (c"devpts", "dev/pts", c"mode=620,ptmxmode=666"),
    (c"tmpfs", "dev/shm", c"mode=1777"),
    (c"tmpfs", "tmp", c"mode=1777"),
];

/// Mounts what every program expects below /.
pub fn mount_all() -> io::Result<()> {
    mount_below(Path::new("/"))
}

/// Mounts the same below another root. Kernel file systems are one and the same wherever they are mounted.
pub fn mount_below(root: &Path) -> io::Result<()> {
    for (kind, place, options) in MOUNTS {
        let target = root.join(place);
        std::fs::create_dir_all(&target)?;
        let name = CString::new(target.into_os_string().into_encoded_bytes())?;
        sys::mount_fs(kind, &name, options)
            .map_err(|error| context(error, &format!("mount {name:?}")))?;
    }
    Ok(())
}

/// Loads the modules that /lab/modules lists, in its order: one line each, the file's path and then its parameters.
pub fn load_modules() -> io::Result<()> {
    for line in std::fs::read_to_string("/lab/modules")?.lines() {
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        let file = std::fs::File::open(path).map_err(|error| context(error, path))?;
        sys::load_module(file.as_fd(), &CString::new(parameters)?)
            .map_err(|error| context(error, path))?;
    }
    Ok(())
}

/// Programs that talk to themselves over 127.0.0.1 can.
pub fn loopback_up() -> io::Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0").map_err(|error| context(error, "socket"))?;
    sys::interface_up(socket.as_fd()).map_err(|error| context(error, "loopback"))
}

/// How many processes the kernel has killed so far because memory was short.
pub fn killed_for_memory() -> io::Result<u64> {
    let counters = std::fs::read_to_string("/proc/vmstat")?;
    let mut words = counters
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "));
    let count = words.next().and_then(|count| count.parse().ok());
    count.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "vmstat without oom_kill"))
}

/// The same error, with what it was about.
pub fn context(error: io::Error, what: &str) -> io::Error {
    io::Error::new(error.kind(), format!("{what}: {error}"))
}

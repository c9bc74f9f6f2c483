//! The machine under the processes: file systems, processors, and its end.

use std::fs;
use std::io;

use crate::report::Wish;
use crate::sys;

/// Mounts what the processes look into.
pub fn mount_all() -> io::Result<()> {
    for (kind, target) in [
        (c"proc", c"/proc"),
        (c"sysfs", c"/sys"),
        (c"devtmpfs", c"/dev"),
    ] {
        fs::create_dir_all(target.to_str().map_err(io::Error::other)?)?;
        sys::mount_fs(kind, target)?;
    }
    load_modules()
}

/// Loads what lies in /modules: where the kernel has it, the device that reads MSRs.
fn load_modules() -> io::Result<()> {
    let Ok(modules) = fs::read_dir("/modules") else {
        return Ok(());
    };
    for module in modules {
        sys::load_module(&fs::File::open(module?.path())?)?;
    }
    Ok(())
}

/// How many processors are online.
pub fn processors() -> io::Result<u32> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let count = text.lines().filter(|line| line.starts_with("processor"));
    u32::try_from(count.count()).map_err(io::Error::other)
}

/// What the kernel says of AMX in the flags of its first processor.
pub fn amx_flags() -> io::Result<Vec<String>> {
    let text = fs::read_to_string("/proc/cpuinfo")?;
    let flags = text.lines().find(|line| line.starts_with("flags"));
    let words = flags.unwrap_or_default().split_whitespace();
    Ok(words.filter(|word| word.starts_with("amx_")).map(str::to_owned).collect())
}

/// The kernel's release.
pub fn kernel() -> io::Result<String> {
    let text = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    Ok(text.trim().to_owned())
}

/// Ends the machine.
pub fn end(wish: Wish) -> io::Result<std::convert::Infallible> {
    sys::reboot(wish == Wish::Reset)?;
    Err(io::Error::other("the machine goes on after its end"))
}

//! The guest's initial file system.

use std::io;

use amx_guest::INIT;
use amx_lab::cpio::{DEVICE, DIRECTORY, Entry, FILE, Writer};

/// An archive with our init, and the kernel modules that it is to load: names and contents.
#[must_use]
pub fn with_init(modules: &[(&str, &[u8])]) -> Vec<u8> {
    // Writing to a vector does not fail, and no member is 4 GiB long.
    write(modules).unwrap_or_default()
}

fn write(modules: &[(&str, &[u8])]) -> io::Result<Vec<u8>> {
    let mut archive = Writer::new(Vec::new());
    for folder in ["dev", "modules"] {
        archive.add(&Entry::new(folder, DIRECTORY | 0o755, 0), io::empty())?;
    }
    // The first process has its console from here.
    for (name, device) in [("dev/console", (5, 1)), ("dev/null", (1, 3))] {
        let entry = Entry {
            device,
            ..Entry::new(name, DEVICE | 0o666, 0)
        };
        archive.add(&entry, io::empty())?;
    }
    archive.add(&Entry::new("init", FILE | 0o755, INIT.len() as u64), INIT)?;
    for (name, bytes) in modules {
        let name = format!("modules/{name}");
        let entry = Entry::new(name, FILE | 0o644, bytes.len() as u64);
        archive.add(&entry, *bytes)?;
    }
    archive.finish()
}

#[cfg(test)]
mod tests {
    use amx_lab::cpio::Reader;

    use super::*;

    #[test]
    fn init_and_its_modules_are_there() {
        let archive = with_init(&[("msr.ko", b"code")]);
        let mut reader = Reader::new(archive.as_slice());
        let mut names = vec![];
        while let Some(entry) = reader.next_entry().unwrap() {
            if entry.name == "init" {
                assert_eq!(entry.size, INIT.len() as u64);
            }
            names.push(entry.name);
        }
        let expected = [
            "dev",
            "modules",
            "dev/console",
            "dev/null",
            "init",
            "modules/msr.ko",
        ];
        assert_eq!(names, expected);
        assert_eq!(&INIT[..4], b"\x7fELF");
    }
}

//! Finds the Debian mirror that this machine uses, in apt's own lists of sources: one-line and deb822 formats.

use std::fs;
use std::path::{Path, PathBuf};

/// The mirror and the keys that its lists are signed with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Mirror {
    pub(crate) address: String,
    pub(crate) keyring: Option<PathBuf>,
}

/// Suites that only Debian's main archive has. Others (-security, -backports, a vendor's) may be on hosts that have nothing else.
const SUITES: [&str; 11] = [
    "stable",
    "testing",
    "unstable",
    "sid",
    "oldstable",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "duke",
    "oldoldstable",
];

/// The mirror of Debian's main archive in the lists below `etc_apt`, if there is one.
pub(crate) fn find_mirror(etc_apt: &Path) -> Option<Mirror> {
    let mut files = vec![etc_apt.join("sources.list")];
    if let Ok(folder) = fs::read_dir(etc_apt.join("sources.list.d")) {
        let mut more: Vec<_> = folder.flatten().map(|entry| entry.path()).collect();
        more.sort();
        files.extend(more);
    }
    files.iter().find_map(|file| {
        let text = fs::read_to_string(file).ok()?;
        match file.extension()?.to_str()? {
            "sources" => in_deb822(&text),
            "list" => text.lines().find_map(in_one_line),
            _ => None,
        }
    })
}

fn in_one_line(line: &str) -> Option<Mirror> {
    let line = line.split('#').next()?.trim();
    let rest = line
        .strip_prefix("deb-src")
        .or_else(|| line.strip_prefix("deb"))?;
    rest.starts_with([' ', '\t', '[']).then_some(())?;
    let rest = rest.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (address, suite) = (words.next()?, words.next()?);
    let keyring = options
        .split_whitespace()
        .find_map(|option| option.strip_prefix("signed-by="));
    words.any(|component| component == "main").then_some(())?;
    chosen(address, [suite].into_iter(), keyring)
}

fn in_deb822(text: &str) -> Option<Mirror> {
    let mut stanza = Stanza::default();
    let mut mirror = None;
    for line in text.lines().chain([""]) {
        if line.trim().is_empty() {
            mirror = mirror.or_else(|| std::mem::take(&mut stanza).mirror());
        } else if !line.starts_with('#') {
            stanza.take(line);
        }
    }
    mirror
}

/// One paragraph of a deb822 file: fields, with continuation lines folded in.
#[derive(Default)]
struct Stanza(Vec<(String, String)>);

impl Stanza {
    fn take(&mut self, line: &str) {
        if line.starts_with([' ', '\t']) {
            if let Some((_, value)) = self.0.last_mut() {
                value.push('\n');
                value.push_str(line.trim());
            }
        } else if let Some((name, value)) = line.split_once(':') {
            self.0
                .push((name.trim().to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    fn field(&self, name: &str) -> &str {
        self.0
            .iter()
            .find(|(field, _)| field == name)
            .map_or("", |(_, value)| value)
    }

    fn mirror(self) -> Option<Mirror> {
        let enabled = !["no", "false", "off", "0"]
            .contains(&self.field("enabled").to_ascii_lowercase().as_str());
        let has_main = self
            .field("components")
            .split_whitespace()
            .any(|component| component == "main");
        (enabled && has_main).then_some(())?;
        let address = self.field("uris").split_whitespace().next()?;
        // The field can also hold the key itself; then it is not a path.
        let keyring = Some(self.field("signed-by"))
            .filter(|value| value.starts_with('/') && !value.contains('\n'));
        chosen(address, self.field("suites").split_whitespace(), keyring)
    }
}

fn chosen<'a>(
    address: &str,
    mut suites: impl Iterator<Item = &'a str>,
    keyring: Option<&str>,
) -> Option<Mirror> {
    let of_the_archive =
        suites.any(|suite| SUITES.contains(&suite)) && !address.contains("debian-security");
    of_the_archive.then(|| Mirror {
        address: address.trim_end_matches('/').to_owned(),
        keyring: keyring.map(PathBuf::from),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_line_format() {
        let line = "deb [arch=amd64 signed-by=/k.gpg] https://mirror.example/debian/ bookworm main contrib # mine";
        let mirror = in_one_line(line).unwrap();
        assert_eq!(
            mirror,
            Mirror {
                address: "https://mirror.example/debian".into(),
                keyring: Some("/k.gpg".into())
            }
        );
        assert_eq!(
            in_one_line("deb-src http://m.example/d sid main")
                .unwrap()
                .address,
            "http://m.example/d"
        );
        for other in [
            "# deb http://m.example/d sid main",
            "deb http://m.example/debian-security bookworm main",
            "deb http://m.example/d bookworm-security main",
            "deb http://m.example/d noble main",
            "deb http://m.example/d sid contrib",
            "debug http://m.example/d sid main",
            "",
        ] {
            assert_eq!(in_one_line(other), None, "{other}");
        }
    }

    #[test]
    fn deb822_format() {
        let text = "# a comment\nTypes: deb\nURIs: http://m.example/debian-security\nSuites: bookworm-security\nComponents: main\n\n\
                    Types: deb\nEnabled: no\nURIs: http://off.example/debian\nSuites: sid\nComponents: main\n\n\
                    Types: deb deb-src\n# between\nuris: http://m.example/debian\nSuites: bookworm\n  bookworm-updates\nComponents: main\nSigned-By: /k.gpg\n";
        assert_eq!(
            in_deb822(text).unwrap(),
            Mirror {
                address: "http://m.example/debian".into(),
                keyring: Some("/k.gpg".into())
            }
        );
        let with_key_inside = "Types: deb\nURIs: http://m.example/d\nSuites: sid\nComponents: main\nSigned-By:\n -----BEGIN\n .\n abc\n";
        assert_eq!(in_deb822(with_key_inside).unwrap().keyring, None);
    }

    #[test]
    fn files_are_found_where_apt_finds_them() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(find_mirror(folder.path()), None);
        let parts = folder.path().join("sources.list.d");
        fs::create_dir(&parts).unwrap();
        fs::write(
            parts.join("b.sources.disabled"),
            "Types: deb\nURIs: http://no.example/d\nSuites: sid\nComponents: main\n",
        )
        .unwrap();
        assert_eq!(find_mirror(folder.path()), None);
        fs::write(
            parts.join("a.sources"),
            "Types: deb\nURIs: http://a.example/d\nSuites: sid\nComponents: main\n",
        )
        .unwrap();
        assert_eq!(
            find_mirror(folder.path()).unwrap().address,
            "http://a.example/d"
        );
        fs::write(
            folder.path().join("sources.list"),
            "deb http://first.example/d stable main\n",
        )
        .unwrap();
        assert_eq!(
            find_mirror(folder.path()).unwrap().address,
            "http://first.example/d"
        );
    }
}

//! The lab's patches of the emulator, and how they are applied: each one against the original source, so that any can be left out.
//!
//! `patch` applies one after the other, and a zero-context hunk then lands wrongly once an earlier patch is missing. Here the line
//! numbers of all patches are those of the original, and what is to be replaced is compared with it.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// One patch: its name and its text.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patch {
    pub(crate) name: &'static str,
    pub(crate) text: &'static str,
}

impl Patch {
    /// What it does, without the words about it.
    pub(crate) fn hunks(&self) -> &'static str {
        self.text
            .find("\n--- ")
            .and_then(|start| self.text.get(start..))
            .unwrap_or(self.text)
    }
}

macro_rules! patches {
    ($($name:literal),* $(,)?) => { &[$(Patch { name: $name, text: include_str!(concat!("../patches/", $name, ".patch")) }),*] };
}

/// All of them.
pub(crate) const ALL: &[Patch] = patches![
    "01-icache-amx-fetch-mode",
    "03-sttilecfg-decoding",
    "04-tilecfg-image",
    "05-tiledata-rows",
    "06-tiledata-in-use",
    "07-compacted-offsets",
    "08-compacted-alignment",
    "09-compacted-mxcsr",
    "10-protection-keys-of-supervisor-pages",
    "11-sysret-stack-segment",
    "12-ram-images",
    "13-xfd",
    "14-serial-at-once",
    "15-amxlab-channel",
    "16-saved-ram",
    "17-xrstor-initial-avx",
    "18-xsavec-mxcsr",
    "19-xrstor-tilecfg-alone",
    "20-signed-bytes",
    "21-stride-without-index",
    "22-sib-byte-required",
    "23-interrupts-in-guests",
    "24-processor-topology",
    "25-tmul-subleaf",
    "26-granite-rapids",
];

/// Why the patches could not be applied.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PatchError {
    /// There is no patch of this name.
    #[error("no patch is called {name:?}; there are: {known}")]
    Unknown {
        /// The name that was given.
        name: String,
        /// The names that there are.
        known: String,
    },
    /// The patch is not in the form that is expected of it.
    #[error("patch {patch}, line {line}: not a zero-context patch")]
    Malformed {
        /// The patch.
        patch: &'static str,
        /// The line in it.
        line: usize,
    },
    /// The source is not the one that the patch was made for.
    #[error(
        "patch {patch} does not fit {file}, line {line}: the emulator's source is not the version that the lab was made for"
    )]
    Mismatch {
        /// The patch.
        patch: &'static str,
        /// The file.
        file: String,
        /// The line in the original file.
        line: usize,
    },
    /// The file system refused.
    #[error("{path}", path = path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// All patches but those that are named.
pub(crate) fn without(names: &[String]) -> Result<Vec<Patch>, PatchError> {
    if let Some(name) = names
        .iter()
        .find(|name| !ALL.iter().any(|patch| patch.name == name.as_str()))
    {
        let known = ALL
            .iter()
            .map(|patch| patch.name)
            .collect::<Vec<_>>()
            .join(", ");
        return Err(PatchError::Unknown {
            name: name.clone(),
            known,
        });
    }
    Ok(ALL
        .iter()
        .copied()
        .filter(|patch| !names.iter().any(|name| name == patch.name))
        .collect())
}

/// A piece of a patch: `remove` goes, from line `at` on, and `add` comes there. With nothing to remove, `add` comes after line `at`.
#[derive(Debug)]
struct Hunk {
    patch: &'static str,
    at: usize,
    remove: Vec<&'static str>,
    add: Vec<&'static str>,
}

impl Hunk {
    /// Index of the first original line that comes after what this hunk adds.
    fn index(&self) -> usize {
        if self.remove.is_empty() {
            self.at
        } else {
            self.at.saturating_sub(1)
        }
    }
}

/// Applies the patches to the source in `tree`.
pub(crate) fn apply(patches: &[Patch], tree: &Path) -> Result<(), PatchError> {
    let mut files: BTreeMap<&str, Vec<Hunk>> = BTreeMap::new();
    for patch in patches {
        parse(*patch, &mut files)?;
    }
    for (name, mut hunks) in files {
        hunks.sort_by_key(Hunk::index);
        let path = tree.join(name);
        let io = |source| PatchError::Io {
            path: path.clone(),
            source,
        };
        let original = match fs::read(&path) {
            // The sources are of several people and encodings; the lines that are changed are ASCII.
            Ok(bytes) => bytes,
            Err(error)
                if error.kind() == io::ErrorKind::NotFound
                    && hunks.iter().all(|hunk| hunk.at == 0) =>
            {
                Vec::new()
            }
            Err(error) => return Err(io(error)),
        };
        fs::write(&path, patched(name, &original, &hunks)?).map_err(io)?;
    }
    Ok(())
}

fn parse<'a>(patch: Patch, files: &mut BTreeMap<&'a str, Vec<Hunk>>) -> Result<(), PatchError>
where
    'static: 'a,
{
    let mut file = None;
    for (number, line) in patch.text.lines().enumerate() {
        let malformed = || PatchError::Malformed {
            patch: patch.name,
            line: number.saturating_add(1),
        };
        if let Some(name) = line.strip_prefix("+++ b/") {
            file = Some(name);
        } else if let Some(ranges) = line.strip_prefix("@@ -") {
            let at = ranges
                .split(',')
                .next()
                .and_then(|at| at.parse().ok())
                .ok_or_else(malformed)?;
            let hunk = Hunk {
                patch: patch.name,
                at,
                remove: Vec::new(),
                add: Vec::new(),
            };
            files
                .entry(file.ok_or_else(malformed)?)
                .or_default()
                .push(hunk);
        } else if let (Some(name), false) = (file, line.starts_with("--- ")) {
            let hunk = files
                .get_mut(name)
                .and_then(|hunks| hunks.last_mut())
                .ok_or_else(malformed)?;
            match line.split_at_checked(1).ok_or_else(malformed)? {
                ("-", text) => hunk.remove.push(text),
                ("+", text) => hunk.add.push(text),
                _ => return Err(malformed()),
            }
        }
    }
    Ok(())
}

fn patched(name: &str, original: &[u8], hunks: &[Hunk]) -> Result<Vec<u8>, PatchError> {
    let mut lines = original.split_inclusive(|byte| *byte == b'\n');
    let mut taken = 0;
    let mut result = Vec::new();
    for hunk in hunks {
        let mismatch = |line| PatchError::Mismatch {
            patch: hunk.patch,
            file: name.to_owned(),
            line,
        };
        // An earlier hunk that removed lines beyond this one's place would be two patches that change the same line.
        let before = hunk
            .index()
            .checked_sub(taken)
            .ok_or_else(|| mismatch(hunk.at))?;
        for _ in 0..before {
            result.extend_from_slice(lines.next().ok_or_else(|| mismatch(hunk.at))?);
        }
        taken = hunk.index();
        for removed in &hunk.remove {
            taken = taken.saturating_add(1);
            let line = lines.next().ok_or_else(|| mismatch(taken))?;
            if line.trim_ascii_end() != removed.as_bytes().trim_ascii_end() {
                return Err(mismatch(taken));
            }
        }
        for added in &hunk.add {
            result.extend_from_slice(added.as_bytes());
            result.push(b'\n');
        }
    }
    result.extend(lines.flatten());
    Ok(result)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(original: &str, texts: &[&'static str]) -> Result<String, PatchError> {
        let tree = tempfile::tempdir().unwrap();
        fs::write(tree.path().join("f"), original).unwrap();
        let patches: Vec<_> = texts.iter().map(|text| Patch { name: "p", text }).collect();
        apply(&patches, tree.path())?;
        Ok(fs::read_to_string(tree.path().join("f")).unwrap())
    }

    const REPLACE: &str = "Subject: x\n\n--- a/f\n+++ b/f\n@@ -2,1 +2,2 @@\n-two\n+2\n+2.5\n";
    const INSERT: &str = "--- a/f\n+++ b/f\n@@ -3,0 +4,1 @@\n+3.5\n";

    #[test]
    fn each_patch_stands_alone_and_all_stand_together() {
        let original = "one\ntwo\nthree\nfour\n";
        assert_eq!(
            applied(original, &[REPLACE]).unwrap(),
            "one\n2\n2.5\nthree\nfour\n"
        );
        assert_eq!(
            applied(original, &[INSERT]).unwrap(),
            "one\ntwo\nthree\n3.5\nfour\n"
        );
        for order in [[REPLACE, INSERT], [INSERT, REPLACE]] {
            assert_eq!(
                applied(original, &order).unwrap(),
                "one\n2\n2.5\nthree\n3.5\nfour\n"
            );
        }
    }

    #[test]
    fn another_source_is_refused() {
        assert!(matches!(
            applied("one\nTWO\nthree\n", &[REPLACE]),
            Err(PatchError::Mismatch { line: 2, .. })
        ));
        assert!(matches!(
            applied("one\n", &[INSERT]),
            Err(PatchError::Mismatch { .. })
        ));
        assert!(matches!(
            applied("one\ntwo\n", &[REPLACE, REPLACE]),
            Err(PatchError::Mismatch { .. })
        ));
    }

    #[test]
    fn every_patch_is_well_formed_and_says_why_it_is_there() {
        let mut files = BTreeMap::new();
        for patch in ALL {
            parse(*patch, &mut files).unwrap();
            for part in [
                "Subject: ",
                "What was wrong: ",
                "Rule: ",
                "Without it fails: ",
            ] {
                assert!(patch.text.contains(part), "{} lacks {part:?}", patch.name);
            }
        }
        assert!(
            files
                .values()
                .flatten()
                .all(|hunk| !hunk.remove.is_empty() || !hunk.add.is_empty())
        );
    }

    #[test]
    fn words_about_a_patch_are_not_part_of_what_it_does() {
        for patch in ALL {
            assert!(
                patch.hunks().trim_start().starts_with("--- ")
                    && !patch.hunks().contains("What was wrong"),
                "{}",
                patch.name
            );
        }
    }

    #[test]
    fn patches_are_left_out_by_name() {
        assert_eq!(without(&["13-xfd".into()]).unwrap().len(), ALL.len() - 1);
        assert!(matches!(
            without(&["14-xfd".into()]),
            Err(PatchError::Unknown { .. })
        ));
    }
}

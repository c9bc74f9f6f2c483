//! The fixtures as an independent decoder reads them: Debian's package cpuid, by Todd Allen.
//!
//! What that version does not know it does not say, and is not compared: of AMX, version 20230120
//! knows AMX-TILE, AMX-INT8, AMX-BF16 and AMX-FP16.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

mod common;

use std::collections::BTreeMap;
use std::process::Command;

use common::{FIXTURES, fixture};
use cpuid_amx::features::XsaveFeatures;
use cpuid_amx::{Amx, AmxFeatures, CpuidTable, FeatureSet, Table};
use xsave_state::{Layout, XFeatures};

/// What the decoder says, by section, such as `0xd/0x12`, and name.
struct Decoded(BTreeMap<String, Vec<(String, String)>>);

impl Decoded {
    /// `None`: the decoder is not here.
    fn new(table: &Table) -> Option<Self> {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::io::Write::write_all(&mut file, format!("CPU 0:\n{table}").as_bytes()).unwrap();
        let output = match Command::new("cpuid").arg("-f").arg(file.path()).output() {
            Ok(output) => output,
            Err(error) => {
                println!("skipped: no decoder here, which is Debian's package cpuid: {error}");
                return None;
            }
        };
        assert!(output.status.success(), "{output:?}");
        let mut sections: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
        let mut section = String::new();
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            if let Some((name, value)) = line.split_once(" = ") {
                let entry = (name.trim().to_owned(), value.trim().to_owned());
                sections.entry(section.clone()).or_default().push(entry);
            } else if let Some(title) = line.trim().strip_suffix("):") {
                title.rsplit_once('(').unwrap().1.clone_into(&mut section);
            }
        }
        Some(Self(sections))
    }

    fn text(&self, section: &str, name: &str) -> Option<&str> {
        let (_, value) = self
            .0
            .get(section)?
            .iter()
            .find(|(n, _)| n.contains(name))?;
        Some(value)
    }

    /// `0x00002b00 (11008)`, or `1`.
    fn number(&self, section: &str, name: &str) -> Option<u64> {
        let word = self.text(section, name)?.split_whitespace().next()?;
        match word.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => word.parse().ok(),
        }
    }

    fn flag(&self, section: &str, name: &str) -> Option<bool> {
        self.text(section, name)?.parse().ok()
    }
}

/// Each fixture with what the decoder says of it; less than all where there is no decoder.
fn decoded() -> impl Iterator<Item = (&'static str, Table, Decoded)> {
    FIXTURES.into_iter().map_while(|name| {
        let table = fixture(name);
        let decoded = Decoded::new(&table)?;
        Some((name, table, decoded))
    })
}

#[test]
fn amx_features() {
    for (name, table, decoded) in decoded() {
        let features = AmxFeatures::from_leaf_7(table.leaf(7, 0), table.leaf(7, 1));
        let mut compared = 0;
        for feature in AmxFeatures::all() {
            let text = format!("{feature}:");
            let flag = ["7/0", "7/1", "7", "7/0/edx"]
                .iter()
                .find_map(|s| decoded.flag(s, &text));
            let anywhere = || decoded.0.keys().find_map(|s| decoded.flag(s, &text));
            if let Some(there) = flag.or_else(anywhere) {
                assert_eq!(there, features.contains(feature), "{name}: {feature}");
                compared += 1;
            }
        }
        // The fourth is in sub-leaf 1, which not all fixtures have.
        assert!(compared >= 3, "{name}: {compared}");
    }
}

#[test]
fn sizes_and_places_of_components() {
    for (name, table, decoded) in decoded() {
        let set = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        let [user, enabled, all, _] = table.leaf(0xd, 0).map(u64::from);
        assert_eq!(
            decoded.number("0xd/0", "XCR0 valid bit field mask"),
            Some(user),
            "{name}"
        );
        assert_eq!(
            decoded.number("0xd/0", "required by fields in XCR0"),
            Some(enabled),
            "{name}"
        );
        assert_eq!(
            decoded.number("0xd/0", "required by XSAVE/XRSTOR area"),
            Some(all),
            "{name}"
        );
        assert_eq!(set.user().bits(), user, "{name}");
        for (text, feature) in [
            ("XSAVEOPT", XsaveFeatures::XSAVEOPT),
            ("XSAVEC", XsaveFeatures::XSAVEC),
            ("XGETBV", XsaveFeatures::XGETBV1),
            ("XSAVES", XsaveFeatures::XSAVES),
            ("XFD", XsaveFeatures::XFD),
        ] {
            let there = set.xsave.contains(feature);
            assert_eq!(decoded.flag("0xd/0", text), Some(there), "{name}: {text}");
        }
        let supervisor = decoded.number("0xd/0", "IA32_XSS valid bit field mask");
        assert_eq!(supervisor, Some(set.supervisor().bits()), "{name}");
        // The area that the policies compute is the one that the processor has.
        let layout = Layout::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        if let (true, Ok(layout)) = (set.xsave.contains(XsaveFeatures::XSAVE), layout) {
            assert_eq!(layout.standard_size() as u64, all, "{name}");
            assert_eq!(u64::from(set.leaf(0xd, 0)[2]), all, "{name}");
        }

        let extended = set.components.values();
        for shape in extended.filter(|c| !XFeatures::LEGACY.contains(c.id.bit())) {
            let section = match shape.id.number() {
                number @ 0..=9 => format!("0xd/{number}"),
                number => format!("0xd/{number:#x}"),
            };
            let number = |text| decoded.number(&section, text);
            assert_eq!(
                number("save state byte size"),
                Some(shape.size.into()),
                "{name} {shape}"
            );
            assert_eq!(
                number("save state byte offset"),
                Some(shape.offset.into()),
                "{name} {shape}"
            );
            let flag = |text| decoded.flag(&section, text);
            assert_eq!(
                flag("64-byte alignment"),
                Some(shape.aligned),
                "{name} {shape}"
            );
            assert_eq!(flag("XFD faulting"), Some(shape.xfd), "{name} {shape}");
            let register = decoded
                .text(&section, "supported in IA32_XSS or XCR0")
                .unwrap();
            assert_eq!(
                register.starts_with("IA32_XSS"),
                shape.supervisor,
                "{name} {shape}"
            );
        }
    }
}

#[test]
fn palettes_and_limits() {
    let mut with_tiles = 0;
    let mut read = 0;
    for (name, table, decoded) in decoded() {
        read += 1;
        let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        let max_palette = decoded.number("0x1d/0", "max_palette").unwrap_or(0);
        assert_eq!(max_palette, amx.palettes().len() as u64, "{name}");
        if let [palette] = amx.palettes() {
            for (text, value) in [
                ("total_tile_bytes", palette.total_bytes()),
                ("bytes_per_tile", palette.tile_bytes()),
                ("bytes_per_row", palette.row_bytes()),
                ("max_names", palette.tiles()),
                ("max_rows", palette.rows()),
            ] {
                assert_eq!(
                    decoded.number("0x1d/0", text),
                    Some(value.into()),
                    "{name}: {text}"
                );
            }
            with_tiles += 1;
        }
        let limit = |text| decoded.number("0x1e/0", text).filter(|limit| *limit != 0);
        assert_eq!(
            limit("tmul_maxk"),
            amx.tmul().map(|l| l.maxk.into()),
            "{name}"
        );
        assert_eq!(
            limit("tmul_maxn"),
            amx.tmul().map(|l| l.maxn.into()),
            "{name}"
        );
    }
    // Those of Sapphire and Granite Rapids.
    assert!(with_tiles == 4 || read == 0, "{with_tiles} of {read}");
}

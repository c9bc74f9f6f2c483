//! CPUID of real processors and guests, which the tests of xsave-state have as well.

use std::sync::OnceLock;

use cpuid_amx::Table;
use xsave_state::Layout;

use crate::input::Input;

macro_rules! dumps {
    ($($name:literal)*) => {
        /// Name and dump of each.
        pub const DUMPS: &[(&str, &str)] = &[$((
            $name,
            include_str!(concat!(
                "../../../crates/xsave-state/tests/fixtures/cpuid/", $name, ".txt"
            )),
        )),*];
    };
}
// New ones come last: the corpora name them by number.
dumps! {
    "sapphire-rapids-emulated-guest" "sapphire-rapids" "sapphire-rapids-guest-without-amx"
    "granite-rapids" "ice-lake-server" "amd-zen4-genoa" "skylake-client" "haswell-client"
    "alder-lake-client" "amd-zen2-rome" "emerald-rapids-kvm-supported"
    "emerald-rapids-vm-without-tile-leaves" "sapphire-rapids-guest"
}

/// Every dump as a table, in the order of [`DUMPS`].
pub fn tables() -> &'static [Table] {
    static TABLES: OnceLock<Vec<Table>> = OnceLock::new();
    TABLES.get_or_init(|| {
        DUMPS
            .iter()
            .map(|(_, dump)| dump.parse().unwrap())
            .collect()
    })
}

/// The layout of every dump that has one, and with them one that no processor has: components that
/// only AMD, only Intel and nobody has, a larger XTILEDATA with a second palette, unaligned places.
pub fn layouts() -> &'static [Layout] {
    static LAYOUTS: OnceLock<Vec<Layout>> = OnceLock::new();
    LAYOUTS.get_or_init(|| {
        tables()
            .iter()
            .filter_map(|table| Layout::from_cpuid(leaves(table)).ok())
            .chain([Layout::from_cpuid(strange).unwrap()])
            .collect()
    })
}

/// One of [`layouts`].
pub fn pick(input: &mut Input<'_>) -> &'static Layout {
    input.pick(layouts())
}

/// A table as the function that [`Layout::from_cpuid`] asks.
pub fn leaves(table: &Table) -> impl Fn(u32, u32) -> [u32; 4] {
    move |leaf, subleaf| cpuid_amx::CpuidTable::leaf(table, leaf, subleaf)
}

fn strange(leaf: u32, subleaf: u32) -> [u32; 4] {
    match (leaf, subleaf) {
        (0, _) => [0x20, 0, 0, 0],
        (1, _) => [0, 0, 1 << 26, 0],
        (0xd, 0) => [0x400e_021f, 0x8000, 0x8000, 0],
        (0xd, 1) => [0x1f, 0, 1 << 11, 0],
        (0xd, 2) => [256, 2000, 0, 0],
        (0xd, 3) => [64, 700, 0, 0],
        (0xd, 4) => [64, 636, 0, 0],
        (0xd, 9) => [64, 5000, 2, 0],
        (0xd, 11) => [16, 0, 1, 0],
        (0xd, 17) => [64, 3001, 2, 0],
        (0xd, 18) => [16384, 5100, 6, 0],
        (0xd, 19) => [128, 800, 4, 0],
        (0xd, 30) => [1000, 928, 0, 0],
        (0x1d, 0) => [2, 0, 0, 0],
        (0x1d, 1) => [0x0400_2000, 0x0008_0040, 0x10, 0],
        (0x1d, 2) => [0x0400_4000, 0x0010_0080, 0x8, 0],
        _ => [0; 4],
    }
}

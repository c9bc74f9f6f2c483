//! CPUID of real processors and guests, which the tests of xsave-state have as well.

use std::sync::OnceLock;

use cpuid_amx::Table;
use xsave_state::{Component, ComponentId, Layout, LayoutError, Palette};

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
            .chain([strange().unwrap()])
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

fn strange() -> Result<Layout, LayoutError> {
    let id = |number| ComponentId::new(number).unwrap();
    Layout::from_parts(
        [
            Component::user(ComponentId::AVX, 2000, 256),
            Component::user(ComponentId::BNDREGS, 700, 64),
            Component::user(ComponentId::BNDCSR, 636, 64),
            Component::user(ComponentId::PKRU, 5000, 64).aligned(),
            Component::supervisor(ComponentId::CET_U, 16),
            Component::user(ComponentId::XTILECFG, 3001, 64).aligned(),
            Component::user(ComponentId::XTILEDATA, 5100, 16384).aligned(),
            Component::user(ComponentId::APX, 800, 128).with_xfd(),
            Component::user(id(30), 928, 1000),
        ],
        [
            Palette::ONE,
            Palette::from_leaf(2, [0x0400_4000, 0x0010_0080, 0x8, 0])?,
        ],
    )
}

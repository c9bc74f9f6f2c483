//! Contradictions: none in what real processors and guests report, and each one provoked.
#![allow(
    clippy::arithmetic_side_effects,
    clippy::cast_possible_truncation,
    clippy::indexing_slicing,
    clippy::unwrap_used
)]

use std::path::Path;

use cpuid_amx::{
    Amx, AmxFeatures, Contradiction, CpuidTable, Entry, FeatureSet, Policy, Table, TmulLimits,
    Unusable, coherence,
};
use xsave_state::PaletteError;
use xsave_state::{LayoutError, XFeatures};

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// The dumps that xsave-state has; each says where its numbers come from.
fn fixture(name: &str) -> Table {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../xsave-state/tests/fixtures/cpuid")
        .join(format!("{name}.txt"));
    std::fs::read_to_string(path).unwrap().parse().unwrap()
}

fn spr() -> Table {
    let table = fixture("sapphire-rapids");
    assert_eq!(coherence::check(&table), []);
    table
}

trait Change {
    fn with(self, leaf: u32, subleaf: u32, register: usize, value: u32) -> Self;
    fn without_bits(self, leaf: u32, subleaf: u32, register: usize, bits: u32) -> Self;
}

impl Change for Table {
    fn with(mut self, leaf: u32, subleaf: u32, register: usize, value: u32) -> Self {
        let mut registers = self.leaf(leaf, subleaf);
        registers[register] = value;
        self.set_leaf(leaf, subleaf, registers).unwrap();
        self
    }

    fn without_bits(self, leaf: u32, subleaf: u32, register: usize, bits: u32) -> Self {
        let value = self.leaf(leaf, subleaf)[register] & !bits;
        self.with(leaf, subleaf, register, value)
    }
}

fn user(bits: u64) -> XFeatures {
    XFeatures::from_bits_retain(bits)
}

fn spr_features() -> AmxFeatures {
    AmxFeatures::TILE | AmxFeatures::INT8 | AmxFeatures::BF16
}

/// 0DH without the two components of AMX and with the right sums, as KVM gives it without
/// permission.
fn without_components(table: Table) -> Table {
    table
        .with(0xd, 0, EAX, 0x2e7)
        .with(0xd, 0, EBX, 2696)
        .with(0xd, 0, ECX, 2696)
        .with(0xd, 1, EBX, 2440)
}

#[test]
fn real_processors_and_guests_are_coherent() {
    for name in [
        "alder-lake-client",
        "amd-zen4-genoa",
        "granite-rapids",
        "haswell-client",
        "ice-lake-server",
        "sapphire-rapids",
        "sapphire-rapids-emulated-guest",
        "sapphire-rapids-guest",
        "sapphire-rapids-guest-without-amx",
        "skylake-client",
    ] {
        assert_eq!(coherence::check(&fixture(name)), [], "{name}");
    }
}

#[test]
fn real_tables_that_are_not() {
    let table = fixture("emerald-rapids-vm-without-tile-leaves");
    let features = spr_features();
    let missing = |leaf| Contradiction::MaxLeaf {
        leaf,
        max_leaf: 0x1c,
        features,
    };
    assert_eq!(coherence::check(&table), [missing(0x1d), missing(0x1e)]);
    let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
    assert_eq!(amx.usable(), Err(Unusable::NoPalette { max_leaf: 0x1c }));

    assert_eq!(
        coherence::check(&fixture("emerald-rapids-kvm-supported")),
        [Contradiction::Xsave { user: user(0xe7) }]
    );
    // PKRU with 64 bytes, which the processor lists and cannot enable.
    assert_eq!(coherence::check(&fixture("amd-zen2-rome")), []);
}

#[test]
fn amx_of_real_processors() {
    for (name, features) in [
        ("sapphire-rapids", spr_features()),
        ("granite-rapids", spr_features() | AmxFeatures::FP16),
        ("sapphire-rapids-guest", spr_features()),
        ("sapphire-rapids-emulated-guest", spr_features()),
    ] {
        let table = fixture(name);
        let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        assert_eq!(amx.usable(), Ok(()), "{name}");
        assert_eq!(amx.features(), features, "{name}");
        assert_eq!(
            amx.tmul(),
            Some(TmulLimits { maxk: 16, maxn: 64 }),
            "{name}"
        );
        assert!(amx.has_xfd(), "{name}");
    }
    for name in ["ice-lake-server", "amd-zen4-genoa", "alder-lake-client"] {
        let table = fixture(name);
        let amx = Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        let features = AmxFeatures::empty();
        assert_eq!(amx.usable(), Err(Unusable::NoTile { features }), "{name}");
    }
}

#[test]
fn an_empty_table_and_a_processor_without_xsave_are_coherent() {
    assert_eq!(coherence::check(&Table::new()), []);
    let old = Table::new().with(0, 0, EAX, 2).with(1, 0, ECX, 0x0001_2345);
    assert_eq!(coherence::check(&old), []);
}

// Each contradiction, from a coherent table.

#[test]
fn xsave() {
    assert_eq!(
        coherence::check(&fixture("ice-lake-server").without_bits(1, 0, ECX, 1 << 26)),
        [Contradiction::Xsave { user: user(0x2e7) }]
    );
}

#[test]
fn group() {
    // Sizes stay right: what is left ends where all ended.
    let ice = || fixture("ice-lake-server");
    for missing in [5, 6, 7] {
        let present = (XFeatures::AVX512 | XFeatures::AVX) - user(1 << missing);
        let found = coherence::check(&ice().without_bits(0xd, 0, EAX, 1 << missing));
        assert!(
            found.contains(&Contradiction::Group {
                present,
                required: XFeatures::AVX512 | XFeatures::AVX
            }),
            "{found:?}"
        );
    }
    let found = coherence::check(&ice().without_bits(0xd, 0, EAX, 1 << 2));
    assert!(found.contains(&Contradiction::Group {
        present: XFeatures::AVX512,
        required: XFeatures::AVX512 | XFeatures::AVX
    }));
    for missing in [3, 4] {
        let found =
            coherence::check(&fixture("skylake-client").without_bits(0xd, 0, EAX, 1 << missing));
        assert!(found.contains(&Contradiction::Group {
            present: XFeatures::MPX - user(1 << missing),
            required: XFeatures::MPX
        }));
    }
}

#[test]
fn supervisor_without_xsaves() {
    let table = fixture("ice-lake-server").without_bits(0xd, 1, EAX, 1 << 3);
    let supervisor = Contradiction::SupervisorWithoutXsaves {
        supervisor: XFeatures::PT,
    };
    // Its EBX counts PT, which only IA32_XSS enables.
    assert_eq!(
        coherence::check(&table),
        [
            supervisor,
            Contradiction::CompactedSize {
                reported_bytes: 2560,
                all_bytes: 2440
            }
        ]
    );
    assert_eq!(
        coherence::check(&table.with(0xd, 1, EBX, 2432)),
        [supervisor]
    );
}

#[test]
fn layout() {
    assert_eq!(
        coherence::check(&spr().with(0xd, 0, ECX, 11007)),
        [Contradiction::Layout(LayoutError::AreaTooSmall {
            reported_bytes: 11007,
            required_bytes: 11008
        })]
    );
    let found = coherence::check(&spr().with(0, 0, EAX, 0xc));
    assert_eq!(
        found[0],
        Contradiction::XsaveWithoutComponents { max_leaf: 0xc }
    );
    // XSAVE without 0DH.
    let none = Table::new().with(0, 0, EAX, 0x10).with(1, 0, ECX, 1 << 26);
    assert_eq!(
        coherence::check(&none),
        [Contradiction::XsaveWithoutComponents { max_leaf: 0x10 }]
    );
}

#[test]
fn a_palette_that_cannot_exist_is_said_once() {
    let error = PaletteError::TileBytes {
        palette: 1,
        reported_bytes: 1024,
        row_bytes: 64,
        rows: 17,
    };
    let table = spr().with(0x1d, 1, ECX, 17);
    let expected = Contradiction::Layout(LayoutError::Palette(error));
    assert_eq!(coherence::check(&table), [expected]);
    // The layout does not look at 1DH without XTILECFG.
    let found = coherence::check(&without_components(table));
    assert_eq!(found.iter().filter(|&&c| c == expected).count(), 1);
}

#[test]
fn area_size() {
    assert_eq!(
        coherence::check(&spr().with(0xd, 0, ECX, 11009)),
        [Contradiction::AreaSize {
            reported_bytes: 11009,
            computed_bytes: 11008
        }]
    );
    // AMX hidden in 0DH.0:EAX, and ECX left as it was.
    let hidden = fixture("sapphire-rapids-guest-without-amx").with(0xd, 0, ECX, 11008);
    assert_eq!(
        coherence::check(&hidden),
        [Contradiction::AreaSize {
            reported_bytes: 11008,
            computed_bytes: 2696
        }]
    );
}

#[test]
fn enabled_size() {
    // Every size that a legal XCR0 makes: x87, AVX, AVX-512, PKRU, AMX.
    for possible in [576, 832, 2688, 2696, 11008] {
        assert_eq!(coherence::check(&spr().with(0xd, 0, EBX, possible)), []);
    }
    // Ends of components that XCR0 never enables as the last: opmask, ZMM_Hi256, XTILECFG.
    for impossible in [0, 575, 577, 1152, 1664, 2816, 11007, 11009, u32::MAX] {
        assert_eq!(
            coherence::check(&spr().with(0xd, 0, EBX, impossible)),
            [Contradiction::EnabledSize {
                reported_bytes: impossible as usize,
                all_bytes: 11008
            }]
        );
    }
    for possible in [576, 832, 1088] {
        let table = fixture("skylake-client").with(0xd, 0, EBX, possible);
        assert_eq!(coherence::check(&table), []);
    }
    let table = fixture("skylake-client").with(0xd, 0, EBX, 1024);
    assert_eq!(
        coherence::check(&table),
        [Contradiction::EnabledSize {
            reported_bytes: 1024,
            all_bytes: 1088
        }]
    );
}

#[test]
fn compacted_size() {
    // x87; AVX; AVX-512; with PKRU; AMX alone; AVX and AMX; all user; with PT; all.
    let possible = [576, 832, 2432, 2440, 8832, 9088, 10752, 10880, 11776];
    for possible in possible {
        assert_eq!(coherence::check(&spr().with(0xd, 1, EBX, possible)), []);
    }
    for impossible in [0, 577, 11775, 11777, 0x1_0001, u32::MAX] {
        assert_eq!(
            coherence::check(&spr().with(0xd, 1, EBX, impossible)),
            [Contradiction::CompactedSize {
                reported_bytes: impossible as usize,
                all_bytes: 11776
            }]
        );
    }
    // Without supervisor components there are fewer sums: not opmask without the rest of AVX-512,
    // AVX-512 without AVX, XTILECFG alone, PKRU twice.
    let guest = || fixture("sapphire-rapids-emulated-guest");
    for possible in [576, 584, 832, 840, 8832] {
        assert_eq!(coherence::check(&guest().with(0xd, 1, EBX, possible)), []);
    }
    for impossible in [592, 640, 896, 2176, 2184, 10753] {
        assert_eq!(
            coherence::check(&guest().with(0xd, 1, EBX, impossible)),
            [Contradiction::CompactedSize {
                reported_bytes: impossible as usize,
                all_bytes: 10752
            }]
        );
    }
    // Without XSAVES there is no IA32_XSS: PT does not count.
    let table = fixture("ice-lake-server")
        .without_bits(0xd, 1, EAX, 1 << 3)
        .with(0xd, 1, ECX, 0);
    assert_eq!(
        coherence::check(&table),
        [Contradiction::CompactedSize {
            reported_bytes: 2560,
            all_bytes: 2440
        }]
    );
    // Without XSAVEC and XSAVES there is no compacted format.
    let table = fixture("haswell-client").with(0xd, 1, EBX, 832);
    assert_eq!(
        coherence::check(&table),
        [Contradiction::CompactedSize {
            reported_bytes: 832,
            all_bytes: 0
        }]
    );
}

#[test]
fn kvm_writes_only_the_enabled_sizes() {
    let recomputed = |table: Table| {
        let found = coherence::check(&table);
        assert_eq!(found.len(), 1);
        found[0].is_recomputed_by_kvm()
    };
    assert!(recomputed(spr().with(0xd, 0, EBX, 1)));
    assert!(recomputed(spr().with(0xd, 1, EBX, 1)));
    assert!(!recomputed(spr().with(0xd, 0, ECX, 11009)));
    assert!(!recomputed(
        fixture("haswell-client").with(0xd, 1, EBX, 832)
    ));
}

#[test]
fn features_without_tile() {
    let table = fixture("ice-lake-server");
    for (leaf, subleaf, register, bit, feature) in [
        (7, 0, EDX, 22, AmxFeatures::BF16),
        (7, 0, EDX, 25, AmxFeatures::INT8),
        (7, 1, EAX, 21, AmxFeatures::FP16),
        (7, 1, EDX, 8, AmxFeatures::COMPLEX),
    ] {
        let value = table.leaf(leaf, subleaf)[register] | 1 << bit;
        let mut table = table.clone().with(leaf, subleaf, register, value);
        if subleaf == 1 {
            table = table.with(7, 0, EAX, 1);
        }
        let found = coherence::check(&table);
        assert!(found.contains(&Contradiction::FeaturesWithoutTile { features: feature }));
    }
    let table = spr()
        .without_bits(7, 0, EDX, 1 << 24 | 1 << 22 | 1 << 25)
        .with(0x1e, 0, EAX, 1)
        .with(0x1e, 1, EAX, 1 << 8);
    assert!(
        coherence::check(&table).contains(&Contradiction::FeaturesWithoutTile {
            features: AmxFeatures::MOVRS
        })
    );
}

#[test]
fn hidden_in_leaf_7_only() {
    let table = spr().without_bits(7, 0, EDX, 1 << 24 | 1 << 22 | 1 << 25);
    assert_eq!(
        coherence::check(&table),
        [
            Contradiction::ComponentsWithoutTile {
                user: user(0x602e7)
            },
            Contradiction::PalettesWithoutTile { max_palette: 1 },
            Contradiction::TmulWithoutTile {
                limits: TmulLimits { maxk: 16, maxn: 64 }
            },
        ]
    );
}

#[test]
fn before_permission() {
    assert_eq!(
        coherence::check(&without_components(spr())),
        [Contradiction::BeforePermission {
            features: spr_features(),
            user: user(0x2e7)
        }]
    );
    // Linux before 6.4 leaves XTILECFG there.
    let old = without_components(spr())
        .with(0xd, 0, EAX, 0x202e7)
        .with(0xd, 0, EBX, 2816)
        .with(0xd, 0, ECX, 2816);
    let found = coherence::check(&old);
    let user = user(0x202e7);
    let features = spr_features();
    assert!(found.contains(&Contradiction::BeforePermission { features, user }));
    assert!(!found.contains(&Contradiction::TileDataMissing { user }));
    // Its EBX counts XTILECFG, which XCR0 cannot enable alone.
    assert!(found.contains(&Contradiction::EnabledSize {
        reported_bytes: 2816,
        all_bytes: 2816
    }));
}

#[test]
fn components_missing() {
    assert_eq!(
        coherence::check(&without_components(spr()).without_bits(0xd, 1, EAX, 1 << 4)),
        [Contradiction::ComponentsMissing {
            features: spr_features(),
            user: user(0x2e7)
        }]
    );
}

#[test]
fn one_component_of_two() {
    let config_only = spr()
        .without_bits(0xd, 0, EAX, 1 << 18)
        .without_bits(0xd, 1, EAX, 1 << 4)
        .with(0xd, 0, EBX, 2696)
        .with(0xd, 0, ECX, 2816)
        .with(0xd, 1, EBX, 2440);
    assert_eq!(
        coherence::check(&config_only),
        [Contradiction::TileDataMissing {
            user: user(0x202e7)
        }]
    );
    // XCR0 never enables the one alone: no size counts it.
    let guest = fixture("sapphire-rapids-emulated-guest")
        .without_bits(0xd, 0, EAX, 1 << 18)
        .with(0xd, 1, EBX, 2496 + 64);
    assert!(
        coherence::check(&guest).contains(&Contradiction::CompactedSize {
            reported_bytes: 2560,
            all_bytes: 2560
        })
    );
    let data_only = spr()
        .without_bits(0xd, 0, EAX, 1 << 17)
        .with(0xd, 0, EBX, 2696)
        .with(0xd, 1, EBX, 2440);
    assert_eq!(
        coherence::check(&data_only),
        [Contradiction::TileConfigMissing {
            user: user(0x402e7)
        }]
    );
}

#[test]
fn without_avx512() {
    let with_rows = spr().with(0x1e, 0, EAX, 1).with(0x1e, 1, EAX, 0b1000_0011);
    assert_eq!(coherence::check(&with_rows), []);
    // AVX-512 hidden in 0DH and leaf 7, with the right sums.
    let hidden = Policy::features(
        &FeatureSet::from_cpuid(|leaf, subleaf| spr().leaf(leaf, subleaf))
            .without_components(XFeatures::AVX512)
            .closed(),
    );
    let mut without = spr();
    hidden.apply(&mut without).unwrap();
    let without = without
        .with(0x1e, 0, EAX, 1)
        .with(0x1e, 1, EAX, 0b1000_0011);
    assert_eq!(
        coherence::check(&without),
        [Contradiction::WithoutAvx512 {
            user: user(0x60207)
        }]
    );
}

#[test]
fn xfd() {
    for (xfd, component) in [(false, true), (true, false), (false, false)] {
        let mut table = spr();
        if !xfd {
            table = table.without_bits(0xd, 1, EAX, 1 << 4);
        }
        if !component {
            table = table.without_bits(0xd, 18, ECX, 1 << 2);
        }
        assert_eq!(
            coherence::check(&table),
            [Contradiction::Xfd { xfd, component }]
        );
    }
}

#[test]
fn max_leaf() {
    let features = spr_features();
    let too_high = |max_leaf: u32| {
        let found = coherence::check(&spr().with(0, 0, EAX, max_leaf));
        let mut leaves = vec![];
        for contradiction in found {
            match contradiction {
                Contradiction::MaxLeaf {
                    leaf,
                    max_leaf: named,
                    features: of,
                } => {
                    assert_eq!((named, of), (max_leaf, features));
                    leaves.push(leaf);
                }
                Contradiction::XsaveWithoutComponents { .. } => {
                    assert!(max_leaf < 0xd);
                }
                // Nothing is there that needs a component.
                Contradiction::Dependents { .. } => assert!(max_leaf < 0xd),
                other => panic!("{other}"),
            }
        }
        leaves
    };
    assert_eq!(too_high(0x1e), []);
    assert_eq!(too_high(0x1d), [0x1e]);
    assert_eq!(too_high(0x1c), [0x1d, 0x1e]);
    assert_eq!(too_high(6), [7, 0x1d, 0x1e]);
}

#[test]
fn max_subleaf() {
    assert_eq!(
        coherence::check(&fixture("granite-rapids").with(7, 0, EAX, 0)),
        [Contradiction::MaxSubleaf {
            leaf: 7,
            max_subleaf: 0,
            features: AmxFeatures::FP16
        }]
    );
    assert_eq!(
        coherence::check(&spr().with(0x1e, 1, EAX, 1 << 4)),
        [Contradiction::MaxSubleaf {
            leaf: 0x1e,
            max_subleaf: 0,
            features: AmxFeatures::FP8
        }]
    );
}

#[test]
fn no_palette_and_no_tmul() {
    let features = spr_features();
    assert_eq!(
        coherence::check(&spr().with(0x1d, 0, EAX, 0)),
        [Contradiction::NoPalette { features }]
    );
    for ebx in [0, 0x10, 0x4000] {
        assert_eq!(
            coherence::check(&spr().with(0x1e, 0, EBX, ebx)),
            [Contradiction::NoTmul { features }]
        );
    }
    // Tiles that nothing multiplies need no limits.
    let tile_only = spr()
        .without_bits(7, 0, EDX, 1 << 22 | 1 << 25)
        .with(0x1e, 0, EBX, 0);
    assert_eq!(coherence::check(&tile_only), []);
}

#[test]
fn palette_size() {
    // Seven tiles in a component for eight.
    let seven = spr()
        .with(0x1d, 1, EAX, 0x0400_1c00)
        .with(0x1d, 1, EBX, 0x0007_0040);
    assert_eq!(
        coherence::check(&seven.clone()),
        [Contradiction::PaletteSize {
            palette_bytes: 7168,
            component_bytes: 8192
        }]
    );
    // Without component 18 there is nothing to compare with.
    assert!(matches!(
        coherence::check(&without_components(seven))[..],
        [Contradiction::BeforePermission { .. }]
    ));
    // A second palette may be smaller.
    let mut two = spr().with(0x1d, 0, EAX, 2);
    two.set_leaf(0x1d, 2, [0x0400_1c00, 0x0007_0040, 0x10, 0])
        .unwrap();
    assert_eq!(coherence::check(&two), []);
}

#[test]
fn tmul_beyond_tiles() {
    for (ebx, maxk, maxn) in [(0x4011, 17, 64), (0x4110, 16, 65)] {
        assert_eq!(
            coherence::check(&spr().with(0x1e, 0, EBX, ebx)),
            [Contradiction::TmulBeyondTiles {
                limits: TmulLimits { maxk, maxn },
                rows: 16,
                row_bytes: 64
            }]
        );
    }
    assert_eq!(coherence::check(&spr().with(0x1e, 0, EBX, 0x2008)), []);
}

#[test]
fn aliases() {
    let with_1e_1 = |eax| spr().with(0x1e, 0, EAX, 1).with(0x1e, 1, EAX, eax);
    // What leaf 7 does not have at all may differ.
    assert_eq!(coherence::check(&with_1e_1(0x1f3)), []);
    for (eax, leaf_1e) in [
        (0x1f2, AmxFeatures::BF16),
        (0x7, spr_features() | AmxFeatures::COMPLEX),
    ] {
        assert_eq!(
            coherence::check(&with_1e_1(eax)),
            [Contradiction::Aliases {
                leaf_7: AmxFeatures::INT8 | AmxFeatures::BF16,
                leaf_1e: leaf_1e - AmxFeatures::TILE
            }]
        );
    }
}

#[test]
fn duplicate() {
    let mut list: Vec<Entry> = spr().entries().collect();
    let again = *list.iter().find(|e| e.leaf == 0x1e).unwrap();
    // The same twice is harmless.
    list.push(again);
    assert_eq!(coherence::check(&list), []);
    list.push(Entry {
        value: [9; 4],
        ..again
    });
    assert_eq!(
        coherence::check(&list),
        [Contradiction::Duplicate {
            leaf: 0x1e,
            subleaf: 0,
            first: again.value,
            second: [9; 4]
        }]
    );
}

/// Linux 6.1 fills the table of KVM_GET_CPUID2 up with zeros for leaf 0.
#[test]
fn a_place_is_named_once() {
    let mut entries: Vec<Entry> = spr().entries().collect();
    let zeros = Entry {
        leaf: 0,
        subleaf: None,
        value: [0; 4],
    };
    entries.extend([zeros; 200]);
    assert!(matches!(
        coherence::check(&entries)[..],
        [Contradiction::Duplicate { leaf: 0, .. }]
    ));
}

#[test]
fn every_contradiction_says_both_values() {
    let text = coherence::check(&without_components(spr()))[0].to_string();
    assert_eq!(
        text,
        "CPUID.7 has AMX-TILE, AMX-INT8, AMX-BF16 and CPUID.0DH.1 has XFD, but CPUID.0DH.0 has \
         x87 | SSE | AVX | opmask | ZMM_Hi256 | Hi16_ZMM | PKRU (0x2e7) without XTILEDATA: this \
         CPUID was read before the permission; ask KVM again after ARCH_REQ_XCOMP_GUEST_PERM"
    );
    let text = coherence::check(&spr().without_bits(0xd, 1, EAX, 1 << 4))[0].to_string();
    assert_eq!(
        text,
        "CPUID.0DH.0 has XTILEDATA, but XFD (CPUID.0DH.1:EAX[4]) is 0, and CPUID.0DH.18:ECX[2] is 1"
    );
    let text = coherence::check(&fixture("granite-rapids").with(7, 0, EAX, 0))[0].to_string();
    assert_eq!(
        text,
        "CPUID.7H.1 has AMX-FP16, but the highest sub-leaf is 0"
    );
}

/// Values that no processor has, in every register that is read, one and two at a time: no panic,
/// and it ends soon.
#[test]
fn hostile_tables_end_without_panic() {
    let values = [0, 1, 0xffff, 0x1_0000, 0x8000_0000, u32::MAX];
    let places = [
        (0, 0),
        (1, 0),
        (7, 0),
        (7, 1),
        (0xd, 0),
        (0xd, 1),
        (0xd, 2),
        (0xd, 9),
        (0xd, 15),
        (0xd, 17),
        (0xd, 18),
        (0x1d, 0),
        (0x1d, 1),
        (0x1e, 0),
        (0x1e, 1),
    ];
    let mut contradictory = 0;
    for (index, &(leaf, subleaf)) in places.iter().enumerate() {
        for register in 0..4 {
            for value in values {
                let first = spr().with(leaf, subleaf, register, value);
                contradictory += usize::from(!coherence::check(&first).is_empty());
                let (leaf, subleaf) = places[(index * 7 + register + 1) % places.len()];
                let second = first.with(leaf, subleaf, register, !value);
                contradictory += usize::from(!coherence::check(&second).is_empty());
            }
        }
    }
    assert!(contradictory > 100);
}

/// 42 supervisor components whose sums are nearly all numbers up to 32 KiB: the sizes that are
/// possible are bounded by the largest area, not by the number of combinations (2^42).
#[test]
fn a_table_with_the_most_sizes_is_decided() {
    // Without shadow stacks and IBT, which need components of their own.
    let mut most = spr()
        .without_bits(7, 0, ECX, 1 << 7)
        .without_bits(7, 0, EDX, 1 << 20);
    let supervisor: u64 = (20..62).fold(0, |all, bit| all | 1 << bit);
    let [eax, ..] = most.leaf(0xd, 1);
    for number in 20..62u32 {
        let size = 1u32.checked_shl(number - 20).unwrap_or(1).clamp(1, 0x4000);
        let size = if number < 35 { size } else { 1 };
        most.set_leaf(0xd, number, [size, 0, 1, 0]).unwrap();
    }
    // 576 bytes, then components 20 and 21; and what no choice of components makes.
    for (reported, possible) in [(579, true), (0x1_0000, false), (u32::MAX, false)] {
        let list = [supervisor as u32, (supervisor >> 32) as u32];
        most.set_leaf(0xd, 1, [eax, reported, list[0], list[1]])
            .unwrap();
        let contradictions = coherence::check(&most);
        assert_eq!(contradictions.is_empty(), possible, "{contradictions:?}");
    }
}

/// Each register whose features lack their component is named, with the features.
#[test]
fn features_whose_components_are_gone() {
    let texts = |table: &Table| -> Vec<String> {
        let found = coherence::check(table).into_iter();
        found
            .filter(|found| matches!(found, Contradiction::Dependents { .. }))
            .map(|found| found.to_string())
            .collect()
    };
    assert_eq!(texts(&spr()), [""; 0]);
    for (components, features) in [
        (
            XFeatures::AVX,
            [
                "AVX",
                "FMA",
                "F16C",
                "AVX2",
                "VAES",
                "VPCLMULQDQ",
                "AVX512F",
            ]
            .as_slice(),
        ),
        (
            XFeatures::AVX512,
            &[
                "AVX512F",
                "AVX512DQ",
                "AVX512_VBMI",
                "AVX512_VNNI",
                "AVX512-FP16",
                "AVX512_BF16",
            ],
        ),
        (XFeatures::PKRU, &["PKU"]),
        (XFeatures::CET_U, &["SHSTK", "IBT"]),
    ] {
        let mut table = spr();
        for (subleaf, low) in [(0, EAX), (1, ECX)] {
            let bits = table.leaf(0xd, subleaf)[low] & !(components.bits() as u32);
            table = table.with(0xd, subleaf, low, bits);
        }
        let all = texts(&table).join("; ");
        for name in features {
            assert!(all.contains(name), "{name}: {all}");
        }
    }
    // APX, AVX10 and MPX.
    let later = spr()
        .with(0, 0, EAX, 0x24)
        .with(7, 1, EDX, 1 << 19 | 1 << 21)
        .with(0x24, 0, EBX, 0x7_0002);
    let all = texts(&later).join("; ");
    assert!(all.contains("APX_F") && !all.contains("AVX10"), "{all}");
    let no_avx512 = later.with(0xd, 0, EAX, 0x60207);
    let all = texts(&no_avx512).join("; ");
    assert!(
        all.contains("AVX10") && all.contains("CPUID.24H.0:EBX"),
        "{all}"
    );
}

/// An entry without the sub-leaf flag answers for all: before others it hides them.
#[test]
fn entries_without_the_subleaf_flag() {
    let list: Vec<Entry> = spr().entries().collect();
    let zeros = Entry {
        leaf: 0x1d,
        subleaf: None,
        value: [0; 4],
    };
    let unflagged = |leaf, entries, hidden| Contradiction::Unflagged {
        leaf,
        entries,
        hidden,
    };
    // Behind the others zeros say nothing.
    let behind = [&list[..], &[zeros]].concat();
    assert_eq!(coherence::check(&behind), []);
    let before = [&[zeros], &list[..]].concat();
    assert_eq!(coherence::check(&before)[0], unflagged(0x1d, 3, 2));
    // Something for the sub-leaves that nobody has described.
    let more = Entry {
        value: [1, 2, 3, 4],
        ..zeros
    };
    let behind = [&list[..], &[more]].concat();
    assert!(coherence::check(&behind).contains(&unflagged(0x1d, 3, 0)));
    // All flags missing: the first answers.
    let mut none = list.clone();
    for entry in none.iter_mut().filter(|entry| entry.leaf == 0xd) {
        entry.subleaf = None;
    }
    let count = none.iter().filter(|entry| entry.leaf == 0xd).count();
    let found = coherence::check(&none);
    assert_eq!(found[0], unflagged(0xd, count, count - 1));
    assert!(
        !found
            .iter()
            .any(|found| matches!(found, Contradiction::Duplicate { .. }))
    );
    // A policy makes the entries that can be seen whole.
    for mut table in [before, behind, none] {
        Policy::expose_all().apply(&mut table).unwrap();
        assert_eq!(coherence::check(&table), []);
    }
}

/// KVM before it knew sub-leaf 1 of 1EH, on a processor that has it: leaf 7 counts.
#[test]
fn a_subleaf_of_zeros_is_not_there() {
    let older_kvm = spr().with(0x1e, 0, EAX, 1);
    assert_eq!(coherence::check(&older_kvm), []);
    let features = AmxFeatures::from_cpuid(|leaf, subleaf| older_kvm.leaf(leaf, subleaf));
    assert_eq!(features, spr_features());
    let mut table = older_kvm;
    Policy::expose_all().apply(&mut table).unwrap();
    assert_eq!(table, spr());
}

/// A table with many entries is checked and changed in a time that its length bounds. What is quadratic
/// takes minutes for so many.
#[test]
fn long_tables_end() {
    let mut list: Vec<Entry> = spr().entries().collect();
    for leaf in [0x1d, 0x40] {
        list.extend((0..200_000).map(|n| Entry {
            leaf,
            subleaf: (n % 3 != 0).then_some(n / 2),
            value: [n, 0, 0, 0],
        }));
    }
    assert!(coherence::check(&list).len() > 60_000);
    Policy::hide_amx().apply(&mut list).unwrap();
    assert_eq!(list.leaf(0x1d, 0), [0; 4]);
}

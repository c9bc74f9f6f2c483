//! The CPUID of a guest: what it sees, and the list that it is from.

use cpuid_amx::coherence::{self, Contradiction};
use cpuid_amx::{CpuidTable, Entry, Table};
use xsave_state::{Layout, LayoutError};

/// The CPUID of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cpuid {
    /// All entries in the order in which its VMM passes them to KVM. Of several that answer for the same
    /// sub-leaf the guest sees the first.
    pub entries: Vec<Entry>,
    /// What the guest sees.
    pub table: Table,
}

impl From<Vec<Entry>> for Cpuid {
    fn from(entries: Vec<Entry>) -> Self {
        let table = entries.iter().copied().collect();
        Self { entries, table }
    }
}

impl From<Table> for Cpuid {
    fn from(table: Table) -> Self {
        Self {
            entries: table.entries().collect(),
            table,
        }
    }
}

impl Cpuid {
    pub(crate) fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::from_cpuid(|leaf, subleaf| self.table.leaf(leaf, subleaf))
    }

    /// Returns the contradictions that come from the form of the list: entries that hide others.
    pub fn hidden_entries(&self) -> impl Iterator<Item = Contradiction> {
        use Contradiction::{Duplicate, Unflagged};
        let all = coherence::check(&self.entries).into_iter();
        all.filter(|one| matches!(one, Unflagged { .. } | Duplicate { .. }))
    }

    /// Whether the guest has XSAVE: the feature, and components.
    pub(crate) fn has_xsave(&self) -> bool {
        let [max_leaf, ..] = self.table.leaf(0, 0);
        let [_, _, features, _] = self.table.leaf(1, 0);
        let [low, _, _, high] = self.table.leaf(0xd, 0);
        max_leaf >= 0xd && features & 1 << 26 != 0 && (low, high) != (0, 0)
    }
}

//! What a guest may see that is to run on several hosts: of its CPUID, what all of them have.

use cpuid_amx::coherence::{self, Contradiction};
use cpuid_amx::features::FeatureSet;
use cpuid_amx::{CpuidTable, Policy, PolicyError, TableFull};
use thiserror::Error;

use crate::host::Host;
use crate::registers;

/// Takes out of `table` what some of `hosts` lacks, and what cannot be used without it. What is left is
/// coherent, and a guest that starts with it runs on each of them. Hosts without KVM have no guests, and
/// do not count.
///
/// # Errors
///
/// The table has no room, or would contradict itself; it may have changed then.
///
/// ```
/// use cpuid_amx::{CpuidTable, Policy, Table};
/// use host_compat::{Guest, Host, Verdict, compat, restrict};
///
/// let table: Table = cpuid_amx::dump::EXAMPLE.parse()?;
/// let mut older = table.clone();
/// Policy::hide_amx().apply(&mut older)?;
/// let older = Host::from_cpuid("older", older);
///
/// let mut guest = table.clone();
/// restrict(&mut guest, std::slice::from_ref(&older))?;
/// assert_eq!(guest.leaf(0xd, 0)[0], 0x2e7);
/// assert_eq!(compat::check(Guest::new(&guest), &older).verdict(), Verdict::Runs);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn restrict(table: &mut impl CpuidTable, hosts: &[Host]) -> Result<(), RestrictError> {
    let mut shared = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).closed();
    for host in hosts.iter().filter(|host| host.kvm.is_ok()) {
        let has_1eh_1 = shared.has_1eh_1;
        shared = shared.intersection(&host.guest_features());
        // It repeats what leaf 7 says: a guest with it runs where there is none.
        shared.has_1eh_1 = has_1eh_1;
        shared = shared.closed();
    }
    let _ = Policy::features(&shared).apply(table)?;
    for other in hosts.iter().filter_map(Host::coherent_cpuid) {
        registers::restrict(table, &other)?;
    }
    // XSAVE and the features that components need are among the registers.
    let _ = Policy::expose_all().apply(table)?;
    let mut contradictions = coherence::check(table);
    contradictions.retain(|contradiction| !contradiction.is_recomputed_by_kvm());
    if contradictions.is_empty() {
        Ok(())
    } else {
        Err(RestrictError::NotWhole(contradictions))
    }
}

/// What is left is not what a guest can have.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum RestrictError {
    /// A policy cannot make it.
    #[error("{0}")]
    Policy(PolicyError),
    /// The table has no room.
    #[error("{0}")]
    Full(TableFull),
    /// It contradicts itself.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    NotWhole(Vec<Contradiction>),
}

impl From<PolicyError> for RestrictError {
    fn from(error: PolicyError) -> Self {
        Self::Policy(error)
    }
}

impl From<TableFull> for RestrictError {
    fn from(error: TableFull) -> Self {
        Self::Full(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use cpuid_amx::Table;

    /// No feature bit tells them apart.
    #[test]
    fn components_that_are_elsewhere_on_one_host_are_not_shared() {
        let table: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
        let mut moved = table.clone();
        let [size, _, flags, _] = table.leaf(0xd, 18);
        moved.set_leaf(0xd, 18, [size, 4096, flags, 0]).unwrap();
        let [user, ebx, _, high] = table.leaf(0xd, 0);
        moved
            .set_leaf(0xd, 0, [user, ebx, 4096 + size, high])
            .unwrap();
        let other = Host::from_cpuid("moved", moved);

        let mut guest = table.clone();
        restrict(&mut guest, std::slice::from_ref(&other)).unwrap();
        assert_eq!(user & 0x60000, 0x60000);
        assert_eq!(guest.leaf(0xd, 0)[0] & 0x60000, 0);
    }
}

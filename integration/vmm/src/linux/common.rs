//! What a guest sees that may go on on other hosts: of this host's CPUID, what the others have as well.

use cpuid_amx::{CpuidTable, FeatureSet, Policy};
use host_compat::Host;

use super::LinuxError;
use crate::features;

/// Takes out of `table` what `others` lack.
pub(super) fn restrict<T: CpuidTable>(table: &mut T, others: &[Host]) -> Result<(), LinuxError> {
    let mut shared = FeatureSet::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf)).closed();
    for other in others {
        shared = shared.intersection(&other.guest_features()).closed();
    }
    let _ = Policy::features(&shared).apply(table)?;
    for other in others {
        let Some(other) = other.guest_cpuid() else {
            continue;
        };
        features::restrict(table, other)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::slice;

    use cpuid_amx::{Amx, Table};

    use super::*;

    #[test]
    fn amx_goes_where_one_host_lacks_it() {
        let mut table: Table = cpuid_amx::dump::EXAMPLE.parse().unwrap();
        let amx = |table: &Table| Amx::from_cpuid(|leaf, subleaf| table.leaf(leaf, subleaf));
        let other = |table: &Table| Host::from_cpuid("other", table.clone());
        let like_this = other(&table);
        let mut without = table.clone();
        let _ = Policy::hide_amx().apply(&mut without).unwrap();
        let without = other(&without);

        restrict(&mut table, slice::from_ref(&like_this)).unwrap();
        assert_eq!(amx(&table).usable(), Ok(()));
        restrict(&mut table, &[like_this, without]).unwrap();
        assert!(amx(&table).usable().is_err());
        assert_eq!(table.leaf(0x1d, 0), [0; 4]);
    }
}

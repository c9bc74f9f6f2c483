//! Puts an untrusted area into a vCPU, for VMMs with a snapshot format of their own.

use thiserror::Error;

use super::buffer::XsaveBuffer;
use super::restore::{RestoreError, VcpuAfter, restore};
use super::vcpu::Vcpu;
use super::vcpu_layout::VcpuLayout;
use crate::fit::Losses;
use crate::sanitize::{Report, SanitizeError, UntrustedArea, sanitize};

/// Makes an untrusted area safe and puts it into a vCPU that has its CPUID and is not running:
/// [`sanitize`] and [`restore`] in one call. Returns what was changed.
///
/// The area has the layout of the vCPU's CPUID, which is the guest's own. Call it after the VMM's own
/// KVM_SET_MSRS. Entries for IA32_XFD and IA32_XFD_ERR in that list do no harm to a vCPU that has not
/// run: it has no tiles in use yet, and this call sets both registers.
///
/// # Errors
///
/// The area is refused and the vCPU unchanged, or the restore failed: [`LoadError::vcpu`].
pub fn load(
    vcpu: &mut impl Vcpu,
    area: &UntrustedArea<'_>,
    layout: &VcpuLayout,
    allowed: Losses,
    buffer: &mut XsaveBuffer,
) -> Result<Report, LoadError> {
    let sanitized = sanitize(area, layout.layout(), allowed)?;
    restore(vcpu, &sanitized.state, layout, buffer)?;
    Ok(sanitized.report)
}

/// Errors from putting an untrusted area into a vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// The area cannot be made safe without a loss that is not allowed.
    #[error(transparent)]
    Refused(#[from] SanitizeError),
    /// The restore failed.
    #[error(transparent)]
    Restore(#[from] RestoreError),
}

impl LoadError {
    /// Returns the fate of the vCPU.
    #[must_use]
    pub const fn vcpu(&self) -> VcpuAfter {
        match self {
            Self::Refused(_) => VcpuAfter::Unchanged,
            Self::Restore(error) => error.vcpu(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::feature::XFeatures;
    use crate::kvm::simulated::{SimulatedVcpu, amx_area, amx_buffer, amx_layout, amx_vcpu_layout};
    use crate::registers::Registers;

    fn load_into(
        vcpu: &mut SimulatedVcpu,
        area: &[u8],
        xfd: XFeatures,
        allowed: Losses,
    ) -> Result<Report, LoadError> {
        let registers = Registers::RESET
            .with_xcr0(amx_layout().user())
            .with_xfd(xfd);
        let area = UntrustedArea::new(area, registers);
        load(vcpu, &area, &amx_vcpu_layout(), allowed, &mut amx_buffer())
    }

    #[test]
    fn an_area_that_would_kill_the_host_is_refused_or_made_safe() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0));
        let (area, xfd) = (amx_area(0x602e7), XFeatures::XTILEDATA);
        let error = load_into(&mut vcpu, &area, xfd, Losses::empty()).unwrap_err();
        assert_eq!(error.vcpu(), VcpuAfter::Unchanged);
        assert!(vcpu.log.is_empty(), "{error}");

        let report = load_into(&mut vcpu, &area, xfd, Losses::DISABLED).unwrap();
        assert_eq!(report.lost().count(), 1);
        assert_eq!((vcpu.xstate_bv(), vcpu.dangers), (0x202e7, 0));
    }

    #[test]
    fn an_area_that_is_cut_is_refused() {
        let mut vcpu = SimulatedVcpu::new(&amx_area(0));
        let area = &amx_area(0x602e7)[..4096];
        let error = load_into(&mut vcpu, area, XFeatures::empty(), Losses::all()).unwrap_err();
        assert_eq!(
            error.to_string(),
            "XTILEDATA is in use and ends at byte 11008; the area has 4096"
        );
        assert!(vcpu.log.is_empty());
    }
}

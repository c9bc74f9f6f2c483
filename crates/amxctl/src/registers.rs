//! The registers of a vCPU as its file lists them, and what a restore from the file makes of them.

use xsave_state::registers::{MSR_IA32_XFD, MSR_IA32_XFD_ERR};
use xsave_state::{Layout, Registers, RegistersError, XFeatures};

use crate::bytes;
use crate::finding::{Finding, Rule};
use crate::known::{Given, Known, Source};

/// IA32_XSS, the supervisor components that the guest has enabled.
pub const MSR_IA32_XSS: u32 = 0xda0;
/// KVM_MAX_XCRS (arch/x86/include/uapi/asm/kvm.h).
const MAX_XCRS: u64 = 16;

/// What a VMM passes to KVM_SET_XCRS.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Xcrs {
    /// `nr_xcrs`, the number of registers that count.
    pub declared: u64,
    /// `flags`, of which KVM knows none.
    pub flags: u32,
    /// Number and value of each register that is there.
    pub list: Vec<(u32, u64)>,
    /// How many bytes the list has where it ends before the registers that it declares.
    pub cut_at: Option<usize>,
}

impl Xcrs {
    /// Lists XCR0 alone.
    #[must_use]
    pub fn of_xcr0(xcr0: XFeatures) -> Self {
        Self {
            declared: 1,
            flags: 0,
            list: vec![(0, xcr0.bits())],
            cut_at: None,
        }
    }

    /// Reads the bytes of `kvm_xcrs`. Missing bytes are zeros: kvm-bindings fills them up.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Self {
        let declared = bytes::u32_at(bytes, 0);
        let entry = |at| {
            (
                bytes::u32_at(bytes, at),
                bytes::u64_at(bytes, at.saturating_add(8)),
            )
        };
        Self {
            declared: declared.into(),
            flags: bytes::u32_at(bytes, 4),
            list: (8..8 + 16 * 16).step_by(16).map(entry).collect(),
            cut_at: Some(bytes.len()).filter(|&len| len < bytes_of(declared.into())),
        }
    }

    fn in_effect(&self) -> impl Iterator<Item = (u32, u64)> {
        let count = usize::try_from(self.declared).unwrap_or(usize::MAX);
        self.list.iter().copied().take(count)
    }
}

/// Bytes of kvm_xcrs with so many registers; none where there is nothing to list.
fn bytes_of(declared: u64) -> usize {
    let count = usize::try_from(declared.min(MAX_XCRS)).unwrap_or(0);
    match count {
        0 => 0,
        count => count.saturating_mul(16).saturating_add(8),
    }
}

/// All registers that a file lists for a vCPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Listed {
    /// The extended control registers; `None` where the format has no place for them.
    pub xcrs: Option<Xcrs>,
    /// Index and value of each MSR, in the order of the file.
    pub msrs: Vec<(u32, u64)>,
    /// Whether a restore from the file sets these MSRs and no others.
    pub is_complete: bool,
    /// CR4, if the file has it.
    pub cr4: Option<u64>,
    /// The frequency of the vCPU's TSC in kHz, if the file has it.
    pub tsc_khz: Option<u32>,
}

impl Listed {
    /// Returns the value of an MSR that KVM_SET_MSRS leaves: the last in the list.
    #[must_use]
    pub fn msr(&self, index: u32) -> Option<u64> {
        let mut msrs = self.msrs.iter().rev();
        msrs.find(|(own, _)| *own == index).map(|&(_, value)| value)
    }
}

/// The registers that decide, each with its source.
pub(crate) struct Resolved {
    pub(crate) xcr0: Known<XFeatures>,
    pub(crate) xfd: Option<Known<XFeatures>>,
    pub(crate) xfd_err: Option<Known<XFeatures>>,
    pub(crate) xss: Option<Known<XFeatures>>,
    pub(crate) findings: Vec<Finding>,
}

/// Takes what is given, then what the file lists, then a guess. `has_xsave` is `None` where the
/// guest's CPUID is not known.
pub(crate) fn resolve(
    listed: &Listed,
    given: &Given,
    layout: &Layout,
    has_xsave: Option<bool>,
) -> Resolved {
    let mut findings = Vec::new();
    let xcr0 = match (given.xcr0, &listed.xcrs) {
        (Some(xcr0), _) => Known::given(xcr0, "--xcr0"),
        (None, Some(xcrs)) => xcr0_of(xcrs, has_xsave, &mut findings),
        (None, None) if has_xsave == Some(false) => {
            Known::guess(XFeatures::X87, "a guest without XSAVE has no other")
        }
        (None, None) => {
            let everything = xsave_state::xcr0::largest_within(layout.user(), layout.user());
            Known::guess(everything, "all that the layout has")
        }
    };
    if has_xsave == Some(false) && xcr0.value != XFeatures::X87 {
        let value = xcr0.value;
        findings.push(Finding::broken(
            Rule::Xcr0,
            format!("XCR0 is {value}; without XSAVE in the guest's CPUID it is 1"),
        ));
    }
    let disableable = layout.xfd();
    let mut msr = |index, given: Option<XFeatures>, option: &'static str, name: &str| {
        if let Some(value) = given {
            return Some(Known::given(value, option));
        }
        let own = listed.msrs.iter().filter(|(own, _)| *own == index);
        // Nothing is missing for a layout with nothing to disable.
        let own = Registers::from_lists([], own.copied(), &Layout::legacy());
        if let Err(error) = own {
            findings.push(Finding::broken(Rule::Xfd, error.to_string()));
        }
        let value = listed.msr(index);
        if value.is_none() && !disableable.is_empty() && listed.is_complete {
            findings.push(Finding::broken(
                Rule::Msrs,
                format!(
                    "this file cannot hold {name} (MSR {index:#x}), with which the guest can disable \
                     {disableable}: it is not among the MSRs; give its value with {option}"
                ),
            ));
        }
        value.map(|value| Known::file(XFeatures::from_bits_retain(value)))
    };
    let xfd = msr(MSR_IA32_XFD, given.xfd, "--xfd", "IA32_XFD");
    let xfd_err = msr(MSR_IA32_XFD_ERR, given.xfd_err, "--xfd-err", "IA32_XFD_ERR");
    if xfd.is_none() && !disableable.is_empty() && !listed.is_complete {
        findings.push(Finding::unknown(
            Rule::XfdInUse,
            "--xfd",
            format!(
                "IA32_XFD is not in the file, and the guest can disable {disableable} with it; give \
                 it with --xfd (0 if the guest has not)"
            ),
        ));
    }
    let own = |value| Known::file(XFeatures::from_bits_retain(value));
    let xss = given.xss.map(|value| Known::given(value, "--xss"));
    Resolved {
        xcr0,
        xfd,
        xfd_err,
        xss: xss.or(listed.msr(MSR_IA32_XSS).map(own)),
        findings,
    }
}

/// What KVM_SET_XCRS makes of the list, in a new vCPU (arch/x86/kvm/x86.c,
/// `kvm_vcpu_ioctl_x86_set_xcrs`).
fn xcr0_of(xcrs: &Xcrs, has_xsave: Option<bool>, findings: &mut Vec<Finding>) -> Known<XFeatures> {
    let reset = |why: &str| Known {
        value: XFeatures::X87,
        source: Source::Reset(why.to_owned()),
    };
    if xcrs.declared > MAX_XCRS || xcrs.flags != 0 {
        findings.push(Finding::broken(
            Rule::Xcr0,
            format!(
                "nr_xcrs is {} and flags is {:#x}; KVM_SET_XCRS takes at most {MAX_XCRS} registers and \
                 no flags",
                xcrs.declared, xcrs.flags
            ),
        ));
        return reset("KVM refuses the file's list, and leaves the value after reset");
    }
    if let Some(actual) = xcrs.cut_at {
        findings.push(Finding::broken(
            Rule::Xcr0,
            format!(
                "the list of extended control registers has {actual} bytes, and {} for {} of them: what is \
                 missing becomes 0",
                bytes_of(xcrs.declared),
                xcrs.declared
            ),
        ));
    }
    let registers = Registers::from_lists(xcrs.in_effect(), [], &Layout::legacy());
    let is_listed = xcrs.in_effect().any(|(number, _)| number == 0);
    match registers {
        Ok(registers) if is_listed => Known::file(registers.xcr0),
        Err(error) => {
            findings.push(Finding::broken(Rule::Xcr0, error.to_string()));
            // KVM takes the first.
            let first = match error {
                RegistersError::TwoValues { first, .. } => first,
                _ => 1,
            };
            Known::file(XFeatures::from_bits_retain(first))
        }
        Ok(_) => {
            if has_xsave != Some(false) {
                findings.push(Finding::broken(
                    Rule::Xcr0,
                    "the file does not list XCR0: after a restore it is 1, whatever the guest had \
                     enabled; give its value with --xcr0"
                        .to_owned(),
                ));
            }
            reset("the file does not list it: the value after reset")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(declared: u32, flags: u32, entries: &[(u32, u64)]) -> Vec<u8> {
        let mut bytes = [declared.to_le_bytes(), flags.to_le_bytes()].concat();
        for (number, value) in entries {
            bytes.extend([number.to_le_bytes(), [0; 4]].concat());
            bytes.extend(value.to_le_bytes());
        }
        bytes
    }

    fn resolved(bytes: &[u8], has_xsave: bool) -> (u64, Vec<Rule>) {
        let listed = Listed {
            xcrs: Some(Xcrs::from_bytes(bytes)),
            ..Listed::default()
        };
        let resolved = resolve(
            &listed,
            &Given::default(),
            &Layout::legacy(),
            Some(has_xsave),
        );
        let rules = resolved.findings.iter().map(|finding| finding.rule);
        (resolved.xcr0.value.bits(), rules.collect())
    }

    /// Each with what kvm_vcpu_ioctl_x86_set_xcrs does with it.
    #[test]
    fn xcr0_is_what_kvm_would_make_of_the_list() {
        let listed = [(0, 0xe7)];
        assert_eq!(resolved(&bytes(1, 0, &listed), true), (0xe7, vec![]));
        // EINVAL.
        for (count, flags) in [(17, 0), (u32::MAX, 0), (1, 1)] {
            let refused = resolved(&bytes(count, flags, &listed), true);
            assert_eq!(refused, (1, vec![Rule::Xcr0]), "{count} {flags}");
        }
        // Nothing is set.
        for cut in [
            &bytes(0, 0, &listed)[..],
            &[],
            &[0],
            &bytes(1, 0, &[(1, 7)]),
        ] {
            assert_eq!(resolved(cut, true), (1, vec![Rule::Xcr0]));
            assert_eq!(resolved(cut, false), (1, vec![]));
        }
        // The value is cut: what is missing is zero, which XSETBV refuses.
        let cut = resolved(&bytes(1, 0, &listed)[..12], true);
        assert_eq!(cut, (0, vec![Rule::Xcr0]));
        // The first counts.
        let twice = bytes(2, 0, &[(0, 3), (0, 7)]);
        assert_eq!(resolved(&twice, true), (3, vec![Rule::Xcr0]));
        // KVM refuses all but 1 where the guest has no XSAVE.
        assert_eq!(resolved(&bytes(1, 0, &[(0, 1)]), false), (1, vec![]));
        let more = resolved(&bytes(1, 0, &[(0, 3)]), false);
        assert_eq!(more, (3, vec![Rule::Xcr0]));
    }
}

//! What is said of a vCPU: a rule, what it means for a restore, and the values.

/// What a finding is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Rule {
    /// The guest's CPUID describes an area that can exist, and no entry hides another.
    Cpuid,
    /// The area is as long as its CPUID requires.
    Length,
    /// The components lie where they are looked for.
    Layout,
    /// XCOMP_BV is 0: the standard format.
    Format,
    /// The reserved bytes of the legacy region and of the header are 0.
    Reserved,
    /// XSTATE_BV is within CPUID.
    Components,
    /// Components that are initial have no bytes that a restore ignores.
    InitialBytes,
    /// MXCSR has only bits that the processor has.
    Mxcsr,
    /// TILECFG is one that LDTILECFG accepts, or initial.
    TileConfig,
    /// XCR0 is listed, and a value that XSETBV accepts.
    Xcr0,
    /// IA32_XFD and IA32_XFD_ERR have one value each, with only components that can be disabled.
    Xfd,
    /// No component is in use and disabled.
    XfdInUse,
    /// The file lists the MSRs that hold the guest's other extended state.
    Msrs,
}

impl Rule {
    /// All rules, in the order in which they are reported.
    pub const ALL: [Self; 13] = [
        Self::Cpuid,
        Self::Length,
        Self::Layout,
        Self::Format,
        Self::Reserved,
        Self::Components,
        Self::InitialBytes,
        Self::Mxcsr,
        Self::TileConfig,
        Self::Xcr0,
        Self::Xfd,
        Self::XfdInUse,
        Self::Msrs,
    ];

    /// Returns its name for machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Cpuid => "cpuid",
            Self::Length => "length",
            Self::Layout => "layout",
            Self::Format => "format",
            Self::Reserved => "reserved",
            Self::Components => "components",
            Self::InitialBytes => "initial_bytes",
            Self::Mxcsr => "mxcsr",
            Self::TileConfig => "tile_config",
            Self::Xcr0 => "xcr0",
            Self::Xfd => "xfd",
            Self::XfdInUse => "xfd_in_use",
            Self::Msrs => "msrs",
        }
    }

    /// Returns what it is about, in a few words.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Cpuid => "CPUID of the guest",
            Self::Length => "length of the area",
            Self::Layout => "layout",
            Self::Format => "standard format",
            Self::Reserved => "reserved bytes",
            Self::Components => "XSTATE_BV within CPUID",
            Self::InitialBytes => "initial components",
            Self::Mxcsr => "MXCSR within its mask",
            Self::TileConfig => "TILECFG is loadable",
            Self::Xcr0 => "XCR0",
            Self::Xfd => "XFD within CPUID",
            Self::XfdInUse => "XSTATE_BV & XFD = 0",
            Self::Msrs => "MSRs of the guest",
        }
    }

    /// Returns what happens when a state that breaks it is restored all the same.
    #[must_use]
    pub const fn danger(self) -> &'static str {
        match self {
            Self::Cpuid => "the guest finds other places and sizes than its area has",
            Self::Length => {
                "KVM copies as many bytes as the vCPU's CPUID requires, whatever is there: a VMM that \
                 restores this gives the guest what lies behind its buffer. A length check before \
                 KVM_SET_XSAVE protects (xsave-state: Image::parse)"
            }
            Self::Layout => "the guest finds other registers' values in its registers",
            // arch/x86/kernel/fpu/xstate.c, validate_user_xstate_header and copy_uabi_to_xstate.
            Self::Format => "KVM_SET_XSAVE refuses it with EINVAL",
            Self::Reserved => {
                "KVM_SET_XSAVE refuses it with EINVAL where it is in the header, and does not look at \
                 bytes 416 to 463"
            }
            Self::Components => {
                "KVM_SET_XSAVE accepts it where the host has the component and the vCPU's area a place \
                 for it, whatever the guest's CPUID says, and refuses it with EINVAL elsewhere: whether \
                 the guest comes up depends on the host"
            }
            Self::InitialBytes => "KVM ignores the bytes",
            Self::Mxcsr => {
                "KVM_SET_XSAVE refuses it with EINVAL where x87, SSE or AVX is in use, and does not \
                 look at it where none of them is"
            }
            Self::TileConfig => {
                "the processor drops it without a fault, and the guest finds its tiles unconfigured"
            }
            Self::Xcr0 => {
                "KVM_SET_XCRS fails with EINVAL, or leaves XCR0 at 1 where the file does not list it: the \
                 guest then faults at its next instruction of a component that it has enabled"
            }
            Self::Xfd => "KVM_SET_MSRS does not set it, or not to the value that was checked",
            Self::XfdInUse => {
                "a host that loads this state raises #NM in its own kernel, and can go down with all \
                 its guests. Setting IA32_XFD before the state, and refusing or clearing such a \
                 component, protects (xsave-state: ExtendedState::new, sanitize)"
            }
            Self::Msrs => "the guest continues with these registers at their reset values",
        }
    }
}

/// What a finding means for a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// The rule is broken: the state must not be restored as it is.
    Broken,
    /// Whether the rule holds is not known without this option of amxctl.
    Unknown {
        /// The option that tells.
        option: &'static str,
    },
    /// It does not keep the state from being restored.
    Note,
}

/// A rule and what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Finding {
    /// What it is about.
    pub rule: Rule,
    /// What it means for a restore.
    pub verdict: Verdict,
    /// What was found and what was expected, with the values.
    pub values: String,
    /// Whether `amxctl convert` writes a state without it that is the same for the guest.
    pub is_mendable: bool,
}

impl Finding {
    pub(crate) fn broken(rule: Rule, values: String) -> Self {
        Self::new(rule, Verdict::Broken, values)
    }

    pub(crate) fn unknown(rule: Rule, option: &'static str, values: String) -> Self {
        Self::new(rule, Verdict::Unknown { option }, values)
    }

    pub(crate) fn note(rule: Rule, values: String) -> Self {
        Self::new(rule, Verdict::Note, values)
    }

    pub(crate) fn new(rule: Rule, verdict: Verdict, values: String) -> Self {
        Self {
            rule,
            verdict,
            values,
            is_mendable: false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What KVM does with each of the areas that it is given: tests/kvm_live.rs.
    #[test]
    fn each_rule_has_a_danger_of_its_own() {
        let mut said: Vec<_> = Rule::ALL.into_iter().map(Rule::danger).collect();
        said.sort_unstable();
        said.dedup();
        assert_eq!(said.len(), Rule::ALL.len());
    }
}

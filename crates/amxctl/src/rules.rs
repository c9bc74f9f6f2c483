//! Which of the invariants of a vCPU's state hold: all of them, each with its values.
//!
//! [`ExtendedState`](xsave_state::ExtendedState) stops at the first that is broken; who has to
//! understand a snapshot wants to see the others as well. Both agree: a state of which no rule is
//! broken can be made, and one that breaks a rule cannot.

use xsave_state::format::TILECFG_BYTES;
use xsave_state::{ComponentId, Header, Legacy, TileConfig, XFeatures, xcr0};

use crate::bytes;
use crate::vcpu::{Source, Subject};

/// One of the invariants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rule {
    /// The area is as long as its CPUID needs.
    Length,
    /// Its components lie where they are taken to lie: no other layout fits as well.
    Layout,
    /// XCOMP_BV is 0: the standard format.
    Format,
    /// The reserved bytes of the legacy region and of the header are 0.
    Reserved,
    /// XSTATE_BV is within CPUID.
    Components,
    /// MXCSR has only bits that the processor has.
    Mxcsr,
    /// TILECFG is one that LDTILECFG takes, or initial.
    TileConfig,
    /// XCR0 is a value that XSETBV takes.
    Xcr0,
    /// IA32_XFD and IA32_XFD_ERR have only components that can be disabled.
    Xfd,
    /// No component is in use and disabled.
    XfdInUse,
}

impl Rule {
    /// All, in the order in which they are checked.
    pub const ALL: [Self; 10] = [
        Self::Length,
        Self::Layout,
        Self::Format,
        Self::Reserved,
        Self::Components,
        Self::Mxcsr,
        Self::TileConfig,
        Self::Xcr0,
        Self::Xfd,
        Self::XfdInUse,
    ];

    /// Its name for machines.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Layout => "layout",
            Self::Format => "format",
            Self::Reserved => "reserved",
            Self::Components => "components",
            Self::Mxcsr => "mxcsr",
            Self::TileConfig => "tile_config",
            Self::Xcr0 => "xcr0",
            Self::Xfd => "xfd",
            Self::XfdInUse => "xfd_in_use",
        }
    }

    /// What holds, in a few words.
    #[must_use]
    pub const fn title(self) -> &'static str {
        match self {
            Self::Length => "length",
            Self::Layout => "only one layout fits",
            Self::Format => "standard format",
            Self::Reserved => "reserved bytes are 0",
            Self::Components => "XSTATE_BV within CPUID",
            Self::Mxcsr => "MXCSR within its mask",
            Self::TileConfig => "TILECFG is loadable",
            Self::Xcr0 => "XCR0 is legal",
            Self::Xfd => "XFD within CPUID",
            Self::XfdInUse => "XSTATE_BV & XFD = 0",
        }
    }

    /// What a VMM that restores the state all the same is in for.
    #[must_use]
    pub const fn danger(self) -> &'static str {
        match self {
            Self::Length => {
                "KVM copies as many bytes as the vCPU's CPUID needs, whatever is there: a VMM that \
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
                 the guest comes up is up to the host"
            }
            Self::Mxcsr => {
                "KVM_SET_XSAVE refuses it with EINVAL where x87, SSE or AVX is in use, and does not \
                 look at it where none of them is"
            }
            Self::TileConfig => {
                "the processor drops it without a fault, and the guest finds its tiles unconfigured"
            }
            Self::Xcr0 => "KVM_SET_XCRS refuses it with EINVAL",
            Self::Xfd => "KVM_SET_MSRS does not set it",
            Self::XfdInUse => {
                "a host that loads this state raises #NM in its own kernel, and can go down with all \
                 its guests. Setting IA32_XFD before the state, and refusing or clearing such a \
                 component, protects (xsave-state: ExtendedState::new, sanitize)"
            }
        }
    }
}

/// Whether it holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It does.
    Holds,
    /// It does not.
    Broken,
    /// What it is about is not known.
    Unknown,
}

/// One rule and what was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// The rule.
    pub rule: Rule,
    /// Whether it holds.
    pub verdict: Verdict,
    /// The values.
    pub values: String,
}

impl Finding {
    /// Whether it is a reason not to restore: the rule is broken, or host and guest depend on it and
    /// nobody can say whether it holds.
    #[must_use]
    pub fn refuses(&self) -> bool {
        match self.verdict {
            Verdict::Holds => false,
            Verdict::Broken => true,
            // A state whose XFD nobody knows may be the one that takes its host down; one whose
            // components may lie elsewhere gives the guest wrong registers.
            Verdict::Unknown => self.option().is_some(),
        }
    }

    /// The option of amxctl that says what cannot be judged without it.
    #[must_use]
    pub fn option(&self) -> Option<&'static str> {
        match (self.verdict, self.rule) {
            (Verdict::Unknown, Rule::Layout) => Some("--cpuid"),
            (Verdict::Unknown, Rule::XfdInUse) => Some("--xfd"),
            _ => None,
        }
    }
}

/// Looks at each rule.
#[must_use]
pub fn check(subject: &Subject) -> Vec<Finding> {
    Rule::ALL
        .into_iter()
        .map(|rule| {
            let (verdict, values) = one(rule, subject);
            Finding {
                rule,
                verdict,
                values,
            }
        })
        .collect()
}

fn one(rule: Rule, subject: &Subject) -> (Verdict, String) {
    let beyond_the_end = || {
        (
            Verdict::Unknown,
            format!("the area ends at byte {}", subject.area.len()),
        )
    };
    match rule {
        Rule::Length => length(subject),
        Rule::Layout => layout(subject),
        _ if !subject.has_header() => match rule {
            Rule::Xcr0 => legal_xcr0(subject),
            Rule::Xfd => xfd(subject),
            _ => beyond_the_end(),
        },
        Rule::Format => format(subject),
        Rule::Reserved => reserved(subject),
        Rule::Components => components(subject),
        Rule::Mxcsr => mxcsr(subject),
        Rule::TileConfig => tile_config(subject),
        Rule::Xcr0 => legal_xcr0(subject),
        Rule::Xfd => xfd(subject),
        Rule::XfdInUse => xfd_in_use(subject),
    }
}

fn verdict(holds: bool) -> Verdict {
    if holds {
        Verdict::Holds
    } else {
        Verdict::Broken
    }
}

fn length(subject: &Subject) -> (Verdict, String) {
    let layout = &subject.layout.value;
    let needed = if subject.was_compacted() {
        let placed = XFeatures::from_bits_retain(bytes::u64_at(&subject.area, 520));
        layout.compacted_size(placed)
    } else {
        layout.standard_size()
    };
    let there = subject.area.len();
    (
        verdict(there >= needed),
        format!("{there} bytes; its CPUID needs {needed}"),
    )
}

fn layout(subject: &Subject) -> (Verdict, String) {
    match (&subject.other_layout, &subject.layout.source) {
        (Some(_), _) => (
            Verdict::Unknown,
            "two fit, which have components at different places; the guest's CPUID tells: give it \
             with --cpuid"
                .to_owned(),
        ),
        (None, Source::Guess(_)) => (Verdict::Holds, "of those known here".to_owned()),
        (None, source) => (Verdict::Holds, source.to_string()),
    }
}

fn format(subject: &Subject) -> (Verdict, String) {
    let xcomp_bv = bytes::u64_at(&subject.area, 520);
    let values = match (xcomp_bv, subject.was_compacted()) {
        (0, _) => "XCOMP_BV is 0".to_owned(),
        (_, true) => format!(
            "XCOMP_BV is {xcomp_bv:#x}: the compacted format, valid; `amxctl convert` gives the standard one"
        ),
        (_, false) => format!("XCOMP_BV is {xcomp_bv:#x}"),
    };
    (verdict(xcomp_bv == 0), values)
}

fn reserved(subject: &Subject) -> (Verdict, String) {
    let area = subject.standard();
    if let Err(error) = Header::parse(area) {
        return (Verdict::Broken, error.to_string());
    }
    // All bits of MXCSR allowed: that is another rule.
    match Legacy::parse(area, u32::MAX) {
        Err(error) => (Verdict::Broken, error.to_string()),
        Ok(_) => (Verdict::Holds, "bytes 416 to 463, 528 to 575".to_owned()),
    }
}

fn components(subject: &Subject) -> (Verdict, String) {
    let user = subject.layout.value.user();
    let in_use = subject.xstate_bv();
    let beyond = in_use - user;
    if beyond.is_empty() {
        return (Verdict::Holds, in_use.to_string());
    }
    (
        Verdict::Broken,
        format!("{in_use}; CPUID has {user}, and not {beyond}"),
    )
}

fn mxcsr(subject: &Subject) -> (Verdict, String) {
    let mask = subject.layout.value.mxcsr_mask();
    let mxcsr = subject.mxcsr();
    (
        verdict(mxcsr & !mask == 0),
        format!("{mxcsr:#x}; the mask is {mask:#x}"),
    )
}

fn tile_config(subject: &Subject) -> (Verdict, String) {
    let layout = &subject.layout.value;
    let id = ComponentId::XTILECFG;
    if !subject.xstate_bv().contains(id.bit()) || layout.component(id).is_none() {
        return (Verdict::Holds, "initial".to_owned());
    }
    let content = subject.component(id);
    if content.len() < TILECFG_BYTES {
        return (
            Verdict::Unknown,
            format!("the area ends at byte {}", subject.area.len()),
        );
    }
    match TileConfig::parse(&bytes::array(content, 0), layout.palettes()) {
        Ok(None) => (Verdict::Holds, "palette 0: initial".to_owned()),
        Ok(Some(config)) => (Verdict::Holds, format!("palette {}", config.palette().id())),
        Err(error) => (Verdict::Broken, error.to_string()),
    }
}

fn legal_xcr0(subject: &Subject) -> (Verdict, String) {
    let value = subject.xcr0.value;
    match xcr0::check(value, subject.layout.value.user()) {
        Ok(()) => (Verdict::Holds, format!("{:#x}", value.bits())),
        Err(error) => (Verdict::Broken, error.to_string()),
    }
}

fn xfd(subject: &Subject) -> (Verdict, String) {
    let supported = subject.layout.value.xfd();
    let registers = [("XFD", &subject.xfd), ("XFD_ERR", &subject.xfd_err)];
    for (name, known) in registers {
        if let Some(known) = known
            && !supported.contains(known.value)
        {
            let value = known.value;
            return (
                Verdict::Broken,
                format!("{name} is {value}; only {supported} can be disabled"),
            );
        }
    }
    match (&subject.xfd, &subject.xfd_err) {
        (Some(xfd), Some(xfd_err)) => (
            Verdict::Holds,
            format!(
                "XFD {:#x}, XFD_ERR {:#x}",
                xfd.value.bits(),
                xfd_err.value.bits()
            ),
        ),
        _ if supported.is_empty() => (Verdict::Holds, "nothing can be disabled".to_owned()),
        (None, _) => (Verdict::Unknown, not_known("IA32_XFD", "--xfd")),
        (Some(_), None) => (Verdict::Unknown, not_known("IA32_XFD_ERR", "--xfd-err")),
    }
}

fn xfd_in_use(subject: &Subject) -> (Verdict, String) {
    let in_use = subject.xstate_bv();
    let Some(xfd) = &subject.xfd else {
        let could = in_use & subject.layout.value.xfd();
        if could.is_empty() {
            return (
                Verdict::Holds,
                "nothing that can be disabled is in use".to_owned(),
            );
        }
        return (
            Verdict::Unknown,
            format!("{could} is in use; {}", not_known("IA32_XFD", "--xfd")),
        );
    };
    let xfd = xfd.value;
    let both = in_use & xfd;
    if both.is_empty() {
        let values = format!("{:#x} & {:#x}", in_use.bits(), xfd.bits());
        return (Verdict::Holds, values);
    }
    (
        Verdict::Broken,
        format!(
            "{:#x} & {:#x}: {both} is in use and disabled",
            in_use.bits(),
            xfd.bits()
        ),
    )
}

fn not_known(register: &str, option: &str) -> String {
    format!("{register} is not in the file; give it with {option}")
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

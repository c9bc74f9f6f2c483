//! In which registers and components two states differ, wherever each has them in memory.

use xsave_state::format::{INITIAL_FCW, INITIAL_MXCSR};
use xsave_state::{ComponentId, XFeatures};

use crate::bytes;
use crate::parts;
use crate::vcpu::{Known, Subject};

/// How a state has a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Its CPUID does not have it.
    Absent,
    /// XSTATE_BV is clear.
    Initial,
    /// XSTATE_BV is set.
    InUse,
}

/// A register that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RegisterDiff {
    /// The name of the register, as the manual has it.
    pub name: &'static str,
    /// In the first; `None`: not known.
    pub first: Option<u64>,
    /// In the second; `None`: not known.
    pub second: Option<u64>,
}

/// A part of a component that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartDiff {
    /// As in `zmm17` or `tmm0 row 3`.
    pub name: String,
    /// Its offset in the component, in bytes.
    pub offset: usize,
    /// Its bytes in the first.
    pub first: Vec<u8>,
    /// Its bytes in the second.
    pub second: Vec<u8>,
}

impl PartDiff {
    /// How many of its bytes differ.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let pairs = self.first.iter().zip(&self.second);
        pairs.filter(|(first, second)| first != second).count()
    }
}

/// A component that differs, or that only one of the two uses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ComponentDiff {
    /// The component that differs.
    pub id: ComponentId,
    /// How the first has it.
    pub first: Use,
    /// How the second has it.
    pub second: Use,
    /// Of how many parts.
    pub parts_total: usize,
    /// The parts that differ. None: the values are the same.
    pub parts: Vec<PartDiff>,
}

/// In what two states differ.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Diff {
    /// XCR0, IA32_XFD, IA32_XFD_ERR and MXCSR.
    pub registers: Vec<RegisterDiff>,
    /// By ascending number.
    pub components: Vec<ComponentDiff>,
    /// Components that lie elsewhere or have another size, with offset and size in bytes in each:
    /// no difference of the state, but of its bytes.
    pub places: Vec<(ComponentId, [usize; 2], [usize; 2])>,
}

impl Diff {
    /// Whether the states are the same. Where they lie in memory does not count.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.registers.is_empty() && self.components.is_empty()
    }
}

/// Compares two states. An initial component is compared by its initial value.
#[must_use]
pub fn diff(first: &Subject, second: &Subject) -> Diff {
    let mut diff = Diff::default();
    let value = |known: &Option<Known<XFeatures>>| known.as_ref().map(|k| k.value.bits());
    let registers = [
        (
            "XCR0",
            Some(first.xcr0.value.bits()),
            Some(second.xcr0.value.bits()),
        ),
        ("IA32_XFD", value(&first.xfd), value(&second.xfd)),
        (
            "IA32_XFD_ERR",
            value(&first.xfd_err),
            value(&second.xfd_err),
        ),
        ("MXCSR", Some(mxcsr(first)), Some(mxcsr(second))),
    ];
    for (name, first, second) in registers {
        if first != second {
            diff.registers.push(RegisterDiff {
                name,
                first,
                second,
            });
        }
    }
    let (ours, theirs) = (&first.layout.value, &second.layout.value);
    let all = ours.user() | theirs.user() | first.xstate_bv() | second.xstate_bv();
    for id in all.components() {
        if let Some(component) = component(first, second, id) {
            diff.components.push(component);
        }
        let place =
            |component: &xsave_state::Component| Some([component.offset()?, component.size()]);
        let places = (
            ours.component(id).and_then(place),
            theirs.component(id).and_then(place),
        );
        if let (Some(ours), Some(theirs)) = places
            && ours != theirs
        {
            diff.places.push((id, ours, theirs));
        }
    }
    diff
}

fn component(first: &Subject, second: &Subject, id: ComponentId) -> Option<ComponentDiff> {
    let uses = (use_of(first, id), use_of(second, id));
    let described = first
        .layout
        .value
        .component(id)
        .or(second.layout.value.component(id))?;
    let palette = parts::palette(first).or(parts::palette(second));
    let (ours, theirs) = (content(first, id), content(second, id));
    let all = parts::of(described, palette.as_ref());
    let differing: Vec<PartDiff> = all
        .iter()
        .map(|part| PartDiff {
            name: part.name.clone(),
            offset: part.range.start,
            first: fill(&ours, part.range.clone()),
            second: fill(&theirs, part.range.clone()),
        })
        .filter(|part| part.first != part.second)
        .collect();
    // One that has it initial and one that lacks it are the same.
    let used = |one: Use| one == Use::InUse;
    let same_use = used(uses.0) == used(uses.1);
    if differing.is_empty() && same_use {
        return None;
    }
    Some(ComponentDiff {
        id,
        first: uses.0,
        second: uses.1,
        parts_total: all.len(),
        parts: differing,
    })
}

fn use_of(subject: &Subject, id: ComponentId) -> Use {
    if subject.xstate_bv().contains(id.bit()) {
        Use::InUse
    } else if subject.layout.value.user().contains(id.bit()) {
        Use::Initial
    } else {
        Use::Absent
    }
}

/// What the processor would load: not what an initial component's bytes happen to be.
fn content(subject: &Subject, id: ComponentId) -> Vec<u8> {
    match (use_of(subject, id), id) {
        (Use::InUse, _) => subject.component(id).to_vec(),
        (_, ComponentId::X87) => INITIAL_FCW.to_le_bytes().to_vec(),
        _ => Vec::new(),
    }
}

fn fill(content: &[u8], range: std::ops::Range<usize>) -> Vec<u8> {
    let mut part = bytes::range(content, range.clone()).to_vec();
    part.resize(range.len(), 0);
    part
}

/// MXCSR as the vCPU has it: it is saved with SSE or AVX.
fn mxcsr(subject: &Subject) -> u64 {
    let saved = match subject.is_compacted() {
        true => XFeatures::SSE,
        false => XFeatures::SSE | XFeatures::AVX,
    };
    u64::from(if subject.xstate_bv().intersects(saved) {
        subject.mxcsr()
    } else {
        INITIAL_MXCSR
    })
}

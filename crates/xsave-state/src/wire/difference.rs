//! In what two layouts differ.

use core::fmt;

use crate::feature::ComponentId;
use crate::layout::{Component, Layout};

/// The first difference between the layout that a state was encoded with and the reader's. Both are
/// guests' layouts: to move a state between them is a decision, not a matter of reading it. Decode
/// it with its own layout ([`wire::decode`](super::decode)) for that.
///
/// Supervisor components do not matter: no state has any.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Difference {
    /// The reader does not know a component of the state's layout.
    Unknown {
        /// The component.
        component: ComponentId,
    },
    /// The reader has a component that the state's layout does not have.
    Missing {
        /// The component.
        component: ComponentId,
    },
    /// A component has another offset, size, alignment, or another answer to whether IA32_XFD can
    /// disable it.
    Component {
        /// In the state's layout.
        encoded: Component,
        /// In the reader's.
        reader: Component,
    },
    /// The tile palettes differ.
    Palettes {
        /// How many the state's layout has.
        encoded: usize,
        /// How many the reader's has; with the same number, one differs.
        reader: usize,
    },
    /// Other MXCSR bits may be set.
    MxcsrMask {
        /// In the state's layout.
        encoded: u32,
        /// In the reader's.
        reader: u32,
    },
}

impl Difference {
    /// `None` where they differ in nothing that an encoded state has.
    pub(super) fn between(encoded: &Layout, reader: &Layout) -> Option<Self> {
        let ids = (encoded.user() | reader.user()).components();
        for component in ids {
            let find = |layout: &Layout| {
                layout
                    .component(component)
                    .filter(|c| c.offset().is_some())
                    .copied()
            };
            match (find(encoded), find(reader)) {
                (Some(_), None) => return Some(Self::Unknown { component }),
                (None, Some(_)) => return Some(Self::Missing { component }),
                (Some(theirs), Some(ours)) => {
                    let disabled = |layout: &Layout| layout.xfd().contains(component.bit());
                    if theirs.offset() != ours.offset()
                        || theirs.size() != ours.size()
                        || theirs.is_aligned() != ours.is_aligned()
                        || disabled(encoded) != disabled(reader)
                    {
                        return Some(Self::Component {
                            encoded: theirs,
                            reader: ours,
                        });
                    }
                }
                (None, None) => {}
            }
        }
        if encoded.palettes() != reader.palettes() {
            return Some(Self::Palettes {
                encoded: encoded.palettes().len(),
                reader: reader.palettes().len(),
            });
        }
        let (encoded, reader) = (encoded.mxcsr_mask(), reader.mxcsr_mask());
        (encoded != reader).then_some(Self::MxcsrMask { encoded, reader })
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = |component: &Component| {
            let (offset, size) = (component.offset().unwrap_or(0), component.size());
            (offset, size, component.is_aligned(), component.has_xfd())
        };
        match self {
            Self::Unknown { component } => write!(f, "the reader does not have {component}"),
            Self::Missing { component } => write!(f, "only the reader has {component}"),
            Self::Component { encoded, reader } => write!(
                f,
                "{} has (offset, size, aligned, XFD) {:?} there and {:?} for the reader",
                encoded.id(),
                place(encoded),
                place(reader)
            ),
            Self::Palettes { encoded, reader } => write!(
                f,
                "its {encoded} tile palettes are not the {reader} of the reader"
            ),
            Self::MxcsrMask { encoded, reader } => write!(
                f,
                "the MXCSR bits that may be set are {encoded:#x} there and {reader:#x} for the reader"
            ),
        }
    }
}

//! One state component: its number, size, place and properties.

use core::ops::Range;

use crate::feature::ComponentId;
use crate::format::{X87_BYTES, XMM};

/// One state component, as CPUID.(EAX=0DH,ECX=n) describes it.
///
/// A user component is enabled in XCR0 and has an offset in the standard format. A supervisor
/// component is enabled in IA32_XSS, and only the compacted format has a place for it.
///
/// ```
/// use xsave_state::{Component, ComponentId};
///
/// let tiles = Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned();
/// assert_eq!((tiles.offset(), tiles.size()), (Some(2816), 8192));
/// assert!(tiles.has_xfd()); // KVM lets IA32_XFD disable tile data whatever CPUID says
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Component {
    id: ComponentId,
    size: usize,
    /// `None` for a supervisor component.
    offset: Option<usize>,
    aligned: bool,
    xfd: bool,
}

impl Component {
    /// Creates a user component of `size` bytes at `offset` of the standard format.
    #[must_use]
    pub const fn user(id: ComponentId, offset: usize, size: usize) -> Self {
        Self::new(id, Some(offset), size)
    }

    /// Creates a supervisor component of `size` bytes.
    #[must_use]
    pub const fn supervisor(id: ComponentId, size: usize) -> Self {
        Self::new(id, None, size)
    }

    const fn new(id: ComponentId, offset: Option<usize>, size: usize) -> Self {
        Self {
            id,
            size,
            offset,
            aligned: false,
            // KVM goes by the number alone (arch/x86/kvm/x86.c, `kvm_guest_supported_xfd`).
            xfd: id.number() == ComponentId::XTILEDATA.number(),
        }
    }

    /// Places the component at a multiple of 64 bytes in the compacted format,
    /// CPUID.(EAX=0DH,ECX=n):ECX\[1\].
    #[must_use]
    pub const fn aligned(mut self) -> Self {
        self.aligned = true;
        self
    }

    /// Lets IA32_XFD disable the component, CPUID.(EAX=0DH,ECX=n):ECX\[2\].
    #[must_use]
    pub const fn with_xfd(mut self) -> Self {
        self.xfd = true;
        self
    }

    /// Returns its number.
    #[must_use]
    pub const fn id(&self) -> ComponentId {
        self.id
    }

    /// Returns its size in bytes, CPUID.(EAX=0DH,ECX=n):EAX.
    #[must_use]
    pub const fn size(&self) -> usize {
        self.size
    }

    /// Returns its offset in the standard format in bytes, CPUID.(EAX=0DH,ECX=n):EBX; `None` for a
    /// supervisor component.
    #[must_use]
    pub const fn offset(&self) -> Option<usize> {
        self.offset
    }

    /// Returns true when the compacted format places it at a multiple of 64 bytes.
    #[must_use]
    pub const fn is_aligned(&self) -> bool {
        self.aligned
    }

    /// Returns true when IA32_XFD can disable it. XTILEDATA always can be: KVM ignores what the
    /// guest's CPUID says of it.
    #[must_use]
    pub const fn has_xfd(&self) -> bool {
        self.xfd
    }

    pub(crate) fn range(&self) -> Option<Range<usize>> {
        let offset = self.offset()?;
        Some(offset..offset.saturating_add(self.size))
    }

    /// Returns x87 or SSE, which every processor has at the same place. Bytes 24 to 31 (MXCSR and
    /// its mask) lie within x87's and belong to SSE and AVX (SDM Vol. 1 §13.4.1).
    pub(super) fn legacy(id: ComponentId) -> Option<Self> {
        match id {
            ComponentId::X87 => Some(Self::user(id, 0, X87_BYTES)),
            ComponentId::SSE => {
                let bytes = XMM.end.saturating_sub(XMM.start);
                Some(Self::user(id, XMM.start, bytes))
            }
            _ => None,
        }
    }
}

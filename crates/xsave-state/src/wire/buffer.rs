//! What states are decoded into, one after the other.

use alloc::vec::Vec;

use crate::feature::XFeatures;
use crate::layout::Layout;

/// An area that a [`Codec`](super::Codec) decodes into, kept from one state to the next.
///
/// It allocates when it is used for the first time, and then only for a layout with larger areas. It
/// knows which components it has bytes of: what is initial in the next state and was in the last is
/// not cleared again. Of eight idle vCPUs the 8 KB of tiles are written once.
#[derive(Clone, Debug, Default)]
pub struct Buffer {
    area: Vec<u8>,
    layout: Option<Layout>,
    /// The components that may have bytes other than zero. Those of no component are zero but for
    /// XSTATE_BV and what x87's place has when it is initial.
    used: XFeatures,
}

impl Buffer {
    /// An empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            area: Vec::new(),
            layout: None,
            used: XFeatures::empty(),
        }
    }

    /// An area of `layout`, and its components that may have bytes other than zero. Of `in_use` they
    /// will have.
    pub(super) fn begin(&mut self, layout: &Layout, in_use: XFeatures) -> (&mut [u8], XFeatures) {
        if self.layout.as_ref() != Some(layout) {
            self.area.clear();
            self.area.resize(layout.standard_size(), 0);
            self.used = XFeatures::empty();
            self.layout = Some(layout.clone());
        }
        let before = self.used;
        self.used |= in_use;
        (&mut self.area, before)
    }

    /// The components that are not in use have been cleared.
    pub(super) fn end(&mut self, in_use: XFeatures) -> &[u8] {
        self.used = in_use;
        &self.area
    }

    /// The area alone.
    pub(super) fn into_area(self) -> Vec<u8> {
        self.area
    }
}

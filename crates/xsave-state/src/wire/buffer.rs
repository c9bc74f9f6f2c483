//! What states are decoded into, one after the other.

use alloc::vec::Vec;

use crate::feature::XFeatures;
use crate::layout::Layout;

/// An area that a [`Codec`](super::Codec) decodes into, kept from one state to the next.
///
/// It allocates at first, and again only for a layout with larger areas. It knows which components it
/// has bytes of: what is initial in a state, and was so in the last, is not cleared again. For the
/// vCPUs of an idle VM the 8 KB of tiles are zeroed once, not once for each.
#[derive(Clone, Debug, Default)]
pub struct Buffer {
    area: Vec<u8>,
    layout: Option<Layout>,
    /// The components that may have bytes other than zero. All others are zero, and so is what is
    /// between them, but for what every state sets: FCW, MXCSR and XSTATE_BV.
    used: XFeatures,
}

impl Buffer {
    /// Creates an empty one.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            area: Vec::new(),
            layout: None,
            used: XFeatures::empty(),
        }
    }

    /// Returns an area of `layout`, and the components that it may have bytes of. Those of `in_use`
    /// are going to be written: whatever becomes of it, the next state finds them noted.
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

    /// Returns the area, of which all that is not in use has been cleared.
    pub(super) fn end(&mut self, in_use: XFeatures) -> &[u8] {
        self.used = in_use;
        &self.area
    }

    /// Returns the area alone.
    pub(super) fn into_area(self) -> Vec<u8> {
        self.area
    }
}

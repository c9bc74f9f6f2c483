//! The largest part of a set that does not contradict itself.

use alloc::vec::Vec;

use xsave_state::{ComponentId, Layout, LayoutError, XFeatures, xcr0};

use crate::amx::AmxFeatures;
use crate::features::{FeatureSet, XsaveFeatures};

impl FeatureSet {
    /// Whether every feature has what it needs.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.clone().closed() == *self
    }

    /// What remains when every feature that lacks something it needs is taken out, until none does:
    /// XSAVE needs x87 and SSE; XCR0 takes the components of MPX, AVX-512 and AMX together or not at
    /// all, AVX-512 with AVX; supervisor components need XSAVES; components must have a size, and
    /// their places to themselves; AMX needs XFD, its components, and a palette as large as
    /// XTILEDATA; products need limits; XFD needs something to disable.
    ///
    /// It takes out nothing else, adds nothing, and ends: each round takes something out.
    #[must_use]
    pub fn closed(mut self) -> Self {
        loop {
            let before = self.clone();
            self.close_components();
            self.close_amx();
            if self == before {
                return self;
            }
        }
    }

    fn close_components(&mut self) {
        let legacy = self.user().contains(XFeatures::LEGACY);
        if !legacy || !self.xsave.contains(XsaveFeatures::XSAVE) {
            self.xsave = XsaveFeatures::empty();
            self.components.clear();
            return;
        }
        if !self.xsave.contains(XsaveFeatures::XSAVES) {
            self.components.retain(|_, shape| !shape.supervisor);
        }
        let user = self.user();
        self.remove(user - xcr0::largest_within(user, user));
        while let Err(error) = self.layout() {
            let lost = self.cause(&error);
            self.remove(lost);
        }
        if !self.components.values().any(|shape| shape.xfd) {
            self.xsave.remove(XsaveFeatures::XFD);
        }
    }

    fn close_amx(&mut self) {
        if !self.user().contains(XFeatures::AVX512) {
            // Its instructions move rows between tiles and ZMM registers.
            self.amx.remove(AmxFeatures::AVX512);
        }
        if !self.has_1eh_1 {
            self.amx.remove(AmxFeatures::ONLY_IN_1EH);
        }
        if self.tmul.is_none() {
            self.amx.remove(AmxFeatures::TMUL);
        }
        let data = self.components.get(&ComponentId::XTILEDATA);
        let palette_bytes = self
            .palettes
            .iter()
            .map(|p| u32::from(p.total_bytes()))
            .max();
        let usable = self.amx.contains(AmxFeatures::TILE)
            && self.user().contains(XFeatures::AMX)
            && self.xsave.contains(XsaveFeatures::XFD)
            && data.is_some_and(|data| data.xfd && Some(data.size) == palette_bytes);
        if usable {
            // Smaller products than the tiles allow are what smaller limits mean; larger ones
            // cannot be.
            let rows = self.palettes.iter().map(|p| p.rows()).max().unwrap_or(0);
            let row_bytes = self
                .palettes
                .iter()
                .map(|p| p.row_bytes())
                .max()
                .unwrap_or(0);
            if let Some(limits) = &mut self.tmul {
                limits.maxk = limits.maxk.min(u8::try_from(rows).unwrap_or(u8::MAX));
                limits.maxn = limits.maxn.min(row_bytes);
            }
        } else {
            self.amx = AmxFeatures::empty();
            self.remove(XFeatures::AMX);
            self.palettes = Vec::new();
            self.tmul = None;
        }
        // A sub-leaf of zeros is not there.
        self.has_1eh_1 &= self.amx.intersects(AmxFeatures::IN_LEAF_1EH);
    }

    fn remove(&mut self, components: XFeatures) {
        self.components
            .retain(|id, _| !components.contains(id.bit()));
    }

    /// The layout that the registers of this set describe, without the palettes.
    fn layout(&self) -> Result<Layout, LayoutError> {
        Layout::from_cpuid(|leaf, subleaf| match leaf {
            0 => [0xd, 0, 0, 0],
            1 | 0xd => self.leaf(leaf, subleaf),
            _ => [0; 4],
        })
    }

    /// What to take out, so that the error goes away: at least one component.
    fn cause(&self, error: &LayoutError) -> XFeatures {
        match error {
            LayoutError::Kind { component, .. }
            | LayoutError::NoSize { component }
            | LayoutError::Size { component, .. }
            | LayoutError::OffsetInHeader { component, .. }
            | LayoutError::TooLarge { component, .. } => component.bit(),
            LayoutError::Overlap { second, .. } => second.bit(),
            // The compacted format of all of them is too large, or something that a set cannot say:
            // the last one.
            _ => self
                .components
                .keys()
                .next_back()
                .map_or(XFeatures::empty(), |id| id.bit()),
        }
    }
}

//! Reads an untrusted area: what is in use and usable is copied to a blank area, and nothing else.

use core::ops::Range;

use super::{Change, Report, SanitizeError, UntrustedArea};
use crate::area::initial::{MXCSR_HOLDERS, is_initial};
use crate::area::{Image, TileConfig};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::fit::Misfit;
use crate::format::{
    COMPACTED, EXTENDED_OFFSET, HEADER_RESERVED, INITIAL_MXCSR, LEGACY_RESERVED, MXCSR,
    TILECFG_BYTES, XCOMP_BV, XSTATE_BV,
};
use crate::layout::Layout;

pub(super) fn clean(
    untrusted: &UntrustedArea<'_>,
    layout: &Layout,
    report: &mut Report,
) -> Result<Image<'static>, SanitizeError> {
    let source = Source::read(untrusted.bytes(), layout, report)?;
    for reserved in [LEGACY_RESERVED, HEADER_RESERVED] {
        if let Some(offset) = bytes::first_nonzero(source.area, reserved.clone()) {
            let region = bytes::range(source.area, reserved);
            report.add(Change::Reserved {
                offset,
                was: bytes::u8_at(source.area, offset),
                nonzero_bytes: region.iter().filter(|&&byte| byte != 0).count(),
            });
        }
    }

    let xfd = untrusted.registers.xfd & layout.xfd();
    let mut in_use = XFeatures::empty();
    for component in source.xstate_bv.components() {
        let bit = component.bit();
        if untrusted.guest.is_some_and(|guest| !guest.contains(bit)) {
            report.add(Change::OverReported { component });
        } else if !layout.user().contains(bit) {
            source.report_dropped(component, Misfit::Missing { component }, report);
        } else if xfd.contains(bit) {
            source.report_dropped(component, Misfit::Disabled { component, xfd }, report);
        } else {
            in_use |= bit;
        }
    }
    let mxcsr = source.mxcsr(report);
    source.require_places(in_use, report)?;
    if in_use.contains(XFeatures::XTILECFG)
        && let Some(config) = source.component(ComponentId::XTILECFG)
    {
        let config = bytes::array::<TILECFG_BYTES>(config, 0);
        if let Err(rule) = TileConfig::parse(&config, layout.palettes()) {
            in_use -= XFeatures::XTILECFG;
            report.add(Change::Lost(Misfit::TileConfig { rule }));
        }
    }
    // MXCSR needs a component with which it is loaded.
    if mxcsr != INITIAL_MXCSR && !in_use.intersects(MXCSR_HOLDERS) {
        in_use |= XFeatures::SSE;
    }
    Ok(Image::of_components(layout, in_use, mxcsr, |id| {
        let in_source = source.xstate_bv.contains(id.bit());
        in_source.then(|| source.component(id)).flatten()
    })?)
}

/// An untrusted area with a whole legacy region and header.
struct Source<'a> {
    area: &'a [u8],
    layout: &'a Layout,
    xstate_bv: XFeatures,
    /// XCOMP_BV without bit 63, in the compacted format.
    placed: Option<XFeatures>,
}

impl<'a> Source<'a> {
    fn read(
        area: &'a [u8],
        layout: &'a Layout,
        report: &mut Report,
    ) -> Result<Self, SanitizeError> {
        if area.len() < EXTENDED_OFFSET {
            return Err(SanitizeError::TooShort {
                required_bytes: EXTENDED_OFFSET,
                actual_bytes: area.len(),
            });
        }
        let xstate_bv = XFeatures::from_bits_retain(bytes::u64_at(area, XSTATE_BV));
        let xcomp_bv = bytes::u64_at(area, XCOMP_BV);
        let placed = XFeatures::from_bits_retain(xcomp_bv & !COMPACTED);
        let compacted = xcomp_bv & COMPACTED != 0;
        if compacted {
            let without_place = xstate_bv - placed;
            if !without_place.is_empty() {
                return Err(SanitizeError::WithoutPlace {
                    xstate_bv,
                    xcomp_bv: placed,
                    without_place,
                });
            }
            report.add(Change::Compacted { xcomp_bv: placed });
        } else if xcomp_bv != 0 {
            report.add(Change::XcompBv { was: xcomp_bv });
        }
        if xstate_bv.bits() >> ComponentId::COUNT != 0 {
            report.add(Change::Bit63);
        }
        Ok(Self {
            area,
            layout,
            xstate_bv,
            placed: compacted.then_some(placed),
        })
    }

    /// Returns where a component lies, or should lie; `None` where that is not known.
    fn place(&self, id: ComponentId) -> Option<Range<usize>> {
        let component = self.layout.component(id)?;
        match self.placed {
            Some(placed) if !XFeatures::LEGACY.contains(id.bit()) => {
                if self.unknown_before(id, placed) {
                    return None;
                }
                self.layout
                    .compacted(placed)
                    .find(|(component, _)| component.id() == id)
                    .map(|(_, range)| range)
            }
            _ => component.range(),
        }
    }

    /// Returns true when a component that the layout lacks comes before `id` in the compacted format.
    fn unknown_before(&self, id: ComponentId, placed: XFeatures) -> bool {
        self.unknown(placed)
            .components()
            .any(|unknown| unknown < id)
    }

    fn unknown(&self, placed: XFeatures) -> XFeatures {
        placed - self.layout.user() - self.layout.supervisor()
    }

    fn component(&self, id: ComponentId) -> Option<&'a [u8]> {
        self.area.get(self.place(id)?)
    }

    /// Reports a component in use that is not kept: lost, unless it is known to have its initial
    /// value.
    fn report_dropped(&self, component: ComponentId, misfit: Misfit, report: &mut Report) {
        let initial = self
            .component(component)
            .is_some_and(|bytes| is_initial(component, bytes));
        report.add(if initial {
            Change::Dropped { component }
        } else {
            Change::Lost(misfit)
        });
    }

    /// Returns MXCSR as the area loads it, with the bits that the layout has.
    fn mxcsr(&self, report: &mut Report) -> u32 {
        // The compacted format loads it with SSE alone (SDM Vol. 1 §13.8.2).
        let holders = match self.placed {
            Some(_) => XFeatures::SSE,
            None => MXCSR_HOLDERS,
        };
        let loaded = self.xstate_bv.intersects(holders);
        let mxcsr = bytes::u32_at(self.area, MXCSR);
        let mask = self.layout.mxcsr_mask();
        if mxcsr & !mask != 0 {
            report.add(if loaded {
                Change::Lost(Misfit::Mxcsr { mxcsr, mask })
            } else {
                Change::UnusedMxcsr { was: mxcsr, mask }
            });
        }
        if loaded { mxcsr & mask } else { INITIAL_MXCSR }
    }

    /// Checks that every component in use is within the area, which may end behind the last of them.
    fn require_places(&self, in_use: XFeatures, report: &mut Report) -> Result<(), SanitizeError> {
        let actual_bytes = self.area.len();
        for component in in_use.components() {
            match (self.place(component), self.placed) {
                (Some(range), _) if range.end > actual_bytes => {
                    return Err(SanitizeError::Truncated {
                        component,
                        required_bytes: range.end,
                        actual_bytes,
                    });
                }
                (Some(_), _) => {}
                (None, placed) => {
                    let xcomp_bv = placed.unwrap_or_default();
                    return Err(SanitizeError::PlaceUnknown {
                        xcomp_bv,
                        unknown: self.unknown(xcomp_bv),
                        component,
                    });
                }
            }
        }
        let required_bytes = self.layout.standard_size();
        if self.placed.is_none() && actual_bytes < required_bytes {
            report.add(Change::Extended {
                actual_bytes,
                required_bytes,
            });
        }
        Ok(())
    }
}

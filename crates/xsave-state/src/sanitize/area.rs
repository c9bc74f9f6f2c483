//! The bytes: what is in use and usable is copied to a blank area, and nothing else.

use super::report::{Change, Report};
use super::{Foreign, Policy, SanitizeError, Target};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::header::{COMPACTED, EXTENDED_OFFSET, RESERVED as HEADER_RESERVED, XCOMP_BV, XSTATE_BV};
use crate::image::Image;
use crate::initial::{MXCSR_HOLDERS, is_initial};
use crate::layout::Layout;
use crate::legacy::{INITIAL_MXCSR, MXCSR, RESERVED as LEGACY_RESERVED};
use crate::tile::{TILECFG_BYTES, TileConfig};

pub(super) fn clean(
    foreign: &Foreign<'_>,
    target: &Target,
    policy: Policy,
    report: &mut Report,
) -> Result<Image<'static>, SanitizeError> {
    let layout = target.layout();
    let source = Source::read(foreign.area, layout, report)?;
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

    let mut in_use = source.xstate_bv;
    if let Some(guest) = foreign.guest {
        let was = in_use;
        in_use &= guest;
        if in_use != was {
            report.add(Change::OverReported {
                was,
                now: in_use,
                guest,
            });
        }
    }
    let mxcsr = mxcsr(&source, layout, report);
    let was = in_use;
    in_use &= target.components();
    if in_use != was {
        report.add(Change::Unsupported {
            was,
            now: in_use,
            supported: target.components(),
            with_content: source.with_content(was - in_use),
        });
    }
    // By the layout: where only the kernel lacks IA32_XFD, the state was disabled all the same.
    let xfd = foreign.registers.xfd & layout.xfd();
    let was = in_use;
    in_use -= xfd;
    if in_use != was {
        report.add(Change::Disabled {
            was,
            now: in_use,
            xfd,
            with_content: source.with_content(was - in_use),
        });
    }
    source.require_places(in_use, report)?;
    if in_use.contains(XFeatures::XTILECFG)
        && let Some(config) = source.component(ComponentId::XTILECFG)
    {
        let was = bytes::array::<TILECFG_BYTES>(config, 0);
        if let Err(rule) = TileConfig::parse(&was, layout.palettes()) {
            in_use -= XFeatures::XTILECFG;
            report.add(Change::TileConfig { was, rule });
        }
    }
    // MXCSR needs a component with which it is loaded.
    if mxcsr != INITIAL_MXCSR && !in_use.intersects(MXCSR_HOLDERS) {
        in_use |= XFeatures::SSE;
    }

    let image = Image::of_components(layout, in_use, mxcsr, |id| {
        let in_source = source.xstate_bv.contains(id.bit());
        in_source.then(|| source.component(id)).flatten()
    })?;
    let initial = image.initial_valued();
    if initial.is_empty() || policy == Policy::Unchanged {
        return Ok(image);
    }
    report.add(Change::Released {
        was: image.xstate_bv(),
        now: image.xstate_bv() - initial,
    });
    Ok(image.without(initial))
}

/// MXCSR as the area loads it, with the bits that the target has.
fn mxcsr(source: &Source<'_>, layout: &Layout, report: &mut Report) -> u32 {
    // The compacted format loads it with SSE alone (SDM Vol. 1 §13.8.2).
    let holders = match source.placed {
        Some(_) => XFeatures::SSE,
        None => MXCSR_HOLDERS,
    };
    let loaded = source.xstate_bv.intersects(holders);
    let was = bytes::u32_at(source.area, MXCSR);
    let mask = layout.mxcsr_mask();
    let now = if loaded { was & mask } else { INITIAL_MXCSR };
    if was & !mask != 0 {
        report.add(Change::Mxcsr {
            was,
            now,
            mask,
            loaded,
        });
    }
    now
}

/// A foreign area with a whole legacy region and header.
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
        Ok(Self {
            area,
            layout,
            xstate_bv,
            placed: compacted.then_some(placed),
        })
    }

    /// Where a component lies, or should; `None` where that is not known.
    fn place(&self, id: ComponentId) -> Option<core::ops::Range<usize>> {
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

    /// Whether a component that the layout does not have comes before in the compacted format.
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

    /// Those of `components` that are not known to have their initial value.
    fn with_content(&self, components: XFeatures) -> XFeatures {
        let mut content = components;
        for id in components.components() {
            if self
                .component(id)
                .is_some_and(|bytes| is_initial(id, bytes))
            {
                content -= id.bit();
            }
        }
        content
    }

    /// Every component in use must be there. The area may end behind the last of them.
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

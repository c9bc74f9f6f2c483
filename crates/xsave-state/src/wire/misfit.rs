//! In what two layouts differ, in the words for what does not fit.

use crate::feature::ComponentId;
use crate::fit::Misfit;
use crate::layout::Layout;

/// Returns the first difference between two layouts that are not equal. A component that only the
/// target has is one of 0 bytes in the source.
#[cold]
pub(super) fn first_misfit(source: &Layout, target: &Layout) -> Misfit {
    let ids = (source.user() | target.user()).components();
    for component in ids {
        let user = |layout: &Layout| {
            let found = layout.component(component).copied();
            found.filter(|component| component.offset().is_some())
        };
        let (ours, theirs) = match (user(source), user(target)) {
            (ours, theirs) if ours == theirs => continue,
            (Some(ours), Some(theirs)) => (ours, theirs),
            (Some(_), None) => return Misfit::Missing { component },
            (None, theirs) => {
                return Misfit::Size {
                    component,
                    source_bytes: 0,
                    target_bytes: theirs.map_or(0, |theirs| theirs.size()),
                };
            }
        };
        if ours.size() != theirs.size() {
            return Misfit::Size {
                component,
                source_bytes: ours.size(),
                target_bytes: theirs.size(),
            };
        }
        if let (Some(source_offset), Some(target_offset)) = (ours.offset(), theirs.offset())
            && source_offset != target_offset
        {
            return Misfit::Offset {
                component,
                source_offset,
                target_offset,
            };
        }
        return Misfit::Properties { component };
    }
    let (ours, theirs) = (source.palettes(), target.palettes());
    if ours != theirs {
        let same = ours
            .iter()
            .zip(theirs)
            .take_while(|(ours, theirs)| ours == theirs);
        let palette = u8::try_from(same.count()).unwrap_or(u8::MAX);
        return Misfit::Palette {
            component: ComponentId::XTILECFG,
            palette: palette.saturating_add(1),
        };
    }
    Misfit::MxcsrMask {
        source_mask: source.mxcsr_mask(),
        target_mask: target.mxcsr_mask(),
    }
}

//! The sizes of XSAVE areas that legal values of XCR0 and IA32_XSS make.

use alloc::vec::Vec;

use xsave_state::format::EXTENDED_OFFSET;
use xsave_state::layout::MAX_AREA_BYTES;
use xsave_state::{ComponentId, Layout, XFeatures, xcr0};

/// The user components that XCR0 enables together, each set with all that it needs (SDM Vol. 1
/// §13.3): a legal XCR0 is x87 and any number of these.
fn groups(user: XFeatures) -> impl Iterator<Item = XFeatures> {
    let groups = xcr0::RULES.map(|rule| (rule.together, rule.together | rule.requires));
    let together: XFeatures = groups.iter().map(|(together, _)| *together).collect();
    groups
        .into_iter()
        .map(|(_, all)| all)
        .filter(move |&group| user.contains(group))
        .chain((user - together).components().map(ComponentId::bit))
}

/// What CPUID.(EAX=0DH,ECX=0):EBX is for the legal values of XCR0: the area ends where the last of
/// the enabled groups ends. SSE, which every layout has, stands for those with no other.
pub(crate) fn standard_sizes(layout: &Layout) -> impl Iterator<Item = usize> {
    groups(layout.user()).map(|group| layout.standard_size_of(group))
}

/// Whether CPUID.(EAX=0DH,ECX=1):EBX can be `reported` for some legal XCR0 | IA32_XSS within `all`.
///
/// Goes through the components in the order in which the compacted format has them, with the ends
/// that are possible so far: the same walk as [`Layout::compacted`], each group with and without.
/// Ends beyond `reported` lead nowhere, so that there are never more than 64 Ki of them, whatever
/// sizes a hostile table gives to its supervisor components.
pub(crate) fn is_compacted_size(layout: &Layout, all: XFeatures, reported: usize) -> bool {
    if reported > MAX_AREA_BYTES {
        return false;
    }
    // AVX-512 needs AVX: its components can follow only ends that AVX is part of.
    let without_avx = layout_ends(
        layout,
        all - XFeatures::AVX - XFeatures::AVX512,
        reported,
        false,
    );
    if without_avx.contains(&reported) {
        return true;
    }
    all.contains(XFeatures::AVX) && layout_ends(layout, all, reported, true).contains(&reported)
}

fn layout_ends(layout: &Layout, all: XFeatures, limit: usize, avx: bool) -> Vec<usize> {
    let mut ends = alloc::vec![EXTENDED_OFFSET];
    let mut rest = all - XFeatures::LEGACY;
    while let Some(id) = rest.components().next() {
        let group = xcr0::RULES
            .into_iter()
            .map(|rule| rule.together)
            .find(|group| group.contains(id.bit()))
            .unwrap_or(id.bit());
        rest -= group;
        if !all.contains(group) {
            continue;
        }
        // The numbers of a group are consecutive: nothing comes between its components.
        let with = |&end: &usize| {
            group
                .components()
                .filter_map(|id| layout.component(id))
                .fold(end, |end, component| {
                    let start = if component.is_aligned() {
                        end.next_multiple_of(64)
                    } else {
                        end
                    };
                    start.saturating_add(component.size())
                })
        };
        let added: Vec<usize> = ends.iter().map(with).filter(|&end| end <= limit).collect();
        if avx && id == ComponentId::AVX {
            ends = added;
        } else {
            ends.extend(added);
        }
        ends.sort();
        ends.dedup();
    }
    ends
}

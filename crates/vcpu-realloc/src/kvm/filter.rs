//! A VM's MSR filter as data, and the one that has IA32_XFD in it as well.
//!
//! KVM has one filter per VM, and each KVM_X86_SET_MSR_FILTER replaces it. A VMM that has one of its
//! own hands it in and gets back the merged one.

use alloc::vec;
use alloc::vec::Vec;

use kvm_bindings::{KVM_MSR_FILTER_MAX_BITMAP_SIZE, KVM_MSR_FILTER_MAX_RANGES};
use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRangeFlags};
use thiserror::Error;

const MAX_RANGES: usize = KVM_MSR_FILTER_MAX_RANGES as usize;
/// What the largest bitmap has bits for.
const MAX_COUNT: u32 = KVM_MSR_FILTER_MAX_BITMAP_SIZE * 8;
/// KVM reads bitmaps by longs (arch/x86/kvm/x86.c, `kvm_add_msr_filter`).
const LONG_BYTES: usize = 8;

/// An MSR filter: what KVM_X86_SET_MSR_FILTER takes, checked.
///
/// ```
/// use kvm_ioctls::{MsrFilterDefaultAction, MsrFilterRangeFlags};
/// use vcpu_realloc::kvm::{MsrFilter, MsrRange};
///
/// // A VMM that keeps its guest away from two registers of the RAPL interface.
/// let rapl = MsrRange::new(MsrFilterRangeFlags::READ, 0x610, 2, &[0b00])?;
/// let filter = MsrFilter::new(MsrFilterDefaultAction::ALLOW, vec![rapl])?;
/// assert!(!filter.allows(0x611, MsrFilterRangeFlags::READ));
/// assert!(filter.allows(0x611, MsrFilterRangeFlags::WRITE));
/// # Ok::<(), vcpu_realloc::kvm::FilterError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrFilter {
    default: MsrFilterDefaultAction,
    ranges: Vec<MsrRange>,
}

/// One range of a filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MsrRange {
    access: MsrFilterRangeFlags,
    base: u32,
    count: u32,
    /// Whole longs; a set bit allows.
    bitmap: Vec<u8>,
}

impl MsrRange {
    /// `count` registers from `base`, for reads, writes or both. Bit *n* of `bitmap`, from the lowest
    /// of the first byte, allows register `base + n`.
    ///
    /// # Errors
    ///
    /// KVM would not take it, or would never apply it.
    pub fn new(
        access: MsrFilterRangeFlags,
        base: u32,
        count: u32,
        bitmap: &[u8],
    ) -> Result<Self, FilterError> {
        if access.is_empty() || access.bits() & !MsrFilterRangeFlags::all().bits() != 0 {
            return Err(FilterError::Access {
                base,
                bits: access.bits(),
            });
        }
        if count == 0 || count > MAX_COUNT || base.checked_add(count).is_none() {
            return Err(FilterError::Count { base, count });
        }
        let needed = usize::try_from(count.div_ceil(8)).unwrap_or(usize::MAX);
        let Some(given) = bitmap.get(..needed) else {
            return Err(FilterError::Bitmap {
                base,
                needed_bytes: needed,
                actual_bytes: bitmap.len(),
            });
        };
        let mut longs = vec![0; needed.next_multiple_of(LONG_BYTES)];
        for (to, from) in longs.iter_mut().zip(given) {
            *to = *from;
        }
        Ok(Self {
            access,
            base,
            count,
            bitmap: longs,
        })
    }

    /// The first register.
    #[must_use]
    pub fn base(&self) -> u32 {
        self.base
    }

    /// How many registers.
    #[must_use]
    pub fn count(&self) -> u32 {
        self.count
    }

    /// Whether it is about reads, writes or both.
    #[must_use]
    pub fn access(&self) -> MsrFilterRangeFlags {
        self.access
    }

    /// A set bit allows. Padded to whole longs, because KVM reads those.
    #[must_use]
    pub fn bitmap(&self) -> &[u8] {
        &self.bitmap
    }

    /// The place of a register in the bitmap: byte and mask.
    fn bit(&self, index: u32) -> Option<(usize, u8)> {
        let place = index.checked_sub(self.base)?;
        if place >= self.count {
            return None;
        }
        let mask = 1u8.checked_shl(place % 8)?;
        Some((usize::try_from(place / 8).ok()?, mask))
    }

    /// What it says about a register. `None`: nothing.
    fn verdict(&self, index: u32, access: MsrFilterRangeFlags) -> Option<bool> {
        if !self.access.intersects(access) {
            return None;
        }
        let (byte, mask) = self.bit(index)?;
        Some(self.bitmap.get(byte)? & mask != 0)
    }

    fn deny(&mut self, index: u32) {
        if let Some((byte, mask)) = self.bit(index)
            && let Some(byte) = self.bitmap.get_mut(byte)
        {
            *byte &= !mask;
        }
    }

    /// The same with the register behind the last as well, denied; `None` where it cannot be.
    fn with_next(&self, index: u32) -> Option<Self> {
        if self.base.checked_add(self.count) != Some(index) {
            return None;
        }
        let mut bitmap = self.bitmap.clone();
        bitmap.push(0);
        let count = self.count.saturating_add(1);
        let mut range = Self::new(self.access, self.base, count, &bitmap).ok()?;
        range.deny(index);
        Some(range)
    }
}

impl MsrFilter {
    /// Of these ranges, of which the first that has a register decides, and for all others `default`.
    ///
    /// # Errors
    ///
    /// More than 16 ranges, or none with a default of denying, which KVM does not take.
    pub fn new(
        default: MsrFilterDefaultAction,
        ranges: Vec<MsrRange>,
    ) -> Result<Self, FilterError> {
        if ranges.len() > MAX_RANGES {
            return Err(FilterError::TooManyRanges {
                ranges: ranges.len(),
                limit: MAX_RANGES,
            });
        }
        if ranges.is_empty() && default == MsrFilterDefaultAction::DENY {
            return Err(FilterError::DeniesEverything);
        }
        Ok(Self { default, ranges })
    }

    /// The filter of a VM that has none.
    #[must_use]
    pub const fn none() -> Self {
        Self {
            default: MsrFilterDefaultAction::ALLOW,
            ranges: Vec::new(),
        }
    }

    /// What is done with registers in no range.
    #[must_use]
    pub fn default_action(&self) -> MsrFilterDefaultAction {
        self.default
    }

    /// The ranges in their order.
    #[must_use]
    pub fn ranges(&self) -> &[MsrRange] {
        &self.ranges
    }

    /// What KVM decides (arch/x86/kvm/x86.c, `kvm_msr_allowed`).
    #[must_use]
    pub fn allows(&self, index: u32, access: MsrFilterRangeFlags) -> bool {
        // The x2APIC's registers are never filtered.
        if (0x800..=0x8ff).contains(&index) {
            return true;
        }
        let mut verdicts = self.ranges.iter().filter_map(|r| r.verdict(index, access));
        verdicts
            .next()
            .unwrap_or(self.default == MsrFilterDefaultAction::ALLOW)
    }

    /// The same filter with writes of one more register denied. Every other access is decided as
    /// before.
    ///
    /// # Errors
    ///
    /// It denies them already: then somebody else wants them. Or all 16 ranges are in use and none of
    /// them can take the register on.
    pub fn with_write_denied(&self, index: u32) -> Result<Self, FilterError> {
        if !self.allows(index, MsrFilterRangeFlags::WRITE) {
            return Err(FilterError::DeniedAlready { index });
        }
        let mut merged = self.clone();
        if merged.ranges.len() < MAX_RANGES {
            // In front: the first range that has a register decides.
            let alone = MsrRange::new(MsrFilterRangeFlags::WRITE, index, 1, &[0])?;
            merged.ranges.insert(0, alone);
            return Ok(merged);
        }
        let writes = MsrFilterRangeFlags::WRITE;
        let deciding = merged
            .ranges
            .iter_mut()
            .find(|range| range.verdict(index, writes).is_some());
        match deciding {
            Some(range) if range.access == writes => {
                range.deny(index);
                return Ok(merged);
            }
            // It is about reads as well, which are not ours.
            Some(_) => {}
            None => {
                for range in &mut merged.ranges {
                    if range.access == writes
                        && let Some(longer) = range.with_next(index)
                    {
                        *range = longer;
                        return Ok(merged);
                    }
                }
            }
        }
        Err(FilterError::NoRoom {
            index,
            limit: MAX_RANGES,
        })
    }
}

impl Default for MsrFilter {
    fn default() -> Self {
        Self::none()
    }
}

/// A filter that cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum FilterError {
    /// A range is about neither reads nor writes, or about something else.
    #[error("the range at MSR {base:#x} has access bits {bits:#x}; read is 1 and write is 2")]
    Access {
        /// Its first register.
        base: u32,
        /// The bits.
        bits: u32,
    },
    /// A range has no register, more than its bitmap can have, or goes beyond the last MSR.
    #[error("the range at MSR {base:#x} has {count} registers; 1 to 12288 are possible")]
    Count {
        /// Its first register.
        base: u32,
        /// How many.
        count: u32,
    },
    /// A bitmap has fewer bits than its range has registers.
    #[error(
        "the bitmap of the range at MSR {base:#x} has {actual_bytes} bytes; it needs {needed_bytes}"
    )]
    Bitmap {
        /// The first register of the range.
        base: u32,
        /// One bit per register.
        needed_bytes: usize,
        /// What was given.
        actual_bytes: usize,
    },
    /// KVM takes 16.
    #[error("{ranges} ranges; KVM takes {limit}")]
    TooManyRanges {
        /// How many.
        ranges: usize,
        /// KVM_MSR_FILTER_MAX_RANGES.
        limit: usize,
    },
    /// No range and a default of denying: KVM does not take that.
    #[error("a filter that denies every MSR; KVM does not take one without ranges")]
    DeniesEverything,
    /// The VMM's own filter denies writes of the register, so they are not this crate's to handle.
    #[error(
        "the VMM's own filter denies writes of MSR {index:#x}: allow them, or handle them alone"
    )]
    DeniedAlready {
        /// The register.
        index: u32,
    },
    /// There is no range left.
    #[error(
        "all {limit} ranges are in use, and none can take on writes of MSR {index:#x}: free one, or \
         have one for writes alone that covers the register or ends in front of it"
    )]
    NoRoom {
        /// The register.
        index: u32,
        /// KVM_MSR_FILTER_MAX_RANGES.
        limit: usize,
    },
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const READ: MsrFilterRangeFlags = MsrFilterRangeFlags::READ;
    const WRITE: MsrFilterRangeFlags = MsrFilterRangeFlags::WRITE;
    const BOTH: MsrFilterRangeFlags = READ.union(WRITE);
    const ALLOW: MsrFilterDefaultAction = MsrFilterDefaultAction::ALLOW;
    const XFD: u32 = 0x1c4;

    fn range(access: MsrFilterRangeFlags, base: u32, count: u32, bitmap: &[u8]) -> MsrRange {
        MsrRange::new(access, base, count, bitmap).unwrap()
    }

    fn sixteen(first: MsrRange) -> MsrFilter {
        let more = (0..15).map(|i| range(BOTH, 0x1000 + i * 16, 8, &[0x55]));
        MsrFilter::new(ALLOW, [first].into_iter().chain(more).collect()).unwrap()
    }

    #[test]
    fn without_a_filter_one_range_is_added() {
        let merged = MsrFilter::none().with_write_denied(XFD).unwrap();
        assert_eq!(merged.ranges(), [range(WRITE, XFD, 1, &[0])]);
        assert_eq!(merged.ranges()[0].bitmap().len(), 8, "KVM reads longs");
        assert!(merged.allows(XFD, READ));
    }

    #[test]
    fn in_a_full_filter_a_range_for_writes_takes_it_on() {
        let covering = sixteen(range(WRITE, 0x1c0, 8, &[0xff]));
        let merged = covering.with_write_denied(XFD).unwrap();
        assert_eq!(merged.ranges()[0], range(WRITE, 0x1c0, 8, &[0xef]));
        let ending = sixteen(range(WRITE, 0x1bc, 8, &[0xff]));
        let merged = ending.with_write_denied(XFD).unwrap();
        assert_eq!(merged.ranges()[0], range(WRITE, 0x1bc, 9, &[0xff, 0]));
    }

    #[test]
    fn a_full_filter_that_cannot_take_it_on_is_an_error() {
        let none = FilterError::NoRoom {
            index: XFD,
            limit: 16,
        };
        for first in [
            range(BOTH, 0x1c0, 8, &[0xff]),
            range(READ, 0x1c0, 8, &[0xff]),
            range(WRITE, 0x10, 8, &[0xff]),
        ] {
            assert_eq!(sixteen(first).with_write_denied(XFD), Err(none));
        }
        // The longest possible range cannot become longer.
        let longest = range(WRITE, XFD - 12, 12, &[0xff; 2]);
        assert!(sixteen(longest).with_write_denied(XFD).is_ok());
        let base = 0x4000_0000;
        let longest = range(WRITE, base, MAX_COUNT, &vec![0xff; 0x600]);
        assert!(longest.with_next(base + MAX_COUNT).is_none());
    }

    #[test]
    fn a_filter_that_denies_the_register_itself_is_an_error() {
        let denied = Err(FilterError::DeniedAlready { index: XFD });
        let own = range(WRITE, 0x1c0, 8, &[0]);
        let filter = MsrFilter::new(ALLOW, vec![own]).unwrap();
        assert_eq!(filter.with_write_denied(XFD), denied);
        // A list of what is allowed, which lacks it.
        let list = range(BOTH, 0x10, 1, &[1]);
        let filter = MsrFilter::new(MsrFilterDefaultAction::DENY, vec![list]).unwrap();
        assert_eq!(filter.with_write_denied(XFD), denied);
    }

    #[test]
    fn what_kvm_would_not_take_has_its_name() {
        let new = |access, base, count, bytes: usize| {
            MsrRange::new(access, base, count, &vec![0; bytes]).unwrap_err()
        };
        let none = MsrFilterRangeFlags::empty();
        assert!(matches!(new(none, 1, 1, 1), FilterError::Access { .. }));
        for (base, count) in [(1, 0), (1, MAX_COUNT + 1), (u32::MAX, 1), (u32::MAX - 3, 4)] {
            let error = new(READ, base, count, 4096);
            assert_eq!(error, FilterError::Count { base, count });
        }
        assert_eq!(
            new(READ, 1, 9, 1),
            FilterError::Bitmap {
                base: 1,
                needed_bytes: 2,
                actual_bytes: 1
            }
        );
        let many = vec![range(READ, 1, 1, &[0]); 17];
        assert!(matches!(
            MsrFilter::new(ALLOW, many),
            Err(FilterError::TooManyRanges { ranges: 17, .. })
        ));
        assert_eq!(
            MsrFilter::new(MsrFilterDefaultAction::DENY, vec![]),
            Err(FilterError::DeniesEverything)
        );
    }

    fn any_range() -> impl Strategy<Value = MsrRange> {
        let access = prop::sample::select(&[READ, WRITE, BOTH][..]);
        let bitmap = prop::collection::vec(any::<u8>(), 5);
        (access, 0x190u32..0x1e0, 1u32..40, bitmap)
            .prop_map(|(access, base, count, bitmap)| range(access, base, count, &bitmap))
    }

    proptest! {
        /// Nothing but writes of the register is decided otherwise.
        #[test]
        fn merging_changes_one_decision(
            deny in any::<bool>(),
            ranges in prop_oneof![
                prop::collection::vec(any_range(), 1..8),
                prop::collection::vec(any_range(), 16),
            ],
        ) {
            let default = if deny { MsrFilterDefaultAction::DENY } else { ALLOW };
            let own = MsrFilter::new(default, ranges).unwrap();
            match own.with_write_denied(XFD) {
                Ok(merged) => {
                    prop_assert!(own.allows(XFD, WRITE));
                    prop_assert!(merged.ranges().len() <= 16);
                    for index in 0x180..0x220 {
                        for access in [READ, WRITE] {
                            let ours = index == XFD && access == WRITE;
                            let expected = own.allows(index, access) && !ours;
                            prop_assert_eq!(merged.allows(index, access), expected);
                        }
                    }
                }
                Err(FilterError::DeniedAlready { .. }) => {
                    prop_assert!(!own.allows(XFD, WRITE));
                }
                Err(error) => {
                    prop_assert!(matches!(error, FilterError::NoRoom { .. }), "{error}");
                    prop_assert_eq!(own.ranges().len(), 16);
                }
            }
        }
    }
}

//! A checked XSAVE area in the standard format, which KVM_GET_XSAVE2 writes and KVM_SET_XSAVE reads
//! (SDM Vol. 1 §13.4).

use alloc::borrow::Cow;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use super::header::{Header, HeaderError};
use super::initial::MXCSR_HOLDERS;
use super::legacy::{Legacy, LegacyError};
use super::tile::{TileConfig, TileConfigError, TileData};
use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::format::{INITIAL_FCW, INITIAL_MXCSR, MXCSR, MXCSR_MASK, TILECFG_BYTES, XMM, XSTATE_BV};
#[cfg(all(feature = "kvm", target_arch = "x86_64"))]
use crate::layout::Component;
use crate::layout::Layout;

/// A valid standard-format area over borrowed or owned bytes.
///
/// XRSTOR and KVM_SET_XSAVE accept every image on a processor of its [`Layout`], and LDTILECFG accepts
/// its tile configuration. One more rule is this crate's own: the reserved bytes of the legacy region
/// are zero. An image does not know XCR0 and IA32_XFD: see [`ExtendedState`](crate::ExtendedState).
///
/// Two images are equal when they have the same layout and describe the same state: bytes of initial
/// components, of gaps and of the software region are ignored.
///
/// Processors can differ in what they save of x87: AMD's Zen 4 stores FOP, FIP and FDP as 0 unless an
/// exception is pending (FSW.ES), so two captures of one guest may differ there without a fault.
///
/// ```
/// use xsave_state::{ComponentId, Image, ImageError, XFeatures};
/// # use xsave_state::{Component, Layout};
///
/// let layout = Layout::from_parts([Component::user(ComponentId::AVX, 576, 256)], []).unwrap();
/// let mut area = vec![0; 4096];
/// area[512] = 0b111; // XSTATE_BV: x87, SSE, AVX
/// area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
/// area[576] = 42; // YMM0, bit 128 and up
///
/// let image = Image::parse(&area, &layout)?;
/// assert_eq!(image.component(ComponentId::AVX).unwrap()[0], 42);
///
/// area[513] = 0b10; // PKRU, which this layout lacks
/// assert!(matches!(Image::parse(&area, &layout), Err(ImageError::Unsupported { .. })));
/// # Ok::<(), ImageError>(())
/// ```
#[derive(Clone)]
pub struct Image<'a> {
    /// Exactly `layout.standard_size()` bytes.
    area: Cow<'a, [u8]>,
    layout: Layout,
    xstate_bv: XFeatures,
}

impl<'a> Image<'a> {
    /// Validates and borrows the first [`standard_size`](Layout::standard_size) bytes of `area`.
    /// Trailing bytes are ignored: KVM's area has at least 4,096.
    ///
    /// The check reads the legacy region, the header and TILECFG, and copies nothing.
    ///
    /// # Errors
    ///
    /// The first rule that the area breaks, with both values.
    #[inline]
    pub fn parse(area: &'a [u8], layout: &Layout) -> Result<Self, ImageError> {
        let xstate_bv = check(area, layout)?;
        Ok(Self {
            area: Cow::Borrowed(bytes::prefix(area, layout.standard_size())),
            layout: layout.clone(),
            xstate_bv,
        })
    }

    /// Validates `area` and keeps it without a copy. Trailing bytes are cut off.
    ///
    /// # Errors
    ///
    /// As [`parse`](Self::parse).
    pub fn from_vec(mut area: Vec<u8>, layout: &Layout) -> Result<Image<'static>, ImageError> {
        let xstate_bv = check(&area, layout)?;
        area.truncate(layout.standard_size());
        Ok(Image {
            area: Cow::Owned(area),
            layout: layout.clone(),
            xstate_bv,
        })
    }

    /// Returns an image with all components in their initial state, as after reset.
    #[must_use]
    pub fn initial(layout: &Layout) -> Image<'static> {
        Image {
            area: Cow::Owned(blank(layout.standard_size())),
            layout: layout.clone(),
            xstate_bv: XFeatures::empty(),
        }
    }

    /// Builds an image with the components `in_use` and their bytes from `component`, each cut to its
    /// size and padded with zeros. All other components are initial.
    pub(crate) fn of_components<'b>(
        layout: &Layout,
        in_use: XFeatures,
        mxcsr: u32,
        component: impl Fn(ComponentId) -> Option<&'b [u8]>,
    ) -> Result<Image<'static>, ImageError> {
        let mut area = blank(layout.standard_size());
        for id in in_use.components() {
            if let Some(content) = component(id)
                && let Some(range) = layout.component(id).and_then(|c| c.range())
            {
                bytes::write(&mut area, range.start, bytes::prefix(content, range.len()));
            }
        }
        // Both lie in the midst of x87's bytes.
        bytes::write(&mut area, MXCSR, &mxcsr.to_le_bytes());
        bytes::write(&mut area, MXCSR_MASK, &[0; 4]);
        bytes::write(&mut area, XSTATE_BV, &in_use.bits().to_le_bytes());
        let xstate_bv = check(&area, layout)?;
        Ok(Image {
            area: Cow::Owned(area),
            layout: layout.clone(),
            xstate_bv,
        })
    }

    /// Returns the area: [`standard_size`](Layout::standard_size) bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.area
    }

    /// Returns the layout of the area.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Returns the components in use. All others are in their initial state.
    #[must_use]
    pub fn xstate_bv(&self) -> XFeatures {
        self.xstate_bv
    }

    /// Returns the bytes of a component, or `None` where it is in its initial state or not in the
    /// layout. Bytes 24 to 31 of x87's 160 are MXCSR and its mask: they belong to SSE and AVX, see
    /// [`mxcsr`](Self::mxcsr).
    #[must_use]
    pub fn component(&self, id: ComponentId) -> Option<&[u8]> {
        if !self.xstate_bv.contains(id.bit()) {
            return None;
        }
        self.area.get(self.layout.component(id)?.range()?)
    }

    /// Iterates over the components in use.
    #[cfg(all(feature = "kvm", target_arch = "x86_64"))]
    pub(crate) fn components_in_use(&self) -> impl Iterator<Item = &Component> {
        let in_use = self.xstate_bv.components();
        in_use.filter_map(|id| self.layout.component(id))
    }

    /// Returns the legacy region as it is. [`xstate_bv`](Self::xstate_bv) tells what is in use.
    #[must_use]
    pub fn legacy(&self) -> Legacy<'_> {
        Legacy::of(&self.area)
    }

    /// Returns MXCSR of the vCPU. It is saved with SSE or AVX; with neither in use it is initial,
    /// 0x1f80 (SDM Vol. 1 §13.7, §13.8).
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        if self.xstate_bv.intersects(MXCSR_HOLDERS) {
            self.legacy().mxcsr()
        } else {
            INITIAL_MXCSR
        }
    }

    /// Returns XSTATE_BV for a format that loads MXCSR with SSE alone, as the compacted one does
    /// (SDM Vol. 1 §13.8.2, §13.10): SSE counts as in use where MXCSR is not initial.
    pub(crate) fn xstate_bv_with_mxcsr(&self) -> XFeatures {
        if self.mxcsr() == INITIAL_MXCSR {
            self.xstate_bv
        } else {
            self.xstate_bv | XFeatures::SSE
        }
    }

    /// Returns the tile configuration, or `None` where it is initial.
    #[must_use]
    pub fn tile_config(&self) -> Option<TileConfig> {
        let bytes = self.component(ComponentId::XTILECFG)?.first_chunk()?;
        // It was checked when the image was made.
        TileConfig::parse(bytes, self.layout.palettes()).ok()?
    }

    /// Returns the tiles, with the geometry of the palette in use (the lowest where TILECFG is
    /// initial; none where CPUID has none), or `None` where the tiles are initial.
    #[must_use]
    pub fn tile_data(&self) -> Option<TileData<'_>> {
        let bytes = self.component(ComponentId::XTILEDATA)?;
        let palette = match self.tile_config() {
            Some(config) => Some(*config.palette()),
            None => self.layout.palettes().first().copied(),
        };
        Some(TileData::new(bytes, palette))
    }

    /// Returns the area as the 32-bit words of `kvm_xsave`: its `region`, and `extra` behind it, empty
    /// for an area of up to 4,096 bytes. It is the counterpart of
    /// [`UntrustedArea::from_words`](crate::UntrustedArea::from_words).
    #[must_use]
    pub fn to_words(&self) -> ([u32; 1024], Vec<u32>) {
        let mut region = [0; 1024];
        let mut words = self.area.chunks(4).map(|word| match word.first_chunk() {
            Some(word) => u32::from_le_bytes(*word),
            // The length of an area need not be a multiple of 4.
            None => {
                let mut padded = [0; 4];
                bytes::write(&mut padded, 0, word);
                u32::from_le_bytes(padded)
            }
        });
        for (to, word) in region.iter_mut().zip(&mut words) {
            *to = word;
        }
        (region, words.collect())
    }

    /// Converts this image into one that owns its bytes, copying them if borrowed.
    #[must_use]
    pub fn into_owned(self) -> Image<'static> {
        Image {
            area: Cow::Owned(self.area.into_owned()),
            layout: self.layout,
            xstate_bv: self.xstate_bv,
        }
    }

    /// Puts `features` into their initial state: clears their XSTATE_BV bits and zeroes their bytes.
    /// Copies borrowed bytes only if that changes something.
    #[must_use]
    pub fn without(mut self, features: XFeatures) -> Self {
        let dropped = self.xstate_bv & features;
        if dropped.is_empty() {
            return self;
        }
        let mxcsr = self.mxcsr();
        self.xstate_bv -= dropped;
        let area = self.area.to_mut();
        for component in dropped.components() {
            if let Some(range) = self.layout.component(component).and_then(|c| c.range()) {
                bytes::fill(area, range, 0);
            }
        }
        // x87's bytes have MXCSR in their midst. It is kept while SSE or AVX needs it.
        let keeps = self.xstate_bv.intersects(MXCSR_HOLDERS);
        let mxcsr = if keeps { mxcsr } else { INITIAL_MXCSR };
        bytes::write(area, MXCSR, &mxcsr.to_le_bytes());
        if dropped.contains(XFeatures::X87) {
            bytes::write(area, 0, &INITIAL_FCW.to_le_bytes());
        }
        bytes::write(area, XSTATE_BV, &self.xstate_bv.bits().to_le_bytes());
        self
    }
}

impl PartialEq for Image<'_> {
    fn eq(&self, other: &Self) -> bool {
        let x87 = |image: &Self| {
            let area = image.as_bytes();
            let used = image.xstate_bv.contains(XFeatures::X87);
            used.then(|| {
                (
                    bytes::array::<MXCSR>(area, 0),
                    bytes::array::<{ XMM.start - 32 }>(area, 32),
                )
            })
        };
        self.layout == other.layout
            && self.xstate_bv == other.xstate_bv
            && self.mxcsr() == other.mxcsr()
            && x87(self) == x87(other)
            && (self.xstate_bv - XFeatures::X87)
                .components()
                .all(|id| self.component(id) == other.component(id))
    }
}

impl Eq for Image<'_> {}

impl fmt::Debug for Image<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image")
            .field("xstate_bv", &format_args!("{}", self.xstate_bv))
            .field("bytes", &self.area.len())
            .finish_non_exhaustive()
    }
}

/// Returns an area with everything initial, in both formats once XCOMP_BV is set.
pub(super) fn blank(len: usize) -> Vec<u8> {
    let mut area = vec![0; len];
    bytes::write(&mut area, 0, &INITIAL_FCW.to_le_bytes());
    bytes::write(&mut area, MXCSR, &INITIAL_MXCSR.to_le_bytes());
    area
}

pub(super) fn require_length(area: &[u8], required_bytes: usize) -> Result<(), ImageError> {
    if area.len() < required_bytes {
        return Err(ImageError::TooShort {
            required_bytes,
            actual_bytes: area.len(),
        });
    }
    Ok(())
}

/// Checks all rules of the standard format, and returns XSTATE_BV.
#[inline]
fn check(area: &[u8], layout: &Layout) -> Result<XFeatures, ImageError> {
    require_length(area, layout.standard_size())?;
    let Header {
        xstate_bv,
        xcomp_bv,
    } = Header::parse(area)?;
    if xcomp_bv != 0 {
        return Err(ImageError::Compacted { xcomp_bv });
    }
    if !layout.user().contains(xstate_bv) {
        return Err(ImageError::Unsupported {
            xstate_bv,
            supported: layout.user(),
            unsupported: xstate_bv - layout.user(),
        });
    }
    Legacy::parse(area, layout.mxcsr_mask())?;
    if xstate_bv.contains(XFeatures::XTILECFG)
        && let Some(component) = layout.component(ComponentId::XTILECFG)
        && let Some(offset) = component.offset()
    {
        let tilecfg = bytes::array::<TILECFG_BYTES>(area, offset);
        TileConfig::check(&tilecfg, layout.palettes())?;
    }
    Ok(xstate_bv)
}

/// Errors from checking a standard-format area.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The area ends before the layout's last component does.
    #[error("the area has {actual_bytes} bytes; its CPUID requires {required_bytes}")]
    TooShort {
        /// By the layout.
        required_bytes: usize,
        /// The length of the area.
        actual_bytes: usize,
    },
    /// XCOMP_BV is not 0.
    #[error("XCOMP_BV is {xcomp_bv:#x}; it must be 0 in the standard format, which KVM reads")]
    Compacted {
        /// Bytes 520 to 527.
        xcomp_bv: u64,
    },
    /// XSTATE_BV has components that the layout lacks.
    #[error("XSTATE_BV is {xstate_bv}; it has {unsupported}, but only {supported} is supported")]
    Unsupported {
        /// Bytes 512 to 519.
        xstate_bv: XFeatures,
        /// The user components of the layout.
        supported: XFeatures,
        /// The components that are not supported.
        unsupported: XFeatures,
    },
    /// The header is not valid.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// The legacy region is not valid.
    #[error(transparent)]
    Legacy(#[from] LegacyError),
    /// TILECFG is in use and not valid.
    #[error(transparent)]
    TileConfig(#[from] TileConfigError),
}

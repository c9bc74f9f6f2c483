//! A standard-format XSAVE area that has been checked: what KVM_GET_XSAVE2 gives and KVM_SET_XSAVE
//! takes (SDM Vol. 1 §13.4).

use alloc::borrow::Cow;
use alloc::vec;
use alloc::vec::Vec;
use core::fmt;

use thiserror::Error;

use crate::bytes;
use crate::feature::{ComponentId, XFeatures};
use crate::header::{COMPACTED, Header, HeaderError, XCOMP_BV, XSTATE_BV};
use crate::initial::MXCSR_HOLDERS;
use crate::layout::Layout;
use crate::legacy::{INITIAL_FCW, INITIAL_MXCSR, Legacy, LegacyError, MXCSR, MXCSR_MASK, XMM};
use crate::tile::{TILECFG_BYTES, TileConfig, TileConfigError, TileData};

/// A valid standard-format area over borrowed or owned bytes.
///
/// It cannot exist in a form that XRSTOR or KVM_SET_XSAVE would refuse on a processor of its
/// [`Layout`], nor with a tile configuration that LDTILECFG would refuse. The crate's own rule beyond
/// that: the reserved bytes of the legacy region are zero. What it does not know is XCR0 and
/// IA32_XFD: see [`ExtendedState`](crate::ExtendedState).
///
/// Two images are equal when they have the same layout and describe the same state: bytes of
/// components that are initial, of gaps and of the software region mean nothing.
///
/// ```
/// use xsave_state::{ComponentId, Image, ImageError, XFeatures};
/// # fn cpuid(leaf: u32, subleaf: u32) -> [u32; 4] {
/// #     match (leaf, subleaf) {
/// #         (0, _) => [0xd, 0, 0, 0],
/// #         (0xd, 0) => [0x7, 832, 832, 0],
/// #         (0xd, 1) => [0xf, 832, 0, 0],
/// #         (0xd, 2) => [256, 576, 0, 0],
/// #         _ => [0; 4],
/// #     }
/// # }
/// # let layout = xsave_state::Layout::from_cpuid(cpuid).unwrap();
///
/// let mut area = vec![0; 4096];
/// area[512] = 0b111; // XSTATE_BV: x87, SSE, AVX
/// area[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
/// area[576] = 42; // YMM0, bit 128 and up
///
/// let image = Image::parse(&area, &layout)?;
/// assert_eq!(image.component(ComponentId::AVX).unwrap()[0], 42);
///
/// area[513] = 0b10; // PKRU, which this layout does not have
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
    /// Checks `area`, which may be longer than the layout needs: KVM's has at least 4,096 bytes.
    /// What is beyond the layout's [`standard_size`](Layout::standard_size) is left out.
    ///
    /// The check reads the legacy region, the header and TILECFG. It does not read the rest, and
    /// copies nothing.
    ///
    /// # Errors
    ///
    /// The first rule that the area breaks. Every error has both values.
    #[inline]
    pub fn parse(area: &'a [u8], layout: &Layout) -> Result<Self, ImageError> {
        let xstate_bv = check(area, layout)?;
        Ok(Self {
            area: Cow::Borrowed(bytes::prefix(area, layout.standard_size())),
            layout: layout.clone(),
            xstate_bv,
        })
    }

    /// The same for an area of its own: what is beyond the layout's size is cut off.
    pub(crate) fn from_area(
        mut area: Vec<u8>,
        layout: &Layout,
    ) -> Result<Image<'static>, ImageError> {
        let xstate_bv = check(&area, layout)?;
        area.truncate(layout.standard_size());
        Ok(Image {
            area: Cow::Owned(area),
            layout: layout.clone(),
            xstate_bv,
        })
    }

    /// All components in their initial state, as after reset.
    #[must_use]
    pub fn initial(layout: &Layout) -> Image<'static> {
        Image {
            area: Cow::Owned(blank(layout.standard_size())),
            layout: layout.clone(),
            xstate_bv: XFeatures::empty(),
        }
    }

    /// An image with `in_use` components and their bytes from `component`, each cut to its size;
    /// zeros where there are none. Everything else is initial.
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
        // They lie in the midst of x87's bytes.
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

    /// The area: [`standard_size`](Layout::standard_size) bytes.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.area
    }

    /// Where the components lie.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The components that are in use: all others are in their initial state.
    #[must_use]
    pub fn xstate_bv(&self) -> XFeatures {
        self.xstate_bv
    }

    /// The bytes of a component, or `None` where it is in its initial state or the layout does not
    /// have it. Bytes 24 to 31 of x87's 160 are MXCSR and its mask: they belong to SSE and AVX, see
    /// [`mxcsr`](Self::mxcsr).
    #[must_use]
    pub fn component(&self, id: ComponentId) -> Option<&[u8]> {
        if !self.xstate_bv.contains(id.bit()) {
            return None;
        }
        self.area.get(self.layout.component(id)?.range()?)
    }

    /// The legacy region, as it is: check [`xstate_bv`](Self::xstate_bv) for what is in use.
    #[must_use]
    pub fn legacy(&self) -> Legacy<'_> {
        Legacy::of(&self.area)
    }

    /// MXCSR of the vCPU. It is saved with SSE or AVX; with neither in use it is initial, 0x1f80
    /// (SDM Vol. 1 §13.7, §13.8).
    #[must_use]
    pub fn mxcsr(&self) -> u32 {
        if self.xstate_bv.intersects(MXCSR_HOLDERS) {
            self.legacy().mxcsr()
        } else {
            INITIAL_MXCSR
        }
    }

    /// What XSTATE_BV has to be where MXCSR is loaded with SSE alone, as from the compacted format
    /// (SDM Vol. 1 §13.8.2, §13.10): SSE counts as in use where MXCSR is not initial.
    pub(crate) fn xstate_bv_with_mxcsr(&self) -> XFeatures {
        if self.mxcsr() == INITIAL_MXCSR {
            self.xstate_bv
        } else {
            self.xstate_bv | XFeatures::SSE
        }
    }

    /// The tile configuration, or `None` where it is initial.
    #[must_use]
    pub fn tile_config(&self) -> Option<TileConfig> {
        let bytes = self.component(ComponentId::XTILECFG)?.first_chunk()?;
        // It has been checked: an error cannot be.
        TileConfig::parse(bytes, self.layout.palettes()).ok()?
    }

    /// The tiles, by the palette in use (the lowest where TILECFG is initial), or `None` where they
    /// are initial.
    #[must_use]
    pub fn tile_data(&self) -> Option<TileData<'_>> {
        let bytes = self.component(ComponentId::XTILEDATA)?;
        let palette = match self.tile_config() {
            Some(config) => *config.palette(),
            None => *self.layout.palettes().first()?,
        };
        Some(TileData::new(bytes, palette))
    }

    /// The same with its own bytes. Copies them where they are borrowed.
    #[must_use]
    pub fn into_owned(self) -> Image<'static> {
        Image {
            area: Cow::Owned(self.area.into_owned()),
            layout: self.layout,
            xstate_bv: self.xstate_bv,
        }
    }

    /// The same with `features` in their initial state: their XSTATE_BV bits clear and their bytes
    /// zero. Copies borrowed bytes only where that changes something.
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

    /// Reads an area of the compacted format, as XSAVEC and XSAVES write it
    /// (SDM Vol. 1 §13.4.3).
    ///
    /// Supervisor components may have a place in it, but must be initial: an image has none.
    ///
    /// # Errors
    ///
    /// The first rule that the area breaks, of those which make XRSTOR or XRSTORS raise #GP, and of
    /// those of [`parse`](Self::parse).
    pub fn from_compacted(area: &[u8], layout: &Layout) -> Result<Image<'static>, CompactedError> {
        let minimum = layout.compacted_size(XFeatures::empty());
        require_length(area, minimum)?;
        let header = Header::parse(area).map_err(ImageError::from)?;
        if !header.is_compacted() {
            return Err(CompactedError::Standard {
                xcomp_bv: header.xcomp_bv,
            });
        }
        let placed = XFeatures::from_bits_retain(header.xcomp_bv & !COMPACTED);
        let known = layout.user() | layout.supervisor();
        if !known.contains(placed) {
            return Err(CompactedError::Unsupported {
                xcomp_bv: placed,
                supported: known,
                unsupported: placed - known,
            });
        }
        let xstate_bv = header.xstate_bv;
        if !placed.contains(xstate_bv) {
            return Err(CompactedError::WithoutPlace {
                xstate_bv,
                xcomp_bv: placed,
                without_place: xstate_bv - placed,
            });
        }
        if xstate_bv.intersects(layout.supervisor()) {
            return Err(CompactedError::Supervisor {
                supervisor: xstate_bv & layout.supervisor(),
            });
        }
        require_length(area, layout.compacted_size(placed))?;

        let mut standard = blank(layout.standard_size());
        let x87 = xstate_bv.contains(XFeatures::X87);
        let sse = xstate_bv.contains(XFeatures::SSE);
        if x87 {
            bytes::copy(area, 0..MXCSR, &mut standard, 0);
            bytes::copy(area, 32..XMM.start, &mut standard, 32);
        }
        if sse {
            bytes::copy(area, MXCSR..32, &mut standard, MXCSR);
            bytes::copy(area, XMM, &mut standard, XMM.start);
        }
        for (component, range) in layout.compacted(placed) {
            if let Some(offset) = component.offset()
                && xstate_bv.contains(component.id().bit())
            {
                bytes::copy(area, range, &mut standard, offset);
            }
        }
        bytes::write(&mut standard, XSTATE_BV, &xstate_bv.bits().to_le_bytes());
        Ok(Self::from_area(standard, layout)?)
    }

    /// The same state in the compacted format: XCOMP_BV names the components in use, and SSE with
    /// them where MXCSR is not initial, because this format keeps MXCSR with SSE alone
    /// (SDM Vol. 1 §13.10).
    #[must_use]
    pub fn to_compacted(&self) -> Vec<u8> {
        let xstate_bv = self.xstate_bv_with_mxcsr();
        let mut compacted = blank(self.layout.compacted_size(xstate_bv));
        if xstate_bv.contains(XFeatures::X87) {
            bytes::copy(&self.area, 0..MXCSR, &mut compacted, 0);
            bytes::copy(&self.area, 32..XMM.start, &mut compacted, 32);
        }
        if xstate_bv.contains(XFeatures::SSE) {
            bytes::copy(&self.area, MXCSR..32, &mut compacted, MXCSR);
        }
        if let Some(xmm) = self.component(ComponentId::SSE) {
            bytes::write(&mut compacted, XMM.start, xmm);
        }
        for (component, range) in self.layout.compacted(xstate_bv) {
            if let Some(content) = self.component(component.id()) {
                bytes::write(&mut compacted, range.start, content);
            }
        }
        bytes::write(&mut compacted, XSTATE_BV, &xstate_bv.bits().to_le_bytes());
        let xcomp_bv = xstate_bv.bits() | COMPACTED;
        bytes::write(&mut compacted, XCOMP_BV, &xcomp_bv.to_le_bytes());
        compacted
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

/// An area with everything initial, in both formats once XCOMP_BV is set.
fn blank(len: usize) -> Vec<u8> {
    let mut area = vec![0; len];
    bytes::write(&mut area, 0, &INITIAL_FCW.to_le_bytes());
    bytes::write(&mut area, MXCSR, &INITIAL_MXCSR.to_le_bytes());
    area
}

fn require_length(area: &[u8], required_bytes: usize) -> Result<(), ImageError> {
    if area.len() < required_bytes {
        return Err(ImageError::TooShort {
            required_bytes,
            actual_bytes: area.len(),
        });
    }
    Ok(())
}

/// All rules of the standard format. Gives XSTATE_BV.
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

/// A standard-format area that is not valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum ImageError {
    /// It ends before the layout's last component does.
    #[error("the area has {actual_bytes} bytes; its CPUID needs {required_bytes}")]
    TooShort {
        /// By the layout.
        required_bytes: usize,
        /// What is there.
        actual_bytes: usize,
    },
    /// XCOMP_BV is not 0.
    #[error("XCOMP_BV is {xcomp_bv:#x}; it is 0 in the standard format that KVM takes")]
    Compacted {
        /// Bytes 520 to 527.
        xcomp_bv: u64,
    },
    /// XSTATE_BV has components that the layout does not have.
    #[error("XSTATE_BV is {xstate_bv}; {unsupported} of it is not among the supported {supported}")]
    Unsupported {
        /// Bytes 512 to 519.
        xstate_bv: XFeatures,
        /// The user components of the layout.
        supported: XFeatures,
        /// What is too much.
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

/// A compacted-format area that is not valid, or not one for a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CompactedError {
    /// Bit 63 of XCOMP_BV is clear.
    #[error("XCOMP_BV is {xcomp_bv:#x}: bit 63 is clear, so the area has the standard format")]
    Standard {
        /// Bytes 520 to 527.
        xcomp_bv: u64,
    },
    /// XCOMP_BV has components that the layout does not have.
    #[error("XCOMP_BV is {xcomp_bv}; {unsupported} of it is not among the supported {supported}")]
    Unsupported {
        /// Bytes 520 to 527 without bit 63.
        xcomp_bv: XFeatures,
        /// User and supervisor components of the layout.
        supported: XFeatures,
        /// What is too much.
        unsupported: XFeatures,
    },
    /// A component in use has no place in the area.
    #[error("XSTATE_BV is {xstate_bv}, but XCOMP_BV has no place for {without_place}")]
    WithoutPlace {
        /// Bytes 512 to 519.
        xstate_bv: XFeatures,
        /// Bytes 520 to 527 without bit 63.
        xcomp_bv: XFeatures,
        /// What has no place.
        without_place: XFeatures,
    },
    /// A supervisor component is in use, which the standard format cannot hold.
    #[error("{supervisor} is in use; a guest's area holds no supervisor components")]
    Supervisor {
        /// Those in use.
        supervisor: XFeatures,
    },
    /// A rule that both formats share.
    #[error(transparent)]
    Image(#[from] ImageError),
}

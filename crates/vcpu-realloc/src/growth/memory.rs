//! The memory that a VMM keeps for one vCPU's state between captures.

use alloc::vec::Vec;

use thiserror::Error;
use xsave_state::format::{INITIAL_FCW, INITIAL_MXCSR};
use xsave_state::{ExtendedState, Image, ImageError, Layout, Registers, StateError, XFeatures};

use crate::gate::Growth;

/// Room for the state of one vCPU: a standard-format area up to the last component that has been
/// granted, and the registers.
///
/// KVM copies the whole area, so the buffer for a capture is larger, and shared by all vCPUs of a
/// thread; this is what is kept of it. Before first use that is 2,816 bytes on a processor with
/// AVX-512, PKRU and AMX, afterwards 11,008.
///
/// Nothing in it aborts when memory is short.
#[derive(Debug)]
pub struct StateMemory {
    layout: Layout,
    granted: XFeatures,
    registers: Registers,
    /// As long as `granted` and what IA32_XFD cannot disable need.
    area: Vec<u8>,
}

impl StateMemory {
    /// Memory for what IA32_XFD cannot disable, which holds the state after reset.
    ///
    /// # Errors
    ///
    /// There is no memory.
    pub fn try_new(layout: &Layout) -> Result<Self, OutOfMemory> {
        let mut memory = Self {
            layout: layout.clone(),
            granted: XFeatures::empty(),
            registers: Registers::RESET,
            area: zeros(layout.standard_size_of(layout.user() - layout.xfd()))?,
        };
        memory.clear();
        Ok(memory)
    }

    /// Bytes that are allocated.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.area.capacity()
    }

    /// The features that IA32_XFD can disable and that have room.
    #[must_use]
    pub fn granted(&self) -> XFeatures {
        self.granted
    }

    /// Makes room for more. What is stored stays. Where there is room already, nothing happens.
    ///
    /// # Errors
    ///
    /// There is no memory; then nothing has changed.
    pub fn grow(&mut self, growth: &Growth) -> Result<(), OutOfMemory> {
        let larger = self.larger(growth)?;
        self.replace(growth, larger);
        Ok(())
    }

    /// The memory that [`replace`](Self::replace) then takes; `None` where there is enough.
    pub(super) fn larger(&self, growth: &Growth) -> Result<Option<Vec<u8>>, OutOfMemory> {
        let bytes = self.bytes_with(growth);
        (bytes > self.area.len()).then(|| zeros(bytes)).transpose()
    }

    /// Goes over to memory from [`larger`](Self::larger) for the same growth. Cannot fail.
    pub(super) fn replace(&mut self, growth: &Growth, larger: Option<Vec<u8>>) {
        if let Some(mut area) = larger {
            copy_prefix(&self.area, &mut area);
            self.area = area;
        }
        self.granted |= growth.features() & self.layout.xfd();
    }

    fn bytes_with(&self, growth: &Growth) -> usize {
        let always = self.layout.user() - self.layout.xfd();
        let features = growth.features() & self.layout.xfd();
        self.layout
            .standard_size_of(always | self.granted | features)
    }

    /// Keeps a state.
    ///
    /// # Errors
    ///
    /// It has a component in use for which there is no room, or it is of another layout. Then what
    /// was stored before stays.
    pub fn store(&mut self, state: &ExtendedState<'_>) -> Result<(), StoreError> {
        if *state.layout() != self.layout {
            return Err(StoreError::Layout);
        }
        let in_use = state.image().xstate_bv();
        let missing = in_use & (self.layout.xfd() - self.granted);
        if !missing.is_empty() {
            return Err(StoreError::NotGranted { in_use, missing });
        }
        copy_prefix(state.image().as_bytes(), &mut self.area);
        self.registers = state.registers();
        Ok(())
    }

    /// What was stored, in `scratch`, which must have room for
    /// [`standard_size`](Layout::standard_size) bytes and can be shared.
    ///
    /// # Errors
    ///
    /// `scratch` is too short.
    pub fn load<'a>(&self, scratch: &'a mut [u8]) -> Result<ExtendedState<'a>, LoadError> {
        let required_bytes = self.layout.standard_size();
        let actual_bytes = scratch.len();
        let Some(area) = scratch.get_mut(..required_bytes) else {
            return Err(LoadError::TooShort {
                required_bytes,
                actual_bytes,
            });
        };
        area.fill(0);
        copy_prefix(&self.area, area);
        let image = Image::parse(area, &self.layout).map_err(LoadError::Image)?;
        ExtendedState::new(image, self.registers).map_err(LoadError::State)
    }

    /// Forgets what was stored: the state after reset.
    pub fn clear(&mut self) {
        self.registers = Registers::RESET;
        self.area.fill(0);
        copy_prefix(&INITIAL_FCW.to_le_bytes(), &mut self.area);
        if let Some(mxcsr) = self.area.get_mut(MXCSR..) {
            copy_prefix(&INITIAL_MXCSR.to_le_bytes(), mxcsr);
        }
    }
}

/// Where MXCSR lies (SDM Vol. 1, Table 10-2).
const MXCSR: usize = 24;

fn zeros(bytes: usize) -> Result<Vec<u8>, OutOfMemory> {
    let mut area = Vec::new();
    area.try_reserve_exact(bytes)
        .map_err(|_| OutOfMemory { bytes })?;
    area.resize(bytes, 0);
    Ok(area)
}

/// As many bytes as both have.
fn copy_prefix(source: &[u8], target: &mut [u8]) {
    for (to, from) in target.iter_mut().zip(source) {
        *to = *from;
    }
}

/// The host has no memory for a vCPU's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("no memory for {bytes} bytes of a vCPU's state: free some, then retry")]
pub struct OutOfMemory {
    /// What was asked of the allocator.
    pub bytes: usize,
}

/// A state could not be stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It has components in use that have no room.
    #[error("{missing} of the components in use ({in_use}) has no memory yet: grow it first")]
    NotGranted {
        /// XSTATE_BV.
        in_use: XFeatures,
        /// What of it has no room.
        missing: XFeatures,
    },
    /// It is not of the layout of this vCPU.
    #[error("the state is of another layout than the vCPU")]
    Layout,
}

/// A stored state could not be loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LoadError {
    /// There is no room for it.
    #[error("{actual_bytes} bytes cannot take a state of {required_bytes}")]
    TooShort {
        /// [`Layout::standard_size`].
        required_bytes: usize,
        /// What was given.
        actual_bytes: usize,
    },
    /// What was stored is not valid any more.
    #[error("the stored area: {0}")]
    Image(ImageError),
    /// What was stored is not valid any more.
    #[error("the stored state: {0}")]
    State(StateError),
}

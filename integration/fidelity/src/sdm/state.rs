//! The state that the XSAVE feature set manages: each component in its initial configuration or not.

use crate::component::{SSE, X87};
use crate::cpuid::Layout;
use crate::pattern::{MXCSR_RESET, Pattern, initial};

/// The registers, by component.
#[derive(Clone, Copy)]
pub struct State<'a> {
    values: [Option<&'a Pattern>; 63],
    /// MXCSR, which is of component 1 for some purposes only (SDM vol. 1, 13.5.2).
    pub mxcsr: u32,
}

impl<'a> State<'a> {
    /// The components of `in_use` have their values from `pattern`, the others are initial.
    #[must_use]
    pub fn new(in_use: u64, pattern: &'a Pattern) -> Self {
        let mut state = Self {
            values: [None; 63],
            mxcsr: MXCSR_RESET,
        };
        state.set(in_use, Some(pattern));
        state
    }

    /// The same with this MXCSR.
    #[must_use]
    pub fn with_mxcsr(mut self, mxcsr: u32) -> Self {
        self.mxcsr = mxcsr;
        self
    }

    /// Sets components to their values from a pattern, or to their initial configuration.
    pub fn set(&mut self, components: u64, to: Option<&'a Pattern>) {
        for (i, value) in self.values.iter_mut().enumerate() {
            if components >> i & 1 != 0 {
                *value = to;
            }
        }
    }

    /// XINUSE (SDM vol. 1, 13.6). The processor may take an initial component for one in use; these
    /// models assume that it does not, as those of Intel do not for what XRSTOR has initialized.
    #[must_use]
    pub fn xinuse(&self) -> u64 {
        let bits = self.values.iter().enumerate();
        bits.fold(0, |xinuse, (i, value)| {
            xinuse | u64::from(value.is_some()) << i
        })
    }

    /// The bytes of a component from 2 on.
    #[must_use]
    pub fn bytes(&self, layout: &Layout, component: u32) -> Vec<u8> {
        let size = match component {
            X87 => 160,
            SSE => 256,
            _ => layout.place(component).map_or(0, |place| place.size),
        };
        match self.values[component as usize] {
            Some(pattern) => pattern.bytes(component).to_vec(),
            None => initial(component, size),
        }
    }
}

/// Writes the components of `which` into an area, each at its offset from `offset_of`.
pub fn write(
    state: &State<'_>,
    layout: &Layout,
    which: u64,
    offset_of: impl Fn(u32) -> usize,
    area: &mut [u8],
) {
    if which & 1 << X87 != 0 {
        let bytes = state.bytes(layout, X87);
        area[..24].copy_from_slice(&bytes[..24]);
        area[32..160].copy_from_slice(&bytes[32..]);
    }
    if which & 1 << SSE != 0 {
        area[160..416].copy_from_slice(&state.bytes(layout, SSE));
    }
    for (i, place) in layout.components() {
        if which >> i & 1 != 0 {
            let at = offset_of(i);
            match state.values[i as usize] {
                Some(pattern) => area[at..][..place.size].copy_from_slice(pattern.bytes(i)),
                None => area[at..][..place.size].fill(0),
            }
        }
    }
}

//! The state memory of all vCPUs of a VM, and its accounts.

use alloc::vec::Vec;

use thiserror::Error;
use xsave_state::Layout;

use super::memory::{OutOfMemory, StateMemory};
use super::request::{Request, Scope};

/// The [`StateMemory`] of every vCPU of a VM, and since when each is live: has state for features
/// that IA32_XFD can disable. `T` is the VMM's idea of time.
///
/// Growth is all or nothing, and can be repeated: what is there already costs nothing.
#[derive(Debug, Default)]
pub struct Ledger<T> {
    /// By ascending number of the vCPU.
    accounts: Vec<Account<T>>,
    first_use: Option<(u64, T)>,
}

#[derive(Debug)]
struct Account<T> {
    vcpu: u64,
    live_since: Option<T>,
    memory: StateMemory,
}

impl<T: Copy> Ledger<T> {
    /// For a VM without vCPUs.
    #[must_use]
    pub const fn new() -> Self {
        Self {
            accounts: Vec::new(),
            first_use: None,
        }
    }

    /// Adds a vCPU after reset: memory for what IA32_XFD cannot disable.
    ///
    /// # Errors
    ///
    /// There is no memory, or there is such a vCPU.
    pub fn add(&mut self, vcpu: u64, layout: &Layout) -> Result<(), LedgerError> {
        let Err(place) = self.place(vcpu) else {
            return Err(LedgerError::Known { vcpu });
        };
        let memory = StateMemory::try_new(layout)?;
        self.accounts.try_reserve(1).map_err(|_| OutOfMemory {
            bytes: size_of::<Account<T>>(),
        })?;
        self.accounts.insert(
            place,
            Account {
                vcpu,
                live_since: None,
                memory,
            },
        );
        Ok(())
    }

    /// Removes a vCPU with its memory. Gives whether there was one.
    pub fn remove(&mut self, vcpu: u64) -> bool {
        let found = self.place(vcpu);
        found.is_ok_and(|place| {
            self.accounts.remove(place);
            true
        })
    }

    /// Makes room for what is asked, for the vCPU or for all of them.
    ///
    /// # Errors
    ///
    /// There is no memory, or no such vCPU. Then nothing has changed, and it can be tried again.
    pub fn grow(&mut self, request: &Request, now: T) -> Result<(), LedgerError> {
        let vcpu = request.vcpu;
        let place = self
            .place(vcpu)
            .map_err(|_| LedgerError::Unknown { vcpu })?;
        let growth = &request.growth;
        let accounts = match request.scope {
            Scope::Vcpu => self.accounts.get_mut(place..=place),
            Scope::Vm => self.accounts.get_mut(..),
        };
        let accounts = accounts.unwrap_or_default();
        // All the memory first, so that a failure changes nothing.
        let mut larger = Vec::new();
        larger
            .try_reserve_exact(accounts.len())
            .map_err(|_| OutOfMemory {
                bytes: accounts.len().saturating_mul(size_of::<Vec<u8>>()),
            })?;
        for account in accounts.iter() {
            larger.push(account.memory.larger(growth)?);
        }
        for (account, larger) in accounts.iter_mut().zip(larger) {
            account.memory.replace(growth, larger);
            account.live_since.get_or_insert(now);
        }
        self.first_use.get_or_insert((vcpu, now));
        Ok(())
    }

    /// How many vCPUs are live.
    #[must_use]
    pub fn live(&self) -> usize {
        let live = self.accounts.iter().filter(|a| a.live_since.is_some());
        live.count()
    }

    /// Since when a vCPU is live.
    #[must_use]
    pub fn live_since(&self, vcpu: u64) -> Option<T> {
        self.account(vcpu)?.live_since
    }

    /// Which vCPU was the first to use a feature that IA32_XFD can disable, and when.
    #[must_use]
    pub fn first_use(&self) -> Option<(u64, T)> {
        self.first_use
    }

    /// Bytes of state that are allocated, of all vCPUs together.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let bytes = self.accounts.iter().map(|a| a.memory.bytes());
        bytes.fold(0, usize::saturating_add)
    }

    /// The memory of a vCPU.
    #[must_use]
    pub fn memory(&self, vcpu: u64) -> Option<&StateMemory> {
        Some(&self.account(vcpu)?.memory)
    }

    /// The memory of a vCPU, to store its state.
    #[must_use]
    pub fn memory_mut(&mut self, vcpu: u64) -> Option<&mut StateMemory> {
        let place = self.place(vcpu).ok()?;
        Some(&mut self.accounts.get_mut(place)?.memory)
    }

    fn account(&self, vcpu: u64) -> Option<&Account<T>> {
        self.accounts.get(self.place(vcpu).ok()?)
    }

    /// Where a vCPU is, or would be.
    fn place(&self, vcpu: u64) -> Result<usize, usize> {
        self.accounts
            .binary_search_by_key(&vcpu, |account| account.vcpu)
    }
}

/// A vCPU's memory could not be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum LedgerError {
    /// The host has none.
    #[error(transparent)]
    OutOfMemory(#[from] OutOfMemory),
    /// There is no such vCPU.
    #[error("there is no vCPU {vcpu}: add it first")]
    Unknown {
        /// Its number.
        vcpu: u64,
    },
    /// There is such a vCPU already.
    #[error("there is a vCPU {vcpu} already")]
    Known {
        /// Its number.
        vcpu: u64,
    },
}

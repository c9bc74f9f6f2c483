//! The VMM's side of growth: the question, its answer, and the memory and accounts behind it.
//!
//! | item | its one job |
//! |---|---|
//! | [`Grow`] | the trait that a VMM implements, or a closure |
//! | [`Request`], [`Answer`] | what is asked, and what can be said |
//! | [`StateMemory`] | the memory that a VMM keeps for one vCPU's state: small until first use |
//! | [`Ledger`] | the memories of all vCPUs of a VM: who is live, since when, how many bytes |
//!
//! Nothing here aborts when memory is short: each allocation can fail, and a failure changes nothing.
//!
//! ```
//! use vcpu_realloc::growth::{Answer, Grow, Ledger, LedgerError, Request, Scope};
//! use vcpu_realloc::{Action, Event, Gate};
//! use xsave_state::XFeatures;
//! # use xsave_state::{Component, ComponentId, Layout, Palette};
//! # let layout = Layout::from_parts(
//! #     [
//! #         Component::user(ComponentId::XTILECFG, 2752, 64).aligned(),
//! #         Component::user(ComponentId::XTILEDATA, 2816, 8192).aligned(),
//! #     ],
//! #     [Palette::ONE],
//! # )
//! # .unwrap();
//! let mut ledger = Ledger::new();
//! ledger.add(0, &layout)?;
//! ledger.add(1, &layout)?;
//! assert_eq!((ledger.live(), ledger.bytes()), (0, 2 * 2816));
//!
//! // vCPU 1 asks. The time is whatever the VMM's clock gives.
//! let mut gate = Gate::new(&layout);
//! let enable = Event::WriteXcr0(XFeatures::from_bits_retain(0x60003));
//! let Action::Grow(growth) = gate.on(enable) else { unreachable!() };
//! let request = Request { vcpu: 1, growth, scope: Scope::Vcpu };
//! let mut vmm = |request: &Request| ledger.grow(request, 1234).map(|()| Answer::Grant);
//! assert_eq!(vmm.grow(&request)?, Answer::Grant);
//! assert_eq!((ledger.live(), ledger.live_since(1)), (1, Some(1234)));
//! assert_eq!(ledger.bytes(), 2816 + 11_008);
//! # Ok::<(), LedgerError>(())
//! ```

mod ledger;
mod memory;
mod request;

pub use ledger::{Ledger, LedgerError};
pub use memory::{LoadError, OutOfMemory, StateMemory, StoreError};
pub use request::{Answer, Grow, Request, Scope};

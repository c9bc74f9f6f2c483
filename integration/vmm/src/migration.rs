//! Moves a running guest to another process over a stream, usually a Unix socket.
//!
//! | module | its one job |
//! |---|---|
//! | [`limit`] | an end of time for all that is read and written, and a way to end it before |
//! | [`frame`] | messages as bytes, and bytes of unknown origin as messages |
//! | [`offer`] | what a destination says of itself, and whether a guest fits that |
//! | [`source`] | rounds of changed pages, then the rest with the guest stopped, then the hand-over |
//! | [`destination`] | takes all of it into a new VM, and takes over |
//!
//! docs/migration.md has the protocol, and the argument why a guest never runs twice.

pub mod destination;
pub mod frame;
pub mod limit;
pub mod offer;
pub mod source;

pub use destination::{ReceiveError, Received, receive, receive_with};
pub use limit::{Cancel, Stream};
pub use offer::Offer;
pub use source::{MAX_THROTTLE_PERCENT, Options, Progress, Report, Round, SendError, send};

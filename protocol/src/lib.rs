//! Every byte that `migrate` sends, stores or says on a control socket.
//!
//! The crate is pure: no I/O, no clock, no threads. Whoever holds a socket reads bytes, hands them over, and
//! gets values or an error that says whose fault it is. Nothing here allocates more than a caller's bound, and
//! nothing here panics on bytes from outside.
//!
//! ```text
//!  page ─▶ layout ─▶ frame ─▶ (page streams)          pages flow one way
//!  envelope ─▶ handshake ─▶ control ─▶ (control stream) agreement flows both ways
//!  envelope ─▶ monitor ─▶ (unix socket)               engine and VMM
//!  envelope ─▶ steer ─▶ (unix socket)                 operator and engine
//!  checkpoint ─▶ (objects of a store)                what is written down
//!  container ─▶ (in that blob)       where a container's pages lie
//!  state ─▶ the blob inside `control::Downstream::State` and `monitor`'s save and load
//! ```
//!
//! docs/wire-protocol.md and docs/control-protocol.md say the same in words; `tests/golden.rs` and `tests/docs.rs` hold
//! the crate and both of them to it.
#![forbid(unsafe_code)]

pub mod page;
pub mod layout;
pub mod sparse;
pub mod payload;
pub mod frame;
pub mod envelope;
pub mod handshake;
pub mod control;
pub mod state;
pub mod monitor;
pub mod steer;
pub mod checkpoint;
pub mod container;

mod error;
mod id;

pub use error::{ProtocolError, Result};
pub use id::MigrationId;

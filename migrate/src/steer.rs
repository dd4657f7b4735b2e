//! A running migration seen and steered from outside: the [steering socket](protocol::steer) and what stands behind it.
//!
//! ```text
//! engine ── events ─▶ board ◀── looks ── server ◀═ unix socket ═▶ client (migrate status, cancel, set)
//!    ▲                                     │
//!    └──── cancel flag, controls ◀─────────┘
//! ```
//!
//! The engine writes on the [`Board`] and reads [`Controls`](crate::controls::Controls) and the
//! [`CancelFlag`](crate::cancel::CancelFlag). Each is a lock held for a few instructions or an atomic, so no client, however
//! slow, is ever waited for. A series of checkpoints has a [`SeriesBoard`] behind the same server.

mod board;
mod series;
mod eta;
mod place;
mod server;
mod client;

pub use board::{Board, Subject, Watched};
pub use client::Client;
pub use place::{Found, Place};
pub use series::{SeriesBoard, WatchedSeries};
pub use server::{Server, Steered};

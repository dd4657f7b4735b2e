//! The engine that moves running workloads, and its command line.
//!
//! ```text
//!             rounds                                            rounds
//! source ─▶ outbound ─▶ link (quic | duplex) ═════════▶ link ─▶ inbound ─▶ destination
//!    ▲       ▲     ▲                                               │
//!  dirty    select converge                                        ▼
//!  log      (what) (when to stop)                               report
//! ```
//!
//! The modules stand in the order in which pages flow.
#![deny(unsafe_code)]

pub mod error;
pub mod cancel;
pub mod identity;
pub mod source;
pub mod memory;
mod digest;
pub mod select;
pub mod converge;
pub mod controls;
pub mod history;
pub mod connections;
pub mod estimate;
mod probe;
mod codec;
pub mod cap;
pub mod outbound;
pub mod schedule;
pub mod chains;
pub mod retention;
pub mod store;
pub mod seal;
pub mod vault;
pub mod checkpoint;
pub mod upkeep;
pub mod restore;
pub mod compact;
pub mod export;
pub mod archive;
pub mod seed;
mod conversation;
pub mod link;
pub mod inbound;
pub mod destination;
pub mod program;
pub mod container;
mod programs;
pub mod report;
pub mod speed;
pub mod steer;
pub mod metrics;
pub mod paths;
pub mod units;
pub mod exit;
pub mod doctor;
pub mod progress;
pub mod commands;
pub mod cli;

#[allow(unsafe_code, reason = "system calls that no crate wraps; each block says why it is sound")]
mod sys;

pub use error::{Error, Result};

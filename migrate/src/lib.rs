//! The engine that moves running workloads, and its command line.
//!
//! ```text
//!             rounds                                            rounds
//! source ─▶ outbound ─▶ link (quic | duplex) ═════════▶ link ─▶ inbound ─▶ destination
//!    ▲         ▲                                                   │
//!  dirty log  converge (when to stop)                              ▼
//!                                                               report
//! ```
//!
//! The modules stand in the order in which pages flow.
#![deny(unsafe_code)]

pub mod error;
pub mod identity;
pub mod source;
pub mod memory;
pub mod link;
pub mod destination;
pub mod paths;
pub mod units;
pub mod exit;
pub mod commands;
pub mod cli;

pub use error::{Error, Result};

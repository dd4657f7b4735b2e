//! What the tests share: one value of everything, the golden files made of them, and a reader as a peer has it.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

pub(crate) mod checkpoint;
pub(crate) mod files;
pub(crate) mod reader;
pub(crate) mod samples;
pub(crate) mod strategies;

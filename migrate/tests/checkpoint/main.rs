//! Checkpoints of a scripted machine in a store in memory: whatever it writes and whatever fails.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

mod harness;
mod reader;
mod brittle;
mod chains;
mod failures;
mod group;

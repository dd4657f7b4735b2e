//! The whole engine over scripted ends and a link in memory.
//!
//! The property behind all of it: the destination's bytes equal the source's at freeze; whatever fails before `Commit`
//! leaves the source running with its dirty bits, and the next attempt is correct; whatever fails behind it never
//! leaves two, and none only where the source is frozen, pledged and recoverable.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, which clippy does not see as tests"
)]

mod harness;
mod moves;
mod cuts;
mod failures;
mod steering;
mod hostile;
mod postcopy;
mod desk;
mod connections;
mod resume;
mod stalls;
mod hot;
mod verify;
mod baseline;
mod seed;
mod disks;

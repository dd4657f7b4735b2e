//! Stores of checkpoints: what every one of them must keep, and what each must survive.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, which clippy does not see as tests"
)]

mod contract;
mod crashes;
mod faulty;
mod local;

use migrate::store::MemoryStore;
use std::sync::Arc;

#[test]
fn the_store_in_memory_keeps_the_contract() {
    contract::check(&|| Arc::new(MemoryStore::new()));
}

//! Stores of checkpoints: what every one of them must keep, and what each must survive.

mod contract;
mod local;

use migrate::store::MemoryStore;
use std::sync::Arc;

#[test]
fn the_store_in_memory_keeps_the_contract() {
    contract::check(&|| Arc::new(MemoryStore::new()));
}

//! From a chain of checkpoints to a running workload.
#![allow(dead_code, reason = "wired when the vault is merged")]

pub mod plan;
mod order;
mod touches;

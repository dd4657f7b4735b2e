//! What the end-to-end tests and the benchmark stand on: hosts that are directories, VMs that are processes.
//!
//! A [`Host`] is a runtime directory and a key directory of its own, so two of them on one machine behave like two
//! machines. Everything a test starts ends when its `Host` is dropped, also when the test fails.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a harness of tests: what goes wrong in it fails the test, with its words"
)]

pub mod random;
pub mod browser;
pub mod process;
pub mod network;
pub mod cgroup;
pub mod containers;
pub mod relay;
pub mod host;
pub mod guest;
pub mod matrix;
pub mod lab;
mod qmp;
pub mod bench;

pub use host::{Host, trusting_pair};
pub use process::{Finished, Running, says};

/// Whether tests that need a real VM are left out of this run, which `scripts/test` decides and says: the caller
/// returns then. Without that decision a missing `/dev/kvm` is a failure of the test that needs it, not a skip.
pub fn without_kvm(test: &str) -> bool {
    let without = std::env::var_os("MIGRATE_TEST_NO_KVM").is_some();
    if without {
        assert!(std::env::var_os("CI").is_none(), "CI never skips the tests that need /dev/kvm");
        println!("SKIPPED: {test}: it needs /dev/kvm");
    }
    without
}

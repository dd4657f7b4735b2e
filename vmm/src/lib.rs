//! The minimal KVM VMM.
#![deny(unsafe_code)]

pub mod addresses;
pub mod memory;
pub mod dirty;
pub mod boot;
pub mod device;
pub mod devices;
pub mod cpuid;
pub mod host;
pub mod state;
mod vcpu;
mod vm;
#[cfg(test)]
mod vm_tests;
#[cfg(test)]
mod test_images;
mod error;
#[allow(unsafe_code, reason = "system calls that no crate wraps; each block says why it is sound")]
mod sys;

pub use error::{Error, ImageError, Result};

//! The minimal KVM VMM.
#![deny(unsafe_code)]

pub mod addresses;
pub mod boot;
pub mod device;
pub mod devices;
pub mod dirty;
mod error;
pub mod memory;
#[allow(unsafe_code, reason = "system calls that no crate wraps; each block says why it is sound")]
mod sys;

pub use error::{Error, ImageError, Result};

//! The minimal KVM VMM: the process that owns vCPUs, devices and guest memory, and nothing else.
//!
//! It has no network code, no TLS and no disk format. A VM is moved by another process, which maps the
//! memory and speaks the control protocol ([`protocol::monitor`]) with [`Client`].
//!
//! ```text
//!   VmConfig ─ boot ─┐                                     ┌─ vcpu (one thread each) ─ devices
//!                    ├─> vm (KVM, memory, dirty tracking) ─┤
//!   Prepare, Load ───┘      ^                              └─ state (save, load)
//!                           │ one lock
//!                       instance (phases of its life)
//!                           │
//!                        server <── control socket ──> client   (the `migrate` process)
//! ```
//!
//! [`run()`] boots a VM and returns how it ended; [`run_incoming()`] does the same for one that comes from
//! elsewhere.
#![deny(unsafe_code)]

mod config;
pub mod addresses;
pub mod host;
pub mod cpuid;
pub mod memory;
mod faults;
pub mod boot;
pub mod device;
pub mod devices;
mod vcpu;
pub mod dirty;
pub mod state;
mod vm;
mod instance;
mod wire;
mod server;
mod run;
mod client;

mod error;
#[allow(unsafe_code, reason = "system calls that no crate wraps; each block says why it is sound")]
mod sys;

#[cfg(test)]
mod test_images;
#[cfg(test)]
mod vm_tests;

pub use boot::{Bytes, Images, KernelSource, Ring};
pub use client::{Client, Description, PageFaults, Tracking};
pub use config::{ExitReason, IncomingConfig, VmConfig, check_name};
pub use devices::SerialSink;
pub use error::{Error, ImageError, Result};
pub use run::{run, run_incoming};
pub use server::Socket;

//! Virtio devices behind a modern virtio-mmio transport (Virtual I/O Device version 1.2, 4.2).
//!
//! ```text
//!  vCPU threads                      worker thread, one a device
//!  ──────────── registers            ───────────────────────────
//!  Transport ──── activate ───────> Engine { backend, rings }
//!      │                               │ pops chains, completes them
//!      └─ notify ──> kick (eventfd) ──>│──> interrupt
//! ```
//!
//! The registers are the vCPUs' and the rings are the worker's: no request is carried out by a vCPU. What a driver writes is
//! bounded before it is used; a driver that breaks the rules finds its device in need of a reset, and nobody else does.
//!
//! # Standing still
//!
//! A device's pause comes behind that of the vCPUs. It waits for the one request that is being carried out, and leaves all
//! others in the rings, where the driver put them: so a saved state has no request in flight, and whoever serves the rings
//! next, here or elsewhere, finds each of them once. Behind it no device writes to guest memory. What one wrote is marked in the
//! mapping itself (`OwnWrites` of the memory), because KVM's log knows of vCPUs only.
//!
//! # Outside things
//!
//! A disk's lock or a tap belongs to one VM at a time. A VM that boots takes them at once. One that arrives looks whether they are
//! there while it is prepared, and takes them when it starts; the source let go of them when it was pledged.
//!
//! # Disks that go with a VM
//!
//! The image of such a disk is a space of the session that moves the VM, beside those of memory. Whatever its device changes is marked
//! by pages. At the destination the image is a file without a name until the VM starts; the source's stays locked until its VM has ended,
//! because nobody else is to have it.

mod block;
mod console;
mod description;
mod disk;
mod net;
mod ring;
mod rng;
mod set;
mod state;
mod tap;
mod transport;
mod worker;

#[cfg(test)]
mod console_tests;
#[cfg(test)]
mod mock;
#[cfg(test)]
mod net_tests;
#[cfg(test)]
mod tests;

use std::{io, os::fd::BorrowedFd, sync::atomic::AtomicBool, time::Instant};

pub use console::ConsoleConfig;
pub use description::{Allowed, Description, DeviceConfig, DiskConfig, NetConfig};
pub(crate) use description::{Part, build_all, decode, encode, rebuild_all};
pub(crate) use disk::{Image, pages_of};
pub use net::MacAddress;
pub(crate) use ring::{Ring, Slice};
pub(crate) use set::Set;
pub(crate) use transport::Transport;
pub(crate) use worker::Handle;

use crate::error::Result;

/// A driver broke the rules; the text says how. Its device stands still until the driver resets it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Broken(pub(crate) &'static str);

/// What a device does behind its transport.
pub(crate) trait Backend: Send {
    /// The device's number (5 of the specification).
    fn kind(&self) -> u32;
    /// What it offers beside what the transport and the rings do.
    fn features(&self) -> u64;
    /// The most entries of each of its queues, powers of two.
    fn queue_sizes(&self) -> &'static [u16];
    /// How many of its queues, from the first on, a driver with these features must have set up.
    fn queues(&self, _features: u64) -> usize {
        self.queue_sizes().len()
    }
    /// Its configuration space.
    fn config(&self) -> Vec<u8>;
    /// Counts the changes of its configuration space.
    fn config_generation(&self) -> u32 {
        0
    }
    /// The driver is ready, and accepted these features.
    fn activate(&mut self, features: u64);
    /// Carries out what lies in the rings, and returns when nothing does, or soon after `halt` is set.
    fn serve(&mut self, rings: &mut [Ring], halt: &AtomicBool) -> Result<(), Broken>;
    /// What else it waits for.
    fn source(&self) -> Option<BorrowedFd<'_>> {
        None
    }
    /// When it wants to serve though nothing came.
    fn due(&self) -> Option<Instant> {
        None
    }
    /// Takes what only one VM may have. Does nothing when it has it.
    fn acquire(&mut self) -> Result<()> {
        Ok(())
    }
    /// Lets go of it; what was written is safe then, and seen by whoever has it next.
    fn release(&mut self) -> Result<()> {
        Ok(())
    }
    /// Makes what came with the VM a part of this host, because it starts. Answers whether there was something.
    fn publish(&mut self) -> Result<bool> {
        Ok(false)
    }
    /// Undoes that: it does not start.
    fn retract(&mut self) {}
}

/// Logs what the host answered; the guest is told in its own way.
fn failed(device: &str, action: &str, error: &io::Error) {
    tracing::warn!(device, %error, "cannot {action}");
}

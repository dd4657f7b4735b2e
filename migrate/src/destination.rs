//! Where pages go.

pub mod vm;
pub mod scripted;

use crate::error::Result;
use protocol::MigrationId;
use protocol::control::{Offer, RefuseCode};
use protocol::page::{PageRun, SpaceId};
use std::sync::Arc;

/// A place where a workload can arrive.
///
/// The engine calls `prepare` once, writes through [`Destination::memory`] from several threads, then `load`, and
/// exactly one of `start` and `discard`. A destination that is dropped without `start` discards itself.
pub trait Destination {
    /// Makes room for the workload and checks everything that can be checked before the first page: memory, name,
    /// CPU, devices. Nothing is left behind when it refuses. Everything that takes time (vCPUs, devices) is made
    /// here and not in `load`.
    ///
    /// # Errors
    /// [`Refusal`], which is what the sender is told.
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal>;

    /// The memory that `prepare` made, all zeros.
    fn memory(&self) -> Arc<dyn PageMemory>;

    /// Loads the state and checks it, so that `start` cannot fail for a reason that could be known before.
    ///
    /// # Errors
    /// `Workload` or `Protocol`.
    fn load(&mut self, state: &[u8]) -> Result<()>;

    /// Starts the workload; from now on it lives without the engine. Answers its name.
    ///
    /// # Errors
    /// `Workload`; nothing runs then.
    fn start(self: Box<Self>, migration: MigrationId) -> Result<String>;

    /// Forgets everything that arrived.
    fn discard(self: Box<Self>);
}

/// Why a destination does not take a workload.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The class.
    pub code: RefuseCode,
    /// What the operator of the sender should know.
    pub reason: String,
}

/// Memory that is written, and read again, by page streams. Ranges were checked against the layout by the caller.
pub trait PageMemory: Send + Sync {
    /// Writes `bytes` at a byte offset of a space.
    ///
    /// # Errors
    /// `Host`.
    fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Copies `buffer.len()` bytes from a byte offset of a space: what was written there last.
    ///
    /// # Errors
    /// `Host`.
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Makes every byte of the run zero, without allocating pages that were never written.
    ///
    /// # Errors
    /// `Host`.
    fn zero(&self, run: PageRun) -> Result<()>;
}

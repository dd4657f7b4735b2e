//! Where pages go.

pub mod any;
pub mod container;
pub mod vm;
mod faulting;
pub mod scripted;

use crate::error::Result;
use crate::memory::PageReader;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::{Offer, RefuseCode};
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet, SpaceId};
use std::sync::Arc;
use std::time::Duration;

/// A place where a workload can arrive.
///
/// The engine calls `prepare`, writes through [`Destination::memory`] from several threads, then `load`, and
/// exactly one of `start`, `start_incomplete` and `discard`. A destination that is dropped without a start discards itself.
pub trait Destination {
    /// Makes room for the workload and checks everything that can be checked before the first page: memory, name,
    /// CPU, devices. Nothing is left behind when it refuses. Everything that takes time (vCPUs, devices) is made
    /// here and not in `load`.
    ///
    /// Called again before a start, it first forgets everything that arrived, and what was loaded; nobody may hold the memory of
    /// before any more.
    ///
    /// # Errors
    /// [`Refusal`], which is what the sender is told.
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal>;

    /// The memory that `prepare` made, all zeros.
    fn memory(&self) -> Arc<dyn PageMemory>;

    /// Before the state is loaded: memory is, or will be before the workload sees it, what this checkpoint has, and what is written
    /// from now on is all that the checkpoint lacks. So the workload's next checkpoint can be a delta on this one. A destination that
    /// cannot know that does nothing, and the next checkpoint is a whole one.
    ///
    /// # Errors
    /// `Workload`: as above, the next checkpoint is a whole one.
    fn begin_from(&mut self, _checkpoint: CheckpointId) -> Result<()> {
        Ok(())
    }

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

    /// Loaded: these pages are missing, one set for each space. What arrived of them is forgotten, and whoever touches
    /// one waits from now on. The workload must be started by `start_incomplete` then.
    ///
    /// # Errors
    /// `Host` when this host cannot, saying what to do.
    fn expect(&mut self, missing: &[PageSet]) -> Result<()>;

    /// Starts a workload that misses pages.
    ///
    /// # Errors
    /// `Workload`; nothing runs then.
    fn start_incomplete(self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>>;

    /// Takes up a workload that this migration brought here and that misses pages still, because the engine that was
    /// at it is gone. `None` when there is none.
    ///
    /// # Errors
    /// `Workload` when there is one and it cannot be had.
    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>>;

    /// Forgets everything that arrived.
    fn discard(self: Box<Self>);
}

/// A workload that runs and misses pages. Whoever touches a missing page waits until it is put in place; dropping this
/// changes nothing about that, and the workload can be taken up again.
pub trait Incomplete: Send + Sync {
    /// Its name.
    fn name(&self) -> &str;

    /// Its memory.
    fn layout(&self) -> &Layout;

    /// What was missing when it was taken hold of, one set for each space.
    fn missing(&self) -> &[PageSet];

    /// Waits at most `limit` for pages that were touched and are not there, missing or never used.
    ///
    /// # Errors
    /// `Host`.
    fn touched(&self, limit: Duration) -> Result<Vec<(SpaceId, u64)>>;

    /// Puts pages in place, whole, and lets who waits for them go on. A page that is there already stays as it is.
    ///
    /// # Errors
    /// `Workload` when the workload is gone, `Host`.
    fn place(&self, run: PageRun, bytes: &[u8]) -> Result<()>;

    /// The same with zeros.
    ///
    /// # Errors
    /// As `place`.
    fn place_zeros(&self, run: PageRun) -> Result<()>;

    /// Nothing is missing any more; the workload finds that to be so, and lives without the engine from now on.
    ///
    /// # Errors
    /// `Workload` when something is missing.
    fn complete(&self) -> Result<()>;
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
pub trait PageMemory: PageReader {
    /// Writes `bytes` at a byte offset of a space.
    ///
    /// # Errors
    /// `Host`.
    fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()>;

    /// Makes every byte of the run zero, without allocating pages that were never written.
    ///
    /// # Errors
    /// `Host`.
    fn zero(&self, run: PageRun) -> Result<()>;

    /// Makes safe what this thread has written and what must outlive this host's power: the disks. When every thread that wrote has
    /// called it behind its last write, and all calls have come back, all is.
    ///
    /// # Errors
    /// `Host`.
    fn settle(&self) -> Result<()>;
}

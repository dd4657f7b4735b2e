//! Where pages come from.

mod copied;
pub mod container;
pub mod vm;
pub mod scripted;

use crate::error::{Error, Result};
use crate::memory::PageReader;
pub use copied::Copied;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::WorkloadKind;
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet, SpaceId};

/// What a workload is, for the offer.
#[derive(Debug, Clone)]
pub struct Workload {
    /// Its kind.
    pub kind: WorkloadKind,
    /// Its name.
    pub name: String,
    /// Its memory.
    pub layout: Layout,
    /// The machine description for the destination's VMM, opaque to the engine.
    pub machine: Vec<u8>,
}

/// Which pages count as dirty when tracking begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dirty {
    /// Every page: it goes to somebody who has nothing.
    Everything,
    /// What the baseline lacks; every page where there is none.
    SinceBaseline,
}

/// A running workload whose memory can be taken away page by page while it runs.
///
/// The engine calls `track` once, then for every round `harvest` and, batch by batch, `take`, `present`, `read`;
/// then `freeze`, one more round, `state`, `pledge`, and exactly one of `resume`, `hand_over` and `donate`.
///
/// A source that is dropped without either resumes its workload if it was not pledged, and leaves it frozen if
/// it was.
pub trait Source {
    /// What the workload is.
    fn workload(&self) -> &Workload;

    /// Begins to track writes. Answers how it tracks, for reports. Whatever is asked for, a baseline that there was stays
    /// true: how this attempt ends changes nothing about it.
    ///
    /// # Errors
    /// `Workload` when the host cannot.
    fn track(&mut self, dirty: Dirty) -> Result<String>;

    /// The checkpoint that has everything but what was written since, if the workload is tracked from one on: behind
    /// `track(Dirty::SinceBaseline)` exactly what it lacks is dirty, and without one every page. Valid behind `track`.
    fn baseline(&self) -> Option<CheckpointId>;

    /// Everything that was taken behind `track` is safe in this checkpoint: it is the baseline from now on, and the workload
    /// is tracked when this source is gone, too. A workload that cannot do that goes on without: `baseline` says so, and the
    /// next checkpoint has to be a whole one. Pages that are taken from now on are dirty again when this source is gone.
    ///
    /// # Errors
    /// `Workload`; the baseline is as before.
    fn set_baseline(&mut self, checkpoint: CheckpointId) -> Result<()>;

    /// The pages that are dirty now, one set for each space, in the layout's order. Takes nothing.
    ///
    /// # Errors
    /// `Workload`.
    fn harvest(&mut self) -> Result<Vec<PageSet>>;

    /// Takes the dirty pages that the last harvest saw in this range: they are clean from now on.
    ///
    /// *A write that `read` behind this call does not see is dirty again:* the bits are cleared before the bytes are
    /// read, so a live round may read a torn page, and that is sound, because that page will be in the next harvest.
    ///
    /// # Errors
    /// `Workload`.
    fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()>;

    /// Removes from `pages` those that were never touched and so read as zeros, without touching them. Called
    /// behind `take`, for the same range, or once the workload is frozen, or where nothing depends on it.
    ///
    /// # Errors
    /// `Workload`.
    fn present(&mut self, space: SpaceId, first: u64, count: u64, pages: &mut PageSet) -> Result<()>;

    /// Copies the bytes of a run, as they are now, into `buffer`, which is exactly as long.
    ///
    /// # Errors
    /// `Workload`.
    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()>;

    /// The same memory, for several threads at once.
    ///
    /// # Errors
    /// `Host`.
    fn reader(&self) -> Result<Box<dyn PageReader>>;

    /// These pages were taken and not delivered: they are dirty again, so that the next attempt is correct.
    ///
    /// # Errors
    /// `Workload`.
    fn redirty(&mut self, pages: &[PageSet]) -> Result<()>;

    /// Whether `throttle` is possible.
    fn can_throttle(&self) -> bool;

    /// Lets the workload stand still for this share of its time, in percent; 0 lets it run. Ends by itself with
    /// `freeze` and `resume`, and when the source is dropped.
    ///
    /// # Errors
    /// `Workload`.
    fn throttle(&mut self, percent: u8) -> Result<()>;

    /// Stops the workload. Behind this call nothing writes to its memory any more.
    ///
    /// # Errors
    /// `Workload`; it runs on then.
    fn freeze(&mut self) -> Result<()>;

    /// The state of the frozen workload, as [`protocol::state`] encodes it.
    ///
    /// # Errors
    /// `Workload`.
    fn state(&mut self) -> Result<Vec<u8>>;

    /// Says that `Commit` is about to be sent: whatever dies from now on, the workload does not resume by itself.
    ///
    /// # Errors
    /// `Workload`.
    fn pledge(&mut self, migration: MigrationId, peer: &str) -> Result<()>;

    /// The frozen workload goes on, tracked as before: the link was lost before anything was decided, and rounds will
    /// follow. Only before `pledge`.
    ///
    /// # Errors
    /// `Workload`.
    fn thaw(&mut self) -> Result<()>;

    /// The workload goes on here. Before `pledge` always allowed; behind it only when the destination has said that
    /// it will never start this migration.
    ///
    /// # Errors
    /// `Workload`.
    fn resume(self: Box<Self>) -> Result<()>;

    /// The frozen workload is safe in a checkpoint: it ends here.
    ///
    /// # Errors
    /// `Workload`; it may run on then.
    fn end(self: Box<Self>, durable: Durable) -> Result<()>;

    /// The destination has it: the workload ends here.
    ///
    /// # Errors
    /// `Workload`; the destination runs all the same.
    fn hand_over(self: Box<Self>, committed: Committed) -> Result<()>;

    /// Whether `donate` is possible.
    fn can_donate(&self) -> bool {
        true
    }

    /// The destination runs it and misses pages: the workload never runs here again, and its memory stays whole.
    fn donate(self: Box<Self>, committed: Committed) -> Box<dyn Donor>;

    /// The operator's order, or a crash of the engine, in a phase where the workload must stay frozen and
    /// recoverable: lets go of it without resuming it.
    fn leave_frozen(self: Box<Self>);
}

/// What is left of a workload that runs elsewhere and misses pages: its memory, as it was when it was frozen.
///
/// *Dropping it must not lose anything:* the workload stays frozen, pledged and whole, and can be made a donor again.
pub trait Donor: Send + Sync {
    /// The workload's name.
    fn name(&self) -> &str;

    /// Its memory.
    fn layout(&self) -> &Layout;

    /// Copies the bytes of a run into `buffer`, which is exactly as long.
    ///
    /// # Errors
    /// `Workload` or `Host`.
    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()>;

    /// The destination has everything: what is left of the workload ends here.
    ///
    /// # Errors
    /// `Workload`; the destination runs all the same.
    fn finish(self: Box<Self>, completed: Completed) -> Result<()>;
}

/// For `donate` of a source whose `can_donate` is false: nobody calls it who asks.
pub(crate) struct NoDonor(pub(crate) Workload);

impl NoDonor {
    fn error(&self) -> Error {
        Error::Workload(format!("{} runs only where all of its memory is: none of it follows", self.0.name))
    }
}

impl Donor for NoDonor {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn layout(&self) -> &Layout {
        &self.0.layout
    }

    fn read(&self, _: PageRun, _: &mut [u8]) -> Result<()> {
        Err(self.error())
    }

    fn finish(self: Box<Self>, _: Completed) -> Result<()> {
        Err(self.error())
    }
}

/// Proof that the destination has said that it misses nothing. Only the outbound engine makes one.
#[derive(Debug)]
pub struct Completed {
    migration: MigrationId,
}

impl Completed {
    /// For the place alone where that word was read.
    pub(crate) fn new(migration: MigrationId) -> Self {
        Self { migration }
    }

    /// Which migration.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }
}

/// Proof that a checkpoint is durable that has all of a workload. Only [`crate::checkpoint`] makes one.
#[derive(Debug)]
pub struct Durable {
    checkpoint: CheckpointId,
}

impl Durable {
    /// For the place alone where the manifest became durable.
    pub(crate) fn new(checkpoint: CheckpointId) -> Self {
        Self { checkpoint }
    }

    /// Which checkpoint.
    pub fn checkpoint(&self) -> CheckpointId {
        self.checkpoint
    }
}

/// Proof that `Commit` was sent after `Ready` was read, and that the destination has started the workload. Only
/// the outbound engine makes one.
#[derive(Debug)]
pub struct Committed {
    migration: MigrationId,
}

impl Committed {
    /// For the commit handshake alone.
    pub(crate) fn new(migration: MigrationId) -> Self {
        Self { migration }
    }

    /// Which migration.
    pub fn migration(&self) -> MigrationId {
        self.migration
    }
}

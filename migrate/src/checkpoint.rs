//! From a running workload to a checkpoint in a store.
//!
//! ```text
//! track ─▶ rounds ─▶ freeze ─▶ state ─▶ (goes on) ─▶ write ─▶ commit ─▶ settle
//!             │         │                              ▲
//!             ▼         ▼                              │
//!           stage ═══ writers ═══════════════════▶ segments
//! ```
//!
//! The workload is paused for its last pages and its state, which are copied to memory; what it takes to make them durable, it
//! takes behind its back.
//!
//! # A checkpoint exists only when all of it is durable
//!
//! First the segments, then the index and the state, and when all of them are durable, the manifest: a checkpoint exists if and
//! only if that object does. The workload's VMM is told only then that its dirty pages are counted from this checkpoint on.
//!
//! Whatever goes wrong before changes nothing. The pages that were taken are given back, so that the next checkpoint has them;
//! the baseline stays the one there was; the workload runs on; and what was written is no checkpoint and is removed, by this or by
//! the store's garbage collection. Once the manifest may have been written, nothing is removed here any more: what looks like a
//! failure may be an answer that was lost.

mod stop;
mod stage;
mod packing;
mod placement;
mod known;
mod writer;
mod rounds;
mod commit;
mod merged;
mod meeting;
mod group;
mod report;

use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::report::{Event, Observer, Phase, Timed, micros};
use crate::source::{Dirty, Source};
use crate::store::Lease;
use crate::vault::Vault;
pub use group::{GroupFailed, GroupOptions, GroupReport, Joining, take_group};
use known::Known;
pub use meeting::{Meeting, Member, Spread};
#[cfg(test)]
pub(crate) use merged::write as write_merged;
use protocol::checkpoint::manifest::{MAX_CHAIN_DELTAS, MergedIndex, Parent};
use protocol::checkpoint::name::CheckpointId;
use protocol::page::PageSet;
pub use report::CheckpointReport;
use stage::Stage;
use std::sync::Arc;
use std::thread::Scope;
use std::time::{Duration, Instant};
use stop::Measured;
use writer::{Progress, Target, Writers};

/// What the operator wants.
#[derive(Debug, Clone)]
pub struct Options {
    /// The checkpoint's name: see [`new_id`](crate::vault::new_id).
    pub id: CheckpointId,
    /// A full one, whatever a delta could stand on.
    pub full: bool,
    /// The longest pause to aim at.
    pub max_pause: Duration,
    /// What a pause takes without pages, as the last one did, or a guess.
    pub fixed_cost: Duration,
    /// Memory between the workload and the store while it runs; twice as much at most for the last pages.
    pub stage_bytes: u64,
    /// Whether pages may be packed.
    pub pack: bool,
    /// Whether a full checkpoint refers to what lies in the store already, instead of writing it again.
    pub share: bool,
    /// Whether the workload ends with the checkpoint, instead of going on.
    pub suspend: bool,
    /// It counts as taken later than this, in milliseconds since 1970, and than its parent, whatever the clock says: the newest is the one with
    /// the latest time.
    pub after_unix_ms: u64,
    /// Its place in the group without which it does not exist, and what that is called.
    pub group: Option<(Member, String)>,
}

impl Options {
    /// The defaults for a checkpoint of this name.
    pub fn new(id: CheckpointId) -> Self {
        Self {
            id,
            full: false,
            max_pause: Duration::from_millis(5),
            // Stopping, saving and going on took 0.3 to 0.8 ms with one vCPU (November 2026).
            fixed_cost: Duration::from_millis(1),
            stage_bytes: 128 << 20,
            pack: true,
            share: true,
            suspend: false,
            after_unix_ms: 0,
            group: None,
        }
    }
}

/// A checkpoint that does not exist: why, and what was done until then.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub struct Failed {
    /// Why.
    pub error: Error,
    /// Its numbers.
    pub report: CheckpointReport,
}

/// Takes a checkpoint of a workload into a store of which `lease` is the right to write.
///
/// # Errors
/// Everything that can go wrong before the manifest is durable, naming its phase: the workload runs on, unless it is
/// `NotResumed`, and the next checkpoint misses nothing.
pub fn take(
    source: Box<dyn Source>,
    vault: &Vault,
    lease: &dyn Lease,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn Observer,
) -> std::result::Result<CheckpointReport, Box<Failed>> {
    let progress = Progress::default();
    let mut taking = Taking::new(source, vault, lease, options, cancel, observer, &progress);
    match std::thread::scope(|scope| taking.write_down(scope)) {
        Ok(()) => taking.settle(),
        Err(error) => Err(taking.give_up(error)),
    }
}

/// What a delta stands on.
struct Standing {
    /// How it is named there.
    parent: Parent,
    /// How many deltas there are with it.
    deltas: u32,
    /// The nearest merged index.
    merged: Option<MergedIndex>,
    /// When it was taken.
    taken_unix_ms: u64,
    /// What lies in the store for all of that.
    stored_bytes: u64,
}

struct Taking<'env, 'run> {
    source: Box<dyn Source>,
    vault: &'env Vault,
    lease: &'run dyn Lease,
    options: &'run Options,
    cancel: &'run CancelFlag,
    observer: &'run mut dyn Observer,
    progress: &'env Progress,
    report: CheckpointReport,
    stage: Stage,
    /// What a delta stands on.
    parent: Option<Parent>,
    /// The nearest merged index of what it stands on.
    merged: Option<MergedIndex>,
    /// Every page that was taken from the source, in all rounds.
    taken: Vec<PageSet>,
    measured: Vec<Measured>,
    round: u32,
    told: Instant,
    begun: Instant,
    /// While the workload stands still: since when.
    frozen_at: Option<Instant>,
    /// When it was taken, or, until it stands still, what it is later than.
    taken_unix_ms: u64,
    /// How long the last pages took to be copied.
    frozen_copying: Duration,
    /// The description of the machine, and the workload's state.
    state: Vec<u8>,
    /// What lies in the store already, for a full checkpoint.
    known: Arc<Known>,
    /// Whether the manifest may be in the store.
    may_exist: bool,
}

impl<'env, 'run> Taking<'env, 'run> {
    fn new(
        source: Box<dyn Source>,
        vault: &'env Vault,
        lease: &'run dyn Lease,
        options: &'run Options,
        cancel: &'run CancelFlag,
        observer: &'run mut dyn Observer,
        progress: &'env Progress,
    ) -> Self {
        let workload = source.workload();
        let memory_bytes = workload.layout.memory_bytes();
        let stage = Stage::new(&workload.layout, options.stage_bytes);
        let report = CheckpointReport::new(options.id, &workload.name, vault.place(), memory_bytes);
        Self {
            taken: workload.layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect(),
            source,
            vault,
            lease,
            options,
            cancel,
            observer,
            progress,
            report,
            stage,
            parent: None,
            merged: None,
            measured: Vec::new(),
            round: 0,
            told: Instant::now(),
            begun: Instant::now(),
            frozen_at: None,
            taken_unix_ms: options.after_unix_ms,
            frozen_copying: Duration::ZERO,
            state: Vec::new(),
            known: Arc::default(),
            may_exist: false,
        }
    }

    /// Everything up to the manifest. An error leaves the source free to go on, or going on.
    fn write_down<'scope>(&mut self, scope: &'scope Scope<'scope, 'env>) -> Result<()>
    where
        'env: 'scope,
    {
        self.phase(Phase::Track, Self::track)?;
        let Options { id, pack, .. } = *self.options;
        let target = Target { vault: self.vault, id, pack, known: Arc::clone(&self.known) };
        let writers = Writers::start(scope, &self.stage, &target, self.progress);
        let read = self.read_all();
        if let Err(error) = &read {
            if let Some((member, _)) = &self.options.group {
                // At once: others may stand still and wait for this one.
                member.fail(&error.to_string());
            }
            // Nobody needs what the writers would write, and the workload does not wait for them.
            self.stage.fail(Error::Interrupted(error.to_string()));
            self.thaw();
        }
        read?;
        let (written, segments) = self.phase(Phase::Write, |taking| taking.wait_for(writers))?;
        self.phase(Phase::Commit, |taking| taking.commit(written, segments))
    }

    /// Lets the workload go on at once behind a failure. If that fails, too, it is tried again at the end.
    fn thaw(&mut self) {
        let Some(frozen_at) = self.frozen_at else { return };
        match self.source.thaw() {
            Ok(()) => {
                self.frozen_at = None;
                self.report.pause_us = micros(frozen_at.elapsed());
            }
            Err(error) => tracing::warn!(%error, "the workload could not go on at once"),
        }
    }

    /// All pages and the state: behind it the workload runs, unless it is to end.
    fn read_all(&mut self) -> Result<()> {
        self.phase(Phase::Rounds, Self::rounds)?;
        self.phase(Phase::Freeze, Self::freeze)?;
        self.phase(Phase::State, Self::state)
    }

    /// One phase: told, timed, logged, and named in its error.
    fn phase<T>(&mut self, phase: Phase, body: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let timed = Timed::begin(phase);
        self.observer.event(&Event::Phase { phase });
        let result = body(self);
        timed.end(result, &mut self.report.phases)
    }

    fn track(&mut self) -> Result<()> {
        self.cancel.check()?;
        self.report.tracking = self.source.track(Dirty::SinceBaseline)?;
        let baseline = self.source.baseline().filter(|_| !self.options.full);
        let Some(baseline) = baseline else { return self.know() };
        match self.stands_on(baseline) {
            Ok(Standing { parent, deltas, merged, taken_unix_ms, stored_bytes }) => {
                self.taken_unix_ms = self.taken_unix_ms.max(taken_unix_ms);
                (self.report.parent, self.report.deltas) = (Some(parent.id), deltas);
                self.report.chain_bytes = stored_bytes;
                (self.parent, self.merged) = (Some(parent), merged);
            }
            Err(why) => {
                self.warn(format!("a full checkpoint instead of a delta on {baseline}: {why}"));
                self.know()?;
            }
        }
        Ok(())
    }

    /// Finds out what lies in the store already, where looking there is no dearer than writing.
    fn know(&mut self) -> Result<()> {
        if self.options.share && !self.vault.store().is_remote() {
            self.known = Arc::new(Known::of(self.vault, &self.source.workload().name)?);
        }
        Ok(())
    }

    /// Whether a delta can stand on this checkpoint.
    fn stands_on(&self, id: CheckpointId) -> std::result::Result<Standing, String> {
        let chain = self.vault.chain(id).map_err(|error| error.to_string())?;
        let parent = chain.first().ok_or("it is no checkpoint of this store")?;
        let workload = self.source.workload();
        if parent.manifest.layout != workload.layout {
            return Err("its memory is laid out in another way".into());
        }
        let deltas = parent.manifest.deltas + 1;
        if deltas > MAX_CHAIN_DELTAS {
            return Err(format!("{MAX_CHAIN_DELTAS} deltas on each other are the most there can be"));
        }
        let own = chain.iter().flat_map(|link| {
            let id = link.manifest.id;
            link.manifest.segments.iter().filter(move |segment| segment.checkpoint == id)
        });
        let stored_bytes = own.map(|segment| segment.bytes).sum();
        let taken_unix_ms = parent.manifest.taken_unix_ms;
        let own = self.vault.merged_of(id).map_err(|error| error.to_string())?;
        let merged = own.or(parent.manifest.merged);
        Ok(Standing { parent: parent.as_parent(), deltas, merged, taken_unix_ms, stored_bytes })
    }

    fn warn(&mut self, warning: String) {
        tracing::warn!(checkpoint = %self.options.id, "{warning}");
        self.report.warnings.push(warning);
    }
}

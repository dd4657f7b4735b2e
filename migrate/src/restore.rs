//! From a chain of checkpoints to a running workload.
//!
//! ```text
//! manifest ─▶ state ─▶ prepare, lazy: load ────┬▶ eager: pages ─▶ load ─▶ start
//!      └─▶ older manifests, indexes, merged ───┴▶ lazy:  expect ─▶ start ─▶ touched pages, all others ─▶ complete
//! ```
//!
//! # Nothing half
//!
//! Whatever is missing or damaged ends it before the start, and the VMM is discarded: no workload ever runs on less than its checkpoint.
//! A lazy one is started once manifests, indexes and state were read and checked, and every segment was found in its full length; its
//! pages are checked as they come, and one that is not right is never put in place.
//!
//! # Any number of times
//!
//! Nothing in the store is changed but the record of first touches, so a checkpoint can be restored again, twice at once, and anywhere. Each
//! restore has a name of its own, like a migration; half of it tells which checkpoint it was, so that a workload that still misses
//! pages is never taken up with those of another.

pub mod plan;
mod order;
mod touches;
pub(crate) mod fetch;
mod gather;
pub mod image;
pub(crate) mod eager;
mod lazy;
mod group;
pub mod report;
#[cfg(test)]
mod tests;

use crate::cancel::CancelFlag;
use crate::destination::{Destination, Incomplete, Refusal};
use crate::error::{Error, Result};
use crate::outbound::new_migration_id;
use crate::report::micros;
use crate::vault::{Committed, Vault};
use fetch::{Early, Fetch};
pub use group::{Open, restore_group};
use lazy::{Pages, Serving};
use plan::{Plan, Sums};
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::checkpoint::object::Digest;
use protocol::control::{Offer, RefuseCode};
use protocol::layout::SpaceKind;
use protocol::page::{PageRun, PageSet, SpaceId};
use report::{Clock, Event, Lazily, Report, Step};
use std::thread;
use std::time::Instant;

/// How to restore.
#[derive(Debug, Clone)]
pub struct Options {
    /// Start the workload before its pages are there.
    pub lazy: bool,
    /// The most memory the workload may have, in bytes.
    pub max_memory_bytes: u64,
    /// Threads that read pages.
    pub threads: usize,
}

impl Options {
    /// As most want it.
    pub fn new(max_memory_bytes: u64) -> Self {
        Self { lazy: false, max_memory_bytes, threads: 2 }
    }
}

/// Restores a checkpoint into a destination, and answers when all of its memory is there.
///
/// # Errors
/// `Store` naming checkpoint and object, `Refused` when this host cannot take the workload, `Workload`, `Host`, `Interrupted`. Nothing
/// runs then, but for an interrupted lazy restore, whose text says so.
pub fn restore(
    vault: &Vault,
    id: CheckpointId,
    destination: Box<dyn Destination>,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn FnMut(&Event),
) -> Result<Report> {
    let mut clock = Clock::start(observer);
    let newest = &clock.time(Step::Chain, |_| vault.manifest(id))?;
    let migration = name_of(&newest.digest)?;
    let run = Run { vault, newest, migration, options, cancel };
    run.restore(destination, &mut clock)
}

/// Goes on with a workload that was restored lazily and misses pages, because the restore that served it is gone.
///
/// # Errors
/// `Workload` when there is none, or it was restored from another checkpoint; or as [`restore`].
pub fn take_up(
    vault: &Vault,
    id: CheckpointId,
    destination: &dyn Destination,
    migration: MigrationId,
    options: &Options,
    cancel: &CancelFlag,
    observer: &mut dyn FnMut(&Event),
) -> Result<Report> {
    let mut clock = Clock::start(observer);
    let newest = &clock.time(Step::Chain, |_| vault.manifest(id))?;
    if mark(&newest.digest) != migration.0 >> 64 {
        return Err(Error::Workload(format!(
            "the VM was not restored from checkpoint {id}, so its missing pages are not there: name the one it was restored from"
        )));
    }
    let run = Run { vault, newest, migration, options, cancel };
    run.take_up(destination, &mut clock)
}

/// The half of a restore's name that stands for the checkpoint: the beginning of its manifest's digest.
fn mark(digest: &Digest) -> u128 {
    digest.iter().take(8).fold(0, |sum, byte| sum << 8 | u128::from(*byte))
}

/// A name for a restore of the checkpoint with this manifest.
fn name_of(digest: &Digest) -> Result<MigrationId> {
    let random = new_migration_id()?.0 & u128::from(u64::MAX);
    Ok(MigrationId(mark(digest) << 64 | random))
}

/// One restore.
struct Run<'a> {
    vault: &'a Vault,
    newest: &'a Committed,
    migration: MigrationId,
    options: &'a Options,
    cancel: &'a CancelFlag,
}

impl Run<'_> {
    fn restore(&self, mut destination: Box<dyn Destination>, clock: &mut Clock<'_>) -> Result<Report> {
        let manifest = &self.newest.manifest;
        let offer = Offer {
            migration: self.migration,
            kind: manifest.kind,
            name: manifest.workload.clone(),
            layout: manifest.layout.clone(),
            page_streams: 1,
            connections: 1,
            seed: None,
        };
        // Before anything of it is read: so much memory would have to be here.
        offer.check(self.options.max_memory_bytes).map_err(|error| {
            let reason =
                format!("checkpoint {}: {error}; free some memory, or say --max-memory", manifest.id);
            Error::Refused { code: RefuseCode::Memory, reason }
        })?;
        let (machine, state) = clock.time(Step::State, |_| self.vault.state(manifest))?;
        let lazy = self.options.lazy;
        let (ready, gathered) = thread::scope(|scope| {
            let gathering = scope.spawn(|| self.gather());
            let refused = |Refusal { code, reason }| {
                let reason = format!("checkpoint {} cannot be started here: {reason}", manifest.id);
                Error::Refused { code, reason }
            };
            let prepared = clock.time(Step::Prepare, |_| destination.prepare(&offer, &machine));
            // Before its pages are known: then only they are missing.
            let ready = prepared.map_err(refused).and_then(|()| match lazy {
                true => clock.time(Step::Load, |_| self.load(destination.as_mut(), &state)),
                false => Ok(()),
            });
            (ready, clock.time(Step::Indexes, |_| joined(gathering.join())))
        });
        let found = match ready.and(gathered) {
            Ok(found) => found,
            Err(error) => return Err(discarded(destination, error)),
        };
        if lazy && found.fetch.plan().data_pages() > 0 {
            self.lazily(destination, &found, clock)
        } else {
            self.eagerly(destination, &found, (!lazy).then_some(&state), clock)
        }
    }

    /// Goes on with a workload that was started already.
    fn take_up(&self, destination: &dyn Destination, clock: &mut Clock<'_>) -> Result<Report> {
        let found = clock.time(Step::Indexes, |_| self.gather())?;
        // Before it is taken: what cannot be served is left to another restore.
        found.fetch.open_all()?;
        let workload = destination.take_up(self.migration)?.ok_or_else(|| {
            Error::Workload("the VM misses no pages any more: there is nothing to take up".into())
        })?;
        let running_us = clock.elapsed_us();
        let pages = || Ok(Pages::of(&found.fetch, &found.recorded));
        self.serve(workload.as_ref(), &found, pages, running_us, clock)
    }

    /// Reads what tells where the pages lie, and what earlier restores recorded.
    fn gather(&self) -> Result<Found> {
        let manifest = &self.newest.manifest;
        let early = Early::new(self.vault.clone());
        let (plan, merged_links) =
            timed("plan", || planned(self.vault, self.newest, Sums::Few, Some(&early), self.cancel))?;
        let fetch = Fetch::new(self.vault.clone(), plan, Some(&early));
        let recorded =
            if self.options.lazy { self.vault.touched(manifest.id, &manifest.layout) } else { Vec::new() };
        Ok(Found {
            links: u64::from(manifest.deltas) + 1,
            merged_links,
            fetch,
            recorded: touches::merged(&recorded),
        })
    }

    /// `state` is what is still to be loaded.
    fn eagerly(
        &self,
        mut destination: Box<dyn Destination>,
        found: &Found,
        state: Option<&[u8]>,
        clock: &mut Clock<'_>,
    ) -> Result<Report> {
        let memory = destination.memory();
        let (threads, cancel) = (self.options.threads, self.cancel);
        let read = clock.time(Step::Read, |observer| {
            found.fetch.open_all()?;
            eager::read(&found.fetch, &*memory, threads, cancel, observer)
        });
        let mut load = |state| clock.time(Step::Load, |_| self.load(destination.as_mut(), state));
        let ready = read.and_then(|()| state.map_or(Ok(()), &mut load)).and_then(|()| cancel.pass());
        if let Err(error) = ready {
            return Err(discarded(destination, error));
        }
        let name = clock.time(Step::Start, |_| destination.start(self.migration))?;
        let running_us = clock.elapsed_us();
        clock.tell(&Event::Running {
            name: name.clone(),
            migration: self.migration,
            running_us,
            missing_pages: 0,
        });
        Ok(self.report(name, found, running_us, None, clock))
    }

    /// Tracks the workload from its first instruction on, and loads its state.
    fn load(&self, destination: &mut dyn Destination, state: &[u8]) -> Result<()> {
        let checkpoint = self.newest.manifest.id;
        if let Err(error) = destination.begin_from(checkpoint) {
            tracing::info!(%checkpoint, %error, "the next checkpoint will not be a delta on the one that is restored");
        }
        destination.load(state)
    }

    fn lazily(
        &self,
        mut destination: Box<dyn Destination>,
        found: &Found,
        clock: &mut Clock<'_>,
    ) -> Result<Report> {
        let fetch = &found.fetch;
        let layout = &self.newest.manifest.layout;
        let is_disk = |space| layout.space(space).is_some_and(|space| space.kind == SpaceKind::Disk);
        if layout.has_disks() {
            // Memory can be waited for, a disk cannot: it is there whole before the start.
            let (memory, threads, cancel) = (destination.memory(), self.options.threads, self.cancel);
            let read = clock.time(Step::Read, |observer| {
                eager::read_of(fetch, &*memory, &is_disk, threads, cancel, observer)
            });
            if let Err(error) = read {
                return Err(discarded(destination, error));
            }
        }
        let awaited = |(space, data): (u16, &PageSet)| {
            if is_disk(SpaceId(space)) { PageSet::empty(data.pages()) } else { data.clone() }
        };
        let missing: Vec<PageSet> = (0..).zip(&fetch.plan().data).map(awaited).collect();
        thread::scope(|scope| {
            let opened = scope.spawn(|| timed("segments", || fetch.open_all()));
            // What is touched first waits for it, and the start does not.
            let pages = scope.spawn(|| timed("places", || Ok(Pages::of(fetch, &found.recorded))));
            let ready = clock
                .time(Step::Expect, |_| destination.expect(&missing))
                .and(joined(opened.join()))
                .and_then(|()| self.cancel.pass());
            if let Err(error) = ready {
                return Err(discarded(destination, error));
            }
            let workload = clock.time(Step::Start, |_| destination.start_incomplete(self.migration))?;
            let running_us = clock.elapsed_us();
            self.serve(workload.as_ref(), found, || joined(pages.join()), running_us, clock)
        })
    }

    fn serve<'f>(
        &self,
        workload: &dyn Incomplete,
        found: &'f Found,
        pages: impl FnOnce() -> Result<Pages<'f>>,
        running_us: u64,
        clock: &mut Clock<'_>,
    ) -> Result<Report> {
        let missing_pages = workload.missing().iter().map(PageSet::count).sum();
        clock.tell(&Event::Running {
            name: workload.name().into(),
            migration: self.migration,
            running_us,
            missing_pages,
        });
        let (threads, begun, cancel) = (self.options.threads, clock.begun(), self.cancel);
        let served = clock.time(Step::Stream, |observer| {
            Serving::new(workload, pages()?)?.run(threads, begun, cancel, observer)
        });
        let (recorder, lazily) = served?;
        // A store that cannot be written to is as good to read from.
        if let Err(error) = self.vault.put_touched(self.newest.manifest.id, recorder.runs()) {
            tracing::info!(%error, "what was touched first is not recorded");
        }
        Ok(self.report(workload.name().into(), found, running_us, Some(lazily), clock))
    }

    fn report(
        &self,
        name: String,
        found: &Found,
        running_us: u64,
        lazily: Option<Lazily>,
        clock: &Clock<'_>,
    ) -> Report {
        let (manifest, plan) = (&self.newest.manifest, found.fetch.plan());
        Report {
            checkpoint: manifest.id,
            migration: self.migration,
            name,
            links: found.links,
            merged_links: found.merged_links,
            memory_bytes: manifest.layout.memory_bytes(),
            data_pages: plan.data_pages(),
            stored_bytes: plan.stored_bytes(),
            steps: clock.steps().to_vec(),
            running_us,
            total_us: clock.elapsed_us(),
            lazily,
        }
    }
}

/// What tells where the pages lie.
struct Found {
    /// Links of the chain.
    links: u64,
    /// How many indexes were merged.
    merged_links: u64,
    /// The pages; not every segment was looked for yet.
    fetch: Fetch,
    /// What earlier restores touched first.
    recorded: Vec<PageRun>,
}

/// Where the pages of a checkpoint lie, by the shortest way: with a merged index if there is one, and can be read. And how many indexes were
/// merged. `early` is told of the segments that may be needed.
///
/// # Errors
/// `Store` naming checkpoint and object, `Interrupted`.
pub(crate) fn planned(
    vault: &Vault,
    newest: &Committed,
    sums: Sums,
    early: Option<&Early>,
    cancel: &CancelFlag,
) -> Result<(Plan, u64)> {
    if let Some(merged) = &newest.manifest.merged {
        let short = vault
            .chain_above(newest.clone(), merged.id)
            .and_then(|chain| gather::merged(vault, &chain, Some(merged), sums, early, cancel));
        match short {
            Err(error) if !matches!(error.root(), Error::Interrupted(_)) => {
                tracing::info!(%error, "every index of the chain is read instead");
            }
            found => return found,
        }
    }
    gather::merged(vault, &vault.chain_of(newest.clone())?, None, sums, early, cancel)
}

/// The pages of a chain, newest first; every segment that will be read was found.
///
/// # Errors
/// `Store` naming checkpoint and object, `Interrupted`.
pub(crate) fn pages_of(vault: &Vault, chain: &[Committed], sums: Sums, cancel: &CancelFlag) -> Result<Fetch> {
    let early = Early::new(vault.clone());
    let (plan, _) = gather::merged(vault, chain, None, sums, Some(&early), cancel)?;
    let fetch = Fetch::new(vault.clone(), plan, Some(&early));
    fetch.open_all()?;
    Ok(fetch)
}

/// How long something took that no step of the report tells.
fn timed<T>(what: &str, body: impl FnOnce() -> T) -> T {
    let begun = Instant::now();
    let answer = body();
    tracing::debug!(what, duration_us = micros(begun.elapsed()), "done");
    answer
}

fn joined<T>(result: thread::Result<Result<T>>) -> Result<T> {
    result.unwrap_or_else(|_| Err(Error::Host("a thread that read the store ended unexpectedly".into())))
}

/// Nothing is started.
fn discarded(destination: Box<dyn Destination>, error: Error) -> Error {
    destination.discard();
    error
}

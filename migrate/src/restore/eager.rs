//! All pages before the workload starts: two threads read, check and write, each the next group of extents.

use super::fetch::{Fetch, Scratch};
use super::report::Event;
use crate::cancel::CancelFlag;
use crate::destination::PageMemory;
use crate::error::{Error, Result};
use protocol::page::SpaceId;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::thread;
use std::time::{Duration, Instant};

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// Extents are read together up to this far apart: on a network a request costs more than so many bytes, and a disk reads on anyway.
pub(super) const GAP_BYTES: u64 = 64 << 10;

/// What one thread reads at once.
pub(super) const GROUP_BYTES: u64 = 2 << 20;

/// Reads every page into memory. Behind an error memory is good for nothing.
pub(crate) fn read(
    fetch: &Fetch,
    memory: &dyn PageMemory,
    threads: usize,
    cancel: &CancelFlag,
    observer: &mut dyn FnMut(&Event),
) -> Result<()> {
    read_of(fetch, memory, &|_| true, threads, cancel, observer)
}

/// Reads every page of some spaces. Behind an error they are good for nothing.
pub(super) fn read_of(
    fetch: &Fetch,
    memory: &dyn PageMemory,
    wanted: &(dyn Fn(SpaceId) -> bool + Sync),
    threads: usize,
    cancel: &CancelFlag,
    observer: &mut dyn FnMut(&Event),
) -> Result<()> {
    let plan = fetch.plan();
    fetch.bring_sums();
    let mut groups = plan.groups(GAP_BYTES, GROUP_BYTES);
    groups.retain(|group| {
        let needs = plan.needs.get(group.clone()).unwrap_or_default();
        needs.iter().any(|need| plan.parts(need).iter().any(|part| wanted(part.run().space)))
    });
    let of_wanted = (0..).zip(&plan.data).filter(|(space, _)| wanted(SpaceId(*space)));
    let total_pages = of_wanted.map(|(_, data)| data.count()).sum::<u64>();
    let work = Work {
        fetch,
        memory,
        wanted,
        groups,
        next: AtomicUsize::new(0),
        done_pages: AtomicU64::new(0),
        failed: Mutex::default(),
    };
    thread::scope(|scope| {
        let spawn = |_| {
            thread::Builder::new()
                .name("restore".into())
                .spawn_scoped(scope, || work.run())
                .map_err(|error| Error::Host(format!("could not start a thread: {error}")))
        };
        let workers = (0..threads.max(1)).map(spawn).collect::<Result<Vec<_>>>();
        let workers = workers.inspect_err(|_| work.stop())?;
        while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            if let Err(error) = cancel.check() {
                work.fail(error);
            }
            let done_pages = work.done_pages.load(Relaxed);
            observer(&Event::Reading { done_pages, remaining_pages: total_pages.saturating_sub(done_pages) });
            work.wait(TELL, &workers);
        }
        for worker in workers {
            if worker.join().is_err() {
                work.fail(Error::Host("a thread that read the checkpoint ended unexpectedly".into()));
            }
        }
        Ok::<_, Error>(())
    })?;
    let failed = work.failed.lock().unwrap_or_else(PoisonError::into_inner).take();
    failed.map_or(Ok(()), Err)?;
    memory.settle()
}

struct Work<'a> {
    fetch: &'a Fetch,
    memory: &'a dyn PageMemory,
    wanted: &'a (dyn Fn(SpaceId) -> bool + Sync),
    groups: Vec<Range<usize>>,
    next: AtomicUsize,
    done_pages: AtomicU64,
    failed: Mutex<Option<Error>>,
}

impl Work<'_> {
    fn run(&self) {
        let mut scratch = Scratch::default();
        while let Some(group) = self.groups.get(self.next.fetch_add(1, Relaxed)) {
            if let Err(error) = self.group(group.clone(), &mut scratch) {
                self.fail(error);
                return;
            }
        }
    }

    fn group(&self, group: Range<usize>, scratch: &mut Scratch) -> Result<()> {
        self.fetch.group(group, scratch, &mut |run, bytes| {
            if !(self.wanted)(run.space) {
                return Ok(());
            }
            self.memory.write(run.space, run.offset(), bytes)?;
            self.done_pages.fetch_add(u64::from(run.count), Relaxed);
            Ok(())
        })
    }

    /// The first error is the one that is told.
    fn fail(&self, error: Error) {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        self.stop();
    }

    fn stop(&self) {
        self.next.store(self.groups.len(), Relaxed);
    }

    /// Waits until it is time to tell again, or all are done.
    fn wait(&self, limit: Duration, workers: &[thread::ScopedJoinHandle<'_, ()>]) {
        let until = Instant::now() + limit;
        while Instant::now() < until && !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

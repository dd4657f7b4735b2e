//! A program's memory as a source. It stands still for as long as it is asked: its thread is the engine's.

use super::digests::Digests;
use super::none_of;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PageReader};
use crate::source::{Committed, Dirty, Donor, Durable, NoDonor, Source, Workload};
use crate::sys::{Mapped, WriteTracker};
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet, SpaceId};
use protocol::state::State;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The section of a state that holds the program's own bytes.
pub(super) const SECTION: &str = "program";

/// The version of that section.
pub(super) const SECTION_VERSION: u16 = 1;

/// How it is found what a program has written.
pub(super) enum Tracking {
    /// The kernel tells.
    Kernel(WriteTracker),
    /// It is found by looking.
    Digests(Digests),
    /// Not at all, and why.
    Not(String),
}

/// What is known of a program's pages, from one checkpoint to the next.
pub(super) struct Books {
    tracker: Tracking,
    /// The checkpoint that has everything but what was written since.
    baseline: Option<CheckpointId>,
    /// Pages that were taken from the tracker and are safe nowhere.
    owed: Vec<PageSet>,
    /// Pages that were taken in the attempt that is under way.
    taken: Vec<PageSet>,
}

impl Books {
    pub(super) fn new(layout: &Layout) -> Self {
        let tracker = Tracking::Not("tracking has not begun".into());
        Self { tracker, baseline: None, owed: none_of(layout), taken: none_of(layout) }
    }

    pub(super) fn start(&mut self, tracker: Tracking) {
        self.forget();
        self.tracker = tracker;
    }

    /// Nothing is known any more: the next checkpoint is a full one.
    pub(super) fn forget(&mut self) {
        self.tracker = Tracking::Not("tracking has not begun".into());
        self.baseline = None;
        self.owed.iter_mut().chain(&mut self.taken).for_each(PageSet::clear);
    }

    /// What the regions hold is what this checkpoint has.
    pub(super) fn stands_on(&mut self, checkpoint: CheckpointId) {
        self.baseline = Some(checkpoint).filter(|_| self.tracking().is_ok());
    }

    pub(super) fn tracking(&self) -> std::result::Result<&'static str, String> {
        match &self.tracker {
            Tracking::Kernel(_) => Ok("userfaultfd-wp-async"),
            Tracking::Digests(_) => Ok("blake3-digests"),
            Tracking::Not(why) => Err(why.clone()),
        }
    }

    /// An attempt ended: what it took and did not make safe is owed.
    fn give_back(&mut self) {
        for (owed, taken) in self.owed.iter_mut().zip(&mut self.taken) {
            owed.union(taken);
            taken.clear();
        }
    }
}

/// The program for one checkpoint.
pub(super) struct ProgramSource {
    workload: Workload,
    regions: Arc<Vec<Mapped>>,
    memory: GuestMemory,
    books: Arc<Mutex<Books>>,
    state: Vec<u8>,
}

impl ProgramSource {
    pub(super) fn new(
        workload: Workload,
        regions: Arc<Vec<Mapped>>,
        memory: GuestMemory,
        books: Arc<Mutex<Books>>,
        state: &[u8],
    ) -> Self {
        Self { workload, regions, memory, books, state: state.to_vec() }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the written pages of a range of a region; with `clean` they are clean from now on.
    fn written(
        &self,
        books: &Books,
        run: (SpaceId, u64, u64),
        clean: bool,
        tell: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let (space, first, count) = run;
        let region = self.regions.get(usize::from(space.0));
        let (Tracking::Kernel(tracker), Some(region)) = (&books.tracker, region) else {
            return Ok(());
        };
        tracker.written(region, first, count, clean, tell).map_err(|error| {
            Error::Host(format!("the kernel does not tell what {} has written: {error}", self.workload.name))
        })
    }
}

impl Drop for ProgramSource {
    fn drop(&mut self) {
        self.books().give_back();
    }
}

impl Source for ProgramSource {
    fn workload(&self) -> &Workload {
        &self.workload
    }

    fn track(&mut self, dirty: Dirty) -> Result<String> {
        let shared = Arc::clone(&self.books);
        let mut books = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let Books { tracker, owed, .. } = &mut *books;
        if let Tracking::Digests(digests) = tracker {
            // Once for the whole checkpoint: the program stands still until it is taken.
            digests.look(&self.workload.layout, &mut self.memory, owed)?;
        }
        if dirty == Dirty::Everything || books.baseline.is_none() {
            for (owed, space) in books.owed.iter_mut().zip(&self.workload.layout.spaces) {
                owed.insert(0, space.pages);
            }
        }
        Ok(books.tracking().map_or_else(|why| format!("none: {why}"), str::to_owned))
    }

    fn baseline(&self) -> Option<CheckpointId> {
        self.books().baseline
    }

    fn set_baseline(&mut self, checkpoint: CheckpointId) -> Result<()> {
        let mut books = self.books();
        books.taken.iter_mut().for_each(PageSet::clear);
        books.stands_on(checkpoint);
        Ok(())
    }

    fn harvest(&mut self) -> Result<Vec<PageSet>> {
        let books = self.books();
        let mut dirty = books.owed.clone();
        for (space, pages) in self.workload.layout.spaces.iter().zip(&mut dirty) {
            self.written(&books, (space.id, 0, space.pages), false, &mut |first, count| {
                pages.insert(first, count);
            })?;
        }
        Ok(dirty)
    }

    fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()> {
        let mut books = self.books();
        let mut found = Vec::new();
        self.written(&books, (space, first, count), true, &mut |first, count| found.push((first, count)))?;
        let Books { owed, taken, .. } = &mut *books;
        let at = usize::from(space.0);
        let (Some(owed), Some(taken)) = (owed.get_mut(at), taken.get_mut(at)) else { return Ok(()) };
        found.iter().for_each(|(first, count)| taken.insert(*first, *count));
        let end = first.saturating_add(count).min(owed.pages());
        let mut page = first;
        while let Some(run) = owed.next_set(page).filter(|run| *run < end) {
            page = owed.next_clear(run).min(end);
            taken.insert(run, page - run);
        }
        if first < end {
            owed.remove(first, end - first);
        }
        Ok(())
    }

    fn present(&mut self, space: SpaceId, first: u64, count: u64, pages: &mut PageSet) -> Result<()> {
        self.memory.remove_holes(space, first, count, pages)
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        self.memory.read(run.space, run.offset(), buffer)
    }

    fn reader(&self) -> Result<Box<dyn PageReader>> {
        Ok(Box::new(self.memory.duplicate()?))
    }

    fn redirty(&mut self, pages: &[PageSet]) -> Result<()> {
        let mut books = self.books();
        for (owed, pages) in books.owed.iter_mut().zip(pages) {
            owed.union(pages);
        }
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _: u8) -> Result<()> {
        Ok(())
    }

    fn freeze(&mut self) -> Result<()> {
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        let mut state = State::default();
        state.push(SECTION, SECTION_VERSION, self.state.clone());
        Ok(state.encode()?)
    }

    fn pledge(&mut self, _: MigrationId, _: &str) -> Result<()> {
        Err(not_moved())
    }

    fn thaw(&mut self) -> Result<()> {
        Ok(())
    }

    fn resume(self: Box<Self>) -> Result<()> {
        Ok(())
    }

    fn end(self: Box<Self>, _: Durable) -> Result<()> {
        Ok(())
    }

    fn hand_over(self: Box<Self>, _: Committed) -> Result<()> {
        Err(not_moved())
    }

    fn can_donate(&self) -> bool {
        false
    }

    fn donate(self: Box<Self>, _: Committed) -> Box<dyn Donor> {
        Box::new(NoDonor(self.workload.clone()))
    }

    fn leave_frozen(self: Box<Self>) {}
}

fn not_moved() -> Error {
    Error::Workload("a program is written down, not moved: restore it from a checkpoint elsewhere".into())
}

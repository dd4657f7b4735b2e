//! Pages between memory and the store: a queue that is bounded, and has room kept free for the last pages.
//!
//! ```text
//! rounds ─▶ load ─▶ load ─▶ load ─▶ writers ─▶ store
//!    ▲                                 │
//!    └──────── empty buffers ◀─────────┘
//! ```
//!
//! A page that was read again while an older version of it waits here need be written once only: the older one is stale.
//!
//! While the workload runs, whoever reads its memory waits for the store here. While it stands still, it does not: as much again
//! as the bound may be taken then, because a workload that stands still costs more than memory does.

use crate::error::{Error, Result};
use crate::vault::RAW_EXTENT_PAGES;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun};
use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Pages of a load: those of one extent, 256 KiB, which stay in a core's cache while they are looked at, packed and summed.
pub(super) const LOAD_PAGES: u32 = RAW_EXTENT_PAGES as u32;

const BUFFER_BYTES: usize = LOAD_PAGES as usize * PAGE_SIZE;

/// How often a wait looks at what could end it.
const WATCH: Duration = Duration::from_millis(20);

/// Some pages that were read.
#[derive(Debug)]
pub(super) struct Load {
    /// The later it was read, the higher.
    pub(super) number: u64,
    round: u8,
    /// Which pages, in ascending order; together at most [`LOAD_PAGES`].
    pub(super) runs: Vec<PageRun>,
    /// Their bytes, one behind the other, at the front.
    pub(super) buffer: Box<[u8]>,
    /// Bit n: the n-th of them was read again since.
    pub(super) stale: u64,
}

/// The queue. A clone is another handle.
#[derive(Clone)]
pub(super) struct Stage(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    /// Something was queued, or nothing will be any more.
    queued: Condvar,
    /// A buffer became free, or writing failed.
    freed: Condvar,
    /// The most buffers in use while the workload runs.
    live_buffers: usize,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Load>,
    free: Vec<Box<[u8]>>,
    /// Buffers that are being filled, queued, or being written.
    used: usize,
    next_number: u64,
    /// For each page of each space the round in which it was read last.
    read_in: Vec<Vec<u8>>,
    closed: bool,
    /// Writers wait: what they would do takes from the processors that the workload waits for.
    held: bool,
    failed: Option<Error>,
    /// Writing failed, and somebody was told why.
    told: bool,
}

impl Stage {
    /// An empty one for this memory, of which this much may be in use while the workload runs.
    pub(super) fn new(layout: &Layout, live_bytes: u64) -> Self {
        let read_in = layout.spaces.iter().map(|space| vec![0; space.pages as usize]).collect();
        let state = Mutex::new(State { read_in, ..State::default() });
        let live_buffers = usize::try_from(live_bytes).unwrap_or(usize::MAX) / BUFFER_BYTES;
        let (queued, freed) = (Condvar::new(), Condvar::new());
        Self(Arc::new(Shared { state, queued, freed, live_buffers: live_buffers.max(2) }))
    }

    /// Pages that can be in use while the workload runs.
    pub(super) fn live_pages(&self) -> u64 {
        self.0.live_buffers as u64 * u64::from(LOAD_PAGES)
    }

    /// A buffer of [`LOAD_PAGES`] pages, with anything in it. Waits for one as long as `watch` lets it; with `frozen` only once
    /// twice as much is in use.
    ///
    /// # Errors
    /// Why writing failed, or what `watch` says.
    pub(super) fn buffer(&self, frozen: bool, watch: &mut dyn FnMut() -> Result<()>) -> Result<Box<[u8]>> {
        let most = self.0.live_buffers * if frozen { 2 } else { 1 };
        let mut state = self.wait(|state| state.used < most, watch)?;
        state.used += 1;
        let free = state.free.pop();
        drop(state);
        Ok(free.unwrap_or_else(new_buffer))
    }

    /// Queues what was read into a buffer in a round: each page once in it.
    pub(super) fn push(&self, round: u8, runs: Vec<PageRun>, buffer: Box<[u8]>) {
        let mut state = self.lock();
        let number = state.next_number;
        state.next_number += 1;
        for run in &runs {
            state.pages_of(run).fill(round);
        }
        state.queue.push_back(Load { number, round, runs, buffer, stale: 0 });
        drop(state);
        self.0.queued.notify_one();
    }

    /// Waits until so many pages find room that need not wait for the store, or nothing is in use.
    ///
    /// # Errors
    /// As [`Stage::buffer`].
    pub(super) fn make_room(&self, pages: u64, watch: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let wanted = usize::try_from(pages.div_ceil(u64::from(LOAD_PAGES))).unwrap_or(usize::MAX);
        let live = self.0.live_buffers;
        self.wait(|state| state.used == 0 || state.used.saturating_add(wanted) <= live, watch).map(drop)
    }

    /// Makes sure that so many pages find buffers which the kernel has to give no memory for any more: it takes longer to do that
    /// than to fill them.
    pub(super) fn warm(&self, pages: u64) {
        let wanted = usize::try_from(pages.div_ceil(u64::from(LOAD_PAGES))).unwrap_or(usize::MAX);
        let lacking = {
            let state = self.lock();
            let room = (self.0.live_buffers * 2).saturating_sub(state.used);
            wanted.min(room).saturating_sub(state.free.len())
        };
        for _ in 0..lacking {
            let mut buffer = new_buffer();
            buffer.fill(1);
            self.lock().free.push(buffer);
        }
    }

    /// Lets the writers wait behind what they are at, or go on.
    pub(super) fn hold(&self, held: bool) {
        self.lock().held = held;
        if !held {
            self.0.queued.notify_all();
        }
    }

    /// Nothing will be queued any more.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        (state.closed, state.held) = (true, false);
        drop(state);
        self.0.queued.notify_all();
    }

    /// The next load in sequence, for a writer; `None` when there will be none, or writing failed elsewhere.
    pub(super) fn next(&self) -> Option<Load> {
        let mut state = self.lock();
        loop {
            if state.has_failed() {
                return None;
            }
            if !state.held
                && let Some(mut load) = state.queue.pop_front()
            {
                load.stale = state.stale(&load);
                return Some(load);
            }
            if state.closed && state.queue.is_empty() {
                return None;
            }
            state = self.0.queued.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// A load was written: its buffer is free.
    pub(super) fn written(&self, buffer: Box<[u8]>) {
        let mut state = self.lock();
        state.used -= 1;
        state.free.push(buffer);
        drop(state);
        self.0.freed.notify_one();
    }

    /// Writing failed: nobody need wait any more.
    pub(super) fn fail(&self, error: Error) {
        let mut state = self.lock();
        if !state.has_failed() {
            state.failed = Some(error);
        }
        drop(state);
        self.0.freed.notify_all();
        self.0.queued.notify_all();
    }

    /// Whether writing goes well.
    ///
    /// # Errors
    /// Why it does not.
    pub(super) fn check(&self) -> Result<()> {
        self.lock().check()
    }

    /// Pages that are read and not written.
    pub(super) fn staged_pages(&self) -> u64 {
        self.lock().used as u64 * u64::from(LOAD_PAGES)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(
        &self,
        enough: impl Fn(&State) -> bool,
        watch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        loop {
            state.check()?;
            if enough(&state) {
                return Ok(state);
            }
            drop(state);
            // Nobody else makes room.
            self.hold(false);
            watch()?;
            state = self.lock();
            if !enough(&state) {
                let woken = self.0.freed.wait_timeout(state, WATCH);
                state = woken.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
    }
}

impl State {
    /// For each page of a run the round in which it was read last.
    fn pages_of(&mut self, run: &PageRun) -> &mut [u8] {
        let space = self.read_in.get_mut(usize::from(run.space.0));
        space.and_then(|pages| pages.get_mut(run.first as usize..run.end() as usize)).unwrap_or_default()
    }

    /// Which pages of a load were read again in a later round.
    fn stale(&mut self, load: &Load) -> u64 {
        let (mut stale, mut bit) = (0, 1);
        for run in &load.runs {
            for round in self.pages_of(run) {
                stale |= if *round == load.round { 0 } else { bit };
                bit <<= 1;
            }
        }
        stale
    }

    fn has_failed(&self) -> bool {
        self.failed.is_some() || self.told
    }

    fn check(&mut self) -> Result<()> {
        if let Some(error) = self.failed.take() {
            self.told = true;
            return Err(error);
        }
        if self.told {
            return Err(Error::Store("nothing more can be written to the store".into()));
        }
        Ok(())
    }
}

fn new_buffer() -> Box<[u8]> {
    vec![0; BUFFER_BYTES].into_boxed_slice()
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::layout::{Space, SpaceKind};
    use protocol::page::SpaceId;
    use std::time::Instant;

    const MIB: u64 = 1 << 20;

    fn stage() -> Stage {
        let space = Space { id: SpaceId(0), kind: SpaceKind::Memory, pages: 100, guest_address: 0 };
        Stage::new(&Layout { spaces: vec![space] }, MIB)
    }

    fn runs(first: u64) -> Vec<PageRun> {
        vec![PageRun { space: SpaceId(0), first, count: 1 }]
    }

    fn patient() -> impl FnMut() -> Result<()> {
        let begun = Instant::now();
        move || {
            assert!(begun.elapsed() < Duration::from_secs(10), "nobody wrote for 10 s");
            Ok(())
        }
    }

    fn no_wait() -> Result<()> {
        Err(Error::Interrupted("it waits".into()))
    }

    #[test]
    fn it_holds_as_much_as_it_may_and_as_much_again_for_the_last_pages() {
        let stage = stage();
        assert_eq!(stage.live_pages(), 256);
        for _ in 0..4 {
            let buffer = stage.buffer(false, &mut no_wait).unwrap();
            stage.push(0, runs(0), buffer);
        }
        assert!(matches!(stage.buffer(false, &mut no_wait), Err(Error::Interrupted(_))));
        for _ in 0..4 {
            stage.buffer(true, &mut no_wait).unwrap();
        }
        assert!(stage.buffer(true, &mut no_wait).is_err());
        assert_eq!(stage.staged_pages(), 512);
    }

    #[test]
    fn loads_come_in_sequence_and_their_buffers_are_used_again() {
        let stage = stage();
        let writer = {
            let stage = stage.clone();
            std::thread::spawn(move || {
                let mut seen = Vec::new();
                while let Some(load) = stage.next() {
                    seen.push((load.number, load.runs[0].first));
                    stage.written(load.buffer);
                }
                seen
            })
        };
        for page in 0..100 {
            let buffer = stage.buffer(false, &mut patient()).unwrap();
            stage.push(0, runs(page), buffer);
        }
        stage.make_room(256, &mut patient()).unwrap();
        assert_eq!(stage.staged_pages(), 0);
        assert!(stage.lock().free.len() <= 4);
        stage.warm(256);
        assert_eq!(stage.lock().free.len(), 4);
        stage.close();
        assert_eq!(writer.join().unwrap(), (0..100).map(|page| (page, page)).collect::<Vec<_>>());
    }

    #[test]
    fn a_page_that_was_read_again_is_stale_where_it_waits_and_only_there() {
        let stage = stage();
        let load = |round, first, count| {
            let buffer = stage.buffer(true, &mut no_wait).unwrap();
            stage.push(round, vec![PageRun { space: SpaceId(0), first, count }], buffer);
        };
        load(0, 10, 4);
        load(0, 20, 64);
        load(1, 12, 1);
        load(2, 83, 1);
        let stale: Vec<u64> = (0..4).map(|_| stage.next().unwrap().stale).collect();
        assert_eq!(stale, [0b100, 1 << 63, 0, 0]);
    }

    #[test]
    fn a_writer_that_fails_ends_every_wait() {
        let stage = stage();
        for _ in 0..4 {
            let buffer = stage.buffer(false, &mut no_wait).unwrap();
            stage.push(0, runs(0), buffer);
        }
        let failing = stage.clone();
        let writer = std::thread::spawn(move || {
            let load = failing.next().unwrap();
            std::thread::sleep(Duration::from_millis(30));
            failing.fail(Error::Store("no space".into()));
            failing.written(load.buffer);
        });
        let error = stage.buffer(false, &mut patient()).unwrap_err();
        assert_eq!(error.to_string(), "no space");
        writer.join().unwrap();
        assert!(
            stage.next().is_none() && stage.check().is_err() && stage.make_room(1, &mut patient()).is_err()
        );
    }
}

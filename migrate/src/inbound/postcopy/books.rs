//! What is missing, who waits for it, and since when.

use crate::report::{FaultReport, micros};
use protocol::page::{PageRun, PageSet, SpaceId};
use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// The most latencies that are kept to tell their quantiles: the last ones.
const KEPT: usize = 65536;

/// The books of the pages that follow, shared by the threads.
pub(super) struct Books(Mutex<State>);

struct State {
    missing: Vec<PageSet>,
    left: u64,
    /// What was missing when the link was made: all that may come over it.
    expected: Vec<PageSet>,
    waiting: HashMap<(SpaceId, u64), Instant>,
    latencies_us: Vec<u64>,
    report: FaultReport,
}

impl Books {
    pub(super) fn new(missing: Vec<PageSet>) -> Self {
        let left = missing.iter().map(PageSet::count).sum();
        Self(Mutex::new(State {
            expected: missing.clone(),
            missing,
            left,
            waiting: HashMap::new(),
            latencies_us: Vec::new(),
            report: FaultReport { missing_pages: left, ..FaultReport::default() },
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many pages are missing.
    pub(super) fn left(&self) -> u64 {
        self.lock().left
    }

    /// What is missing.
    pub(super) fn missing(&self) -> Vec<PageSet> {
        self.lock().missing.clone()
    }

    /// Whether this page is.
    pub(super) fn misses(&self, (space, page): (SpaceId, u64)) -> bool {
        self.lock().missing.get(usize::from(space.0)).is_some_and(|set| set.contains(page))
    }

    /// There is a new link, over which what is missing now may come.
    pub(super) fn links(&self) {
        let mut state = self.lock();
        state.expected = state.missing.clone();
        state.report.lost_links += 1;
    }

    /// Whether all pages of a run may come over this link.
    pub(super) fn expects(&self, run: &PageRun) -> bool {
        let state = self.lock();
        let set = state.expected.get(usize::from(run.space.0));
        set.is_some_and(|set| set.contains(run.first) && set.next_clear(run.first) >= run.end())
    }

    /// Notes who waits; answers the pages that are missing and that nobody waited for before.
    pub(super) fn touched(&self, places: &[(SpaceId, u64)]) -> Vec<(SpaceId, u64)> {
        let mut state = self.lock();
        let mut new = Vec::new();
        for (space, page) in places {
            if !state.missing.get(usize::from(space.0)).is_some_and(|set| set.contains(*page)) {
                continue;
            }
            if let std::collections::hash_map::Entry::Vacant(entry) = state.waiting.entry((*space, *page)) {
                entry.insert(Instant::now());
                new.push((*space, *page));
            }
        }
        state.report.faults += new.len() as u64;
        new
    }

    /// Pages that somebody waits for.
    pub(super) fn waiting(&self) -> Vec<(SpaceId, u64)> {
        self.lock().waiting.keys().copied().collect()
    }

    /// These pages are in place; whether they were the last.
    pub(super) fn placed(&self, run: &PageRun) -> bool {
        let mut state = self.lock();
        let State { missing, left, waiting, latencies_us, report, .. } = &mut *state;
        let Some(set) = missing.get_mut(usize::from(run.space.0)) else { return false };
        let before = set.count_in(run.first, u64::from(run.count));
        set.remove(run.first, u64::from(run.count));
        *left -= before;
        report.received_pages += before;
        if !waiting.is_empty() {
            for page in run.first..run.end() {
                if let Some(since) = waiting.remove(&(run.space, page)) {
                    let latency_us = micros(since.elapsed());
                    report.fault_max_us = report.fault_max_us.max(latency_us);
                    if latencies_us.len() == KEPT {
                        latencies_us.swap_remove(0);
                    }
                    latencies_us.push(latency_us);
                }
            }
        }
        *left == 0
    }

    /// The numbers so far.
    pub(super) fn report(&self) -> FaultReport {
        let state = self.lock();
        let mut latencies_us = state.latencies_us.clone();
        latencies_us.sort_unstable();
        let count = latencies_us.len();
        FaultReport {
            fault_mean_us: latencies_us.iter().sum::<u64>() / count.max(1) as u64,
            fault_p99_us: latencies_us
                .get((count * 99 / 100).min(count.saturating_sub(1)))
                .copied()
                .unwrap_or(0),
            ..state.report
        }
    }
}

//! A workload that runs while its pages follow.
//!
//! ```text
//! touches (one thread) ─▶ order ─▶ readers: one for what somebody waits for, two for that and all else ─▶ in place
//! ```
//!
//! What only the stream needs, its order and the sums of single pages, is made ready while the first touches are served.
//!
//! Behind the start nothing can be discarded, so nothing gives up either: a read that fails is told and tried again, behind all others,
//! for as long as the operator lets it. Whoever touches a page that is not there waits, in the kernel, and nobody ever sees anything else
//! than what the checkpoint has. If this process dies, the VMM keeps the vCPUs waiting and another restore takes the workload up.

use super::fetch::{Fetch, Scratch, is_of_the_store};
use super::order::Order;
use super::plan::{Places, Plan};
use super::report::{Event, Lazily};
use super::touches::Recorder;
use crate::cancel::CancelFlag;
use crate::destination::Incomplete;
use crate::error::{Error, Result};
use crate::report::micros;
use protocol::layout::SpaceKind;
use protocol::page::{PageRun, PageSet, SpaceId};
use std::collections::HashMap;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// How long a wait for touches goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

/// How often progress is told.
const TELL: Duration = Duration::from_millis(100);

/// How long a reader rests behind a read that failed: first, and at most.
const REST: Duration = Duration::from_millis(100);
const LONGEST_REST: Duration = Duration::from_secs(2);

/// A trouble that lasts is told this often.
const TELL_TROUBLE: Duration = Duration::from_secs(10);

/// Pages from an unused one on that become zeros at once, as far as they are unused too: 64 KiB.
const ZERO_PAGES: u64 = 16;

/// What is waited for first.
struct State {
    order: Order,
    recorder: Recorder,
    report: Lazily,
    /// When an extent was in place first that somebody waited for.
    first_placed: Option<Instant>,
    /// Extents that somebody waits for, and since when.
    waiting: HashMap<u32, Instant>,
    missing_pages: u64,
    /// Reads that failed and were not told yet.
    trouble: Option<Error>,
    /// Why nothing more can be done.
    broken: Option<Error>,
    stop: bool,
}

/// Where the pages lie, and which come first if nobody asks.
pub(super) struct Pages<'a> {
    fetch: &'a Fetch,
    places: Places,
    order: Order,
    recorded_extents: u64,
}

impl<'a> Pages<'a> {
    /// `recorded` is what earlier restores touched first.
    pub(super) fn of(fetch: &'a Fetch, recorded: &[PageRun]) -> Self {
        let plan = fetch.plan();
        let places = Places::of(plan);
        let pages = recorded.iter().flat_map(|run| (run.first..run.end()).map(|page| (run.space, page)));
        let mut first: Vec<u32> = pages.filter_map(|(space, page)| places.need(space, page)).collect();
        let order = Order::new(plan.needs.len(), first.iter().copied());
        first.sort_unstable();
        first.dedup();
        Self { fetch, places, order, recorded_extents: first.len() as u64 }
    }
}

/// A running workload and where its pages come from.
pub(super) struct Serving<'a> {
    workload: &'a dyn Incomplete,
    fetch: &'a Fetch,
    places: Places,
    state: Mutex<State>,
    /// The order has something new, or all is over.
    changed: Condvar,
}

impl<'a> Serving<'a> {
    /// # Errors
    /// `Workload` when the workload misses what the checkpoint does not have: it is of another one.
    pub(super) fn new(workload: &'a dyn Incomplete, pages: Pages<'a>) -> Result<Self> {
        let Pages { fetch, places, mut order, recorded_extents } = pages;
        let plan = fetch.plan();
        // Disks, which stand behind memory, miss nothing; whoever takes it up does not know of them.
        let mut all_missing = workload.missing().to_vec();
        let known = all_missing.len();
        all_missing.extend(plan.data.iter().skip(known).map(|data| PageSet::empty(data.pages())));
        let fits = known > 0 && known <= plan.data.len();
        let strange = |(missing, data): (&PageSet, &PageSet)| {
            let mut missing = missing.clone();
            missing.subtract(data);
            !missing.is_empty()
        };
        if !fits || all_missing.iter().zip(&plan.data).any(strange) {
            return Err(Error::Workload(format!(
                "{} misses pages that this checkpoint does not have: it was restored from another one",
                workload.name()
            )));
        }
        // A workload that was just started misses all of it.
        if all_missing != plan.data {
            for (number, need) in (0..).zip(&plan.needs) {
                let missing = |run: &PageRun| {
                    all_missing[usize::from(run.space.0)].count_in(run.first, u64::from(run.count)) > 0
                };
                if !plan.parts(need).iter().any(|part| missing(&part.run())) {
                    order.placed(number);
                }
            }
        }
        let report = Lazily { recorded_extents, ..Lazily::default() };
        let missing_pages = workload.missing().iter().map(PageSet::count).sum();
        let state = State {
            order,
            recorder: Recorder::new(workload.layout()),
            report,
            first_placed: None,
            waiting: HashMap::new(),
            missing_pages,
            trouble: None,
            broken: None,
            stop: false,
        };
        Ok(Self { workload, fetch, places, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Serves until nothing is missing. Answers the order of first touches, and what was done; `begun` is when the restore did.
    ///
    /// # Errors
    /// `Interrupted` when the operator gives up; `Workload` when the workload ended.
    pub(super) fn run(
        self,
        threads: usize,
        begun: Instant,
        cancel: &CancelFlag,
        observer: &mut dyn FnMut(&Event),
    ) -> Result<(Recorder, Lazily)> {
        let done = thread::scope(|scope| {
            let spawn = |name: &str, body: &'a (dyn Fn(&Self) + Sync)| {
                let me = &self;
                thread::Builder::new()
                    .name(name.into())
                    .spawn_scoped(scope, move || body(me))
                    .map_err(|error| Error::Host(format!("could not start a thread: {error}")))
            };
            let spawned = spawn("touches", &Self::watch)
                .and_then(|_| spawn("asked", &|me| me.read(Order::take_asked)))
                .and_then(|_| {
                    spawn("stream", &|me| {
                        me.make_ready();
                        me.read(Order::take);
                    })
                })
                .and_then(|_| {
                    (1..threads).try_for_each(|_| spawn("stream", &|me| me.read(Order::take)).map(drop))
                });
            let done = spawned.and_then(|()| self.attend(cancel, observer));
            self.lock().stop = true;
            self.changed.notify_all();
            done
        });
        let State { recorder, report, first_placed, .. } =
            self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        let first_page_us = first_placed.map(|at| micros(at.duration_since(begun)));
        done.map(|()| (recorder, Lazily { first_page_us, ..report }))
    }

    fn plan(&self) -> &Plan {
        self.fetch.plan()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells how it goes, and ends it.
    fn attend(&self, cancel: &CancelFlag, observer: &mut dyn FnMut(&Event)) -> Result<()> {
        let name = self.workload.name();
        let _answers = cancel.answers();
        let (mut interrupted, mut told) = (false, None::<Instant>);
        loop {
            let mut state = self.lock();
            if state.order.left() > 0 && state.broken.is_none() {
                state = self.changed.wait_timeout(state, TELL).unwrap_or_else(PoisonError::into_inner).0;
            }
            if let Some(error) = state.broken.take() {
                return Err(error);
            }
            let missing_pages = state.missing_pages;
            if state.order.left() == 0 {
                drop(state);
                return self.workload.complete();
            }
            let trouble = state.trouble.take();
            drop(state);
            let due = told.is_none_or(|told| told.elapsed() >= TELL_TROUBLE);
            if let Some(error) = trouble.filter(|_| due) {
                told = Some(Instant::now());
                tracing::warn!(
                    "{name} runs and needs {missing_pages} more pages, which the store does not give: {error}; trying again until it does"
                );
                observer(&Event::StoreTrouble { reason: error.to_string(), missing_pages });
            }
            let done_pages = self.plan().data_pages().saturating_sub(missing_pages);
            observer(&Event::Reading { done_pages, remaining_pages: missing_pages });
            if cancel.take() {
                if std::mem::replace(&mut interrupted, true) {
                    return Err(Error::Interrupted(format!(
                        "{name} runs here and waits for {missing_pages} pages whenever it touches them: go on with \
                         migrate restore --store STORE CHECKPOINT --resume {name}"
                    )));
                }
                tracing::warn!(
                    "{name} runs already and still needs {missing_pages} pages of the checkpoint, so this goes on; interrupted once \
                     more it ends, and whoever touches a missing page waits until migrate restore --resume {name}"
                );
            }
        }
    }

    /// What the stream needs besides.
    fn make_ready(&self) {
        let order = self.plan().by_address();
        self.lock().order.then(order);
        self.changed.notify_all();
        self.fetch.bring_sums();
    }

    /// Hears what is touched. Pages that the checkpoint has as zeros become zeros at once.
    fn watch(&self) {
        while !self.is_over() {
            let heard = self.workload.touched(SLICE).and_then(|places| self.heard(&places));
            if let Err(error) = heard {
                self.fail(error);
            }
        }
    }

    fn heard(&self, touched: &[(SpaceId, u64)]) -> Result<()> {
        let mut unused = Vec::new();
        if !touched.is_empty() {
            let mut state = self.lock();
            for (space, page) in touched.iter().copied() {
                let Some(need) = self.places.need(space, page) else {
                    unused.push((space, page));
                    continue;
                };
                state.recorder.note(space, page);
                state.report.touches += 1;
                state.waiting.entry(need).or_insert_with(Instant::now);
                if state.order.ask(need) {
                    state.report.asked_extents += 1;
                }
            }
            drop(state);
            self.changed.notify_all();
        }
        for (space, page) in unused {
            let Some(data) = self.plan().data.get(usize::from(space.0)) else { continue };
            let end =
                data.next_set_before(page, page + ZERO_PAGES).unwrap_or(page + ZERO_PAGES).min(data.pages());
            self.workload.place_zeros(PageRun { space, first: page, count: (end - page) as u32 })?;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        let state = self.lock();
        state.stop || state.broken.is_some()
    }

    /// Puts one extent after the other in place, as `next` gives them.
    fn read(&self, next: impl Fn(&mut Order) -> Option<u32>) {
        let (mut scratch, mut rest) = (Scratch::default(), REST);
        loop {
            let mut state = self.lock();
            let extent = loop {
                if state.stop || state.broken.is_some() || state.order.left() == 0 {
                    return;
                }
                if let Some(extent) = next(&mut state.order) {
                    break extent;
                }
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            match self.bring(extent, &mut scratch) {
                Ok(()) => {
                    rest = REST;
                    self.placed(extent);
                }
                Err(error) if is_of_the_store(&error) => {
                    let mut state = self.lock();
                    state.report.failed_reads += 1;
                    state.order.failed(extent);
                    state.trouble.get_or_insert(error);
                    // Whoever has nothing else to do may try it.
                    self.changed.notify_all();
                    drop(self.changed.wait_timeout_while(state, rest, |state| !state.stop));
                    rest = (rest * 2).min(LONGEST_REST);
                }
                Err(error) => {
                    self.fail(error);
                    return;
                }
            }
        }
    }

    fn bring(&self, extent: u32, scratch: &mut Scratch) -> Result<()> {
        let layout = self.workload.layout();
        let is_memory = |space| layout.space(space).is_some_and(|space| space.kind == SpaceKind::Memory);
        self.fetch.one(extent as usize, scratch, &mut |run, bytes| {
            // An extent may have pages of both, and a disk's are there already.
            if is_memory(run.space) { self.workload.place(run, bytes) } else { Ok(()) }
        })
    }

    fn placed(&self, extent: u32) {
        let mut state = self.lock();
        state.order.placed(extent);
        if let Some(need) = self.plan().needs.get(extent as usize) {
            state.missing_pages = state.missing_pages.saturating_sub(self.plan().pages(need));
        }
        if let Some(since) = state.waiting.remove(&extent) {
            let wait_us = micros(since.elapsed());
            state.report.wait_max_us = state.report.wait_max_us.max(wait_us);
            state.report.wait_sum_us += wait_us;
            state.first_placed.get_or_insert_with(Instant::now);
        }
        if state.order.left() == 0 {
            self.changed.notify_all();
        }
    }

    fn fail(&self, error: Error) {
        self.lock().broken.get_or_insert(error);
        self.changed.notify_all();
    }
}

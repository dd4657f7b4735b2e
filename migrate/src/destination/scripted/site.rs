//! A host on which a scripted workload runs that misses pages: what a VMM is to a real one.

use super::Memory;
use crate::destination::{Incomplete, PageMemory as _};
use crate::error::{Error, Result};
use crate::source::scripted::Witness;
use protocol::MigrationId;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The longest a guest waits for one page before it gives up and says that it read wrong bytes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A host: it outlives the engines that serve its workload.
#[derive(Clone, Default)]
pub struct Site(Arc<Mutex<Option<Arc<Guest>>>>, Option<BrokenCell>);

/// A byte of memory, by its space and offset, that reads as what was written XOR this.
pub type BrokenCell = (SpaceId, u64, u8);

/// A workload whose guest touches its pages in a seeded order, and must see what the source froze with.
struct Guest {
    migration: MigrationId,
    layout: Layout,
    memory: Arc<Memory>,
    witness: Witness,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    missing: Vec<PageSet>,
    /// Touched and not reported yet.
    touched: Vec<(SpaceId, u64)>,
    /// The page that the guest waits for.
    waits_for: Option<(SpaceId, u64)>,
    complete: bool,
}

impl Site {
    /// A host with a memory cell that does not keep what is written to it.
    pub fn with_broken(cell: BrokenCell) -> Self {
        Self(Arc::default(), Some(cell))
    }

    pub(super) fn broken(&self) -> Option<BrokenCell> {
        self.1
    }

    pub(super) fn start(
        &self,
        migration: MigrationId,
        layout: Layout,
        memory: Arc<Memory>,
        missing: Vec<PageSet>,
        witness: Witness,
    ) -> Arc<dyn Incomplete> {
        let state = State { missing, touched: Vec::new(), waits_for: None, complete: false };
        let guest = Arc::new(Guest {
            migration,
            layout,
            memory,
            witness,
            state: Mutex::new(state),
            changed: Condvar::new(),
        });
        let running = guest.clone();
        std::thread::spawn(move || running.run());
        let held = guest.hold();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(guest);
        held
    }

    pub(super) fn take_up(&self, migration: MigrationId) -> Option<Arc<dyn Incomplete>> {
        let site = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let guest = site.as_ref().filter(|guest| guest.migration == migration && !guest.lock().complete)?;
        Some(guest.hold())
    }
}

impl Guest {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session of an engine: what it waits for is reported anew.
    fn hold(self: &Arc<Self>) -> Arc<dyn Incomplete> {
        let mut state = self.lock();
        state.touched = state.waits_for.into_iter().collect();
        let missing = state.missing.clone();
        drop(state);
        Arc::new(Held { guest: self.clone(), missing })
    }

    /// Touches every fifth page and the ones behind, in an order that follows from the migration's id.
    fn run(&self) {
        let pages: Vec<(SpaceId, u64)> = self
            .layout
            .spaces
            .iter()
            .flat_map(|space| (0..space.pages).map(|page| (space.id, page)))
            .collect();
        let mut random = self.migration.0 as u64;
        for _ in 0..pages.len() / 5 {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let first = (random >> 33) as usize % pages.len();
            for place in pages.iter().skip(first).take(3) {
                if !self.touch(*place) {
                    self.witness.misread();
                    return;
                }
            }
        }
    }

    /// Reads a page, once it is there; whether it is right.
    fn touch(&self, (space, page): (SpaceId, u64)) -> bool {
        let until = Instant::now() + PATIENCE;
        let index = usize::from(space.0);
        let mut state = self.lock();
        if state.missing[index].contains(page) {
            state.touched.push((space, page));
            state.waits_for = Some((space, page));
            self.changed.notify_all();
        }
        while state.missing[index].contains(page) {
            if Instant::now() > until {
                return false;
            }
            state = self.changed.wait_timeout(state, PATIENCE).unwrap_or_else(PoisonError::into_inner).0;
        }
        state.waits_for = None;
        drop(state);
        let memory = self.memory.spaces[index].lock().unwrap_or_else(PoisonError::into_inner);
        let at = page as usize * PAGE_SIZE;
        memory[at..at + PAGE_SIZE] == self.witness.frozen_page(index, page)
    }
}

struct Held {
    guest: Arc<Guest>,
    missing: Vec<PageSet>,
}

impl Held {
    fn fill(&self, run: PageRun, mut put: impl FnMut(PageRun, usize) -> Result<()>) -> Result<()> {
        let mut state = self.guest.lock();
        for (index, page) in (run.first..run.end()).enumerate() {
            let set = &mut state.missing[usize::from(run.space.0)];
            if set.contains(page) {
                put(PageRun { first: page, count: 1, ..run }, index * PAGE_SIZE)?;
                set.remove(page, 1);
            }
        }
        self.guest.changed.notify_all();
        Ok(())
    }
}

impl Incomplete for Held {
    fn name(&self) -> &'static str {
        "scripted"
    }

    fn layout(&self) -> &Layout {
        &self.guest.layout
    }

    fn missing(&self) -> &[PageSet] {
        &self.missing
    }

    fn touched(&self, limit: Duration) -> Result<Vec<(SpaceId, u64)>> {
        let mut state = self.guest.lock();
        if state.touched.is_empty() {
            state = self.guest.changed.wait_timeout(state, limit).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(std::mem::take(&mut state.touched))
    }

    fn place(&self, run: PageRun, bytes: &[u8]) -> Result<()> {
        let memory = &self.guest.memory;
        self.fill(run, |page, at| memory.write(page.space, page.offset(), &bytes[at..at + PAGE_SIZE]))
    }

    fn place_zeros(&self, run: PageRun) -> Result<()> {
        self.fill(run, |page, _| self.guest.memory.zero(page))
    }

    fn complete(&self) -> Result<()> {
        let mut state = self.guest.lock();
        if state.missing.iter().any(|set| !set.is_empty()) {
            return Err(Error::Workload("pages are missing still".into()));
        }
        state.complete = true;
        let bytes = |space: &Mutex<Vec<u8>>| space.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.guest.witness.started_with(self.guest.memory.spaces.iter().map(bytes).collect());
        Ok(())
    }
}

//! A source without a VM, for tests: memory in a vector, and a guest that writes to it by a seed.
//!
//! The [`Machine`] is what a VMM is to a real migration: it outlives the [`Source`]s that are attached to it, so a test
//! can look at it behind a failed attempt and make another. Its guest writes whenever the engine calls, between the
//! halves of a read too, so that torn pages happen all the time. Its dirty bits are honest: exactly as a dirty log that
//! is cleared before reading has them.

mod witness;

use super::{Committed, Completed, Dirty, Donor, Durable, Source, Workload};
use crate::error::{Error, Result};
use crate::memory::PageReader;
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::WorkloadKind;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use protocol::state::State;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
pub use witness::{Who, Witness};

/// The calls a source can get, in the order in which the engine makes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "each is named after the method")]
pub enum Call {
    Track,
    Baseline,
    Harvest,
    Take,
    Present,
    Read,
    Throttle,
    Freeze,
    Look,
    State,
    Pledge,
    HandOver,
    End,
    Donate,
    Redirty,
    Thaw,
    Resume,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 17] = [
        Self::Track,
        Self::Baseline,
        Self::Harvest,
        Self::Take,
        Self::Present,
        Self::Read,
        Self::Throttle,
        Self::Freeze,
        Self::Look,
        Self::State,
        Self::Pledge,
        Self::HandOver,
        Self::End,
        Self::Donate,
        Self::Redirty,
        Self::Thaw,
        Self::Resume,
    ];
}

/// What happens at which call.
pub type Hook = Box<dyn FnMut(Call, u32) -> Result<()> + Send>;

/// A workload that runs on nothing.
#[derive(Clone)]
pub struct Machine {
    workload: Workload,
    witness: Witness,
    vm: Arc<Mutex<Vm>>,
}

struct Vm {
    memory: Vec<Vec<u8>>,
    touched: Vec<PageSet>,
    dirty: Vec<PageSet>,
    /// What the last harvest saw.
    seen: Vec<PageSet>,
    /// What was taken in this attempt.
    taken: Vec<PageSet>,
    baseline: Option<CheckpointId>,
    /// What the baseline lacks.
    owed: Vec<PageSet>,
    /// What this attempt took for a baseline.
    covered: Vec<PageSet>,
    stage: Stage,
    random: u64,
    pages_per_call: u64,
    throttle_percent: u64,
    /// Hundredths of a page that a throttled guest has left to write.
    spare: u64,
    calls: BTreeMap<Call, u32>,
    hook: Option<Hook>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Running,
    Frozen,
    Pledged(MigrationId),
    Gone,
}

impl Machine {
    /// A running machine with this memory, of which a quarter is random, a quarter zeros that were written, and half
    /// was never touched. Its guest writes up to `pages_per_call` pages whenever the engine calls.
    pub fn new(layout: Layout, seed: u64, pages_per_call: u64, witness: Witness) -> Self {
        let empty = || layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect::<Vec<_>>();
        let mut vm = Vm {
            memory: layout.spaces.iter().map(|space| vec![0; space.pages as usize * PAGE_SIZE]).collect(),
            touched: empty(),
            dirty: empty(),
            seen: empty(),
            taken: empty(),
            baseline: None,
            owed: empty(),
            covered: empty(),
            stage: Stage::Running,
            random: seed,
            pages_per_call,
            throttle_percent: 0,
            spare: 0,
            calls: BTreeMap::new(),
            hook: None,
        };
        for space in 0..layout.spaces.len() {
            for page in 0..layout.spaces[space].pages {
                match vm.random() % 4 {
                    0 => vm.write(space, page),
                    1 => vm.touch(space, page),
                    _ => {}
                }
            }
        }
        witness.runs(Who::Source, true);
        let workload = Workload {
            kind: WorkloadKind::Vm,
            name: "scripted".into(),
            layout,
            machine: b"machine".to_vec(),
        };
        Self { workload, witness, vm: Arc::new(Mutex::new(vm)) }
    }

    /// The same machine under another name.
    #[must_use]
    pub fn named(mut self, name: &str) -> Self {
        self.workload.name = name.into();
        self
    }

    /// Calls `hook` at every call that the engine makes, with how many of that kind came before; its error is the
    /// call's.
    pub fn on_call(&self, hook: impl FnMut(Call, u32) -> Result<()> + Send + 'static) {
        self.lock().hook = Some(Box::new(hook));
    }

    /// Its memory, for a workload that this migration moved and that misses pages.
    pub fn donor(&self, migration: MigrationId) -> Box<dyn Donor> {
        Box::new(ScriptedDonor { machine: self.clone(), migration })
    }

    /// Lets every call succeed again.
    pub fn heal(&self) {
        self.lock().hook = None;
    }

    /// A new attempt.
    pub fn attach(&self) -> Box<dyn Source> {
        let mut vm = self.lock();
        vm.calls.clear();
        vm.taken.iter_mut().for_each(PageSet::clear);
        Box::new(Scripted { machine: self.clone(), settled: false })
    }

    /// Pages that the last attempt took and that are not dirty: what the next attempt or a checkpoint would miss.
    pub fn missing_pages(&self) -> u64 {
        let vm = self.lock();
        let missing = vm.taken.iter().zip(&vm.dirty).map(|(taken, dirty)| {
            let mut missing = taken.clone();
            missing.subtract(dirty);
            missing.count()
        });
        missing.sum()
    }

    /// The checkpoint that has everything but what was written since.
    pub fn baseline(&self) -> Option<CheckpointId> {
        self.lock().baseline
    }

    /// The pages that its baseline lacks.
    pub fn lacking(&self) -> Vec<PageSet> {
        self.lock().owed.clone()
    }

    /// Its memory, as it is now.
    pub fn memory(&self) -> Vec<Vec<u8>> {
        self.lock().memory.clone()
    }

    /// Whether it waits for the outcome of a migration.
    pub fn is_pledged(&self) -> bool {
        matches!(self.lock().stage, Stage::Pledged(_))
    }

    /// How much it is slowed down now, in percent.
    pub fn throttle_percent(&self) -> u64 {
        self.lock().throttle_percent
    }

    /// Whether it was handed over.
    pub fn is_gone(&self) -> bool {
        self.lock().stage == Stage::Gone
    }

    /// The calls that the last attempt made.
    pub fn calls(&self) -> BTreeMap<Call, u32> {
        self.lock().calls.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Vm> {
        self.vm.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Vm {
    fn random(&mut self) -> u64 {
        // Knuth's MMIX generator; the upper bits are the good ones.
        self.random =
            self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        self.random >> 33
    }

    fn touch(&mut self, space: usize, page: u64) {
        self.touched[space].insert(page, 1);
        self.dirty[space].insert(page, 1);
        self.owed[space].insert(page, 1);
    }

    /// Overwrites a page from end to end, so that a torn one is neither old nor new.
    fn write(&mut self, space: usize, page: u64) {
        let fill = self.random().to_le_bytes();
        let at = page as usize * PAGE_SIZE;
        let page_bytes = &mut self.memory[space][at..at + PAGE_SIZE];
        page_bytes.chunks_exact_mut(fill.len()).for_each(|word| word.copy_from_slice(&fill));
        self.touch(space, page);
    }

    /// The guest writes a little, and now and then gives a page back to the host or writes zeros.
    fn run(&mut self) {
        if self.stage != Stage::Running {
            return;
        }
        self.spare += self.pages_per_call * (100 - self.throttle_percent.min(100));
        let writes = self.spare / 100;
        self.spare %= 100;
        for _ in 0..writes {
            let space = self.random() as usize % self.memory.len();
            let page = self.random() % self.touched[space].pages();
            if !self.random().is_multiple_of(8) {
                self.write(space, page);
                continue;
            }
            let at = page as usize * PAGE_SIZE;
            self.memory[space][at..at + PAGE_SIZE].fill(0);
            self.touch(space, page);
            if self.random().is_multiple_of(2) {
                self.touched[space].remove(page, 1);
            }
        }
    }

    /// Every call begins like this.
    fn called(&mut self, call: Call) -> Result<()> {
        self.run();
        let calls = self.calls.entry(call).or_default();
        *calls += 1;
        let number = *calls - 1;
        match &mut self.hook {
            Some(hook) => hook(call, number),
            None => Ok(()),
        }
    }
}

/// One attempt to move a [`Machine`].
struct Scripted {
    machine: Machine,
    settled: bool,
}

impl Scripted {
    fn called(&self, call: Call) -> Result<MutexGuard<'_, Vm>> {
        let mut vm = self.machine.lock();
        vm.called(call)?;
        Ok(vm)
    }

    fn resumes(&self, vm: &mut Vm) {
        (vm.stage, vm.throttle_percent) = (Stage::Running, 0);
        self.machine.witness.runs(Who::Source, true);
    }
}

impl Source for Scripted {
    fn workload(&self) -> &Workload {
        &self.machine.workload
    }

    fn track(&mut self, dirty: Dirty) -> Result<String> {
        let mut vm = self.called(Call::Track)?;
        let vm = &mut *vm;
        vm.taken.iter_mut().for_each(PageSet::clear);
        vm.covered.iter_mut().for_each(PageSet::clear);
        match (dirty, vm.baseline) {
            (Dirty::SinceBaseline, Some(_)) => vm.dirty.clone_from(&vm.owed),
            _ => vm.dirty.iter_mut().for_each(|dirty| dirty.insert(0, u64::MAX)),
        }
        Ok("scripted".into())
    }

    fn baseline(&self) -> Option<CheckpointId> {
        self.machine.lock().baseline
    }

    fn set_baseline(&mut self, checkpoint: CheckpointId) -> Result<()> {
        let mut vm = self.called(Call::Baseline)?;
        let vm = &mut *vm;
        vm.owed.clone_from(&vm.dirty);
        for (covered, taken) in vm.covered.iter_mut().zip(&mut vm.taken) {
            covered.union(taken);
            taken.clear();
        }
        vm.baseline = Some(checkpoint);
        Ok(())
    }

    fn harvest(&mut self) -> Result<Vec<PageSet>> {
        let mut vm = self.called(Call::Harvest)?;
        vm.seen = vm.dirty.clone();
        Ok(vm.seen.clone())
    }

    fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()> {
        let mut vm = self.called(Call::Take)?;
        let space = usize::from(space.0);
        let mut taken = PageSet::empty(vm.dirty[space].pages());
        taken.insert(first, count);
        taken.intersect(&vm.seen[space]);
        vm.dirty[space].subtract(&taken);
        vm.taken[space].union(&taken);
        Ok(())
    }

    fn present(&mut self, space: SpaceId, first: u64, count: u64, pages: &mut PageSet) -> Result<()> {
        let vm = self.called(Call::Present)?;
        for page in first..first + count {
            if !vm.touched[usize::from(space.0)].contains(page) {
                pages.remove(page, 1);
            }
        }
        Ok(())
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        let mut vm = self.called(Call::Read)?;
        let space = usize::from(run.space.0);
        // From the middle of a page on, so that a page that is written now comes out torn.
        let half = run.bytes() / 2 / PAGE_SIZE * PAGE_SIZE + PAGE_SIZE / 2;
        let at = run.offset() as usize;
        buffer[..half].copy_from_slice(&vm.memory[space][at..at + half]);
        if vm.stage == Stage::Running && vm.pages_per_call > 0 && vm.random().is_multiple_of(4) {
            vm.write(space, run.first + u64::from(run.count / 2));
        }
        vm.run();
        buffer[half..].copy_from_slice(&vm.memory[space][at + half..at + run.bytes()]);
        Ok(())
    }

    fn reader(&self) -> Result<Box<dyn PageReader>> {
        Ok(Box::new(ScriptedReader { machine: self.machine.clone() }))
    }

    fn redirty(&mut self, pages: &[PageSet]) -> Result<()> {
        let mut vm = self.called(Call::Redirty)?;
        let vm = &mut *vm;
        let books = vm.dirty.iter_mut().zip(&mut vm.owed).zip(&vm.covered);
        for (((dirty, owed), covered), pages) in books.zip(pages) {
            let mut retracted = pages.clone();
            retracted.intersect(covered);
            owed.union(&retracted);
            dirty.union(pages);
        }
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        true
    }

    fn throttle(&mut self, percent: u8) -> Result<()> {
        self.called(Call::Throttle)?.throttle_percent = percent.into();
        Ok(())
    }

    fn freeze(&mut self) -> Result<()> {
        let mut vm = self.called(Call::Freeze)?;
        vm.throttle_percent = 0;
        vm.stage = Stage::Frozen;
        self.machine.witness.runs(Who::Source, false);
        self.machine.witness.frozen_with(&vm.memory);
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        drop(self.called(Call::State)?);
        let mut state = State::default();
        state.push("scripted", 1, b"registers".to_vec());
        Ok(state.encode()?)
    }

    fn pledge(&mut self, migration: MigrationId, _peer: &str) -> Result<()> {
        let mut vm = self.called(Call::Pledge)?;
        if vm.stage != Stage::Frozen {
            return Err(Error::Workload("only a frozen workload can be pledged".into()));
        }
        vm.stage = Stage::Pledged(migration);
        Ok(())
    }

    fn thaw(&mut self) -> Result<()> {
        let mut vm = self.called(Call::Thaw)?;
        if vm.stage != Stage::Frozen {
            return Err(Error::Workload("only a frozen workload can be thawed".into()));
        }
        self.resumes(&mut vm);
        Ok(())
    }

    fn resume(mut self: Box<Self>) -> Result<()> {
        self.settled = true;
        let mut vm = self.called(Call::Resume)?;
        self.resumes(&mut vm);
        Ok(())
    }

    fn end(mut self: Box<Self>, _: Durable) -> Result<()> {
        let mut vm = self.called(Call::End)?;
        if vm.stage != Stage::Frozen {
            return Err(Error::Workload("only a frozen workload can be ended".into()));
        }
        vm.stage = Stage::Gone;
        drop(vm);
        self.settled = true;
        Ok(())
    }

    fn hand_over(mut self: Box<Self>, committed: Committed) -> Result<()> {
        self.settled = true;
        let mut vm = self.called(Call::HandOver)?;
        if vm.stage != Stage::Pledged(committed.migration()) {
            return Err(Error::Workload("only a pledged workload can be handed over".into()));
        }
        vm.stage = Stage::Gone;
        Ok(())
    }

    fn donate(mut self: Box<Self>, committed: Committed) -> Box<dyn Donor> {
        self.settled = true;
        Box::new(ScriptedDonor { machine: self.machine.clone(), migration: committed.migration() })
    }

    fn leave_frozen(mut self: Box<Self>) {
        self.settled = true;
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        let mut vm = self.machine.lock();
        vm.throttle_percent = 0;
        if !self.settled && vm.stage == Stage::Frozen {
            self.resumes(&mut vm);
        }
    }
}

/// The memory of a machine, for whoever only looks at it.
struct ScriptedReader {
    machine: Machine,
}

impl PageReader for ScriptedReader {
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let mut vm = self.machine.lock();
        vm.called(Call::Look)?;
        let at = offset as usize;
        buffer.copy_from_slice(&vm.memory[usize::from(space.0)][at..at + buffer.len()]);
        Ok(())
    }

    fn is_untouched(&self, run: PageRun) -> Result<bool> {
        let touched = &self.machine.lock().touched[usize::from(run.space.0)];
        Ok(touched.next_set(run.first).is_none_or(|page| page >= run.end()))
    }
}

/// A machine that runs elsewhere and whose memory is needed still.
struct ScriptedDonor {
    machine: Machine,
    migration: MigrationId,
}

impl ScriptedDonor {
    fn vm(&self) -> Result<MutexGuard<'_, Vm>> {
        let vm = self.machine.lock();
        if vm.stage == Stage::Pledged(self.migration) {
            return Ok(vm);
        }
        Err(Error::Workload("only a pledged workload can be a donor".into()))
    }
}

impl Donor for ScriptedDonor {
    fn name(&self) -> &str {
        &self.machine.workload.name
    }

    fn layout(&self) -> &Layout {
        &self.machine.workload.layout
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        let mut vm = self.vm()?;
        vm.called(Call::Donate)?;
        let at = run.offset() as usize;
        buffer.copy_from_slice(&vm.memory[usize::from(run.space.0)][at..at + run.bytes()]);
        Ok(())
    }

    fn finish(self: Box<Self>, _: Completed) -> Result<()> {
        self.vm()?.stage = Stage::Gone;
        Ok(())
    }
}

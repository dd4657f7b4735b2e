//! A destination without a VM, for tests: memory in a vector, and a record of what happened.

mod site;

use super::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::memory::PageReader;
use crate::source::scripted::{Who, Witness};
use protocol::MigrationId;
use protocol::control::{Offer, RefuseCode};
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use protocol::state::State;
pub use site::{BrokenCell, Site};
use std::sync::{Arc, Mutex, PoisonError};

/// The calls a destination can get, in the order in which the engine makes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "each is named after the method")]
pub enum Call {
    Prepare,
    Write,
    Zero,
    Settle,
    Load,
    Expect,
    Start,
}

impl Call {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Prepare, Self::Write, Self::Zero, Self::Settle, Self::Load, Self::Expect, Self::Start];
}

/// A destination that writes down what becomes of it.
pub struct Scripted {
    witness: Witness,
    fail_at: Option<Call>,
    memory: Arc<Memory>,
    /// Loaded, and what was where loading has written.
    loaded: Option<(PageRun, Vec<u8>)>,
    layout: Layout,
    missing: Option<Vec<PageSet>>,
    site: Site,
}

pub(super) struct Memory {
    pub(super) spaces: Vec<Mutex<Vec<u8>>>,
    fail_at: Option<Call>,
    broken: Option<BrokenCell>,
}

impl Scripted {
    /// An empty place; the first call of the kind `fail_at` fails.
    pub fn new(witness: Witness, fail_at: Option<Call>) -> Box<Self> {
        Self::at(Site::default(), witness, fail_at)
    }

    /// The same on a host that remembers what runs on it.
    pub fn at(site: Site, witness: Witness, fail_at: Option<Call>) -> Box<Self> {
        let memory = Arc::new(Memory { spaces: Vec::new(), fail_at, broken: None });
        Box::new(Self {
            witness,
            fail_at,
            memory,
            loaded: None,
            layout: Layout::default(),
            missing: None,
            site,
        })
    }
}

fn fail(at: Option<Call>, call: Call) -> Result<()> {
    if at == Some(call) {
        return Err(Error::Host(format!("{call:?} fails, as the script says")));
    }
    Ok(())
}

impl Destination for Scripted {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        fail(self.fail_at, Call::Prepare)
            .map_err(|error| Refusal { code: RefuseCode::Host, reason: error.to_string() })?;
        if machine != b"machine" {
            return Err(Refusal { code: RefuseCode::Machine, reason: "not a scripted machine".into() });
        }
        let memory = |pages: u64| Mutex::new(vec![0; pages as usize * PAGE_SIZE]);
        let spaces = offer.layout.spaces.iter().map(|space| memory(space.pages)).collect();
        self.memory = Arc::new(Memory { spaces, fail_at: self.fail_at, broken: self.site.broken() });
        self.layout = offer.layout.clone();
        (self.loaded, self.missing) = (None, None);
        Ok(())
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        self.memory.clone()
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        fail(self.fail_at, Call::Load)?;
        if State::decode(state)?.section("scripted").is_none() {
            return Err(Error::Workload("the state has no registers".into()));
        }
        // As KVM does with a guest's clock pages, which are written again before the guest sees them.
        let run = PageRun {
            space: SpaceId(0),
            first: 7.min(self.layout.spaces.first().map_or(0, |space| space.pages - 1)),
            count: 1,
        };
        let mut before = vec![0; PAGE_SIZE];
        self.memory.read(run.space, run.offset(), &mut before)?;
        self.memory.change(run.space, run.offset(), run.bytes(), |memory| memory.fill(0xc1))?;
        self.loaded = Some((run, before));
        Ok(())
    }

    fn start(self: Box<Self>, _: MigrationId) -> Result<String> {
        fail(self.fail_at, Call::Start)?;
        let Some((run, before)) = &self.loaded else {
            return Err(Error::Workload("no state was loaded".into()));
        };
        self.memory.change(run.space, run.offset(), run.bytes(), |memory| memory.copy_from_slice(before))?;
        let bytes = |space: &Mutex<Vec<u8>>| space.lock().unwrap_or_else(PoisonError::into_inner).clone();
        self.witness.started_with(self.memory.spaces.iter().map(bytes).collect());
        self.witness.runs(Who::Destination, true);
        Ok("scripted".into())
    }

    fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        fail(self.fail_at, Call::Expect)?;
        for (space, set) in (0..).zip(missing) {
            for run in set.runs(SpaceId(space), 64) {
                // Neither what came nor zeros: whoever reads it too early shall notice.
                self.memory.change(run.space, run.offset(), run.bytes(), |memory| memory.fill(0xdb))?;
            }
        }
        self.missing = Some(missing.to_vec());
        Ok(())
    }

    fn start_incomplete(self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>> {
        fail(self.fail_at, Call::Start)?;
        let (Some(missing), Some((run, before))) = (self.missing, &self.loaded) else {
            return Err(Error::Workload("no state was loaded, or nothing is missing".into()));
        };
        if !missing.first().is_some_and(|missing| missing.contains(run.first)) {
            self.memory
                .change(run.space, run.offset(), run.bytes(), |memory| memory.copy_from_slice(before))?;
        }
        self.witness.runs(Who::Destination, true);
        Ok(self.site.start(migration, self.layout, self.memory, missing, self.witness))
    }

    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        Ok(self.site.take_up(migration))
    }

    fn discard(self: Box<Self>) {}
}

impl Memory {
    pub(super) fn change(
        &self,
        space: SpaceId,
        offset: u64,
        bytes: usize,
        change: impl FnOnce(&mut [u8]),
    ) -> Result<()> {
        let outside = || Error::Host("a write outside the memory".into());
        let space = self.spaces.get(usize::from(space.0)).ok_or_else(outside)?;
        let mut memory = space.lock().unwrap_or_else(PoisonError::into_inner);
        let begin = offset as usize;
        change(memory.get_mut(begin..begin.saturating_add(bytes)).ok_or_else(outside)?);
        Ok(())
    }
}

impl PageReader for Memory {
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let bytes = buffer.len();
        self.change(space, offset, bytes, |memory| buffer.copy_from_slice(memory))?;
        if let Some(byte) =
            self.broken.filter(|broken| broken.0 == space).and_then(|(_, at, _)| at.checked_sub(offset))
            && let (Some(byte), Some((.., mask))) = (buffer.get_mut(byte as usize), self.broken)
        {
            *byte ^= mask;
        }
        Ok(())
    }

    fn is_untouched(&self, _: PageRun) -> Result<bool> {
        Ok(false)
    }
}

impl PageMemory for Memory {
    fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()> {
        fail(self.fail_at, Call::Write)?;
        self.change(space, offset, bytes.len(), |memory| memory.copy_from_slice(bytes))
    }

    fn zero(&self, run: PageRun) -> Result<()> {
        fail(self.fail_at, Call::Zero)?;
        self.change(run.space, run.offset(), run.bytes(), |memory| memory.fill(0))
    }

    fn settle(&self) -> Result<()> {
        fail(self.fail_at, Call::Settle)
    }
}

//! A program's memory as a destination: what is restored is put in place, and the program goes on by itself.

use super::source::{SECTION, SECTION_VERSION};
use crate::destination::{Destination, Incomplete, PageMemory, Refusal};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::source::Workload;
use protocol::MigrationId;
use protocol::control::{Offer, RefuseCode};
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet};
use protocol::state::State;
use std::sync::{Arc, Mutex, PoisonError};

/// Makes all memory zero.
pub(super) fn clear(layout: &Layout, memory: &GuestMemory) -> Result<()> {
    for space in &layout.spaces {
        let mut first = 0;
        while first < space.pages {
            let count = u32::try_from(space.pages - first).unwrap_or(u32::MAX);
            memory.zero(PageRun { space: space.id, first, count })?;
            first += u64::from(count);
        }
    }
    Ok(())
}

/// The program for one restore.
pub(super) struct Arrival {
    workload: Workload,
    memory: Arc<GuestMemory>,
    saved: Arc<Mutex<Option<Vec<u8>>>>,
}

impl Arrival {
    pub(super) fn new(
        workload: Workload,
        memory: Arc<GuestMemory>,
        saved: Arc<Mutex<Option<Vec<u8>>>>,
    ) -> Self {
        Self { workload, memory, saved }
    }
}

impl Destination for Arrival {
    fn prepare(&mut self, offer: &Offer, _: &[u8]) -> std::result::Result<(), Refusal> {
        let refuse = |reason| Err(Refusal { code: RefuseCode::Machine, reason });
        if offer.kind != self.workload.kind {
            return refuse(format!("{} is a checkpoint of a VM and not of a program", offer.name));
        }
        if offer.layout != self.workload.layout {
            return refuse(format!(
                "the checkpoint of {} has other regions, of {} bytes in all; the program has {}: it is another version of it, or was \
                 started with other options",
                offer.name,
                offer.layout.total_bytes(),
                self.workload.layout.total_bytes()
            ));
        }
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(())
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        Arc::<GuestMemory>::clone(&self.memory)
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        let state = State::decode(state)?;
        let section = state.section(SECTION).filter(|section| section.version == SECTION_VERSION);
        let section = section.ok_or_else(|| Error::Store("the state is not that of a program".into()))?;
        *self.saved.lock().unwrap_or_else(PoisonError::into_inner) = Some(section.body.clone());
        Ok(())
    }

    fn start(self: Box<Self>, _: MigrationId) -> Result<String> {
        Ok(self.workload.name)
    }

    fn expect(&mut self, _: &[PageSet]) -> Result<()> {
        Err(Error::Host("a program is restored whole, and not lazily".into()))
    }

    fn start_incomplete(self: Box<Self>, _: MigrationId) -> Result<Arc<dyn Incomplete>> {
        Err(Error::Host("a program is restored whole, and does not miss pages".into()))
    }

    fn take_up(&self, _: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        Ok(None)
    }

    fn discard(self: Box<Self>) {}
}

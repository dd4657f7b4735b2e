//! Who ran when: the judge of a test with scripted ends.

use protocol::page::PAGE_SIZE;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// An end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Who {
    /// Where the workload comes from.
    Source,
    /// Where it goes.
    Destination,
}

/// Sees both ends of a migration, at every instant, and the memory that matters.
#[derive(Clone, Default)]
pub struct Witness(Arc<Mutex<Seen>>);

#[derive(Default)]
struct Seen {
    source: bool,
    destination: bool,
    both_ran: bool,
    misread: bool,
    at_freeze: Vec<Vec<u8>>,
    arrived: Vec<Vec<u8>>,
}

impl Witness {
    /// An end begins or ceases to run.
    pub fn runs(&self, who: Who, running: bool) {
        let mut seen = self.lock();
        match who {
            Who::Source => seen.source = running,
            Who::Destination => seen.destination = running,
        }
        seen.both_ran |= seen.source && seen.destination;
    }

    /// Whether this end runs now.
    pub fn is_running(&self, who: Who) -> bool {
        let seen = self.lock();
        match who {
            Who::Source => seen.source,
            Who::Destination => seen.destination,
        }
    }

    /// Whether both ends ran at any instant.
    pub fn saw_two(&self) -> bool {
        self.lock().both_ran
    }

    /// Whether the destination started with the memory that the source froze with.
    pub fn memory_arrived(&self) -> bool {
        let seen = self.lock();
        !seen.at_freeze.is_empty() && seen.at_freeze == seen.arrived
    }

    /// The memory that the source froze with last.
    pub fn frozen_memory(&self) -> Vec<Vec<u8>> {
        self.lock().at_freeze.clone()
    }

    /// The bytes of a page as the source froze with it.
    pub(crate) fn frozen_page(&self, space: usize, page: u64) -> Vec<u8> {
        let at = page as usize * PAGE_SIZE;
        self.lock().at_freeze[space][at..at + PAGE_SIZE].to_vec()
    }

    /// A guest at the destination read something else than what the source froze with.
    pub(crate) fn misread(&self) {
        self.lock().misread = true;
    }

    /// Whether a guest at the destination ever read what was not there at the freeze.
    pub fn saw_wrong_bytes(&self) -> bool {
        self.lock().misread
    }

    /// The source froze with this memory.
    pub(crate) fn frozen_with(&self, memory: &[Vec<u8>]) {
        self.lock().at_freeze = memory.to_vec();
    }

    /// The destination started with this memory.
    pub(crate) fn started_with(&self, memory: Vec<Vec<u8>>) {
        self.lock().arrived = memory;
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

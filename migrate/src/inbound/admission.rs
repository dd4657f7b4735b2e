//! Who may come in: pure accounting of migrations, their names and their memory.

use super::visitor::Visitor;
use crate::identity::Fingerprint;
use crossbeam_channel::{Sender, TrySendError};
use protocol::MigrationId;
use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// The most senders that wait to go on with a workload that misses pages.
const MAX_STRANDED: usize = 8;

/// How much may arrive at once.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Migrations that are served at once.
    pub max_migrations: usize,
    /// Memory of all of them together, in bytes.
    pub max_memory_bytes: u64,
    /// Offers that wait for their turn; one more is refused at once.
    pub max_waiting: usize,
    /// How long an offer may wait for its turn. A sender waits longer for its answer.
    pub waiting: Duration,
}

impl Limits {
    /// One migration at a time, on a host that allows this much memory.
    pub fn one(max_memory_bytes: u64) -> Self {
        Self { max_migrations: 1, max_memory_bytes, max_waiting: 8, waiting: Duration::from_secs(5) }
    }
}

/// What is under way and what waits.
#[derive(Default)]
pub(super) struct Admission {
    running: Vec<Running>,
    waiting: VecDeque<(Visitor, Instant)>,
    /// Senders of workloads that run here and miss pages, with nobody to serve them.
    stranded: VecDeque<(MigrationId, Visitor)>,
    served: usize,
    reserved_bytes: u64,
    /// Whoever is being greeted.
    greeted: Vec<Fingerprint>,
}

/// A migration that has a thread of its own.
struct Running {
    migration: MigrationId,
    key: Fingerprint,
    name: String,
    visitors: Sender<Visitor>,
}

/// Why a migration cannot begin.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Taken {
    /// One of its id is under way.
    Id,
    /// One of its workload's name is under way.
    Name,
}

impl Admission {
    /// Notes that a peer is being greeted, if not too many are, of all and of this one.
    pub(super) fn greet(&mut self, key: Fingerprint, most: usize, most_of_one: usize) -> bool {
        let of_one = self.greeted.iter().filter(|known| **known == key).count();
        let fits = self.greeted.len() < most && of_one < most_of_one;
        if fits {
            self.greeted.push(key);
        }
        fits
    }

    /// The peer has been greeted.
    pub(super) fn greeted(&mut self, key: Fingerprint) {
        if let Some(at) = self.greeted.iter().position(|known| *known == key) {
            self.greeted.swap_remove(at);
        }
    }

    /// Whether nobody is being greeted.
    pub(super) fn greets_nobody(&self) -> bool {
        self.greeted.is_empty()
    }

    /// An offer waits for its turn; given back when too many do.
    pub(super) fn wait(&mut self, visitor: Visitor, limits: &Limits) -> Option<Visitor> {
        if self.waiting.len() >= limits.max_waiting {
            return Some(visitor);
        }
        self.waiting.push_back((visitor, Instant::now()));
        None
    }

    /// The next offer whose turn it is and the memory that is reserved for it: the first for which there is room.
    pub(super) fn next(&mut self, limits: &Limits) -> Option<(Visitor, u64)> {
        if self.served >= limits.max_migrations {
            return None;
        }
        let room = limits.max_memory_bytes.saturating_sub(self.reserved_bytes);
        let at = self.waiting.iter().position(|(visitor, _)| needs(visitor, limits) <= room)?;
        let (visitor, _) = self.waiting.remove(at)?;
        let bytes = needs(&visitor, limits);
        self.served += 1;
        self.reserved_bytes += bytes;
        Some((visitor, bytes))
    }

    /// The offers that have waited too long, if it is for want of room that they wait.
    pub(super) fn overdue(&mut self, limits: &Limits) -> Vec<Visitor> {
        let room = limits.max_memory_bytes.saturating_sub(self.reserved_bytes);
        let busy = self.served >= limits.max_migrations;
        let (overdue, waiting) =
            std::mem::take(&mut self.waiting).into_iter().partition(|(visitor, since)| {
                (busy || needs(visitor, limits) > room) && since.elapsed() >= limits.waiting
            });
        self.waiting = waiting;
        overdue.into_iter().map(|(visitor, _): (Visitor, Instant)| visitor).collect()
    }

    /// A sender asks about a workload that nobody serves; given back when too many do.
    pub(super) fn strand(&mut self, migration: MigrationId, visitor: Visitor) -> Option<Visitor> {
        if self.stranded.len() >= MAX_STRANDED {
            return Some(visitor);
        }
        self.stranded.push_back((migration, visitor));
        None
    }

    /// The next one of these.
    pub(super) fn next_stranded(&mut self) -> Option<(MigrationId, Visitor)> {
        self.stranded.pop_front()
    }

    /// Those who wait for a turn that will never come.
    pub(super) fn close(&mut self) -> Vec<Visitor> {
        let stranded = self.stranded.drain(..).map(|(_, visitor)| visitor);
        self.waiting.drain(..).map(|(visitor, _)| visitor).chain(stranded).collect()
    }

    /// A migration that was served is over.
    pub(super) fn release(&mut self, bytes: u64) {
        self.served -= 1;
        self.reserved_bytes -= bytes;
    }

    /// A migration begins: from now on its further connections are for `visitors`.
    pub(super) fn begin(
        &mut self,
        migration: MigrationId,
        key: Fingerprint,
        name: &str,
        visitors: Sender<Visitor>,
    ) -> Result<(), Taken> {
        if self.running.iter().any(|running| running.migration == migration) {
            return Err(Taken::Id);
        }
        if self.running.iter().any(|running| running.name == name) {
            return Err(Taken::Name);
        }
        self.running.push(Running { migration, key, name: name.into(), visitors });
        Ok(())
    }

    /// Whether an offer of the same peer for a workload of the same name waits for its turn.
    pub(super) fn is_superseded(&self, migration: MigrationId) -> bool {
        let running = self.running.iter().find(|running| running.migration == migration);
        running.is_some_and(|running| {
            self.waiting.iter().any(|(visitor, _)| {
                visitor.key == running.key && visitor.name() == Some(running.name.as_str())
            })
        })
    }

    /// A migration is over.
    pub(super) fn end(&mut self, migration: MigrationId) {
        self.running.retain(|running| running.migration != migration);
    }

    /// Brings a visitor to the migration that it names, if this peer offered it.
    pub(super) fn bring(&self, migration: MigrationId, visitor: Visitor) -> Brought {
        let running = self.running.iter().find(|running| running.migration == migration);
        let Some(running) = running.filter(|running| running.key == visitor.key) else {
            return Brought::Unknown(visitor);
        };
        match running.visitors.try_send(visitor) {
            Ok(()) => Brought::There,
            Err(TrySendError::Full(visitor)) => Brought::TooMany(visitor),
            Err(TrySendError::Disconnected(visitor)) => Brought::Unknown(visitor),
        }
    }
}

/// Whether a visitor was brought to the migration that it names.
pub(super) enum Brought {
    /// It waits there.
    There,
    /// There is no such migration, or another peer offered it.
    Unknown(Visitor),
    /// Too many wait there already.
    TooMany(Visitor),
}

/// The memory to reserve. What can never be had is not waited for: it is refused when it is looked at.
fn needs(visitor: &Visitor, limits: &Limits) -> u64 {
    let bytes = visitor.memory_bytes();
    if bytes > limits.max_memory_bytes { 0 } else { bytes }
}

//! All migrations of a process: those that run, and what those that ended came to; and the series of checkpoints it takes.

use crate::steer::{Board, SeriesBoard};
use protocol::steer::{End, Outcome, Series, Status};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// The migrations of a process. A clone is another handle on the same ones.
#[derive(Debug, Clone, Default)]
pub struct Fleet(Arc<Mutex<Ships>>);

#[derive(Debug, Default)]
struct Ships {
    next: u64,
    running: BTreeMap<u64, Board>,
    ended: Totals,
    series: Vec<SeriesBoard>,
}

/// What never falls, as a counter must.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Totals {
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    /// By end (sent, received) and outcome (moved, failed, in doubt).
    pub(super) migrations: [[u64; 3]; 2],
}

impl Totals {
    fn add_bytes(&mut self, status: &Status) {
        let bytes = match status.end {
            End::Send => &mut self.sent_bytes,
            End::Receive => &mut self.received_bytes,
        };
        *bytes = bytes.saturating_add(status.moved_bytes);
    }

    fn add_end(&mut self, status: &Status) {
        self.add_bytes(status);
        let end = match status.end {
            End::Send => 0,
            End::Receive => 1,
        };
        let outcome = match status.outcome {
            Some(Outcome::Moved) => 0,
            Some(Outcome::Failed) | None => 1,
            Some(Outcome::InDoubt) => 2,
        };
        self.migrations[end][outcome] += 1;
    }
}

impl Fleet {
    /// A migration begins; it counts as running until what is returned is dropped.
    pub fn add(&self, board: Board) -> Entry {
        let mut ships = self.lock();
        ships.next += 1;
        let number = ships.next;
        ships.running.insert(number, board);
        Entry { fleet: self.clone(), number }
    }

    /// A series of checkpoints begins; its counts stay.
    pub fn add_series(&self, board: SeriesBoard) {
        self.lock().series.push(board);
    }

    /// How the series of checkpoints are.
    pub(super) fn series(&self) -> Vec<Series> {
        self.lock().series.iter().map(SeriesBoard::series).collect()
    }

    /// How those are that run, and what all together came to so far.
    pub(super) fn look(&self) -> (Vec<Status>, Totals) {
        let ships = self.lock();
        let running: Vec<_> = ships.running.values().map(Board::status).collect();
        let mut totals = ships.ended;
        for status in &running {
            totals.add_bytes(status);
        }
        (running, totals)
    }

    fn lock(&self) -> MutexGuard<'_, Ships> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A migration's place among those that run.
#[derive(Debug)]
pub struct Entry {
    fleet: Fleet,
    number: u64,
}

impl Drop for Entry {
    fn drop(&mut self) {
        let mut ships = self.fleet.lock();
        if let Some(board) = ships.running.remove(&self.number) {
            ships.ended.add_end(&board.status());
        }
    }
}

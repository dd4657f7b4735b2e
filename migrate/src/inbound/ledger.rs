//! What became of migrations, for senders that ask.

use protocol::MigrationId;
use protocol::control::Outcome;
use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

/// The most outcomes that are remembered. A sender asks for less than a minute.
const REMEMBERED: usize = 1024;

/// Who remembers what became of a migration. Asked and told from several threads.
///
/// *`Started` and `Discarded` are promises:* that it runs or ran here, or that it never will. What is not known is
/// `Unknown`, which makes a sender keep its workload frozen.
pub trait Ledger: Send + Sync {
    /// What became of it.
    fn outcome(&self, migration: MigrationId) -> Outcome;

    /// Whether its workload runs here and misses pages that only the source has.
    fn is_incomplete(&self, migration: MigrationId) -> bool;

    /// Notes what became of it. Must not wait for whoever is asking: a workload that has just started stands behind
    /// this call.
    fn record(&self, migration: MigrationId, outcome: Outcome);
}

/// A ledger that lives as long as its process.
#[derive(Debug, Default)]
pub struct MemoryLedger {
    outcomes: Mutex<VecDeque<(MigrationId, Outcome)>>,
}

impl Ledger for MemoryLedger {
    fn outcome(&self, migration: MigrationId) -> Outcome {
        let outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        let newest = outcomes.iter().rev().find(|(known, _)| *known == migration);
        newest.map_or(Outcome::Unknown, |(_, outcome)| *outcome)
    }

    /// Whoever serves such a workload answers for it; this ledger sees no further.
    fn is_incomplete(&self, _: MigrationId) -> bool {
        false
    }

    fn record(&self, migration: MigrationId, outcome: Outcome) {
        let mut outcomes = self.outcomes.lock().unwrap_or_else(PoisonError::into_inner);
        if outcomes.len() == REMEMBERED {
            outcomes.pop_front();
        }
        outcomes.push_back((migration, outcome));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_remembers_the_newest_and_never_more_than_it_may() {
        let ledger = MemoryLedger::default();
        for number in 0..2 * REMEMBERED as u128 {
            ledger.record(MigrationId(number), Outcome::Started);
        }
        assert_eq!(ledger.outcomes.lock().unwrap().len(), REMEMBERED);
        assert_eq!(ledger.outcome(MigrationId(0)), Outcome::Unknown);
        assert_eq!(ledger.outcome(MigrationId(2 * REMEMBERED as u128 - 1)), Outcome::Started);
    }
}

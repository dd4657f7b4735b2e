//! What became of migrations, for senders that ask.

use protocol::MigrationId;
use protocol::control::Outcome;
use std::collections::VecDeque;

/// The most outcomes that are remembered. A sender asks for less than a minute.
const REMEMBERED: usize = 1024;

/// Who remembers what became of a migration.
///
/// *`Started` and `Discarded` are promises:* that it runs or ran here, or that it never will. What is not known is
/// `Unknown`, which makes a sender keep its workload frozen.
pub trait Ledger {
    /// What became of it.
    fn outcome(&self, migration: MigrationId) -> Outcome;

    /// Notes what became of it.
    fn record(&mut self, migration: MigrationId, outcome: Outcome);
}

/// A ledger that lives as long as its process.
#[derive(Debug, Default)]
pub struct MemoryLedger {
    outcomes: VecDeque<(MigrationId, Outcome)>,
}

impl Ledger for MemoryLedger {
    fn outcome(&self, migration: MigrationId) -> Outcome {
        let newest = self.outcomes.iter().rev().find(|(known, _)| *known == migration);
        newest.map_or(Outcome::Unknown, |(_, outcome)| *outcome)
    }

    fn record(&mut self, migration: MigrationId, outcome: Outcome) {
        if self.outcomes.len() == REMEMBERED {
            self.outcomes.pop_front();
        }
        self.outcomes.push_back((migration, outcome));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_remembers_the_newest_and_never_more_than_it_may() {
        let mut ledger = MemoryLedger::default();
        for number in 0..2 * REMEMBERED as u128 {
            ledger.record(MigrationId(number), Outcome::Started);
        }
        assert_eq!(ledger.outcomes.len(), REMEMBERED);
        assert_eq!(ledger.outcome(MigrationId(0)), Outcome::Unknown);
        assert_eq!(ledger.outcome(MigrationId(2 * REMEMBERED as u128 - 1)), Outcome::Started);
    }
}

//! When to stop the workload for the last pages: a pure rule over measured rounds.
//!
//! The last pages are copied to memory while the workload stands still, and go to the store behind its back. So what bounds the
//! pause is how fast memory is copied; how fast the store is has no part in it.

use std::time::Duration;

/// The most rounds: each is shorter than the one before, or they end before that.
const MAX_ROUNDS: usize = 64;

/// Rounds that may fail to gain anything, in sequence.
const PATIENCE: usize = 2;

/// What remains must fall below this part of the least there was, or the round gained nothing.
const GAIN: f64 = 0.9;

/// Pages whose copying says something about the next: 1 MiB.
const ENOUGH_PAGES: u64 = 256;

/// Copying a page on its own, where nothing was measured: 2 us (November 2026: 0.8 to 1.5 us by pread(2)).
const GUESSED_NS_PER_PAGE: f64 = 2000.0;

/// Pages can take longer once they lie apart: so much is added to what was measured.
const CAUTION: f64 = 1.25;

/// A round that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Measured {
    /// Pages that were copied.
    pub(super) copied_pages: u64,
    /// How long that took, without waiting for room.
    pub(super) copying: Duration,
    /// Pages that were dirty when it was over.
    pub(super) remaining_pages: u64,
}

/// What to do behind a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decision {
    /// One more.
    Round { predicted: Duration },
    /// Freeze: the pause will be within the budget.
    Freeze { predicted: Duration },
    /// Freeze although it will not: nothing is gained any more.
    Force { predicted: Duration },
}

impl Decision {
    /// The pause if the workload were stopped now.
    pub(super) fn predicted(self) -> Duration {
        match self {
            Self::Round { predicted } | Self::Freeze { predicted } | Self::Force { predicted } => predicted,
        }
    }
}

/// Decides behind the last of these rounds. `fixed` is what a pause takes without pages.
pub(super) fn decide(rounds: &[Measured], fixed: Duration, budget: Duration) -> Decision {
    let remaining = rounds.last().map_or(0, |round| round.remaining_pages);
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a positive number of nanoseconds"
    )]
    let copying_ns = (remaining as f64 * ns_per_page(rounds)) as u64;
    let predicted = fixed + Duration::from_nanos(copying_ns);
    if predicted <= budget {
        return Decision::Freeze { predicted };
    }
    if rounds.len() >= MAX_ROUNDS || gained_nothing(rounds) >= PATIENCE {
        return Decision::Force { predicted };
    }
    Decision::Round { predicted }
}

/// What copying a page takes: by the latest rounds that say something, with caution.
fn ns_per_page(rounds: &[Measured]) -> f64 {
    let (mut pages, mut copying) = (0, Duration::ZERO);
    for round in rounds.iter().rev() {
        pages += round.copied_pages;
        copying += round.copying;
        if pages >= ENOUGH_PAGES {
            return copying.as_nanos() as f64 / pages as f64 * CAUTION;
        }
    }
    GUESSED_NS_PER_PAGE
}

/// How many of the latest rounds, in sequence, left no less than the least before them.
fn gained_nothing(rounds: &[Measured]) -> usize {
    let (mut least, mut without_gain) = (f64::INFINITY, 0);
    for round in rounds {
        let remaining = round.remaining_pages as f64;
        without_gain = if remaining < least * GAIN { 0 } else { without_gain + 1 };
        least = least.min(remaining);
    }
    without_gain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn round(copied_pages: u64, ns_per_page: u64, remaining_pages: u64) -> Measured {
        Measured { copied_pages, copying: Duration::from_nanos(copied_pages * ns_per_page), remaining_pages }
    }

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn it_freezes_once_the_rest_can_be_copied_within_the_budget() {
        // 800 ns a page and a quarter more: 4,000 pages in 4 ms, and 1 ms besides.
        assert_eq!(decide(&[round(50_000, 800, 4000)], MS, 5 * MS), Decision::Freeze { predicted: 5 * MS });
        assert!(matches!(decide(&[round(50_000, 800, 4001)], MS, 5 * MS), Decision::Round { .. }));
        // Nothing was dirty, so nothing was measured.
        assert!(matches!(decide(&[round(0, 0, 0)], MS, 5 * MS), Decision::Freeze { .. }));
        assert!(matches!(decide(&[round(0, 0, 3000)], MS, 5 * MS), Decision::Round { .. }));
    }

    #[test]
    fn two_rounds_that_gain_nothing_are_the_last() {
        let mut rounds = vec![round(200_000, 800, 60_000), round(60_000, 800, 59_000)];
        assert!(matches!(decide(&rounds, MS, 5 * MS), Decision::Round { .. }));
        rounds.push(round(59_000, 800, 61_000));
        assert!(matches!(decide(&rounds, MS, 5 * MS), Decision::Force { .. }));
        // A gain begins the count anew.
        rounds[2].remaining_pages = 40_000;
        assert!(matches!(decide(&rounds, MS, 5 * MS), Decision::Round { .. }));
    }

    #[test]
    fn few_pages_do_not_decide_what_a_page_takes() {
        let rounds = [round(50_000, 800, 10), round(10, 100_000, 3000)];
        assert!(matches!(decide(&rounds, MS, 5 * MS), Decision::Freeze { .. }));
    }

    proptest! {
        #[test]
        fn a_guest_that_keeps_writing_is_stopped_in_the_end(
            dirty_part in 0.01f64..1.0, pages in 1u64..10_000_000, budget_ms in 1u32..100,
        ) {
            let (mut rounds, mut remaining) = (Vec::new(), pages);
            loop {
                let copied = remaining;
                remaining = (copied as f64 * dirty_part) as u64;
                rounds.push(round(copied, 800, remaining));
                match decide(&rounds, MS / 2, MS * budget_ms) {
                    Decision::Round { .. } => prop_assert!(rounds.len() < MAX_ROUNDS),
                    Decision::Freeze { predicted } => {
                        prop_assert!(predicted <= MS * budget_ms);
                        break;
                    }
                    Decision::Force { .. } => {
                        prop_assert!(dirty_part > GAIN * 0.99 || rounds.len() == MAX_ROUNDS);
                        break;
                    }
                }
            }
        }
    }
}

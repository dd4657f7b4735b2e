//! Our rules, and others that are in use, to compare with.

use super::forecast::PAGE_BYTES;
use super::measure::bandwidth_bytes_per_s;
use super::policy::{Decision, OnTimeout, Situation, decide, exhausted};
use clap::ValueEnum;
use std::fmt;
use std::time::Duration;

/// The rounds of [`Policy::FixedRounds`].
const FIXED_ROUNDS: usize = 5;

/// The budget of [`Policy::Threshold`]: the default of those who use it.
const THRESHOLD: Duration = Duration::from_millis(300);

/// A way to decide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// Ours.
    Migrate,
    /// Freezes as soon as remaining bytes / bandwidth is below 300 ms. Fixed costs are not counted, and nothing is
    /// done about a workload that never gets there.
    Threshold,
    /// Freezes behind five rounds.
    FixedRounds,
    /// Freezes as soon as what remains no longer falls from one round to the next, or nothing remains.
    NotFalling,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Migrate, Self::Threshold, Self::FixedRounds, Self::NotFalling];

    /// Decides behind the last round.
    pub fn decide(self, now: &Situation<'_>) -> Decision {
        if self == Self::Migrate {
            return decide(now);
        }
        let remaining = now.rounds.last().map_or(u64::MAX, |round| round.remaining_pages);
        let seconds = remaining as f64 * PAGE_BYTES / bandwidth_bytes_per_s(now.rounds).max(1.0);
        let predicted = Duration::from_secs_f64(seconds.min(1e9));
        let done = match self {
            Self::Migrate | Self::Threshold => predicted <= THRESHOLD,
            Self::FixedRounds => now.rounds.len() >= FIXED_ROUNDS,
            Self::NotFalling => match now.rounds {
                [.., before, last] => last.remaining_pages >= before.remaining_pages,
                _ => remaining == 0,
            },
        };
        if done {
            return Decision::Freeze { predicted };
        }
        match exhausted(now.rounds, now.elapsed, now.limits) {
            None => Decision::Round { predicted },
            Some(_) if now.limits.on_timeout == OnTimeout::Force => Decision::Force { predicted },
            Some(bound) => Decision::GiveUp { bound, predicted },
        }
    }
}

impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Migrate => "migrate",
            Self::Threshold => "threshold",
            Self::FixedRounds => "fixed-rounds",
            Self::NotFalling => "not-falling",
        })
    }
}

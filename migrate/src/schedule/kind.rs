//! Full or delta.
//!
//! A delta is smaller, so it is taken as long as the chain that it makes can be restored fast enough. Restoring reads every page once,
//! from the newest link that has it, so the bytes of pages to read grow up to the size of the memory and no further; what grows
//! without end is what is read about the pages of every link, and the links that must be opened.

use super::Schedule;
use std::fmt;

/// A delta of more than this part of a full checkpoint saves too little to make the chain longer.
const WORTH_A_DELTA: f64 = 0.7;

/// Where even a full checkpoint takes longer to restore than is wanted, a chain may take this much longer than that: the bound that
/// restoring a chain is held to in docs/performance.md.
const OF_A_FULL: f64 = 1.2;

/// What the index has for a byte of pages: 24 bytes a run, 8 a page and 56 an extent, of 16 pages mostly, in runs of a few pages.
pub(super) const INDEX_PER_BYTE: f64 = 1.0 / 200.0;

/// The chain that a delta would stand on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Chain {
    /// Deltas in it.
    pub deltas: u32,
    /// Bytes of stored pages in all its links together.
    pub stored_bytes: u64,
}

/// What the next checkpoint is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A delta on the last one.
    Delta,
    /// A full one.
    Full(Full),
}

/// Why it is a full one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Full {
    /// There is nothing that it could stand on.
    First,
    /// The chain has as many deltas as it may have.
    Chain,
    /// Restoring the longer chain would take longer than is wanted.
    RecoveryTime,
    /// A delta would hardly be smaller.
    Size,
}

impl fmt::Display for Full {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "there is no checkpoint that a delta could stand on",
            Self::Chain => "the chain has as many deltas as it may have",
            Self::RecoveryTime => "restoring a longer chain would take too long",
            Self::Size => "a delta would hardly be smaller",
        })
    }
}

pub(super) fn decide(schedule: &Schedule, chain: Option<&Chain>, page_bytes: f64) -> Kind {
    let Some(chain) = chain else { return Kind::Full(Full::First) };
    let restoring = Restoring::of(schedule);
    if chain.deltas >= schedule.aim.max_deltas {
        return Kind::Full(Full::Chain);
    }
    if restoring.is_hardly_smaller(page_bytes) {
        return Kind::Full(Full::Size);
    }
    let stored_bytes = chain.stored_bytes as f64 + schedule.cost(false, page_bytes).stored_bytes;
    if restoring.takes_s(chain.deltas + 1, stored_bytes) > restoring.wanted_s {
        return Kind::Full(Full::RecoveryTime);
    }
    Kind::Delta
}

/// What restoring takes, and may take.
#[derive(Debug, Clone, Copy)]
pub(super) struct Restoring {
    link_s: f64,
    s_per_byte: f64,
    /// The most bytes of pages that are read: every page once.
    most_bytes: f64,
    full_page_bytes: f64,
    pub(super) full_stored_bytes: f64,
    wanted_s: f64,
    max_deltas: u32,
}

impl Restoring {
    pub(super) fn of(schedule: &Schedule) -> Self {
        let full_page_bytes = schedule.full_page_bytes();
        let full = schedule.cost(true, full_page_bytes);
        // A store reads at least as fast as it writes what must be durable.
        let s_per_byte = if full.stored_bytes > 0.0 { full.took_s / full.stored_bytes } else { 0.0 };
        let mut restoring = Self {
            link_s: schedule.link_s,
            s_per_byte,
            most_bytes: full.stored_bytes * schedule.memory_bytes / full_page_bytes,
            full_page_bytes,
            full_stored_bytes: full.stored_bytes,
            wanted_s: 0.0,
            max_deltas: schedule.aim.max_deltas,
        };
        let wanted_s = schedule.aim.recovery_time.as_secs_f64();
        restoring.wanted_s = wanted_s.max(OF_A_FULL * restoring.takes_s(0, full.stored_bytes));
        restoring
    }

    /// A chain of so many deltas, and so many bytes in all its links.
    pub(super) fn takes_s(&self, deltas: u32, stored_bytes: f64) -> f64 {
        let bytes = stored_bytes.min(self.most_bytes) + stored_bytes * INDEX_PER_BYTE;
        (f64::from(deltas) + 1.0) * self.link_s + bytes * self.s_per_byte
    }

    /// How many deltas of this size follow on a full checkpoint.
    pub(super) fn deltas_on_a_full(&self, page_bytes: f64, stored_bytes: f64) -> u32 {
        if self.is_hardly_smaller(page_bytes) {
            return 0;
        }
        let takes_s =
            |deltas| self.takes_s(deltas, self.full_stored_bytes + f64::from(deltas) * stored_bytes);
        let fits = |deltas: u32| takes_s(deltas) <= self.wanted_s;
        if fits(self.max_deltas) {
            return self.max_deltas;
        }
        // The time only grows, so the last that fits is found by halving.
        let (mut fit, mut unfit) = (0, self.max_deltas);
        while unfit - fit > 1 {
            let middle = fit + (unfit - fit) / 2;
            if fits(middle) {
                fit = middle;
            } else {
                unfit = middle;
            }
        }
        fit
    }

    fn is_hardly_smaller(&self, page_bytes: f64) -> bool {
        page_bytes >= WORTH_A_DELTA * self.full_page_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::{Aim, Taken};
    use proptest::prelude::*;
    use std::time::Duration;

    const GB: u64 = 1_000_000_000;

    /// 1 GB of memory, all of it used, to a store that takes 500 MB/s.
    fn schedule(aim: Aim, link: Duration) -> Schedule {
        let mut schedule = Schedule::new(aim, GB, link);
        let took = Duration::from_secs(2);
        schedule.taken(&Taken { is_full: true, page_bytes: GB, stored_bytes: GB, took, ..Taken::default() });
        schedule
    }

    #[test]
    fn each_reason_for_a_full_one_is_found() {
        let local = schedule(Aim::default(), Duration::from_millis(1));
        let chain = Chain { deltas: 5, stored_bytes: GB + GB / 10 };
        assert_eq!(local.kind(None, 0), Kind::Full(Full::First));
        assert_eq!(local.kind(Some(&chain), GB / 50), Kind::Delta);
        assert_eq!(local.kind(Some(&chain), GB / 10 * 8), Kind::Full(Full::Size));
        let long = Chain { deltas: 100, ..chain };
        assert_eq!(local.kind(Some(&long), GB / 50), Kind::Full(Full::Chain));
        // 2 s for the pages of a full one, and 0.1 s for each link: 30 are too many.
        let remote = schedule(Aim::default(), Duration::from_millis(100));
        assert_eq!(remote.kind(Some(&Chain { deltas: 20, ..chain }), GB / 50), Kind::Delta);
        assert_eq!(
            remote.kind(Some(&Chain { deltas: 30, ..chain }), GB / 50),
            Kind::Full(Full::RecoveryTime)
        );
    }

    #[test]
    fn a_recovery_time_that_even_a_full_one_exceeds_does_not_make_all_full() {
        let aim = Aim { recovery_time: Duration::from_millis(10), ..Aim::default() };
        let schedule = schedule(aim, Duration::from_millis(1));
        let chain = Chain { deltas: 5, stored_bytes: GB };
        assert_eq!(schedule.kind(Some(&chain), GB / 50), Kind::Delta);
        let links = Chain { deltas: 99, stored_bytes: 60 * GB };
        assert_eq!(schedule.kind(Some(&links), GB / 50), Kind::Full(Full::RecoveryTime), "1.2 of a full one");
    }

    proptest! {
        #[test]
        fn the_forecast_of_a_chain_is_what_the_rule_then_does(
            delta_bytes in 0..GB, link_ms in 0_u64..200, recovery_ms in 0_u64..20_000, max_deltas in 0_u32..300,
        ) {
            let aim = Aim { recovery_time: Duration::from_millis(recovery_ms), max_deltas, ..Aim::default() };
            let schedule = schedule(aim, Duration::from_millis(link_ms));
            let mut chain = Chain { deltas: 0, stored_bytes: GB };
            while schedule.kind(Some(&chain), delta_bytes) == Kind::Delta {
                chain = Chain { deltas: chain.deltas + 1, stored_bytes: chain.stored_bytes + delta_bytes };
            }
            let forecast = Restoring::of(&schedule).deltas_on_a_full(delta_bytes as f64, delta_bytes as f64);
            prop_assert!(chain.deltas.abs_diff(forecast) <= 1, "{} and {}", chain.deltas, forecast);
        }
    }
}

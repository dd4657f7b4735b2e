//! How long until the next checkpoint.
//!
//! Checkpoints cost, and so does what a failure takes back. Failures come at random, once in `M` on average. A checkpoint every `T`
//! costs the workload `C(T)`; it counts once it is durable, `L(T)` later; restoring takes `R`. From one checkpoint to the next one
//! that counts, the first attempt takes `T + C`, and every attempt behind a failure `R + L + T + C`; with exponential times
//! between failures that is, for every second of work,
//!
//! ```text
//! M exp((R + L) / M) (exp((T + C) / M) - 1) / T
//! ```
//!
//! seconds on average. For costs that do not depend on the interval this is the expected time of J. T. Daly, "A higher order estimate
//! of the optimum checkpoint interval for restart dumps" (2006), and its least is close to `sqrt(2 M C)`, J. W. Young, "A first order
//! approximation to the optimum checkpoint interval" (1974). Here they do depend on it: the longer the interval, the more is dirty,
//! until the working set is. A cost that grows in proportion to the interval is paid whatever the interval is, and so says nothing
//! about which one is best; therefore the least is looked for over all intervals, instead of putting today's cost into a formula.

use super::Schedule;
use super::dirty::Curve;
use super::kind::Restoring;
use std::fmt;
use std::time::Duration;

/// The shortest interval: a checkpoint is not a way to follow each write.
const LEAST_S: f64 = 1.0;

/// Steps from one interval that is looked at to the next. Near its least the cost changes by the square of such a step.
const STEP: f64 = 1.05;

/// How much longer than the best an interval is that finds out about longer ones.
const PROBE: f64 = 2.0;

/// The part of the time in which a delta may be on its way into the store: the next must not wait for it, and other writers have
/// their turn.
const WRITING: f64 = 0.5;

/// What decided on the interval.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Nothing but that what failures and checkpoints cost together is least.
    Failures,
    /// Any shorter one would cost more than the overhead that is wanted.
    Overhead,
    /// Any shorter one would keep the store busy for more than half of the time.
    Writing,
    /// Nothing is known of longer ones, or only from long ago: once in a while one is twice as long.
    Unknown,
    /// No interval up to the time between two failures keeps to what is wanted: this is the longest.
    Unreachable,
}

impl fmt::Display for Bound {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failures => "failures and checkpoints cost least together",
            Self::Overhead => "a shorter one would cost more than the overhead wanted",
            Self::Writing => "a shorter one would keep the store busy",
            Self::Unknown => "it is not known whether a longer one is better",
            Self::Unreachable => "no interval keeps to the overhead wanted",
        })
    }
}

/// When the next checkpoint is due, and what it will come to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Plan {
    /// From the beginning of a checkpoint to that of the next.
    pub interval: Duration,
    /// What decided on it.
    pub bound: Bound,
    /// The part of its time that the workload will lose to checkpoints.
    pub overhead: f64,
    /// The part of its time that it will lose to checkpoints, to failures and to restoring, together.
    pub waste: f64,
    /// Deltas between two full ones.
    pub deltas: u32,
}

#[derive(Debug, Clone, Copy)]
struct Candidate {
    interval_s: f64,
    lost_s: f64,
    took_s: f64,
    /// Seconds for each second of work.
    expected: f64,
    deltas: u32,
}

pub(super) fn plan(schedule: &Schedule) -> Plan {
    let mtbf_s = schedule.aim.mtbf.as_secs_f64().max(LEAST_S);
    let restoring = Restoring::of(schedule);
    let dirty = schedule.dirty.curve();
    let candidate = |interval_s| candidate(schedule, &restoring, &dirty, mtbf_s, interval_s);
    let longer = |interval_s: &f64| Some(interval_s * STEP).filter(|longer| *longer < mtbf_s);
    let all: Vec<Candidate> =
        std::iter::successors(Some(LEAST_S), longer).chain([mtbf_s]).map(candidate).collect();
    let affordable = |one: &&Candidate| one.lost_s <= schedule.aim.overhead * one.interval_s;
    let written = |one: &&Candidate| one.took_s <= WRITING * one.interval_s;
    let best = least(all.iter());
    let by_overhead = least(all.iter().filter(affordable));
    let within = least(all.iter().filter(affordable).filter(written));
    let (mut chosen, mut bound) = match (within, by_overhead, best) {
        (Some(within), _, Some(best)) if same(within, best) => (within, Bound::Failures),
        (Some(within), Some(by_overhead), _) if same(within, by_overhead) => (within, Bound::Overhead),
        (Some(within), ..) => (within, Bound::Writing),
        (None, ..) => (candidate(mtbf_s), Bound::Unreachable),
    };
    let longer_s = (chosen.interval_s * PROBE).min(mtbf_s);
    if bound != Bound::Unreachable && !schedule.dirty.knows(longer_s) {
        // Nearly all that is known comes from intervals like this one; whether a longer one would be better, only a longer one tells.
        chosen = candidate(longer_s);
        bound = Bound::Unknown;
    }
    Plan {
        interval: Duration::from_secs_f64(chosen.interval_s),
        bound,
        overhead: chosen.lost_s / (chosen.interval_s + chosen.lost_s),
        waste: 1.0 - 1.0 / chosen.expected,
        deltas: chosen.deltas,
    }
}

fn least<'a>(candidates: impl Iterator<Item = &'a Candidate>) -> Option<Candidate> {
    candidates.min_by(|a, b| a.expected.total_cmp(&b.expected)).copied()
}

fn same(one: Candidate, other: Candidate) -> bool {
    one.interval_s.total_cmp(&other.interval_s).is_eq()
}

fn candidate(
    schedule: &Schedule,
    restoring: &Restoring,
    dirty: &Curve,
    mtbf_s: f64,
    interval_s: f64,
) -> Candidate {
    let page_bytes = dirty.bytes(interval_s).min(schedule.memory_bytes);
    let delta = schedule.cost(false, page_bytes);
    let full = schedule.cost(true, schedule.full_page_bytes());
    let deltas = restoring.deltas_on_a_full(page_bytes, delta.stored_bytes);
    // One of so many is a full one.
    let mean = |delta: f64, full: f64| (f64::from(deltas) * delta + full) / (f64::from(deltas) + 1.0);
    let lost_s = mean(delta.pause_s, full.pause_s) + page_bytes * schedule.slowed_s_per_byte();
    // A failure finds the chain half as long as it gets, on average.
    let stored_bytes = restoring.full_stored_bytes + f64::from(deltas) / 2.0 * delta.stored_bytes;
    let restore_s = restoring.takes_s(deltas / 2, stored_bytes);
    let expected = expected_s(mtbf_s, interval_s, lost_s, mean(delta.took_s, full.took_s), restore_s);
    let took_s = if deltas > 0 { delta.took_s } else { full.took_s };
    Candidate { interval_s, lost_s, took_s, expected, deltas }
}

/// The formula above: seconds for each second of work.
fn expected_s(mtbf_s: f64, interval_s: f64, lost_s: f64, took_s: f64, restore_s: f64) -> f64 {
    let behind_a_failure = ((restore_s + took_s) / mtbf_s).exp();
    mtbf_s * behind_a_failure * ((interval_s + lost_s) / mtbf_s).exp_m1() / interval_s
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::schedule::dirty::Dirty;
    use crate::schedule::{Aim, Taken};
    use proptest::prelude::*;

    /// J. T. Daly's estimate: the work between two checkpoints of a cost that is the same for all.
    fn daly_s(mtbf_s: f64, lost_s: f64) -> f64 {
        if lost_s >= 2.0 * mtbf_s {
            return mtbf_s;
        }
        let part = lost_s / (2.0 * mtbf_s);
        (2.0 * lost_s * mtbf_s).sqrt() * (1.0 + part.sqrt() / 3.0 + part / 9.0) - lost_s
    }

    /// A workload that dirties nothing, and whose checkpoints cost a pause.
    fn paused(aim: Aim, pause: Duration) -> Schedule {
        let mut schedule = Schedule::new(aim, 1 << 30, Duration::ZERO);
        for is_full in [true, false] {
            schedule.taken(&Taken {
                is_full,
                since_parent: (!is_full).then_some(Duration::from_secs(10)),
                page_bytes: if is_full { 1 << 30 } else { 0 },
                stored_bytes: if is_full { 1 << 30 } else { 0 },
                pause,
                took: pause,
                ..Taken::default()
            });
        }
        schedule
    }

    /// The plan once all lengths are known.
    fn settled(mut schedule: Schedule) -> Plan {
        for step in 0..40 {
            let interval_s = 2_f64.powf(f64::from(step) / 2.0);
            schedule.dirty.add(interval_s, schedule.dirty.curve().bytes(interval_s));
        }
        schedule.plan()
    }

    #[test]
    fn a_cost_that_is_always_the_same_gives_the_intervals_of_young_and_daly() {
        for (mtbf_s, pause_ms) in [(86_400, 5), (86_400, 2000), (3600, 500), (600, 10_000), (60, 15_000)] {
            let (mtbf, pause) = (Duration::from_secs(mtbf_s), Duration::from_millis(pause_ms));
            let plan = settled(paused(Aim { mtbf, overhead: 1.0, ..Aim::default() }, pause));
            let (mtbf_s, pause_s) = (mtbf.as_secs_f64(), pause.as_secs_f64());
            let found = plan.interval.as_secs_f64();
            let daly = daly_s(mtbf_s, pause_s);
            assert!((found / daly - 1.0).abs() < 0.05, "{mtbf_s} s, {pause_s} s: {found}, Daly {daly}");
            if pause_s < mtbf_s / 1000.0 {
                let young = (2.0 * mtbf_s * pause_s).sqrt();
                assert!(
                    (found / young - 1.0).abs() < 0.05,
                    "{mtbf_s} s, {pause_s} s: {found}, Young {young}"
                );
            }
            assert_eq!(plan.bound, Bound::Failures);
        }
    }

    #[test]
    fn the_overhead_that_is_wanted_makes_the_interval_longer() {
        let pause = Duration::from_millis(100);
        let short_lived = || Aim { mtbf: Duration::from_secs(100), overhead: 1.0, ..Aim::default() };
        let free = settled(paused(short_lived(), pause));
        let bound = settled(paused(Aim { overhead: 0.01, ..short_lived() }, pause));
        assert!(free.overhead > 0.02 && free.bound == Bound::Failures, "{free:?}");
        assert!(bound.overhead <= 0.01 && bound.bound == Bound::Overhead, "{bound:?}");
        assert!((10.0..10.5).contains(&bound.interval.as_secs_f64()), "{bound:?}");
        let never = paused(Aim { overhead: 1e-6, ..short_lived() }, pause).plan();
        assert_eq!((never.bound, never.interval), (Bound::Unreachable, Duration::from_secs(100)));
    }

    #[test]
    fn a_slow_store_makes_the_interval_longer() {
        let mut schedule = paused(Aim::default(), Duration::from_millis(1));
        for interval_s in [10, 20, 40, 80] {
            schedule.taken(&Taken {
                since_parent: Some(Duration::from_secs(interval_s)),
                page_bytes: 100_000_000,
                stored_bytes: 100_000_000,
                pause: Duration::from_millis(1),
                took: Duration::from_secs(50),
                ..Taken::default()
            });
        }
        let plan = settled(schedule);
        assert_eq!(plan.bound, Bound::Writing);
        assert!((90.0..125.0).contains(&plan.interval.as_secs_f64()), "{plan:?}");
    }

    #[test]
    fn a_cost_in_proportion_to_the_interval_does_not_change_it() {
        let aim = Aim { overhead: 1.0, ..Aim::default() };
        let pause = Duration::from_millis(100);
        let idle = settled(paused(aim.clone(), pause));
        let mut writing = paused(aim, pause);
        writing.dirty = Dirty::default();
        for interval_s in [1_u64, 10, 100, 1000] {
            // 2 % of the time go into faults, whatever the interval.
            writing.taken(&Taken {
                since_parent: Some(Duration::from_secs(interval_s)),
                page_bytes: interval_s * 500_000,
                stored_bytes: interval_s * 500_000,
                pause,
                slowed: Duration::from_millis(interval_s * 20),
                took: pause,
                ..Taken::default()
            });
        }
        let ratio = settled(writing).interval.as_secs_f64() / idle.interval.as_secs_f64();
        assert!((0.85..1.1).contains(&ratio), "{ratio}");
    }

    #[test]
    fn what_is_known_of_one_length_only_is_found_out_by_a_longer_one() {
        let mut schedule = paused(Aim::default(), Duration::from_millis(5));
        schedule.dirty = Dirty::default();
        let taken = |interval: Duration| Taken {
            since_parent: Some(interval),
            page_bytes: 300_000_000,
            stored_bytes: 300_000_000,
            pause: Duration::from_millis(5),
            slowed: Duration::from_millis(220),
            took: Duration::from_millis(300),
            ..Taken::default()
        };
        let mut interval = Duration::from_secs(30);
        let mut bounds = Vec::new();
        for _ in 0..20 {
            schedule.taken(&taken(interval));
            let plan = schedule.plan();
            interval = plan.interval;
            bounds.push(plan.bound);
        }
        assert!(bounds.contains(&Bound::Unknown) && bounds.contains(&Bound::Failures), "{bounds:?}");
        // The working set is always the same, so its cost is, too: Young's interval is 197 s.
        let plan = settled(schedule);
        assert!((180.0..215.0).contains(&plan.interval.as_secs_f64()), "{plan:?} behind {bounds:?}");
    }

    proptest! {
        #[test]
        fn whatever_was_measured_there_is_an_interval(
            taken in proptest::collection::vec(
                (any::<bool>(), any::<u32>(), any::<u64>(), any::<u64>(), any::<u32>(), any::<u32>(), any::<u32>()), 0..10),
            mtbf_s in 0_u64..1 << 40, overhead in 0.0..1.0, memory: u64, max_deltas: u32,
        ) {
            let mtbf = Duration::from_secs(mtbf_s);
            let aim = Aim { mtbf, overhead, max_deltas, ..Aim::default() };
            let mut schedule = Schedule::new(aim, memory, Duration::from_millis(1));
            for (is_full, since, page_bytes, stored_bytes, pause, slowed, took) in taken {
                let ms = |ms: u32| Duration::from_millis(u64::from(ms));
                let since_parent = (!is_full).then_some(ms(since));
                let (pause, slowed, took) = (ms(pause), ms(slowed), ms(took));
                schedule.taken(&Taken { is_full, since_parent, page_bytes, stored_bytes, pause, slowed, took });
            }
            let plan = schedule.plan();
            prop_assert!(plan.interval >= Duration::from_secs(1) && plan.interval <= mtbf.max(Duration::from_secs(1)));
            prop_assert!(plan.bound == Bound::Unreachable || plan.bound == Bound::Unknown || plan.overhead <= overhead + 1e-9, "{:?}", plan);
        }
    }
}

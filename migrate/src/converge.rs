//! When to stop copying: the rule that decides behind every round.
//!
//! While a round of duration *T* is sent, the workload dirties pages; those are what remains. Freezing now costs
//!
//! ```text
//! downtime = fixed + overhead + remaining bytes / bandwidth
//! ```
//!
//! - *fixed*: stopping, saving, loading and starting, and the two round trips of the handshake. Known before.
//! - *bandwidth*: bytes sent by time until the destination said that all of them are in its memory, over all rounds,
//!   each counting half as much as the one behind it. Long rounds weigh more than short ones, so that a round of
//!   three pages, which is all latency, does not pass for a slow link.
//! - *overhead*: what the last round took beyond that: harvesting, waking threads, latency.
//!
//! As long as the downtime is over the budget there is no choice: another round, until the operator's bounds say
//! otherwise. Within the budget it goes on only *while another round pays*. That round would take
//! `overhead + remaining / bandwidth`, during which the workload dirties at the rate of the last one; if the
//! downtime then falls by a tenth and by half a millisecond, it is worth it. Rounds shrink geometrically as long as
//! the link is faster than the workload, until the fixed part outweighs the rest and no round pays any more: an idle
//! workload freezes after one or two rounds at little more than the fixed cost, a busy one goes down to its floor
//! instead of stopping as soon as it would just do. When what remains no longer falls, another round promises
//! nothing, and that is the end too.
//!
//! Everything here is a pure function of recorded numbers, so a migration can be decided again from its report.

use protocol::frame::HEADER_BYTES;
use protocol::page::PAGE_SIZE;
use serde::Serialize;
use std::time::Duration;

/// A page that remains costs this many bytes: its own and a frame header, as if it stood alone and were not zero.
const PAGE_BYTES: f64 = (PAGE_SIZE + HEADER_BYTES) as f64;

/// How much more a round counts for the bandwidth than the one before it.
const DECAY: f64 = 0.5;

/// Within the budget, the part of the downtime that another round must save.
const PAYS_PART: f64 = 0.1;

/// Within the budget, the least that another round must save: a tenth of what a blinking cursor is late by, and
/// about the precision of the prediction on a busy host.
const PAYS_AT_LEAST: Duration = Duration::from_micros(500);

/// What the operator allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// The longest downtime that is fine.
    pub downtime: Duration,
    /// The most rounds while the workload runs.
    pub max_rounds: u32,
    /// The longest time for all of them.
    pub timeout: Duration,
    /// What to do when either is exhausted.
    pub on_timeout: OnTimeout,
}

/// What to do with a workload that dirties faster than the link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// Give up; it goes on at the source.
    Cancel,
    /// Freeze it all the same, with a longer downtime.
    Force,
}

/// One round, over and acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Measured {
    /// Bytes on the page streams.
    pub sent_bytes: u64,
    /// From its first page to the answer that all of it arrived.
    pub duration: Duration,
    /// Pages dirty when it was over.
    pub remaining_pages: u64,
}

/// What to do now. The prediction is the downtime if the workload is frozen at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Send what remains while the workload runs on.
    Round {
        /// The downtime that another round is to lower.
        predicted: Duration,
    },
    /// Freeze: the prediction is within the budget.
    Freeze {
        /// The downtime to expect.
        predicted: Duration,
    },
    /// Freeze although the prediction is over the budget, as the operator wants it.
    Force {
        /// The downtime to expect.
        predicted: Duration,
    },
    /// Give up.
    GiveUp {
        /// Which bound was exhausted.
        bound: Bound,
        /// The downtime that freezing would cost.
        predicted: Duration,
    },
}

/// A bound that was exhausted before the downtime fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// [`Limits::max_rounds`].
    Rounds,
    /// [`Limits::timeout`].
    Time,
}

/// Decides behind the last of `rounds`, `elapsed` after the first began. `fixed` is what freezing costs when
/// nothing remains.
pub fn decide(rounds: &[Measured], fixed: Duration, limits: &Limits, elapsed: Duration) -> Decision {
    let forecast = Forecast::of(rounds, fixed);
    let predicted = forecast.downtime();
    let bound = if rounds.len() as u64 >= u64::from(limits.max_rounds) {
        Some(Bound::Rounds)
    } else if elapsed >= limits.timeout {
        Some(Bound::Time)
    } else {
        None
    };
    let fits = predicted <= limits.downtime;
    match bound {
        None if !fits || forecast.another_round_pays() => Decision::Round { predicted },
        _ if fits => Decision::Freeze { predicted },
        Some(bound) if limits.on_timeout == OnTimeout::Cancel => Decision::GiveUp { bound, predicted },
        _ => Decision::Force { predicted },
    }
}

/// Bytes a second over all rounds, the newer counting more; 0 before anything was sent.
pub fn bandwidth_bytes_per_s(rounds: &[Measured]) -> f64 {
    let (mut bytes, mut seconds) = (0.0, 0.0);
    for round in rounds {
        bytes = bytes * DECAY + round.sent_bytes as f64;
        seconds = seconds * DECAY + round.duration.as_secs_f64();
    }
    if seconds > 0.0 { bytes / seconds } else { 0.0 }
}

/// What the numbers say about freezing now, and about one more round. In seconds.
struct Forecast {
    fixed: f64,
    overhead: f64,
    transfer: f64,
    transfer_after_another: f64,
}

impl Forecast {
    fn of(rounds: &[Measured], fixed: Duration) -> Self {
        let fixed = fixed.as_secs_f64();
        let bandwidth = bandwidth_bytes_per_s(rounds);
        let Some(last) = rounds.last() else {
            return Self {
                fixed,
                overhead: 0.0,
                transfer: f64::INFINITY,
                transfer_after_another: f64::INFINITY,
            };
        };
        // Without a byte sent there is no bandwidth: whatever remains is then as far away as it can be.
        let transfer_of = |pages: f64| match pages {
            0.0 => 0.0,
            pages => pages * PAGE_BYTES / bandwidth,
        };
        let took = last.duration.as_secs_f64();
        let explained = if last.sent_bytes == 0 { 0.0 } else { last.sent_bytes as f64 / bandwidth };
        let overhead = (took - explained).max(0.0);
        let remaining = last.remaining_pages as f64;
        let transfer = transfer_of(remaining);
        // A round that took no time says nothing of the rate; then the next is taken to promise nothing.
        let grows = if took > 0.0 { (overhead + transfer) / took } else { 1.0 };
        Self { fixed, overhead, transfer, transfer_after_another: transfer_of(remaining * grows.min(1.0)) }
    }

    fn downtime(&self) -> Duration {
        // A prediction beyond every budget is as good as endless, and `Duration` must hold it.
        const ENDLESS: f64 = 1e9;
        let seconds = self.fixed + self.overhead + self.transfer;
        Duration::from_secs_f64(if seconds.is_finite() { seconds.min(ENDLESS) } else { ENDLESS })
    }

    fn another_round_pays(&self) -> bool {
        let saved = self.transfer - self.transfer_after_another;
        let downtime = self.fixed + self.overhead + self.transfer;
        saved >= PAYS_AT_LEAST.as_secs_f64() && saved >= downtime * PAYS_PART
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIXED: Duration = Duration::from_millis(2);
    const LIMITS: Limits = Limits {
        downtime: Duration::from_millis(50),
        max_rounds: 30,
        timeout: Duration::from_secs(60),
        on_timeout: OnTimeout::Cancel,
    };

    fn round(sent_mb: f64, took_ms: f64, remaining_pages: u64) -> Measured {
        Measured {
            sent_bytes: (sent_mb * 1e6) as u64,
            duration: Duration::from_secs_f64(took_ms / 1e3),
            remaining_pages,
        }
    }

    #[test]
    fn a_table_of_histories() {
        let full = |remaining| round(1074.0, 1790.0, remaining);
        let at = |rounds: &[Measured]| decide(rounds, FIXED, &LIMITS, Duration::from_secs(2));
        let cases: [(&str, Vec<Measured>, &str); 8] = [
            ("nothing was sent yet", vec![], "round"),
            ("idle: nothing remains", vec![full(0)], "freeze"),
            ("idle: three pages remain", vec![full(3)], "freeze"),
            ("far over the budget", vec![full(65536)], "round"),
            ("in the budget, another round saves nearly all of it", vec![full(4000)], "round"),
            (
                "in the budget, as much remains as was sent",
                vec![full(9000), round(16.4, 27.0, 4000), round(16.4, 27.0, 4000)],
                "freeze",
            ),
            ("what remains is too little to save half a millisecond", vec![full(60)], "freeze"),
            (
                "over the budget, although nothing falls",
                vec![full(65536), round(270.0, 450.0, 65536)],
                "round",
            ),
        ];
        for (name, rounds, expected) in cases {
            let decision = at(&rounds);
            let found = match decision {
                Decision::Round { .. } => "round",
                Decision::Freeze { .. } => "freeze",
                Decision::Force { .. } => "force",
                Decision::GiveUp { .. } => "give up",
            };
            assert_eq!(found, expected, "{name}: {decision:?}");
        }
    }

    #[test]
    fn the_operators_bounds_decide_over_the_budget() {
        let stuck = vec![round(270.0, 450.0, 65536); 30];
        let force = Limits { on_timeout: OnTimeout::Force, ..LIMITS };
        let second = Duration::from_secs(1);
        assert!(matches!(
            decide(&stuck, FIXED, &LIMITS, second),
            Decision::GiveUp { bound: Bound::Rounds, predicted } if predicted > LIMITS.downtime
        ));
        assert!(matches!(decide(&stuck, FIXED, &force, second), Decision::Force { .. }));
        let late = LIMITS.timeout;
        assert!(matches!(
            decide(&stuck[..3], FIXED, &LIMITS, late),
            Decision::GiveUp { bound: Bound::Time, .. }
        ));
        assert!(matches!(decide(&stuck[..3], FIXED, &force, late), Decision::Force { .. }));
        // Within the budget a bound is no reason to give up.
        let good = vec![round(16.4, 27.0, 4000); 30];
        assert!(matches!(decide(&good, FIXED, &LIMITS, late), Decision::Freeze { .. }));
    }

    #[test]
    fn a_short_round_does_not_pass_for_a_slow_link() {
        // 1 ms of latency for three pages is 12 MB/s, and the link does 600.
        let rounds = [round(1074.0, 1790.0, 3), round(0.012, 1.0, 500)];
        let bandwidth = bandwidth_bytes_per_s(&rounds);
        assert!((590e6..610e6).contains(&bandwidth), "{bandwidth}");
    }

    /// A workload of 1 GiB with a working set that it dirties at `rate` bytes/s, over a link of `bandwidth` bytes/s
    /// with `overhead` a round: how many rounds it takes and what downtime comes of it.
    fn replay(rate: f64, working_set: f64, bandwidth: f64, overhead: f64) -> (usize, f64) {
        let mut rounds: Vec<Measured> = vec![];
        let mut to_send: f64 = 1.074e9;
        let mut elapsed = 0.0;
        loop {
            let took = overhead + to_send / bandwidth;
            elapsed += took;
            let dirtied = (rate * took).min(working_set);
            rounds.push(Measured {
                sent_bytes: to_send as u64,
                duration: Duration::from_secs_f64(took),
                remaining_pages: (dirtied / PAGE_BYTES) as u64,
            });
            to_send = dirtied;
            match decide(&rounds, FIXED, &LIMITS, Duration::from_secs_f64(elapsed)) {
                Decision::Round { .. } => {}
                Decision::Freeze { .. } => {
                    return (rounds.len(), FIXED.as_secs_f64() + overhead + to_send / bandwidth);
                }
                other => panic!("{other:?} after {} rounds", rounds.len()),
            }
        }
    }

    #[test]
    fn the_figures_wanted_on_loopback_are_reached() {
        for (rate, downtime, most_rounds) in
            [(0.0, 0.004, 2), (50e6, 0.005, 4), (200e6, 0.006, 8), (400e6, 0.01, 16)]
        {
            let (rounds, came) = replay(rate, 268e6, 600e6, 0.001);
            assert!(came <= downtime, "{rate}: {came} s");
            assert!(rounds <= most_rounds, "{rate}: {rounds} rounds");
        }
    }

    fn any_round() -> impl Strategy<Value = Measured> {
        let numbers = prop_oneof![Just(0), 0..1u64 << 20, any::<u64>()];
        (numbers.clone(), numbers, any::<u32>()).prop_map(|(sent_bytes, remaining_pages, us)| Measured {
            sent_bytes,
            duration: Duration::from_micros(u64::from(us)),
            remaining_pages,
        })
    }

    proptest! {
        #[test]
        fn never_over_the_budget_unforced_and_always_an_end(
            rounds in proptest::collection::vec(any_round(), 0..40),
            fixed_us in 0u64..100_000,
            downtime_us in 0u64..1_000_000,
            max_rounds in 0u32..40,
            timeout_s in 0u64..100,
            elapsed_s in 0u64..100,
            force in any::<bool>(),
        ) {
            let limits = Limits {
                downtime: Duration::from_micros(downtime_us),
                max_rounds,
                timeout: Duration::from_secs(timeout_s),
                on_timeout: if force { OnTimeout::Force } else { OnTimeout::Cancel },
            };
            let exhausted = rounds.len() >= max_rounds as usize || elapsed_s >= timeout_s;
            let fixed = Duration::from_micros(fixed_us);
            match decide(&rounds, fixed, &limits, Duration::from_secs(elapsed_s)) {
                Decision::Freeze { predicted } => prop_assert!(predicted <= limits.downtime && predicted >= fixed),
                Decision::Round { .. } => prop_assert!(!exhausted),
                Decision::Force { predicted } => {
                    prop_assert!(force && exhausted && predicted > limits.downtime);
                }
                Decision::GiveUp { predicted, .. } => {
                    prop_assert!(!force && exhausted && predicted > limits.downtime);
                }
            }
        }
    }
}

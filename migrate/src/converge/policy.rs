//! What the operator allows, and what is done within it.

use super::forecast::{Forecast, PAGE_BYTES};
use super::measure::{Measured, bandwidth_bytes_per_s};
use super::stall::{at_local_minimum, best, comparable, stalled_windows};
use clap::ValueEnum;
use serde::{Deserialize, Serialize};
use std::time::Duration;

/// Windows without a new best for which a local minimum is waited for; then any round within the bound will do.
const PATIENCE_WINDOWS: u32 = 4;

/// What a throttled round is to leave, as a part of what the round before it left. Two rounds halve it.
const THROTTLED_RATIO: f64 = 0.7;

/// Throttling goes up by at least this much at a time, in percent: less cannot be told from noise.
const THROTTLE_STEP: u8 = 10;

/// What the operator allows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The longest downtime that is fine.
    #[serde(rename = "downtime_us", with = "super::micros")]
    pub downtime: Duration,
    /// The longest downtime that is fine when what remains no longer falls.
    #[serde(rename = "max_downtime_us", with = "super::micros")]
    pub max_downtime: Duration,
    /// The most rounds while the workload runs.
    pub max_rounds: u32,
    /// The longest time for all of them.
    #[serde(rename = "timeout_us", with = "super::micros")]
    pub timeout: Duration,
    /// What to do when either is exhausted.
    pub on_timeout: OnTimeout,
    /// What to do when what remains no longer falls: the first of these that is possible.
    pub on_stall: Vec<OnStall>,
    /// The share of its time that the workload may be made to stand still, in percent.
    pub max_throttle_percent: u8,
    /// Go to post-copy behind this many rounds that did not fit the budget.
    pub post_copy_after: Option<u32>,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            downtime: Duration::from_millis(50),
            max_downtime: Duration::from_millis(300),
            max_rounds: 30,
            timeout: Duration::from_secs(600),
            on_timeout: OnTimeout::Cancel,
            on_stall: OnStall::IN_ORDER.to_vec(),
            max_throttle_percent: 80,
            post_copy_after: None,
        }
    }
}

/// What to do when rounds or time are used up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// Give up; it goes on at the source.
    Cancel,
    /// Freeze it all the same, with a longer downtime.
    Force,
    /// Start it at the destination, and let its memory follow; give up where that is not possible.
    PostCopy,
}

/// What to do with a workload that dirties faster than the link carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnStall {
    /// Freeze it where little remains, if that costs no more than [`Limits::max_downtime`].
    Minimum,
    /// Slow it down, up to [`Limits::max_throttle_percent`].
    Throttle,
    /// Start it at the destination, and let its memory follow.
    PostCopy,
    /// Give up; it goes on at the source.
    Cancel,
}

impl OnStall {
    /// All of them, in the order in which they are tried unless the operator says otherwise: what harms the workload
    /// least comes first.
    pub const IN_ORDER: [Self; 4] = [Self::Minimum, Self::Throttle, Self::PostCopy, Self::Cancel];
}

impl Limits {
    /// The longest downtime that any decision would accept, or `None` where it may be forced.
    pub fn most_downtime(&self) -> Option<Duration> {
        let stalled = self.on_stall.contains(&OnStall::Minimum).then_some(self.max_downtime);
        (self.on_timeout != OnTimeout::Force).then(|| self.downtime.max(stalled.unwrap_or_default()))
    }
}

/// Everything a decision looks at.
#[derive(Debug, Clone, Copy)]
pub struct Situation<'a> {
    /// The rounds that are over.
    pub rounds: &'a [Measured],
    /// What freezing costs when nothing remains.
    pub fixed: Duration,
    /// Since the first round began.
    pub elapsed: Duration,
    /// Whether the source can slow the workload down.
    pub can_throttle: bool,
    /// Whether both ends can do post-copy.
    pub can_post_copy: bool,
    /// What the operator allows.
    pub limits: &'a Limits,
}

/// What to do now. The prediction is the downtime if the workload is frozen at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "decision", rename_all = "kebab-case")]
pub enum Decision {
    /// Send what remains while the workload runs on, no slower than before.
    Round {
        /// The downtime that another round is to lower.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
    /// Freeze: the prediction is within the budget.
    Freeze {
        /// The downtime to expect.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
    /// Freeze over the budget, but within what a stalled move may cost, where little remains.
    Minimum {
        /// The downtime to expect.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
    /// Send what remains while the workload runs on, slowed down.
    Throttle {
        /// The share of its time that it stands still, in percent.
        percent: u8,
        /// The downtime that another round is to lower.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
    /// Start it at the destination, and let its memory follow.
    PostCopy {
        /// The downtime that freezing would cost instead.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
    /// Freeze although the prediction is over the budget, as the operator wants it.
    Force {
        /// The downtime to expect.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
    /// Give up.
    GiveUp {
        /// Which bound was exhausted.
        bound: Bound,
        /// The downtime that freezing would cost.
        #[serde(rename = "predicted_us", with = "super::micros")]
        predicted: Duration,
    },
}

impl Decision {
    /// The downtime if the workload is frozen at once.
    pub fn predicted(&self) -> Duration {
        match *self {
            Self::Round { predicted }
            | Self::Freeze { predicted }
            | Self::Minimum { predicted }
            | Self::Throttle { predicted, .. }
            | Self::PostCopy { predicted }
            | Self::Force { predicted }
            | Self::GiveUp { predicted, .. } => predicted,
        }
    }

    /// Whether there is no live round behind it.
    pub fn ends_rounds(&self) -> bool {
        !matches!(self, Self::Round { .. } | Self::Throttle { .. })
    }

    /// The decision as one word, as in JSON.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Round { .. } => "round",
            Self::Freeze { .. } => "freeze",
            Self::Minimum { .. } => "minimum",
            Self::Throttle { .. } => "throttle",
            Self::PostCopy { .. } => "post-copy",
            Self::Force { .. } => "force",
            Self::GiveUp { .. } => "give-up",
        }
    }
}

/// A bound that was exhausted before the downtime fitted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Bound {
    /// [`Limits::max_rounds`].
    Rounds,
    /// [`Limits::timeout`].
    Time,
    /// What remains no longer falls, and [`Limits::on_stall`] has nothing else to offer.
    Stall,
}

/// Decides behind the last round.
pub fn decide(now: &Situation<'_>) -> Decision {
    let Situation { rounds, fixed, elapsed, can_post_copy, limits, .. } = *now;
    let forecast = Forecast::of(rounds, fixed);
    let predicted = forecast.downtime();
    let throttle = throttle_of(rounds);
    if predicted <= limits.downtime {
        // A workload that stands still a part of its time is not kept waiting for the last millisecond.
        let goes_on =
            throttle == 0 && forecast.another_round_pays() && exhausted(rounds, elapsed, limits).is_none();
        return if goes_on { Decision::Round { predicted } } else { Decision::Freeze { predicted } };
    }
    if let Some(bound) = exhausted(rounds, elapsed, limits) {
        return match limits.on_timeout {
            OnTimeout::Force => Decision::Force { predicted },
            OnTimeout::PostCopy if can_post_copy => Decision::PostCopy { predicted },
            OnTimeout::PostCopy | OnTimeout::Cancel => Decision::GiveUp { bound, predicted },
        };
    }
    let enough = limits.post_copy_after.is_some_and(|after| rounds.len() as u64 >= u64::from(after));
    if enough && can_post_copy {
        return Decision::PostCopy { predicted };
    }
    let going_on = || match throttle {
        0 => Decision::Round { predicted },
        percent => Decision::Throttle { percent, predicted },
    };
    if throttle > 0 && falls(rounds) || throttle == 0 && stalled_windows(rounds) == 0 {
        return going_on();
    }
    limits.on_stall.iter().find_map(|choice| of_stalled(*choice, now, &forecast)).unwrap_or_else(going_on)
}

/// What a choice makes of a workload whose remaining pages do not fall, or nothing where it does not help.
fn of_stalled(choice: OnStall, now: &Situation<'_>, forecast: &Forecast) -> Option<Decision> {
    let Situation { rounds, limits, .. } = *now;
    let predicted = forecast.downtime();
    let windows = stalled_windows(rounds);
    match choice {
        OnStall::Minimum => {
            let fits = |downtime: Duration| downtime <= limits.max_downtime;
            if windows == 0 {
                return None;
            }
            if fits(predicted) && (at_local_minimum(comparable(rounds)) || windows >= PATIENCE_WINDOWS) {
                return Some(Decision::Minimum { predicted });
            }
            // It was better before, and well within the bound: it will be again.
            let best = fits(at_best(rounds, forecast)) && windows < PATIENCE_WINDOWS;
            best.then_some(Decision::Round { predicted }).filter(|_| throttle_of(rounds) == 0)
        }
        OnStall::Throttle => {
            let percent = now.can_throttle.then(|| more_throttle(rounds, limits.max_throttle_percent))?;
            // At its bound it gets as long as everything else before it counts as stalled.
            let goes_on = percent > throttle_of(rounds) || percent > 0 && windows == 0;
            goes_on.then_some(Decision::Throttle { percent, predicted })
        }
        OnStall::PostCopy => now.can_post_copy.then_some(Decision::PostCopy { predicted }),
        OnStall::Cancel => Some(Decision::GiveUp { bound: Bound::Stall, predicted }),
    }
}

/// The bound that was reached, if one was.
pub(super) fn exhausted(rounds: &[Measured], elapsed: Duration, limits: &Limits) -> Option<Bound> {
    if rounds.len() as u64 >= u64::from(limits.max_rounds) {
        Some(Bound::Rounds)
    } else {
        (elapsed >= limits.timeout).then_some(Bound::Time)
    }
}

fn throttle_of(rounds: &[Measured]) -> u8 {
    rounds.last().map_or(0, |round| round.throttle_percent)
}

/// Whether the last round left markedly less than the one before it.
fn falls(rounds: &[Measured]) -> bool {
    match rounds {
        [.., before, last] => (last.remaining_pages as f64) < before.remaining_pages as f64 * 0.9,
        _ => true,
    }
}

/// The downtime if the least remained that was ever seen at this throttle.
fn at_best(rounds: &[Measured], forecast: &Forecast) -> Duration {
    let pages = best(comparable(rounds)).unwrap_or(u64::MAX);
    let transfer = pages as f64 * PAGE_BYTES / bandwidth_bytes_per_s(rounds).max(1.0);
    Forecast { transfer, ..*forecast }.downtime()
}

/// The least throttle at which the next round leaves [`THROTTLED_RATIO`] of what the last one left, at most `most`.
///
/// The last round of duration *T* dirtied what remains while the workload ran (1 - throttle) of the time. A round
/// leaves less than it sends by a ratio of *dirty rate / bandwidth*; pages that are dirtied twice count once in it, so
/// the rate is a lower bound and the answer may be too small, and then the next step is.
fn more_throttle(rounds: &[Measured], most: u8) -> u8 {
    let Some(last) = rounds.last() else { return 0 };
    let now = last.throttle_percent;
    let seconds = last.duration.as_secs_f64().max(1e-6);
    let dirtied = last.remaining_pages.saturating_sub(last.held_pages) as f64 * PAGE_BYTES / seconds;
    let unthrottled = dirtied / (1.0 - f64::from(now.min(99)) / 100.0);
    let wanted = 1.0 - THROTTLED_RATIO * bandwidth_bytes_per_s(rounds) / unthrottled.max(1.0);
    let wanted = (wanted.clamp(0.0, 1.0) * 100.0).ceil() as u8;
    wanted.max(now.saturating_add(THROTTLE_STEP)).min(most.min(99))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const FIXED: Duration = Duration::from_millis(2);

    fn limits() -> Limits {
        Limits { timeout: Duration::from_secs(60), ..Limits::default() }
    }

    fn at(rounds: &[Measured], limits: &Limits, elapsed: Duration) -> Decision {
        let (can_throttle, can_post_copy) = (false, false);
        decide(&Situation { rounds, fixed: FIXED, elapsed, can_throttle, can_post_copy, limits })
    }

    fn round(sent_mb: f64, took_ms: f64, remaining_pages: u64) -> Measured {
        Measured {
            sent_bytes: (sent_mb * 1e6) as u64,
            duration: Duration::from_secs_f64(took_ms / 1e3),
            remaining_pages,
            ..Measured::default()
        }
    }

    #[test]
    fn a_table_of_histories() {
        let full = |remaining| round(1074.0, 1790.0, remaining);
        let at = |rounds: &[Measured]| at(rounds, &limits(), Duration::from_secs(2));
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
            assert_eq!(decision.name(), expected, "{name}: {decision:?}");
        }
    }

    #[test]
    fn the_operators_bounds_decide_over_the_budget() {
        let stuck = vec![round(270.0, 450.0, 65536); 30];
        let cancel = limits();
        let force = Limits { on_timeout: OnTimeout::Force, ..limits() };
        let second = Duration::from_secs(1);
        assert!(matches!(
            at(&stuck, &cancel, second),
            Decision::GiveUp { bound: Bound::Rounds, predicted } if predicted > cancel.downtime
        ));
        assert!(matches!(at(&stuck, &force, second), Decision::Force { .. }));
        let late = cancel.timeout;
        assert!(matches!(at(&stuck[..3], &cancel, late), Decision::GiveUp { bound: Bound::Time, .. }));
        assert!(matches!(at(&stuck[..3], &force, late), Decision::Force { .. }));
        // Within the budget a bound is no reason to give up.
        let good = vec![round(16.4, 27.0, 4000); 30];
        assert!(matches!(at(&good, &cancel, late), Decision::Freeze { .. }));
    }

    #[test]
    fn the_choices_for_a_stalled_workload_are_taken_in_order() {
        let stuck = |percent, remaining| {
            vec![Measured { throttle_percent: percent, ..round(270.0, 450.0, remaining) }; 7]
        };
        let choose = |rounds: &[Measured], can_throttle, can_post_copy, on_stall: &[OnStall]| {
            let limits = Limits { on_stall: on_stall.to_vec(), ..limits() };
            let elapsed = Duration::from_secs(2);
            decide(&Situation { rounds, fixed: FIXED, elapsed, can_throttle, can_post_copy, limits: &limits })
        };
        let all = OnStall::IN_ORDER;
        // 40 000 pages at 600 MB/s are 275 ms, 65 536 are 450 ms; 300 ms are allowed.
        assert_eq!(choose(&stuck(0, 40_000), true, true, &all).name(), "minimum");
        assert_eq!(choose(&stuck(0, 40_000), true, true, &all[1..]).name(), "throttle");
        let Decision::Throttle { percent, .. } = choose(&stuck(0, 65_536), true, true, &all) else {
            panic!()
        };
        assert!((20..50).contains(&percent), "{percent}");
        let Decision::Throttle { percent, .. } = choose(&stuck(75, 65_536), true, true, &all) else {
            panic!()
        };
        assert_eq!(percent, 80, "it is bounded");
        assert_eq!(choose(&stuck(80, 65_536), true, true, &all).name(), "post-copy");
        assert_eq!(choose(&stuck(0, 65_536), false, true, &all).name(), "post-copy");
        assert_eq!(choose(&stuck(0, 65_536), false, false, &all).name(), "give-up");
        assert_eq!(choose(&stuck(0, 65_536), false, false, &all[..3]).name(), "round");
        assert_eq!(choose(&stuck(0, 65_536)[..2], true, true, &all).name(), "round", "too early to say");
    }

    #[test]
    fn what_is_slowed_down_freezes_as_soon_as_it_fits() {
        let slowed = [full_then(4000), Measured { throttle_percent: 30, ..round(16.4, 27.0, 4000) }];
        assert_eq!(at(&slowed, &limits(), Duration::from_secs(2)).name(), "freeze");
    }

    fn full_then(remaining: u64) -> Measured {
        round(1074.0, 1790.0, remaining)
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
                ..Measured::default()
            });
            to_send = dirtied;
            match at(&rounds, &limits(), Duration::from_secs_f64(elapsed)) {
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
        let numbers = || prop_oneof![Just(0), 0..1u64 << 20, any::<u64>()];
        (numbers(), numbers(), numbers(), any::<u32>(), 0u8..=100).prop_map(
            |(sent_bytes, remaining_pages, held_pages, us, throttle_percent)| Measured {
                sent_bytes,
                remaining_pages,
                held_pages,
                waiting_pages: held_pages / 2,
                throttle_percent,
                duration: Duration::from_micros(u64::from(us)),
            },
        )
    }

    fn any_limits() -> impl Strategy<Value = Limits> {
        use proptest::sample::{select, subsequence};
        let timeouts = [OnTimeout::Cancel, OnTimeout::Force, OnTimeout::PostCopy];
        let times = (0u64..1_000_000, 0u64..1_000_000, 0u64..100);
        let bounds = (0u32..40, 0u8..=100, proptest::option::of(0u32..40));
        let choices =
            (select(timeouts.to_vec()), subsequence(OnStall::IN_ORDER.to_vec(), 0..=4).prop_shuffle());
        (times, bounds, choices).prop_map(
            |((downtime, max_downtime, timeout), (max_rounds, throttle, after), (on_timeout, on_stall))| {
                Limits {
                    downtime: Duration::from_micros(downtime),
                    max_downtime: Duration::from_micros(max_downtime),
                    max_rounds,
                    timeout: Duration::from_secs(timeout),
                    on_timeout,
                    on_stall,
                    max_throttle_percent: throttle,
                    post_copy_after: after,
                }
            },
        )
    }

    proptest! {
        #[test]
        fn never_over_what_is_allowed_and_always_an_end(
            rounds in proptest::collection::vec(any_round(), 0..40),
            fixed_us in 0u64..100_000,
            elapsed_s in 0u64..100,
            limits in any_limits(),
            can_throttle in any::<bool>(),
            can_post_copy in any::<bool>(),
        ) {
            let (fixed, elapsed) = (Duration::from_micros(fixed_us), Duration::from_secs(elapsed_s));
            let exhausted = rounds.len() >= limits.max_rounds as usize || elapsed >= limits.timeout;
            let allows = |choice| limits.on_stall.contains(&choice);
            let now = Situation { rounds: &rounds, fixed, elapsed, can_throttle, can_post_copy, limits: &limits };
            let decision = decide(&now);
            let over = decision.predicted() > limits.downtime;
            prop_assert!(decision.predicted() >= fixed);
            match decision {
                Decision::Freeze { .. } => prop_assert!(!over),
                Decision::Round { .. } => prop_assert!(!exhausted),
                Decision::Minimum { predicted } => {
                    prop_assert!(over && allows(OnStall::Minimum) && predicted <= limits.max_downtime);
                }
                Decision::Throttle { percent, .. } => {
                    prop_assert!(over && !exhausted && percent > 0);
                    let now = rounds.last().map_or(0, |round| round.throttle_percent);
                    let raised = allows(OnStall::Throttle) && can_throttle && percent <= limits.max_throttle_percent;
                    prop_assert!(percent == now || raised);
                }
                Decision::PostCopy { .. } => prop_assert!(over && can_post_copy),
                Decision::Force { .. } => prop_assert!(over && exhausted && limits.on_timeout == OnTimeout::Force),
                Decision::GiveUp { bound: Bound::Stall, .. } => prop_assert!(over && allows(OnStall::Cancel)),
                Decision::GiveUp { .. } => prop_assert!(over && exhausted && limits.on_timeout != OnTimeout::Force),
            }
        }
    }
}

//! A migration in numbers alone: what a policy makes of a workload and a path.
//!
//! The workload is some groups of pages, each written at random at its own rate, all the time or in pulses. A round
//! sends what is dirty; a page that is sent is cleared when its turn comes, so on average halfway through. Nothing here
//! has a clock: the same seed gives the same numbers.

use super::forecast::PAGE_BYTES;
use super::measure::Measured;
use super::policies::Policy;
use super::policy::{Decision, Limits, Situation};
use crate::select::hot::{Holding, HotRule, Seen};
use std::time::Duration;

/// Pages that are written at random, all equally likely.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Group {
    /// How many.
    pub pages: f64,
    /// Writes to all of them together, a second.
    pub writes_per_s: f64,
}

/// A workload that works and rests in turn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pulse {
    /// Work and rest together.
    pub period_s: f64,
    /// The part of it that is work, which comes first.
    pub busy_part: f64,
}

/// What writes to memory.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Workload {
    /// All pages that are ever written.
    pub groups: Vec<Group>,
    /// When it writes; all the time if nothing is said.
    pub pulse: Option<Pulse>,
}

/// What pages have to go through.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Path {
    /// Bytes a second.
    pub bandwidth_bytes_per_s: f64,
    /// What a round takes without bytes.
    pub overhead_s: f64,
    /// What freezing costs without bytes, besides one overhead.
    pub fixed_s: f64,
}

/// What a page costs, as parts of what one costs that is sent as it is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Cost {
    /// Of its bytes on the wire.
    pub bytes_part: f64,
    /// Of its time.
    pub time_part: f64,
}

impl Cost {
    /// As it is.
    pub const RAW: Self = Self { bytes_part: 1.0, time_part: 1.0 };
}

/// One simulated migration.
#[derive(Debug, Clone, Copy)]
pub struct Plan<'a> {
    /// What writes.
    pub workload: &'a Workload,
    /// Pages that the first round sends.
    pub memory_pages: f64,
    /// Where they go.
    pub path: Path,
    /// Bytes that are sent as they are before it is known what packing does.
    pub learns_bytes: f64,
    /// What a page of the first round costs.
    pub first: Cost,
    /// What one costs that was written since.
    pub later: Cost,
    /// What is allowed.
    pub limits: &'a Limits,
    /// Whether the workload can be slowed down.
    pub can_throttle: bool,
    /// Whether it can be started there before its memory has arrived.
    pub can_post_copy: bool,
    /// Who decides.
    pub policy: Policy,
    /// Which pages wait while there is much else to send.
    pub hot: HotRule,
    /// Decides how bandwidth and rates stray, each by at most 5 % around its mean.
    pub seed: u64,
}

/// How far bandwidth and rates stray from their mean, as a part of it.
const STRAYS: f64 = 0.05;

/// What became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Came {
    /// The word that ended the rounds.
    pub decision: Decision,
    /// Live rounds.
    pub rounds: Vec<Measured>,
    /// Bytes that were sent in all, the frozen ones too.
    pub bytes: f64,
    /// From the first page on.
    pub total_s: f64,
    /// How long the workload stood still; 0 when it stayed.
    pub downtime_s: f64,
    /// Time that the workload lost by being slowed down.
    pub throttled_s: f64,
    /// How long it ran there before its last page came. What it waited for pages that it touched meanwhile depends on where it
    /// reads, of which nothing is known.
    pub follow_s: f64,
}

impl Came {
    /// Whether the workload moved.
    pub fn moved(&self) -> bool {
        !matches!(self.decision, Decision::GiveUp { .. })
    }
}

/// Lets a policy move a workload.
pub fn simulate(plan: &Plan<'_>) -> Came {
    let Plan { workload, path, limits, can_throttle, can_post_copy, policy, .. } = *plan;
    let mut random = Random(plan.seed);
    let mut groups: Vec<State> = workload.groups.iter().map(|group| State::of(group.pages)).collect();
    let (mut holding, mut holds) = (Holding::new(plan.hot), false);
    let mut to_send = groups.iter().map(|state| state.once).sum::<f64>().max(plan.memory_pages);
    let (mut rounds, mut bytes, mut learnt) = (Vec::new(), 0.0, 0.0);
    let (mut now, mut throttled_s, mut throttle) = (0.0, 0.0, 0);
    loop {
        let bandwidth = path.bandwidth_bytes_per_s * random.around_one();
        let cost = if rounds.is_empty() { plan.first } else { plan.later };
        let sends = to_send * PAGE_BYTES;
        let raw = (plan.learns_bytes - learnt).clamp(0.0, sends);
        learnt += raw;
        let takes = path.overhead_s + (raw + (sends - raw) * cost.time_part) / bandwidth;
        let runs = 1.0 - f64::from(throttle) / 100.0;
        let busy_s = workload.busy(now, now + takes) * runs * random.around_one();
        let waiting: f64 = if holds { groups.iter().map(|state| state.twice).sum() } else { 0.0 };
        let mut seen = Seen { sent: to_send, ..Seen::default() };
        for (state, group) in groups.iter_mut().zip(&workload.groups) {
            state.round(group, busy_s, holds, &mut seen);
        }
        let remaining = seen.hot + seen.others;
        // Behind the first round nothing is known of what is dirty often.
        holds = !rounds.is_empty() && holding.next(&seen);
        let held = if holds { seen.hot } else { 0.0 };
        now += takes;
        bytes += raw + (sends - raw) * cost.bytes_part;
        throttled_s += takes * (1.0 - runs);
        rounds.push(Measured {
            sent_bytes: (to_send * PAGE_BYTES) as u64,
            duration: Duration::from_secs_f64(takes),
            remaining_pages: remaining as u64,
            held_pages: held as u64,
            waiting_pages: waiting as u64,
            throttle_percent: throttle,
        });
        let (fixed, elapsed) = (Duration::from_secs_f64(path.fixed_s), Duration::from_secs_f64(now));
        let situation = Situation { rounds: &rounds, fixed, elapsed, can_throttle, can_post_copy, limits };
        let decision = policy.decide(&situation);
        to_send = remaining - held;
        match decision {
            Decision::Round { .. } => throttle = 0,
            Decision::Throttle { percent, .. } => throttle = percent,
            Decision::GiveUp { .. } => {
                let (total_s, downtime_s, follow_s) = (now, 0.0, 0.0);
                return Came { decision, rounds, bytes, total_s, downtime_s, throttled_s, follow_s };
            }
            Decision::PostCopy { .. }
            | Decision::Freeze { .. }
            | Decision::Minimum { .. }
            | Decision::Force { .. } => {
                let bandwidth = path.bandwidth_bytes_per_s * random.around_one();
                let transfer_s = remaining * PAGE_BYTES * plan.later.time_part / bandwidth;
                bytes += remaining * PAGE_BYTES * plan.later.bytes_part;
                let follow_s = if matches!(decision, Decision::PostCopy { .. }) { transfer_s } else { 0.0 };
                let downtime_s = path.fixed_s + path.overhead_s + transfer_s - follow_s;
                let total_s = now + downtime_s + follow_s;
                return Came { decision, rounds, bytes, total_s, downtime_s, throttled_s, follow_s };
            }
        }
    }
}

/// The pages of a group between two rounds.
#[derive(Debug, Clone, Copy)]
struct State {
    /// Dirty now, and clean when the last round began; at first all.
    once: f64,
    /// Dirty now, and when it began: hot.
    twice: f64,
    /// Seen dirty behind any round.
    ever: f64,
}

impl State {
    fn of(pages: f64) -> Self {
        Self { once: pages, twice: 0.0, ever: 0.0 }
    }

    /// A round sends what is dirty, but for the hot pages where it holds them, while the workload writes.
    fn round(&mut self, group: &Group, busy_s: f64, holds: bool, seen: &mut Seen) {
        let Shares { since_start, since_sent } = group.dirtied(busy_s);
        let held = if holds { self.twice } else { 0.0 };
        let sent = self.once + self.twice - held;
        let again = sent * since_sent;
        let clean = (group.pages - sent - held).max(0.0);
        let known = (self.ever - sent - held).clamp(0.0, clean);
        seen.sent_again += again;
        seen.clean += known;
        seen.clean_dirtied += known * since_start;
        // In the first round everything is called dirty, which says nothing of a page.
        let first = self.ever == 0.0;
        (self.once, self.twice) = if first { (again, 0.0) } else { (clean * since_start, again + held) };
        self.ever = if first { again } else { self.ever + (clean - known) * since_start };
        seen.others += self.once;
        seen.hot += self.twice;
    }
}

/// Parts of a group's pages.
#[derive(Debug, Clone, Copy)]
struct Shares {
    /// Of those that were clean when a round began: what is dirty behind it.
    since_start: f64,
    /// Of those that it sent: what is dirty again.
    since_sent: f64,
}

impl Group {
    /// What is dirty behind a round within which the workload writes for `busy_s`.
    fn dirtied(&self, busy_s: f64) -> Shares {
        if self.pages < 1.0 {
            return Shares { since_start: 0.0, since_sent: 0.0 };
        }
        // How often each page is written; the times between are exponentially distributed.
        let writes = self.writes_per_s * busy_s / self.pages;
        let since_start = 1.0 - (-writes).exp();
        // The mean of 1 - exp(-x) for x from 0 to `writes`: a page that is sent is cleared some time in the round.
        let since_sent = if writes > 1e-6 { 1.0 - since_start / writes } else { writes / 2.0 };
        Shares { since_start, since_sent }
    }
}

impl Workload {
    /// How long of the time between two moments it works.
    fn busy(&self, from_s: f64, to_s: f64) -> f64 {
        let Some(Pulse { period_s, busy_part }) = self.pulse else { return to_s - from_s };
        let until = |time: f64| {
            let periods = (time / period_s).floor();
            let within = (time - periods * period_s).min(period_s * busy_part);
            periods * period_s * busy_part + within
        };
        until(to_s) - until(from_s)
    }
}

/// Knuth's MMIX generator; the upper bits are the good ones.
struct Random(u64);

impl Random {
    fn around_one(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let unit = (self.0 >> 33) as f64 / f64::from(1u32 << 31);
        1.0 + (unit * 2.0 - 1.0) * STRAYS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_never_has_more_dirty_pages_than_pages_nor_than_writes() {
        let group = Group { pages: 1000.0, writes_per_s: 500.0 };
        for busy_s in [0.0, 1e-9, 0.1, 1.0, 100.0] {
            for (once, twice) in [(0.0, 0.0), (500.0, 0.0), (300.0, 700.0)] {
                for holds in [false, true] {
                    let (mut state, mut seen) = (State { once, twice, ever: once + twice }, Seen::default());
                    state.round(&group, busy_s, holds, &mut seen);
                    let (dirty, held) = (seen.hot + seen.others, if holds { twice } else { 0.0 });
                    assert!(
                        (0.0..=1000.0 + 1e-6).contains(&dirty) && dirty <= held + 500.0 * busy_s + 1e-6,
                        "{dirty} after {busy_s} s"
                    );
                }
            }
        }
        let Shares { since_start, since_sent } = group.dirtied(1.0);
        assert!(since_sent < since_start, "what was sent late is dirtied less");
    }

    #[test]
    fn post_copy_takes_the_pages_out_of_the_downtime_and_sends_them_all_the_same() {
        let workload =
            Workload { groups: vec![Group { pages: 200_000.0, writes_per_s: 1e6 }], ..Workload::default() };
        let path = Path { bandwidth_bytes_per_s: 1e9, overhead_s: 0.001, fixed_s: 0.004 };
        let run = |can_post_copy, post_copy_after| {
            let limits = &Limits { post_copy_after, on_stall: vec![], max_rounds: 2, ..Limits::default() };
            let policy = Policy::Migrate;
            simulate(&Plan {
                workload: &workload,
                memory_pages: 250_000.0,
                path,
                learns_bytes: 0.0,
                first: Cost::RAW,
                later: Cost::RAW,
                limits,
                can_throttle: false,
                can_post_copy,
                policy,
                hot: HotRule::default(),
                seed: 3,
            })
        };
        let stays = run(false, Some(1));
        assert!(!stays.moved() && stays.downtime_s == 0.0 && stays.follow_s == 0.0, "{stays:?}");
        let follows = run(true, Some(1));
        assert!(follows.moved() && follows.rounds.len() == 1, "{follows:?}");
        assert!((follows.downtime_s - 0.005).abs() < 1e-9, "{follows:?}");
        let remaining = follows.rounds[0].remaining_pages as f64 * PAGE_BYTES;
        assert!(
            follows.follow_s > remaining / 1e9 * 0.9 && follows.bytes > 250_000.0 * PAGE_BYTES,
            "{follows:?}"
        );
        assert!(run(true, None).decision.name() == "give-up", "nobody asked for post-copy");
    }

    #[test]
    fn pages_that_pack_take_their_part_of_bytes_and_time() {
        let workload =
            Workload { groups: vec![Group { pages: 20_000.0, writes_per_s: 1e4 }], ..Workload::default() };
        let path = Path { bandwidth_bytes_per_s: 1e9, overhead_s: 0.001, fixed_s: 0.004 };
        let run = |cost, learns_bytes| {
            simulate(&Plan {
                workload: &workload,
                memory_pages: 250_000.0,
                path,
                learns_bytes,
                first: cost,
                later: cost,
                limits: &Limits::default(),
                can_throttle: false,
                can_post_copy: false,
                policy: Policy::Migrate,
                hot: HotRule::default(),
                seed: 3,
            })
        };
        let (raw, packed) = (run(Cost::RAW, 0.0), run(Cost { bytes_part: 0.2, time_part: 0.5 }, 0.0));
        assert!(packed.bytes < raw.bytes * 0.22 && packed.bytes > 250_000.0 * 4096.0 * 0.2, "{packed:?}");
        assert!((0.45..0.55).contains(&(packed.total_s / raw.total_s)), "{packed:?}");
        let learning = run(Cost { bytes_part: 0.2, time_part: 0.5 }, 100e6);
        let more = learning.bytes - packed.bytes;
        assert!((79e6..85e6).contains(&more), "what is sent before packing begins: {more}");
    }

    #[test]
    fn a_pulse_works_its_part_of_any_time() {
        let workload = Workload { groups: vec![], pulse: Some(Pulse { period_s: 5.0, busy_part: 0.4 }) };
        for (from, to, busy) in
            [(0.0, 5.0, 2.0), (0.0, 1.0, 1.0), (2.0, 5.0, 0.0), (1.0, 11.0, 4.0), (4.0, 6.0, 1.0)]
        {
            assert!((workload.busy(from, to) - busy).abs() < 1e-9, "{from} to {to}");
        }
    }
}

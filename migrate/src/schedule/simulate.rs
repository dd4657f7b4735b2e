//! Months of checkpoints and failures in numbers alone.
//!
//! A workload works, is checkpointed, and now and then its host fails: then it is restored from the newest checkpoint that was
//! durable, and does again what came behind that. What it lost to all of this together is what a rule for intervals is judged by.
//! Nothing here has a clock: the same seed gives the same numbers.

use super::kind::INDEX_PER_BYTE;
use super::{Aim, Bound, Chain, FAULT, Kind, Schedule, Taken};
use std::time::Duration;

const PAGE_BYTES: f64 = 4096.0;

/// How far what is measured strays from what is, as a part of it.
const STRAYS: f64 = 0.1;

/// Pages that are written at random, each as often as any other.
#[derive(Debug, Clone, Copy)]
pub(super) struct Group {
    pub(super) bytes: f64,
    pub(super) bytes_per_s: f64,
}

/// A workload and where its checkpoints go.
#[derive(Debug, Clone)]
pub(super) struct Scene {
    pub(super) name: &'static str,
    pub(super) memory_bytes: f64,
    /// What it writes in its first half of every period, and in the second.
    pub(super) groups: [Vec<Group>; 2],
    /// How long it does the one and the other, together.
    pub(super) period_s: f64,
    pub(super) mtbf_s: f64,
    pub(super) pause_s: f64,
    pub(super) write_bytes_per_s: f64,
    pub(super) read_bytes_per_s: f64,
    pub(super) link_s: f64,
}

/// Who says how long the intervals are.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Rule {
    /// [`Schedule::plan`], knowing nothing at first.
    Auto,
    /// Always so many seconds.
    Every(f64),
}

/// What became of it.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Came {
    pub(super) wall_s: f64,
    pub(super) work_s: f64,
    /// Lost to checkpoints.
    pub(super) checkpoints_s: f64,
    /// Lost to failures: work that was done again.
    pub(super) again_s: f64,
    /// Lost to restoring.
    pub(super) restored_s: f64,
    pub(super) failures: u32,
    pub(super) fulls: u32,
    pub(super) deltas: u32,
}

impl Came {
    pub(super) fn waste(&self) -> f64 {
        1.0 - self.work_s / self.wall_s
    }

    pub(super) fn mean_interval_s(&self) -> f64 {
        self.wall_s / f64::from(self.fulls + self.deltas)
    }
}

/// Knuth's MMIX generator; the upper bits are the good ones.
#[derive(Debug, Clone)]
struct Random(u64);

impl Random {
    /// More than 0, less than 1.
    fn unit(&mut self) -> f64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) as f64 + 0.5) / f64::from(1_u32 << 31)
    }

    fn around_one(&mut self) -> f64 {
        1.0 + (self.unit() * 2.0 - 1.0) * STRAYS
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * self.unit().ln()
    }
}

impl Scene {
    pub(super) fn aim(&self) -> Aim {
        Aim { mtbf: Duration::from_secs_f64(self.mtbf_s), ..Aim::default() }
    }

    pub(super) fn schedule(&self, aim: Aim) -> Schedule {
        Schedule::new(aim, self.memory_bytes as u64, Duration::from_secs_f64(self.link_s))
    }

    /// What is dirty behind an interval that began at some time.
    fn dirty_bytes(&self, from_s: f64, interval_s: f64) -> f64 {
        let until = |time: f64| {
            let (periods, half) = ((time / self.period_s).floor(), self.period_s / 2.0);
            let within = time - periods * self.period_s;
            [periods * half + within.min(half), periods * half + (within - half).max(0.0)]
        };
        let (end, begin) = (until(from_s + interval_s), until(from_s));
        let part = |half: usize| {
            let busy_s = end[half] - begin[half];
            let dirtied = |group: &Group| group.bytes * -(-group.bytes_per_s * busy_s / group.bytes).exp_m1();
            self.groups[half].iter().map(dirtied).sum::<f64>()
        };
        (part(0) + part(1)).min(self.memory_bytes)
    }
}

/// A checkpoint whose bytes are on their way, or in the store.
#[derive(Debug, Clone, Copy)]
struct Written {
    work_s: f64,
    durable_s: f64,
    chain: Chain,
}

/// Lets a rule take the checkpoints of a scene until its host has failed so many times.
pub(super) fn simulate(scene: &Scene, aim: &Aim, rule: Rule, failures: u32, seed: u64) -> Came {
    let (mut random, mut noise) = (Random(seed), Random(!seed));
    let mut schedule = scene.schedule(aim.clone());
    let mut came = Came::default();
    let (mut now_s, mut work_s) = (0.0, 0.0);
    // The workload begins as a checkpoint that costs nothing, so that there is something to go back to.
    let mut safe = Written { work_s: 0.0, durable_s: 0.0, chain: Chain::default() };
    let mut parent: Option<Written> = None;
    let mut fails_s = random.exponential(scene.mtbf_s);
    let mut interval_s = 1.0;
    let mut plan = schedule.plan();
    while came.failures < failures {
        // The next one waits until the last is durable.
        let last_durable_s = parent.map_or(now_s, |parent| parent.durable_s);
        let begin_s = (now_s + interval_s).max(last_durable_s);
        let since_s = begin_s - now_s;
        let dirty_bytes = scene.dirty_bytes(work_s, since_s) * noise.around_one();
        let kind = schedule.kind(parent.as_ref().map(|parent| &parent.chain), dirty_bytes as u64);
        let (is_full, page_bytes) = match kind {
            Kind::Full(_) => (true, scene.memory_bytes),
            Kind::Delta => (false, dirty_bytes),
        };
        let pause_s = scene.pause_s * noise.around_one();
        let slowed_s = dirty_bytes / PAGE_BYTES * FAULT.as_secs_f64();
        let lost_s = pause_s + slowed_s;
        let took_s = pause_s + page_bytes / (scene.write_bytes_per_s * noise.around_one());
        let frozen_s = begin_s + lost_s;
        let durable_s = frozen_s + took_s;
        if parent.is_some_and(|parent| fails_s >= parent.durable_s)
            && let Some(parent) = parent
        {
            safe = parent;
        }
        if fails_s < frozen_s {
            // What is lost: the work since the checkpoint that is safe, and what of this one was paid already.
            let paid_s = (fails_s - begin_s).max(0.0);
            let worked_s = work_s + (fails_s - now_s) - paid_s;
            came.checkpoints_s += paid_s;
            came.again_s += worked_s - safe.work_s;
            came.failures += 1;
            let restore_s = f64::from(safe.chain.deltas + 1) * scene.link_s
                + ((safe.chain.stored_bytes as f64).min(scene.memory_bytes)
                    + safe.chain.stored_bytes as f64 * INDEX_PER_BYTE)
                    / scene.read_bytes_per_s;
            came.restored_s += restore_s;
            now_s = fails_s + restore_s;
            // A host does not fail while it restores; `plan` allows for it, at such times it makes no difference.
            fails_s = now_s + random.exponential(scene.mtbf_s);
            work_s = safe.work_s;
            safe.durable_s = now_s;
            // Whoever is restored is new to its host: nothing to stand on.
            parent = None;
            continue;
        }
        work_s += since_s;
        came.checkpoints_s += lost_s;
        let before = parent.map_or(Chain::default(), |parent| parent.chain);
        let chain = if is_full {
            came.fulls += 1;
            Chain { deltas: 0, stored_bytes: page_bytes as u64 }
        } else {
            came.deltas += 1;
            Chain { deltas: before.deltas + 1, stored_bytes: before.stored_bytes + page_bytes as u64 }
        };
        parent = Some(Written { work_s, durable_s, chain });
        now_s = frozen_s;
        schedule.taken(&Taken {
            is_full,
            since_parent: (!is_full).then_some(Duration::from_secs_f64(since_s)),
            page_bytes: page_bytes as u64,
            stored_bytes: page_bytes as u64,
            pause: Duration::from_secs_f64(pause_s),
            slowed: Duration::from_secs_f64(slowed_s),
            took: Duration::from_secs_f64(took_s),
        });
        interval_s = match rule {
            // Deciding at every eighth one is enough, and eight times as fast.
            Rule::Auto if (came.fulls + came.deltas) % 8 == 0 || came.failures == 0 => {
                plan = schedule.plan();
                plan.interval.as_secs_f64()
            }
            // What is done once in a while is not done eight times.
            Rule::Auto if plan.bound == Bound::Unknown => plan.interval.as_secs_f64() / 2.0,
            Rule::Auto => interval_s,
            Rule::Every(interval_s) => interval_s,
        };
    }
    came.wall_s = now_s;
    came.work_s = work_s;
    came
}

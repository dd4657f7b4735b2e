//! When the next checkpoint is due, and whether it is a full one: decided from what earlier ones measured.
//!
//! ```text
//! taken ─▶ learn ─┬─▶ costs of a checkpoint ─┐
//! rounds ─▶ dirty ┴─▶ bytes of a delta ──────┼─▶ interval   (what failures and checkpoints cost together is least)
//!                                            └─▶ kind       (a delta as long as restoring stays fast enough)
//! ```
//!
//! Everything here is a pure function of recorded numbers: nothing has a clock, and docs/checkpoints.md has a table of what the
//! rules come to in simulated months.

mod learn;
mod dirty;
mod interval;
mod kind;
#[cfg(test)]
mod simulate;
#[cfg(test)]
mod compare;

pub use interval::{Bound, Plan};
pub use kind::{Chain, Full, Kind};

use dirty::Dirty;
use learn::Learned;
use protocol::page::PAGE_SIZE;
use std::time::Duration;

/// What writing to a page for the first time since it was last recorded costs the workload: a fault of 2.3 to 3 us (measured on
/// 23 November 2026, KVM write protection).
pub const FAULT: Duration = Duration::from_micros(3);

/// What the operator wants.
#[derive(Debug, Clone, PartialEq)]
pub struct Aim {
    /// How long restoring the newest checkpoint may take.
    pub recovery_time: Duration,
    /// The part of its time that the workload may lose to checkpoints.
    pub overhead: f64,
    /// How long a host lives on average between two failures.
    pub mtbf: Duration,
    /// The most deltas on a full checkpoint.
    pub max_deltas: u32,
}

impl Default for Aim {
    fn default() -> Self {
        Self {
            recovery_time: Duration::from_secs(5),
            overhead: 0.02,
            mtbf: Duration::from_secs(86_400),
            max_deltas: 100,
        }
    }
}

/// What a checkpoint turned out to cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// Whether it was a full one.
    pub is_full: bool,
    /// How long the workload ran since the checkpoint that it is a delta to; nothing for a full one.
    pub since_parent: Option<Duration>,
    /// Bytes of the pages that it recorded, before packing.
    pub page_bytes: u64,
    /// Bytes that the store got for them.
    pub stored_bytes: u64,
    /// How long the workload stood still.
    pub pause: Duration,
    /// How much longer than without it the workload took besides, since the last one: [`FAULT`] for every page that it had to fault on.
    pub slowed: Duration,
    /// From its beginning until it was durable.
    pub took: Duration,
}

/// The rules, and what they have learned.
#[derive(Debug, Clone)]
pub struct Schedule {
    aim: Aim,
    memory_bytes: f64,
    /// What reading one link of a chain takes besides its bytes.
    link_s: f64,
    dirty: Dirty,
    full: Learned,
    delta: Learned,
}

impl Schedule {
    /// For a workload of so much memory. `link` is what opening one more checkpoint of a chain takes: about a millisecond on a disk,
    /// a few round trips over a network.
    pub fn new(aim: Aim, memory_bytes: u64, link: Duration) -> Self {
        Self {
            aim,
            memory_bytes: memory_bytes as f64,
            link_s: link.as_secs_f64(),
            dirty: Dirty::default(),
            full: Learned::default(),
            delta: Learned::default(),
        }
    }

    /// Learns from a checkpoint that is durable.
    pub fn taken(&mut self, taken: &Taken) {
        if taken.is_full { &mut self.full } else { &mut self.delta }.add(taken);
        if let Some(interval) = taken.since_parent {
            self.dirtied(interval, taken.page_bytes);
        }
    }

    /// Learns how much was dirty behind an interval at whose beginning all was clean: a round of a checkpoint, too, says so.
    pub fn dirtied(&mut self, interval: Duration, page_bytes: u64) {
        self.dirty.add(interval.as_secs_f64(), page_bytes as f64);
    }

    /// How many bytes of pages a delta will have behind an interval.
    pub fn expected_page_bytes(&self, interval: Duration) -> u64 {
        self.dirty.curve().bytes(interval.as_secs_f64()).min(self.memory_bytes) as u64
    }

    /// When the next one is due, counted from the beginning of the last.
    pub fn plan(&self) -> Plan {
        interval::plan(self)
    }

    /// Whether the next one is a delta on this chain, if there is one to stand on, with so many bytes of dirty pages.
    pub fn kind(&self, chain: Option<&Chain>, page_bytes: u64) -> Kind {
        kind::decide(self, chain, page_bytes as f64)
    }

    /// What a checkpoint of so many bytes of pages costs; a kind that was never taken costs what the other one does.
    fn cost(&self, is_full: bool, page_bytes: f64) -> Cost {
        let (own, other) = if is_full { (&self.full, &self.delta) } else { (&self.delta, &self.full) };
        let known = |of: fn(&Learned) -> Option<f64>, unknown: f64| of(own).or(of(other)).unwrap_or(unknown);
        let stored_bytes = page_bytes * known(Learned::stored_per_byte, 1.0);
        Cost {
            pause_s: known(Learned::pause_s, 0.0),
            took_s: known(Learned::fixed_s, 0.0) + stored_bytes * known(Learned::s_per_stored_byte, 0.0),
            stored_bytes,
        }
    }

    /// What the workload loses to tracking, for every byte of pages that is dirty in the end: whatever kind of checkpoint comes then.
    fn slowed_s_per_byte(&self) -> f64 {
        self.delta.slowed_s_per_byte().unwrap_or(FAULT.as_secs_f64() / PAGE_SIZE as f64)
    }

    /// Bytes of pages of a full checkpoint: what the last ones had, or all memory.
    fn full_page_bytes(&self) -> f64 {
        self.full.page_bytes().unwrap_or(self.memory_bytes).max(1.0)
    }
}

/// What a checkpoint costs.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    /// How long the workload stands still.
    pause_s: f64,
    /// From its beginning until it is durable.
    took_s: f64,
    /// Bytes in the store.
    stored_bytes: f64,
}

//! What the guest itself says of a move, read from its memory: the same for every VMM.
//!
//! ```text
//!  undisturbed, 1 s        start                 frozen         end
//!  ├── rate ──┤              ├── rounds ───────────┤   ╎ tick ──┤
//!                            └────────── work done, work lost ──┘
//!                                                  └ gap ┘
//! ```
//!
//! The downtime is the gap, on the guest's own clock, that contains the source's last tick; both ends are on one host and
//! read the same TSC. The work lost is what the guest would have written from start to end at its undisturbed rate, less
//! what it has written.

use crate::guest::Window;
use ledger::Stats;
use serde_json::{Value, json};
use std::time::{Duration, Instant};

/// The longest a guest may take to fill its memory, and a destination to tick.
const PATIENCE: Duration = Duration::from_secs(120);

/// Time for the guest to note a gap that it has come out of.
pub(super) const SETTLE: Duration = Duration::from_millis(50);

/// The guest before it is moved.
pub(super) struct Before {
    pub rate_mb_per_s: f64,
    pub gap_us: u64,
    pub at: Stats,
}

/// Waits until the guest has filled its memory and writes.
pub(super) fn wait_running(window: &Window) {
    let until = Instant::now() + PATIENCE;
    while window.stats().is_none_or(|stats| stats.state != ledger::State::Running) {
        assert!(Instant::now() < until, "the guest does not get to run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Lets the guest run undisturbed for a second. What is done to get ready for the move comes behind it, and
/// [`Before::begin`] right before the move.
pub(super) fn undisturbed(window: &Window) -> Before {
    std::thread::sleep(Duration::from_millis(500));
    let begin = stats(window);
    std::thread::sleep(Duration::from_secs(1));
    let at = stats(window);
    let gap = at.longest_gap_since(begin.tsc_last).and_then(|gap| at.us(gap.cycles));
    Before { rate_mb_per_s: speed(&begin, &at), gap_us: gap.unwrap_or(2 * at.tick_us), at }
}

impl Before {
    /// The move begins.
    pub(super) fn begin(&mut self, source: &Window) {
        self.at = stats(source);
    }

    /// The move has ended: what the guest says at the destination. `frozen_tsc` is the source's last tick.
    pub(super) fn end(&self, destination: &Window, frozen_tsc: u64) -> Value {
        let until = Instant::now() + PATIENCE;
        let end = loop {
            match destination.stats() {
                Some(stats) if stats.tsc_last > frozen_tsc => break stats,
                _ => assert!(Instant::now() < until, "the guest does not tick at the destination"),
            }
            std::thread::sleep(Duration::from_micros(200));
        };
        std::thread::sleep(SETTLE);
        let later = stats(destination);
        // No gap longer than two ticks: then two ticks bound it. The gap that the freeze is part of is the first of the
        // list that ends behind it.
        let bound_us = 2 * later.tick_us;
        let gap = later.gaps.iter().find(|gap| gap.tsc_end > frozen_tsc).and_then(|gap| later.us(gap.cycles));
        let longest = later.longest_gap_since(self.at.tsc_last).and_then(|gap| later.us(gap.cycles));
        let us = end.us(end.tsc_last.saturating_sub(self.at.tsc_last)).unwrap_or(0) as f64;
        let done = (end.bytes_written - self.at.bytes_written) as f64;
        json!({
            "downtime_guest_us": gap.unwrap_or(bound_us),
            "longest_gap_us": longest.unwrap_or(bound_us),
            "longest_gap_undisturbed_us": self.gap_us,
            "guest_mb_per_s_undisturbed": self.rate_mb_per_s,
            "guest_mb_per_s_in_move": done / us.max(1.0),
            "work_lost_bytes": (self.rate_mb_per_s * us - done).max(0.0),
            "guest_us": us,
        })
    }
}

/// The guest's account; a benchmark without one has nothing to say.
pub(super) fn stats(window: &Window) -> Stats {
    window.stats().expect("the guest's account of itself")
}

/// MB/s that the guest wrote between two moments.
pub(super) fn speed(begin: &Stats, end: &Stats) -> f64 {
    let us = end.us(end.tsc_last.saturating_sub(begin.tsc_last)).unwrap_or(0).max(1);
    (end.bytes_written - begin.bytes_written) as f64 / us as f64
}

/// Waits until a guest that was started from elsewhere has ticked: its account is there, or it counts on. One that has its account only when
/// it is touched shows what it was first, so that one more tick is waited for.
///
/// # Panics
/// If it does not.
pub(super) fn await_tick(window: &Window) {
    let until = Instant::now() + PATIENCE;
    let tick = || window.stats().map(|stats| stats.tsc_last);
    let mut seen = tick();
    while Instant::now() < until {
        match (seen, tick()) {
            (Some(before), Some(now)) if now != before => return,
            (None, now) => seen = now,
            _ => {}
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    panic!("the restored guest does not tick");
}

/// Since then.
pub(super) fn micros(begun: Instant) -> u64 {
    u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX)
}

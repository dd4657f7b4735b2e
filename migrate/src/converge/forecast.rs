//! What freezing now would cost, and what one more round would make of that.

use super::measure::{Measured, bandwidth_bytes_per_s};
use protocol::frame::HEADER_BYTES;
use protocol::page::PAGE_SIZE;
use std::time::Duration;

/// A page that remains costs this many bytes: its own and a frame header, as if it stood alone and were not zero.
pub const PAGE_BYTES: f64 = (PAGE_SIZE + HEADER_BYTES) as f64;

/// Within the budget, the part of the downtime that another round must save.
const PAYS_PART: f64 = 0.1;

/// Within the budget, the least that another round must save: a tenth of what a blinking cursor is late by, and
/// about the precision of the prediction on a busy host.
const PAYS_AT_LEAST: Duration = Duration::from_micros(500);

/// A prediction beyond every budget is as good as endless, and `Duration` must hold it. In seconds.
const ENDLESS: f64 = 1e9;

/// What the numbers say about freezing now, and about one more round. In seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// What freezing costs when nothing remains.
    pub fixed: f64,
    /// What the last round took beyond its bytes.
    pub overhead: f64,
    /// For what remains.
    pub transfer: f64,
    /// For what would remain behind one more round.
    pub transfer_after_another: f64,
}

impl Forecast {
    /// The forecast behind the last of `rounds`.
    pub fn of(rounds: &[Measured], fixed: Duration) -> Self {
        let fixed = fixed.as_secs_f64();
        let bandwidth = bandwidth_bytes_per_s(rounds);
        let Some(last) = rounds.last() else {
            let endless = f64::INFINITY;
            return Self { fixed, overhead: 0.0, transfer: endless, transfer_after_another: endless };
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
        let held = last.held_pages.min(last.remaining_pages) as f64;
        // Pages that are held back take no part in the next round, and are there behind it as before.
        let next = overhead + transfer_of(remaining - held);
        // What a round left grows with its length. A round that took no time says nothing of the rate; then the next is
        // taken to promise nothing.
        let left = |pages: f64, took: f64| pages * if took > 0.0 { (next / took).min(1.0) } else { 1.0 };
        let after = if held > 0.0 {
            held + left(remaining - held, took)
        } else {
            // Pages that waited were left by the round that sent them last, which was a longer one.
            let waited = last.waiting_pages.min(last.remaining_pages) as f64;
            let sent_them = rounds.iter().rev().find(|round| round.waiting_pages == 0);
            let sent_them = sent_them.map_or(took, |round| round.duration.as_secs_f64());
            left(remaining - waited, took) + left(waited, sent_them)
        };
        Self { fixed, overhead, transfer: transfer_of(remaining), transfer_after_another: transfer_of(after) }
    }

    /// The downtime to expect, in whole microseconds, so that a trace has all of it.
    pub fn downtime(&self) -> Duration {
        let seconds = self.fixed + self.overhead + self.transfer;
        let seconds = if seconds.is_finite() { seconds.min(ENDLESS) } else { ENDLESS };
        Duration::from_micros((seconds * 1e6).ceil() as u64)
    }

    /// What moving so many bytes takes at these rounds' bandwidth, with a round's overhead.
    pub fn moving(&self, bytes: u64, rounds: &[Measured]) -> Duration {
        let seconds = self.overhead + bytes as f64 / bandwidth_bytes_per_s(rounds).max(1.0);
        Duration::from_secs_f64(seconds.min(ENDLESS))
    }

    /// Whether one more round lowers the downtime by a tenth and by half a millisecond.
    pub fn another_round_pays(&self) -> bool {
        let saved = self.transfer - self.transfer_after_another;
        let downtime = self.fixed + self.overhead + self.transfer;
        saved >= PAYS_AT_LEAST.as_secs_f64() && saved >= downtime * PAYS_PART
    }
}

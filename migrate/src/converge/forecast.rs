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
///
/// What the last round took beyond its bytes, at the bandwidth of all rounds, may have been the same for any number of pages,
/// or more for more of them: pages that lie scattered cost more each. One round does not tell. The budget is judged by the
/// former, which promises least for the few pages that remain. Whether another round pays is judged by the latter, because a
/// round too many costs little, and one too few is downtime.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// What freezing costs when nothing remains.
    pub fixed: f64,
    /// What the last round took beyond its bytes.
    pub overhead: f64,
    /// For what remains.
    pub transfer: f64,
    /// The downtime, if what the last round took beyond its bytes was for its pages.
    pub(super) by_pages: f64,
    /// What one more round would save of that.
    pub(super) saved: f64,
}

impl Forecast {
    /// The forecast behind the last of `rounds`.
    pub fn of(rounds: &[Measured], fixed: Duration) -> Self {
        let fixed = fixed.as_secs_f64();
        let bandwidth = bandwidth_bytes_per_s(rounds);
        let Some(last) = rounds.last() else {
            return Self {
                fixed,
                overhead: 0.0,
                transfer: f64::INFINITY,
                by_pages: f64::INFINITY,
                saved: 0.0,
            };
        };
        // Without a byte sent there is no bandwidth: whatever remains is then as far away as it can be.
        let transfer_of = |pages: f64, bandwidth: f64| match pages {
            0.0 => 0.0,
            pages => pages * PAGE_BYTES / bandwidth,
        };
        let took = last.duration.as_secs_f64();
        let sent = last.sent_bytes as f64;
        let explained = if sent > 0.0 { sent / bandwidth } else { 0.0 };
        let overhead = (took - explained).max(0.0);
        let remaining = last.remaining_pages as f64;
        let transfer = transfer_of(remaining, bandwidth);

        // Some of it is no page's in any case: a round trip and a harvest, as freezing has them.
        let no_pages = overhead.min(fixed);
        let own_bandwidth = if sent > 0.0 { sent / (explained + overhead - no_pages) } else { bandwidth };
        let transfer_by_pages = transfer_of(remaining, own_bandwidth);
        let after = left_by_another(rounds, |pages| no_pages + transfer_of(pages, own_bandwidth));
        Self {
            fixed,
            overhead,
            transfer,
            by_pages: fixed + no_pages + transfer_by_pages,
            saved: transfer_by_pages - transfer_of(after, own_bandwidth),
        }
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
        self.saved >= PAYS_AT_LEAST.as_secs_f64() && self.saved >= self.by_pages * PAYS_PART
    }
}

/// The pages that would remain behind one more round, which takes `round_of` the pages that it sends.
fn left_by_another(rounds: &[Measured], round_of: impl Fn(f64) -> f64) -> f64 {
    let Some(last) = rounds.last() else { return 0.0 };
    let took = last.duration.as_secs_f64();
    let remaining = last.remaining_pages as f64;
    let held = last.held_pages.min(last.remaining_pages) as f64;
    // Pages that are held back take no part in the next round, and are there behind it as before.
    let next = round_of(remaining - held);
    // What a round left grows with its length. A round that took no time says nothing of the rate; then the next is
    // taken to promise nothing.
    let left = |pages: f64, took: f64| pages * if took > 0.0 { (next / took).min(1.0) } else { 1.0 };
    if held > 0.0 {
        return held + left(remaining - held, took);
    }
    // Pages that waited were left by the round that sent them last, which was a longer one.
    let waited = last.waiting_pages.min(last.remaining_pages) as f64;
    let sent_them = rounds.iter().rev().find(|round| round.waiting_pages == 0);
    let sent_them = sent_them.map_or(took, |round| round.duration.as_secs_f64());
    left(remaining - waited, took) + left(waited, sent_them)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn round(sent_bytes: u64, us: u64, remaining_pages: u64) -> Measured {
        Measured { sent_bytes, duration: Duration::from_micros(us), remaining_pages, ..Measured::default() }
    }

    /// As measured on 30 November 2026: 1 GiB at 50 MB/s on loopback; freezing took 6 ms, and 4 behind one more round.
    #[test]
    fn scattered_pages_are_dear_and_a_round_of_few_of_them_is_short() {
        let rounds = [round(806_000_000, 789_000, 7822), round(32_300_000, 45_700, 602)];
        let forecast = Forecast::of(&rounds, Duration::from_micros(2100));
        assert!(forecast.another_round_pays(), "{forecast:?}");
        assert!(
            forecast.downtime() > Duration::from_millis(15),
            "the budget is judged by more: {forecast:?}"
        );
        // The same over a link with a round trip of 50 ms: it would be most of that round, whatever it sends.
        let rounds = [round(806_000_000, 840_000, 7822), round(32_300_000, 95_700, 602)];
        let forecast = Forecast::of(&rounds, Duration::from_micros(52_000));
        assert!(!forecast.another_round_pays(), "{forecast:?}");
    }
}

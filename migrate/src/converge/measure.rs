//! What a round measured, and what the link makes of all rounds.

use serde::{Deserialize, Serialize};
use std::time::Duration;

/// How much more a round counts for the bandwidth than the one before it.
const DECAY: f64 = 0.5;

/// One round, over and acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Measured {
    /// Bytes on the page streams; packed pages count for what they stand for, as those that remain do.
    pub sent_bytes: u64,
    /// From its first page to the answer that all of it arrived.
    #[serde(rename = "duration_us", with = "super::micros")]
    pub duration: Duration,
    /// Pages that freezing behind it would have to send.
    pub remaining_pages: u64,
    /// Those of them that the next live round would hold back, because they are dirty in every round.
    pub held_pages: u64,
    /// Those of them that this round held back. Traces of before do not have it: nothing was held back then.
    #[serde(default)]
    pub waiting_pages: u64,
    /// The share of its time that the workload was made to stand still, in percent.
    pub throttle_percent: u8,
}

/// Bytes a second over all rounds; 0 before anything was sent.
///
/// An exponentially weighted mean of bytes by one of durations, each round counting half as much as the one behind it.
/// So long rounds weigh more than short ones, and a round of three pages, which is all latency, does not pass for a
/// slow link.
pub fn bandwidth_bytes_per_s(rounds: &[Measured]) -> f64 {
    let (mut bytes, mut seconds) = (0.0, 0.0);
    for round in rounds {
        bytes = bytes * DECAY + round.sent_bytes as f64;
        seconds = seconds * DECAY + round.duration.as_secs_f64();
    }
    if seconds > 0.0 { bytes / seconds } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_short_round_does_not_pass_for_a_slow_link() {
        // 1 ms of latency for three pages is 12 MB/s, and the link does 600.
        let round = |sent_bytes, us| Measured {
            sent_bytes,
            duration: Duration::from_micros(us),
            ..Measured::default()
        };
        let bandwidth = bandwidth_bytes_per_s(&[round(1_074_000_000, 1_790_000), round(12_000, 1000)]);
        assert!((590e6..610e6).contains(&bandwidth), "{bandwidth}");
    }
}

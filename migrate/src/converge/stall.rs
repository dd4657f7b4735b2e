//! Whether what remains still falls.
//!
//! One round that did not fall says little: a workload has its bursts, and the first rounds of one with a working set
//! all leave that working set behind. So the best of a window of rounds is held against the best before it, and the
//! window must be long enough in time as well.

use super::measure::Measured;
use std::time::Duration;

/// Rounds in the window.
const WINDOW_ROUNDS: usize = 3;

/// The least time that the window must span: two periods of a timer that fires every half second.
const WINDOW_TIME: Duration = Duration::from_secs(1);

/// What remains must fall below this part of its best within a window, or it has stalled.
const FALLS_BELOW: f64 = 0.95;

/// A round whose remaining pages are within this factor of the best seen stands at a local minimum.
const NEAR_BEST: f64 = 1.25;

/// The fewest pages that remained behind any of the rounds.
pub fn best(rounds: &[Measured]) -> Option<u64> {
    rounds.iter().map(|round| round.remaining_pages).min()
}

/// The last rounds, as far back as the workload was slowed down as much as in the last of all. Others are not
/// comparable.
pub fn comparable(rounds: &[Measured]) -> &[Measured] {
    let Some(last) = rounds.last() else { return &[] };
    let others = rounds.iter().rposition(|round| round.throttle_percent != last.throttle_percent);
    rounds.get(others.map_or(0, |at| at + 1)..).unwrap_or(&[])
}

/// For how many windows, one behind the other up to now, what remains has not fallen against its best; 0 as long as it
/// falls.
pub fn stalled_windows(rounds: &[Measured]) -> u32 {
    let rounds = comparable(rounds);
    // The round that was the last to be markedly better than all before it.
    let (mut best, mut best_at) = (f64::INFINITY, 0);
    for (at, round) in rounds.iter().enumerate() {
        let remaining = round.remaining_pages as f64;
        if remaining < best * FALLS_BELOW || at == 0 {
            (best, best_at) = (remaining, at);
        }
    }
    let since = rounds.get(best_at + 1..).unwrap_or(&[]);
    let time: Duration = since.iter().map(|round| round.duration).sum();
    let by_rounds = since.len() / WINDOW_ROUNDS;
    let by_time = time.as_micros() / WINDOW_TIME.as_micros();
    u32::try_from(by_time.min(by_rounds as u128)).unwrap_or(u32::MAX)
}

/// Whether the last round left about as little as any.
pub fn at_local_minimum(rounds: &[Measured]) -> bool {
    let (Some(last), Some(best)) = (rounds.last(), best(rounds)) else { return false };
    last.remaining_pages as f64 <= best as f64 * NEAR_BEST
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(remaining: &[u64], duration_ms: u64) -> Vec<Measured> {
        let duration = Duration::from_millis(duration_ms);
        let round = |remaining_pages: &u64| Measured {
            sent_bytes: 4096,
            duration,
            remaining_pages: *remaining_pages,
            ..Measured::default()
        };
        remaining.iter().map(round).collect()
    }

    #[test]
    fn one_noisy_round_is_no_stall_and_a_window_is() {
        assert_eq!(stalled_windows(&rounds(&[], 400)), 0);
        assert_eq!(stalled_windows(&rounds(&[1000, 500, 600, 250], 400)), 0);
        assert_eq!(stalled_windows(&rounds(&[1000, 500, 600, 550], 400)), 0);
        assert_eq!(stalled_windows(&rounds(&[1000, 500, 600, 550, 490], 400)), 1);
        assert_eq!(stalled_windows(&rounds(&[1000; 7], 400)), 2);
        assert_eq!(stalled_windows(&rounds(&[1000; 7], 10)), 0, "60 ms say nothing");
    }

    #[test]
    fn rounds_of_another_throttle_are_not_compared() {
        let mut slowed = rounds(&[1000; 7], 400);
        slowed[6].throttle_percent = 20;
        assert_eq!(comparable(&slowed).len(), 1);
        assert_eq!(stalled_windows(&slowed), 0);
    }

    #[test]
    fn an_oscillating_workload_has_its_minimum_where_it_rests() {
        let waves = rounds(&[1000, 5000, 900, 5200, 950], 400);
        assert!(at_local_minimum(&waves));
        assert!(!at_local_minimum(&waves[..4]));
    }
}

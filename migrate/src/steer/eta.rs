//! How long a migration will still take, as far as its numbers say.

/// What dirties at this part of the link's speed or faster is not expected to end by itself.
const HOPELESS_PART: f64 = 0.95;

/// What is known in the middle of a round.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Underway {
    /// Since the round began.
    pub(super) round_s: f64,
    /// Pages of it that were looked at.
    pub(super) done_pages: u64,
    /// Pages of it that were not.
    pub(super) left_pages: u64,
    /// Pages a second that the workload dirties; `None` before a round was over.
    pub(super) dirty_pages_per_s: Option<f64>,
}

/// Seconds until everything was sent, if the workload goes on as it does: the rest of this round, then rounds that shrink
/// by the same factor each. In the first round, where nothing is known of the workload, the rest of it. `None` where the
/// numbers say nothing, or that it does not end.
pub(super) fn eta_s(underway: Underway) -> Option<f64> {
    let Underway { round_s, done_pages, left_pages, dirty_pages_per_s } = underway;
    if done_pages == 0 || round_s <= 0.0 {
        return None;
    }
    let pages_per_s = done_pages as f64 / round_s;
    let rest_s = left_pages as f64 / pages_per_s;
    let Some(dirty) = dirty_pages_per_s else { return Some(rest_s) };
    let ratio = dirty / pages_per_s;
    // What was dirtied since this round began is the next one, and so on: a geometric series.
    (ratio < HOPELESS_PART).then(|| rest_s + ratio * (round_s + rest_s) / (1.0 - ratio))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HALF: Underway =
        Underway { round_s: 2.0, done_pages: 1000, left_pages: 1000, dirty_pages_per_s: None };

    #[test]
    fn the_first_round_counts_alone_and_later_ones_with_what_they_leave() {
        assert_eq!(eta_s(HALF), Some(2.0));
        assert_eq!(eta_s(Underway { dirty_pages_per_s: Some(0.0), ..HALF }), Some(2.0));
        // 250 of 500 pages a second: 2 s are left, then rounds of 2 s, 1 s, 0.5 s and so on.
        assert_eq!(eta_s(Underway { dirty_pages_per_s: Some(250.0), ..HALF }), Some(6.0));
    }

    #[test]
    fn nothing_is_said_without_grounds() {
        assert_eq!(eta_s(Underway { done_pages: 0, ..HALF }), None);
        assert_eq!(eta_s(Underway { round_s: 0.0, ..HALF }), None);
        assert_eq!(eta_s(Underway { dirty_pages_per_s: Some(500.0), ..HALF }), None);
        assert_eq!(eta_s(Underway { dirty_pages_per_s: Some(f64::INFINITY), ..HALF }), None);
    }
}

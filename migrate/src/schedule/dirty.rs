//! How much is dirty behind an interval, as a function of its length.
//!
//! A workload has a working set: twice the interval is less than twice the dirty pages, and at some length it is hardly more at all.
//! How soon decides whether a rarer checkpoint costs less, so it is learned instead of assumed. There is a mean for every length
//! that was seen, in steps of a factor of the square root of two, and through all of them goes one curve,
//!
//! ```text
//! rate * t + working set * (1 - exp(-t / turns over in))
//! ```
//!
//! because the slope between two means is mostly noise, and it is the slope that decides.

/// How much the newest number counts.
const NEWEST: f64 = 0.3;

/// A mean of this many numbers or more is as good as it gets with [`NEWEST`].
const SETTLED: u32 = 6;

/// A length that was not seen for so many numbers has to be seen again: a workload changes.
const STALE: u32 = 100;

/// By how much one number may change what is thought of intervals of other lengths.
const MOST_CHANGE: f64 = 2.0;

/// Steps of the length of intervals for each factor of two.
const STEPS_PER_OCTAVE: f64 = 2.0;

/// Less than this is taken for this: relative errors are not taken of nothing.
const LEAST_BYTES: f64 = 4096.0;

/// The shortest interval that says anything: a tick of a kernel's timer.
const LEAST_S: f64 = 0.001;

/// The longest, some thirty years: nobody waits so long, and what is longer is a clock that was set.
const MOST_S: f64 = 1e9;

/// How the times are spaced in which a working set may turn over: fits hardly differ within such a step.
const TURNOVER_STEP: f64 = 1.3;

/// How much better a curve with a working set must fit than a straight line, as a part of the error, to be believed.
const BETTER: f64 = 0.9;

#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    step: i32,
    interval_s: f64,
    bytes: f64,
    seen: u32,
    /// How many numbers had been added when this was seen last.
    last: u32,
}

/// What was seen, in ascending order of length.
#[derive(Debug, Clone, Default)]
pub(super) struct Dirty {
    points: Vec<Point>,
    added: u32,
}

/// What is dirty behind an interval of any length.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(super) struct Curve {
    bytes_per_s: f64,
    working_set_bytes: f64,
    turnover_s: f64,
}

impl Curve {
    pub(super) fn bytes(&self, interval_s: f64) -> f64 {
        let straight = self.bytes_per_s * interval_s;
        if self.working_set_bytes > 0.0 {
            straight - self.working_set_bytes * (-interval_s / self.turnover_s).exp_m1()
        } else {
            straight
        }
    }
}

impl Dirty {
    /// So much was dirty behind such an interval.
    pub(super) fn add(&mut self, interval_s: f64, bytes: f64) {
        if !(LEAST_S..=MOST_S).contains(&interval_s) {
            return;
        }
        let bytes = bytes.max(LEAST_BYTES);
        self.added = self.added.saturating_add(1);
        #[allow(
            clippy::cast_possible_truncation,
            reason = "the logarithm of a finite number is far below 2^31"
        )]
        let step = (interval_s.log2() * STEPS_PER_OCTAVE).round() as i32;
        match self.points.binary_search_by_key(&step, |point| point.step) {
            Ok(at) => {
                let before = self.points[at].bytes;
                let after = before + NEWEST * (bytes - before);
                let factor = (after / before).clamp(1.0 / MOST_CHANGE, MOST_CHANGE);
                for (other, point) in self.points.iter_mut().enumerate() {
                    // A workload that writes more now does so behind intervals of other lengths as well, until they tell otherwise.
                    point.bytes = if other == at { after } else { (point.bytes * factor).max(LEAST_BYTES) };
                }
                let point = &mut self.points[at];
                point.interval_s += NEWEST * (interval_s - point.interval_s);
                (point.seen, point.last) = (point.seen.saturating_add(1), self.added);
            }
            Err(at) => {
                self.points.insert(at, Point { step, interval_s, bytes, seen: 1, last: self.added });
            }
        }
    }

    /// Whether about such a length, within a step, was seen lately.
    pub(super) fn knows(&self, interval_s: f64) -> bool {
        let step = interval_s.log2() * STEPS_PER_OCTAVE;
        let mut fresh = self.points.iter().filter(|point| self.added - point.last < STALE);
        fresh.any(|point| (f64::from(point.step) - step).abs() <= 1.0)
    }

    /// The curve through what was seen. A single length says nothing of others: it is taken for a rate then, which is the worst.
    pub(super) fn curve(&self) -> Curve {
        let (Some(first), Some(last)) = (self.points.first(), self.points.last()) else {
            return Curve::default();
        };
        let (straight, error) = self.fit(0.0);
        let mut best = (straight, error * BETTER);
        let (shortest_s, longest_s) = (first.interval_s / 2.0, last.interval_s * 2.0);
        let turnovers =
            std::iter::successors(Some(shortest_s), |turnover_s| Some(turnover_s * TURNOVER_STEP));
        if self.points.len() > 1 {
            for turnover_s in turnovers.take_while(|turnover_s| *turnover_s <= longest_s) {
                let (curve, error) = self.fit(turnover_s);
                if error < best.1 {
                    best = (curve, error);
                }
            }
        }
        best.0
    }

    /// The best curve with a working set that turns over in this time, or without one if it is 0, and its error: least squares of
    /// relative errors, none of the parts negative.
    fn fit(&self, turnover_s: f64) -> (Curve, f64) {
        let share = |point: &Point| {
            if turnover_s > 0.0 { -(-point.interval_s / turnover_s).exp_m1() } else { 0.0 }
        };
        let (mut xx, mut xy, mut yy, mut x, mut y) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for point in &self.points {
            let weight = f64::from(point.seen.min(SETTLED));
            let (line, set) = (point.interval_s / point.bytes, share(point) / point.bytes);
            xx += weight * line * line;
            xy += weight * line * set;
            yy += weight * set * set;
            x += weight * line;
            y += weight * set;
        }
        let determinant = xx * yy - xy * xy;
        let both = ((x * yy - y * xy) / determinant, (y * xx - x * xy) / determinant);
        let parts = match both {
            (rate, set) if determinant > 1e-9 * xx * yy && rate >= 0.0 && set >= 0.0 => both,
            (rate, _) if yy > 0.0 && rate < 0.0 => (0.0, y / yy),
            _ => (x / xx, 0.0),
        };
        let curve = Curve { bytes_per_s: parts.0, working_set_bytes: parts.1, turnover_s };
        let error = |point: &Point| {
            f64::from(point.seen.min(SETTLED)) * (curve.bytes(point.interval_s) / point.bytes - 1.0).powi(2)
        };
        (curve, self.points.iter().map(error).sum())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn working_set(interval_s: f64) -> f64 {
        1e8 * (1.0 - (-interval_s / 3.0).exp()) + 1e6 * interval_s
    }

    #[test]
    fn a_working_set_is_learned_from_a_few_lengths() {
        let mut dirty = Dirty::default();
        for interval_s in [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0] {
            dirty.add(interval_s, working_set(interval_s));
        }
        for interval_s in [0.1, 0.7, 3.0, 6.0, 20.0, 60.0] {
            let (found, is) = (dirty.curve().bytes(interval_s), working_set(interval_s));
            assert!((found / is - 1.0).abs() < 0.1, "{found} behind {interval_s} s, not {is}");
        }
    }

    #[test]
    fn a_single_length_is_taken_for_a_rate_and_none_for_nothing() {
        let mut dirty = Dirty::default();
        assert!(dirty.curve().bytes(5.0) <= 0.0 && !dirty.knows(5.0));
        dirty.add(10.0, 1e6);
        for (interval_s, bytes) in [(1.0, 1e5), (10.0, 1e6), (100.0, 1e7)] {
            assert!((dirty.curve().bytes(interval_s) / bytes - 1.0).abs() < 1e-9);
        }
        assert!(dirty.knows(10.0) && dirty.knows(12.0) && !dirty.knows(20.0));
    }

    #[test]
    fn an_interval_that_no_clock_measures_is_not_counted() {
        let mut dirty = Dirty::default();
        dirty.add(1.0, 1e6);
        for interval_s in [f64::MAX, f64::INFINITY, f64::NAN, -1.0, 0.0] {
            dirty.add(interval_s, 1e6);
        }
        assert!((dirty.curve().bytes(2.0) / 2e6 - 1.0).abs() < 1e-9);
    }

    #[test]
    fn what_changes_at_one_length_is_believed_of_the_others() {
        let mut dirty = Dirty::default();
        for interval_s in [1.0, 10.0] {
            dirty.add(interval_s, working_set(interval_s));
        }
        for _ in 0..30 {
            dirty.add(10.0, 5.0 * working_set(10.0));
        }
        let found = dirty.curve().bytes(1.0) / working_set(1.0);
        assert!((4.5..5.5).contains(&found), "{found}");
    }

    proptest! {
        #[test]
        fn whatever_was_seen_the_answer_is_a_number_that_grows(
            seen in proptest::collection::vec((proptest::num::f64::ANY, proptest::num::f64::POSITIVE), 0..20),
            interval_s in 0.0..1e9,
        ) {
            let mut dirty = Dirty::default();
            for (length, bytes) in seen {
                dirty.add(length, bytes.min(1e18));
            }
            let (curve, longer_s) = (dirty.curve(), interval_s * 1.5);
            prop_assert!(curve.bytes(interval_s) >= 0.0 && curve.bytes(interval_s) <= curve.bytes(longer_s), "{:?}", curve);
        }
    }
}

//! What writes to memory, guessed from how many pages were dirty behind intervals of several lengths.
//!
//! Pages that are written often are dirty behind any interval, others only behind long ones. So the number of dirty pages
//! over the length of the interval tells how many pages are written how often: it is a sum of `n (1 - exp(-t / T))` over
//! groups of `n` pages that are written every `T` on average. The `T`s are set, the `n`s are found.

use super::simulate::{Group, Workload};

/// Steps of the search; it has long come to rest by then.
const STEPS: u32 = 4000;

/// Pages that were dirty behind an interval in which they were clean at first.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Sample {
    /// The interval's length.
    pub interval_s: f64,
    /// Dirty pages.
    pub pages: f64,
}

/// The workload that explains these samples, in memory of so many pages.
pub fn workload_of(samples: &[Sample], memory_pages: f64) -> Workload {
    let samples = plausible(samples);
    let Some(longest_s) = samples.iter().map(|sample| sample.interval_s).reduce(f64::max) else {
        return Workload::default();
    };
    let mut every_s: Vec<f64> = samples.iter().map(|sample| sample.interval_s / 2.0).collect();
    // Pages that are written less often than was watched look like a steady growth.
    every_s.extend([longest_s * 2.0, longest_s * 16.0]);
    let share = |sample: &Sample, every_s: f64| 1.0 - (-sample.interval_s / every_s).exp();
    // A sample counts by its relative error, but none counts much for being small.
    let most = samples.iter().map(|sample| sample.pages).fold(1.0, f64::max);
    let weight = |sample: &Sample| 1.0 / sample.pages.max(most / 10.0).powi(2);
    let mut pages = vec![0.0; every_s.len()];
    for _ in 0..STEPS {
        for group in 0..every_s.len() {
            let (mut wanted, mut scale) = (0.0, 0.0);
            for sample in &samples {
                let others: f64 = (0..every_s.len())
                    .filter(|other| *other != group)
                    .map(|other| pages[other] * share(sample, every_s[other]))
                    .sum();
                let part = share(sample, every_s[group]);
                wanted += weight(sample) * part * (sample.pages - others);
                scale += weight(sample) * part * part;
            }
            pages[group] = (wanted / scale).clamp(0.0, memory_pages);
        }
    }
    let groups = pages.iter().zip(&every_s).filter(|(pages, _)| **pages >= 1.0);
    let groups = groups.map(|(pages, every_s)| Group { pages: *pages, writes_per_s: pages / every_s });
    Workload { groups: groups.collect(), pulse: None }
}

/// Samples that a workload can have made which writes all the time: in a longer interval there are no fewer dirty pages,
/// and in a part of it no less than that part of them. On a busy host a short interval may pass while the workload waits
/// for a CPU, and what it did not write then is told by the others.
fn plausible(samples: &[Sample]) -> Vec<Sample> {
    let samples = samples.iter().filter(|sample| sample.interval_s > 0.0);
    let least = |interval_s: f64| {
        let told = samples.clone().map(|other| other.pages * (interval_s / other.interval_s).min(1.0));
        told.fold(0.0, f64::max)
    };
    samples.clone().map(|sample| Sample { pages: least(sample.interval_s), ..*sample }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const INTERVALS_S: [f64; 5] = [0.01, 0.03, 0.1, 0.3, 1.0];

    fn samples(groups: &[(f64, f64)]) -> Vec<Sample> {
        let dirty = |t: f64| groups.iter().map(|(pages, every_s)| pages * (1.0 - (-t / every_s).exp())).sum();
        INTERVALS_S.iter().map(|t| Sample { interval_s: *t, pages: dirty(*t) }).collect()
    }

    fn dirty(workload: &Workload, t: f64) -> f64 {
        workload
            .groups
            .iter()
            .map(|group| group.pages * (1.0 - (-t * group.writes_per_s / group.pages).exp()))
            .sum()
    }

    #[test]
    fn what_was_watched_is_explained_and_goes_on_alike() {
        for groups in
            [&[(2000.0, 0.02)][..], &[(500.0, 0.005), (60_000.0, 1.5)], &[(65_536.0, 0.3)], &[(1e6, 50.0)]]
        {
            let samples = samples(groups);
            let workload = workload_of(&samples, 4e6);
            let most = samples.iter().map(|sample| sample.pages).fold(0.0, f64::max);
            for sample in &samples {
                let off = (dirty(&workload, sample.interval_s) - sample.pages).abs();
                assert!(off < 0.15 * sample.pages.max(most / 10.0), "{groups:?}: {off} off {sample:?}");
            }
            let expected: f64 =
                groups.iter().map(|(pages, every_s)| pages * (1.0 - (-3.0_f64 / every_s).exp())).sum();
            let found = dirty(&workload, 3.0);
            assert!(
                (0.6..1.7).contains(&(found / expected)),
                "{groups:?}: {found}, not {expected} behind 3 s"
            );
        }
    }

    #[test]
    fn an_interval_in_which_the_workload_did_not_get_to_run_does_not_hide_it() {
        let mut samples = samples(&[(4096.0, 0.05)]);
        samples[0].pages = 0.0;
        samples[1].pages = 5.0;
        let found = dirty(&workload_of(&samples, 16_384.0), 0.5);
        assert!((3000.0..5500.0).contains(&found), "{found}");
    }

    #[test]
    fn nothing_comes_of_nothing() {
        assert_eq!(workload_of(&[], 1e6), Workload::default());
        let idle = INTERVALS_S.map(|interval_s| Sample { interval_s, pages: 0.0 });
        assert!(workload_of(&idle, 1e6).groups.is_empty());
        assert!(workload_of(&[Sample { interval_s: 0.0, pages: 5.0 }], 1e6).groups.is_empty());
    }
}

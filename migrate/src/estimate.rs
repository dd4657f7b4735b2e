//! What a move would take, without moving anything.
//!
//! ```text
//! watch (which pages become dirty in 10 ms … 1 s, and what a sample of them is like) ─▶ fit ─▶ simulate over a path ─▶ forecast
//! ```
//!
//! The VM runs on meanwhile, a little slower: every page that is written for the first time in an interval costs it a
//! fault of 2 to 3 us. Tracking ends with the watch, so that the next move begins with every page, as it must.

mod contents;

pub use contents::Contents;

use crate::cancel::CancelFlag;
use crate::converge::fit::{Sample, workload_of};
use crate::converge::policies::Policy;
use crate::converge::simulate::{Came, Path, Plan, simulate};
use crate::converge::{Decision, Limits};
use crate::error::Result;
use crate::outbound::LEARNS_BYTES;
use crate::report::{micros, rate};
use crate::select::hot::HotRule;
use crate::select::{Batch, Selector, batches};
use crate::source::{Dirty, Source};
use contents::Versions;
use protocol::page::{PAGE_SIZE, PageSet};
use serde::Serialize;
use std::time::{Duration, Instant};

/// The intervals that are watched, as parts of the longest.
const PARTS: [f64; 5] = [0.01, 0.03, 0.1, 0.3, 1.0];

/// How many parts of a space are told apart.
const REGIONS: u64 = 32;

/// How long a wait goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

/// Seeds that are simulated; the middle one is told.
const SEEDS: u64 = 5;

/// What was seen of a workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Watched {
    /// Pages that were ever touched: what the first round sends.
    pub present_pages: u64,
    /// The intervals, shortest first.
    pub intervals: Vec<Interval>,
    /// Where the pages were dirty behind the longest interval; parts without any are left out.
    pub regions: Vec<Region>,
    /// What a sample of all memory was made of.
    pub memory: Contents,
    /// What pages were made of that were dirty behind the longest interval.
    pub dirtied: Contents,
}

/// One interval at whose beginning every page was clean.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Interval {
    /// Its length.
    pub interval_us: u64,
    /// Pages that were dirty at its end.
    pub dirty_pages: u64,
    /// Their bytes by its length.
    pub dirty_bytes_per_s: u64,
}

/// A part of a space.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Region {
    /// The space.
    pub space: u16,
    /// Its first page.
    pub first_page: u64,
    /// Its pages.
    pub pages: u64,
    /// Those of them that were dirty.
    pub dirty_pages: u64,
}

/// Watches a running workload, and lets go of it.
///
/// # Errors
/// `Workload`, or `Interrupted`; it runs on in any case.
pub fn watch(mut source: Box<dyn Source>, longest: Duration, cancel: &CancelFlag) -> Result<Watched> {
    let watched = look(source.as_mut(), longest, cancel);
    // Nothing that was taken was delivered, and with the end of the tracking it counts as dirty again.
    let let_go = source.resume();
    let watched = watched?;
    let_go.map(|()| watched)
}

fn look(source: &mut dyn Source, longest: Duration, cancel: &CancelFlag) -> Result<Watched> {
    source.track(Dirty::Everything)?;
    let present = present(source)?;
    let memory = Versions::read(source, &present)?;
    take_all(source)?;
    let (mut intervals, mut dirty) = (Vec::new(), Vec::new());
    let mut before = Versions::default();
    for part in PARTS {
        before = Versions::read(source, &dirty)?;
        let begun = Instant::now();
        take_all(source)?;
        // A page was cleared some time in between: halfway on average.
        let clean_at = begun + begun.elapsed() / 2;
        let until = clean_at + longest.mul_f64(part);
        while Instant::now() < until {
            cancel.check()?;
            std::thread::sleep(until.saturating_duration_since(Instant::now()).min(SLICE));
        }
        dirty = harvest(source)?;
        let interval = clean_at.elapsed();
        let dirty_pages: u64 = dirty.iter().map(PageSet::count).sum();
        let dirty_bytes_per_s = rate(dirty_pages * PAGE_SIZE as u64, interval);
        intervals.push(Interval { interval_us: micros(interval), dirty_pages, dirty_bytes_per_s });
    }
    // The same pages as before the longest interval, so that what changed in them is seen.
    let mut dirtied = before.again(source, &dirty)?;
    if dirtied.is_empty() {
        dirtied = Versions::read(source, &dirty)?;
    }
    Ok(Watched {
        present_pages: present.iter().map(PageSet::count).sum(),
        intervals,
        regions: (0u16..).zip(&dirty).flat_map(|(space, set)| regions_of(space, set)).collect(),
        memory: memory.contents(&Versions::default()),
        dirtied: dirtied.contents(&before),
    })
}

fn harvest(source: &mut dyn Source) -> Result<Vec<PageSet>> {
    let harvest = source.harvest()?;
    Selector::Precopy.plan(&source.workload().layout, harvest)
}

fn take_all(source: &mut dyn Source) -> Result<()> {
    for Batch { space, first, count, .. } in batches(&harvest(source)?) {
        source.take(space, first, count)?;
    }
    Ok(())
}

fn present(source: &mut dyn Source) -> Result<Vec<PageSet>> {
    let mut sets = Vec::new();
    for space in source.workload().layout.spaces.clone() {
        let mut set = PageSet::full(space.pages);
        source.present(space.id, 0, space.pages, &mut set)?;
        sets.push(set);
    }
    Ok(sets)
}

fn regions_of(space: u16, set: &PageSet) -> Vec<Region> {
    let pages = set.pages().div_ceil(REGIONS).next_multiple_of(64).max(64);
    let firsts = (0..set.pages()).step_by(pages as usize);
    let regions = firsts.map(|first_page| {
        let words = set.words().iter().skip((first_page / 64) as usize).take((pages / 64) as usize);
        let dirty_pages = words.map(|word| u64::from(word.count_ones())).sum();
        Region { space, first_page, pages: pages.min(set.pages() - first_page), dirty_pages }
    });
    regions.filter(|region| region.dirty_pages > 0).collect()
}

/// What moving a workload over one path would come to.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Forecast {
    /// Bytes a second that were counted with.
    pub bandwidth_bytes_per_s: u64,
    /// Whether it would fit the downtime budget without being slowed down.
    pub converges: bool,
    /// The word that would end the rounds.
    #[serde(flatten)]
    pub decided: Decision,
    /// Rounds while it runs.
    pub rounds: u64,
    /// Bytes in all.
    pub sent_bytes: u64,
    /// From the first page to its start there.
    pub total_us: u64,
    /// How long it would stand still; 0 where it would stay.
    pub downtime_us: u64,
    /// The most that it would be slowed down, in percent.
    pub throttle_percent: u8,
    /// How long it would run there before its last page came: with post-copy.
    pub follow_us: u64,
}

/// What both ends can do with a workload that does not converge.
#[derive(Debug, Clone, Copy)]
pub struct Ways {
    /// Slow it down.
    pub can_throttle: bool,
    /// Start it there before its memory has arrived.
    pub can_post_copy: bool,
}

/// Forecasts a move over a path; `ways` are what the two ends can do.
pub fn forecast(watched: &Watched, path: Path, limits: &Limits, ways: Ways) -> Forecast {
    let sample = |interval: &Interval| Sample {
        interval_s: interval.interval_us as f64 / 1e6,
        pages: interval.dirty_pages as f64,
    };
    let samples: Vec<Sample> = watched.intervals.iter().map(sample).collect();
    let memory_pages = watched.present_pages as f64;
    let workload = &workload_of(&samples, memory_pages);
    let (Ways { can_throttle, can_post_copy }, policy) = (ways, Policy::Migrate);
    let bandwidth = path.bandwidth_bytes_per_s;
    let run = |seed| {
        let hot = HotRule::default();
        let (first, later) = (watched.memory.cost(bandwidth), watched.dirtied.cost(bandwidth));
        simulate(&Plan {
            workload,
            memory_pages,
            path,
            learns_bytes: LEARNS_BYTES as f64,
            first,
            later,
            limits,
            can_throttle,
            can_post_copy,
            policy,
            hot,
            seed,
        })
    };
    let mut runs: Vec<Came> = (0..SEEDS).map(run).collect();
    runs.sort_by(|left, right| left.total_s.total_cmp(&right.total_s));
    let came = runs.swap_remove(runs.len() / 2);
    let throttle_percent = came.rounds.iter().map(|round| round.throttle_percent).max().unwrap_or(0);
    Forecast {
        bandwidth_bytes_per_s: path.bandwidth_bytes_per_s as u64,
        converges: matches!(came.decision, Decision::Freeze { .. }) && throttle_percent == 0,
        decided: came.decision,
        rounds: came.rounds.len() as u64,
        sent_bytes: came.bytes as u64,
        total_us: (came.total_s * 1e6) as u64,
        downtime_us: (came.downtime_s * 1e6) as u64,
        throttle_percent,
        follow_us: (came.follow_s * 1e6) as u64,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watched(dirty_pages: [u64; 5]) -> Watched {
        let intervals = PARTS.iter().zip(dirty_pages);
        let intervals = intervals.map(|(part, dirty_pages)| Interval {
            interval_us: (part * 1e6) as u64,
            dirty_pages,
            dirty_bytes_per_s: 0,
        });
        let (memory, dirtied) = (Contents::default(), Contents::default());
        Watched { present_pages: 262_144, intervals: intervals.collect(), regions: vec![], memory, dirtied }
    }

    #[test]
    fn a_forecast_tells_what_converges() {
        let path = Path { bandwidth_bytes_per_s: 1.25e9, overhead_s: 0.001, fixed_s: 0.003 };
        let limits = Limits::default();
        let all = Ways { can_throttle: true, can_post_copy: true };
        let idle = forecast(&watched([0; 5]), path, &limits, all);
        assert!(idle.converges && idle.rounds == 1 && idle.downtime_us < 10_000, "{idle:?}");
        assert!((700_000..1_100_000).contains(&idle.total_us), "1 GiB at 1.25 GB/s: {idle:?}");
        // 100 MB/s of new pages, then 3 GB/s.
        let busy = forecast(&watched([244, 732, 2441, 7324, 24_414]), path, &limits, all);
        assert!(busy.converges && busy.rounds > idle.rounds, "{busy:?}");
        let thrashing = watched([7324, 21_972, 73_242, 180_000, 262_000]);
        let slowed = forecast(&thrashing, path, &limits, all);
        assert!(!slowed.converges && slowed.throttle_percent > 0, "{slowed:?}");
        let follows = forecast(&thrashing, path, &limits, Ways { can_throttle: false, ..all });
        assert!(!follows.converges && follows.decided.name() == "post-copy", "{follows:?}");
        assert!(follows.downtime_us < 10_000 && follows.follow_us > 100_000, "{follows:?}");
        let stays = forecast(&thrashing, path, &limits, Ways { can_throttle: false, can_post_copy: false });
        assert!(!stays.converges && stays.decided.name() == "give-up" && stays.downtime_us == 0, "{stays:?}");
    }

    #[test]
    fn regions_cover_a_space_of_any_size() {
        for pages in [1, 63, 64, 1000, 4097, 262_144] {
            let regions = regions_of(3, &PageSet::full(pages));
            assert_eq!(regions.iter().map(|region| region.pages).sum::<u64>(), pages);
            assert_eq!(regions.iter().map(|region| region.dirty_pages).sum::<u64>(), pages);
            assert!(regions.len() as u64 <= REGIONS);
        }
    }
}

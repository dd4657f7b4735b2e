//! In which order a workload touched its pages first, and what earlier restores say about that. Pure.

use protocol::checkpoint::touched::MAX_RUNS;
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet, SpaceId};

/// What is touched now. Bounded: what comes behind [`MAX_RUNS`] runs is not recorded, and matters little by then.
pub(super) struct Recorder {
    seen: Vec<PageSet>,
    runs: Vec<PageRun>,
}

impl Recorder {
    /// Nothing was touched yet.
    pub(super) fn new(layout: &Layout) -> Self {
        Self {
            seen: layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect(),
            runs: Vec::new(),
        }
    }

    /// Somebody touched this page.
    pub(super) fn note(&mut self, space: SpaceId, page: u64) {
        let Some(seen) = self
            .seen
            .get_mut(usize::from(space.0))
            .filter(|seen| page < seen.pages() && !seen.contains(page))
        else {
            return;
        };
        let room = self.runs.len() < MAX_RUNS;
        match self.runs.last_mut() {
            Some(run) if run.space == space && run.end() == page && run.count < u32::MAX => run.count += 1,
            _ if room => self.runs.push(PageRun { space, first: page, count: 1 }),
            _ => return,
        }
        seen.insert(page, 1);
    }

    /// The order so far.
    pub(super) fn runs(&self) -> &[PageRun] {
        &self.runs
    }
}

/// One order of several: a run of each in turn, so that what any of them touched early comes early. What came before is not left out:
/// whoever walks the order does so.
pub(super) fn merged(records: &[Vec<PageRun>]) -> Vec<PageRun> {
    let longest = records.iter().map(Vec::len).max().unwrap_or(0);
    (0..longest).flat_map(|at| records.iter().filter_map(move |record| record.get(at).copied())).collect()
}

#[cfg(test)]
mod tests {
    use super::super::plan::tests::layout;
    use super::*;

    fn run(space: u16, first: u64, count: u32) -> PageRun {
        PageRun { space: SpaceId(space), first, count }
    }

    #[test]
    fn first_touches_are_recorded_in_their_order_and_once() {
        let mut recorder = Recorder::new(&layout());
        for (space, page) in [(0, 5), (0, 6), (0, 5), (1, 7), (0, 7), (0, 8), (0, 300), (2, 0)] {
            recorder.note(SpaceId(space), page);
        }
        assert_eq!(recorder.runs(), [run(0, 5, 2), run(1, 7, 1), run(0, 7, 2)]);
    }

    #[test]
    fn a_record_is_bounded() {
        let layout = Layout {
            spaces: vec![protocol::layout::Space {
                pages: 4 * MAX_RUNS as u64,
                ..layout().spaces[0].clone()
            }],
        };
        let mut recorder = Recorder::new(&layout);
        (0..4 * MAX_RUNS as u64).step_by(2).for_each(|page| recorder.note(SpaceId(0), page));
        assert_eq!(recorder.runs().len(), MAX_RUNS);
    }

    #[test]
    fn what_any_record_has_early_comes_early() {
        let records = [vec![run(0, 1, 1), run(0, 9, 1)], vec![run(0, 5, 2)], vec![]];
        assert_eq!(merged(&records), [run(0, 1, 1), run(0, 5, 2), run(0, 9, 1)]);
        assert_eq!(merged(&[]), []);
    }
}

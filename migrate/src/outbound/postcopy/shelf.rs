//! What is still to be sent, and what comes next. Pure.
//!
//! A page that somebody waits for goes first, alone, so that nothing stands between it and the vCPU. Behind it come its
//! neighbours, which are touched next more often than not, and then the push goes on from there: a guest that walks
//! through its memory meets one fault and then the push. Every page leaves the shelf once.

use protocol::frame::{MAX_FRAME_PAGES, STRIPE_PAGES};
use protocol::page::{PageRun, PageSet, SpaceId};
use std::collections::VecDeque;

/// Pages around one that was asked for: 256 KiB, 0.25 ms of a 10 Gbit/s link. Twelve before it, the rest behind.
const WINDOW_PAGES: u64 = 64;
const BEFORE_PAGES: u64 = 12;

/// The pages that the destination misses.
#[derive(Debug)]
pub(super) struct Shelf {
    left: Vec<PageSet>,
    left_pages: u64,
    asked: VecDeque<PageRun>,
    neighbours: VecDeque<PageRun>,
    /// Where the push goes on.
    at: (usize, u64),
}

/// Why a run is sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    Asked,
    Neighbour,
}

impl Shelf {
    /// Everything that is missing, one set for each space.
    pub(super) fn new(missing: Vec<PageSet>) -> Self {
        let left_pages = missing.iter().map(PageSet::count).sum();
        Self { left: missing, left_pages, asked: VecDeque::new(), neighbours: VecDeque::new(), at: (0, 0) }
    }

    /// Pages that were not taken yet.
    pub(super) fn left_pages(&self) -> u64 {
        self.left_pages
    }

    /// Somebody waits for this page. One that was taken already is on its way.
    pub(super) fn want(&mut self, space: SpaceId, page: u64) {
        let index = usize::from(space.0);
        let Some(left) = self.left.get(index).filter(|left| left.contains(page)) else {
            // It may be waiting among the neighbours.
            self.hurry(space, page);
            return;
        };
        let (begin, limit) =
            (page.saturating_sub(BEFORE_PAGES), page.saturating_sub(BEFORE_PAGES) + WINDOW_PAGES);
        let mut near: Vec<(u64, u64)> = Vec::new();
        let mut at = begin;
        while let Some(first) = left.next_set(at).filter(|first| *first < limit) {
            let end = left.next_clear(first).min(limit);
            near.push((first, end));
            at = end;
        }
        self.take(PageRun { space, first: page, count: 1 });
        self.asked.push_back(PageRun { space, first: page, count: 1 });
        // Behind the page first: most walk upwards.
        let parts = near.iter().flat_map(|(first, end)| {
            [((*first).max(page + 1), *end), (*first, (*end).min(page))].into_iter().filter(|(a, b)| a < b)
        });
        let (behind, before): (Vec<_>, Vec<_>) = parts.partition(|(first, _)| *first > page);
        for (first, end) in behind.into_iter().chain(before) {
            let mut first = first;
            while first < end {
                let run = cut(space, first, end);
                self.take(run);
                self.neighbours.push_back(run);
                first = run.end();
            }
        }
        self.at = (index, limit);
    }

    /// The next run for the stream of those that were asked for.
    pub(super) fn next_asked(&mut self) -> Option<(PageRun, Why)> {
        let asked = self.asked.pop_front().map(|run| (run, Why::Asked));
        asked.or_else(|| self.neighbours.pop_front().map(|run| (run, Why::Neighbour)))
    }

    /// The next run of the push.
    pub(super) fn next_pushed(&mut self) -> Option<PageRun> {
        if self.left_pages == 0 {
            return None;
        }
        // From where it stands to the end, then from the beginning on.
        for turn in 0..=self.left.len() {
            let index = (self.at.0 + turn) % self.left.len().max(1);
            let from = if turn == 0 { self.at.1 } else { 0 };
            let Some(set) = self.left.get(index) else { continue };
            if let Some(first) = set.next_set(from) {
                let run = cut(SpaceId(index as u16), first, set.next_clear(first));
                self.take(run);
                self.at = (index, run.end());
                return Some(run);
            }
        }
        None
    }

    /// A page that waits among the neighbours is asked for now.
    fn hurry(&mut self, space: SpaceId, page: u64) {
        let holds = |run: &PageRun| run.space == space && (run.first..run.end()).contains(&page);
        if let Some(at) = self.neighbours.iter().position(holds)
            && let Some(run) = self.neighbours.remove(at)
        {
            self.asked.push_back(run);
        }
    }

    fn take(&mut self, run: PageRun) {
        if let Some(set) = self.left.get_mut(usize::from(run.space.0)) {
            set.remove(run.first, u64::from(run.count));
            self.left_pages -= u64::from(run.count);
        }
    }
}

/// The beginning of a range that fits a frame.
fn cut(space: SpaceId, first: u64, end: u64) -> PageRun {
    let stripe_end = (first / STRIPE_PAGES + 1) * STRIPE_PAGES;
    let end = end.min(stripe_end).min(first + u64::from(MAX_FRAME_PAGES));
    PageRun { space, first, count: (end - first) as u32 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn every_page_leaves_once_and_what_is_wanted_leaves_next(
            missing in proptest::collection::vec((0usize..2, 0u64..3000, 1u64..300), 1..20),
            wants in proptest::collection::vec((0u16..3, 0u64..3100, 0usize..6), 0..60),
        ) {
            let mut sets = vec![PageSet::empty(3000), PageSet::empty(700)];
            missing.iter().for_each(|(space, first, count)| sets[*space].insert(*first, *count));
            let mut shelf = Shelf::new(sets.clone());
            let mut seen = vec![PageSet::empty(3000), PageSet::empty(700)];
            let mut leave = |run: PageRun| {
                assert!(run.count >= 1 && run.count <= MAX_FRAME_PAGES);
                assert_eq!(run.first / STRIPE_PAGES, (run.end() - 1) / STRIPE_PAGES);
                let set = &mut seen[usize::from(run.space.0)];
                assert_eq!(set.count_in(run.first, u64::from(run.count)), 0, "{run:?} twice");
                set.insert(run.first, u64::from(run.count));
            };
            for (space, page, pushes) in wants {
                for _ in 0..pushes {
                    shelf.next_pushed().into_iter().for_each(&mut leave);
                }
                let here = shelf.left.get(usize::from(space)).is_some_and(|set| set.contains(page));
                shelf.want(SpaceId(space), page);
                if here {
                    let last = shelf.asked.back().copied().unwrap();
                    prop_assert_eq!((last.space, last.first, last.count), (SpaceId(space), page, 1));
                }
                if pushes % 2 == 0 && let Some((run, _)) = shelf.next_asked() {
                    leave(run);
                }
            }
            while let Some((run, _)) = shelf.next_asked() {
                leave(run);
            }
            while let Some(run) = shelf.next_pushed() {
                leave(run);
            }
            prop_assert_eq!(shelf.left_pages(), 0);
            prop_assert_eq!(seen, sets);
        }
    }

    #[test]
    fn the_push_goes_on_behind_a_fault() {
        let mut shelf = Shelf::new(vec![PageSet::full(10_000)]);
        let space = SpaceId(0);
        assert_eq!(shelf.next_pushed().unwrap().first, 0);
        shelf.want(space, 5000);
        assert_eq!(shelf.next_asked(), Some((PageRun { space, first: 5000, count: 1 }, Why::Asked)));
        let (run, why) = shelf.next_asked().unwrap();
        assert_eq!((run.first, why), (5001, Why::Neighbour));
        assert_eq!(shelf.next_asked().unwrap().0.first, 4988);
        assert_eq!(shelf.next_pushed().unwrap().first, 5052);
    }

    #[test]
    fn a_neighbour_that_is_wanted_overtakes() {
        let mut shelf = Shelf::new(vec![PageSet::full(10_000)]);
        shelf.want(SpaceId(0), 600);
        shelf.want(SpaceId(0), 4000);
        shelf.want(SpaceId(0), 601);
        let order: Vec<_> = (0..3).map(|_| shelf.next_asked().unwrap()).map(|(run, _)| run.first).collect();
        assert_eq!(order, [600, 4000, 601]);
    }
}

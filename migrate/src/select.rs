//! Which pages now, in which order, and in which portions.
//!
//! ```text
//! harvest ─▶ plan ─▶ batches (taken with one call) ─▶ pieces (read into one buffer, one stream)
//! ```
//!
//! A *batch* is a range of one space with a bounded number of dirty pages. Its pages are cleared right before they
//! are read, so what the workload writes meanwhile to the rest of a round is still sent with this round and not
//! again with the next. A *piece* is some runs of a batch within one stripe, and so for one page stream.

pub mod hot;

use crate::error::{Error, Result};
use protocol::frame::{MAX_FRAME_PAGES, STRIPE_PAGES};
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet, SpaceId};

/// The most dirty pages in a batch: 8 MiB, about 15 ms of a 5 Gbit/s link. Shorter costs more calls into the VMM,
/// longer lets more pages be dirtied again between being cleared and being read.
pub const BATCH_PAGES: u64 = 2048;

/// Batches begin and end at multiples of this many pages, because KVM clears its log in words of 64 bits.
pub const BATCH_ALIGN: u64 = 64;

/// What a round sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Selector {
    /// Everything, whatever is dirty: the first round.
    Full,
    /// What is dirty: every other round.
    Precopy,
}

impl Selector {
    /// The pages of a round, one set for each space, from those that were harvested.
    ///
    /// # Errors
    /// `Workload` when the harvest does not fit the layout.
    pub fn plan(self, layout: &Layout, harvest: Vec<PageSet>) -> Result<Vec<PageSet>> {
        let fits = harvest.len() == layout.spaces.len()
            && harvest.iter().zip(&layout.spaces).all(|(set, space)| set.pages() == space.pages);
        if !fits {
            return Err(Error::Workload(
                "the VMM's dirty pages do not fit the memory layout it described: it is not safe to move it"
                    .into(),
            ));
        }
        Ok(match self {
            Self::Full => layout.spaces.iter().map(|space| PageSet::full(space.pages)).collect(),
            Self::Precopy => harvest,
        })
    }
}

/// A range whose dirty pages are taken with one call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batch {
    /// The space.
    pub space: SpaceId,
    /// First page, a multiple of [`BATCH_ALIGN`].
    pub first: u64,
    /// Length in pages; a multiple of [`BATCH_ALIGN`] unless it ends with the space.
    pub count: u64,
    /// Pages of the plan in it, at most [`BATCH_PAGES`].
    pub dirty_pages: u64,
}

/// The batches of a plan, in ascending order. Together they cover it; ranges without dirty pages between two batches
/// belong to neither.
pub fn batches(plan: &[PageSet]) -> impl Iterator<Item = Batch> + '_ {
    (0u16..).zip(plan).flat_map(|(space, set)| {
        let mut at = 0;
        std::iter::from_fn(move || {
            let batch = next_batch(SpaceId(space), set, at)?;
            at = batch.first + batch.count;
            Some(batch)
        })
    })
}

fn next_batch(space: SpaceId, set: &PageSet, from: u64) -> Option<Batch> {
    let first = set.next_set(from)? / BATCH_ALIGN * BATCH_ALIGN;
    let (mut end, mut dirty_pages) = (first, 0);
    for word in &set.words()[(first / BATCH_ALIGN) as usize..] {
        let more = u64::from(word.count_ones());
        if dirty_pages + more > BATCH_PAGES {
            break;
        }
        dirty_pages += more;
        end += BATCH_ALIGN;
        if dirty_pages == BATCH_PAGES {
            break;
        }
    }
    Some(Batch { space, first, count: end.min(set.pages()) - first, dirty_pages })
}

/// The pages of one batch: a copy of that part of a set.
#[derive(Debug, Clone)]
pub struct Window {
    space: SpaceId,
    first: u64,
    /// Page 0 of this set is page `first` of the space.
    pages: PageSet,
}

impl Window {
    /// The part of `set` that lies in `batch`.
    ///
    /// # Errors
    /// `Protocol` when the batch lies outside the set.
    pub fn of(set: &PageSet, batch: &Batch) -> Result<Self> {
        let words =
            (batch.first / BATCH_ALIGN) as usize..(batch.first + batch.count).div_ceil(BATCH_ALIGN) as usize;
        let words = set.words().get(words).unwrap_or(&[]).to_vec();
        let pages = PageSet::from_words(batch.count, words)?;
        Ok(Self { space: batch.space, first: batch.first, pages })
    }

    /// Without the pages of another window of the same batch.
    #[must_use]
    pub fn without(mut self, other: &Self) -> Self {
        self.pages.subtract(&other.pages);
        self
    }

    /// Number of pages.
    pub fn count(&self) -> u64 {
        self.pages.count()
    }

    /// The pages as pieces, in ascending order.
    pub fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let stripe = (self.first + self.pages.next_set(at)?) / STRIPE_PAGES;
            let stripe_end = ((stripe + 1) * STRIPE_PAGES - self.first).min(self.pages.pages());
            let mut piece = Piece { runs: Vec::new(), pages: 0 };
            while piece.pages < MAX_FRAME_PAGES {
                let Some(first) = self.pages.next_set(at).filter(|first| *first < stripe_end) else { break };
                let room = u64::from(MAX_FRAME_PAGES - piece.pages);
                at = self.pages.next_clear(first).min(stripe_end).min(first + room);
                let count = (at - first) as u32;
                piece.runs.push(PageRun { space: self.space, first: self.first + first, count });
                piece.pages += count;
            }
            Some(piece)
        })
    }
}

/// Some runs of one stripe, together no longer than a frame may be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Piece {
    /// The runs, in ascending order, at least one.
    pub runs: Vec<PageRun>,
    /// Their pages together.
    pub pages: u32,
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::layout::{Space, SpaceKind};

    fn any_set() -> impl Strategy<Value = PageSet> {
        let runs = proptest::collection::vec((0u64..9000, 1u64..3000), 0..12);
        (1u64..9000, runs).prop_map(|(pages, runs)| {
            let mut set = PageSet::empty(pages);
            for (first, count) in runs {
                set.insert(first, count);
            }
            set
        })
    }

    proptest! {
        #[test]
        fn batches_and_pieces_hold_every_page_once_and_no_other(
            plan in proptest::collection::vec(any_set(), 1..3),
        ) {
            let mut seen: Vec<PageSet> = plan.iter().map(|set| PageSet::empty(set.pages())).collect();
            let mut last = None;
            for batch in batches(&plan) {
                let set = &plan[usize::from(batch.space.0)];
                let order = (batch.space, batch.first);
                prop_assert!(last < Some(order), "{batch:?} behind {last:?}");
                last = Some((batch.space, batch.first + batch.count - 1));
                prop_assert!(batch.first.is_multiple_of(BATCH_ALIGN));
                let end = batch.first + batch.count;
                prop_assert!(end.is_multiple_of(BATCH_ALIGN) || end == set.pages());
                prop_assert!(batch.dirty_pages >= 1 && batch.dirty_pages <= BATCH_PAGES);
                let window = Window::of(set, &batch).unwrap();
                prop_assert_eq!(window.count(), batch.dirty_pages);
                prop_assert_eq!(window.clone().without(&window).count(), 0);
                for piece in window.pieces() {
                    prop_assert!(piece.pages <= MAX_FRAME_PAGES);
                    prop_assert_eq!(piece.pages, piece.runs.iter().map(|run| run.count).sum::<u32>());
                    let stripe = piece.runs[0].first / STRIPE_PAGES;
                    for run in piece.runs {
                        prop_assert_eq!(run.space, batch.space);
                        prop_assert!(run.first >= batch.first && run.end() <= end);
                        prop_assert!(run.first / STRIPE_PAGES == stripe && (run.end() - 1) / STRIPE_PAGES == stripe);
                        let seen = &mut seen[usize::from(run.space.0)];
                        for page in run.first..run.end() {
                            prop_assert!(!seen.contains(page), "page {page} twice");
                            seen.insert(page, 1);
                        }
                    }
                }
            }
            prop_assert_eq!(seen, plan);
        }
    }

    #[test]
    fn few_calls_for_a_full_space_and_none_for_an_empty_one() {
        let full = [PageSet::full(1 << 18)];
        assert_eq!(batches(&full).count() as u64, (1 << 18) / BATCH_PAGES);
        assert_eq!(batches(&[PageSet::empty(1 << 18)]).count(), 0);
    }

    #[test]
    fn a_harvest_that_does_not_fit_the_layout_is_refused() {
        let space = Space { id: SpaceId(0), kind: SpaceKind::Memory, pages: 100, guest_address: 0 };
        let layout = Layout { spaces: vec![space] };
        let none = || vec![PageSet::empty(100)];
        assert_eq!(Selector::Precopy.plan(&layout, none()).unwrap(), none());
        assert_eq!(Selector::Full.plan(&layout, none()).unwrap(), [PageSet::full(100)]);
        for wrong in [vec![], vec![PageSet::empty(99)], vec![PageSet::empty(100); 2]] {
            assert!(matches!(Selector::Full.plan(&layout, wrong), Err(Error::Workload(_))));
        }
    }
}

//! Hot pages last: pages that are written again and again wait for the last round.
//!
//! A page that is dirty in every harvest is sent in every round for nothing. So it is learned which pages those are, and
//! a live round leaves them out. Nothing is configured: pages that were dirty in two harvests in a row are candidates,
//! and they are held back only while at least nine of ten candidates that were taken turn out dirty once more. A
//! workload that writes at random shows no such habit, and then nothing is held back.
//!
//! # It is off
//!
//! Measured (docs/convergence.md), it did not pay: a round that leaves the hot pages out is so short that they look cool
//! in it, they are let go, and the long round that follows makes them hot again. Without it the rounds shrink until even
//! hot pages are clean behind most of them, which is what converges. It is here, tested and off, to be measured again.
//!
//! # Nothing is lost
//!
//! A page that is held back and not taken stays dirty in the log, and the next harvest names it again. But ranges are
//! taken whole, and a page that never is taken could never be seen to cool. So there is a third kind of page between
//! dirty and sent: *owed*, taken and not sent.
//!
//! ```text
//!            harvest                    taken with its range
//!  clean ─────────────▶ dirty, held ───────────────────────────▶ owed ──┐
//!                          ▲                                      │     │ cooled: sent by
//!                          └──────── written again ───────────────┘     │ the next round
//!                                                          sent ◀───────┘
//! ```
//!
//! The last round sends what is dirty *and* what is owed, and so does a live round with what has cooled. Its bytes are
//! read behind the `take` that made it owed, so they are never older than its clean bit says. All ranges that were
//! taken are given back when an attempt fails, owed pages too.
//!
//! Each round takes a quarter of the held pages without sending them, which costs the workload a fault for each (2 to
//! 3 us), and the link nothing.

use protocol::page::PageSet;

/// When pages count as hot.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HotRule {
    /// Fewer dirty pages than this are simply sent: 4 MiB are 4 ms of a 10 Gbit/s link.
    pub least_dirty_pages: u64,
    /// The least evidence: candidates that were taken.
    pub least_candidates: u64,
    /// The part of them that must be dirty again.
    pub dirty_again: f64,
}

impl Default for HotRule {
    fn default() -> Self {
        Self { least_dirty_pages: 1024, least_candidates: 64, dirty_again: 0.9 }
    }
}

impl HotRule {
    /// Holds nothing back, ever.
    pub const NEVER: Self =
        Self { least_dirty_pages: u64::MAX, least_candidates: u64::MAX, dirty_again: 2.0 };
}

/// In how many parts the held pages are looked at, one part a round.
const PROBES: u64 = 4;

/// Which pages are hot, and which are owed.
#[derive(Debug)]
pub struct HotPages {
    rule: HotRule,
    /// Whether anything is in the next three. A round over a clean guest shall not walk them.
    learning: bool,
    /// Dirty in the last harvest.
    once: Vec<PageSet>,
    /// Dirty in the last two.
    twice: Vec<PageSet>,
    /// What the next live round leaves out.
    held: Vec<PageSet>,
    /// Taken and not sent.
    owed: Vec<PageSet>,
    /// Of the round that is underway.
    now: Option<Underway>,
    rounds: u64,
}

/// A round that leaves something out, or sends what is owed.
#[derive(Debug)]
struct Underway {
    dirty: Vec<PageSet>,
    sends: Vec<PageSet>,
    taken: Vec<PageSet>,
}

/// What a live round does.
#[derive(Debug)]
pub struct Live {
    /// Pages to take, read and send.
    pub sends: Vec<PageSet>,
    /// Pages to take only, before anything else.
    pub probes: Vec<PageSet>,
}

impl HotPages {
    /// Nothing is known yet of spaces with so many pages.
    pub fn new(pages: &[u64], rule: HotRule) -> Self {
        let empty = || -> Vec<PageSet> { pages.iter().map(|pages| PageSet::empty(*pages)).collect() };
        Self {
            rule,
            learning: false,
            once: empty(),
            twice: empty(),
            held: empty(),
            owed: empty(),
            now: None,
            rounds: 0,
        }
    }

    /// What freezing now would have to send.
    pub fn remaining(&self, harvest: &[PageSet]) -> Vec<PageSet> {
        joined(harvest, &self.owed)
    }

    /// Pages of the last harvest that the next live round leaves out.
    pub fn held_pages(&self) -> u64 {
        count(&self.held)
    }

    /// Begins a live round over what is dirty.
    pub fn begin(&mut self, dirty: Vec<PageSet>) -> Live {
        let none = || -> Vec<PageSet> { dirty.iter().map(|set| PageSet::empty(set.pages())).collect() };
        if is_empty(&self.held) && is_empty(&self.owed) {
            self.now = None;
            let probes = none();
            return Live { sends: dirty, probes };
        }
        let mut sends = joined(&dirty, &self.owed);
        subtract(&mut sends, &self.held);
        let mut probes = none();
        let part = self.rounds % PROBES;
        for (probes, held) in probes.iter_mut().zip(&self.held) {
            pick(held, part, probes);
        }
        self.rounds += 1;
        self.now = Some(Underway { taken: none(), dirty, sends: sends.clone() });
        Live { sends, probes }
    }

    /// A range was taken in this round.
    pub fn taken(&mut self, space: usize, first: u64, pages: u64) {
        if let Some(taken) = self.now.as_mut().and_then(|now| now.taken.get_mut(space)) {
            taken.insert(first, pages);
        }
    }

    /// The round is over: all that it sends was sent, and this is dirty now.
    pub fn end(&mut self, harvest: &[PageSet]) {
        let mut candidates = if self.learning { self.twice.clone() } else { Vec::new() };
        match self.now.take() {
            None => self.owed.iter_mut().for_each(PageSet::clear),
            Some(Underway { dirty, sends, taken }) => {
                // What was held and not taken tells nothing: it could not become clean.
                let mut untouched = dirty.clone();
                subtract(&mut untouched, &taken);
                subtract(&mut candidates, &untouched);
                let mut owed = dirty;
                intersect(&mut owed, &taken);
                self.owed = joined(&self.owed, &owed);
                subtract(&mut self.owed, &sends);
                // What is dirty again will be named by every harvest until it is taken again.
                subtract(&mut self.owed, harvest);
            }
        }
        self.learn(harvest, &candidates);
    }

    fn learn(&mut self, harvest: &[PageSet], candidates: &[PageSet]) {
        let worth = count(harvest) >= self.rule.least_dirty_pages;
        if !worth && !self.learning {
            return;
        }
        self.learning = worth;
        if !worth {
            for sets in [&mut self.once, &mut self.twice, &mut self.held] {
                sets.iter_mut().for_each(PageSet::clear);
            }
            return;
        }
        let mut again = candidates.to_vec();
        intersect(&mut again, harvest);
        let (seen, again) = (count(candidates), count(&again));
        let habit = seen >= self.rule.least_candidates && again as f64 >= seen as f64 * self.rule.dirty_again;
        intersect(&mut self.once, harvest);
        self.twice = std::mem::replace(&mut self.once, harvest.to_vec());
        self.held.clone_from(&self.twice);
        if !habit {
            self.held.iter_mut().for_each(PageSet::clear);
        }
    }
}

/// Puts one of [`PROBES`] parts of the pages into `picked`: neighbours together, so that few calls take them.
fn pick(pages: &PageSet, part: u64, picked: &mut PageSet) {
    let count = pages.count();
    let (mut at, mut seen) = (0, 0);
    let (from, to) = (count * part / PROBES, count * (part + 1) / PROBES);
    while let Some(first) = pages.next_set(at).filter(|_| seen < to) {
        at = pages.next_clear(first);
        let run = at - first;
        let skip = from.saturating_sub(seen).min(run);
        let keep = (to - seen).min(run);
        if keep > skip {
            picked.insert(first + skip, keep - skip);
        }
        seen += run;
    }
}

fn count(sets: &[PageSet]) -> u64 {
    sets.iter().map(PageSet::count).sum()
}

fn is_empty(sets: &[PageSet]) -> bool {
    sets.iter().all(PageSet::is_empty)
}

fn joined(left: &[PageSet], right: &[PageSet]) -> Vec<PageSet> {
    let mut sets = left.to_vec();
    sets.iter_mut().zip(right).for_each(|(set, right)| set.union(right));
    sets
}

fn subtract(sets: &mut [PageSet], others: &[PageSet]) {
    sets.iter_mut().zip(others).for_each(|(set, other)| set.subtract(other));
}

fn intersect(sets: &mut [PageSet], others: &[PageSet]) {
    sets.iter_mut().zip(others).for_each(|(set, other)| set.intersect(other));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 640;
    const EAGER: HotRule = HotRule { least_dirty_pages: 0, least_candidates: 0, dirty_again: 0.0 };

    fn set(pages: &[u64]) -> Vec<PageSet> {
        let mut set = PageSet::empty(PAGES);
        pages.iter().for_each(|page| set.insert(*page, 1));
        vec![set]
    }

    proptest! {
        #[test]
        fn the_parts_of_a_set_are_that_set(pages in proptest::collection::vec(0..PAGES, 0..200)) {
            let all = &set(&pages)[0];
            let mut union = PageSet::empty(PAGES);
            let mut together = 0;
            for part in 0..PROBES {
                let mut picked = PageSet::empty(PAGES);
                pick(all, part, &mut picked);
                together += picked.count();
                union.union(&picked);
            }
            prop_assert_eq!(together, all.count());
            prop_assert_eq!(&union, all);
        }

        /// A guest that writes, a log, and a copy that is made by the rules: behind the last round they are equal,
        /// whatever is held back.
        #[test]
        fn the_copy_is_the_memory_whatever_is_held_back(
            rounds in proptest::collection::vec(
                (proptest::collection::vec(0..PAGES, 0..60), proptest::collection::vec(0..PAGES, 0..60)), 1..12),
            hot in proptest::collection::vec(0..PAGES, 0..100),
            eager in any::<bool>(),
        ) {
            let rule = if eager { EAGER } else { HotRule { least_dirty_pages: 10, least_candidates: 8, dirty_again: 0.9 } };
            let mut books = HotPages::new(&[PAGES], rule);
            let (mut memory, mut copy, mut version) = (vec![0; PAGES as usize], vec![u64::MAX; PAGES as usize], 0);
            let mut log = PageSet::full(PAGES);
            let mut write = |log: &mut PageSet, memory: &mut Vec<u64>, pages: &[u64]| for page in pages {
                version += 1;
                memory[*page as usize] = version;
                log.insert(*page, 1);
            };
            let mut send = |set: &PageSet, memory: &[u64]| for page in 0..PAGES {
                if set.contains(page) {
                    copy[page as usize] = memory[page as usize];
                }
            };
            // Takes whole words of 64 pages in which something is wanted, as batches do.
            let take = |log: &mut PageSet, seen: &PageSet, wanted: &PageSet, books: &mut HotPages| {
                for first in (0..PAGES).step_by(64).filter(|first| wanted.words()[(first / 64) as usize] != 0) {
                    let mut range = PageSet::empty(PAGES);
                    range.insert(first, 64);
                    range.intersect(seen);
                    log.subtract(&range);
                    books.taken(0, first, 64);
                }
            };
            for (before, between) in rounds {
                let seen = log.clone();
                let live = books.begin(vec![seen.clone()]);
                take(&mut log, &seen, &live.probes[0], &mut books);
                write(&mut log, &mut memory, &before);
                take(&mut log, &seen, &live.sends[0], &mut books);
                write(&mut log, &mut memory, &between);
                send(&live.sends[0], &memory);
                write(&mut log, &mut memory, &hot);
                books.end(&[log.clone()]);
            }
            send(&books.remaining(&[log.clone()])[0], &memory);
            prop_assert_eq!(memory, copy);
        }
    }

    /// Rounds of a workload with a habit; gives what each sent.
    fn habit(books: &mut HotPages, dirty: &[&[u64]]) -> Vec<u64> {
        let mut sent = vec![];
        let mut now = vec![PageSet::full(PAGES)];
        for next in dirty {
            let live = books.begin(now.clone());
            for page in 0..PAGES {
                if live.probes[0].contains(page) || live.sends[0].contains(page) {
                    books.taken(0, page, 1);
                }
            }
            sent.push(count(&live.sends));
            now = set(next);
            books.end(&now);
        }
        sent
    }

    #[test]
    fn what_is_dirty_in_every_round_waits_and_what_has_cooled_goes() {
        let rule = HotRule { least_dirty_pages: 1, least_candidates: 10, dirty_again: 0.9 };
        let hot: Vec<u64> = (0..100).collect();
        let mut books = HotPages::new(&[PAGES], rule);
        let sent = habit(&mut books, &[&hot, &hot, &hot, &hot, &hot]);
        assert_eq!(sent, [PAGES, 100, 100, 0, 0]);
        assert_eq!(books.held_pages(), 100);
        assert_eq!(count(&books.remaining(&set(&hot))), 100);
        // The habit ends: the quarter that was looked at is clean, and so nothing is hot any more.
        let live = books.begin(set(&hot));
        assert_eq!(count(&live.probes), 25);
        (50..75).for_each(|page| books.taken(0, page, 1));
        let left: Vec<u64> = hot.iter().copied().filter(|page| !(50..75).contains(page)).collect();
        books.end(&set(&left));
        assert_eq!(books.held_pages(), 0);
        assert_eq!(count(&books.remaining(&set(&left))), 100, "the quarter is owed");
        assert_eq!(count(&books.begin(set(&left)).sends), 100);
    }

    #[test]
    fn a_workload_without_a_habit_is_sent_as_ever() {
        let rule = HotRule { least_dirty_pages: 1, least_candidates: 10, dirty_again: 0.9 };
        let mut books = HotPages::new(&[PAGES], rule);
        let ranges: Vec<Vec<u64>> = (0..5).map(|n| (n * 20..n * 20 + 100).collect()).collect();
        let sent = habit(&mut books, &ranges.iter().map(Vec::as_slice).collect::<Vec<_>>());
        assert_eq!(sent, [PAGES, 100, 100, 100, 100]);
    }
}

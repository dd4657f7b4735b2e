//! Hot pages last: pages that are written again and again wait while there is much else to send.
//!
//! A page that will be dirty again behind the round is sent in it for nothing, and makes the round longer for all
//! others. A page that waits costs nothing: it is dirty anyway, and is sent once, later. So pages that were dirty in two
//! harvests in a row are left out as long as the others are more than they, and fall. Nothing is configured.
//!
//! ```text
//!  Learning ── hot pages are a habit, others are more ──▶ Holding ── others are few, or do not fall ──▶ Over
//! ```
//!
//! # Why they are sent again in the end
//!
//! Behind the other pages hot pages go, too, in rounds as short as they can be: in those many of them stay clean, and this
//! is how a busy workload gets below its budget. An earlier rule let go of them when they *looked* cool. They
//! always do in a round that leaves them out, because it is short; they were sent in the next one, which was long
//! because of them, were hot again behind it, and held again, and so on. So now holding begins once and ends once, and
//! what ends it is not how they look but that there is nothing else worth sending.
//!
//! # A habit
//!
//! Where all pages of a working set are written alike, some are dirty twice by chance. Then a page that was just sent is
//! dirty less often than one that was not, as it was clean for a part of the round only. Pages that have a habit of being
//! dirty are dirty more often: that is asked for before anything is held.
//!
//! # Nothing is lost
//!
//! A page that is held back and not taken stays dirty in the log, and the next harvest names it again. But ranges are
//! taken whole. So there is a third kind of page between dirty and sent: *owed*, taken and not sent.
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

use protocol::page::PageSet;

/// When hot pages wait.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct HotRule {
    /// Fewer of them than this are simply sent: a MiB is a millisecond of a 10 Gbit/s link, as long as a round takes
    /// without any page. It is also the least number of pages from which a share is told.
    pub least_pages: u64,
    /// How many times as many as the hot ones the others must be. Simulated with 0.1 to 2: below 1 uniform workloads
    /// need more rounds, above it less is saved.
    pub others_part: f64,
    /// From one round to the next the others must fall below this part.
    pub falls_below: f64,
    /// How many times as often as other pages those that were just sent must be dirty.
    pub habit: f64,
}

impl Default for HotRule {
    fn default() -> Self {
        Self { least_pages: 256, others_part: 1.0, falls_below: 0.9, habit: 1.0 }
    }
}

impl HotRule {
    /// Holds nothing back, ever.
    pub const NEVER: Self =
        Self { least_pages: u64::MAX, others_part: f64::INFINITY, falls_below: 0.0, habit: f64::INFINITY };
}

/// A round in numbers of pages, in the engine as in the simulator.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Seen {
    /// Dirty now, and when the round began.
    pub hot: f64,
    /// All others that are left to send.
    pub others: f64,
    /// Sent by the round.
    pub sent: f64,
    /// Those of them that are dirty again.
    pub sent_again: f64,
    /// Known to be written at times, and clean when the round began.
    pub clean: f64,
    /// Those of them that are dirty now.
    pub clean_dirtied: f64,
}

/// How far the holding has got.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Phase {
    Learning,
    Holding { others: f64 },
    Over,
}

/// Whether hot pages wait: pure, one word a round.
#[derive(Debug, Clone, Copy)]
pub struct Holding {
    rule: HotRule,
    phase: Phase,
}

impl Holding {
    /// Before the first round.
    pub fn new(rule: HotRule) -> Self {
        Self { rule, phase: Phase::Learning }
    }

    /// Whether the next round leaves the hot pages out.
    pub fn next(&mut self, seen: &Seen) -> bool {
        let rule = &self.rule;
        let least = rule.least_pages as f64;
        let worth = seen.hot >= least && seen.others >= seen.hot * rule.others_part;
        // Multiplied out, so that nothing is divided by nothing.
        let habit =
            seen.clean < least || seen.sent_again * seen.clean >= seen.clean_dirtied * seen.sent * rule.habit;
        let (holds, next) = match self.phase {
            Phase::Learning if worth && habit => (true, Phase::Holding { others: seen.others }),
            Phase::Learning => (false, Phase::Learning),
            Phase::Holding { others } if worth && seen.others <= others * rule.falls_below => {
                (true, Phase::Holding { others: seen.others })
            }
            Phase::Holding { .. } | Phase::Over => (false, Phase::Over),
        };
        self.phase = next;
        holds
    }
}

/// Which pages are hot, and which are owed.
#[derive(Debug)]
pub struct HotPages {
    least_pages: u64,
    holding: Holding,
    /// Dirty in the last harvest; nothing before the first, and where too little was dirty to learn from.
    last: Vec<PageSet>,
    /// Dirty in any harvest.
    ever: Vec<PageSet>,
    /// What the next live round leaves out.
    held: Vec<PageSet>,
    /// Taken and not sent.
    owed: Vec<PageSet>,
    /// Of the round that is underway, if it leaves something out or sends what is owed.
    now: Option<Underway>,
}

#[derive(Debug)]
struct Underway {
    dirty: Vec<PageSet>,
    sends: Vec<PageSet>,
    taken: Vec<PageSet>,
}

impl HotPages {
    /// Nothing is known yet of spaces with so many pages.
    pub fn new(pages: &[u64], rule: HotRule) -> Self {
        let empty = || -> Vec<PageSet> { pages.iter().map(|pages| PageSet::empty(*pages)).collect() };
        Self {
            least_pages: rule.least_pages,
            holding: Holding::new(rule),
            last: empty(),
            ever: empty(),
            held: empty(),
            owed: empty(),
            now: None,
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

    /// Begins a live round over what is dirty: gives what it sends.
    pub fn begin(&mut self, dirty: Vec<PageSet>) -> Vec<PageSet> {
        if is_empty(&self.held) && is_empty(&self.owed) {
            self.now = None;
            return dirty;
        }
        let sends = without(&joined(&dirty, &self.owed), &self.held);
        let taken = dirty.iter().map(|set| PageSet::empty(set.pages())).collect();
        self.now = Some(Underway { taken, dirty, sends: sends.clone() });
        sends
    }

    /// A range was taken in this round.
    pub fn taken(&mut self, space: usize, first: u64, pages: u64) {
        if let Some(taken) = self.now.as_mut().and_then(|now| now.taken.get_mut(space)) {
            taken.insert(first, pages);
        }
    }

    /// The round was cut off. What was taken and is not among what it sends, in this round or before, is nobody's to
    /// remember but the dirty log's: it must be given back.
    pub fn abandon(&mut self) -> Vec<PageSet> {
        let mut unsent = self.owed.clone();
        if let Some(Underway { dirty, sends, taken }) = self.now.take() {
            unsent = without(&joined(&unsent, &common(&dirty, &taken)), &sends);
        }
        self.owed.iter_mut().for_each(PageSet::clear);
        unsent
    }

    /// The round is over: all that it sends was sent, and this is dirty now.
    pub fn end(&mut self, harvest: &[PageSet]) {
        let sent = match self.now.take() {
            None => {
                self.owed.iter_mut().for_each(PageSet::clear);
                None
            }
            Some(Underway { dirty, sends, taken }) => {
                let owed = without(&joined(&self.owed, &common(&dirty, &taken)), &sends);
                // What is dirty again will be named by every harvest until it is taken again.
                self.owed = without(&owed, harvest);
                Some(sends)
            }
        };
        self.learn(harvest, sent);
    }

    /// Decides what waits. A clean guest costs one count, however large it is.
    fn learn(&mut self, harvest: &[PageSet], sent: Option<Vec<PageSet>>) {
        let over = self.holding.phase == Phase::Over;
        if over || self.least_pages == u64::MAX || count(harvest) < self.least_pages {
            for sets in [&mut self.last, &mut self.held] {
                if !is_empty(sets) {
                    sets.iter_mut().for_each(PageSet::clear);
                }
            }
            return;
        }
        let hot = common(harvest, &self.last);
        if !is_empty(&self.last) {
            let sent = sent.unwrap_or_else(|| self.last.clone());
            let clean = without(&without(&self.ever, &sent), &self.held);
            let numbers = |sets: &[PageSet]| count(sets) as f64;
            let seen = Seen {
                hot: numbers(&hot),
                others: numbers(&self.remaining(harvest)) - numbers(&hot),
                sent: numbers(&sent),
                sent_again: numbers(&common(harvest, &sent)),
                clean: numbers(&clean),
                clean_dirtied: numbers(&common(harvest, &clean)),
            };
            self.held = hot;
            if !self.holding.next(&seen) {
                self.held.iter_mut().for_each(PageSet::clear);
            }
        }
        self.ever = joined(&self.ever, harvest);
        self.last = harvest.to_vec();
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

fn without(sets: &[PageSet], others: &[PageSet]) -> Vec<PageSet> {
    let mut sets = sets.to_vec();
    sets.iter_mut().zip(others).for_each(|(set, other)| set.subtract(other));
    sets
}

fn common(sets: &[PageSet], others: &[PageSet]) -> Vec<PageSet> {
    let mut sets = sets.to_vec();
    sets.iter_mut().zip(others).for_each(|(set, other)| set.intersect(other));
    sets
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PAGES: u64 = 640;
    /// Holds whatever was dirty twice, for as long as there is any.
    const EAGER: HotRule = HotRule { least_pages: 0, others_part: 0.0, falls_below: f64::MAX, habit: 0.0 };

    fn set(pages: &[u64]) -> Vec<PageSet> {
        let mut set = PageSet::empty(PAGES);
        pages.iter().for_each(|page| set.insert(*page, 1));
        vec![set]
    }

    proptest! {
        /// A guest that writes, a log, and a copy that is made by the rules: behind the last round they are equal,
        /// whatever is held back.
        #[test]
        fn the_copy_is_the_memory_whatever_is_held_back(
            rounds in proptest::collection::vec(
                (proptest::collection::vec(0..PAGES, 0..60), proptest::collection::vec(0..PAGES, 0..60)), 1..12),
            hot in proptest::collection::vec(0..PAGES, 0..100),
            eager in any::<bool>(),
        ) {
            let rule = if eager { EAGER } else { HotRule { least_pages: 10, ..HotRule::default() } };
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
                let sends = books.begin(vec![seen.clone()]);
                write(&mut log, &mut memory, &before);
                take(&mut log, &seen, &sends[0], &mut books);
                write(&mut log, &mut memory, &between);
                send(&sends[0], &memory);
                write(&mut log, &mut memory, &hot);
                books.end(&[log.clone()]);
            }
            send(&books.remaining(&[log.clone()])[0], &memory);
            prop_assert_eq!(memory, copy);
        }
    }

    /// Rounds of a workload, by what was dirty behind each; gives what each sent.
    fn rounds(books: &mut HotPages, dirty: &[Vec<u64>]) -> Vec<u64> {
        let mut sent = vec![];
        let mut now = vec![PageSet::full(PAGES)];
        for next in dirty {
            let sends = books.begin(now.clone());
            (0..PAGES).filter(|page| sends[0].contains(*page)).for_each(|page| books.taken(0, page, 1));
            sent.push(count(&sends));
            now = set(next);
            books.end(&now);
        }
        sent
    }

    /// The first pages, which are always dirty, and others that are not.
    fn hot_and(others: std::ops::Range<u64>) -> Vec<u64> {
        (0..20).chain(others).collect()
    }

    const RULE: HotRule = HotRule { least_pages: 10, others_part: 1.0, falls_below: 0.9, habit: 1.0 };

    #[test]
    fn hot_pages_wait_until_the_others_are_few_and_then_no_more() {
        let mut books = HotPages::new(&[PAGES], RULE);
        let dirty =
            [hot_and(100..400), hot_and(400..550), hot_and(100..140), hot_and(300..310), hot_and(100..400)];
        assert_eq!(rounds(&mut books, &dirty), [PAGES, 320, 150, 40, 30]);
        assert_eq!(books.held_pages(), 0, "holding is over");
        assert_eq!(count(&books.remaining(&set(&dirty[4]))), 320);
    }

    #[test]
    fn others_that_do_not_fall_end_it() {
        let mut books = HotPages::new(&[PAGES], RULE);
        let dirty = [hot_and(100..400), hot_and(400..550), hot_and(100..240), hot_and(300..310)];
        assert_eq!(rounds(&mut books, &dirty), [PAGES, 320, 150, 160]);
    }

    #[test]
    fn what_is_taken_and_cools_is_owed_and_sent() {
        let mut books = HotPages::new(&[PAGES], RULE);
        rounds(&mut books, &[hot_and(100..400), hot_and(400..550)]);
        assert_eq!(books.held_pages(), 20);
        let sends = books.begin(set(&hot_and(400..550)));
        assert_eq!(count(&sends), 150);
        // A range that holds six of the hot ones; they are not written again.
        books.taken(0, 0, 6);
        let left: Vec<u64> = hot_and(100..140).into_iter().skip(6).collect();
        books.end(&set(&left));
        assert_eq!((books.held_pages(), count(&books.remaining(&set(&left)))), (14, 60));
        assert_eq!(count(&books.begin(set(&left))), 46, "with what is owed");
    }

    #[test]
    fn pages_that_are_dirty_twice_by_chance_do_not_wait() {
        let mut holding = Holding::new(HotRule::default());
        // Of 10,000 pages half was sent. They were clean for half of the round.
        let chance = Seen {
            hot: 500.0,
            others: 1000.0,
            sent: 5000.0,
            sent_again: 500.0,
            clean: 5000.0,
            clean_dirtied: 1000.0,
        };
        assert!(!holding.next(&chance));
        assert!(holding.next(&Seen { sent_again: 1500.0, hot: 1000.0, ..chance }));
        assert!(!Holding::new(HotRule::NEVER).next(&chance));
    }
}

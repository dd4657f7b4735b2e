use std::collections::{BTreeMap, BTreeSet};
use std::sync::Mutex;

use proptest::prelude::*;

use super::*;

const PAGES: u64 = 512;

/// A host's log, simulated: the guest's writes are calls.
struct Host {
    mode: LogMode,
    on: bool,
    bits: Vec<u64>,
    /// Pages whose next write sets a bit.
    protected: Vec<u64>,
    /// It answers no questions any more.
    broken: bool,
}

#[derive(Clone)]
struct Simulated(Arc<Mutex<Host>>);

impl Simulated {
    fn new(mode: LogMode) -> Self {
        Self(Arc::new(Mutex::new(Host {
            mode,
            on: false,
            bits: vec![0; 8],
            protected: vec![0; 8],
            broken: false,
        })))
    }

    fn guest_writes(&self, page: u64) {
        let mut host = self.0.lock().unwrap();
        let (word, bit) = ((page / 64) as usize, 1 << (page % 64));
        if host.on && host.protected[word] & bit != 0 {
            host.protected[word] &= !bit;
            host.bits[word] |= bit;
        }
    }
}

impl DirtyLog for Simulated {
    fn mode(&self) -> LogMode {
        self.0.lock().unwrap().mode
    }
    fn start(&mut self) -> Result<()> {
        let mut host = self.0.lock().unwrap();
        host.on = true;
        let initially_set = host.mode == LogMode::ManualInitiallySet;
        host.bits = vec![if initially_set { u64::MAX } else { 0 }; 8];
        host.protected = vec![if initially_set { 0 } else { u64::MAX }; 8];
        Ok(())
    }
    fn start_clean(&mut self) -> Result<()> {
        self.start()?;
        let mut host = self.0.lock().unwrap();
        (host.bits, host.protected) = (vec![0; 8], vec![u64::MAX; 8]);
        Ok(())
    }
    fn stop(&mut self) -> Result<()> {
        self.0.lock().unwrap().on = false;
        Ok(())
    }
    fn get(&mut self, _slot: usize, into: &mut [u64]) -> Result<()> {
        let mut host = self.0.lock().unwrap();
        if host.broken {
            return Err(Error::WrongState { asked: "answer", state: "broken" });
        }
        let bits = host.bits.clone();
        into.copy_from_slice(&bits);
        if host.mode == LogMode::Plain {
            host.bits = vec![0; 8];
            for (protected, bits) in host.protected.iter_mut().zip(&bits) {
                *protected |= bits;
            }
        }
        Ok(())
    }
    fn clear(&mut self, _slot: usize, first: u64, _pages: u64, bits: &[u64]) -> Result<()> {
        let mut host = self.0.lock().unwrap();
        for (offset, bits) in bits.iter().enumerate() {
            let word = (first / 64) as usize + offset;
            host.bits[word] &= !bits;
            host.protected[word] |= bits;
        }
        Ok(())
    }
}

fn tracker(log: &Simulated) -> Tracker {
    let memory = Arc::new(GuestMemory::create(PAGES * 4096).unwrap());
    Tracker::new(memory, Vec::new(), Box::new(log.clone()))
}

const MODES: [LogMode; 3] = [LogMode::ManualInitiallySet, LogMode::Manual, LogMode::Plain];

#[test]
fn starting_makes_every_page_pending_in_every_mode() {
    for mode in MODES {
        let mut tracker = tracker(&Simulated::new(mode));
        assert!(tracker.harvest().is_err());
        tracker.start(false).unwrap();
        assert_eq!(tracker.harvest().unwrap(), [PAGES], "{mode:?}");
    }
}

#[test]
fn a_write_between_harvest_and_take_is_read_or_shows_again() {
    for mode in MODES {
        let log = Simulated::new(mode);
        let mut tracker = tracker(&log);
        tracker.start(false).unwrap();
        tracker.take(0, 0, PAGES).unwrap();
        log.guest_writes(7);
        tracker.harvest().unwrap();
        log.guest_writes(7);
        log.guest_writes(8);
        let taken = tracker.take(0, 0, PAGES).unwrap();
        tracker.harvest().unwrap();
        let after = tracker.take(0, 0, PAGES).unwrap();
        // Page 7 is read after the take, so its second write is in; page 8 comes with the next.
        assert_eq!(taken.bits[0] & (1 << 7), 1 << 7, "{mode:?}");
        assert_eq!(after.bits[0] & (1 << 8), 1 << 8, "{mode:?}");
    }
}

#[test]
fn own_writes_are_harvested_too() {
    let mut tracker = tracker(&Simulated::new(LogMode::Manual));
    tracker.start(false).unwrap();
    tracker.harvest().unwrap();
    tracker.take(0, 0, PAGES).unwrap();
    tracker.memory.write(65 * 4096, &[1]).unwrap();
    assert_eq!(tracker.harvest().unwrap(), [1]);
    assert_eq!(tracker.take(0, 65, 3).unwrap(), Words { first: 64, bits: vec![2] });
}

#[test]
fn ranges_beyond_the_end_are_refused() {
    let mut tracker = tracker(&Simulated::new(LogMode::Manual));
    tracker.start(false).unwrap();
    for (space, first, pages) in
        [(1, 0, 64), (0, 0, PAGES + 1), (0, PAGES, 1), (0, u64::MAX - 63, 64), (0, 0, 0)]
    {
        assert!(tracker.take(space, first, pages).is_err(), "{space} {first} {pages}");
    }
    assert!(tracker.redirty(0, 0, &[0; 9]).is_err());
}

fn checkpoint(number: u32) -> CheckpointId {
    CheckpointId::new(0, number)
}

#[test]
fn what_was_taken_comes_back_when_a_session_dies() {
    let mut tracker = tracker(&Simulated::new(LogMode::Manual));
    tracker.start(false).unwrap();
    tracker.take(0, 0, 128).unwrap();
    assert_eq!(tracker.pending(), [PAGES - 128]);
    tracker.stop().unwrap();
    assert!(!tracker.is_tracking());
    tracker.start(true).unwrap();
    assert_eq!(tracker.pending(), [PAGES], "there is no baseline to keep");
}

#[test]
fn a_baseline_outlives_the_sessions_and_names_exactly_what_it_lacks() {
    for mode in MODES {
        let log = Simulated::new(mode);
        let mut tracker = tracker(&log);
        assert!(tracker.set_baseline(checkpoint(1)).is_err(), "nobody tracks");
        tracker.start(false).unwrap();
        tracker.harvest().unwrap();
        tracker.take(0, 0, PAGES).unwrap();
        log.guest_writes(1);
        tracker.set_baseline(checkpoint(1)).unwrap();
        tracker.stop().unwrap();
        log.guest_writes(2);
        tracker.memory.write(3 * 4096, &[1]).unwrap();
        assert!(tracker.harvest().is_err() && tracker.set_baseline(checkpoint(2)).is_err(), "no session");

        // A session that dies behind its takes, one of them of every page, has never been.
        for (keep, named, written) in [(true, 3, 4), (false, PAGES, 5)] {
            tracker.start(keep).unwrap();
            assert_eq!(tracker.baseline(), Some(checkpoint(1)));
            assert_eq!(tracker.harvest().unwrap(), [named], "{mode:?}");
            log.guest_writes(written);
            tracker.take(0, 0, PAGES).unwrap();
            tracker.stop().unwrap();
            tracker.start(true).unwrap();
            assert_eq!(tracker.harvest().unwrap(), [written], "{mode:?}, keep {keep}");
            tracker.stop().unwrap();
        }
        // The next checkpoint takes all of them but the last.
        tracker.start(true).unwrap();
        assert_eq!(tracker.take(0, 0, 5).unwrap().bits, [0b1_1110]);
        tracker.set_baseline(checkpoint(2)).unwrap();
        tracker.stop().unwrap();
        tracker.start(true).unwrap();
        assert_eq!(
            (tracker.baseline(), tracker.harvest().unwrap()),
            (Some(checkpoint(2)), vec![1]),
            "{mode:?}"
        );
        // Given up, everything counts again, and the log rests.
        tracker.stop().unwrap();
        tracker.forget_baseline().unwrap();
        assert!(!log.0.lock().unwrap().on);
        tracker.start(true).unwrap();
        assert_eq!((tracker.baseline(), tracker.harvest().unwrap()), (None, vec![PAGES]));
    }
}

#[test]
fn what_begins_from_a_checkpoint_lacks_only_what_is_written() {
    for mode in MODES {
        let log = Simulated::new(mode);
        let mut tracker = tracker(&log);
        tracker.begin_from(checkpoint(1)).unwrap();
        assert!(tracker.begin_from(checkpoint(2)).is_err(), "once");
        assert!(tracker.harvest().is_err(), "no session tracks");
        log.guest_writes(2);
        tracker.memory.write(3 * 4096, &[1]).unwrap();
        tracker.start(true).unwrap();
        assert_eq!(tracker.baseline(), Some(checkpoint(1)));
        assert_eq!(tracker.harvest().unwrap(), [2], "{mode:?}");
        tracker.stop().unwrap();
        // A move takes all of it.
        tracker.start(false).unwrap();
        assert_eq!(tracker.harvest().unwrap(), [PAGES], "{mode:?}");
    }
}

#[test]
fn a_log_that_cannot_be_read_ends_the_baseline() {
    let log = Simulated::new(LogMode::Plain);
    let mut tracker = tracker(&log);
    tracker.start(false).unwrap();
    tracker.take(0, 0, PAGES).unwrap();
    tracker.set_baseline(checkpoint(1)).unwrap();
    log.0.lock().unwrap().broken = true;
    assert!(tracker.harvest().is_err());
    assert_eq!((tracker.baseline(), tracker.pending()), (None, vec![PAGES]));
    log.0.lock().unwrap().broken = false;
    tracker.stop().unwrap();
    assert!(!log.0.lock().unwrap().on);
}

#[derive(Debug, Clone, Copy)]
enum Step {
    Write(u64),
    Own(u64),
    Start {
        keep: bool,
    },
    Harvest,
    Take(u64, u64),
    Redirty,
    /// Gives back what it may have taken or not.
    RedirtyRange(u64, u64),
    Baseline,
    Forget,
    /// The session ends: by its own will, or because its engine died.
    End,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        12 => (0..PAGES).prop_map(Step::Write),
        3 => (0..PAGES).prop_map(Step::Own),
        3 => any::<bool>().prop_map(|keep| Step::Start { keep }),
        5 => Just(Step::Harvest),
        5 => (0..PAGES, 1..=PAGES).prop_map(|(first, pages)| Step::Take(first, pages.min(PAGES - first))),
        1 => Just(Step::Take(0, PAGES)),
        1 => Just(Step::Redirty),
        1 => (0..PAGES / 64, 1..4_u64).prop_map(|(first, words)| Step::RedirtyRange(first, words)),
        2 => Just(Step::Baseline),
        1 => Just(Step::End),
    ]
}

fn step_or_forget() -> impl Strategy<Value = Step> {
    prop_oneof![40 => step(), 1 => Just(Step::Forget)]
}

/// Whoever takes pages, in one session behind the other, and what it has made safe.
struct Taker {
    tracker: Tracker,
    log: Simulated,
    version: u64,
    guest: Vec<u64>,
    /// What this session took and no checkpoint has.
    copies: BTreeMap<u64, u64>,
    /// What the newest checkpoint has.
    safe: Vec<Option<u64>>,
    last_taken: Option<Words>,
    /// What this session's checkpoints took.
    covered: BTreeSet<u64>,
    /// What this session gave back and did not take again.
    given_back: BTreeSet<u64>,
    /// This session's next checkpoint has no parent.
    whole: bool,
    /// Pages that may be named: written, and not seen by a take behind a harvest that a checkpoint covered.
    may_be_named: BTreeSet<u64>,
    /// Taken with all that was written to them, in this session.
    settled: BTreeSet<u64>,
    written_since_harvest: BTreeSet<u64>,
}

fn pages_of(words: &Words) -> impl Iterator<Item = u64> + '_ {
    let end = words.first + words.bits.len() as u64 * 64;
    (words.first..end).filter(|page| {
        let bit = page - words.first;
        words.bits[(bit / 64) as usize] & (1 << (bit % 64)) != 0
    })
}

impl Taker {
    fn new(mode: LogMode) -> Self {
        let log = Simulated::new(mode);
        Self {
            tracker: tracker(&log),
            log,
            version: 0,
            guest: vec![0; PAGES as usize],
            copies: BTreeMap::new(),
            safe: vec![None; PAGES as usize],
            last_taken: None,
            covered: BTreeSet::new(),
            given_back: BTreeSet::new(),
            whole: false,
            may_be_named: (0..PAGES).collect(),
            settled: BTreeSet::new(),
            written_since_harvest: BTreeSet::new(),
        }
    }

    /// Before anything else: the guest's memory is that of a checkpoint.
    fn begins_from_a_checkpoint(&mut self) {
        self.tracker.begin_from(checkpoint(1)).unwrap();
        self.safe = self.guest.iter().copied().map(Some).collect();
        self.may_be_named.clear();
    }

    fn wrote(&mut self, page: u64) {
        self.version += 1;
        self.guest[page as usize] = self.version;
        self.may_be_named.insert(page);
        self.written_since_harvest.insert(page);
        self.settled.remove(&page);
    }

    fn session_begins(&mut self) {
        self.copies.clear();
        self.settled.clear();
        self.last_taken = None;
        self.covered.clear();
        self.given_back.clear();
    }

    fn carry_out(&mut self, step: Step) {
        let tracking = self.tracker.is_tracking();
        match step {
            Step::Write(page) => {
                self.wrote(page);
                self.log.guest_writes(page);
            }
            Step::Own(page) => {
                self.wrote(page);
                self.tracker.memory.write(page * 4096, &[1]).unwrap();
            }
            Step::Start { keep } => {
                self.session_begins();
                self.whole = !keep;
                self.tracker.start(keep).unwrap();
            }
            Step::Forget => {
                self.session_begins();
                self.tracker.forget_baseline().unwrap();
                self.safe.fill(None);
                self.may_be_named = (0..PAGES).collect();
                self.settled.clear();
            }
            Step::End => {
                self.session_begins();
                self.tracker.stop().unwrap();
            }
            _ if !tracking => assert!(self.tracker.harvest().is_err()),
            Step::Harvest => {
                self.tracker.harvest().unwrap();
                self.written_since_harvest.clear();
            }
            Step::Take(first, pages) => {
                let words = self.tracker.take(0, first, pages).unwrap();
                for page in pages_of(&words) {
                    self.copies.insert(page, self.guest[page as usize]);
                    self.given_back.remove(&page);
                    if !self.written_since_harvest.contains(&page) {
                        self.settled.insert(page);
                    }
                }
                self.last_taken = Some(words);
            }
            Step::Redirty => {
                let Some(words) = self.last_taken.take() else { return };
                self.give_back(&words);
            }
            Step::RedirtyRange(first, words) => {
                let bits = vec![u64::MAX; words.min(PAGES / 64 - first) as usize];
                self.give_back(&Words { first: first * 64, bits });
            }
            Step::Baseline => {
                self.tracker.set_baseline(checkpoint(1)).unwrap();
                self.covered.extend(self.copies.keys());
                self.may_be_named.extend(&self.given_back);
                if std::mem::take(&mut self.whole) {
                    self.safe.fill(None);
                    self.may_be_named = (0..PAGES).collect();
                }
                for (page, version) in std::mem::take(&mut self.copies) {
                    self.safe[page as usize] = Some(version);
                }
                for page in std::mem::take(&mut self.settled) {
                    self.may_be_named.remove(&page);
                }
            }
        }
    }

    fn give_back(&mut self, words: &Words) {
        self.tracker.redirty(0, words.first, &words.bits).unwrap();
        for page in pages_of(words) {
            self.copies.remove(&page);
            self.settled.remove(&page);
            self.given_back.insert(page);
            if self.covered.contains(&page) {
                // What the checkpoint has of it is retracted.
                self.safe[page as usize] = None;
                self.may_be_named.insert(page);
            }
        }
    }

    /// A new session completes the newest checkpoint: how many pages that needed.
    fn complete(&mut self) -> BTreeSet<u64> {
        for step in [Step::End, Step::Start { keep: true }, Step::Harvest, Step::Take(0, PAGES)] {
            self.carry_out(step);
        }
        let taken = std::mem::take(&mut self.copies);
        for (page, version) in &taken {
            self.safe[*page as usize] = Some(*version);
        }
        taken.into_keys().collect()
    }
}

proptest! {
    /// Whatever sessions came and went, a checkpoint and the pages that are named behind it make up the guest's memory.
    #[test]
    fn no_sequence_of_sessions_loses_a_write(
        mode in 0..3_usize,
        restored in any::<bool>(),
        steps in prop::collection::vec(step_or_forget(), 1..300),
    ) {
        let mut taker = Taker::new(MODES[mode]);
        if restored {
            taker.begins_from_a_checkpoint();
        }
        for step in steps {
            taker.carry_out(step);
        }
        let named = taker.complete();
        for (page, (guest, safe)) in taker.guest.iter().zip(&taker.safe).enumerate() {
            prop_assert_eq!(Some(*guest), *safe, "page {}", page);
        }
        prop_assert!(named.is_subset(&taker.may_be_named), "{:?}", named.difference(&taker.may_be_named));
    }

    /// The copy of whoever takes pages in one session equals the guest's memory after a last harvest and take.
    #[test]
    fn taking_never_loses_a_write(mode in 0..3_usize, steps in prop::collection::vec(step(), 1..200)) {
        let mut taker = Taker::new(MODES[mode]);
        taker.carry_out(Step::Start { keep: false });
        let mut copy: BTreeMap<u64, u64> = BTreeMap::new();
        let steps = steps.into_iter().filter(|step| !matches!(step, Step::Start { .. } | Step::End));
        for step in steps.chain([Step::Harvest, Step::Take(0, PAGES)]) {
            taker.carry_out(step);
            copy.extend(&taker.copies);
        }
        prop_assert_eq!(taker.guest, copy.into_values().collect::<Vec<_>>());
    }
}

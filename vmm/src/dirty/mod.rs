//! Which pages changed: KVM's log, OR-ed with the VMM's own writes, and the books about them.
//!
//! ```text
//! guest writes ──> KVM's log ─┐
//!                             ├─ harvest ─> pending ── take ──> taken ── (the taker reads the pages)
//! VMM's writes ──> own bits ──┘                ^                  │
//!                                              └──── give back ───┘
//! ```
//!
//! A page may be read only after it was *taken*: taking re-arms the write protection first, so a write
//! that comes later shows up in the next harvest. A page read while the guest writes it may be torn;
//! that is sound, because such a page is dirty again.

mod books;
mod kvm;

use std::sync::Arc;

pub use books::{Books, Words};
pub use kvm::KvmLog;

use crate::{
    error::{Error, Result},
    memory::{GuestMemory, SpaceInfo},
};

/// How the host keeps its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogMode {
    /// Cleared by ranges; every page counts as dirty at the start, so that starting costs nothing.
    ManualInitiallySet,
    /// Cleared by ranges; starting write-protects all of memory.
    Manual,
    /// Reading the log clears all of it.
    Plain,
}

/// The host's dirty log of a VM, one bit a page, one slot a space.
pub trait DirtyLog: Send {
    /// How this log behaves.
    fn mode(&self) -> LogMode;
    /// Starts logging for all slots.
    ///
    /// # Errors
    /// When the host refuses; logging is then off.
    fn start(&mut self) -> Result<()>;
    /// Stops logging for all slots.
    ///
    /// # Errors
    /// When the host refuses.
    fn stop(&mut self) -> Result<()>;
    /// Reads one slot's log. In [`LogMode::Plain`] this clears it.
    ///
    /// # Errors
    /// When the host refuses.
    fn get(&mut self, slot: usize) -> Result<Vec<u64>>;
    /// Clears bits and write-protects their pages again. Bit n of `bits` is page `first + n`; `first` is
    /// a multiple of 64, and so is `pages` except at the slot's end. Not called in [`LogMode::Plain`].
    ///
    /// # Errors
    /// When the host refuses.
    fn clear(&mut self, slot: usize, first: u64, pages: u64, bits: &[u64]) -> Result<()>;
}

/// Dirty tracking of one VM.
pub struct Tracker {
    memory: Arc<GuestMemory>,
    log: Box<dyn DirtyLog>,
    /// One a space; empty when not tracking.
    books: Vec<Books>,
}

impl Tracker {
    /// A tracker at rest.
    pub fn new(memory: Arc<GuestMemory>, log: Box<dyn DirtyLog>) -> Self {
        Self { memory, log, books: Vec::new() }
    }

    /// How the host keeps its log.
    pub fn mode(&self) -> LogMode {
        self.log.mode()
    }

    /// Whether tracking is on.
    pub fn is_tracking(&self) -> bool {
        !self.books.is_empty()
    }

    /// Starts tracking with every page pending. Starting again while tracking makes every page pending.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses; tracking is then off.
    pub fn start(&mut self) -> Result<()> {
        if !self.is_tracking() {
            self.log.start()?;
        }
        self.books = self.memory.layout().iter().map(|space| Books::all_pending(space.pages)).collect();
        Ok(())
    }

    /// Moves what was written since the last harvest into the pending pages. Returns the number of
    /// pending pages of each space.
    ///
    /// # Errors
    /// [`Error::WrongState`] when not tracking, [`Error::Host`] when the host refuses: the pending pages
    /// are then what they were, and nothing is lost.
    pub fn harvest(&mut self) -> Result<Vec<u64>> {
        self.must_track("read the dirty log")?;
        for (index, books) in self.books.iter_mut().enumerate() {
            let mut bits = self.log.get(index)?;
            self.memory.drain_own_writes(index, &mut bits);
            books.merge(&bits);
        }
        Ok(self.pending())
    }

    /// The number of pending pages of each space, as of the last harvest.
    pub fn pending(&self) -> Vec<u64> {
        self.books.iter().map(Books::pending_pages).collect()
    }

    /// The pending pages of each space as words from page 0 on, as of the last harvest.
    pub fn pending_words(&self) -> impl Iterator<Item = &[u64]> {
        self.books.iter().map(Books::pending)
    }

    /// Takes the pending pages of a range: re-arms their write protection and returns them. Only then may
    /// they be read.
    ///
    /// # Errors
    /// [`Error::Protocol`] for a bad range, [`Error::WrongState`] when not tracking, [`Error::Host`]
    /// when the host refuses; nothing is taken then.
    pub fn take(&mut self, space: usize, first: u64, pages: u64) -> Result<Words> {
        self.must_track("take dirty pages")?;
        let books = self.books.get_mut(space).ok_or_else(|| no_such_space(space))?;
        let words = books.peek(first, pages)?;
        if words.count() > 0 {
            if self.log.mode() != LogMode::Plain {
                // Bits that are not set in the words stay as they are, so the span may be wider than
                // what was asked for.
                self.log.clear(space, words.first, books.span(&words), &words.bits)?;
            }
            books.move_to_taken(&words);
        }
        Ok(words)
    }

    /// Makes pages pending again that were taken but did not arrive. Bit n of `bits` is page `first + n`.
    ///
    /// # Errors
    /// [`Error::Protocol`] for a bad range or bits beyond the space, [`Error::WrongState`] when not
    /// tracking.
    pub fn redirty(&mut self, space: usize, first: u64, bits: &[u64]) -> Result<()> {
        self.must_track("give dirty pages back")?;
        let books = self.books.get_mut(space).ok_or_else(|| no_such_space(space))?;
        books.redirty(first, bits)
    }

    /// Makes every page pending again that was taken since tracking started.
    pub fn give_back(&mut self) {
        for books in &mut self.books {
            books.give_back();
        }
    }

    /// Stops tracking; a later start begins with every page pending. Does nothing when not tracking.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses; the books are closed all the same.
    pub fn stop(&mut self) -> Result<()> {
        if !self.is_tracking() {
            return Ok(());
        }
        self.books.clear();
        self.log.stop()
    }

    fn must_track(&self, asked: &'static str) -> Result<()> {
        if self.is_tracking() { Ok(()) } else { Err(Error::WrongState { asked, state: "not being tracked" }) }
    }
}

fn no_such_space(space: usize) -> Error {
    Error::Protocol(format!("there is no space {space}"))
}

/// Words of a bitmap with one bit for each page of a space.
pub(crate) fn words_for(space: SpaceInfo) -> usize {
    usize::try_from(space.pages.div_ceil(64)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
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
    }

    #[derive(Clone)]
    struct Simulated(Arc<Mutex<Host>>);

    impl Simulated {
        fn new(mode: LogMode) -> Self {
            Self(Arc::new(Mutex::new(Host { mode, on: false, bits: vec![0; 8], protected: vec![0; 8] })))
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
        fn stop(&mut self) -> Result<()> {
            self.0.lock().unwrap().on = false;
            Ok(())
        }
        fn get(&mut self, _slot: usize) -> Result<Vec<u64>> {
            let mut host = self.0.lock().unwrap();
            let bits = host.bits.clone();
            if host.mode == LogMode::Plain {
                host.bits = vec![0; 8];
                for (protected, bits) in host.protected.iter_mut().zip(&bits) {
                    *protected |= bits;
                }
            }
            Ok(bits)
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
        Tracker::new(memory, Box::new(log.clone()))
    }

    const MODES: [LogMode; 3] = [LogMode::ManualInitiallySet, LogMode::Manual, LogMode::Plain];

    #[test]
    fn starting_makes_every_page_pending_in_every_mode() {
        for mode in MODES {
            let mut tracker = tracker(&Simulated::new(mode));
            assert!(tracker.harvest().is_err());
            tracker.start().unwrap();
            assert_eq!(tracker.harvest().unwrap(), [PAGES], "{mode:?}");
        }
    }

    #[test]
    fn a_write_between_harvest_and_take_is_read_or_shows_again() {
        for mode in MODES {
            let log = Simulated::new(mode);
            let mut tracker = tracker(&log);
            tracker.start().unwrap();
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
        tracker.start().unwrap();
        tracker.harvest().unwrap();
        tracker.take(0, 0, PAGES).unwrap();
        tracker.memory.write(65 * 4096, &[1]).unwrap();
        assert_eq!(tracker.harvest().unwrap(), [1]);
        assert_eq!(tracker.take(0, 65, 3).unwrap(), Words { first: 64, bits: vec![2] });
    }

    #[test]
    fn ranges_beyond_the_end_are_refused() {
        let mut tracker = tracker(&Simulated::new(LogMode::Manual));
        tracker.start().unwrap();
        for (space, first, pages) in
            [(1, 0, 64), (0, 0, PAGES + 1), (0, PAGES, 1), (0, u64::MAX - 63, 64), (0, 0, 0)]
        {
            assert!(tracker.take(space, first, pages).is_err(), "{space} {first} {pages}");
        }
        assert!(tracker.redirty(0, 0, &[0; 9]).is_err());
    }

    #[test]
    fn what_was_taken_comes_back_when_a_session_dies() {
        let mut tracker = tracker(&Simulated::new(LogMode::Manual));
        tracker.start().unwrap();
        tracker.take(0, 0, 128).unwrap();
        assert_eq!(tracker.pending(), [PAGES - 128]);
        tracker.give_back();
        assert_eq!(tracker.pending(), [PAGES]);
        tracker.stop().unwrap();
        assert!(!tracker.is_tracking());
    }

    #[derive(Debug, Clone)]
    enum Step {
        Write(u64),
        Own(u64),
        Harvest,
        Take(u64, u64),
        Redirty,
        GiveBack,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => (0..PAGES).prop_map(Step::Write),
            1 => (0..PAGES).prop_map(Step::Own),
            2 => Just(Step::Harvest),
            2 => (0..PAGES, 1..=PAGES).prop_map(|(first, pages)| Step::Take(first, pages.min(PAGES - first))),
            1 => Just(Step::Redirty),
            1 => Just(Step::GiveBack),
        ]
    }

    proptest! {
        /// The copy of whoever takes pages equals the guest's memory after a last harvest and take.
        #[test]
        fn taking_never_loses_a_write(mode in 0..3_usize, steps in prop::collection::vec(step(), 1..200)) {
            let log = Simulated::new(MODES[mode]);
            let mut tracker = tracker(&log);
            let mut guest = vec![0_u64; PAGES as usize];
            let mut copy = vec![u64::MAX; PAGES as usize];
            let mut version = 1;
            tracker.start().unwrap();
            let mut last_taken: Option<Words> = None;
            for step in steps.into_iter().chain([Step::Harvest, Step::Take(0, PAGES)]) {
                match step {
                    Step::Write(page) => {
                        guest[page as usize] = version;
                        log.guest_writes(page);
                        version += 1;
                    }
                    Step::Own(page) => {
                        guest[page as usize] = version;
                        tracker.memory.write(page * 4096, &[1]).unwrap();
                        version += 1;
                    }
                    Step::Harvest => drop(tracker.harvest().unwrap()),
                    Step::Take(first, pages) => {
                        let words = tracker.take(0, first, pages).unwrap();
                        for page in first..first + pages {
                            let bit = page - words.first;
                            if words.bits[(bit / 64) as usize] & (1 << (bit % 64)) != 0 {
                                copy[page as usize] = guest[page as usize];
                            }
                        }
                        last_taken = Some(words);
                    }
                    Step::Redirty => if let Some(words) = last_taken.take() {
                        tracker.redirty(0, words.first, &words.bits).unwrap();
                    },
                    Step::GiveBack => tracker.give_back(),
                }
            }
            prop_assert_eq!(guest, copy);
        }
    }
}

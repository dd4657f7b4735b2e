//! The operator's wish to stop.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const PASSED: u8 = 2;

/// Signals by which an operator says that a process shall end.
///
/// The first is a wish. A second one ends the process at once, as it would without all this, so that one that is stuck can be
/// ended; but for as long as something *answers*, a second one is a wish too, and only the third ends it.
#[derive(Debug, Default)]
pub struct Signals {
    came: AtomicU32,
    answering: AtomicU32,
}

impl Signals {
    /// One came. Whether the process must end at once.
    pub fn came(&self) -> bool {
        let before = self.came.fetch_add(1, Ordering::AcqRel);
        before > 1 || before == 1 && self.answering.load(Ordering::Acquire) == 0
    }

    fn number(&self) -> u32 {
        self.came.load(Ordering::Acquire)
    }
}

/// Set by a signal handler or another thread; the engine looks at it between batches and in every wait. Before
/// `Commit` it ends the migration cleanly, behind it, it is answered where there is something to wait for, and ignored
/// else.
///
/// Whoever sets it learns at once which of the two it is: [`CancelFlag::pass`] and [`CancelFlag::set`] exclude each other.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag {
    /// For all migrations of a process.
    signals: Arc<Signals>,
    /// How many of them this migration has taken.
    taken: Arc<AtomicU32>,
    /// Of one migration.
    gate: Arc<AtomicU8>,
}

/// For as long as it lives, a second signal is a wish.
#[derive(Debug)]
pub struct Answers(Arc<Signals>);

impl Drop for Answers {
    fn drop(&mut self) {
        self.0.answering.fetch_sub(1, Ordering::AcqRel);
    }
}

impl CancelFlag {
    /// A flag over signals that somebody else hears.
    pub fn over(signals: Arc<Signals>) -> Self {
        Self { signals, ..Self::default() }
    }

    /// A flag for one migration of several: it can be set for itself, and is set with this one's signals too.
    #[must_use]
    pub fn for_one(&self) -> Self {
        Self::over(Arc::clone(&self.signals))
    }

    /// From now on this looks at every signal, by [`CancelFlag::take`], for as long as the answer lives.
    #[must_use]
    pub fn answers(&self) -> Answers {
        self.signals.answering.fetch_add(1, Ordering::AcqRel);
        Answers(Arc::clone(&self.signals))
    }

    /// Asks the engine to stop. Whether it will: `false` says that it is behind the point where it could.
    pub fn set(&self) -> bool {
        let was = self.gate.compare_exchange(OPEN, CANCELLED, Ordering::AcqRel, Ordering::Acquire);
        was != Err(PASSED)
    }

    /// Asks all that share this flag's signals to stop, as a signal does.
    pub fn set_all(&self) {
        self.signals.came.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether it was asked to.
    pub fn is_set(&self) -> bool {
        self.gate.load(Ordering::Acquire) == CANCELLED || self.signals.number() > 0
    }

    /// Whether setting it would still stop something.
    pub fn is_open(&self) -> bool {
        self.gate.load(Ordering::Acquire) == OPEN
    }

    /// Whether a signal came that was not taken yet: each is one wish. Of several migrations every one sees all of them.
    pub fn take(&self) -> bool {
        let taken = self.taken.load(Ordering::Acquire);
        let more = taken < self.signals.number();
        more && self.taken.compare_exchange(taken, taken + 1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Ends what is being done once the flag is set.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check(&self) -> Result<()> {
        if self.is_set() { Err(interrupted()) } else { Ok(()) }
    }

    /// The last look at it: from here on it cannot be set any more.
    ///
    /// # Errors
    /// `Interrupted` when it was set before.
    pub fn pass(&self) -> Result<()> {
        self.check()?;
        match self.gate.compare_exchange(OPEN, PASSED, Ordering::AcqRel, Ordering::Acquire) {
            Err(CANCELLED) => Err(interrupted()),
            _ => Ok(()),
        }
    }

    /// Takes the last look back: what was about to be decided is not, and setting it stops something again.
    pub fn reopen(&self) {
        let _ = self.gate.compare_exchange(PASSED, OPEN, Ordering::AcqRel, Ordering::Acquire);
    }
}

fn interrupted() -> Error {
    Error::Interrupted("the workload goes on at the source".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_sets_it_knows_whether_it_stops_anything() {
        let flag = CancelFlag::default();
        assert!(flag.is_open() && flag.check().is_ok());
        assert!(flag.set() && flag.set());
        assert!(matches!(flag.pass(), Err(Error::Interrupted(_))));

        let flag = CancelFlag::default();
        flag.pass().unwrap();
        assert!(!flag.set() && !flag.is_set() && !flag.is_open());
        flag.pass().unwrap();
        flag.reopen();
        assert!(flag.is_open() && flag.set());
        flag.reopen();
        assert!(matches!(flag.pass(), Err(Error::Interrupted(_))), "a wish is not taken back");
    }

    #[test]
    fn of_two_that_come_at_the_same_moment_one_wins() {
        for _ in 0..1000 {
            let flag = CancelFlag::default();
            let other = flag.clone();
            let cancelled = std::thread::spawn(move || other.set());
            let passed = flag.pass().is_ok();
            assert_ne!(cancelled.join().unwrap(), passed);
        }
    }

    #[test]
    fn a_signal_is_for_every_migration_and_an_order_for_one() {
        let all = CancelFlag::over(Arc::default());
        let (one, other) = (all.for_one(), all.for_one());
        one.set();
        assert!(one.is_set() && !other.is_set() && !all.is_set());
        one.set_all();
        assert!(other.is_set() && all.is_set());
        assert!(one.take() && other.take() && !other.take());
        assert!(all.take() && !all.take());
        one.set_all();
        assert!(other.take() && one.take() && !one.take(), "the second is a wish of its own");
    }

    #[test]
    fn a_second_signal_ends_the_process_unless_somebody_answers() {
        let signals = Arc::new(Signals::default());
        assert!(!signals.came() && signals.came());

        let signals = Arc::new(Signals::default());
        let flag = CancelFlag::over(Arc::clone(&signals)).for_one();
        let answers = flag.answers();
        assert!(!signals.came() && !signals.came() && signals.came(), "a stuck one is ended by the third");
        assert!(flag.take() && flag.take() && flag.take() && !flag.take());
        drop(answers);

        let signals = Arc::new(Signals::default());
        let flag = CancelFlag::over(Arc::clone(&signals));
        assert!(!signals.came());
        drop(flag.answers());
        assert!(signals.came(), "nobody answers any more");
    }
}

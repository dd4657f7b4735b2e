//! The operator's wish to stop.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
const PASSED: u8 = 2;

/// Set by a signal handler or another thread; the engine looks at it between batches and in every wait. Before
/// `Commit` it ends the migration cleanly, behind it it is ignored.
///
/// Whoever sets it learns at once which of the two it is: [`CancelFlag::pass`] and [`CancelFlag::set`] exclude each other.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag {
    /// What a signal handler sets, for all migrations of a process.
    signalled: Arc<AtomicBool>,
    /// Of one migration.
    gate: Arc<AtomicU8>,
    /// Of a migration that shares its signals with others: it has seen the signal.
    seen: Option<Arc<AtomicBool>>,
}

impl CancelFlag {
    /// A flag over one that somebody else sets, for instance a signal handler.
    pub fn over(signalled: Arc<AtomicBool>) -> Self {
        Self { signalled, gate: Arc::default(), seen: None }
    }

    /// A flag for one migration of several: it can be set for itself, and is set with this one's signals too.
    #[must_use]
    pub fn for_one(&self) -> Self {
        Self { seen: Some(Arc::default()), ..Self::over(Arc::clone(&self.signalled)) }
    }

    /// Asks the engine to stop. Whether it will: `false` says that it is behind the point where it could.
    pub fn set(&self) -> bool {
        let was = self.gate.compare_exchange(OPEN, CANCELLED, Ordering::AcqRel, Ordering::Acquire);
        was != Err(PASSED)
    }

    /// Asks all that share this flag's signals to stop, as a signal does.
    pub fn set_all(&self) {
        self.signalled.store(true, Ordering::Relaxed);
    }

    /// Whether it was asked to.
    pub fn is_set(&self) -> bool {
        self.gate.load(Ordering::Acquire) == CANCELLED || self.signalled.load(Ordering::Relaxed)
    }

    /// Whether setting it would still stop something.
    pub fn is_open(&self) -> bool {
        self.gate.load(Ordering::Acquire) == OPEN
    }

    /// Whether a signal came since the last time; the next one is a new wish. Of several migrations each sees the first
    /// signal, and none takes it from the others.
    pub fn take(&self) -> bool {
        match &self.seen {
            None => self.signalled.swap(false, Ordering::Relaxed),
            Some(seen) => self.signalled.load(Ordering::Relaxed) && !seen.swap(true, Ordering::Relaxed),
        }
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
        let signalled = Arc::new(AtomicBool::new(false));
        let all = CancelFlag::over(Arc::clone(&signalled));
        let (one, other) = (all.for_one(), all.for_one());
        one.set();
        assert!(one.is_set() && !other.is_set() && !all.is_set());
        one.set_all();
        assert!(other.is_set() && all.is_set());
        assert!(one.take() && other.take() && !other.take());
        assert!(all.take() && !all.take());
    }
}

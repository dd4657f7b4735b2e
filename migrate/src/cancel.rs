//! The operator's wish to stop.

use crate::error::{Error, Result};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// Set by a signal handler or another thread; the engine looks at it between batches and in every wait. Before
/// `Commit` it ends the migration cleanly, behind it it is ignored.
#[derive(Debug, Clone, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// A flag over one that somebody else sets, for instance a signal handler.
    pub fn over(flag: Arc<AtomicBool>) -> Self {
        Self(flag)
    }

    /// Asks the engine to stop.
    pub fn set(&self) {
        self.0.store(true, Relaxed);
    }

    /// Whether it was asked to.
    pub fn is_set(&self) -> bool {
        self.0.load(Relaxed)
    }

    /// Whether it was asked to stop since the last time; the next wish is a new one.
    pub fn take(&self) -> bool {
        self.0.swap(false, Relaxed)
    }

    /// Ends what is being done once the flag is set.
    ///
    /// # Errors
    /// `Interrupted`.
    pub fn check(&self) -> Result<()> {
        if self.is_set() {
            return Err(Error::Interrupted("the workload goes on at the source".into()));
        }
        Ok(())
    }
}

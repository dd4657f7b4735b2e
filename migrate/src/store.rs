//! Where checkpoints lie: objects that are written once.
//!
//! ```text
//! checkpoint ─▶ objects ─▶ store (local | s3 | memory)
//! restore    ◀─ objects ◀─
//! ```
//!
//! A store knows names and bytes. What the objects are called and what is in them is `protocol::checkpoint`'s; that a
//! checkpoint exists only when all of it is durable is `crate::checkpoint`'s.

mod name;
mod fault;
mod ranges;
mod holder;
mod local;
mod memory;
mod s3;
mod faulty;

pub use faulty::{Fault, FaultyStore};
pub use holder::Holder;
pub use local::LocalStore;
pub use memory::MemoryStore;
pub use s3::{LockTimes, S3Store};

use crate::error::{Error, Result};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How often somebody who waits for a store's lock tries again.
const LOCK_RETRY: Duration = Duration::from_millis(200);

/// The store at a place that the operator named: the path of a directory, or `s3://BUCKET/PREFIX`. Nothing is made or looked for there
/// before it is used.
///
/// # Errors
/// `Usage` when it is no such place.
pub fn open(place: &str) -> Result<Arc<dyn Store>> {
    if place.is_empty() {
        return Err(Error::Usage("a store is a directory, as in --store /var/lib/checkpoints".into()));
    }
    if place.starts_with(s3::SCHEME) {
        return Ok(Arc::new(S3Store::from_env(place)?));
    }
    if let Some((scheme, _)) = place.split_once("://") {
        return Err(Error::Usage(format!(
            "{place:?} is no store: {scheme}:// is not known; a store is the path of a directory, or s3://bucket/prefix"
        )));
    }
    Ok(Arc::new(LocalStore::new(Path::new(place))))
}

/// A place for objects that are written once.
///
/// *An object that `finish` or `put` has answered for is durable and whole:* it survives the host's losing power right behind the answer,
/// and nobody ever reads a part of it. *Before that nobody reads it at all*, and what a crash leaves of it is no object: it is listed by
/// [`Store::leftovers`] alone.
pub trait Store: Send + Sync {
    /// What an operator calls it: a path or an URL.
    fn place(&self) -> String;

    /// Begins an object of unknown length. Its name must not be taken.
    ///
    /// # Errors
    /// `Store` when it is taken, or nothing can be written.
    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>>;

    /// Writes a short object, whole.
    ///
    /// # Errors
    /// `Store` when the name is taken, or it cannot be written.
    fn put(&self, name: &str, bytes: &[u8]) -> Result<()>;

    /// Opens an object for reading.
    ///
    /// # Errors
    /// `Store`, saying so when there is none of this name.
    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>>;

    /// Whether there is an object of this name.
    ///
    /// # Errors
    /// `Store`.
    fn contains(&self, name: &str) -> Result<bool>;

    /// The objects whose names begin so, in the order of their names.
    ///
    /// # Errors
    /// `Store`.
    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>>;

    /// Removes an object; it is no error if there is none.
    ///
    /// # Errors
    /// `Store`.
    fn delete(&self, name: &str) -> Result<()>;

    /// What crashes left that is no object: names for [`Store::remove_leftover`], with ages.
    ///
    /// # Errors
    /// `Store`.
    fn leftovers(&self) -> Result<Vec<ObjectInfo>>;

    /// Removes what a crash left.
    ///
    /// # Errors
    /// `Store`.
    fn remove_leftover(&self, name: &str) -> Result<()>;

    /// Becomes the one writer, until the lease is dropped, unless somebody is. `owner` is for whoever is refused meanwhile.
    ///
    /// # Errors
    /// `Store` when that cannot be found out.
    fn try_lock(&self, owner: &str) -> Result<Attempt>;

    /// Whether reading what was written costs about as much as writing it, as over a network: content that may be stored already is
    /// not looked for then.
    fn is_remote(&self) -> bool;

    /// Becomes the one writer, until the lease is dropped. `owner` is for whoever is refused meanwhile.
    ///
    /// # Errors
    /// `Store` naming the owner there is, and for how long.
    fn lock(&self, owner: &str) -> Result<Box<dyn Lease>> {
        self.lock_within(owner, Duration::ZERO)
    }

    /// The same, waiting for so long if somebody else is at it.
    ///
    /// # Errors
    /// As `lock`.
    fn lock_within(&self, owner: &str, limit: Duration) -> Result<Box<dyn Lease>> {
        let started = Instant::now();
        loop {
            let holder = match self.try_lock(owner)? {
                Attempt::Held(lease) => return Ok(lease),
                Attempt::Refused(holder) => holder,
            };
            let left = limit.saturating_sub(started.elapsed());
            if left.is_zero() {
                return Err(Error::Store(format!(
                    "{} is being written by {holder}: try again when that is over, or wait for it with --wait",
                    self.place()
                )));
            }
            thread::sleep(left.min(LOCK_RETRY));
        }
    }
}

/// What came of trying to become the one writer.
pub enum Attempt {
    /// This is the one.
    Held(Box<dyn Lease>),
    /// There is one.
    Refused(Holder),
}

/// An object that is being written. Dropped before `finish`, it never was.
pub trait ObjectWriter: Send {
    /// Adds bytes at its end.
    ///
    /// # Errors
    /// `Store`.
    fn append(&mut self, bytes: &[u8]) -> Result<()>;

    /// Makes it durable and visible. Answers its length in bytes.
    ///
    /// # Errors
    /// `Store`; it never was, then.
    fn finish(self: Box<Self>) -> Result<u64>;
}

/// An object that is read, by several threads at once.
pub trait ObjectReader: Send + Sync {
    /// Its length in bytes.
    fn bytes(&self) -> u64;

    /// Fills `buffer` from a byte offset on.
    ///
    /// # Errors
    /// `Store`, also when the object ends before that.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Fills `buffer`, whose length is the sum of the ranges' lengths, with them, one behind the other. Far fewer requests than ranges
    /// where those are dear.
    ///
    /// # Errors
    /// As `read_at`.
    fn read_ranges(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()>;
}

/// An object in a list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// When it was written.
    pub written: SystemTime,
}

/// The right to write.
pub trait Lease: Send {
    /// Fails once the right may have been lost: before an object that makes others valid is written, this is asked.
    ///
    /// # Errors
    /// `Store` saying who has it now.
    fn check(&self) -> Result<()>;

    /// How long it has been held.
    fn held_for(&self) -> Duration;
}

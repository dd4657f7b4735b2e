//! A store that fails at a chosen change, and from then on for as long as it is not mended; or takes its time for each.

use migrate::error::{Error, Result};
use migrate::store::{Attempt, MemoryStore, ObjectInfo, ObjectReader, ObjectWriter, Store};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

/// A store in memory whose n-th change fails, and every one behind it.
#[derive(Clone)]
pub(crate) struct Brittle {
    inner: MemoryStore,
    /// Changes that succeed before it fails.
    left: Arc<AtomicU64>,
    /// How long every change takes, in milliseconds.
    slow_ms: Arc<AtomicU64>,
    /// Beginning of the names that nobody can write, because whoever tries panics.
    deadly: Arc<Mutex<Option<&'static str>>>,
}

impl Brittle {
    pub(crate) fn new() -> Self {
        Self {
            inner: MemoryStore::new(),
            left: Arc::new(AtomicU64::new(u64::MAX)),
            slow_ms: Arc::default(),
            deadly: Arc::default(),
        }
    }

    /// Whoever writes a short object of such a name panics, as if there were a defect in the store.
    pub(crate) fn panic_at(&self, prefix: Option<&'static str>) {
        *self.deadly.lock().unwrap() = prefix;
    }

    /// Lets so many changes succeed, and no more.
    pub(crate) fn fail_behind(&self, changes: u64) {
        self.left.store(changes, Ordering::SeqCst);
    }

    /// Lets every change take so long.
    pub(crate) fn slow_down(&self, each: Duration) {
        self.slow_ms.store(each.as_millis().try_into().unwrap(), Ordering::SeqCst);
    }

    fn change(&self) -> Result<()> {
        change(&self.left, &self.slow_ms)
    }

    /// Lets every change succeed again. Answers whether any failed.
    pub(crate) fn mend(&self) -> bool {
        self.left.swap(u64::MAX, Ordering::SeqCst) == 0
    }
}

fn change(left: &AtomicU64, slow_ms: &AtomicU64) -> Result<()> {
    std::thread::sleep(Duration::from_millis(slow_ms.load(Ordering::SeqCst)));
    let spent = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1));
    spent.map(drop).map_err(|_| Error::Store("there is no space left".into()))
}

impl Store for Brittle {
    fn place(&self) -> String {
        "a brittle store".into()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        self.change()?;
        let inner = self.inner.create(name)?;
        Ok(Box::new(Writer { inner, left: Arc::clone(&self.left), slow_ms: Arc::clone(&self.slow_ms) }))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let deadly = *self.deadly.lock().unwrap();
        assert!(!deadly.is_some_and(|prefix| name.starts_with(prefix)), "a defect at {name}");
        self.change()?;
        self.inner.put(name, bytes)
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        self.inner.open(name)
    }

    fn contains(&self, name: &str) -> Result<bool> {
        self.inner.contains(name)
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        self.inner.list(prefix)
    }

    fn delete(&self, name: &str) -> Result<()> {
        self.change()?;
        self.inner.delete(name)
    }

    fn leftovers(&self) -> Result<Vec<ObjectInfo>> {
        self.inner.leftovers()
    }

    fn remove_leftover(&self, name: &str) -> Result<()> {
        self.inner.remove_leftover(name)
    }

    fn try_lock(&self, owner: &str) -> Result<Attempt> {
        self.inner.try_lock(owner)
    }

    fn is_remote(&self) -> bool {
        self.inner.is_remote()
    }
}

struct Writer {
    inner: Box<dyn ObjectWriter>,
    left: Arc<AtomicU64>,
    slow_ms: Arc<AtomicU64>,
}

impl ObjectWriter for Writer {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        change(&self.left, &self.slow_ms)?;
        self.inner.append(bytes)
    }

    fn finish(self: Box<Self>) -> Result<u64> {
        change(&self.left, &self.slow_ms)?;
        self.inner.finish()
    }
}

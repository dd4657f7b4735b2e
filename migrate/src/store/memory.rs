//! A store in this process's memory, for tests and for whoever wants to keep nothing. Clones share what is in it.

use super::holder::random;
use super::{Attempt, Holder, Lease, ObjectInfo, ObjectReader, ObjectWriter, Store, fault, name, ranges};
use crate::error::{Error, Result};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

/// See the module.
#[derive(Clone, Default)]
pub struct MemoryStore {
    kept: Arc<Mutex<Kept>>,
}

#[derive(Default)]
struct Kept {
    objects: BTreeMap<String, Object>,
    /// What is being written, or was and never finished.
    leftovers: BTreeMap<String, Object>,
    holder: Option<Holder>,
}

#[derive(Clone)]
struct Object {
    bytes: Arc<Vec<u8>>,
    written: SystemTime,
}

impl Object {
    fn new(bytes: Vec<u8>) -> Self {
        Self { bytes: Arc::new(bytes), written: SystemTime::now() }
    }

    fn info(&self, name: &str) -> ObjectInfo {
        ObjectInfo { name: name.to_owned(), bytes: self.bytes.len() as u64, written: self.written }
    }
}

const PLACE: &str = "memory";

impl MemoryStore {
    /// An empty one.
    pub fn new() -> Self {
        Self::default()
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        // Every change is one call of a map: nothing is half done.
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for MemoryStore {
    fn place(&self) -> String {
        PLACE.into()
    }

    fn create(&self, name: &str) -> Result<Box<dyn ObjectWriter>> {
        name::check(name)?;
        if self.contains(name)? {
            return Err(fault::taken(PLACE, name));
        }
        let temporary = format!("{}/{:016x}", name::TEMPORARY, random());
        self.kept().leftovers.insert(temporary.clone(), Object::new(Vec::new()));
        Ok(Box::new(Writer { store: self.clone(), name: name.to_owned(), temporary }))
    }

    fn put(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let mut writer = self.create(name)?;
        writer.append(bytes)?;
        writer.finish().map(|_| ())
    }

    fn open(&self, name: &str) -> Result<Box<dyn ObjectReader>> {
        name::check(name)?;
        let found = self.kept().objects.get(name).cloned();
        let object = found.ok_or_else(|| fault::missing(PLACE, name))?;
        Ok(Box::new(Reader { name: name.to_owned(), bytes: object.bytes }))
    }

    fn contains(&self, name: &str) -> Result<bool> {
        name::check(name)?;
        Ok(self.kept().objects.contains_key(name))
    }

    fn list(&self, prefix: &str) -> Result<Vec<ObjectInfo>> {
        name::check_prefix(prefix)?;
        let kept = self.kept();
        let from = kept.objects.range(prefix.to_owned()..);
        let found = from.take_while(|(name, _)| name.starts_with(prefix));
        Ok(found.map(|(name, object)| object.info(name)).collect())
    }

    fn delete(&self, name: &str) -> Result<()> {
        name::check(name)?;
        self.kept().objects.remove(name);
        Ok(())
    }

    fn leftovers(&self) -> Result<Vec<ObjectInfo>> {
        Ok(self.kept().leftovers.iter().map(|(name, object)| object.info(name)).collect())
    }

    fn remove_leftover(&self, name: &str) -> Result<()> {
        name::check_leftover(name)?;
        self.kept().leftovers.remove(name);
        Ok(())
    }

    fn try_lock(&self, owner: &str) -> Result<Attempt> {
        let mut kept = self.kept();
        if let Some(holder) = &kept.holder {
            return Ok(Attempt::Refused(holder.clone()));
        }
        let holder = Holder::here(owner);
        kept.holder = Some(holder.clone());
        Ok(Attempt::Held(Box::new(Held { store: self.clone(), token: holder.token, since: Instant::now() })))
    }

    fn is_remote(&self) -> bool {
        false
    }
}

struct Writer {
    store: MemoryStore,
    name: String,
    temporary: String,
}

impl ObjectWriter for Writer {
    fn append(&mut self, bytes: &[u8]) -> Result<()> {
        let mut kept = self.store.kept();
        let object = kept.leftovers.get_mut(&self.temporary).ok_or_else(|| self.collected())?;
        Arc::make_mut(&mut object.bytes).extend_from_slice(bytes);
        object.written = SystemTime::now();
        Ok(())
    }

    fn finish(self: Box<Self>) -> Result<u64> {
        let mut kept = self.store.kept();
        if kept.objects.contains_key(&self.name) {
            return Err(fault::taken(PLACE, &self.name));
        }
        let object = kept.leftovers.remove(&self.temporary).ok_or_else(|| self.collected())?;
        let bytes = object.bytes.len() as u64;
        kept.objects.insert(self.name.clone(), object);
        Ok(bytes)
    }
}

impl Writer {
    fn collected(&self) -> Error {
        Error::Store(format!(
            "the object {} was collected as a leftover while it was being written",
            self.name
        ))
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.store.kept().leftovers.remove(&self.temporary);
    }
}

struct Reader {
    name: String,
    bytes: Arc<Vec<u8>>,
}

impl ObjectReader for Reader {
    fn bytes(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let from = usize::try_from(offset).ok();
        let found = from.and_then(|from| self.bytes.get(from..)?.get(..buffer.len()));
        buffer.copy_from_slice(found.ok_or_else(|| fault::short(PLACE, &self.name, self.bytes()))?);
        Ok(())
    }

    fn read_ranges(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        ranges::each(&self.name, ranges, buffer, |offset, part| self.read_at(offset, part))
    }
}

struct Held {
    store: MemoryStore,
    token: String,
    since: Instant,
}

impl Lease for Held {
    fn check(&self) -> Result<()> {
        match &self.store.kept().holder {
            Some(holder) if holder.token == self.token => Ok(()),
            _ => Err(Error::Store("the lock of the store in memory was lost".into())),
        }
    }

    fn held_for(&self) -> Duration {
        self.since.elapsed()
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut kept = self.store.kept();
        if kept.holder.as_ref().is_some_and(|holder| holder.token == self.token) {
            kept.holder = None;
        }
    }
}

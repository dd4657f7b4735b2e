//! From an archive into a store.

use super::PIECE_BYTES;
use crate::cancel::CancelFlag;
use crate::error::{Error, Result, clean};
use crate::store::Lease;
use crate::vault::{SegmentReader, Unpacker, Vault};
use protocol::checkpoint::manifest::{
    Group, MAX_CHAIN_DELTAS, MAX_JSON_BYTES, Manifest, Parent, StoreInfo, from_json,
};
use protocol::checkpoint::name::{self, CHECKPOINTS, CheckpointId, DATA, GROUPS};
use protocol::checkpoint::object::{Digest, Kind};
use protocol::checkpoint::segment::MAX_EXTENT_PAGES;
use std::io::Read;

/// The most bytes of manifests and groups in one archive: they wait in memory.
const MAX_WAITING_BYTES: u64 = 256 << 20;

/// What was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Imported {
    /// The checkpoint that was meant.
    pub id: CheckpointId,
    /// Checkpoints that are in the store now and were not.
    pub checkpoints: usize,
    /// Objects that were written.
    pub objects: usize,
    /// Their bytes.
    pub bytes: u64,
}

/// Reads an archive into a store.
///
/// # Errors
/// `Store` naming the object that is missing, damaged, or another one in this store; `Usage` when the store is sealed in another
/// way; `Host` when the archive cannot be read; `Interrupted`. What was written is removed then, as far as that is possible.
pub fn import(
    vault: &Vault,
    input: &mut dyn Read,
    lease: &dyn Lease,
    cancel: &CancelFlag,
) -> Result<Imported> {
    let mut import = Import::new(vault, cancel, false);
    let result = import.read(input).and_then(|()| import.commit(lease));
    if result.is_err() {
        // Manifests come last, the oldest first: in this order nothing stands on what is gone.
        for name in import.written.iter().rev() {
            vault.store().delete(name).ok();
        }
    }
    result
}

/// What [`import`] would write. The archive is read to its end, and its manifests are checked; page data is counted and no more, because
/// what it should be stands behind it.
///
/// # Errors
/// As [`import`], but for what only reading back can find.
pub fn import_forecast(vault: &Vault, input: &mut dyn Read, cancel: &CancelFlag) -> Result<Imported> {
    let mut import = Import::new(vault, cancel, true);
    import.read(input)?;
    import.forecast()
}

/// A manifest that waits.
struct Waiting {
    id: CheckpointId,
    manifest: Manifest,
    digest: Digest,
    stored: Vec<u8>,
}

struct Import<'a> {
    vault: &'a Vault,
    cancel: &'a CancelFlag,
    /// Nothing is written: `written` has what would be.
    is_forecast: bool,
    /// The newest first.
    manifests: Vec<Waiting>,
    groups: Vec<(String, Vec<u8>)>,
    waiting_bytes: u64,
    written: Vec<String>,
    bytes: u64,
}

fn unreadable(error: &std::io::Error) -> Error {
    Error::Host(format!("the archive cannot be read: {error}"))
}

fn bad(why: &str) -> Error {
    Error::Store(format!("this is no archive of a checkpoint, or not all of it: {why}; export it again"))
}

impl<'a> Import<'a> {
    fn new(vault: &'a Vault, cancel: &'a CancelFlag, is_forecast: bool) -> Self {
        Self {
            vault,
            cancel,
            is_forecast,
            manifests: Vec::new(),
            groups: Vec::new(),
            waiting_bytes: 0,
            written: Vec::new(),
            bytes: 0,
        }
    }

    /// Takes in all objects: data into the store, manifests and groups into memory.
    fn read(&mut self, input: &mut dyn Read) -> Result<()> {
        let mut archive = tar::Archive::new(input);
        let mut is_first = true;
        // Raw: an extension of the format would be an entry like any other, and is none of ours.
        for entry in archive.entries().map_err(|error| unreadable(&error))?.raw(true) {
            self.cancel.check()?;
            let mut entry = entry.map_err(|error| unreadable(&error))?;
            let name = String::from_utf8(entry.path_bytes().into_owned()).unwrap_or_default();
            if !entry.header().entry_type().is_file() {
                return Err(bad(&format!("{:?} is no file", clean(&name))));
            }
            if (name == name::STORE) != is_first {
                return Err(bad(&format!("{:?} stands where {} should", clean(&name), name::STORE)));
            }
            is_first = false;
            self.object(&name, &mut entry)?;
        }
        if self.manifests.is_empty() { Err(bad("it has no manifest")) } else { Ok(()) }
    }

    fn object(&mut self, name: &str, entry: &mut tar::Entry<'_, &mut dyn Read>) -> Result<()> {
        let size = entry.size();
        if name == name::STORE {
            let stored = self.short(name, size, entry)?;
            let (json, _) = self.vault.open_object(Kind::Store, name, stored, None)?;
            let info: StoreInfo =
                from_json("the description of a store", &json).map_err(|error| bad(&error.to_string()))?;
            if info.seal != self.vault.info().seal {
                return Err(Error::Usage(format!(
                    "{} is not sealed as the store was that the archive is of: import it into one with the same key, or without one if \
                     that had none",
                    self.vault.place()
                )));
            }
            return Ok(());
        }
        let id = |folder| name.strip_prefix(folder).and_then(|id: &str| id.parse::<CheckpointId>().ok());
        if let Some(id) = id(CHECKPOINTS) {
            if self.manifests.len() > MAX_CHAIN_DELTAS as usize {
                return Err(bad("it has more manifests than a chain"));
            }
            let stored = self.short(name, size, entry)?;
            let (json, part) = self.vault.open_object(Kind::Manifest, name, stored.clone(), None)?;
            let manifest: Manifest =
                from_json("a manifest", &json).map_err(|error| bad(&error.to_string()))?;
            manifest.validate(id).map_err(|error| bad(&format!("{name}: {error}")))?;
            self.manifests.push(Waiting { id, manifest, digest: part.digest.0, stored });
            return Ok(());
        }
        if id(GROUPS).is_some() {
            let stored = self.short(name, size, entry)?;
            self.groups.push((name.to_owned(), stored));
            return Ok(());
        }
        if !self.is_wanted(name) {
            return Err(bad(&format!("none of its manifests speaks of {:?}", clean(name))));
        }
        self.data(name, size, entry)
    }

    /// Whether a manifest of the archive speaks of this data.
    fn is_wanted(&self, object: &str) -> bool {
        object.starts_with(DATA)
            && self.manifests.iter().any(|Waiting { id, manifest, .. }| {
                object == name::index(*id)
                    || object == name::state(*id)
                    || manifest
                        .segments
                        .iter()
                        .any(|part| object == name::segment(part.checkpoint, part.number))
            })
    }

    /// A short object, into memory.
    fn short(&mut self, name: &str, size: u64, entry: &mut dyn Read) -> Result<Vec<u8>> {
        self.waiting_bytes = self.waiting_bytes.saturating_add(size);
        if size > MAX_JSON_BYTES as u64 + 1024 || self.waiting_bytes > MAX_WAITING_BYTES {
            return Err(bad(&format!(
                "{name} has {size} bytes, and with all like it {}",
                self.waiting_bytes
            )));
        }
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).map_err(|error| unreadable(&error))?;
        if bytes.len() as u64 == size { Ok(bytes) } else { Err(bad(&format!("{name} is cut short"))) }
    }

    /// Data, into the store; what is there already is compared by its length now, and by its digests later.
    fn data(&mut self, name: &str, size: u64, entry: &mut dyn Read) -> Result<()> {
        if self.vault.store().contains(name)? {
            let found = self.vault.store().open(name)?.bytes();
            return if found == size {
                Ok(())
            } else {
                Err(self
                    .vault
                    .wrong(name)
                    .damaged(&format!("it has {found} bytes, the archive's has {size}")))
            };
        }
        if self.is_forecast {
            let found = std::io::copy(entry, &mut std::io::sink()).map_err(|error| unreadable(&error))?;
            if found != size {
                return Err(bad(&format!("{name} is cut short")));
            }
            self.count(name, size);
            return Ok(());
        }
        let mut writer = self.vault.store().create(name)?;
        let mut piece = vec![0; PIECE_BYTES];
        let mut left = size;
        while left > 0 {
            self.cancel.check()?;
            let most = left.min(PIECE_BYTES as u64) as usize;
            let now = piece.get_mut(..most).unwrap_or_default();
            let count = entry.read(now).map_err(|error| unreadable(&error))?;
            if count == 0 {
                return Err(bad(&format!("{name} is cut short")));
            }
            writer.append(now.get(..count).unwrap_or_default())?;
            left -= count as u64;
        }
        writer.finish()?;
        self.count(name, size);
        Ok(())
    }

    /// Makes the checkpoints exist, when all that they speak of was read back and is right.
    fn commit(&mut self, lease: &dyn Lease) -> Result<Imported> {
        let id = self.check_chain()?;
        for at in 0..self.manifests.len() {
            self.verify(at)?;
        }
        let manifests = std::mem::take(&mut self.manifests);
        let mut checkpoints = 0;
        for waiting in manifests.iter().rev() {
            checkpoints += usize::from(self.put(lease, &name::manifest(waiting.id), &waiting.stored)?);
        }
        for (name, stored) in std::mem::take(&mut self.groups) {
            // Of which kind it is was not looked at yet.
            let (json, _) = self.vault.open_object(Kind::Group, &name, stored.clone(), None)?;
            from_json::<Group>("a group", &json).map_err(|error| bad(&error.to_string()))?;
            self.put(lease, &name, &stored)?;
        }
        // As everybody else will find it.
        self.vault.chain(id)?;
        Ok(Imported { id, checkpoints, objects: self.written.len(), bytes: self.bytes })
    }

    /// What `commit` would come to.
    fn forecast(mut self) -> Result<Imported> {
        let id = self.check_chain()?;
        let mut checkpoints = 0;
        for waiting in std::mem::take(&mut self.manifests) {
            let name = name::manifest(waiting.id);
            if !self.is_there(&name, &waiting.stored)? {
                checkpoints += 1;
                self.count(&name, waiting.stored.len() as u64);
            }
        }
        for (name, stored) in std::mem::take(&mut self.groups) {
            if !self.is_there(&name, &stored)? {
                self.count(&name, stored.len() as u64);
            }
        }
        Ok(Imported { id, checkpoints, objects: self.written.len(), bytes: self.bytes })
    }

    /// The manifests are one chain, the newest first, to its end.
    fn check_chain(&self) -> Result<CheckpointId> {
        let mut wanted: Option<Parent> = None;
        let mut newest = None;
        for Waiting { id, manifest, digest, .. } in &self.manifests {
            match (&wanted, newest) {
                (_, None) => newest = Some(*id),
                (Some(parent), _) if parent.id == *id && parent.digest.0 == *digest => {}
                _ => return Err(bad(&format!("{} is not what its chain goes on with", name::manifest(*id)))),
            }
            wanted.clone_from(&manifest.parent);
        }
        match (wanted, newest) {
            (None, Some(newest)) => Ok(newest),
            (Some(parent), _) => Err(bad(&format!("{} is missing", name::manifest(parent.id)))),
            (None, None) => Err(bad("it has no manifest")),
        }
    }

    /// Reads back everything that one manifest speaks of.
    fn verify(&self, at: usize) -> Result<()> {
        let Some(Waiting { manifest, .. }) = self.manifests.get(at) else { return Ok(()) };
        self.vault.state(manifest)?;
        let index = self.vault.index(manifest)?;
        let readers: Vec<_> = manifest
            .segments
            .iter()
            .map(|segment| SegmentReader::open(self.vault, segment))
            .collect::<Result<_>>()?;
        let mut unpacker = Unpacker::default();
        for (number, extent) in index.extents.iter().enumerate() {
            if number % usize::from(MAX_EXTENT_PAGES) == 0 {
                self.cancel.check()?;
            }
            if let Some(reader) = readers.get(extent.segment as usize) {
                reader.read(extent, &mut unpacker)?;
            }
        }
        Ok(())
    }

    /// Writes an object that makes others valid; whether it was not there.
    fn put(&mut self, lease: &dyn Lease, name: &str, stored: &[u8]) -> Result<bool> {
        if self.is_there(name, stored)? {
            return Ok(false);
        }
        lease.check()?;
        self.vault.store().put(name, stored)?;
        self.count(name, stored.len() as u64);
        Ok(true)
    }

    fn count(&mut self, name: &str, bytes: u64) {
        self.written.push(name.to_owned());
        self.bytes += bytes;
    }

    /// Whether an object is there already. Another one of its name is an error.
    fn is_there(&self, name: &str, stored: &[u8]) -> Result<bool> {
        if self.vault.store().contains(name)? {
            let reader = self.vault.store().open(name)?;
            let mut found = vec![0; stored.len()];
            let same = reader.bytes() == stored.len() as u64 && {
                reader.read_at(0, &mut found)?;
                found == stored
            };
            return if same {
                Ok(true)
            } else {
                Err(self.vault.wrong(name).damaged("the archive has another one of this name"))
            };
        }
        Ok(false)
    }
}

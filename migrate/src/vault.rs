//! Checkpoints in a store: its objects as what they mean.
//!
//! ```text
//! checkpoint ─▶ segment writers ─▶ index, state ─▶ manifest ─▶ store
//! restore    ◀─ segment readers ◀─ chain of manifests        ◀─
//! ```
//!
//! The store keeps bytes; this knows which of them are a manifest, an index, a state, page data, and trusts none of them: whatever is
//! read is checked for its length before memory is taken for it, and against its digest before it is used. An error names the
//! checkpoint and the object.

pub(crate) mod wrong;
mod write;
mod read;
mod catalogue;
mod resolve;
mod groups;
mod touched;
mod merged;
#[cfg(test)]
pub(crate) mod sample;
#[cfg(test)]
mod tests;

pub use catalogue::{Committed, Damaged, Listing};
pub use read::{SegmentReader, Unpacker};
pub use write::{RAW_EXTENT_PAGES, SegmentWriter, ZSTD_EXTENT_PAGES};

use crate::error::{Error, Result};
use crate::seal::{SALT_BYTES, Sealer, StoreKey};
use crate::store::Store;
use protocol::checkpoint::index::{Index, Rows};
use protocol::checkpoint::manifest::{
    HexDigest, MAX_JSON_BYTES, Manifest, Part, StoreInfo, from_json, to_json,
};
use protocol::checkpoint::name::{self, CheckpointId};
use protocol::checkpoint::object::{self, Kind};
use protocol::checkpoint::segment::TAG_BYTES;
use protocol::control::MAX_BLOB_BYTES;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};
use wrong::Wrong;

/// What an object has around its body: a header, and what sealing adds.
const FRAME_BYTES: u64 = (object::HEADER_BYTES + SALT_BYTES + TAG_BYTES) as u64;

/// The most bytes of a state: what two blobs of a migration have, and the length of the first.
const MAX_STATE_BYTES: u64 = 2 * MAX_BLOB_BYTES as u64 + 4;

/// What writes checkpoints, as they say it themselves.
const SOFTWARE: &str = concat!("migrate ", env!("CARGO_PKG_VERSION"));

/// A store, opened.
#[derive(Clone)]
pub struct Vault {
    store: Arc<dyn Store>,
    info: StoreInfo,
    /// In a sealed store everything but its description is sealed: what is not was put there by somebody without the key.
    sealer: Option<Sealer>,
}

/// Milliseconds since 1970.
pub fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// The name of a checkpoint that begins now.
///
/// # Errors
/// `Host` when there is no randomness to be had.
pub fn new_id() -> Result<CheckpointId> {
    Ok(CheckpointId::new(now_unix_ms() / 1000, u32::from_le_bytes(random()?)))
}

fn random<const N: usize>() -> Result<[u8; N]> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|_| Error::Host("the system gives no random numbers: nothing can be named".into()))?;
    Ok(bytes)
}

impl Vault {
    /// Makes a store where there is none.
    ///
    /// # Errors
    /// `Store`, also when there is one; `Host`.
    pub fn create(store: Arc<dyn Store>, key: Option<&StoreKey>) -> Result<Self> {
        let sealer = key.map(Sealer::new);
        let info = StoreInfo {
            id: random::<16>()?.iter().map(|byte| format!("{byte:02x}")).collect(),
            created_unix_ms: now_unix_ms(),
            software: SOFTWARE.into(),
            seal: sealer.as_ref().map(Sealer::seal),
        };
        let vault = Self { store, info, sealer };
        vault.put_json(Kind::Store, name::STORE, &vault.info)?;
        Ok(vault)
    }

    /// Opens a store that is there.
    ///
    /// # Errors
    /// `Store` when there is none, or it is of a version that this release does not read; `Usage` when the key is not the store's.
    pub fn open(store: Arc<dyn Store>, key: Option<&StoreKey>) -> Result<Self> {
        if !store.contains(name::STORE)? {
            return Err(Error::Store(format!(
                "{} is no checkpoint store: it has no {}; `migrate checkpoint` makes one",
                store.place(),
                name::STORE
            )));
        }
        let mut vault = Self {
            info: StoreInfo { id: String::new(), created_unix_ms: 0, software: String::new(), seal: None },
            store,
            sealer: None,
        };
        vault.info = vault.get_json(Kind::Store, name::STORE)?.0;
        vault.sealer = match (&vault.info.seal, key) {
            (None, None) => None,
            (Some(seal), Some(key)) => {
                let sealer = Sealer::new(key);
                sealer.check(seal)?;
                Some(sealer)
            }
            (Some(_), None) => {
                let place = vault.place();
                return Err(Error::Usage(format!(
                    "{place} is sealed: name the file of its key with --encrypt"
                )));
            }
            (None, Some(_)) => {
                let place = vault.place();
                return Err(Error::Usage(format!(
                    "{place} is not sealed, and was made so: leave out --encrypt, or use another store"
                )));
            }
        };
        Ok(vault)
    }

    /// Opens a store, or makes one where there is none.
    ///
    /// # Errors
    /// As `open` and `create`.
    pub fn open_or_create(store: Arc<dyn Store>, key: Option<&StoreKey>) -> Result<Self> {
        if store.contains(name::STORE)? { Self::open(store, key) } else { Self::create(store, key) }
    }

    /// The store below.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// What the store says of itself.
    pub fn info(&self) -> &StoreInfo {
        &self.info
    }

    /// What an operator calls it.
    pub fn place(&self) -> String {
        self.store.place()
    }

    pub(crate) fn wrong<'a>(&'a self, object: &'a str) -> Wrong<'a> {
        Wrong { store: &*self.store, object }
    }

    /// Writes an object, which is durable then.
    ///
    /// # Errors
    /// `Store`, also when there is one of this name.
    pub fn put(&self, kind: Kind, name: &str, body: &[u8]) -> Result<Part> {
        let sealed = match self.sealer.as_ref().filter(|_| kind != Kind::Store) {
            None => None,
            Some(sealer) => {
                let mut sealed = body.to_vec();
                sealer.seal_body(name, &mut sealed)?;
                Some(sealed)
            }
        };
        let (bytes, digest) = object::encode(kind, sealed.is_some(), sealed.as_deref().unwrap_or(body));
        self.store.put(name, &bytes)?;
        Ok(Part { bytes: bytes.len() as u64, digest: HexDigest(digest) })
    }

    /// Writes an object that is JSON.
    ///
    /// # Errors
    /// As `put`, and when it is too long.
    pub fn put_json<T: Serialize>(&self, kind: Kind, name: &str, value: &T) -> Result<Part> {
        let json = to_json(what(kind), value).map_err(|error| self.wrong(name).unwritable(&error))?;
        self.put(kind, name, &json)
    }

    /// Reads the body of an object; `part` is what another object says of it.
    ///
    /// # Errors
    /// `Store` when there is none, or it is not what it should be.
    fn read(&self, kind: Kind, name: &str, part: Option<&Part>) -> Result<(Vec<u8>, Part)> {
        let mut bytes = Vec::new();
        self.load(kind, name, part, &mut bytes)?;
        self.open_object(kind, name, bytes, part)
    }

    /// Reads all of an object into a buffer; what that held is of no use any more.
    fn load(&self, kind: Kind, name: &str, part: Option<&Part>, bytes: &mut Vec<u8>) -> Result<()> {
        let wrong = self.wrong(name);
        let reader = self.store.open(name)?;
        let found = reader.bytes();
        if let Some(part) = part.filter(|part| part.bytes != found) {
            return Err(wrong.damaged(&format!("it has {found} bytes and not {}", part.bytes)));
        }
        if found > limit_bytes(kind).saturating_add(FRAME_BYTES) {
            return Err(wrong.damaged(&format!("its {found} bytes are more than {} has", what(kind))));
        }
        let length = usize::try_from(found).unwrap_or(usize::MAX);
        bytes
            .try_reserve_exact(length.saturating_sub(bytes.len()))
            .map_err(|_| Error::Host(format!("there is no memory for the {found} bytes of {name}")))?;
        // What it held is overwritten, and need not be cleared.
        bytes.resize(length, 0);
        reader.read_at(0, bytes)
    }

    /// The body of an object whose bytes were read already, from here or elsewhere, and what it is known by.
    ///
    /// # Errors
    /// `Store` when it is not what it should be.
    pub(crate) fn open_object(
        &self,
        kind: Kind,
        name: &str,
        mut bytes: Vec<u8>,
        part: Option<&Part>,
    ) -> Result<(Vec<u8>, Part)> {
        let (start, part) = self.check_object(kind, name, &mut bytes, part)?;
        bytes.drain(..start);
        Ok((bytes, part))
    }

    /// Checks an object, opens it if it is sealed, and answers where its body begins: it goes to the end.
    fn check_object(
        &self,
        kind: Kind,
        name: &str,
        bytes: &mut Vec<u8>,
        part: Option<&Part>,
    ) -> Result<(usize, Part)> {
        let wrong = self.wrong(name);
        let found = bytes.len() as u64;
        let object = object::decode(bytes, kind, what(kind)).map_err(|error| wrong.undecodable(&error))?;
        if let Some(part) = part.filter(|part| part.digest.0 != object.digest) {
            let why = format!("its digest is {} and not {}", HexDigest(object.digest), part.digest);
            return Err(wrong.damaged(&why));
        }
        let sealer = self.sealer.as_ref().filter(|_| kind != Kind::Store);
        let (sealed, digest) = (object.sealed, HexDigest(object.digest));
        if sealed != sealer.is_some() {
            let why =
                if sealed { "it is sealed, the store is not" } else { "it is not sealed, the store is" };
            return Err(wrong.damaged(why));
        }
        let mut start = object::HEADER_BYTES;
        if let Some(sealer) = sealer {
            bytes.drain(..std::mem::take(&mut start));
            sealer.open_body(name, bytes)?;
        }
        Ok((start, Part { bytes: found, digest }))
    }

    /// Reads the body of an object of which another says length and digest.
    ///
    /// # Errors
    /// `Store` when there is none, or it is another one, or damaged; or longer than any of its kind.
    pub fn get(&self, kind: Kind, name: &str, part: &Part) -> Result<Vec<u8>> {
        Ok(self.read(kind, name, Some(part))?.0)
    }

    /// Reads an object that is JSON, and what it is known by.
    ///
    /// # Errors
    /// As `get`, and when it is not the JSON it should be.
    pub fn get_json<T: DeserializeOwned>(&self, kind: Kind, name: &str) -> Result<(T, Part)> {
        let (json, part) = self.read(kind, name, None)?;
        let value = from_json(what(kind), &json).map_err(|error| self.wrong(name).damaged(&error))?;
        Ok((value, part))
    }

    /// Where the pages lie that a checkpoint added.
    ///
    /// # Errors
    /// `Store`.
    pub fn index(&self, manifest: &Manifest) -> Result<Index> {
        let mut buffer = Vec::new();
        Ok(self.index_rows(manifest, &mut buffer)?.into())
    }

    /// The same for whoever goes through it once, in a buffer that many of them may use in turn.
    ///
    /// # Errors
    /// `Store`.
    pub(crate) fn index_rows<'a>(&self, manifest: &Manifest, buffer: &'a mut Vec<u8>) -> Result<Rows<'a>> {
        let name = name::index(manifest.id);
        self.load(Kind::Index, &name, Some(&manifest.index), buffer)?;
        let (start, _) = self.check_object(Kind::Index, &name, buffer, Some(&manifest.index))?;
        let body = buffer.get(start..).unwrap_or_default();
        let rows = Rows::check(&manifest.layout, manifest.segments.len() as u32, body);
        let rows = rows.map_err(|error| self.wrong(&name).damaged(&error))?;
        let inside = |extent: &protocol::checkpoint::index::Extent| {
            let segment = manifest.segments.get(extent.segment as usize);
            let end = extent.offset.checked_add(u64::from(extent.stored_bytes));
            segment.zip(end).is_some_and(|(segment, end)| end <= segment.bytes)
        };
        match rows.extents().iter().position(|extent| !inside(extent)) {
            None => Ok(rows),
            Some(at) => Err(self.wrong(&name).damaged(&format!("extent {at} leaves its segment"))),
        }
    }

    /// Writes an index, before the manifest that says of it.
    ///
    /// # Errors
    /// `Store`.
    pub fn put_index(&self, id: CheckpointId, index: &Index) -> Result<Part> {
        self.put(Kind::Index, &name::index(id), &index.encode())
    }

    /// The machine description and the workload's state.
    ///
    /// # Errors
    /// `Store`.
    pub fn state(&self, manifest: &Manifest) -> Result<(Vec<u8>, Vec<u8>)> {
        let name = name::state(manifest.id);
        let mut machine = self.get(Kind::State, &name, &manifest.state)?;
        let split = machine.first_chunk::<4>().map(|bytes| 4 + u64::from(u32::from_le_bytes(*bytes)));
        let Some(split) = split.filter(|split| *split <= machine.len() as u64) else {
            return Err(self.wrong(&name).damaged("the machine description leaves it"));
        };
        let state = machine.split_off(split as usize);
        machine.drain(..4);
        Ok((machine, state))
    }

    /// Writes a state, before the manifest that says of it.
    ///
    /// # Errors
    /// `Store`.
    pub fn put_state(&self, id: CheckpointId, machine: &[u8], state: &[u8]) -> Result<Part> {
        let name = name::state(id);
        let limit = MAX_BLOB_BYTES as usize;
        if machine.len() > limit || state.len() > limit {
            let why = format!("{} and {} bytes are more than {limit}", machine.len(), state.len());
            return Err(self.wrong(&name).unwritable(&why));
        }
        let mut body = Vec::with_capacity(4 + machine.len() + state.len());
        body.extend_from_slice(&(machine.len() as u32).to_le_bytes());
        body.extend_from_slice(machine);
        body.extend_from_slice(state);
        self.put(Kind::State, &name, &body)
    }
}

/// The most bytes that a stored body of this kind is read with. That of an index, merged or not, is in proportion to the memory, which its manifest tells:
/// what counts is that it is really there, as long as it says.
fn limit_bytes(kind: Kind) -> u64 {
    match kind {
        Kind::Store | Kind::Manifest | Kind::Group | Kind::Pruned => MAX_JSON_BYTES as u64,
        Kind::State => MAX_STATE_BYTES,
        Kind::Touched => MAX_BLOB_BYTES.into(),
        Kind::Index | Kind::Merged | Kind::Sums => u64::MAX,
    }
}

/// What an object of this kind is, in an error.
fn what(kind: Kind) -> &'static str {
    match kind {
        Kind::Store => "the description of the store",
        Kind::Manifest => "a manifest",
        Kind::Index => "an index",
        Kind::State => "a state",
        Kind::Group => "a group checkpoint",
        Kind::Pruned => "a note of what was given up",
        Kind::Touched => "an order of first touches",
        Kind::Merged => "a merged index",
        Kind::Sums => "the sums of a merged index",
    }
}

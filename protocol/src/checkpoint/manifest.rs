//! What the objects say that are JSON: the store, a checkpoint, a group, a note that something was given up.
//!
//! Unknown members are ignored, so that a neighbouring version can add some; a version that cannot be read raises
//! [`MAJOR`](crate::checkpoint::object::MAJOR).

use crate::checkpoint::name::CheckpointId;
use crate::checkpoint::object::Digest;
use crate::control::{WorkloadKind, check_name};
use crate::error::{ProtocolError, Result};
use crate::layout::Layout;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The most JSON in one object: 16 MiB, some hundred thousand segments.
pub const MAX_JSON_BYTES: usize = 16 << 20;

/// The longest chain: a full checkpoint and so many deltas on it.
pub const MAX_CHAIN_DELTAS: u32 = 4096;

/// The most members of a group.
pub const MAX_MEMBERS: usize = 1024;

/// A store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreInfo {
    /// 32 random hexadecimal digits.
    pub id: String,
    /// When it was made, in milliseconds since 1970.
    pub created_unix_ms: u64,
    /// The program that made it.
    pub software: String,
    /// How its objects are sealed, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal: Option<Seal>,
}

/// How the objects of a store are sealed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seal {
    /// The cipher: `aes-256-gcm`.
    pub cipher: String,
    /// What tells the right key from a wrong one, and gives nothing away about it.
    pub key_check: HexDigest,
}

/// A digest, in JSON 64 hexadecimal digits.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct HexDigest(pub Digest);

impl std::fmt::Display for HexDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl std::fmt::Debug for HexDigest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for HexDigest {
    type Err = &'static str;

    fn from_str(text: &str) -> std::result::Result<Self, Self::Err> {
        const WRONG: &str = "a digest is 64 hexadecimal digits";
        let mut digest = Digest::default();
        let (pairs, rest) = text.as_bytes().as_chunks::<2>();
        if pairs.len() != digest.len() || !rest.is_empty() {
            return Err(WRONG);
        }
        for (byte, [high, low]) in digest.iter_mut().zip(pairs) {
            let digit = |character: u8| char::from(character).to_digit(16);
            let (Some(high), Some(low)) = (digit(*high), digit(*low)) else { return Err(WRONG) };
            *byte = (high * 16 + low) as u8;
        }
        Ok(Self(digest))
    }
}

impl Serialize for HexDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for HexDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// A checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Its name: the one it is stored under.
    pub id: CheckpointId,
    /// When the workload stood still for it, in milliseconds since 1970.
    pub taken_unix_ms: u64,
    /// The program that took it.
    pub software: String,
    /// The workload's name.
    pub workload: String,
    /// The workload's kind.
    pub kind: WorkloadKind,
    /// The workload's memory.
    pub layout: Layout,
    /// What it stands on; `None` for a full one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub parent: Option<Parent>,
    /// How many deltas there are from the full one to this: 0 for a full one.
    pub deltas: u32,
    /// The segments that its index names: its own, and those of others with the same content.
    pub segments: Vec<Segment>,
    /// Its index.
    pub index: Part,
    /// Its state: see [`crate::checkpoint`].
    pub state: Part,
    /// Pages that it added with data of its own.
    pub data_pages: u64,
    /// Pages that it added and that were stored already.
    pub shared_pages: u64,
    /// Pages that it added as zeros.
    pub zero_pages: u64,
    /// How long the workload stood still for it, in microseconds.
    pub pause_us: u64,
    /// Where all pages of this checkpoint or of one that it stands on lie: the nearest of which that was written down.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merged: Option<MergedIndex>,
    /// The group without which it does not exist.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<CheckpointId>,
}

/// Which checkpoint of a chain has a merged index: whoever reads the chain may read it instead of everything from there on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedIndex {
    /// The checkpoint.
    pub id: CheckpointId,
    /// Its merged index.
    pub index: Part,
}

/// What a delta stands on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Parent {
    /// Its name.
    pub id: CheckpointId,
    /// The digest of its manifest: what came before cannot be exchanged.
    pub digest: HexDigest,
}

/// A segment.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Segment {
    /// The checkpoint that wrote it.
    pub checkpoint: CheckpointId,
    /// Its number there.
    pub number: u32,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Another object that belongs to a checkpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Part {
    /// Its length in bytes, with its header.
    pub bytes: u64,
    /// Its digest.
    pub digest: HexDigest,
}

impl Manifest {
    /// Checks what JSON cannot: the layout, the name, the bounds, and that it is the checkpoint it is stored as.
    ///
    /// # Errors
    /// `Layout`, `Name`, `TooLarge` or `Value`.
    pub fn validate(&self, stored_as: CheckpointId) -> Result<()> {
        let value = |what, found| Err(ProtocolError::Value { what, found });
        self.layout.validate(u64::MAX)?;
        check_name(&self.workload)?;
        if self.id != stored_as {
            return value("the name in a manifest that is stored under another one", self.id.unix_s());
        }
        if self.deltas > MAX_CHAIN_DELTAS {
            let (found, limit) = (u64::from(self.deltas), u64::from(MAX_CHAIN_DELTAS));
            return Err(ProtocolError::TooLarge { what: "the number of deltas in a chain", found, limit });
        }
        if self.parent.is_some() != (self.deltas > 0) {
            return value("the number of deltas in a chain", u64::from(self.deltas));
        }
        if u32::try_from(self.segments.len()).is_err() {
            return value("the number of segments", self.segments.len() as u64);
        }
        Ok(())
    }
}

/// A group checkpoint. Its members exist if and only if it does.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Group {
    /// Its name: the one it is stored under.
    pub id: CheckpointId,
    /// What the operator calls it.
    pub name: String,
    /// When all members stood still, in milliseconds since 1970.
    pub taken_unix_ms: u64,
    /// The members, each with the digest of its manifest.
    pub members: Vec<Parent>,
}

/// A note that a checkpoint was given up.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Which.
    pub id: CheckpointId,
    /// When, in milliseconds since 1970.
    pub pruned_unix_ms: u64,
}

/// The body of an object that is JSON.
///
/// # Errors
/// `Body` when it cannot be written as JSON, `TooLarge` when it is more than [`MAX_JSON_BYTES`].
pub fn to_json<T: Serialize>(what: &'static str, value: &T) -> Result<Vec<u8>> {
    let json =
        serde_json::to_vec(value).map_err(|error| ProtocolError::Body { what, why: error.to_string() })?;
    bounded(what, json.len())?;
    Ok(json)
}

/// Reads such a body.
///
/// # Errors
/// `Body`, or `TooLarge` when it is more than [`MAX_JSON_BYTES`].
pub fn from_json<T: DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T> {
    bounded(what, json.len())?;
    serde_json::from_slice(json).map_err(|error| ProtocolError::Body { what, why: error.to_string() })
}

fn bounded(what: &'static str, bytes: usize) -> Result<()> {
    if bytes <= MAX_JSON_BYTES {
        return Ok(());
    }
    Err(ProtocolError::TooLarge { what, found: bytes as u64, limit: MAX_JSON_BYTES as u64 })
}

//! The shape of every object of a store that is not a segment.
//!
//! ```text
//! "MIGCHKPT"   u16 major   u8 kind   u8 flags   u32 zero   u64 body bytes   [32] BLAKE3 of all of the above and the body
//! body
//! ```
//!
//! All numbers are little-endian. Flag bit 0 says that the body is sealed: AES-256-GCM with a key for this object alone, as
//! `docs/checkpoint-format.md` has it, the tag behind the ciphertext. The digest is over what is stored, so that everybody can check it.

use crate::error::{ProtocolError, Result};

/// First bytes of an object.
pub const MAGIC: [u8; 8] = *b"MIGCHKPT";

/// Version of the format, of all objects and of segments.
pub const MAJOR: u16 = 1;

/// Bytes in front of a body.
pub const HEADER_BYTES: usize = 56;

/// A BLAKE3 digest.
pub type Digest = [u8; 32];

const SUMMED_BYTES: usize = HEADER_BYTES - 32;
const SEALED: u8 = 1;

/// What an object is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A store.
    Store = 1,
    /// A checkpoint.
    Manifest = 2,
    /// Where its pages lie.
    Index = 3,
    /// Its state.
    State = 4,
    /// A group of checkpoints.
    Group = 5,
    /// A note that a checkpoint was given up.
    Pruned = 6,
    /// An order of first touches.
    Touched = 7,
    /// Where all of a checkpoint's pages lie, its chain merged.
    Merged = 8,
    /// The sums of these pages.
    Sums = 9,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Self> {
        [
            Self::Store,
            Self::Manifest,
            Self::Index,
            Self::State,
            Self::Group,
            Self::Pruned,
            Self::Touched,
            Self::Merged,
            Self::Sums,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == byte)
    }
}

/// An object's stored body, checked against its digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Object<'a> {
    /// What it is.
    pub kind: Kind,
    /// Whether the body must be opened with a key first.
    pub sealed: bool,
    /// The body as it is stored.
    pub body: &'a [u8],
    /// The digest of all of it: what others name it by.
    pub digest: Digest,
}

/// The bytes of an object, and its digest. A sealed body is sealed already.
pub fn encode(kind: Kind, sealed: bool, body: &[u8]) -> (Vec<u8>, Digest) {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&MAJOR.to_le_bytes());
    bytes.extend_from_slice(&[kind as u8, if sealed { SEALED } else { 0 }, 0, 0, 0, 0]);
    bytes.extend_from_slice(&(body.len() as u64).to_le_bytes());
    let digest = *blake3::Hasher::new().update(&bytes).update(body).finalize().as_bytes();
    bytes.extend_from_slice(&digest);
    bytes.extend_from_slice(body);
    (bytes, digest)
}

/// Reads an object that must be of this kind; `what` names it in errors.
///
/// # Errors
/// `Magic`, `Version`, `Checksum`, `Truncated`, `TooLarge` for what follows the body, or `Value`.
pub fn decode<'a>(bytes: &'a [u8], expected: Kind, what: &'static str) -> Result<Object<'a>> {
    let found = bytes.len() as u64;
    if !bytes.starts_with(&MAGIC) && bytes.len() >= MAGIC.len() {
        return Err(ProtocolError::Magic { expected: "the mark of a checkpoint store" });
    }
    let (header, body) = bytes.split_first_chunk::<HEADER_BYTES>().ok_or(ProtocolError::Truncated {
        what,
        found,
        needed: HEADER_BYTES as u64,
    })?;
    let [_, _, _, _, _, _, _, _, v0, v1, kind, flags, z0, z1, z2, z3, rest @ ..] = header;
    let major = u16::from_le_bytes([*v0, *v1]);
    if major != MAJOR {
        return Err(ProtocolError::Version { what: "checkpoint format", found: major, supported: MAJOR });
    }
    let (length, digest) = rest.split_at(8);
    let needed = length.iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    match (body.len() as u64).cmp(&needed) {
        std::cmp::Ordering::Less => {
            let needed = needed.saturating_add(HEADER_BYTES as u64);
            return Err(ProtocolError::Truncated { what, found, needed });
        }
        std::cmp::Ordering::Greater => {
            return Err(ProtocolError::TooLarge { what, found: body.len() as u64, limit: needed });
        }
        std::cmp::Ordering::Equal => {}
    }
    let sum = blake3::Hasher::new().update(&header[..SUMMED_BYTES]).update(body).finalize();
    if sum.as_bytes() != digest {
        return Err(ProtocolError::Checksum { what });
    }
    if *flags & !SEALED != 0 || [*z0, *z1, *z2, *z3] != [0; 4] {
        return Err(ProtocolError::Value { what: "a reserved field of an object", found: u64::from(*flags) });
    }
    match Kind::from_byte(*kind) {
        Some(kind) if kind == expected => {
            Ok(Object { kind, sealed: *flags & SEALED != 0, body, digest: *sum.as_bytes() })
        }
        _ => Err(ProtocolError::Value { what: "the kind of an object", found: u64::from(*kind) }),
    }
}

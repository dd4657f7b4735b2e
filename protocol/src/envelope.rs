//! The shape of every message that is not a page: JSON with an optional blob behind it.
//!
//! ```text
//! u32 json bytes   u32 blob bytes   json (UTF-8, one object with a "type")   blob
//! ```
//!
//! Both lengths are little-endian. Unknown members of the object are ignored, so that a neighbouring version
//! can add some; an unknown "type" is an error.

use crate::error::{ProtocolError, Result};
use serde::{Serialize, de::DeserializeOwned};

/// Bytes of an envelope's header.
pub const HEADER_BYTES: usize = 8;

/// The most JSON in one message: 256 KiB. A layout of the most spaces takes about 80 KiB.
pub const MAX_JSON_BYTES: u32 = 256 << 10;

/// The lengths that an envelope's header names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Length of the JSON in bytes.
    pub json_bytes: u32,
    /// Length of the blob in bytes.
    pub blob_bytes: u32,
}

impl Header {
    /// Reads a header; a blob may have at most `max_blob_bytes`.
    ///
    /// # Errors
    /// `TooLarge` before anything of that size is allocated, `Value` for an empty message.
    pub fn decode(bytes: &[u8; HEADER_BYTES], max_blob_bytes: u32) -> Result<Self> {
        let [a, b, c, d, e, f, g, h] = *bytes;
        let header = Self {
            json_bytes: u32::from_le_bytes([a, b, c, d]),
            blob_bytes: u32::from_le_bytes([e, f, g, h]),
        };
        if header.json_bytes == 0 {
            return Err(ProtocolError::Value { what: "the length of a message", found: 0 });
        }
        let bounds = [
            ("the length of a message", header.json_bytes, MAX_JSON_BYTES),
            ("the length of a message's blob", header.blob_bytes, max_blob_bytes),
        ];
        for (what, found, limit) in bounds {
            if found > limit {
                return Err(ProtocolError::TooLarge {
                    what,
                    found: u64::from(found),
                    limit: u64::from(limit),
                });
            }
        }
        Ok(header)
    }

    /// Bytes that follow the header.
    pub fn body_bytes(&self) -> usize {
        self.json_bytes as usize + self.blob_bytes as usize
    }
}

/// A whole message on the wire.
///
/// # Errors
/// `TooLarge` when the message does not fit an envelope.
pub fn encode<T: Serialize>(message: &T, blob: &[u8]) -> Result<Vec<u8>> {
    let json = serde_json::to_vec(message)
        .map_err(|error| ProtocolError::Body { what: "outgoing", why: error.to_string() })?;
    let too_large = |what, found: usize, limit| ProtocolError::TooLarge { what, found: found as u64, limit };
    let json_bytes = u32::try_from(json.len()).ok().filter(|bytes| *bytes <= MAX_JSON_BYTES);
    let json_bytes = json_bytes
        .ok_or_else(|| too_large("the length of a message", json.len(), u64::from(MAX_JSON_BYTES)))?;
    let blob_bytes = u32::try_from(blob.len())
        .map_err(|_| too_large("the length of a message's blob", blob.len(), u64::from(u32::MAX)))?;
    let mut bytes = Vec::with_capacity(HEADER_BYTES + json.len() + blob.len());
    bytes.extend_from_slice(&json_bytes.to_le_bytes());
    bytes.extend_from_slice(&blob_bytes.to_le_bytes());
    bytes.extend_from_slice(&json);
    bytes.extend_from_slice(blob);
    Ok(bytes)
}

/// Reads the JSON of a message; `what` names the conversation for the error text.
///
/// # Errors
/// `Body` with the parser's words.
pub fn decode<T: DeserializeOwned>(what: &'static str, json: &[u8]) -> Result<T> {
    // The parser would take an array of the members' values for the object, which no document allows.
    if json.trim_ascii_start().first() != Some(&b'{') {
        return Err(ProtocolError::Body { what, why: "it is not a JSON object".into() });
    }
    serde_json::from_slice(json).map_err(|error| ProtocolError::Body { what, why: error.to_string() })
}

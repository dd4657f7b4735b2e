//! The container for everything of a workload that is not pages: named, versioned sections.
//!
//! ```text
//! "MIGSTATE"  u16 major  u16 sections  u32 zero
//! section     u8 name bytes  name (ASCII)  u16 version  u32 body bytes  body
//! u64 XXH3-64 (seed 0) of everything before it
//! ```
//!
//! All numbers are little-endian. What a section's body means is its owner's business; the version stands
//! outside the body, so that an owner can refuse or convert it before reading it.

use crate::error::{ProtocolError, Result};
use std::collections::HashSet;
use twox_hash::XxHash3_64;

/// First bytes of a state.
pub const MAGIC: [u8; 8] = *b"MIGSTATE";

/// Version of the container.
pub const MAJOR: u16 = 1;

/// The most sections in a state.
pub const MAX_SECTIONS: usize = 16384;

const HEADER_BYTES: usize = 16;
const SUM_BYTES: usize = 8;

/// One named, versioned piece of state.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Its name, for instance `vcpu/0`; ASCII, 1 to 255 bytes.
    pub name: String,
    /// The version of the body's encoding.
    pub version: u16,
    /// The body.
    pub body: Vec<u8>,
}

/// The state of a workload: sections in the order in which they were saved, names unique.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct State {
    /// The sections.
    pub sections: Vec<Section>,
}

impl State {
    /// The section with this name.
    pub fn section(&self, name: &str) -> Option<&Section> {
        self.sections.iter().find(|section| section.name == name)
    }

    /// Adds a section.
    pub fn push(&mut self, name: impl Into<String>, version: u16, body: Vec<u8>) {
        self.sections.push(Section { name: name.into(), version, body });
    }

    /// The bytes on the wire.
    ///
    /// # Errors
    /// `TooLarge` or `Value` when a section does not fit the format, or has the name of another.
    pub fn encode(&self) -> Result<Vec<u8>> {
        let found = self.sections.len() as u64;
        let sections = u16::try_from(found).ok().filter(|count| usize::from(*count) <= MAX_SECTIONS).ok_or(
            ProtocolError::TooLarge {
                what: "the number of state sections",
                found,
                limit: MAX_SECTIONS as u64,
            },
        )?;
        let mut bytes = Vec::new();
        bytes.extend_from_slice(&MAGIC);
        bytes.extend_from_slice(&MAJOR.to_le_bytes());
        bytes.extend_from_slice(&sections.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        let mut names = HashSet::new();
        for (index, section) in self.sections.iter().enumerate() {
            let name_bytes = check_name(section.name.as_bytes())?;
            if !names.insert(section.name.as_str()) {
                return Err(repeated(index));
            }
            let found = section.body.len() as u64;
            let limit = u64::from(u32::MAX);
            let body_bytes = u32::try_from(found).map_err(|_| ProtocolError::TooLarge {
                what: "a state section in bytes",
                found,
                limit,
            })?;
            bytes.push(name_bytes);
            bytes.extend_from_slice(section.name.as_bytes());
            bytes.extend_from_slice(&section.version.to_le_bytes());
            bytes.extend_from_slice(&body_bytes.to_le_bytes());
            bytes.extend_from_slice(&section.body);
        }
        let sum = XxHash3_64::oneshot(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        Ok(bytes)
    }

    /// Reads a state; allocates no more than the bytes it was given.
    ///
    /// # Errors
    /// `Magic`, `Version`, `Checksum`, `Truncated`, `TooLarge`, or `Value` for a bad or repeated name.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        const WHAT: &str = "the workload's state";
        let truncated = |needed: usize| ProtocolError::Truncated {
            what: WHAT,
            found: bytes.len() as u64,
            needed: needed as u64,
        };
        if bytes.len() < HEADER_BYTES + SUM_BYTES {
            return Err(truncated(HEADER_BYTES + SUM_BYTES));
        }
        if bytes[..8] != MAGIC {
            return Err(ProtocolError::Magic { expected: "the mark of a workload's state" });
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != MAJOR {
            return Err(ProtocolError::Version { what: "state", found, supported: MAJOR });
        }
        let (body, sum) = bytes.split_at(bytes.len() - SUM_BYTES);
        if XxHash3_64::oneshot(body).to_le_bytes() != sum {
            return Err(ProtocolError::Checksum { what: WHAT });
        }
        let count = usize::from(u16::from_le_bytes([bytes[10], bytes[11]]));
        if count > MAX_SECTIONS {
            let (found, limit) = (count as u64, MAX_SECTIONS as u64);
            return Err(ProtocolError::TooLarge { what: "the number of state sections", found, limit });
        }
        let mut rest = &body[HEADER_BYTES..];
        let mut take = |bytes: usize| {
            let (head, tail) = rest.split_at_checked(bytes).ok_or_else(|| truncated(body.len() + bytes))?;
            rest = tail;
            Ok(head)
        };
        let mut names = HashSet::new();
        let mut state = Self::default();
        for _ in 0..count {
            let name_bytes = usize::from(take(1)?[0]);
            let name = take(name_bytes)?;
            check_name(name)?;
            let name = String::from_utf8_lossy(name).into_owned();
            let version = take(2)?;
            let version = u16::from_le_bytes([version[0], version[1]]);
            let length = take(4)?;
            let length = u32::from_le_bytes([length[0], length[1], length[2], length[3]]);
            let body = take(length as usize)?.to_vec();
            if !names.insert(name.clone()) {
                return Err(repeated(state.sections.len()));
            }
            state.sections.push(Section { name, version, body });
        }
        if !rest.is_empty() {
            return Err(ProtocolError::Value {
                what: "what follows the last state section",
                found: rest.len() as u64,
            });
        }
        Ok(state)
    }
}

fn repeated(index: usize) -> ProtocolError {
    ProtocolError::Value { what: "the section that repeats another one's name", found: index as u64 }
}

fn check_name(name: &[u8]) -> Result<u8> {
    match u8::try_from(name.len()) {
        Ok(bytes) if bytes > 0 && name.iter().all(u8::is_ascii_graphic) => Ok(bytes),
        _ => Err(ProtocolError::Value {
            what: "the length or spelling of a state section's name",
            found: name.len() as u64,
        }),
    }
}

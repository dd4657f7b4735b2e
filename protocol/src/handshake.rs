//! How two engines find out whether they understand each other.
//!
//! Each end of the control stream first sends sixteen fixed bytes, which every version will understand:
//!
//! ```text
//! "MIGRATE\0"  u16 major  u16 minor  u32 zero
//! ```
//!
//! and then a [`Hello`] in an [envelope](crate::envelope). The major versions must be equal; of the minor
//! versions the smaller one counts. A capability that one end does not know is ignored, unless the other end
//! requires it.

use crate::error::{ProtocolError, Result};
use serde::{Deserialize, Serialize};

/// First bytes of a control stream.
pub const MAGIC: [u8; 8] = *b"MIGRATE\0";

/// The major version: changed when an old peer would misunderstand.
pub const MAJOR: u16 = 1;

/// The minor version: changed when something was added that an old peer may ignore.
pub const MINOR: u16 = 0;

/// The name that TLS negotiates (ALPN).
pub const ALPN: &[u8] = b"migrate/1";

/// Bytes of [`Preamble`].
pub const PREAMBLE_BYTES: usize = 16;

/// The most capabilities one end may name.
pub const MAX_CAPABILITIES: usize = 256;

/// The workload may be started at the destination before all of its memory is there.
pub const POST_COPY: &str = "post-copy";

/// A migration that lost its link in the rounds goes on over another one.
pub const RESUME: &str = "resume";

/// A migration that lost its link behind its state goes on over another one, with all of its memory anew.
pub const ANEW: &str = "anew";

/// The capability to send and take pages as [`Zstd`](crate::payload::Encoding::Zstd) and
/// [`Lz4`](crate::payload::Encoding::Lz4).
pub const PACKED_PAGES: &str = "packed-pages";

/// The capability to send and take pages as [`Delta`](crate::payload::Encoding::Delta).
pub const DELTA_PAGES: &str = "delta-pages";

/// The capability to send and take pages as [`Known`](crate::payload::Encoding::Known).
pub const KNOWN_PAGES: &str = "known-pages";

/// The receiver counts and drops the bytes of a [`Probe`](crate::control::Downstream::Probe).
pub const PROBE: &str = "probe";

/// The page streams of one migration may be spread over several connections.
pub const CONNECTIONS: &str = "connections";

/// Both ends compare digests over all memory before the workload may start.
pub const VERIFY: &str = "verify";

/// The receiver may have a checkpoint from which the sender's pages are counted: see [`Seed`](crate::control::Seed).
pub const SEED: &str = "seed";

/// A layout may have [disks](crate::layout::SpaceKind::Disk).
pub const DISKS: &str = "disks";

/// The capabilities of this release. All of version 1.0 is the base.
pub const CAPABILITIES: &[&str] = &[
    POST_COPY,
    PACKED_PAGES,
    DELTA_PAGES,
    KNOWN_PAGES,
    PROBE,
    RESUME,
    ANEW,
    CONNECTIONS,
    VERIFY,
    SEED,
    DISKS,
];

/// First bytes of a control stream, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Preamble {
    /// The minor version the other end speaks.
    pub minor: u16,
}

impl Preamble {
    /// What this release says of itself.
    pub const OURS: Self = Self { minor: MINOR };

    /// The bytes on the wire.
    pub fn encode(self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..10].copy_from_slice(&MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.minor.to_le_bytes());
        bytes
    }

    /// Reads the first bytes of a control stream.
    ///
    /// # Errors
    /// `Magic` or `Version`.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self> {
        if bytes[..8] != MAGIC {
            return Err(ProtocolError::Magic { expected: "the mark of this protocol" });
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != MAJOR {
            return Err(ProtocolError::Version { what: "wire", found, supported: MAJOR });
        }
        Ok(Self { minor: u16::from_le_bytes([bytes[10], bytes[11]]) })
    }
}

/// What each end says of itself before anything else.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Hello {
    /// Name and version of the program, for the log.
    pub software: String,
    /// What this end can do.
    #[serde(default)]
    pub capabilities: Vec<String>,
    /// What the other end must be able to do.
    #[serde(default)]
    pub required: Vec<String>,
}

impl Hello {
    /// What this release says of itself.
    pub fn ours() -> Self {
        Self {
            software: concat!("migrate ", env!("CARGO_PKG_VERSION")).into(),
            capabilities: CAPABILITIES.iter().map(|name| (*name).into()).collect(),
            required: Vec::new(),
        }
    }

    /// The capabilities both ends have, in our order.
    ///
    /// # Errors
    /// `Capability` when the other end requires what this release does not have, `TooLarge` for too long a list.
    pub fn agree(&self) -> Result<Vec<&'static str>> {
        let found = (self.capabilities.len() + self.required.len()) as u64;
        if found > MAX_CAPABILITIES as u64 {
            let limit = MAX_CAPABILITIES as u64;
            return Err(ProtocolError::TooLarge { what: "the number of capabilities", found, limit });
        }
        if let Some(name) = self.required.iter().find(|name| !CAPABILITIES.contains(&name.as_str())) {
            return Err(ProtocolError::Capability { name: name.chars().take(80).collect() });
        }
        Ok(CAPABILITIES
            .iter()
            .copied()
            .filter(|name| self.capabilities.iter().any(|theirs| theirs == name))
            .collect())
    }
}

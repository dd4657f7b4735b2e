//! How the bytes of a run are written.

use crate::error::{ProtocolError, Result};
use crate::layout::MAX_SPACE_PAGES;
use crate::page::{PAGE_SIZE, SpaceId};

/// How the payload of a page frame stands for its pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Encoding {
    /// Every byte of every page is zero; there is no payload.
    Zero = 0,
    /// The payload is the pages, one behind the other.
    Raw = 1,
    /// One Zstandard frame (RFC 8878) of the pages. Needs [`PACKED_PAGES`](crate::handshake::PACKED_PAGES), as `Lz4`.
    Zstd = 2,
    /// One LZ4 block of the pages, without a header.
    Lz4 = 3,
    /// XXH3-64 (seed 0) of what the pages were when they were sent last, then one LZ4 block of what they are now, XOR
    /// that. Needs [`DELTA_PAGES`](crate::handshake::DELTA_PAGES).
    Delta = 4,
    /// A [`KnownPage`] for each page: it equals one that was sent before. Needs
    /// [`KNOWN_PAGES`](crate::handshake::KNOWN_PAGES).
    Known = 5,
}

/// Bytes of the sum in front of a `Delta` payload.
pub const DELTA_SUM_BYTES: usize = 8;

/// Bytes of a [`KnownPage`].
pub const KNOWN_PAGE_BYTES: usize = 40;

impl Encoding {
    /// The encoding with this number on the wire.
    ///
    /// # Errors
    /// `Value` for a number that this release does not know.
    pub fn from_wire(number: u8) -> Result<Self> {
        match number {
            0 => Ok(Self::Zero),
            1 => Ok(Self::Raw),
            2 => Ok(Self::Zstd),
            3 => Ok(Self::Lz4),
            4 => Ok(Self::Delta),
            5 => Ok(Self::Known),
            other => {
                Err(ProtocolError::Value { what: "the encoding of a page frame", found: u64::from(other) })
            }
        }
    }

    /// Checks the payload length that came with a run of `count` pages. What is packed is always shorter than the pages, so
    /// no payload is longer than they are.
    ///
    /// # Errors
    /// `Value` when it is not what the encoding says it must be.
    pub fn check_payload(self, count: u32, payload_bytes: u32) -> Result<()> {
        let (count, found) = (u64::from(count), u64::from(payload_bytes));
        let pages_bytes = count * PAGE_SIZE as u64;
        let fits = match self {
            Self::Zero => found == 0,
            Self::Raw => found == pages_bytes,
            Self::Zstd | Self::Lz4 => (1..pages_bytes).contains(&found),
            Self::Delta => (DELTA_SUM_BYTES as u64 + 1..pages_bytes).contains(&found),
            Self::Known => found == count * KNOWN_PAGE_BYTES as u64,
        };
        if fits {
            return Ok(());
        }
        Err(ProtocolError::Value {
            what: "the payload length of a page frame",
            found: u64::from(payload_bytes),
        })
    }
}

/// Where a page's content is at the receiver already.
///
/// ```text
/// u64 page, of the same space    32 bytes BLAKE3 of the content
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct KnownPage {
    /// The page that had this content when it was sent last. The page itself, if it did.
    pub page: u64,
    /// BLAKE3 of the content, 256 bits. The receiver hashes what it has and trusts nothing else.
    pub digest: [u8; 32],
}

impl KnownPage {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; KNOWN_PAGE_BYTES] {
        let mut bytes = [0; KNOWN_PAGE_BYTES];
        bytes[..8].copy_from_slice(&self.page.to_le_bytes());
        bytes[8..].copy_from_slice(&self.digest);
        bytes
    }

    /// Reads what was encoded.
    ///
    /// # Errors
    /// `OutsideLayout` for a page that no space can have. Whether the space has it is the caller's to check.
    pub fn decode(space: SpaceId, bytes: &[u8; KNOWN_PAGE_BYTES]) -> Result<Self> {
        let mut page = [0; 8];
        let mut digest = [0; 32];
        page.copy_from_slice(&bytes[..8]);
        digest.copy_from_slice(&bytes[8..]);
        let page = u64::from_le_bytes(page);
        if page >= MAX_SPACE_PAGES {
            return Err(ProtocolError::OutsideLayout { space: space.0, first: page, count: 1 });
        }
        Ok(Self { page, digest })
    }
}

/// Whether every byte is zero: the test that decides for [`Encoding::Zero`].
pub fn is_zero(bytes: &[u8]) -> bool {
    // Compares in blocks that the compiler turns into vector code, and gives up at the first that differs.
    const BLOCK: usize = 256;
    let (blocks, rest) = bytes.as_chunks::<BLOCK>();
    blocks.iter().all(|block| block.iter().fold(0, |all, byte| all | byte) == 0)
        && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_bit_anywhere_is_not_zero() {
        let mut page = vec![0; PAGE_SIZE + 3];
        assert!(is_zero(&page));
        for at in 0..page.len() {
            page[at] = 0x10;
            assert!(!is_zero(&page), "byte {at}");
            page[at] = 0;
        }
    }
}

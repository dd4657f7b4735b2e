//! Page data: extents, one behind the other, behind a short header.
//!
//! ```text
//! "MIGPAGES"   u16 major   u8 flags   u8 zero   u32 zero
//! extent       the stored bytes of some pages; where it begins and what is in it is in the index
//! ```
//!
//! An extent holds 1 to [`MAX_EXTENT_PAGES`] pages, which need not be neighbours. It is raw, page behind page, so that one page can be
//! read alone, or packed as one Zstandard frame. Flag bit 0 says that its pages (raw) or its frame (packed) are sealed: each with its
//! tag of [`TAG_BYTES`] behind it, so that one page can still be read alone.

use crate::page::PAGE_SIZE;

/// First bytes of a segment.
pub const MAGIC: [u8; 8] = *b"MIGPAGES";

/// Bytes in front of the first extent.
pub const HEADER_BYTES: usize = 16;

/// The most pages in an extent: 1 MiB.
pub const MAX_EXTENT_PAGES: u16 = 256;

/// Bytes of an authentication tag.
pub const TAG_BYTES: usize = 16;

/// How the pages of an extent are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Encoding {
    /// As they are.
    Raw = 0,
    /// All of them as one Zstandard frame.
    Zstd = 1,
}

impl Encoding {
    /// From its byte in an index.
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Raw, Self::Zstd].into_iter().find(|encoding| *encoding as u8 == byte)
    }
}

/// The header of a segment.
pub fn header(sealed: bool) -> [u8; HEADER_BYTES] {
    let mut header = [0; HEADER_BYTES];
    header[..8].copy_from_slice(&MAGIC);
    header[8..10].copy_from_slice(&super::object::MAJOR.to_le_bytes());
    header[10] = u8::from(sealed);
    header
}

/// The most bytes that so many pages take.
pub fn max_stored_bytes(pages: u16) -> u32 {
    u32::from(pages) * (PAGE_SIZE + TAG_BYTES) as u32
}

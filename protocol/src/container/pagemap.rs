//! CRIU's `pagemap-*.img`: which pages of a process it found, and where each of them is.
//!
//! ```text
//! u32 0x54564319  u32 0x56084025                         the marks of an image, and of this one
//! u32 bytes       head  { 1: pages_id }                  protocol buffers, each behind its length
//! u32 bytes       entry { 1: vaddr, 2: compat_nr_pages, 3: in_parent, 4: flags, 5: nr_pages }   …
//! ```
//!
//! Until CRIU 4.1 the number of pages is field 2; from 4.2 on it is field 5, and field 2 is 0. Both are written, and each reads its own.
//! (images/pagemap.proto, criu/include/image.h and criu/include/pagemap.h of CRIU 3.17 to 4.2.) Entries ascend and do not
//! overlap. The bytes of the pages of every entry that has [`PRESENT`] lie in `pages-<pages_id>.img`, in the order of the entries.

use crate::error::{ProtocolError, Result};
use prost::Message;

/// The pages are as in the images that this directory's `parent` leads to.
pub const PARENT: u32 = 1;
/// The pages were left where they are, in the process.
pub const LAZY: u32 = 2;
/// The pages are here.
pub const PRESENT: u32 = 4;

const MAGIC: [u8; 8] = [0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56];
const WHAT: &str = "a pagemap image of CRIU";

/// No process has more pages: 2^47 bytes of addresses.
const MAX_PAGES: u64 = 1 << 35;
const PAGE_BYTES: u64 = crate::page::PAGE_SIZE as u64;

/// Some pages of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The number of the first page: its address divided by the page size.
    pub first: u64,
    /// How many they are.
    pub pages: u64,
    /// [`PARENT`], [`LAZY`] and [`PRESENT`].
    pub flags: u32,
}

impl Entry {
    /// The page behind the last one.
    pub fn end(&self) -> u64 {
        self.first + self.pages
    }
}

/// One image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pagemap {
    /// Which file the pages are in.
    pub pages_id: u32,
    /// The pages, ascending.
    pub entries: Vec<Entry>,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct HeadMessage {
    #[prost(uint32, required, tag = "1")]
    pages_id: u32,
}

#[derive(Clone, PartialEq, Eq, Message)]
struct EntryMessage {
    #[prost(uint64, required, tag = "1")]
    vaddr: u64,
    #[prost(uint32, required, tag = "2")]
    compat_nr_pages: u32,
    #[prost(bool, optional, tag = "3")]
    in_parent: Option<bool>,
    #[prost(uint32, optional, tag = "4")]
    flags: Option<u32>,
    #[prost(uint64, optional, tag = "5")]
    nr_pages: Option<u64>,
}

impl Pagemap {
    /// The image's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        let mut put = |message: Vec<u8>| {
            // A few numbers are a few bytes.
            bytes.extend_from_slice(&(message.len() as u32).to_le_bytes());
            bytes.extend(message);
        };
        put(HeadMessage { pages_id: self.pages_id }.encode_to_vec());
        for Entry { first, pages, flags } in &self.entries {
            let in_parent = (flags & PARENT != 0).then_some(true);
            let message = EntryMessage {
                vaddr: first * PAGE_BYTES,
                compat_nr_pages: u32::try_from(*pages).unwrap_or(u32::MAX),
                in_parent,
                flags: Some(*flags),
                nr_pages: Some(*pages),
            };
            put(message.encode_to_vec());
        }
        bytes
    }

    /// Reads an image; allocates in proportion to the bytes that are there.
    ///
    /// # Errors
    /// `Magic`, `Truncated`, `Layout` for what is no such message, or for entries that overlap or do not ascend.
    pub fn decode(bytes: &[u8]) -> Result<Self> {
        let Some(mut rest) = bytes.strip_prefix(&MAGIC) else {
            return Err(ProtocolError::Magic { expected: "the marks of a pagemap image of CRIU" });
        };
        let head = next(&mut rest)?.ok_or(ProtocolError::Truncated {
            what: WHAT,
            found: bytes.len() as u64,
            needed: MAGIC.len() as u64 + 4,
        })?;
        let head = HeadMessage::decode(head).map_err(|error| unreadable(&error))?;
        let mut entries: Vec<Entry> = Vec::new();
        let mut end = 0;
        while let Some(message) = next(&mut rest)? {
            let EntryMessage { vaddr, compat_nr_pages, in_parent, flags, nr_pages } =
                EntryMessage::decode(message).map_err(|error| unreadable(&error))?;
            let nr_pages = nr_pages.unwrap_or_else(|| u64::from(compat_nr_pages));
            let first = vaddr / PAGE_BYTES;
            if !vaddr.is_multiple_of(PAGE_BYTES) || first < end || nr_pages == 0 || nr_pages > MAX_PAGES {
                let why =
                    format!("{WHAT} has {nr_pages} pages at {vaddr:#x}, which cannot follow what is before");
                return Err(ProtocolError::Layout { why });
            }
            // Before there were flags, every page was here or in the parent.
            let flags = flags.unwrap_or(if in_parent == Some(true) { PARENT } else { PRESENT });
            end = first + nr_pages;
            entries.push(Entry { first, pages: nr_pages, flags });
        }
        Ok(Self { pages_id: head.pages_id, entries })
    }
}

/// The next message, without its length.
fn next<'a>(rest: &mut &'a [u8]) -> Result<Option<&'a [u8]>> {
    if rest.is_empty() {
        return Ok(None);
    }
    let truncated = |needed: usize| ProtocolError::Truncated {
        what: WHAT,
        found: rest.len() as u64,
        needed: needed as u64,
    };
    let (length, behind) = rest.split_first_chunk::<4>().ok_or_else(|| truncated(4))?;
    let length = u32::from_le_bytes(*length) as usize;
    let (message, behind) = behind.split_at_checked(length).ok_or_else(|| truncated(length))?;
    *rest = behind;
    Ok(Some(message))
}

fn unreadable(error: &prost::DecodeError) -> ProtocolError {
    ProtocolError::Layout { why: format!("{WHAT} has a message that cannot be read: {error}") }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// What CRIU 4.1.1 wrote: the head, 1 page at 4198400 that is here, 5 at 4857856.
    const WRITTEN: [u8; 40] = [
        0x19, 0x43, 0x56, 0x54, 0x25, 0x40, 0x08, 0x56, 2, 0, 0, 0, 8, 1, 9, 0, 0, 0, 8, 0x80, 0xa0, 0x80, 2,
        0x10, 1, 0x20, 4, 9, 0, 0, 0, 8, 0x80, 0xc0, 0xa8, 2, 0x10, 5, 0x20, 4,
    ];

    #[test]
    fn what_criu_writes_is_read() {
        let image = Pagemap::decode(&WRITTEN).unwrap();
        let entry = |first, pages| Entry { first, pages, flags: PRESENT };
        assert_eq!(image, Pagemap { pages_id: 1, entries: vec![entry(1025, 1), entry(1186, 5)] });
        assert_eq!(Pagemap::decode(&image.encode()).unwrap(), image);
        // As 4.2.1 writes the first entry.
        let newer =
            [&WRITTEN[..14], &[11, 0, 0, 0, 8, 0x80, 0xa0, 0x80, 2, 0x10, 0, 0x20, 4, 0x28, 1]].concat();
        assert_eq!(Pagemap::decode(&newer).unwrap().entries, [entry(1025, 1)]);
    }

    #[test]
    fn entries_ascend_and_every_cut_is_found() {
        let entry = |first, pages| Entry { first, pages, flags: LAZY };
        for entries in [[entry(5, 2), entry(6, 1)], [entry(5, 1), entry(4, 1)], [entry(5, 0), entry(6, 1)]] {
            let image = Pagemap { pages_id: 1, entries: entries.to_vec() };
            Pagemap::decode(&image.encode()).unwrap_err();
        }
        for cut in 0..WRITTEN.len() {
            // Behind a whole message the image is a shorter one.
            let whole = [14, 27].contains(&cut);
            assert_eq!(Pagemap::decode(&WRITTEN[..cut]).is_ok(), whole, "{cut}");
        }
    }

    proptest! {
        #[test]
        fn images_are_read_as_they_were_written(
            pages_id in any::<u32>(),
            pieces in prop::collection::vec((0_u64..1 << 20, 1_u64..1 << 20, 0_u32..8), 0..50),
        ) {
            let mut end = 0;
            let entries = pieces.into_iter().map(|(gap, pages, flags)| {
                let first = end + gap;
                end = first + pages;
                Entry { first, pages, flags }
            });
            let image = Pagemap { pages_id, entries: entries.collect() };
            prop_assert_eq!(Pagemap::decode(&image.encode()).unwrap(), image);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let mut image = MAGIC.to_vec();
            image.extend(bytes);
            let _ = Pagemap::decode(&image);
        }
    }
}

//! Page data on its way out of a segment.

use super::Vault;
use crate::error::Result;
use crate::store::{ObjectReader, Store};
use crate::vault::wrong::Wrong;
use protocol::checkpoint::index::Extent;
use protocol::checkpoint::manifest::Segment;
use protocol::checkpoint::name;
use protocol::checkpoint::object::MAJOR;
use protocol::checkpoint::segment::{Encoding, HEADER_BYTES, MAGIC, MAX_EXTENT_PAGES};
use protocol::page::PAGE_SIZE;
use std::ops::Range;
use std::sync::Arc;
use twox_hash::XxHash3_64;

/// Reads one segment. Several threads may read from one; each has an [`Unpacker`] of its own.
///
/// What is fetched and what is decoded are two steps, so that many extents can be fetched with one request.
pub struct SegmentReader {
    store: Arc<dyn Store>,
    reader: Box<dyn ObjectReader>,
    name: String,
}

/// What a thread needs to read extents: buffers that are made once, none longer than an extent.
#[derive(Default)]
pub struct Unpacker {
    stored: Vec<u8>,
    scratch: Scratch,
}

#[derive(Default)]
struct Scratch {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pages: Vec<u8>,
}

impl Scratch {
    /// What a frame unpacks to, if that is so many bytes.
    fn unpack(&mut self, frame: &[u8], length: usize) -> Option<&[u8]> {
        if self.pages.len() < length {
            self.pages.resize(length, 0);
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(zstd::bulk::Decompressor::new().ok()?),
        };
        let pages = self.pages.get_mut(..length)?;
        let found = zstd.decompress_to_buffer(frame, pages).ok()?;
        (found == length).then_some(pages)
    }
}

impl SegmentReader {
    /// Opens a segment that a manifest lists.
    ///
    /// # Errors
    /// `Store` when there is none, or it is not what the manifest says.
    pub fn open(vault: &Vault, segment: &Segment) -> Result<Self> {
        let name = name::segment(segment.checkpoint, segment.number);
        let reader = vault.store.open(&name)?;
        let opened = Self { store: Arc::clone(&vault.store), reader, name };
        let found = opened.reader.bytes();
        if found != segment.bytes || found < HEADER_BYTES as u64 {
            return Err(opened.damaged(&format!("it has {found} bytes and not {}", segment.bytes)));
        }
        let mut header = [0; HEADER_BYTES];
        opened.reader.read_at(0, &mut header)?;
        opened.check_header(header)?;
        Ok(opened)
    }

    fn damaged(&self, why: &str) -> crate::Error {
        Wrong { store: &*self.store, object: &self.name }.damaged(why)
    }

    fn check_header(&self, header: [u8; HEADER_BYTES]) -> Result<()> {
        let Some([v0, v1, flags, zeros @ ..]) = header.strip_prefix(&MAGIC) else {
            return Err(self.damaged("it does not begin as a segment does"));
        };
        let major = u16::from_le_bytes([*v0, *v1]);
        if major != MAJOR {
            return Err(self.damaged(&format!(
                "it is of version {major} of the format, this release reads {MAJOR}: use the release that wrote it"
            )));
        }
        if *flags != 0 || zeros.iter().any(|byte| *byte != 0) {
            return Err(self.damaged("a reserved field of its header is not zero"));
        }
        Ok(())
    }

    /// Where a whole extent lies.
    pub fn whole(&self, extent: &Extent) -> Range<u64> {
        extent.offset..extent.offset.saturating_add(extent.stored_bytes.into())
    }

    /// Where `count` pages from `first` on lie alone; `None` when only the whole extent can be read.
    pub fn part(&self, extent: &Extent, first: u16, count: u16) -> Option<Range<u64>> {
        let inside = count > 0 && first.checked_add(count).is_some_and(|end| end <= extent.pages);
        let page = PAGE_SIZE as u64;
        let start = extent.offset.checked_add(u64::from(first) * page)?;
        (inside && extent.encoding == Encoding::Raw).then(|| start..start + u64::from(count) * page)
    }

    /// Fills a buffer with what lies from a byte offset on: one extent or many neighbours.
    ///
    /// # Errors
    /// `Store`.
    pub fn fetch(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.reader.read_at(offset, buffer)
    }

    /// Fills a buffer with ranges, one behind the other.
    ///
    /// # Errors
    /// `Store`.
    pub fn fetch_ranges(&self, ranges: &[Range<u64>], buffer: &mut [u8]) -> Result<()> {
        self.reader.read_ranges(ranges, buffer)
    }

    /// The pages of a whole extent, from its stored bytes, which are checked against its digest. Raw pages are not copied.
    ///
    /// # Errors
    /// `Store` when they are damaged.
    pub fn decode<'a>(
        &self,
        extent: &Extent,
        stored: &'a [u8],
        unpacker: &'a mut Unpacker,
    ) -> Result<&'a [u8]> {
        self.decode_into(extent, stored, &mut unpacker.scratch)
    }

    fn decode_into<'a>(
        &self,
        extent: &Extent,
        stored: &'a [u8],
        scratch: &'a mut Scratch,
    ) -> Result<&'a [u8]> {
        let length = usize::from(extent.pages.min(MAX_EXTENT_PAGES)) * PAGE_SIZE;
        let wrong = |why| Err(self.damaged_extent(extent, why));
        if stored.len() as u64 != u64::from(extent.stored_bytes)
            || *blake3::hash(stored).as_bytes() != extent.digest
        {
            return wrong("does not match its digest");
        }
        match extent.encoding {
            Encoding::Raw if stored.len() == length => Ok(stored),
            Encoding::Raw => wrong("has not the length of its pages"),
            Encoding::Zstd => {
                scratch.unpack(stored, length).map_or_else(|| wrong("does not unpack to its pages"), Ok)
            }
        }
    }

    /// Some pages of a raw extent, from their stored bytes as [`SegmentReader::part`] has them, each checked against its sum in the
    /// index, of which `sums` are those of the extent.
    ///
    /// # Errors
    /// `Store` when they are damaged.
    pub fn decode_part<'a>(
        &self,
        extent: &Extent,
        first: u16,
        sums: &[u64],
        stored: &'a [u8],
    ) -> Result<&'a [u8]> {
        let (pages, rest) = stored.as_chunks::<PAGE_SIZE>();
        let sums = sums.get(usize::from(first)..).unwrap_or_default();
        if !rest.is_empty() || extent.encoding != Encoding::Raw || sums.len() < pages.len() {
            return Err(self.damaged_extent(extent, "cannot be read by pages"));
        }
        match pages.iter().zip(sums).position(|(page, sum)| XxHash3_64::oneshot(page) != *sum) {
            None => Ok(stored),
            Some(at) => {
                let page = usize::from(first) + at;
                Err(self.damaged_extent(extent, &format!("does not match the sum of its page {page}")))
            }
        }
    }

    /// Fetches and decodes a whole extent.
    ///
    /// # Errors
    /// `Store`.
    pub fn read<'a>(&self, extent: &Extent, unpacker: &'a mut Unpacker) -> Result<&'a [u8]> {
        let Unpacker { stored, scratch } = unpacker;
        stored.resize(extent.stored_bytes as usize, 0);
        self.fetch(extent.offset, stored)?;
        self.decode_into(extent, stored, scratch)
    }

    fn damaged_extent(&self, extent: &Extent, why: &str) -> crate::Error {
        self.damaged(&format!("the extent at {} {why}", extent.offset))
    }
}

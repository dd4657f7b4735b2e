//! Page data on its way out of a segment.

use super::Vault;
use crate::error::Result;
use crate::seal::{ObjectSeal, SALT_BYTES};
use crate::store::{ObjectReader, Store};
use crate::vault::wrong::Wrong;
use protocol::checkpoint::index::Extent;
use protocol::checkpoint::manifest::Segment;
use protocol::checkpoint::name;
use protocol::checkpoint::object::MAJOR;
use protocol::checkpoint::segment::{Encoding, HEADER_BYTES, MAGIC, MAX_EXTENT_PAGES, TAG_BYTES};
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
    seal: Option<ObjectSeal>,
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
    opened: Vec<u8>,
}

/// What a frame unpacks to, if that is so many bytes.
fn unpack<'a>(
    zstd: &mut Option<zstd::bulk::Decompressor<'static>>,
    pages: &'a mut Vec<u8>,
    frame: &[u8],
    length: usize,
) -> Option<&'a [u8]> {
    if pages.len() < length {
        pages.resize(length, 0);
    }
    let zstd = match zstd {
        Some(zstd) => zstd,
        none => none.insert(zstd::bulk::Decompressor::new().ok()?),
    };
    let pages = pages.get_mut(..length)?;
    let found = zstd.decompress_to_buffer(frame, pages).ok()?;
    (found == length).then_some(pages)
}

impl SegmentReader {
    /// Opens a segment that a manifest lists.
    ///
    /// # Errors
    /// `Store` when there is none, or it is not what the manifest says.
    pub fn open(vault: &Vault, segment: &Segment) -> Result<Self> {
        let name = name::segment(segment.checkpoint, segment.number);
        let reader = vault.store.open(&name)?;
        let mut opened = Self { store: Arc::clone(&vault.store), reader, name, seal: None };
        let found = opened.reader.bytes();
        let salt_bytes = if vault.sealer.is_some() { SALT_BYTES } else { 0 };
        if found != segment.bytes || found < (HEADER_BYTES + salt_bytes) as u64 {
            return Err(opened.damaged(&format!("it has {found} bytes and not {}", segment.bytes)));
        }
        let mut header = [0; HEADER_BYTES];
        opened.reader.read_at(0, &mut header)?;
        opened.check_header(header, vault.sealer.is_some())?;
        if let Some(sealer) = &vault.sealer {
            let mut salt = [0; SALT_BYTES];
            opened.reader.read_at(HEADER_BYTES as u64, &mut salt)?;
            opened.seal = Some(sealer.object(&opened.name, &salt)?);
        }
        Ok(opened)
    }

    fn damaged(&self, why: &str) -> crate::Error {
        Wrong { store: &*self.store, object: &self.name }.damaged(why)
    }

    fn check_header(&self, header: [u8; HEADER_BYTES], sealed: bool) -> Result<()> {
        let Some([v0, v1, flags, zeros @ ..]) = header.strip_prefix(&MAGIC) else {
            return Err(self.damaged("it does not begin as a segment does"));
        };
        let major = u16::from_le_bytes([*v0, *v1]);
        if major != MAJOR {
            return Err(self.damaged(&format!(
                "it is of version {major} of the format, this release reads {MAJOR}: use the release that wrote it"
            )));
        }
        if *flags > 1 || zeros.iter().any(|byte| *byte != 0) {
            return Err(self.damaged("a reserved field of its header is not zero"));
        }
        match (*flags == 1, sealed) {
            (true, false) => Err(self.damaged("it is sealed, the store is not")),
            (false, true) => Err(self.damaged("it is not sealed, the store is")),
            _ => Ok(()),
        }
    }

    /// Where a whole extent lies.
    pub fn whole(&self, extent: &Extent) -> Range<u64> {
        extent.offset..extent.offset.saturating_add(extent.stored_bytes.into())
    }

    /// Where `count` pages from `first` on lie alone; `None` when only the whole extent can be read.
    pub fn part(&self, extent: &Extent, first: u16, count: u16) -> Option<Range<u64>> {
        let inside = count > 0 && first.checked_add(count).is_some_and(|end| end <= extent.pages);
        let page = self.stride() as u64;
        let start = extent.offset.checked_add(u64::from(first) * page)?;
        (inside && extent.encoding == Encoding::Raw).then(|| start..start + u64::from(count) * page)
    }

    /// How far apart the pages of a raw extent lie.
    fn stride(&self) -> usize {
        PAGE_SIZE + if self.seal.is_some() { TAG_BYTES } else { 0 }
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
        let count = usize::from(extent.pages.min(MAX_EXTENT_PAGES));
        let length = count * PAGE_SIZE;
        let wrong = |why| Err(self.damaged_extent(extent, why));
        if stored.len() as u64 != u64::from(extent.stored_bytes)
            || *blake3::hash(stored).as_bytes() != extent.digest
        {
            return wrong("does not match its digest");
        }
        let Scratch { zstd, pages, opened } = scratch;
        match extent.encoding {
            Encoding::Raw if stored.len() == count * self.stride() => {
                self.open_pieces(extent.offset, stored, self.stride(), opened)
            }
            Encoding::Raw => wrong("has not the length of its pages"),
            Encoding::Zstd => {
                let frame = self.open_pieces(extent.offset, stored, stored.len(), opened)?;
                let unpacked = unpack(zstd, pages, frame, length);
                unpacked.map_or_else(|| wrong("does not unpack to its pages"), Ok)
            }
        }
    }

    /// Opens pieces of one length with their tags, or answers what is not sealed as it is.
    fn open_pieces<'a>(
        &self,
        offset: u64,
        stored: &'a [u8],
        piece_bytes: usize,
        opened: &'a mut Vec<u8>,
    ) -> Result<&'a [u8]> {
        let Some(seal) = &self.seal else { return Ok(stored) };
        opened.clear();
        for (number, piece) in stored.chunks(piece_bytes.max(1)).enumerate() {
            let start = opened.len();
            opened.extend_from_slice(piece);
            let position = offset.saturating_add((number * piece_bytes) as u64);
            let length = seal.open(position, opened.get_mut(start..).unwrap_or_default())?;
            opened.truncate(start + length);
        }
        Ok(opened)
    }

    /// Some pages of a raw extent, from their stored bytes as [`SegmentReader::part`] has them, each checked against its sum in the
    /// index, of which `sums` are theirs. Pages that are not sealed are not copied.
    ///
    /// # Errors
    /// `Store` when they are damaged.
    pub fn decode_part<'a>(
        &self,
        extent: &Extent,
        first: u16,
        sums: &[u64],
        stored: &'a [u8],
        unpacker: &'a mut Unpacker,
    ) -> Result<&'a [u8]> {
        let count = stored.len() / self.stride();
        if !stored.len().is_multiple_of(self.stride())
            || extent.encoding != Encoding::Raw
            || sums.len() != count
        {
            return Err(self.damaged_extent(extent, "cannot be read by pages"));
        }
        let offset = extent.offset.saturating_add((usize::from(first) * self.stride()) as u64);
        let pages = self.open_pieces(offset, stored, self.stride(), &mut unpacker.scratch.opened)?;
        let (whole, _) = pages.as_chunks::<PAGE_SIZE>();
        match whole.iter().zip(sums).position(|(page, sum)| XxHash3_64::oneshot(page) != *sum) {
            None => Ok(pages),
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

//! Page data on its way into a segment.

use super::Vault;
use crate::error::Result;
use crate::seal::ObjectSeal;
use crate::store::{ObjectWriter, Store};
use crate::vault::wrong::Wrong;
use protocol::checkpoint::index::Extent;
use protocol::checkpoint::manifest::Segment;
use protocol::checkpoint::name::{self, CheckpointId};
use protocol::checkpoint::segment::{self, Encoding, MAX_EXTENT_PAGES};
use protocol::page::PAGE_SIZE;
use std::sync::Arc;
use twox_hash::XxHash3_64;

/// How many pages a raw extent should have: 256 KiB, enough for BLAKE3 to use all of a core's vector unit.
pub const RAW_EXTENT_PAGES: u16 = 64;

/// How many pages a packed extent should have: whoever wants one of them unpacks all.
pub const ZSTD_EXTENT_PAGES: u16 = 16;

/// The level of Zstandard, as for migrations: the levels above take longer than a disk.
const ZSTD_LEVEL: i32 = 1;

/// What does not fall below this part of its length, in eighths, is stored as it is: it is unpacked at every restore.
const WORTH_EIGHTHS: usize = 7;

/// Writes one segment of a checkpoint, extent by extent. Several threads may each write one of their own.
pub struct SegmentWriter {
    store: Arc<dyn Store>,
    writer: Box<dyn ObjectWriter>,
    name: String,
    checkpoint: CheckpointId,
    number: u32,
    bytes: u64,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
    seal: Option<ObjectSeal>,
    sealed: Vec<u8>,
}

impl SegmentWriter {
    /// Begins a segment of a checkpoint that is being taken. No two have one number.
    ///
    /// # Errors
    /// `Store`.
    pub fn begin(vault: &Vault, checkpoint: CheckpointId, number: u32) -> Result<Self> {
        let name = name::segment(checkpoint, number);
        let mut writer = vault.store.create(&name)?;
        let mut header = segment::header(vault.sealer.is_some()).to_vec();
        let mut seal = None;
        if let Some(sealer) = &vault.sealer {
            let (object, salt) = sealer.begin(&name)?;
            header.extend_from_slice(&salt);
            seal = Some(object);
        }
        writer.append(&header)?;
        Ok(Self {
            store: Arc::clone(&vault.store),
            writer,
            name,
            checkpoint,
            number,
            bytes: header.len() as u64,
            zstd: None,
            packed: Vec::new(),
            seal,
            sealed: Vec::new(),
        })
    }

    /// How long it is by now, in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Adds whole pages as one extent, packed if that is wanted and makes them an eighth shorter, and their sums to `sums`.
    /// The answer's `segment` is the number of this one: right where a manifest lists its own segments first and in order.
    ///
    /// # Errors
    /// `Store`, also for no pages, parts of pages, or more than [`MAX_EXTENT_PAGES`].
    pub fn append(&mut self, pages: &[u8], pack: bool, sums: &mut Vec<u64>) -> Result<Extent> {
        let (whole, rest) = pages.as_chunks::<PAGE_SIZE>();
        let count = u16::try_from(whole.len()).unwrap_or(u16::MAX);
        if !rest.is_empty() || count == 0 || count > MAX_EXTENT_PAGES {
            let wrong = Wrong { store: &*self.store, object: &self.name };
            return Err(wrong.unwritable(&format!("{} bytes are no extent", pages.len())));
        }
        let packed = if pack { self.pack(pages) } else { None };
        let (encoding, plain, piece_bytes) = match packed {
            Some(length) => (Encoding::Zstd, self.packed.get(..length).unwrap_or_default(), length),
            None => (Encoding::Raw, pages, PAGE_SIZE),
        };
        let stored = match &self.seal {
            None => plain,
            Some(seal) => {
                seal_pieces(seal, self.bytes, plain, piece_bytes, &mut self.sealed)?;
                &self.sealed
            }
        };
        self.writer.append(stored)?;
        let extent = Extent {
            segment: self.number,
            offset: self.bytes,
            stored_bytes: stored.len() as u32,
            pages: count,
            encoding,
            digest: *blake3::hash(stored).as_bytes(),
        };
        self.bytes += stored.len() as u64;
        sums.extend(whole.iter().map(|page| XxHash3_64::oneshot(page)));
        Ok(extent)
    }

    /// Makes it durable, and answers what a manifest says of it.
    ///
    /// # Errors
    /// `Store`.
    pub fn finish(self) -> Result<Segment> {
        let bytes = self.writer.finish()?;
        if bytes != self.bytes {
            let wrong = Wrong { store: &*self.store, object: &self.name };
            return Err(wrong.unwritable(&format!("it has {bytes} bytes, {} were written", self.bytes)));
        }
        Ok(Segment { checkpoint: self.checkpoint, number: self.number, bytes })
    }

    /// Packs pages into the buffer for that; the length, if it was worth it.
    fn pack(&mut self, pages: &[u8]) -> Option<usize> {
        let needed = zstd::zstd_safe::compress_bound(pages.len());
        if self.packed.len() < needed {
            self.packed.resize(needed, 0);
        }
        let zstd = match &mut self.zstd {
            Some(zstd) => zstd,
            none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
        };
        let length = zstd.compress_to_buffer(pages, &mut self.packed).ok()?;
        (length < pages.len() / 8 * WORTH_EIGHTHS).then_some(length)
    }
}

/// Seals pieces of one length, each with its tag behind it, for a place in a segment.
fn seal_pieces(
    seal: &ObjectSeal,
    offset: u64,
    plain: &[u8],
    piece_bytes: usize,
    sealed: &mut Vec<u8>,
) -> Result<()> {
    sealed.clear();
    for piece in plain.chunks(piece_bytes.max(1)) {
        let start = sealed.len();
        sealed.extend_from_slice(piece);
        let tag = seal.seal_in_place(offset + start as u64, sealed.get_mut(start..).unwrap_or_default())?;
        sealed.extend_from_slice(&tag);
    }
    Ok(())
}

//! Where all pages of a checkpoint lie, its chain merged: the bodies of a merged index and of its sums.
//!
//! ```text
//! u32 segments   u32 extents   u64 bytes of the object of sums   [32] its digest
//! segment        u64 second and u32 random bits of the checkpoint that wrote it   u32 number there   u64 bytes
//! extent         as in an index
//! for each extent, in order:
//!     runs
//!     run        page in the extent, from that of the run before   pages - 1   first page, from the end of the run before
//! ```
//!
//! Fixed numbers are little-endian. The numbers of runs are of variable length: seven bits in a byte, the lowest first, all but the last with the
//! highest bit set, in as few bytes as there can be. Pages of memory are counted through all spaces of the layout; their difference is twice
//! what it is, or if it is negative, twice that without its sign, less one. A page in no run is zeros. The other object holds the XXH3-64 (seed 0) of
//! every page that a run names, in their order: whoever starts a workload needs it later, if at all.
//!
//! It says nothing that the indexes of the chain do not say. It is there so that a long chain is not longer to read than a short one, and it is in
//! the order in which the pages are read.

use crate::checkpoint::index::{EXTENT_BYTES, Extent, decode_extent, encode_extent};
use crate::checkpoint::manifest::{HexDigest, Part, Segment};
use crate::checkpoint::name::CheckpointId;
use crate::error::{ProtocolError, Result};
use crate::layout::Layout;
use crate::page::PageRun;

const WHAT: &str = "a merged index";
const HEAD_BYTES: usize = 48;
const SEGMENT_BYTES: usize = 24;
const SUM_BYTES: usize = 8;

/// A run of pages and where its bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stored {
    /// The pages.
    pub run: PageRun,
    /// The extent: its position in [`Merged::extents`].
    pub extent: u32,
    /// The position of the run's first page in it.
    pub page: u16,
}

/// Where all pages of a checkpoint lie.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Merged {
    /// The object with a sum for every page that a run names.
    pub sums: Part,
    /// The segments that its extents lie in.
    pub segments: Vec<Segment>,
    /// The extents that its runs lie in. A segment is a position in the list above.
    pub extents: Vec<Extent>,
    /// The runs, ascending by extent and page in it. No page is in two of them.
    pub runs: Vec<Stored>,
}

impl Merged {
    /// The body of the object, for a layout in which its runs lie.
    pub fn encode(&self, layout: &Layout) -> Vec<u8> {
        let fixed = HEAD_BYTES + self.segments.len() * SEGMENT_BYTES + self.extents.len() * EXTENT_BYTES;
        // Most runs take five or six bytes.
        let mut bytes = Vec::with_capacity(fixed + self.runs.len() * 6);
        bytes.extend_from_slice(&(self.segments.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.extents.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&self.sums.bytes.to_le_bytes());
        bytes.extend_from_slice(&self.sums.digest.0);
        for Segment { checkpoint, number, bytes: length } in &self.segments {
            bytes.extend_from_slice(&checkpoint.unix_s().to_le_bytes());
            bytes.extend_from_slice(&checkpoint.random().to_le_bytes());
            bytes.extend_from_slice(&number.to_le_bytes());
            bytes.extend_from_slice(&length.to_le_bytes());
        }
        for extent in &self.extents {
            encode_extent(&mut bytes, extent);
        }
        let starts = starts(layout);
        let (mut runs, mut end) = (self.runs.iter().peekable(), 0_u64);
        for (number, _) in (0..).zip(&self.extents) {
            let here: Vec<_> =
                std::iter::from_fn(|| runs.next_if(|stored| stored.extent == number)).collect();
            put(&mut bytes, here.len() as u64);
            let mut before = 0;
            for Stored { run, page, .. } in here {
                let first = run.first + starts.get(usize::from(run.space.0)).copied().unwrap_or_default();
                put(&mut bytes, u64::from(page.wrapping_sub(before)));
                put(&mut bytes, u64::from(run.count).wrapping_sub(1));
                put(&mut bytes, folded(first.wrapping_sub(end) as i64));
                (before, end) = (*page, first + u64::from(run.count));
            }
        }
        bytes
    }

    /// Reads one of a layout that was validated. Allocates no more than in proportion to the bytes it was given.
    ///
    /// # Errors
    /// `Truncated`, `TooLarge`, `OutsideLayout`, or `Value` for whatever cannot be.
    pub fn decode(layout: &Layout, bytes: &[u8]) -> Result<Self> {
        let found = bytes.len() as u64;
        let truncated = |needed| ProtocolError::Truncated { what: WHAT, found, needed };
        let (head, rest) =
            bytes.split_first_chunk::<HEAD_BYTES>().ok_or_else(|| truncated(HEAD_BYTES as u64))?;
        let [s0, s1, s2, s3, e0, e1, e2, e3, b0, b1, b2, b3, b4, b5, b6, b7, digest @ ..] = *head;
        let segments = u32::from_le_bytes([s0, s1, s2, s3]);
        let extents = u32::from_le_bytes([e0, e1, e2, e3]);
        let sums =
            Part { bytes: u64::from_le_bytes([b0, b1, b2, b3, b4, b5, b6, b7]), digest: HexDigest(digest) };
        let tables = u64::from(segments) * SEGMENT_BYTES as u64 + u64::from(extents) * EXTENT_BYTES as u64;
        if tables > rest.len() as u64 {
            return Err(truncated(HEAD_BYTES as u64 + tables));
        }
        let (segment_table, rest) = rest.split_at(segments as usize * SEGMENT_BYTES);
        let (extent_table, mut rest) = rest.split_at(extents as usize * EXTENT_BYTES);
        let segment_list = segment_table.as_chunks().0.iter().map(segment).collect::<Result<Vec<_>>>()?;
        let extent_list = extent_table.as_chunks().0.iter().map(|row| {
            let extent = decode_extent(row, segments)?;
            let length = segment_list.get(extent.segment as usize).map_or(0, |segment| segment.bytes);
            match extent.offset.checked_add(extent.stored_bytes.into()) {
                Some(end) if end <= length => Ok(extent),
                _ => Err(value("the end of an extent", extent.offset)),
            }
        });
        let extents = extent_list.collect::<Result<Vec<_>>>()?;
        let starts = starts(layout);
        let (mut runs, mut end) = (Vec::new(), 0_u64);
        for (number, extent) in (0..).zip(&extents) {
            let count = take(&mut rest)?;
            // Each has three numbers, and so as many bytes at least.
            if count > rest.len() as u64 / 3 {
                return Err(truncated(found.saturating_add(count.saturating_mul(3) - rest.len() as u64)));
            }
            let mut before = 0_u64;
            for _ in 0..count {
                let [further, more, away] = [take(&mut rest)?, take(&mut rest)?, take(&mut rest)?];
                let page = before.saturating_add(further);
                if page.saturating_add(more) >= u64::from(extent.pages) {
                    return Err(value("the place of a run in its extent", page));
                }
                // So it has no more pages than an extent.
                let count = more as u32 + 1;
                let at = end.wrapping_add(unfolded(away) as u64);
                let space = starts.partition_point(|start| *start <= at).saturating_sub(1);
                let (space, start) = layout
                    .spaces
                    .get(space)
                    .zip(starts.get(space))
                    .ok_or_else(|| value("the place of a run", at))?;
                let run = PageRun { space: space.id, first: at - start, count };
                layout.check(&run)?;
                runs.push(Stored { run, extent: number, page: page as u16 });
                (before, end) = (page, at + u64::from(count));
            }
        }
        if !rest.is_empty() {
            return Err(ProtocolError::TooLarge { what: WHAT, found, limit: found - rest.len() as u64 });
        }
        Ok(Self { sums, segments: segment_list, extents, runs })
    }

    /// Pages that its runs name: as many as there are sums.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|stored| u64::from(stored.run.count)).sum()
    }
}

/// How many pages there are before each space of a layout.
fn starts(layout: &Layout) -> Vec<u64> {
    let before = |next: &mut u64, pages: u64| Some(std::mem::replace(next, next.saturating_add(pages)));
    layout.spaces.iter().scan(0, |next, space| before(next, space.pages)).collect()
}

/// A difference as a number that is small where it is.
fn folded(difference: i64) -> u64 {
    (difference << 1 ^ difference >> 63) as u64
}

fn unfolded(number: u64) -> i64 {
    (number >> 1) as i64 ^ -((number & 1) as i64)
}

/// The body of an object of sums.
pub fn encode_sums(sums: &[u64]) -> Vec<u8> {
    sums.iter().flat_map(|sum| sum.to_le_bytes()).collect()
}

/// Reads the sums of so many pages.
///
/// # Errors
/// `Truncated` or `TooLarge` for any other number of them.
pub fn decode_sums(pages: u64, bytes: &[u8]) -> Result<Vec<u64>> {
    const WHAT: &str = "the sums of a merged index";
    let (found, needed) = (bytes.len() as u64, pages.saturating_mul(SUM_BYTES as u64));
    match found.cmp(&needed) {
        std::cmp::Ordering::Less => Err(ProtocolError::Truncated { what: WHAT, found, needed }),
        std::cmp::Ordering::Greater => Err(ProtocolError::TooLarge { what: WHAT, found, limit: needed }),
        std::cmp::Ordering::Equal => {
            Ok(bytes.as_chunks::<SUM_BYTES>().0.iter().map(|sum| u64::from_le_bytes(*sum)).collect())
        }
    }
}

fn value(what: &'static str, found: u64) -> ProtocolError {
    ProtocolError::Value { what, found }
}

fn segment(row: &[u8; SEGMENT_BYTES]) -> Result<Segment> {
    let [s0, s1, s2, s3, s4, s5, s6, s7, r0, r1, r2, r3, n0, n1, n2, n3, length @ ..] = *row;
    let unix_s = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
    let checkpoint = CheckpointId::new(unix_s, u32::from_le_bytes([r0, r1, r2, r3]));
    if checkpoint.unix_s() != unix_s {
        return Err(value("the second of a checkpoint", unix_s));
    }
    let number = u32::from_le_bytes([n0, n1, n2, n3]);
    Ok(Segment { checkpoint, number, bytes: u64::from_le_bytes(length) })
}

/// Writes a number of variable length.
fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
}

/// Reads a number of variable length.
fn take(bytes: &mut &[u8]) -> Result<u64> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let Some((byte, rest)) = bytes.split_first() else {
            return Err(ProtocolError::Truncated { what: "a number of a merged index", found: 0, needed: 1 });
        };
        *bytes = rest;
        let bits = u64::from(byte & 0x7f);
        // A last byte of zero is one too many, and the tenth has room for one bit.
        if byte & 0x80 == 0 && bits == 0 && shift > 0 || shift == 63 && bits > 1 {
            return Err(value("a byte of a number", u64::from(*byte)));
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(value("the length of a number", 10))
}

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
use crate::page::{PageRun, SpaceId};
use std::ops::Range;

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
    /// As [`MergedRows::open`] and [`MergedRows::each`].
    pub fn decode(layout: &Layout, bytes: &[u8]) -> Result<Self> {
        let rows = MergedRows::open(layout, bytes)?;
        let mut runs = Vec::new();
        rows.each(|stored| runs.push(stored))?;
        let MergedRows { sums, segments, extents, .. } = rows;
        Ok(Self { sums, segments, extents, runs })
    }

    /// Pages that its runs name: as many as there are sums.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|stored| u64::from(stored.run.count)).sum()
    }
}

/// A merged index as it is stored: for whoever goes through it once, and needs no memory for that. Its tables are checked, and its runs are as they
/// come: to go through them once only to check them took ten of the 42 ms in which a long chain was planned (docs/performance.md, "Restoring").
#[derive(Debug, Clone)]
pub struct MergedRows<'a> {
    /// The object with a sum for every page that a run names.
    pub sums: Part,
    /// The segments that its extents lie in.
    pub segments: Vec<Segment>,
    /// The extents that its runs lie in.
    pub extents: Vec<Extent>,
    walk: Walk<'a>,
}

impl<'a> MergedRows<'a> {
    /// Opens one of a layout that was validated. Allocates no more than in proportion to the bytes it was given.
    ///
    /// # Errors
    /// `Truncated` or `Value` for whatever cannot be.
    pub fn open(layout: &Layout, bytes: &'a [u8]) -> Result<Self> {
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
        let (extent_table, runs) = rest.split_at(extents as usize * EXTENT_BYTES);
        let segment_list = segment_table.as_chunks().0.iter().map(segment).collect::<Result<Vec<_>>>()?;
        let extent_list = extent_table.as_chunks().0.iter().map(|row| {
            let extent = decode_extent(row, segments)?;
            let length = segment_list.get(extent.segment as usize).map_or(0, |segment| segment.bytes);
            match extent.offset.checked_add(extent.stored_bytes.into()) {
                Some(end) if end <= length => Ok(extent),
                _ => Err(value("the end of an extent", extent.offset)),
            }
        });
        // Their bytes are here, so there can be so many.
        let mut all = Vec::with_capacity(extents as usize);
        for extent in extent_list {
            all.push(extent?);
        }
        Ok(Self { sums, segments: segment_list, extents: all, walk: Walk::new(layout, runs) })
    }

    /// Gives every run, ascending by extent and page in it. No page is in two of them.
    ///
    /// # Errors
    /// `Truncated`, `TooLarge`, `OutsideLayout`, or `Value` for whatever cannot be: then what was given before is worth nothing.
    pub fn each(&self, mut take: impl FnMut(Stored)) -> Result<()> {
        let mut walk = self.walk.clone();
        for (number, extent) in (0..).zip(&self.extents) {
            let count = walk.count()?;
            // Each has three numbers, and so as many bytes at least.
            let (found, needed) = (walk.rest.len() as u64, count.saturating_mul(3));
            if needed > found {
                return Err(ProtocolError::Truncated { what: "the runs of an extent", found, needed });
            }
            let mut page = 0;
            for _ in 0..count {
                let run;
                (run, page) = walk.run(extent, page)?;
                // It is less than the pages of an extent.
                take(Stored { run, extent: number, page: page as u16 });
            }
        }
        match walk.rest.len() as u64 {
            0 => Ok(()),
            found => Err(ProtocolError::TooLarge { what: "what follows the last run", found, limit: 0 }),
        }
    }
}

/// How far the numbers of the runs were read.
#[derive(Debug, Clone)]
struct Walk<'a> {
    rest: &'a [u8],
    /// The end of the run before, counted through all spaces.
    end: u64,
    /// Where each space begins and ends, counted through all of them.
    spaces: Vec<Range<u64>>,
    /// The space of the run before: the next one is mostly in it, too.
    space: usize,
}

impl<'a> Walk<'a> {
    fn new(layout: &Layout, rest: &'a [u8]) -> Self {
        let spaces = starts(layout).into_iter().zip(&layout.spaces);
        let spaces = spaces.map(|(start, space)| start..start.saturating_add(space.pages)).collect();
        Self { rest, end: 0, spaces, space: 0 }
    }

    /// How many runs the next extent has.
    fn count(&mut self) -> Result<u64> {
        take(&mut self.rest)
    }

    /// The next run of an extent, and the position of its first page there; `before` is that of the run before, or 0.
    #[inline]
    fn run(&mut self, extent: &Extent, before: u64) -> Result<(PageRun, u64)> {
        let [further, more, away] = take_three(&mut self.rest)?;
        let page = before.saturating_add(further);
        if page.saturating_add(more) >= u64::from(extent.pages) {
            return Err(value("the place of a run in its extent", page));
        }
        let first = self.end.wrapping_add(unfolded(away) as u64);
        let last = first.checked_add(more).ok_or_else(|| value("the place of a run", first))?;
        let inside = |space: &Range<u64>| space.contains(&first) && space.contains(&last);
        if !self.spaces.get(self.space).is_some_and(inside) {
            self.space = self.spaces.iter().position(inside).ok_or(ProtocolError::OutsideLayout {
                space: self.space as u16,
                first,
                count: more + 1,
            })?;
        }
        let start = self.spaces.get(self.space).map_or(0, |space| space.start);
        self.end = last + 1;
        // It has no more pages than an extent, and a layout no more spaces than a number of one can say.
        let run = PageRun { space: SpaceId(self.space as u16), first: first - start, count: more as u32 + 1 };
        Ok((run, page))
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

/// Reads the three numbers of a run. Mostly the first two are of one byte, and all of them lie in eight: then they are taken out of one word, in a
/// third of the time. A merged index of a long chain has hundreds of thousands of runs, and whoever starts a workload waits for them.
#[inline]
fn take_three(bytes: &mut &[u8]) -> Result<[u64; 3]> {
    const CONTINUED: u64 = 0x8080_8080_8080_8080;
    if let Some((word, _)) = bytes.split_first_chunk::<8>() {
        let word = u64::from_le_bytes(*word);
        // The place of the third number's last byte in the six bytes behind the first two.
        let last = (!word & (CONTINUED << 16)).trailing_zeros() / 8;
        if word & 0x8080 == 0 && last < 8 {
            let third = (word & (u64::MAX >> (56 - 8 * last))) >> 16;
            let bits = |byte: u32| (third >> (8 * byte) & 0x7f) << (7 * byte);
            let away = bits(0) | bits(1) | bits(2) | bits(3) | bits(4) | bits(5);
            // A last byte of zero would be one too many: the long way says so.
            if last == 2 || away >> (7 * (last - 2)) != 0 {
                *bytes = bytes.get(last as usize + 1..).unwrap_or_default();
                return Ok([word & 0x7f, word >> 8 & 0x7f, away]);
            }
        }
    }
    Ok([take(bytes)?, take(bytes)?, take(bytes)?])
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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn three_numbers_are_the_same_from_one_word_and_one_by_one(
            numbers in proptest::array::uniform3(prop_oneof![0u64..3, 0u64..300, any::<u32>().prop_map(u64::from), any::<u64>()]),
            noise in proptest::collection::vec(any::<u8>(), 0..12),
            cut in 0usize..40,
        ) {
            let mut written = Vec::new();
            numbers.iter().for_each(|number| put(&mut written, *number));
            written.extend_from_slice(&noise);
            for bytes in [&written[..], &written[..cut.min(written.len())], &noise[..]] {
                let (mut together, mut alone) = (bytes, bytes);
                let found = take_three(&mut together);
                let mut one = || take(&mut alone);
                let expected = one().and_then(|a| Ok([a, one()?, one()?]));
                prop_assert_eq!(&found, &expected);
                prop_assert!(found.is_err() || together == alone);
            }
        }
    }
}

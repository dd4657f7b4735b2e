//! Where the pages lie that a checkpoint added: the body of an index object.
//!
//! ```text
//! u32 extents   u32 runs
//! extent        u32 segment   u32 stored bytes   u64 offset   u16 pages   u8 encoding   [5] zero   [32] BLAKE3 of the stored bytes
//! run           u64 first page   u32 pages   u32 extent   u16 space   u16 page in the extent   u32 zero
//! sums          u64 XXH3-64 (seed 0) of every page of every extent, in order
//! ```
//!
//! All numbers are little-endian. `segment` is a position in the manifest's list of segments, of which some may belong to other
//! checkpoints. Runs ascend by space and page, do not overlap, and none leaves its extent; [`ZEROS`] as extent stands for pages of
//! zeros. A page in no run is as the parent has it, or zeros where there is none.
//!
//! The sums serve two ends. A page of a raw extent can be checked without reading its neighbours; and a writer finds pages that
//! are stored already, whose bytes it then compares, because 64 bits prove nothing.

use crate::checkpoint::object::Digest;
use crate::checkpoint::segment::{Encoding, HEADER_BYTES, MAX_EXTENT_PAGES, max_stored_bytes};
use crate::error::{ProtocolError, Result};
use crate::layout::Layout;
use crate::page::{PageRun, SpaceId};

/// In place of an extent: the pages are zeros.
pub const ZEROS: u32 = u32::MAX;

pub(super) const EXTENT_BYTES: usize = 56;
const RUN_BYTES: usize = 24;

/// Some pages in a segment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Position in the manifest's list of segments.
    pub segment: u32,
    /// Where it begins in the segment.
    pub offset: u64,
    /// How long it is there.
    pub stored_bytes: u32,
    /// How many pages it holds.
    pub pages: u16,
    /// How they are stored.
    pub encoding: Encoding,
    /// BLAKE3 of the stored bytes.
    pub digest: Digest,
}

/// Where the bytes of a run lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum At {
    /// Nowhere: they are zeros.
    Zeros,
    /// In an extent.
    Extent {
        /// Its position in [`Index::extents`].
        extent: u32,
        /// The position of the run's first page in it.
        page: u16,
    },
}

/// A run of pages and where its bytes lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placed {
    /// The pages.
    pub run: PageRun,
    /// Their bytes.
    pub at: At,
}

/// Where the pages lie that a checkpoint added.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Index {
    /// The extents that its runs lie in.
    pub extents: Vec<Extent>,
    /// The runs, ascending.
    pub runs: Vec<Placed>,
    /// XXH3-64 of each page of each extent, in order: as many as all extents have pages.
    pub sums: Vec<u64>,
}

impl Index {
    /// Adds an extent that is complete; `sums` has one sum for each of its pages. Answers its position.
    pub fn push(&mut self, extent: Extent, sums: &[u64]) -> u32 {
        debug_assert_eq!(usize::from(extent.pages), sums.len(), "one sum for each page");
        let position = self.extents.len() as u32;
        self.extents.push(extent);
        self.sums.extend_from_slice(sums);
        position
    }

    /// For each extent, where its sums begin in [`Index::sums`].
    pub fn sum_starts(&self) -> Vec<usize> {
        sum_starts(&self.extents)
    }

    /// The body of the object.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(
            8 + self.extents.len() * EXTENT_BYTES + self.runs.len() * RUN_BYTES + self.sums.len() * 8,
        );
        bytes.extend_from_slice(&(self.extents.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&(self.runs.len() as u32).to_le_bytes());
        for extent in &self.extents {
            encode_extent(&mut bytes, extent);
        }
        for Placed { run, at } in &self.runs {
            let (extent, page) = match *at {
                At::Zeros => (ZEROS, 0),
                At::Extent { extent, page } => (extent, page),
            };
            bytes.extend_from_slice(&run.first.to_le_bytes());
            bytes.extend_from_slice(&run.count.to_le_bytes());
            bytes.extend_from_slice(&extent.to_le_bytes());
            bytes.extend_from_slice(&run.space.0.to_le_bytes());
            bytes.extend_from_slice(&page.to_le_bytes());
            bytes.extend_from_slice(&[0; 4]);
        }
        bytes.extend(self.sums.iter().flat_map(|sum| sum.to_le_bytes()));
        bytes
    }

    /// Reads an index of a layout that was validated, whose manifest lists so many segments. Allocates no more than in proportion to
    /// the bytes it was given.
    ///
    /// # Errors
    /// As [`Rows::check`].
    pub fn decode(layout: &Layout, segments: u32, bytes: &[u8]) -> Result<Self> {
        Ok(Rows::check(layout, segments, bytes)?.into())
    }
}

impl From<Rows<'_>> for Index {
    fn from(rows: Rows<'_>) -> Self {
        let (runs, sums) = (rows.runs().collect(), rows.sums_from(0, usize::MAX).collect());
        Self { extents: rows.extents, runs, sums }
    }
}

/// An index as it is stored, every row of it checked: for whoever goes through it once.
#[derive(Debug, Clone)]
pub struct Rows<'a> {
    extents: Vec<Extent>,
    runs: &'a [[u8; RUN_BYTES]],
    sums: &'a [[u8; 8]],
}

impl<'a> Rows<'a> {
    /// Checks an index of a layout that was validated, whose manifest lists so many segments. Allocates no more than in proportion to
    /// the bytes it was given.
    ///
    /// # Errors
    /// `Truncated`, `TooLarge`, `OutsideLayout`, or `Value` for whatever cannot be.
    pub fn check(layout: &Layout, segments: u32, bytes: &'a [u8]) -> Result<Self> {
        const WHAT: &str = "an index";
        let found = bytes.len() as u64;
        let (head, rest) = bytes.split_first_chunk::<8>().ok_or(ProtocolError::Truncated {
            what: WHAT,
            found,
            needed: 8,
        })?;
        let [e0, e1, e2, e3, r0, r1, r2, r3] = *head;
        let (extents, runs) = (u32::from_le_bytes([e0, e1, e2, e3]), u32::from_le_bytes([r0, r1, r2, r3]));
        let tables = u64::from(extents) * EXTENT_BYTES as u64 + u64::from(runs) * RUN_BYTES as u64;
        if tables > rest.len() as u64 {
            return Err(ProtocolError::Truncated { what: WHAT, found, needed: tables + 8 });
        }
        let (extent_table, rest) = rest.split_at(extents as usize * EXTENT_BYTES);
        let (run_table, sum_table) = rest.split_at(runs as usize * RUN_BYTES);
        let extents = extent_table
            .as_chunks::<EXTENT_BYTES>()
            .0
            .iter()
            .map(|row| decode_extent(row, segments))
            .collect::<Result<Vec<_>>>()?;
        let pages: u64 = extents.iter().map(|extent| u64::from(extent.pages)).sum();
        if sum_table.len() as u64 != pages * 8 {
            let needed = tables + 8 + pages * 8;
            return Err(if found < needed {
                ProtocolError::Truncated { what: WHAT, found, needed }
            } else {
                ProtocolError::TooLarge { what: WHAT, found, limit: needed }
            });
        }
        let runs = run_table.as_chunks::<RUN_BYTES>().0;
        let mut end = (0, 0);
        for row in runs {
            let placed = placed(row);
            check(row, &placed, &extents)?;
            layout.check(&placed.run)?;
            if (placed.run.space.0, placed.run.first) < end {
                return Err(value("the order of an index", placed.run.first));
            }
            end = (placed.run.space.0, placed.run.end());
        }
        Ok(Self { extents, runs, sums: sum_table.as_chunks::<8>().0 })
    }

    /// The extents that its runs lie in.
    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    /// The runs, ascending.
    pub fn runs(&self) -> impl Iterator<Item = Placed> + '_ {
        self.runs.iter().map(placed)
    }

    /// XXH3-64 of each page of each extent, in order, from a position on, and at most `count` of them.
    pub fn sums_from(&self, start: usize, count: usize) -> impl Iterator<Item = u64> + '_ {
        let rest = self.sums.get(start..).unwrap_or_default();
        rest.iter().take(count).map(|sum| u64::from_le_bytes(*sum))
    }

    /// For each extent, where its sums begin.
    pub fn sum_starts(&self) -> Vec<usize> {
        sum_starts(&self.extents)
    }
}

fn sum_starts(extents: &[Extent]) -> Vec<usize> {
    extents
        .iter()
        .scan(0, |next, extent| {
            let start = *next;
            *next += usize::from(extent.pages);
            Some(start)
        })
        .collect()
}

fn value(what: &'static str, found: u64) -> ProtocolError {
    ProtocolError::Value { what, found }
}

/// A little-endian number of at most eight bytes at a place in a table's row, which it lies in.
fn number(row: &[u8], at: usize, bytes: usize) -> u64 {
    row[at..at + bytes].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
}

/// A row of the table of extents.
pub(super) fn encode_extent(bytes: &mut Vec<u8>, extent: &Extent) {
    bytes.extend_from_slice(&extent.segment.to_le_bytes());
    bytes.extend_from_slice(&extent.stored_bytes.to_le_bytes());
    bytes.extend_from_slice(&extent.offset.to_le_bytes());
    bytes.extend_from_slice(&extent.pages.to_le_bytes());
    bytes.extend_from_slice(&[extent.encoding as u8, 0, 0, 0, 0, 0]);
    bytes.extend_from_slice(&extent.digest);
}

/// Reads a row of the table of extents, where there are so many segments.
pub(super) fn decode_extent(row: &[u8; EXTENT_BYTES], segments: u32) -> Result<Extent> {
    let (code, zero) = (row[18], number(row, 19, 5));
    let mut digest = Digest::default();
    digest.copy_from_slice(&row[EXTENT_BYTES - 32..]);
    let pages = number(row, 16, 2) as u16;
    let found = Extent {
        segment: number(row, 0, 4) as u32,
        stored_bytes: number(row, 4, 4) as u32,
        offset: number(row, 8, 8),
        pages,
        encoding: Encoding::from_byte(code)
            .ok_or_else(|| value("the encoding of an extent", u64::from(code)))?,
        digest,
    };
    if zero != 0 {
        return Err(value("a reserved field of an extent", zero));
    }
    if found.segment >= segments {
        return Err(value("the segment of an extent", u64::from(found.segment)));
    }
    if pages == 0 || pages > MAX_EXTENT_PAGES {
        return Err(value("the pages of an extent", u64::from(pages)));
    }
    if found.stored_bytes == 0 || found.stored_bytes > max_stored_bytes(pages) {
        return Err(value("the length of an extent", u64::from(found.stored_bytes)));
    }
    if found.offset < HEADER_BYTES as u64 || found.offset.checked_add(u64::from(found.stored_bytes)).is_none()
    {
        return Err(value("the offset of an extent", found.offset));
    }
    Ok(found)
}

/// A row of the table of runs, as it says.
fn placed(row: &[u8; RUN_BYTES]) -> Placed {
    let [f0, f1, f2, f3, f4, f5, f6, f7, c0, c1, c2, c3, e0, e1, e2, e3, s0, s1, p0, p1, ..] = *row;
    let run = PageRun {
        space: SpaceId(u16::from_le_bytes([s0, s1])),
        first: u64::from_le_bytes([f0, f1, f2, f3, f4, f5, f6, f7]),
        count: u32::from_le_bytes([c0, c1, c2, c3]),
    };
    let at = match u32::from_le_bytes([e0, e1, e2, e3]) {
        ZEROS => At::Zeros,
        extent => At::Extent { extent, page: u16::from_le_bytes([p0, p1]) },
    };
    Placed { run, at }
}

/// What a row must be besides, whatever the layout is.
fn check(row: &[u8; RUN_BYTES], placed: &Placed, extents: &[Extent]) -> Result<()> {
    let [.., p0, p1, z0, z1, z2, z3] = *row;
    if [z0, z1, z2, z3] != [0; 4] {
        let found = u32::from_le_bytes([z0, z1, z2, z3]);
        return Err(value("a reserved field of a run", u64::from(found)));
    }
    match placed.at {
        At::Zeros if [p0, p1] == [0, 0] => Ok(()),
        At::Zeros => {
            let page = u16::from_le_bytes([p0, p1]);
            Err(value("the place of a run of zeros", u64::from(page)))
        }
        At::Extent { extent, page } => {
            let inside = extents.get(extent as usize).is_some_and(|extent| {
                u64::from(page) + u64::from(placed.run.count) <= u64::from(extent.pages)
            });
            if inside { Ok(()) } else { Err(value("the extent of a run", u64::from(extent))) }
        }
    }
}

//! Which page of which process lies where in the spaces of a layout.
//!
//! ```text
//! u64 runs
//! run   u32 process  u32 pages  u64 first page  u16 space  u16 zero  u32 zero  u64 first slot      32 bytes
//! ```
//!
//! All numbers are little-endian. Runs are in the order of their spaces and, in each, of their slots, without a gap from slot 0 on. A
//! page is its address divided by the page size; a slot is a page of a space. No page of a process is in two runs, and no slot either.

use crate::error::{ProtocolError, Result};
use crate::layout::Layout;
use crate::page::SpaceId;

/// The most runs: 32 MiB of them, half of what a state may be.
pub const MAX_RUNS: usize = 1 << 20;

/// Addresses have 64 bits.
const MAX_PAGE: u64 = 1 << 52;

const RUN_BYTES: usize = 32;
const WHAT: &str = "the placement of a container's pages";

/// Pages that follow one another in a process and in a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The process, by its number inside of the container.
    pub process: u32,
    /// Its first page.
    pub page: u64,
    /// How many they are, at least 1.
    pub pages: u32,
    /// The space they lie in.
    pub space: SpaceId,
    /// The first of them there.
    pub slot: u64,
}

/// All runs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Placement {
    /// In the order of spaces and slots.
    pub runs: Vec<Run>,
}

impl Placement {
    /// The section's body.
    ///
    /// # Errors
    /// `TooLarge` for more than [`MAX_RUNS`].
    pub fn encode(&self) -> Result<Vec<u8>> {
        check_count(self.runs.len() as u64)?;
        let mut bytes = Vec::with_capacity(8 + self.runs.len() * RUN_BYTES);
        bytes.extend_from_slice(&(self.runs.len() as u64).to_le_bytes());
        for Run { process, page, pages, space, slot } in &self.runs {
            bytes.extend_from_slice(&process.to_le_bytes());
            bytes.extend_from_slice(&pages.to_le_bytes());
            bytes.extend_from_slice(&page.to_le_bytes());
            bytes.extend_from_slice(&space.0.to_le_bytes());
            bytes.extend_from_slice(&[0; 6]);
            bytes.extend_from_slice(&slot.to_le_bytes());
        }
        Ok(bytes)
    }

    /// Reads the section's body for a layout that was validated.
    ///
    /// # Errors
    /// `Truncated`, `TooLarge`, `OutsideLayout` for a run behind the end of its space, `Value` for a gap in the slots, or
    /// `Layout` for a page that is there twice.
    pub fn decode(layout: &Layout, bytes: &[u8]) -> Result<Self> {
        let truncated = |needed: usize| ProtocolError::Truncated {
            what: WHAT,
            found: bytes.len() as u64,
            needed: needed as u64,
        };
        let (count, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| truncated(8))?;
        let count = check_count(u64::from_le_bytes(*count))?;
        let (runs, behind) = rest.as_chunks::<RUN_BYTES>();
        if runs.len() != count || !behind.is_empty() {
            return Err(truncated(8 + count * RUN_BYTES));
        }
        let runs: Vec<Run> = runs.iter().map(run).collect();
        let mut next = (SpaceId(0), 0);
        for run in &runs {
            let Run { page, pages, space, slot, .. } = *run;
            if space > next.0 {
                next = (space, 0);
            }
            if (space, slot) != next || pages == 0 {
                return Err(ProtocolError::Value { what: "the first slot of a run", found: slot });
            }
            let count = u64::from(pages);
            if layout.space(space).is_none_or(|space| slot + count > space.pages) {
                return Err(ProtocolError::OutsideLayout { space: space.0, first: slot, count });
            }
            if page > MAX_PAGE - count {
                return Err(ProtocolError::Value { what: "a page of a process", found: page });
            }
            next.1 = slot + count;
        }
        let placement = Self { runs };
        if placement.by_page().windows(2).any(|pair| {
            pair[0].process == pair[1].process && pair[0].page + u64::from(pair[0].pages) > pair[1].page
        }) {
            return Err(ProtocolError::Layout { why: format!("{WHAT} has a page twice") });
        }
        Ok(placement)
    }

    /// The runs by process and page.
    pub fn by_page(&self) -> Vec<Run> {
        let mut runs = self.runs.clone();
        runs.sort_unstable_by_key(|run| (run.process, run.page));
        runs
    }
}

fn check_count(found: u64) -> Result<usize> {
    usize::try_from(found).ok().filter(|count| *count <= MAX_RUNS).ok_or(ProtocolError::TooLarge {
        what: "the number of runs of a container's pages",
        found,
        limit: MAX_RUNS as u64,
    })
}

fn run(bytes: &[u8; RUN_BYTES]) -> Run {
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    let half = |at: usize| u32::from_le_bytes(std::array::from_fn(|byte| bytes[at + byte]));
    Run {
        process: half(0),
        pages: half(4),
        page: number(8),
        space: SpaceId(u16::from_le_bytes([bytes[16], bytes[17]])),
        slot: number(24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Space, SpaceKind};
    use proptest::prelude::*;

    fn layout(pages: &[u64]) -> Layout {
        let space = |(id, pages): (u16, &u64)| Space {
            id: SpaceId(id),
            kind: SpaceKind::Memory,
            pages: *pages,
            guest_address: u64::from(id) << 40,
        };
        Layout { spaces: (0..).zip(pages).map(space).collect() }
    }

    fn run(process: u32, page: u64, pages: u32, space: u16, slot: u64) -> Run {
        Run { process, page, pages, space: SpaceId(space), slot }
    }

    #[test]
    fn runs_that_cannot_be_are_refused() {
        let layout = layout(&[10, 10, 10]);
        let read =
            |runs: &[Run]| Placement::decode(&layout, &Placement { runs: runs.to_vec() }.encode().unwrap());
        read(&[run(1, 100, 4, 0, 0), run(1, 200, 6, 0, 4), run(1, 104, 10, 2, 0)]).unwrap();
        for bad in [
            vec![run(1, 100, 4, 0, 1)],
            vec![run(1, 100, 4, 0, 0), run(1, 200, 6, 0, 5)],
            vec![run(1, 100, 4, 1, 0), run(1, 200, 6, 0, 0)],
            vec![run(1, 100, 11, 0, 0)],
            vec![run(1, 100, 0, 0, 0)],
            vec![run(1, 100, 1, 3, 0)],
            vec![run(1, 100, 4, 0, 0), run(1, 103, 6, 0, 4)],
            vec![run(1, u64::MAX, 1, 0, 0)],
            vec![run(1, 100, 1, 0, u64::MAX)],
        ] {
            assert!(read(&bad).is_err(), "{bad:?}");
        }
        let two = [run(1, 100, 4, 0, 0), run(2, 100, 4, 0, 4)];
        let bytes = Placement { runs: two.to_vec() }.encode().unwrap();
        (0..bytes.len()).for_each(|cut| drop(Placement::decode(&layout, &bytes[..cut]).unwrap_err()));
        let mut many = bytes;
        many[..8].copy_from_slice(&(1_u64 << 40).to_le_bytes());
        assert!(matches!(Placement::decode(&layout, &many), Err(ProtocolError::TooLarge { .. })));
    }

    proptest! {
        #[test]
        fn a_placement_is_read_as_it_was_written(
            pieces in prop::collection::vec((0_u32..3, 0_u64..5, 1_u32..9, any::<bool>()), 1..40),
        ) {
            let (mut space, mut slot, mut ends, mut used) = (0, 0, [0_u64; 3], vec![0_u64]);
            let mut runs = Vec::new();
            for (process, gap, pages, next) in pieces {
                if next && slot > 0 {
                    (space, slot) = (space + 1, 0);
                    used.push(0);
                }
                let end = &mut ends[process as usize];
                runs.push(run(process, *end + gap, pages, space, slot));
                *end += gap + u64::from(pages);
                slot += u64::from(pages);
                used[usize::from(space)] = slot;
            }
            let layout = layout(&used);
            let placement = Placement { runs };
            prop_assert_eq!(Placement::decode(&layout, &placement.encode().unwrap()).unwrap(), placement);
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = Placement::decode(&layout(&[10, 10]), &bytes);
        }
    }
}

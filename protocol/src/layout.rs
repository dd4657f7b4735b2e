//! Which memory a workload has.

use crate::error::{ProtocolError, Result};
use crate::page::{PAGE_SIZE, PageRun, SpaceId};
use serde::{Deserialize, Serialize};

/// The most spaces a layout may have.
pub const MAX_SPACES: usize = 1024;

/// The most pages a space may have: 2^36, 256 TiB.
pub const MAX_SPACE_PAGES: u64 = 1 << 36;

/// One space of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Its number: the position in the layout.
    pub id: SpaceId,
    /// What the pages are.
    pub kind: SpaceKind,
    /// Its length in pages of [`PAGE_SIZE`] bytes.
    pub pages: u64,
    /// Guest-physical address of the first byte, a multiple of the page size.
    pub guest_address: u64,
}

/// What the pages of a space are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpaceKind {
    /// A VM's memory. New at the destination, it reads as zeros.
    Memory,
}

/// All spaces of a workload, in the order of their numbers.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Layout {
    /// The spaces; `spaces[i].id` is `i`.
    pub spaces: Vec<Space>,
}

impl Layout {
    /// Checks a layout from outside: numbered in order, aligned, none empty, none overlapping, bounded.
    ///
    /// # Errors
    /// `Layout` saying what is wrong, or `TooLarge` when it is more than `max_bytes` in all.
    pub fn validate(&self, max_bytes: u64) -> Result<()> {
        let wrong = |why: String| Err(ProtocolError::Layout { why });
        if self.spaces.is_empty() {
            return wrong("it has no spaces".into());
        }
        if self.spaces.len() > MAX_SPACES {
            let found = self.spaces.len() as u64;
            return Err(ProtocolError::TooLarge {
                what: "the number of spaces",
                found,
                limit: MAX_SPACES as u64,
            });
        }
        let mut ranges = Vec::with_capacity(self.spaces.len());
        let mut total_pages: u64 = 0;
        for (index, space) in self.spaces.iter().enumerate() {
            if usize::from(space.id.0) != index {
                return wrong(format!("space {} stands at position {index}", space.id.0));
            }
            if space.pages == 0 || space.pages > MAX_SPACE_PAGES {
                return wrong(format!("space {index} has {} pages", space.pages));
            }
            if !space.guest_address.is_multiple_of(PAGE_SIZE as u64) {
                return wrong(format!("space {index} begins at {:#x}, inside a page", space.guest_address));
            }
            let Some(end) = space.guest_address.checked_add(space.pages * PAGE_SIZE as u64) else {
                return wrong(format!("space {index} ends behind the last address"));
            };
            total_pages += space.pages;
            ranges.push((space.guest_address, end, index));
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[1].0 < pair[0].1 {
                return wrong(format!("spaces {} and {} overlap", pair[0].2, pair[1].2));
            }
        }
        let found = total_pages.saturating_mul(PAGE_SIZE as u64);
        if found > max_bytes {
            return Err(ProtocolError::TooLarge {
                what: "the workload's memory in bytes",
                found,
                limit: max_bytes,
            });
        }
        Ok(())
    }

    /// Pages of all spaces together; the largest number there is for a layout that was not validated and has more.
    pub fn total_pages(&self) -> u64 {
        self.spaces.iter().fold(0, |sum, space| sum.saturating_add(space.pages))
    }

    /// Bytes of all spaces together; as [`Layout::total_pages`] for what is too much to count.
    pub fn total_bytes(&self) -> u64 {
        self.total_pages().saturating_mul(PAGE_SIZE as u64)
    }

    /// The space with this number.
    pub fn space(&self, id: SpaceId) -> Option<&Space> {
        self.spaces.get(usize::from(id.0))
    }

    /// Checks that a run from outside lies in the layout and is not empty.
    ///
    /// # Errors
    /// `OutsideLayout`.
    pub fn check(&self, run: &PageRun) -> Result<()> {
        let inside = self.space(run.space).is_some_and(|space| {
            run.count > 0 && run.first < space.pages && u64::from(run.count) <= space.pages - run.first
        });
        if inside {
            return Ok(());
        }
        Err(ProtocolError::OutsideLayout {
            space: run.space.0,
            first: run.first,
            count: u64::from(run.count),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space(id: u16, guest_address: u64, pages: u64) -> Space {
        Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address }
    }

    #[test]
    fn a_layout_from_outside_is_checked() {
        let good = Layout { spaces: vec![space(0, 0, 10), space(1, 1 << 32, 5)] };
        good.validate(15 * 4096).unwrap();
        assert!(matches!(good.validate(15 * 4096 - 1), Err(ProtocolError::TooLarge { .. })));
        for bad in [
            vec![],
            vec![space(1, 0, 1)],
            vec![space(0, 0, 0)],
            vec![space(0, 17, 1)],
            vec![space(0, 0, u64::MAX)],
            vec![space(0, u64::MAX - 4095, 2)],
            vec![space(0, 4096, 2), space(1, 0, 2)],
        ] {
            assert!(Layout { spaces: bad.clone() }.validate(u64::MAX).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_run_from_outside_is_checked() {
        let layout = Layout { spaces: vec![space(0, 0, 10)] };
        let run = |space, first, count| PageRun { space: SpaceId(space), first, count };
        layout.check(&run(0, 0, 10)).unwrap();
        layout.check(&run(0, 9, 1)).unwrap();
        for bad in [
            run(0, 0, 0),
            run(0, 10, 1),
            run(0, 9, 2),
            run(1, 0, 1),
            run(0, u64::MAX, 1),
            run(0, 1, u32::MAX),
        ] {
            assert!(layout.check(&bad).is_err(), "{bad:?}");
        }
    }
}

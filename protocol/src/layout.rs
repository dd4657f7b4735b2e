//! Which memory a workload has, and which disks go with it.

use crate::error::{ProtocolError, Result};
use crate::page::{PAGE_SIZE, PageRun, SpaceId};
use serde::{Deserialize, Serialize};

/// The most spaces a layout may have.
pub const MAX_SPACES: usize = 1024;

/// The most pages a space may have: 2^36, 256 TiB.
pub const MAX_SPACE_PAGES: u64 = 1 << 36;

/// The most bytes that the disks in a layout may have together, 1 TiB: their page sets, of 32 MiB then, must fit beside those of
/// memory into a message of the control socket.
pub const MAX_DISK_BYTES: u64 = 1 << 40;

/// One space of a workload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Space {
    /// Its number: the position in the layout.
    pub id: SpaceId,
    /// What the pages are.
    pub kind: SpaceKind,
    /// Its length in pages of [`PAGE_SIZE`] bytes.
    pub pages: u64,
    /// Guest-physical address of the first byte, a multiple of the page size; 0 for what has none.
    pub guest_address: u64,
}

/// What the pages of a space are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SpaceKind {
    /// A VM's memory. New at the destination, it reads as zeros.
    Memory,
    /// The image of a disk that goes with the VM. New at the destination, it reads as zeros; its last page may go beyond the
    /// disk's end, and is zeros there. Or what is in the [files](crate::container::tree) of a container that go with it. Its guest address is 0.
    Disk,
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
    /// `Layout` saying what is wrong, or `TooLarge` when it has more than `max_bytes` of memory in all, or more than
    /// [`MAX_DISK_BYTES`] of disks.
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
        let (mut memory_pages, mut disk_pages): (u64, u64) = (0, 0);
        for (index, space) in self.spaces.iter().enumerate() {
            if usize::from(space.id.0) != index {
                return wrong(format!("space {} stands at position {index}", space.id.0));
            }
            if space.pages == 0 || space.pages > MAX_SPACE_PAGES {
                return wrong(format!("space {index} has {} pages", space.pages));
            }
            if space.kind == SpaceKind::Disk {
                if space.guest_address != 0 {
                    return wrong(format!("space {index} is a disk, and has a guest address"));
                }
                disk_pages += space.pages;
                continue;
            }
            if !space.guest_address.is_multiple_of(PAGE_SIZE as u64) {
                return wrong(format!("space {index} begins at {:#x}, inside a page", space.guest_address));
            }
            let Some(end) = space.guest_address.checked_add(space.pages * PAGE_SIZE as u64) else {
                return wrong(format!("space {index} ends behind the last address"));
            };
            memory_pages += space.pages;
            ranges.push((space.guest_address, end, index));
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[1].0 < pair[0].1 {
                return wrong(format!("spaces {} and {} overlap", pair[0].2, pair[1].2));
            }
        }
        if ranges.is_empty() {
            return wrong("it has no memory".into());
        }
        for (what, pages, limit) in [
            ("the workload's memory in bytes", memory_pages, max_bytes),
            ("the workload's disks in bytes", disk_pages, MAX_DISK_BYTES),
        ] {
            let found = pages.saturating_mul(PAGE_SIZE as u64);
            if found > limit {
                return Err(ProtocolError::TooLarge { what, found, limit });
            }
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

    /// Bytes of memory, without the disks; as [`Layout::total_pages`] for what is too much to count.
    pub fn memory_bytes(&self) -> u64 {
        let pages = self.of_kind(SpaceKind::Memory).fold(0_u64, |sum, space| sum.saturating_add(space.pages));
        pages.saturating_mul(PAGE_SIZE as u64)
    }

    /// Bytes of the disks; as [`Layout::total_pages`] for what is too much to count.
    pub fn disk_bytes(&self) -> u64 {
        let pages = self.of_kind(SpaceKind::Disk).fold(0_u64, |sum, space| sum.saturating_add(space.pages));
        pages.saturating_mul(PAGE_SIZE as u64)
    }

    /// The spaces of a kind.
    pub fn of_kind(&self, kind: SpaceKind) -> impl Iterator<Item = &Space> {
        self.spaces.iter().filter(move |space| space.kind == kind)
    }

    /// Whether a disk goes with the workload.
    pub fn has_disks(&self) -> bool {
        self.of_kind(SpaceKind::Disk).next().is_some()
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
    fn disks_have_no_address_and_a_bound_of_their_own() {
        let disk = |id, pages| Space { kind: SpaceKind::Disk, ..space(id, 0, pages) };
        let good = Layout { spaces: vec![space(0, 0, 10), disk(1, 5), disk(2, (1 << 28) - 5)] };
        good.validate(10 * 4096).unwrap();
        assert_eq!((good.memory_bytes(), good.has_disks()), (10 * 4096, true));
        let large = Layout { spaces: vec![space(0, 0, 10), disk(1, 1), disk(2, 1 << 28)] };
        assert!(matches!(large.validate(u64::MAX), Err(ProtocolError::TooLarge { .. })));
        let addressed = Space { guest_address: 4096, ..disk(1, 1) };
        assert!(Layout { spaces: vec![space(0, 0, 1), addressed] }.validate(u64::MAX).is_err());
        assert!(Layout { spaces: vec![disk(0, 1)] }.validate(u64::MAX).is_err());
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

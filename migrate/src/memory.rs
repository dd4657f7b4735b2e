//! A workload's memory as this process sees it: memfds of the VMM, mapped shared.

use crate::destination::PageMemory;
use crate::error::{Error, Result};
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use rustix::fs::{SealFlags, SeekFrom};
use std::fs::File;
use std::os::fd::OwnedFd;
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};

/// The mapped spaces of a layout.
pub struct GuestMemory {
    spaces: Vec<Mapped>,
}

struct Mapped {
    file: File,
    region: MmapRegion,
}

impl GuestMemory {
    /// Maps one memfd for each space of a layout.
    ///
    /// A memfd that could shrink under the mapping would end this process with a bus error, so each must be sealed
    /// against that (`F_SEAL_SHRINK`, fcntl(2)) and be exactly as long as its space.
    ///
    /// # Errors
    /// `Workload` when the descriptors do not fit the layout, `Host` when they cannot be mapped.
    pub fn map(layout: &Layout, files: Vec<OwnedFd>) -> Result<Self> {
        if files.len() != layout.spaces.len() {
            return Err(Error::Workload(format!(
                "the VMM sent {} memory files for {} spaces",
                files.len(),
                layout.spaces.len()
            )));
        }
        let spaces = layout.spaces.iter().zip(files).map(|(space, file)| {
            let cannot = |why: &dyn std::fmt::Display| {
                Error::Host(format!("space {} cannot be mapped: {why}", space.id.0))
            };
            let bytes = space.pages * PAGE_SIZE as u64;
            let seals = rustix::fs::fcntl_get_seals(&file).map_err(|error| cannot(&error))?;
            if !seals.contains(SealFlags::SHRINK) {
                return Err(Error::Workload(format!(
                    "the memory file of space {} is not sealed against shrinking",
                    space.id.0
                )));
            }
            let found = rustix::fs::fstat(&file).map_err(|error| cannot(&error))?.st_size;
            if u64::try_from(found).ok() != Some(bytes) {
                return Err(Error::Workload(format!(
                    "the memory file of space {} has {found} bytes, its layout says {bytes}",
                    space.id.0
                )));
            }
            let file = File::from(file);
            let offset = FileOffset::new(file.try_clone().map_err(|error| cannot(&error))?, 0);
            let length = usize::try_from(bytes).map_err(|error| cannot(&error))?;
            let region = MmapRegion::from_file(offset, length).map_err(|error| cannot(&error))?;
            Ok(Mapped { file, region })
        });
        Ok(Self { spaces: spaces.collect::<Result<_>>()? })
    }

    /// No memory at all: every access is an error.
    pub fn none() -> Self {
        Self { spaces: Vec::new() }
    }

    fn space(&self, space: SpaceId) -> Result<&Mapped> {
        self.spaces
            .get(usize::from(space.0))
            .ok_or_else(|| Error::Workload(format!("there is no space {}", space.0)))
    }

    /// Copies `buffer.len()` bytes from a byte offset of a space, as they are now.
    ///
    /// # Errors
    /// `Workload` when they lie outside the space.
    pub fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let slice = self.slice(space, offset, buffer.len())?;
        slice.copy_to(buffer);
        Ok(())
    }

    /// Removes from `pages` what lies in the range and was never touched, by asking the memfd for its holes
    /// (lseek(2), `SEEK_DATA`): to read such a page would allocate it.
    ///
    /// # Errors
    /// `Host` when the file does not say.
    pub fn remove_holes(&self, space: SpaceId, first: u64, count: u64, pages: &mut PageSet) -> Result<()> {
        let mapped = self.space(space)?;
        let end = first.saturating_add(count).min(pages.pages());
        let mut at = first;
        while at < end {
            let data = mapped.next_data(at)?.unwrap_or(end).min(end);
            pages.remove(at, data - at);
            at = if data < end { mapped.next_hole(data)?.min(end).max(data + 1) } else { end };
        }
        Ok(())
    }

    fn slice(&self, space: SpaceId, offset: u64, length: usize) -> Result<vm_memory::VolatileSlice<'_>> {
        let outside =
            || Error::Workload(format!("{length} bytes at {offset:#x} lie outside space {}", space.0));
        let offset = usize::try_from(offset).map_err(|_| outside())?;
        self.space(space)?.region.get_slice(offset, length).map_err(|_| outside())
    }
}

impl Mapped {
    /// The first page at or behind `page` that is allocated, if there is one.
    fn next_data(&self, page: u64) -> Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(page * PAGE_SIZE as u64)) {
            Ok(offset) => Ok(Some(offset / PAGE_SIZE as u64)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => {
                Err(Error::Host(format!("the guest's memory file does not tell its data: {error}")))
            }
        }
    }

    /// The first page at or behind `page` that is not allocated: at most the number of pages.
    fn next_hole(&self, page: u64) -> Result<u64> {
        rustix::fs::seek(&self.file, SeekFrom::Hole(page * PAGE_SIZE as u64))
            .map(|offset| offset.div_ceil(PAGE_SIZE as u64))
            .map_err(|error| Error::Host(format!("the guest's memory file does not tell its holes: {error}")))
    }
}

impl PageMemory for GuestMemory {
    fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()> {
        let slice = self.slice(space, offset, bytes.len())?;
        slice.copy_from(bytes);
        Ok(())
    }

    fn zero(&self, run: PageRun) -> Result<()> {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        let mapped = self.space(run.space)?;
        let mut at = run.first;
        while at < run.end() {
            let Some(data) = mapped.next_data(at)?.filter(|data| *data < run.end()) else { break };
            let hole = mapped.next_hole(data)?.min(run.end()).max(data + 1);
            for page in data..hole {
                self.write(run.space, page * PAGE_SIZE as u64, &ZEROS)?;
            }
            at = hole;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::layout::{Space, SpaceKind};
    use rustix::fs::MemfdFlags;

    fn memfd(pages: u64, seals: SealFlags) -> OwnedFd {
        let file = rustix::fs::memfd_create("test", MemfdFlags::ALLOW_SEALING | MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, pages * PAGE_SIZE as u64).unwrap();
        rustix::fs::fcntl_add_seals(&file, seals).unwrap();
        file
    }

    fn layout(pages: u64) -> Layout {
        Layout { spaces: vec![Space { id: SpaceId(0), kind: SpaceKind::Memory, pages, guest_address: 0 }] }
    }

    #[test]
    fn memory_that_could_shrink_or_has_another_length_is_refused() {
        for (pages, seals) in [(8, SealFlags::GROW), (7, SealFlags::SHRINK), (9, SealFlags::SHRINK)] {
            assert!(GuestMemory::map(&layout(8), vec![memfd(pages, seals)]).is_err());
        }
        assert!(GuestMemory::map(&layout(8), vec![]).is_err());
    }

    #[test]
    fn zero_runs_and_hole_tests_allocate_nothing() {
        let pages = 4096;
        let memory = GuestMemory::map(&layout(pages), vec![memfd(pages, SealFlags::SHRINK)]).unwrap();
        let space = SpaceId(0);
        let allocated = || rustix::fs::fstat(&memory.spaces[0].file).unwrap().st_blocks;
        memory.zero(PageRun { space, first: 0, count: pages as u32 }).unwrap();
        let mut set = PageSet::full(pages);
        memory.remove_holes(space, 0, pages, &mut set).unwrap();
        assert!(set.is_empty());
        assert_eq!(allocated(), 0);

        memory.write(space, 700 * 4096 + 5, b"abc").unwrap();
        let mut set = PageSet::full(pages);
        memory.remove_holes(space, 0, pages, &mut set).unwrap();
        assert!(set.contains(700));
        // The kernel may have given a huge page: then more is there, but never everything.
        assert!(set.count() <= 512);

        let mut read = [0; 4];
        memory.read(space, 700 * 4096 + 4, &mut read).unwrap();
        assert_eq!(&read, b"\0abc");
        memory.zero(PageRun { space, first: 690, count: 20 }).unwrap();
        memory.read(space, 700 * 4096 + 4, &mut read).unwrap();
        assert_eq!(read, [0; 4]);
        assert!(memory.write(space, pages * 4096 - 1, b"ab").is_err());
        assert!(memory.read(SpaceId(1), 0, &mut read).is_err());
    }
}

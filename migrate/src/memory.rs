//! A workload's memory as this process sees it: memfds of the VMM, read and written like files.
//!
//! They could be mapped as well. Reading costs the same either way; writing fresh memory costs half (November 2026: 768 MiB
//! in 64 KiB pieces took 0.28 to 0.48 s by pwrite(2) and 0.69 to 0.93 s through a mapping, which takes a fault for every
//! page and clears it before it is overwritten). A file cannot end this process with a bus error either.
//!
//! The images of disks that go with a workload are spaces, too, and differ in two things: the last page may go beyond their end, and
//! what is written to them must outlive this host's power (`disk`).

mod disk;

use crate::destination::PageMemory;
use crate::error::{Error, Result};
use disk::Disk;
use protocol::layout::{Layout, SpaceKind};
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use rustix::fs::SeekFrom;
use std::fs::File;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;

/// Memory that several threads can read at once. Ranges were checked against the layout by the caller.
pub trait PageReader: Send + Sync {
    /// Copies `buffer.len()` bytes from a byte offset of a space: what was written there last. What was never touched
    /// reads as zeros and stays untouched.
    ///
    /// # Errors
    /// `Workload` or `Host`.
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()>;

    /// Whether no page of the run was ever touched, so that all of it reads as zeros. `false` is never wrong.
    ///
    /// # Errors
    /// `Workload` or `Host`.
    fn is_untouched(&self, run: PageRun) -> Result<bool>;
}

/// The memory of a layout, one memfd for each space.
pub struct GuestMemory {
    spaces: Vec<Space>,
}

struct Space {
    file: File,
    /// Of its pages.
    bytes: u64,
    /// Of the file: a disk may end in the middle of its last page.
    file_bytes: u64,
    disk: Option<Disk>,
    /// Pages that were found allocated. They stay so, or it does no harm to take them for allocated; and the kernel walks all
    /// of a piece to find its end (10 ms for 768 MiB), so that must not be asked twice.
    allocated: PageSet,
}

impl GuestMemory {
    /// Takes one memfd for each space of a layout, each exactly as long as its space, and the images of its disks. Those have
    /// names, in their order, for errors.
    ///
    /// # Errors
    /// `Workload` when the descriptors do not fit the layout, `Host` when they cannot be examined.
    pub fn open(layout: &Layout, files: Vec<OwnedFd>, disks: &[String]) -> Result<Self> {
        if files.len() != layout.spaces.len() {
            return Err(Error::Workload(format!(
                "the VMM sent {} memory files for {} spaces",
                files.len(),
                layout.spaces.len()
            )));
        }
        let mut names = disks.iter();
        let spaces = layout.spaces.iter().zip(files).map(|(space, file)| {
            let bytes = space.pages * PAGE_SIZE as u64;
            let allocated = PageSet::empty(space.pages);
            if space.kind == SpaceKind::Disk {
                let disk = Disk::named(names.next().map_or("of the VM", String::as_str));
                let file = File::from(file);
                let file_bytes = disk.length(&file, bytes)?;
                return Ok(Space { file, bytes, file_bytes, disk: Some(disk), allocated });
            }
            let found = rustix::fs::fstat(&file)
                .map_err(|error| {
                    Error::Host(format!("the memory file of space {} is unusable: {error}", space.id.0))
                })?
                .st_size;
            if u64::try_from(found).ok() != Some(bytes) {
                return Err(Error::Workload(format!(
                    "the memory file of space {} has {found} bytes, its layout says {bytes}",
                    space.id.0
                )));
            }
            Ok(Space { file: File::from(file), bytes, file_bytes: bytes, disk: None, allocated })
        });
        Ok(Self { spaces: spaces.collect::<Result<_>>()? })
    }

    /// The same memory once more, for somebody who only looks at it.
    ///
    /// # Errors
    /// `Host` when there are no descriptors left.
    pub fn duplicate(&self) -> Result<Self> {
        let spaces = self.spaces.iter().map(|space| {
            let file = space
                .file
                .try_clone()
                .map_err(|error| Error::Host(format!("a memory file cannot be duplicated: {error}")))?;
            let Space { bytes, file_bytes, .. } = *space;
            let disk = space.disk.as_ref().map(|disk| Disk::named(disk.name()));
            Ok(Space { file, bytes, file_bytes, disk, allocated: PageSet::empty(0) })
        });
        Ok(Self { spaces: spaces.collect::<Result<_>>()? })
    }

    /// No memory at all: every access is an error.
    pub fn none() -> Self {
        Self { spaces: Vec::new() }
    }

    /// Copies `buffer.len()` bytes from a byte offset of a space, as they are now. What was never touched reads as zeros and
    /// stays untouched.
    ///
    /// # Errors
    /// `Workload` when they lie outside the space, `Host` when the kernel does not give them.
    pub fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let space = self.range(space, offset, buffer.len())?;
        let (inside, behind) = buffer.split_at_mut(space.inside(offset, buffer.len()));
        behind.fill(0);
        space.file.read_exact_at(inside, offset).map_err(|error| space.refused("read", &error))
    }

    /// Removes from `pages` what lies in the range and was never touched, by asking the memfd for its holes
    /// (lseek(2), `SEEK_DATA`).
    ///
    /// # Errors
    /// `Host` when the file does not say.
    pub fn remove_holes(
        &mut self,
        space: SpaceId,
        first: u64,
        count: u64,
        pages: &mut PageSet,
    ) -> Result<()> {
        let space = self
            .spaces
            .get_mut(usize::from(space.0))
            .ok_or_else(|| Error::Workload(format!("there is no space {}", space.0)))?;
        let end = first.saturating_add(count).min(pages.pages());
        let mut at = first;
        while let Some(page) = pages.next_set(at).filter(|page| *page < end) {
            let known = space.allocated.next_clear(page);
            if known > page {
                at = known;
                continue;
            }
            let data = space.next_data(page)?;
            pages.remove(page, data.start.min(end) - page);
            space.allocated.insert(data.start, data.end - data.start);
            at = data.start;
        }
        Ok(())
    }

    fn space(&self, space: SpaceId) -> Result<&Space> {
        self.spaces
            .get(usize::from(space.0))
            .ok_or_else(|| Error::Workload(format!("there is no space {}", space.0)))
    }

    /// The space, if so many bytes from `offset` on lie in it: a write behind the end would make the file longer.
    fn range(&self, space: SpaceId, offset: u64, length: usize) -> Result<&Space> {
        let found = self.space(space)?;
        match offset.checked_add(length as u64) {
            Some(end) if end <= found.bytes => Ok(found),
            _ => Err(Error::Workload(format!("{length} bytes at {offset:#x} lie outside space {}", space.0))),
        }
    }
}

impl Space {
    /// How many of these bytes from `offset` on the file has.
    fn inside(&self, offset: u64, bytes: usize) -> usize {
        usize::try_from(self.file_bytes.saturating_sub(offset)).unwrap_or(usize::MAX).min(bytes)
    }

    fn refused(&self, what: &str, error: &std::io::Error) -> Error {
        match &self.disk {
            Some(disk) => Error::Host(format!("disk {}: it could not be {what}: {error}", disk.name())),
            None => Error::Host(format!("the guest's memory could not be {what}: {error}")),
        }
    }

    /// The first allocated pages at or behind `page`, in one piece; empty at the end of the space if there are none.
    fn next_data(&self, page: u64) -> Result<Range<u64>> {
        let pages = self.bytes / PAGE_SIZE as u64;
        let Some(start) = self.first_data(page)? else { return Ok(pages..pages) };
        let end =
            rustix::fs::seek(&self.file, SeekFrom::Hole(start * PAGE_SIZE as u64)).map_err(|error| {
                Error::Host(format!("the guest's memory file does not tell its holes: {error}"))
            })?;
        Ok(start..(end / PAGE_SIZE as u64).max(start + 1).min(pages))
    }

    /// The first allocated page at or behind `page`.
    fn first_data(&self, page: u64) -> Result<Option<u64>> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(page * PAGE_SIZE as u64)) {
            Ok(offset) => Ok(Some(offset / PAGE_SIZE as u64)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(error) => {
                Err(Error::Host(format!("the guest's memory file does not tell its data: {error}")))
            }
        }
    }
}

impl PageReader for GuestMemory {
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        Self::read(self, space, offset, buffer)
    }

    fn is_untouched(&self, run: PageRun) -> Result<bool> {
        let data = self.range(run.space, run.offset(), run.bytes())?.first_data(run.first)?;
        Ok(data.is_none_or(|page| page >= run.end()))
    }
}

impl PageMemory for GuestMemory {
    fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()> {
        let space = self.range(space, offset, bytes.len())?;
        let inside = &bytes[..space.inside(offset, bytes.len())];
        space.file.write_all_at(inside, offset).map_err(|error| space.refused("written", &error))?;
        match &space.disk {
            Some(disk) => disk.wrote(&space.file, inside.len() as u64),
            None => Ok(()),
        }
    }

    fn settle(&self) -> Result<()> {
        self.spaces.iter().try_for_each(|space| match &space.disk {
            Some(disk) => disk.settle(&space.file),
            None => Ok(()),
        })
    }

    fn zero(&self, run: PageRun) -> Result<()> {
        const ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
        let space = self.range(run.space, run.offset(), run.bytes())?;
        let mut at = run.first;
        if let (Some(disk), Some(_)) = (&space.disk, space.first_data(at)?.filter(|page| *page < run.end()))
            && disk.punch(&space.file, run.offset(), run.bytes() as u64)?
        {
            return Ok(());
        }
        while let Some(page) = space.first_data(at)?.filter(|page| *page < run.end()) {
            self.write(run.space, page * PAGE_SIZE as u64, &ZEROS)?;
            at = page + 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::layout::Space;
    use rustix::fs::MemfdFlags;

    fn memfd(pages: u64) -> OwnedFd {
        let file = rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, pages * PAGE_SIZE as u64).unwrap();
        file
    }

    fn layout(pages: u64) -> Layout {
        Layout { spaces: vec![Space { id: SpaceId(0), kind: SpaceKind::Memory, pages, guest_address: 0 }] }
    }

    #[test]
    fn memory_of_another_length_is_refused() {
        for pages in [7, 9] {
            assert!(GuestMemory::open(&layout(8), vec![memfd(pages)], &[]).is_err());
        }
        assert!(GuestMemory::open(&layout(8), vec![], &[]).is_err());
    }

    #[test]
    fn an_image_may_end_inside_its_last_page_and_keeps_its_holes() {
        let layout = Layout { spaces: vec![Space { kind: SpaceKind::Disk, ..layout(4).spaces[0].clone() }] };
        let open = |bytes: u64| {
            let file = tempfile::tempfile().unwrap();
            file.set_len(bytes).unwrap();
            GuestMemory::open(&layout, vec![file.into()], &["/srv/a".into()])
        };
        for bytes in [3 * 4096, 4 * 4096 + 1] {
            let error = open(bytes).err().unwrap().to_string();
            assert!(error.contains("/srv/a"), "{error}");
        }
        let memory = open(3 * 4096 + 512).unwrap();
        let (space, at) = (SpaceId(0), 3 * 4096);
        memory.write(space, at, &[7; 4096]).unwrap();
        let mut page = [1; 4096];
        memory.read(space, at, &mut page).unwrap();
        assert!(page[..512] == [7; 512] && page[512..] == [0; 3584]);
        memory.settle().unwrap();
        memory.write(space, 0, &[7; 4096]).unwrap();
        memory.zero(PageRun { space, first: 0, count: 4 }).unwrap();
        let file = &memory.spaces[0].file;
        assert_eq!(
            (file.metadata().unwrap().len(), rustix::fs::fstat(file).unwrap().st_blocks),
            (at + 512, 0)
        );
    }

    #[test]
    fn zero_runs_and_hole_tests_allocate_nothing() {
        let pages = 4096;
        let mut memory = GuestMemory::open(&layout(pages), vec![memfd(pages)], &[]).unwrap();
        let space = SpaceId(0);
        let allocated = |memory: &GuestMemory| rustix::fs::fstat(&memory.spaces[0].file).unwrap().st_blocks;
        memory.zero(PageRun { space, first: 0, count: pages as u32 }).unwrap();
        let mut set = PageSet::full(pages);
        memory.remove_holes(space, 0, pages, &mut set).unwrap();
        assert!(set.is_empty());
        let stripe = |first| PageRun { space, first, count: 512 };
        assert!(memory.is_untouched(stripe(0)).unwrap());
        memory.read(space, 0, &mut vec![1; pages as usize * PAGE_SIZE]).unwrap();
        assert_eq!(allocated(&memory), 0);

        memory.write(space, 700 * 4096 + 5, b"abc").unwrap();
        assert!(!memory.is_untouched(stripe(512)).unwrap() && memory.is_untouched(stripe(1024)).unwrap());
        assert!(memory.is_untouched(stripe(pages)).is_err());
        let mut set = PageSet::full(pages);
        memory.remove_holes(space, 0, pages, &mut set).unwrap();
        assert!(set.contains(700));
        // The kernel may have given a huge page: then more is there, but never everything.
        assert!(set.count() <= 512);
        // The same again, now that it is known.
        let mut again = PageSet::full(pages);
        memory.remove_holes(space, 650, 100, &mut again).unwrap();
        assert!(again.contains(649) && again.contains(700) && again.contains(750));
        assert_eq!(again.contains(699), set.contains(699));

        let mut read = [0; 4];
        memory.read(space, 700 * 4096 + 4, &mut read).unwrap();
        assert_eq!(&read, b"\0abc");
        memory.zero(PageRun { space, first: 690, count: 20 }).unwrap();
        memory.read(space, 700 * 4096 + 4, &mut read).unwrap();
        assert_eq!(read, [0; 4]);
        assert!(memory.write(space, pages * 4096 - 1, b"ab").is_err());
        assert!(memory.write(space, u64::MAX, b"ab").is_err());
        assert!(memory.zero(PageRun { space, first: pages - 1, count: 2 }).is_err());
        assert!(memory.read(SpaceId(1), 0, &mut read).is_err());
    }
}

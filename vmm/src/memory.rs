//! Guest memory: one space is one memfd is one KVM slot.
//!
//! RAM below the 32-bit hole is space 0; what is more than 3 GiB goes to space 1, from 4 GiB up. The
//! memfds are shared mappings, sealed against resizing, so that another process may map them too and
//! never meets a SIGBUS.

use std::{
    fs::File,
    os::fd::OwnedFd,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rustix::fs::{MemfdFlags, SealFlags};
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestRegionMmap, MmapRegion,
    bitmap::{Bitmap, NewBitmap, RefSlice, WithBitmapSlice},
};

use crate::{
    addresses::{HOLE_END, HOLE_START, PAGE_SIZE},
    error::{Error, Result},
    sys,
};

/// The least memory a VM can have: below this the boot structures leave no room for an image. Bytes.
pub const MIN_MEMORY_BYTES: u64 = 2 << 20;
/// The most memory a VM can have, in bytes: 2 TiB, whose page sets just fit a control message.
pub const MAX_MEMORY_BYTES: u64 = 2 << 40;

/// One contiguous piece of guest-physical RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SpaceInfo {
    /// Guest-physical address of its first byte.
    pub base: u64,
    /// Its length in pages of 4 KiB.
    pub pages: u64,
}

/// Where the RAM of a VM of this size lies.
///
/// # Errors
/// [`Error::Config`] when the size is not a whole number of pages or out of bounds.
pub fn spaces_for(memory_bytes: u64) -> Result<Vec<SpaceInfo>> {
    if !memory_bytes.is_multiple_of(PAGE_SIZE) {
        return Err(Error::Config(format!(
            "memory of {memory_bytes} bytes is not a multiple of {PAGE_SIZE}"
        )));
    }
    if !(MIN_MEMORY_BYTES..=MAX_MEMORY_BYTES).contains(&memory_bytes) {
        return Err(Error::Config(format!(
            "memory of {memory_bytes} bytes is outside {MIN_MEMORY_BYTES}..={MAX_MEMORY_BYTES}"
        )));
    }
    let low_bytes = memory_bytes.min(HOLE_START);
    let mut spaces = vec![SpaceInfo { base: 0, pages: low_bytes / PAGE_SIZE }];
    if memory_bytes > low_bytes {
        spaces.push(SpaceInfo { base: HOLE_END, pages: (memory_bytes - low_bytes) / PAGE_SIZE });
    }
    Ok(spaces)
}

/// Guest memory as it is mapped here.
pub(crate) type Map = GuestMemoryMmap<OwnWrites>;

/// One mapped space.
pub(crate) type Region = GuestRegionMmap<OwnWrites>;

/// One bit a page that the VMM itself wrote since the last harvest, of memory or of a disk: KVM's log does not have those.
///
/// The mapping carries it, so that every write through it is marked, by a device's ring as by a loader. The mark comes after
/// the bytes: a harvest in between misses neither, because it either sees the mark or leaves it for the next harvest, and the last
/// one comes after everything that writes has stopped.
#[derive(Debug, Default)]
pub(crate) struct OwnWrites(Vec<AtomicU64>);

impl NewBitmap for OwnWrites {
    fn with_len(bytes: usize) -> Self {
        let words = (bytes as u64).div_ceil(PAGE_SIZE * 64);
        Self((0..words).map(|_| AtomicU64::new(0)).collect())
    }
}

impl<'a> WithBitmapSlice<'a> for OwnWrites {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for OwnWrites {
    fn mark_dirty(&self, offset: usize, bytes: usize) {
        let Some(last) = bytes.checked_sub(1) else { return };
        let page_of = |byte: usize| byte as u64 / PAGE_SIZE;
        for page in page_of(offset)..=page_of(offset.saturating_add(last)) {
            let Some(word) = self.word(page) else { return };
            // Always, not only where the bit is not set: looking first would need a fence behind the bytes.
            word.fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        let page = offset as u64 / PAGE_SIZE;
        self.word(page).is_some_and(|word| word.load(Ordering::Acquire) & (1 << (page % 64)) != 0)
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

impl OwnWrites {
    fn word(&self, page: u64) -> Option<&AtomicU64> {
        self.0.get(usize::try_from(page / 64).ok()?)
    }

    /// Moves the marks into `bits`.
    pub(crate) fn drain(&self, bits: &mut [u64]) {
        for (word, own) in bits.iter_mut().zip(&self.0) {
            // Most words are zero; a load is far cheaper than an exchange.
            if own.load(Ordering::Acquire) != 0 {
                *word |= own.swap(0, Ordering::AcqRel);
            }
        }
    }
}

struct Space {
    info: SpaceInfo,
    file: Arc<File>,
}

/// All memory of one guest.
pub struct GuestMemory {
    map: Map,
    spaces: Vec<Space>,
}

impl std::fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestMemory").field("spaces", &self.layout()).finish_non_exhaustive()
    }
}

impl GuestMemory {
    /// Creates zeroed memory of `memory_bytes` bytes. Nothing is allocated by the host until touched.
    ///
    /// # Errors
    /// [`Error::Config`] for a size out of bounds, [`Error::Host`] when the host refuses.
    pub fn create(memory_bytes: u64) -> Result<Self> {
        let mut spaces = Vec::new();
        let mut regions = Vec::new();
        for (index, info) in spaces_for(memory_bytes)?.into_iter().enumerate() {
            let file = Arc::new(create_memfd(index, info.pages * PAGE_SIZE)?);
            let length = usize::try_from(info.pages * PAGE_SIZE)
                .map_err(|_| Error::Config(format!("{memory_bytes} bytes cannot be mapped")))?;
            let region = Region::from_range(
                GuestAddress(info.base),
                length,
                Some(FileOffset::from_arc(Arc::clone(&file), 0)),
            )
            .map_err(|error| Error::Host {
                action: "map guest memory",
                source: std::io::Error::other(error.to_string()),
            })?;
            if let Err(error) = sys::ask_huge_pages(&region) {
                tracing::debug!(%error, space = index, "no transparent huge pages for guest memory");
            }
            spaces.push(Space { info, file });
            regions.push(region);
        }
        let map = Map::from_regions(regions)
            .map_err(|error| Error::Config(format!("guest memory cannot be laid out: {error}")))?;
        Ok(Self { map, spaces })
    }

    /// The spaces in the order of their addresses; a space's index is also its KVM slot.
    pub fn layout(&self) -> Vec<SpaceInfo> {
        self.spaces.iter().map(|space| space.info).collect()
    }

    /// How much memory there is in all.
    pub fn total_bytes(&self) -> u64 {
        self.spaces.iter().map(|space| space.info.pages * PAGE_SIZE).sum()
    }

    /// A new descriptor of a space's memfd, to be sent to another process. `None`: no such space.
    ///
    /// # Errors
    /// [`Error::Host`] when the process is out of descriptors.
    pub fn share(&self, space: usize) -> Result<Option<OwnedFd>> {
        let Some(space) = self.spaces.get(space) else { return Ok(None) };
        let copy = space.file.try_clone().map_err(Error::host("duplicate a memory descriptor"))?;
        Ok(Some(copy.into()))
    }

    /// A space's memfd.
    ///
    /// # Errors
    /// [`Error::Config`] when there is no such space.
    pub(crate) fn file(&self, space: usize) -> Result<&File> {
        let found = self.spaces.get(space).map(|space| space.file.as_ref());
        found.ok_or_else(|| Error::Config(format!("there is no space {space}")))
    }

    /// Writes to guest memory on the VMM's behalf; the pages are dirty then.
    ///
    /// # Errors
    /// [`Error::Config`] when the range is not all RAM; part of it may have been written then.
    pub fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.map
            .write_slice(bytes, GuestAddress(address))
            .map_err(|error| Error::Config(format!("guest address {address:#x}: {error}")))
    }

    /// Reads guest memory; a live guest may be writing it meanwhile.
    ///
    /// # Errors
    /// [`Error::Config`] when the range is not all RAM.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        self.map
            .read_slice(bytes, GuestAddress(address))
            .map_err(|error| Error::Config(format!("guest address {address:#x}: {error}")))
    }

    /// Whether all of `start..start + length` is RAM.
    pub fn contains(&self, start: u64, length: u64) -> bool {
        let Ok(length) = usize::try_from(length) else { return false };
        start.checked_add(length as u64).is_some() && self.map.check_range(GuestAddress(start), length)
    }

    /// Moves the VMM's own writes of one space into `bits`, one bit a page.
    pub(crate) fn drain_own_writes(&self, space: usize, bits: &mut [u64]) {
        if let Some(region) = self.regions().nth(space) {
            let mapping: &MmapRegion<OwnWrites> = region;
            mapping.bitmap().drain(bits);
        }
    }

    /// The mapping. What is written through it is marked as this process's own write.
    pub(crate) fn map(&self) -> &Map {
        &self.map
    }

    /// The mapped regions, in the order of the spaces.
    pub(crate) fn regions(&self) -> impl Iterator<Item = &Region> {
        self.map.iter()
    }
}

fn create_memfd(index: usize, bytes: u64) -> Result<File> {
    let fd = rustix::fs::memfd_create(
        format!("guest-ram-{index}"),
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
    )
    .map_err(Error::os("create a memfd for guest memory"))?;
    rustix::fs::ftruncate(&fd, bytes).map_err(Error::os("size a memfd for guest memory"))?;
    rustix::fs::fcntl_add_seals(&fd, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)
        .map_err(Error::os("seal guest memory"))?;
    Ok(File::from(fd))
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn memory_up_to_three_gib_is_one_space() {
        assert_eq!(spaces_for(GIB).unwrap(), [SpaceInfo { base: 0, pages: GIB / 4096 }]);
        assert_eq!(spaces_for(3 * GIB).unwrap().len(), 1);
    }

    #[test]
    fn the_rest_starts_at_four_gib() {
        let spaces = spaces_for(3 * GIB + 4096).unwrap();
        assert_eq!(spaces[1], SpaceInfo { base: 4 * GIB, pages: 1 });
    }

    #[test]
    fn sizes_out_of_bounds_are_refused() {
        for bytes in
            [0, 4095, MIN_MEMORY_BYTES - 4096, MIN_MEMORY_BYTES + 1, MAX_MEMORY_BYTES + 4096, u64::MAX]
        {
            assert!(spaces_for(bytes).is_err(), "{bytes}");
        }
    }

    #[test]
    fn own_writes_mark_every_page_they_touch_once() {
        let memory = GuestMemory::create(4 << 20).unwrap();
        memory.write(3 * 4096 - 1, &[1, 2]).unwrap();
        memory.write(64 * 4096, &[3]).unwrap();
        let mut bits = vec![0; 16];
        memory.drain_own_writes(0, &mut bits);
        assert_eq!(&bits[..3], &[0b1100, 1, 0]);
        let mut again = vec![0; 16];
        memory.drain_own_writes(0, &mut again);
        assert!(again.iter().all(|word| *word == 0));
    }

    #[test]
    fn accesses_outside_ram_fail() {
        let memory = GuestMemory::create(2 << 20).unwrap();
        assert!(memory.write((2 << 20) - 1, &[0, 0]).is_err());
        assert!(memory.read(u64::MAX, &mut [0]).is_err());
        assert!(memory.contains(0, 2 << 20));
        assert!(!memory.contains(1, 2 << 20));
        assert!(!memory.contains(u64::MAX, 2));
    }

    #[test]
    fn the_memfd_cannot_be_resized() {
        let memory = GuestMemory::create(2 << 20).unwrap();
        let file = File::from(memory.share(0).unwrap().unwrap());
        assert!(file.set_len(4096).is_err());
        assert!(file.set_len(4 << 20).is_err());
        assert!(memory.share(1).unwrap().is_none());
    }
}

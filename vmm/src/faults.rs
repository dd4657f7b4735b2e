//! Memory that is not all here yet: a guest that was started before its last pages arrived.
//!
//! Every mapping of guest memory is registered with a userfaultfd(2), and the pages that are missing are holes in the
//! memfds. Whoever touches a hole through the mapping (a vCPU, KVM on its behalf, a device) waits until somebody puts a
//! page there. That is the engine, which gets a copy of the descriptor; this process only keeps the books.
//!
//! The hardest rule here is a small one: this process keeps its own copy of the descriptor until the last page is in
//! place. When the last copy of a userfaultfd is closed, the kernel lets all waiters go on, and a hole then reads as
//! zeros. So an engine that dies leaves vCPUs that wait, and the next engine wakes them.
//!
//! What is still missing needs no memory of its own: a page of the set that is no hole any more has arrived. Only the
//! descriptor fills holes of registered mappings, and no page is ever half there.

use std::os::fd::OwnedFd;

use protocol::page::{PAGE_SIZE, PageSet, SpaceId};
use rustix::fs::{FallocateFlags, SeekFrom};

use crate::{
    error::{Error, Result},
    memory::GuestMemory,
    sys,
};

/// Runs that are punched at once: as long as a set has them.
const WHOLE: u32 = u32::MAX;

/// What a guest waits for.
pub(crate) struct Awaited {
    descriptor: OwnedFd,
    /// What was missing when it was last looked at, one set for each space.
    missing: Vec<PageSet>,
}

impl Awaited {
    /// Makes holes of the pages in `missing`, and lets whoever touches a hole from now on wait.
    ///
    /// # Errors
    /// [`Error::Host`], or [`Error::NoPageFaults`] that says what to do.
    pub(crate) fn begin(memory: &GuestMemory, missing: Vec<PageSet>) -> Result<Self> {
        let descriptor = sys::userfaultfd()?;
        for region in memory.regions() {
            sys::register_missing(&descriptor, region).map_err(Error::host("watch guest memory"))?;
        }
        for (space, set) in (0_u16..).zip(&missing) {
            let file = memory.file(usize::from(space))?;
            // The first data at or behind what was looked at: memory that is new has none, and it takes long to tell the kernel of each run.
            let mut data = 0;
            for run in set.runs(SpaceId(space), WHOLE) {
                if data < run.offset() {
                    data =
                        next_data(file, run.offset()).map_err(Error::os("find the data of guest memory"))?;
                }
                if data >= run.end() * PAGE_SIZE as u64 {
                    continue;
                }
                let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                rustix::fs::fallocate(file, flags, run.offset(), run.bytes() as u64)
                    .map_err(Error::os("discard guest memory"))?;
            }
        }
        let mut awaited = Self { descriptor, missing };
        let announced = awaited.pages();
        // A page inside a huge one that the kernel could not split is cleared, and not given back.
        if awaited.look(memory)? != announced {
            return Err(Error::Host {
                action: "discard single pages of guest memory",
                source: std::io::Error::other(
                    "they lie in huge pages that cannot be split; set \
                     /sys/kernel/mm/transparent_hugepage/shmem_enabled to never, or move it without post-copy",
                ),
            });
        }
        Ok(awaited)
    }

    /// Another copy of the descriptor. Whoever waits is woken, to be reported anew: an engine that died may have taken
    /// the reports with it.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub(crate) fn share(&self, memory: &GuestMemory) -> Result<OwnedFd> {
        for region in memory.regions() {
            sys::wake(&self.descriptor, region).map_err(Error::host("wake those who wait for memory"))?;
        }
        self.descriptor.try_clone().map_err(Error::host("duplicate the page-fault descriptor"))
    }

    /// Finds out what arrived; how many pages are still missing.
    ///
    /// # Errors
    /// [`Error::Host`] when the memory files do not tell their holes.
    pub(crate) fn look(&mut self, memory: &GuestMemory) -> Result<u64> {
        for (space, set) in self.missing.iter_mut().enumerate() {
            remove_data(memory.file(space)?, set).map_err(Error::os("find the holes of guest memory"))?;
        }
        Ok(self.pages())
    }

    /// What was missing at the last look.
    pub(crate) fn missing(&self) -> &[PageSet] {
        &self.missing
    }

    fn pages(&self) -> u64 {
        self.missing.iter().map(PageSet::count).sum()
    }

    /// Nobody waits any more, and what is a hole reads as zeros. Only where nothing is missing, or the VM ends.
    ///
    /// # Errors
    /// [`Error::Host`]; then holes are watched still.
    pub(crate) fn end(&self, memory: &GuestMemory) -> Result<()> {
        for region in memory.regions() {
            sys::unregister(&self.descriptor, region).map_err(Error::host("stop watching guest memory"))?;
        }
        Ok(())
    }
}

/// Where the first data at or behind an offset begins.
fn next_data(file: &std::fs::File, offset: u64) -> rustix::io::Result<u64> {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Err(rustix::io::Errno::NXIO) => Ok(u64::MAX),
        found => found,
    }
}

/// Memory that [`try_out`] takes, in bytes: of any address, at least three huge pages of 2 MiB fit.
const TRIED_BYTES: u64 = 8 << 20;

/// Pages of one huge page.
const HUGE_PAGES: u64 = 512;

/// Takes single pages out of memory that is as a guest's, also huge.
///
/// # Errors
/// As [`Awaited::begin`].
pub(crate) fn try_out() -> Result<()> {
    let memory = GuestMemory::create(TRIED_BYTES)?;
    // Through the mapping, as guests write: only then the kernel takes the advice to give huge pages.
    let written = vec![1; PAGE_SIZE];
    let pages = TRIED_BYTES / PAGE_SIZE as u64;
    for page in 0..pages {
        memory.write(page * PAGE_SIZE as u64, &written)?;
    }
    let mut missing = PageSet::empty(pages);
    (0..pages).step_by(HUGE_PAGES as usize).for_each(|first| missing.insert(first + 5, 1));
    Awaited::begin(&memory, vec![missing])?.end(&memory)
}

/// Takes the pages that are no holes out of a set.
fn remove_data(file: &std::fs::File, set: &mut PageSet) -> rustix::io::Result<()> {
    let bytes = PAGE_SIZE as u64;
    let mut at = 0;
    while let Some(page) = set.next_set(at) {
        let data = next_data(file, page * bytes)? / bytes;
        at = data;
        if data == page {
            at = (rustix::fs::seek(file, SeekFrom::Hole(page * bytes))? / bytes).max(page + 1);
            set.remove(page, at - page);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{os::unix::fs::FileExt, sync::Arc, time::Duration};

    use super::*;

    const MEMORY: u64 = 4 << 20;

    fn memory() -> Arc<GuestMemory> {
        let memory = GuestMemory::create(MEMORY).unwrap();
        memory.file(0).unwrap().write_all_at(&vec![7; MEMORY as usize], 0).unwrap();
        Arc::new(memory)
    }

    fn missing(pages: &[(u64, u64)]) -> Vec<PageSet> {
        let mut set = PageSet::empty(MEMORY / PAGE_SIZE as u64);
        pages.iter().for_each(|(first, count)| set.insert(*first, *count));
        vec![set]
    }

    fn byte(memory: &GuestMemory, page: u64) -> u8 {
        let mut byte = [0];
        memory.read(page * PAGE_SIZE as u64, &mut byte).unwrap();
        byte[0]
    }

    #[test]
    fn only_pages_that_are_missing_become_holes() {
        for written in [&[][..], &[(0, 1024)], &[(5, 1), (99, 2), (399, 2)], &[(1023, 1)], &[(0, 1)]] {
            let memory = Arc::new(GuestMemory::create(MEMORY).unwrap());
            let file = memory.file(0).unwrap();
            for (first, count) in written {
                file.write_all_at(&vec![7; count * PAGE_SIZE], first * PAGE_SIZE as u64).unwrap();
            }
            let sets = missing(&[(3, 3), (50, 2), (100, 300), (1000, 24)]);
            let awaited = Awaited::begin(&memory, sets.clone()).unwrap();
            assert_eq!(awaited.missing(), sets, "{written:?}");
            for page in [2, 6, 99, 400, 999] {
                let was =
                    written.iter().any(|(first, count)| (*first..first + *count as u64).contains(&page));
                // Through the file: through the mapping, whoever reads a hole waits, missing or not.
                let mut byte = [0];
                memory.file(0).unwrap().read_exact_at(&mut byte, page * PAGE_SIZE as u64).unwrap();
                assert_eq!(byte[0], if was { 7 } else { 0 }, "page {page} of {written:?}");
            }
            awaited.end(&memory).unwrap();
        }
    }

    #[test]
    fn who_touches_a_missing_page_waits_and_what_arrives_is_found() {
        let memory = memory();
        let mut awaited = Awaited::begin(&memory, missing(&[(3, 2), (100, 300)])).unwrap();
        assert_eq!(awaited.look(&memory).unwrap(), 302);
        assert_eq!(byte(&memory, 5), 7, "a page that is not missing");
        let (done, finished) = std::sync::mpsc::channel();
        let reader = Arc::clone(&memory);
        let thread = std::thread::spawn(move || done.send(byte(&reader, 4)).unwrap());
        finished.recv_timeout(Duration::from_millis(100)).unwrap_err();
        // What comes into the file is there for the one who waits, once it is woken.
        let file = memory.file(0).unwrap();
        file.write_all_at(&[9; PAGE_SIZE], 4 * PAGE_SIZE as u64).unwrap();
        drop(awaited.share(&memory).unwrap());
        assert_eq!(finished.recv_timeout(Duration::from_secs(5)).unwrap(), 9);
        thread.join().unwrap();
        assert_eq!(awaited.look(&memory).unwrap(), 301);
        assert!(!awaited.missing()[0].contains(4) && awaited.missing()[0].contains(3));
    }

    #[test]
    fn it_can_be_tried_out_here() {
        try_out().unwrap();
    }

    #[test]
    fn a_copy_that_is_closed_wakes_nobody_and_the_end_wakes_all() {
        let memory = memory();
        let awaited = Awaited::begin(&memory, missing(&[(0, 1)])).unwrap();
        let (done, finished) = std::sync::mpsc::channel();
        let reader = Arc::clone(&memory);
        let thread = std::thread::spawn(move || done.send(byte(&reader, 0)).unwrap());
        drop(awaited.share(&memory).unwrap());
        finished.recv_timeout(Duration::from_millis(100)).unwrap_err();
        awaited.end(&memory).unwrap();
        assert_eq!(finished.recv_timeout(Duration::from_secs(5)).unwrap(), 0);
        thread.join().unwrap();
    }
}

//! A container's memory, as slots.

use super::files::Root;
use crate::container::{Digests, Slots};
use crate::error::{Error, Result};
use crate::memory::PageReader;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

pub(super) const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// It, for several threads.
#[derive(Default)]
pub(super) struct Memory {
    pub(super) slots: RwLock<Slots>,
    /// The memory of each process, by its number inside.
    pub(super) files: RwLock<Vec<(u32, File)>>,
    /// While it stands still: the pages that it has. None of them may be missing.
    pub(super) wanted: RwLock<Option<Vec<PageSet>>>,
    /// There was no room for a page.
    pub(super) is_full: AtomicBool,
    /// Pages that could not be read while it ran.
    pub(super) missed: Mutex<Vec<PageRun>>,
    /// What was delivered, where the kernel does not tell what is written since.
    pub(super) digests: Mutex<Option<Digests>>,
    /// Its root file system, where that is copied.
    pub(super) root: Option<Root>,
}

impl Memory {
    /// All that it has a place in.
    pub(super) fn layout(&self) -> Layout {
        let mut layout = read(&self.slots).layout();
        layout.spaces.extend(self.root.as_ref().map(Root::space));
        layout
    }

    /// While the container stands still: whether it has the page of this slot.
    fn is_wanted(&self, space: SpaceId, slot: u64) -> Option<bool> {
        let wanted = read(&self.wanted);
        wanted.as_ref().map(|wanted| wanted.get(usize::from(space.0)).is_none_or(|set| set.contains(slot)))
    }

    /// Copies what lies in a range of a space. A page that is not there any more while the container runs reads as zeros, and is read again.
    pub(super) fn copy(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let first = offset / PAGE_BYTES;
        let skipped = usize::try_from(offset % PAGE_BYTES).unwrap_or(0);
        if skipped != 0 || !buffer.len().is_multiple_of(PAGE_SIZE) {
            // Whoever reads less than pages is not in a hurry.
            let mut pages = vec![0; (skipped + buffer.len()).next_multiple_of(PAGE_SIZE)];
            self.copy(space, first * PAGE_BYTES, &mut pages)?;
            let length = buffer.len();
            buffer.copy_from_slice(&pages[skipped..skipped + length]);
            return Ok(());
        }
        if let Some(root) = self.root.as_ref().filter(|root| root.is_at(space)) {
            return root.copy(first, buffer);
        }
        let mut pieces = Vec::new();
        let count = (buffer.len() / PAGE_SIZE) as u64;
        read(&self.slots).at(space, first, count, &mut |slot, count, process, page| {
            pieces.push((slot, count, process, page));
        });
        if pieces.iter().map(|(_, count, _, _)| count).sum::<u64>() < count {
            buffer.fill(0);
        }
        let files = read(&self.files);
        for (slot, count, process, page) in pieces {
            let at = usize::try_from((slot - first) * PAGE_BYTES).unwrap_or(usize::MAX);
            let bytes = usize::try_from(count * PAGE_BYTES).unwrap_or(usize::MAX);
            let Some(into) = buffer.get_mut(at..at.saturating_add(bytes)) else { continue };
            let file = files.iter().find(|(inside, _)| *inside == process).map(|(_, file)| file);
            if file.is_some_and(|file| file.read_exact_at(into, page * PAGE_BYTES).is_ok()) {
                continue;
            }
            for (index, into) in (0..).zip(into.chunks_mut(PAGE_SIZE)) {
                let read =
                    file.is_some_and(|file| file.read_exact_at(into, (page + index) * PAGE_BYTES).is_ok());
                if read {
                    continue;
                }
                into.fill(0);
                match self.is_wanted(space, slot + index) {
                    None => lock(&self.missed).push(PageRun { space, first: slot + index, count: 1 }),
                    // It was taken in an earlier round, held back, and given up by the process.
                    Some(false) => {}
                    Some(true) => {
                        return Err(Error::Workload(format!(
                            "page {:#x} of process {process} cannot be read, though the container stands still",
                            (page + index) * PAGE_BYTES
                        )));
                    }
                }
            }
        }
        Ok(())
    }
}

impl PageReader for Arc<Memory> {
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.copy(space, offset, buffer)
    }

    fn is_untouched(&self, _: PageRun) -> Result<bool> {
        Ok(false)
    }
}

pub(super) fn read<T>(shared: &RwLock<T>) -> RwLockReadGuard<'_, T> {
    shared.read().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn write<T>(shared: &RwLock<T>) -> RwLockWriteGuard<'_, T> {
    shared.write().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

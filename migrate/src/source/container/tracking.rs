//! What a container has written: asked of the kernel, or found by comparing.

use super::memory::{PAGE_BYTES, lock, read, write};
use super::{ContainerSource, Frozen, files_of, unreadable};
use crate::container::keeper::Order;
use crate::container::{Digests, Place, Process, SoftDirty, Tracking, Which, is_gone};
use crate::error::{Error, Result};
use protocol::container::pagemap::LAZY;
use protocol::page::{PAGE_SIZE, PageSet};
use std::os::unix::fs::FileExt as _;
use std::sync::atomic::Ordering;

/// Pages that are compared at once: what is read stays in a core's cache until it is hashed.
const PIECE_PAGES: u64 = 16;

/// How it is known what a container writes, in reports.
const SCAN: &str = "pagemap-scan";
const SOFT_DIRTY: &str = "soft-dirty";
pub(super) const DIGESTS: &str = "blake3-digests";

/// First pages of a process, and how many follow each.
type Runs = Vec<(u64, u64)>;

impl ContainerSource {
    /// The best that this kernel has and the operator allows, by name.
    pub(super) fn track_by_kernel(&mut self) -> Result<&'static str> {
        let scan = |source: &mut Self| source.watch.tree.processes.iter_mut().try_for_each(Process::track);
        let soft = |source: &mut Self| {
            if source.watch.soft_dirty.is_none() {
                let folder = crate::container::folder(&source.runtime_dir);
                source.watch.soft_dirty = Some(SoftDirty::begin(&folder, source.watch.first)?);
                // Where the kernel uses huge pages, its bits are those of 2 MiB: what they tell is compared.
                *lock(&source.watch.memory.digests) = Some(Digests::default());
            }
            Ok(())
        };
        match self.wishes.tracking {
            Tracking::Digests => Err(Error::Usage("that was asked for".into())),
            Tracking::SoftDirty => soft(self).map(|()| SOFT_DIRTY),
            Tracking::Kernel => scan(self).map(|()| SCAN),
            Tracking::Auto if self.watch.soft_dirty.is_some() => Ok(SOFT_DIRTY),
            Tracking::Auto => scan(self).map(|()| SCAN).or_else(|error| {
                tracing::info!("soft-dirty bits are tried: {error}");
                soft(self).map(|()| SOFT_DIRTY)
            }),
        }
    }

    /// Puts what memory was written into `dirty`; where the container stands still, what of that it has still.
    pub(super) fn mark_written(&mut self, dirty: &mut [PageSet]) -> Result<()> {
        let is_told_once = self.watch.soft_dirty.is_some() && self.frozen.is_none();
        let found = if is_told_once { self.written_and_cleared() } else { self.written() }?;
        let compares = lock(&self.watch.memory.digests).is_some();
        for (inside, mut runs) in found {
            let process = self.watch.tree.processes.iter().find(|process| process.inside == inside);
            if let Some(process) = process.filter(|_| compares) {
                let mut differing = Vec::new();
                self.differing(process, runs, &mut |first, count| differing.push((first, count)));
                runs = differing;
            }
            for (first, count) in runs {
                self.mark(inside, first, count, dirty)?;
            }
        }
        if is_told_once {
            self.watch.owed.iter_mut().zip(&*dirty).for_each(|(owed, dirty)| owed.clone_from(dirty));
        }
        if let Some(frozen) = &self.frozen {
            self.mark_left(frozen, dirty)?;
        }
        Ok(())
    }

    /// Those of some pages of a process that are not as they were delivered, or were never.
    fn differing(&self, process: &Process, pages: Runs, tell: &mut dyn FnMut(u64, u64)) {
        let mut buffer = vec![0; PIECE_PAGES as usize * PAGE_SIZE];
        let slots = read(&self.watch.memory.slots);
        let digests = lock(&self.watch.memory.digests);
        for (first, count) in pages {
            let mut page = first;
            while page < first + count {
                let piece = (first + count - page).min(PIECE_PAGES);
                let bytes = &mut buffer[..piece as usize * PAGE_SIZE];
                if process.memory.read_exact_at(bytes, page * PAGE_BYTES).is_err() {
                    // A part of it is gone: what is left is read when it is sent.
                    tell(page, piece);
                    page += piece;
                    continue;
                }
                slots.find(process.inside, page, piece, &mut |at, count, place| match place {
                    Place::Nowhere => tell(at, count),
                    Place::At(space, slot) => {
                        let from = (at - page) as usize * PAGE_SIZE;
                        for (index, one) in (0..count).zip(bytes[from..].chunks(PAGE_SIZE)) {
                            if digests
                                .as_ref()
                                .is_none_or(|digests| digests.differs(space, slot + index, one))
                            {
                                tell(at + index, 1);
                            }
                        }
                    }
                });
                page += piece;
            }
        }
    }

    /// What every process has written, as far as it is known at once.
    fn written(&self) -> Result<Vec<(u32, Runs)>> {
        let compares = lock(&self.watch.memory.digests).is_some();
        let is_frozen = self.frozen.is_some();
        let mut found = Vec::new();
        for process in &self.watch.tree.processes {
            let mut runs = Vec::new();
            let mut tell = |first, count| runs.push((first, count));
            let looked = match (self.watch.soft_dirty.is_some(), compares) {
                (true, _) => process.soft_dirty(!is_frozen, &mut tell),
                (_, true) => process.pages(Which::All, &mut tell),
                _ => process.pages(Which::Written, &mut tell),
            };
            match looked {
                Ok(()) => found.push((process.inside, runs)),
                Err(error) if is_gone(&error) && !is_frozen => {}
                Err(error) => return Err(unreadable(process, &error)),
            }
        }
        Ok(found)
    }

    /// The same for soft-dirty bits, which are cleared: nobody may write between the two.
    fn written_and_cleared(&mut self) -> Result<Vec<(u32, Runs)>> {
        self.order(&Order::Pause)?;
        let found = self.look().and_then(|()| self.written());
        let found = self.order(&Order::Thaw).and(found);
        if found.is_err() {
            // Of some, what they wrote is known to nobody any more: whoever comes next begins anew.
            self.watch.memory.is_full.store(true, Ordering::Release);
        }
        found
    }

    /// Looks for new processes, and tracks them.
    pub(super) fn look(&mut self) -> Result<()> {
        if self.watch.tree.look()? {
            *write(&self.watch.memory.files) = files_of(&self.watch.tree)?;
            if lock(&self.watch.memory.digests).is_some() {
                return Ok(());
            }
            for process in &mut self.watch.tree.processes {
                if let Err(error) = process.track() {
                    tracing::warn!("everything of process {} counts as written: {error}", process.inside);
                }
            }
        }
        Ok(())
    }

    /// Puts pages into `dirty`, giving those a slot that have none.
    fn mark(&self, process: u32, first: u64, count: u64, dirty: &mut [PageSet]) -> Result<()> {
        let mut slots = write(&self.watch.memory.slots);
        let (mut nowhere, mut found) = (Vec::new(), Vec::new());
        slots.find(process, first, count, &mut |page, count, place| match place {
            Place::At(space, slot) => found.push((space, slot, count)),
            Place::Nowhere => nowhere.push((page, count)),
        });
        for (page, count) in nowhere {
            let (space, slot) = slots.add(process, page, count).ok_or_else(|| {
                self.watch.memory.is_full.store(true, Ordering::Release);
                Error::Workload(format!(
                    "{} has grown by more than half of its memory since its pages were first counted: try again, and it is counted anew",
                    self.workload.name
                ))
            })?;
            found.push((space, slot, count));
        }
        for (space, slot, count) in found {
            if let Some(dirty) = dirty.get_mut(usize::from(space.0)) {
                dirty.insert(slot, count);
            }
        }
        Ok(())
    }

    /// Where it stands still: of these pages only those that CRIU left in place are wanted, and what has no slot yet is dirty.
    fn mark_left(&self, frozen: &Frozen, dirty: &mut [PageSet]) -> Result<()> {
        let by_digests = lock(&self.watch.memory.digests).is_some();
        let mut wanted: Vec<PageSet> = dirty.iter().map(|set| PageSet::empty(set.pages())).collect();
        for (process, pagemap) in &frozen.left {
            let tracked = by_digests
                || self.watch.tree.processes.iter().any(|one| one.inside == *process && one.is_tracked());
            for entry in pagemap.entries.iter().filter(|entry| entry.flags & LAZY != 0) {
                let mut new = Vec::new();
                let everything = &mut |page, count, place| {
                    if place == Place::Nowhere || !tracked {
                        new.push((page, count));
                    }
                };
                read(&self.watch.memory.slots).find(*process, entry.first, entry.pages, everything);
                for (page, count) in new {
                    self.mark(*process, page, count, dirty)?;
                }
                self.mark(*process, entry.first, entry.pages, &mut wanted)?;
            }
        }
        dirty.iter_mut().zip(&wanted).for_each(|(dirty, wanted)| dirty.intersect(wanted));
        *write(&self.watch.memory.wanted) = Some(wanted);
        Ok(())
    }
}

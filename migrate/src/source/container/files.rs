//! The root file system of a container that is copied: which of its pages changed since they were delivered, and what they hold.
//!
//! ```text
//! walk ─▶ which files may have changed ─▶ which of their pages differ ─▶ slots that are dirty
//!          their stamps; held by a process        by digest
//! ```
//!
//! *What is not looked at is as it was delivered.* A file need not be looked at if its stamp is that of the last look, was old enough then to
//! tell of everything that came behind it, and no process held the file for writing then: a call that had begun already would tell nothing any more when it
//! goes on, and neither does a mapping that was written through already. The last look, while everything stands still, also takes what is held
//! at that moment. In memory (tmpfs) a mapping need not tell of its first write either, so all is compared there at the end.

use super::memory::lock;
use crate::container::files::{
    Folder, Held, Listing, Mounted, PAGE_BYTES, RootCopy, Stamp, data_pages, pack_placement, pack_tree,
    read_filled, stamp, walk,
};
use crate::container::{Digests, Place, Process, Slots};
use crate::error::{Error, Result};
use protocol::container::{self as format, Files, Overlay, SECTION_VERSION};
use protocol::layout::{Space, SpaceKind};
use protocol::page::{PAGE_SIZE, PageSet, SpaceId};
use protocol::state::State;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Room for what comes while it moves: half of what there is, and no less than this.
const ROOM_PAGES: u64 = (64 << 20) / PAGE_BYTES;

/// Pages that are compared at once.
const PIECE_PAGES: u64 = 16;

/// Files that are open at once.
const OPEN_FILES: usize = 16;

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` (include/uapi/linux/magic.h).
const IN_MEMORY: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// It.
pub(super) struct Root {
    space: SpaceId,
    pages: u64,
    top: Folder,
    overlay: Option<Overlay>,
    /// Its times do not tell of every first write through a mapping.
    is_in_memory: bool,
    /// While the container stands still: none of its files may be missing.
    is_still: AtomicBool,
    state: Mutex<Looked>,
}

/// What is known since the last look.
struct Looked {
    listing: Listing,
    slots: Slots,
    digests: Digests,
    /// The number of each file that there is.
    numbers: HashMap<(u64, u64), u32>,
    /// The last number that was given.
    next: u32,
    files: HashMap<u32, Known>,
    /// Numbers of files that are gone, behind the paths that they had: others can have them, and their slots; best the one that has their place.
    free: BTreeSet<(Vec<u8>, u32)>,
    open: VecDeque<(u32, Arc<File>)>,
}

/// A file.
struct Known {
    /// Its entry.
    at: usize,
    stamp: Stamp,
    /// Its pages are to be looked at the next time, whatever its stamp says.
    again: bool,
}

impl Root {
    /// Takes hold of the files at a container's root, for this space of its layout.
    ///
    /// # Errors
    /// `Host` when they cannot be read, `Workload` when they cannot be copied.
    pub(super) fn begin(path: &Path, space: SpaceId, copy: RootCopy, processes: &[Process]) -> Result<Self> {
        let mounted = match copy {
            RootCopy::Upper => Mounted::at(path)?,
            RootCopy::Whole => Mounted::at(path).ok().flatten(),
        };
        let written = mounted.as_ref().map_or(path, |mounted| &mounted.upper);
        let is_in_memory = rustix::fs::statfs(written).is_ok_and(|found| IN_MEMORY.contains(&found.f_type));
        let (top, overlay) = match copy {
            RootCopy::Upper => (Folder::open(written)?, mounted.map(|mounted| mounted.overlay)),
            RootCopy::Whole => (Folder::open(path)?, None),
        };
        let held = Held::by(processes);
        let mut looked = Looked {
            listing: walk(&top, None, overlay.is_some())?,
            slots: Slots::default(),
            digests: Digests::default(),
            numbers: HashMap::new(),
            next: 0,
            files: HashMap::new(),
            free: BTreeSet::new(),
            open: VecDeque::new(),
        };
        looked.number(&Listing::default());
        looked.expect_more(&held);
        let mut numbers: Vec<u32> = looked.files.keys().copied().collect();
        numbers.sort_unstable();
        let mut pages = Vec::new();
        for number in numbers {
            for (first, count) in looked.data(&top, number)?.unwrap_or_default() {
                pages.push((number, first, count));
            }
        }
        let count: u64 = pages.iter().map(|(_, _, count)| count).sum();
        let room = count + ROOM_PAGES.max(count / 2);
        looked.slots = Slots::alone(space, room);
        for (number, first, count) in pages {
            looked.slots.add(number, first, count);
        }
        let is_still = AtomicBool::new(false);
        Ok(Self { space, pages: room, top, overlay, is_in_memory, is_still, state: Mutex::new(looked) })
    }

    pub(super) fn space(&self) -> Space {
        // Of what must outlive this host's power there is one other kind.
        Space { id: self.space, kind: SpaceKind::Disk, pages: self.pages, guest_address: 0 }
    }

    pub(super) fn is_at(&self, space: SpaceId) -> bool {
        self.space == space
    }

    /// What the destination is told of it before everything else.
    pub(super) fn description(&self) -> Files {
        Files { space: self.space.0, overlay: self.overlay.clone() }
    }

    /// Adds what there is since the last look.
    pub(super) fn describe(&self, state: &mut State) -> Result<()> {
        let looked = lock(&self.state);
        state.push(format::FILES, SECTION_VERSION, pack_tree(&looked.listing.tree)?);
        state.push(format::FILES_PLACEMENT, SECTION_VERSION, pack_placement(&looked.slots.placement())?);
        Ok(())
    }

    /// All slots that pages have.
    pub(super) fn placed(&self, pages: &mut PageSet) {
        for run in lock(&self.state).slots.placement().runs {
            pages.insert(run.slot, run.pages.into());
        }
    }

    /// Looks what there is now, and puts into `dirty` what is not as it was delivered. `still` says that nothing writes any more.
    pub(super) fn look(&self, processes: &[Process], still: bool, dirty: &mut PageSet) -> Result<()> {
        self.is_still.store(still, Ordering::Release);
        let mut looked = lock(&self.state);
        // Before the files are: what is let go of meanwhile has told.
        let held = Held::by(processes);
        let listing = walk(&self.top, Some(&looked.listing), self.overlay.is_some())?;
        let before = std::mem::replace(&mut looked.listing, listing);
        // They may be other files by now, or, in an overlay, those of a layer below.
        looked.open.clear();
        let mut wanted = looked.number(&before);
        wanted.extend(looked.files.iter().filter(|(_, known)| known.again).map(|(number, _)| *number));
        let is_held = looked.expect_more(&held);
        if still {
            let all = looked.files.keys().filter(|number| self.is_in_memory || is_held.contains(number));
            wanted.extend(all.copied());
        }
        let mut wanted: Vec<u32> = wanted.into_iter().collect();
        wanted.sort_unstable();
        for number in wanted {
            if !looked.compare(&self.top, number, self.space, dirty)? {
                self.may_be_missing(&looked.path(number))?;
            }
        }
        Ok(())
    }

    /// Copies what lies in slots now. What there is no more reads as zeros, and is looked at again.
    pub(super) fn copy(&self, first: u64, buffer: &mut [u8]) -> Result<()> {
        buffer.fill(0);
        let mut pieces = Vec::new();
        let mut looked = lock(&self.state);
        let count = (buffer.len() / PAGE_SIZE) as u64;
        looked.slots.at(self.space, first, count, &mut |slot, count, number, page| {
            pieces.push((slot, count, number, page));
        });
        for (slot, count, number, page) in pieces {
            let at = usize::try_from((slot - first) * PAGE_BYTES).unwrap_or(usize::MAX);
            let bytes = usize::try_from(count * PAGE_BYTES).unwrap_or(usize::MAX);
            let Some(into) = buffer.get_mut(at..at.saturating_add(bytes)) else { continue };
            match looked.open(&self.top, number)? {
                Some(file) => read_filled(&file, page * PAGE_BYTES, into)
                    .map_err(|error| unreadable(&looked.path(number), &error))?,
                None if looked.files.contains_key(&number) => self.may_be_missing(&looked.path(number))?,
                None => {}
            }
        }
        Ok(())
    }

    fn may_be_missing(&self, path: &[u8]) -> Result<()> {
        if !self.is_still.load(Ordering::Acquire) {
            return Ok(());
        }
        Err(Error::Host(format!(
            "the container's file /{} is not where it was, though the container stands still: let nobody else change its files meanwhile",
            String::from_utf8_lossy(path)
        )))
    }

    /// These bytes were delivered.
    pub(super) fn delivered(&self, first: u64, bytes: &[u8]) {
        lock(&self.state).digests.delivered(self.space, first, bytes);
    }

    /// Removes from `pages` those that are zeros because nobody ever wrote there, and takes them for delivered as such.
    pub(super) fn present(&self, first: u64, count: u64, pages: &mut PageSet) -> Result<()> {
        let mut looked = lock(&self.state);
        let end = first.saturating_add(count).min(pages.pages());
        let mut pieces = Vec::new();
        looked.slots.at(self.space, first, end.saturating_sub(first), &mut |slot, count, number, page| {
            pieces.push((slot, count, number, page));
        });
        let mut filled = Vec::new();
        for (slot, count, number, page) in pieces {
            for (data, pages) in looked.data(&self.top, number)?.unwrap_or_default() {
                let (from, until) = (data.max(page), (data + pages).min(page + count));
                if from < until {
                    filled.push((slot + (from - page), until - from));
                }
            }
        }
        let mut next = first;
        for (slot, count) in filled.into_iter().chain([(end, 0)]) {
            // Those alone that would be sent: what is behind the end of a file is there still, as it was.
            while let Some(absent) = pages.next_set_before(next, slot) {
                next = pages.next_clear_before(absent, slot).unwrap_or(slot);
                pages.remove(absent, next - absent);
                looked.digests.delivered_zeros(self.space, absent, next - absent);
            }
            next = slot + count;
        }
        Ok(())
    }
}

impl Looked {
    /// Gives every file that is listed the number that it had, and new ones theirs. Answers those whose stamps are not as they were.
    fn number(&mut self, before: &Listing) -> HashSet<u32> {
        let Self { listing, numbers, next, files, free, .. } = self;
        let found: Vec<(usize, Stamp)> = listing.files().collect();
        let there: HashSet<(u64, u64)> = found.iter().map(|(_, stamp)| stamp.identity).collect();
        for (_, number) in numbers.extract_if(|identity, _| !there.contains(identity)) {
            let path = files.remove(&number).map(|known| before.tree.path(known.at));
            free.insert((path.unwrap_or_default(), number));
        }
        let mut changed = HashSet::new();
        for (at, stamp) in found {
            let number = *numbers.entry(stamp.identity).or_insert_with(|| {
                let path = listing.tree.path(at);
                let same = free.range((path.clone(), 0)..).next().filter(|(last, _)| *last == path);
                let Some(reused) = same.or(free.first()).cloned() else {
                    *next += 1;
                    return *next;
                };
                free.remove(&reused);
                reused.1
            });
            listing.set_number(at, number);
            let is_same = files.get(&number).is_some_and(|known| known.stamp == stamp);
            if !is_same {
                changed.insert(number);
            }
            let again = files.get(&number).is_some_and(|known| known.again);
            files.insert(number, Known { at, stamp, again });
        }
        changed
    }

    /// Notes which files must be looked at the next time, because they may be written to without a word. Answers those that are held.
    fn expect_more(&mut self, held: &Held) -> HashSet<u32> {
        let tree = &self.listing.tree;
        let mut found: HashSet<u32> = held.paths().filter_map(|path| tree.number(tree.find(path)?)).collect();
        for (number, known) in &mut self.files {
            if held.has_inode(known.stamp.identity.1) {
                found.insert(*number);
            }
            known.again = found.contains(number) || self.listing.is_unsure(&known.stamp);
        }
        found
    }

    fn path(&self, number: u32) -> Vec<u8> {
        self.files.get(&number).map(|known| self.listing.tree.path(known.at)).unwrap_or_default()
    }

    /// A file, if it is where it was; else it is looked at again.
    fn open(&mut self, top: &Folder, number: u32) -> Result<Option<Arc<File>>> {
        if let Some((_, file)) = self.open.iter().find(|(known, _)| *known == number) {
            return Ok(Some(Arc::clone(file)));
        }
        let path = self.path(number);
        let Some(known) = self.files.get_mut(&number) else { return Ok(None) };
        // What stands there by now may be a pipe, which must not be waited for, and reading is nothing that the container did.
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::NOATIME;
        let open = || -> rustix::io::Result<Option<File>> {
            let file = top.at(&path, flags, Mode::empty())?;
            let found = rustix::fs::fstat(&file)?;
            // A number that became free is soon another one's.
            let is_file = FileType::from_raw_mode(found.st_mode) == FileType::RegularFile;
            Ok((is_file && stamp(&found).identity == known.stamp.identity).then(|| file.into()))
        };
        match open() {
            Ok(Some(file)) => {
                let file = Arc::new(file);
                self.open.truncate(OPEN_FILES - 1);
                self.open.push_front((number, Arc::clone(&file)));
                Ok(Some(file))
            }
            Ok(None)
            | Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::NXIO | Errno::STALE) => {
                known.again = true;
                Ok(None)
            }
            Err(error) => Err(unreadable(&path, &error.into())),
        }
    }

    /// The pages of a file that have data; none if the file is not where it was.
    fn data(&mut self, top: &Folder, number: u32) -> Result<Option<Vec<(u64, u64)>>> {
        let Some(stamp) = self.files.get(&number).map(|known| known.stamp) else { return Ok(None) };
        match stamp.size.div_ceil(PAGE_BYTES) {
            0 => Ok(Some(Vec::new())),
            pages if !stamp.is_sparse => Ok(Some(vec![(0, pages)])),
            _ => {
                let Some(file) = self.open(top, number)? else { return Ok(None) };
                data_pages(&file, 0..stamp.size)
                    .map(Some)
                    .map_err(|error| unreadable(&self.path(number), &error))
            }
        }
    }

    /// Puts the pages of a file into `dirty` that are not as they were delivered, with slots for those that have none. Answers whether it was there.
    fn compare(&mut self, top: &Folder, number: u32, space: SpaceId, dirty: &mut PageSet) -> Result<bool> {
        let Some(data) = self.data(top, number)? else { return Ok(false) };
        let pages = self.files.get(&number).map_or(0, |known| known.stamp.size.div_ceil(PAGE_BYTES));
        let mut next = 0;
        for (first, count) in data.into_iter().chain([(pages, 0)]) {
            // What became a hole.
            let (slots, digests) = (&self.slots, &self.digests);
            slots.find(number, next, first.saturating_sub(next), &mut |_, count, place| {
                let Place::At(_, slot) = place else { return };
                (slot..slot + count)
                    .filter(|slot| digests.is_other_than_there(space, *slot, None))
                    .for_each(|slot| dirty.insert(slot, 1));
            });
            next = first + count;
            if count > 0 && !self.compare_pages(top, number, space, (first, count), dirty)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn compare_pages(
        &mut self,
        top: &Folder,
        number: u32,
        space: SpaceId,
        (first, count): (u64, u64),
        dirty: &mut PageSet,
    ) -> Result<bool> {
        let mut new = Vec::new();
        let mut known = Vec::new();
        self.slots.find(number, first, count, &mut |page, count, place| match place {
            Place::Nowhere => new.push((page, count)),
            Place::At(_, slot) => known.push((page, count, slot)),
        });
        for (page, count) in new {
            let Some((_, slot)) = self.slots.add(number, page, count) else {
                return Err(Error::Workload(
                    "the container's files have grown by more than half since they were first counted, or by 64 MiB if that is more: try again, and they are counted anew"
                        .into(),
                ));
            };
            dirty.insert(slot, count);
        }
        let mut buffer = vec![0; PIECE_PAGES as usize * PAGE_SIZE];
        for (page, count, slot) in known {
            let Some(file) = self.open(top, number)? else { return Ok(false) };
            let mut at = 0;
            while at < count {
                let piece = (count - at).min(PIECE_PAGES);
                let bytes = &mut buffer[..piece as usize * PAGE_SIZE];
                bytes.fill(0);
                read_filled(&file, (page + at) * PAGE_BYTES, bytes)
                    .map_err(|error| unreadable(&self.path(number), &error))?;
                for (slot, bytes) in (slot + at..).zip(bytes.chunks(PAGE_SIZE)) {
                    if self.digests.is_other_than_there(space, slot, Some(bytes)) {
                        dirty.insert(slot, 1);
                    }
                }
                at += piece;
            }
        }
        Ok(true)
    }
}

fn unreadable(path: &[u8], error: &std::io::Error) -> Error {
    Error::Host(format!("the container's file /{} cannot be read: {error}", String::from_utf8_lossy(path)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::files::scribbler::{changes, scribble};
    use proptest::prelude::*;
    use std::time::Duration;

    const SPACE: SpaceId = SpaceId(3);

    /// What a destination has of the slots.
    struct There {
        root: Root,
        pages: HashMap<u64, Vec<u8>>,
    }

    impl There {
        fn new(folder: &Path) -> Self {
            let root = Root::begin(folder, SPACE, RootCopy::Upper, &[]).unwrap();
            let mut there = Self { root, pages: HashMap::new() };
            let all = PageSet::full(there.root.space().pages);
            there.deliver(&all, true);
            there
        }

        /// As rounds do. Answers how many pages that were.
        fn deliver(&mut self, dirty: &PageSet, without_holes: bool) -> u64 {
            let mut pages = dirty.clone();
            if without_holes {
                self.root.present(0, pages.pages(), &mut pages).unwrap();
            }
            let mut absent = dirty.clone();
            absent.subtract(&pages);
            let mut at = 0;
            while let Some(slot) = absent.next_set(at) {
                self.pages.remove(&slot);
                at = slot + 1;
            }
            at = 0;
            while let Some(slot) = pages.next_set(at) {
                let mut page = vec![0; PAGE_SIZE];
                self.root.copy(slot, &mut page).unwrap();
                self.root.delivered(slot, &page);
                self.pages.insert(slot, page);
                at = slot + 1;
            }
            pages.count()
        }

        fn look(&self, still: bool) -> PageSet {
            let mut dirty = PageSet::empty(self.root.space().pages);
            self.root.look(&[], still, &mut dirty).unwrap();
            dirty
        }

        /// That every file is what the slots say.
        fn assert_same(&self, folder: &Path) {
            let looked = lock(&self.root.state);
            for (number, known) in &looked.files {
                let path = String::from_utf8(looked.listing.tree.path(known.at)).unwrap();
                let file = File::open(folder.join(&path)).unwrap();
                let size = file.metadata().unwrap().len();
                let (mut found, mut expected) = (vec![0; PAGE_SIZE], vec![0; PAGE_SIZE]);
                let data = data_pages(&file, 0..size).unwrap();
                let pages = size.div_ceil(PAGE_BYTES);
                let mut wanted: BTreeSet<u64> =
                    data.iter().flat_map(|(first, count)| *first..first + count).collect();
                looked.slots.find(*number, 0, pages, &mut |page, count, place| {
                    wanted.extend((page..page + count).filter(|_| place != Place::Nowhere));
                });
                for page in wanted {
                    read_filled(&file, page * PAGE_BYTES, &mut expected).unwrap();
                    let mut place = Place::Nowhere;
                    looked.slots.find(*number, page, 1, &mut |_, _, found| place = found);
                    let slot = match place {
                        Place::At(_, slot) => self.pages.get(&slot),
                        Place::Nowhere => None,
                    };
                    found.fill(0);
                    found.copy_from_slice(slot.unwrap_or(&vec![0; PAGE_SIZE]));
                    // Behind the end there is nothing to compare.
                    let inside = (size - page * PAGE_BYTES).min(PAGE_BYTES) as usize;
                    assert!(found[..inside] == expected[..inside], "page {page} of {path}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn whatever_changes_the_slots_have_it(
            first in changes(),
            rounds in prop::collection::vec((changes(), any::<bool>()), 0..4),
            is_in_memory in any::<bool>(),
        ) {
            let folder = tempfile::tempdir_in(if is_in_memory { "/dev/shm" } else { "." }).unwrap();
            scribble(folder.path(), &first);
            let mut there = There::new(folder.path());
            for (changes, without_holes) in rounds {
                scribble(folder.path(), &changes);
                let dirty = there.look(false);
                there.deliver(&dirty, without_holes);
            }
            let dirty = there.look(true);
            there.deliver(&dirty, true);
            there.assert_same(folder.path());
            assert!(!is_in_memory || there.root.is_in_memory);
            let mut state = State::default();
            there.root.describe(&mut state).unwrap();
            assert_eq!(there.deliver(&there.look(true), true), 0, "nothing has changed since");
        }
    }

    #[test]
    fn only_changed_pages_of_changed_files_are_dirty() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a", "b"] {
            std::fs::write(path(name), vec![7; 1 << 20]).unwrap();
        }
        let mut there = There::new(folder.path());
        let file = File::options().write(true).open(path("a")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 5 * PAGE_BYTES + 9).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 1 << 20).unwrap();
        let dirty = there.look(false);
        assert_eq!(there.deliver(&dirty, false), 2);
        // A new name is nothing new.
        std::fs::rename(path("a"), path("c")).unwrap();
        assert_eq!(there.look(false).count(), 0);
        // Neither is what takes the place of another file, as far as it is the same.
        std::fs::write(path("new"), vec![7; 1 << 20]).unwrap();
        std::fs::rename(path("new"), path("b")).unwrap();
        assert_eq!(there.look(false).count(), 0);
        there.assert_same(folder.path());
    }

    #[test]
    fn what_was_behind_an_end_is_zeros_when_the_file_is_longer_again() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let file = File::create(folder.path().join("a")).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[7; 3 * PAGE_SIZE], 0).unwrap();
        let mut there = There::new(folder.path());
        for size in [PAGE_BYTES, 3 * PAGE_BYTES] {
            file.set_len(size).unwrap();
            std::os::unix::fs::FileExt::write_all_at(&file, b"x", 0).unwrap();
            let dirty = there.look(false);
            there.deliver(&dirty, true);
        }
        there.assert_same(folder.path());
    }

    #[test]
    fn a_file_that_was_let_alone_for_long_is_not_read_again() {
        let folder = tempfile::tempdir_in(".").unwrap();
        std::fs::write(folder.path().join("a"), "x").unwrap();
        std::thread::sleep(Duration::from_millis(200));
        let there = There::new(folder.path());
        let again = |there: &There| lock(&there.root.state).files.values().any(|known| known.again);
        assert!(!again(&there));
        std::fs::write(folder.path().join("a"), "y").unwrap();
        assert_eq!(there.look(false).count(), 1);
        assert!(again(&there), "it may be written again without a word");
    }

    #[test]
    fn files_that_grow_by_too_much_end_it() {
        let folder = tempfile::tempdir_in(".").unwrap();
        let file = File::create(folder.path().join("a")).unwrap();
        let there = There::new(folder.path());
        let piece = vec![1; 1 << 20];
        (0..65).for_each(|at| std::os::unix::fs::FileExt::write_all_at(&file, &piece, at << 20).unwrap());
        let mut dirty = PageSet::empty(there.root.space().pages);
        let error = there.root.look(&[], false, &mut dirty).unwrap_err().to_string();
        assert!(error.contains("grown"), "{error}");
    }
}

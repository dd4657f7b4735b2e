//! The root file system of a container that arrives.
//!
//! Its first tree is made when it is offered, and pages are written to where they belong at once: the first tree says which slots are those of its
//! files. What comes for other slots is kept apart, in the order of the slots. The last tree says what there is in the end, and everything becomes so:
//!
//! ```text
//! out     what is not where it was is taken away, or aside if it is still wanted
//! in      what is missing is made, brought back, or linked
//! pages   that came later are put into their files, and all files are as long as they should be
//! rest    owners, attributes, modes, times; directories last, the deepest first
//! ```
//!
//! The peer says names and places; nothing that it says leads out of the directory ([`Folder`]), and everything is made where nothing is.

mod maker;

use super::bundle::{Bundle, Part};
use crate::container::files::{Folder, Mounted, PAGE_BYTES, data_pages, read_filled};
use crate::destination::PageMemory;
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, PageReader};
use maker::{Before, Maker, failed};
use protocol::container::tree::{Kind, Tree};
use protocol::container::{Files, Overlay, Placement, Run};
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use protocol::payload::is_zero;
use rustix::fs::{AtFlags, FallocateFlags, Mode, OFlags, fallocate, ftruncate, renameat, syncfs, unlinkat};
use rustix::io::Errno;
use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Files that are open at once.
const OPEN_FILES: usize = 64;

/// The most that may be written and not be safe, as of a disk: 32 MiB.
const MOST_UNSAFE_BYTES: u64 = 32 << 20;

/// The bytes that are copied at once.
const PIECE_BYTES: usize = 1 << 20;

/// A root file system on its way.
pub(super) struct Incoming {
    space: SpaceId,
    /// The directory that the tree is made in.
    top: Folder,
    /// Where files wait that change their names.
    moved: Folder,
    /// What came for slots that the first tree does not know.
    later: File,
    /// The first tree, and whose the slots are by it, in their order.
    first: Tree,
    runs: Vec<Run>,
    /// The entry of each of its files, by number.
    files: HashMap<u32, usize>,
    open: Mutex<VecDeque<(u32, Arc<File>)>>,
    /// Files with something behind the end that the first tree says.
    longer: Mutex<HashSet<u32>>,
    unsafe_bytes: AtomicU64,
    overlay: Option<Layers>,
}

/// The overlay that it becomes the upper layer of.
struct Layers {
    overlay: Overlay,
    lower: Vec<PathBuf>,
    upper: PathBuf,
    work: PathBuf,
    at: PathBuf,
}

/// Where bytes of a space are.
enum Home {
    /// In a file of the first tree, from an offset on.
    File(u32, u64),
    /// Among what came later, from an offset on.
    Later(u64),
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The layers below, if the root that is offered is an upper one: those that are named here, or those at the paths that they have there.
///
/// # Errors
/// `Host` naming one that is missing.
pub(super) fn lower_layers(files: &Files, named: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let Some(overlay) = &files.overlay else { return Ok(Vec::new()) };
    let (lower, advice) = match named {
        [] => (
            overlay.lower.iter().map(PathBuf::from).collect(),
            "put it there, or say with --lower where they are",
        ),
        named => (named.to_vec(), "see what --lower says"),
    };
    if lower.len() != overlay.lower.len() {
        return Err(Error::Host(format!(
            "its overlay has {} lower layers, and --lower names {}: name each of them, the top first",
            overlay.lower.len(),
            lower.len()
        )));
    }
    match lower.iter().find(|path| !path.is_dir()) {
        Some(missing) => Err(Error::Host(format!(
            "a lower layer of its overlay is not here: there is no directory {}; {advice}, or send all files with --copy-rootfs=whole",
            missing.display()
        ))),
        None => Ok(lower),
    }
}

impl Incoming {
    /// Makes room in a bundle: the tree as it was when it was offered, without what is in its files.
    ///
    /// # Errors
    /// `Host` when there is too little room, or this host cannot have such files.
    pub(super) fn make(
        bundle: &Bundle,
        files: &Files,
        lower: Vec<PathBuf>,
        first: Tree,
        placement: &Placement,
        pages: u64,
    ) -> Result<Self> {
        let cannot = |error: std::io::Error| {
            Error::Host(format!("its files cannot be made in {}: {error}", bundle.path.display()))
        };
        let known: HashMap<u32, usize> = (0..first.entries.len())
            .filter(|at| matches!(first.entries[*at].kind, Kind::File { .. }))
            .filter_map(|at| Some((first.number(at)?, at)))
            .collect();
        let runs: Vec<Run> =
            placement.runs.iter().filter(|run| known.contains_key(&run.process)).copied().collect();
        check_room(bundle, &first, &runs)?;
        let root = bundle.folder(Part::Root).map_err(cannot)?;
        let overlay = match &files.overlay {
            Some(overlay) => {
                try_overlay(bundle, overlay, &lower)?;
                let (upper, work) =
                    (bundle.folder(Part::Upper).map_err(cannot)?, bundle.folder(Part::Work).map_err(cannot)?);
                Some(Layers { overlay: overlay.clone(), lower, upper, work, at: root.clone() })
            }
            None => None,
        };
        let top = Folder::open(overlay.as_ref().map_or(&root, |layers| &layers.upper))?;
        let later = bundle.folder(Part::Later).map_err(cannot)?.join("pages");
        let later = File::options().read(true).write(true).create_new(true).open(later).map_err(cannot)?;
        later.set_len(pages * PAGE_BYTES).map_err(cannot)?;
        let moved = Folder::open(&bundle.folder(Part::Moved).map_err(cannot)?)?;
        let incoming = Self {
            space: SpaceId(files.space),
            top,
            moved,
            later,
            first,
            runs,
            files: known,
            open: Mutex::default(),
            longer: Mutex::default(),
            unsafe_bytes: AtomicU64::new(0),
            overlay,
        };
        let tree = &incoming.first;
        let mut maker = Maker::new(&incoming.top, tree);
        for at in 1..tree.entries.len() {
            maker.make(at)?;
        }
        for at in (0..tree.entries.len()).rev() {
            maker.dress(at, Before::Nothing)?;
        }
        Ok(incoming)
    }

    pub(super) fn space(&self) -> SpaceId {
        self.space
    }

    fn is_at(&self, space: SpaceId) -> bool {
        self.space == space
    }

    /// Makes everything as the last tree says, and safe. An overlay is mounted.
    ///
    /// # Errors
    /// `Workload` when it cannot be what is said, `Host` when this host cannot.
    pub(super) fn finish(&self, last: &Tree, placement: &Placement) -> Result<()> {
        lock(&self.open).clear();
        let kept = self.take_away(last)?;
        let mut maker = Maker::new(&self.top, last);
        maker.have = kept;
        self.bring(&mut maker)?;
        self.fill(&mut maker, placement)?;
        for at in (0..last.entries.len()).rev() {
            let before = match last.number(at) {
                Some(number) => self.files.get(&number),
                None => maker.have.get(&at),
            };
            let before = before.and_then(|before| self.first.entries.get(*before));
            maker.dress(at, before.map_or(Before::Inherited, Before::Was))?;
        }
        syncfs(&self.top)
            .map_err(|error| Error::Host(format!("the container's files could not be made safe: {error}")))?;
        if let Some(Layers { overlay, lower, upper, work, at }) = &self.overlay {
            Mounted::mount(overlay, lower, upper, work, at)?;
        }
        Ok(())
    }

    /// Takes away what is not where it was, and puts files aside that are wanted elsewhere. Answers what of the last tree is in its place, and which entry
    /// of the first tree it was there.
    fn take_away(&self, last: &Tree) -> Result<HashMap<usize, usize>> {
        let first = &self.first;
        let wanted: HashSet<u32> = (0..last.entries.len()).filter_map(|at| last.number(at)).collect();
        // Where an entry of the first tree is in the last one.
        let mut places: Vec<Option<usize>> = vec![None; first.entries.len()];
        let mut kept = HashMap::new();
        let mut has_place = HashSet::new();
        for (at, entry) in first.entries.iter().enumerate() {
            let place = match at {
                0 => Some(0),
                _ => places[entry.parent as usize]
                    .and_then(|parent| last.child(u32::try_from(parent).ok()?, &entry.name)),
            };
            let is_same = |place: &usize| match (first.number(at), last.number(*place)) {
                (None, None) => last.entries.get(*place).is_some_and(|now| now.kind == entry.kind),
                (before, now) => before == now,
            };
            if let Some(place) = place.filter(is_same) {
                places[at] = Some(place);
                kept.insert(place, at);
                has_place.extend(first.number(at));
            }
        }
        for at in (0..first.entries.len()).rev().filter(|at| places[*at].is_none()) {
            let entry = &first.entries[at];
            let error = |error| failed("taken away", &first.path(at), error);
            let folder = self.top.folder(&first.path(entry.parent as usize)).map_err(error)?;
            let flags = match entry.kind {
                Kind::Directory => AtFlags::REMOVEDIR,
                _ => AtFlags::empty(),
            };
            match first.number(at).filter(|number| wanted.contains(number) && has_place.insert(*number)) {
                Some(number) => renameat(&folder, &entry.name, &self.moved, number.to_string()),
                None => unlinkat(&folder, &entry.name, flags),
            }
            .map_err(error)?;
        }
        Ok(kept)
    }

    /// Makes what is missing.
    fn bring(&self, maker: &mut Maker<'_>) -> Result<()> {
        let tree = maker.tree;
        // A name under which each file is there already.
        let mut names: HashMap<u32, usize> = HashMap::new();
        for at in maker.have.keys() {
            names.extend(tree.number(*at).map(|number| (number, *at)));
        }
        for at in 1..tree.entries.len() {
            if maker.have.contains_key(&at) {
                continue;
            }
            let Some(number) = tree.number(at) else {
                maker.make(at)?;
                continue;
            };
            match names.get(&number) {
                Some(name) => maker.link(*name, at)?,
                None if maker.bring(&self.moved, number, at)? => {}
                None => maker.make(at)?,
            }
            names.insert(number, at);
        }
        Ok(())
    }

    /// Puts what came later into its files, and makes all files as long as they should be.
    fn fill(&self, maker: &mut Maker<'_>, placement: &Placement) -> Result<()> {
        let tree = maker.tree;
        let mut later: HashMap<u32, Vec<Run>> = HashMap::new();
        for run in &placement.runs {
            self.later_parts(run).for_each(|part| later.entry(part.process).or_default().push(part));
        }
        let longer = lock(&self.longer);
        for (at, entry) in tree.entries.iter().enumerate() {
            let Kind::File { number, size } = entry.kind else { continue };
            let before =
                self.files.get(&number).and_then(|at| self.first.entries.get(*at)).map(|entry| &entry.kind);
            let is_as_long = matches!(before, Some(Kind::File { size: before, .. }) if *before == size);
            let runs = later.remove(&number).unwrap_or_default();
            if is_as_long && runs.is_empty() && !longer.contains(&number) {
                continue;
            }
            let error = |error: std::io::Error| {
                Error::Host(format!(
                    "the container's file /{} could not be filled: {error}",
                    String::from_utf8_lossy(&tree.path(at))
                ))
            };
            let file = maker.open(at)?;
            for run in runs {
                self.copy_later(&file, size, &run).map_err(error)?;
            }
            ftruncate(&file, size).map_err(|failed| error(failed.into()))?;
        }
        Ok(())
    }

    /// The parts of a run that lie among what came later: one that grew behind its end has more than the first tree knew.
    fn later_parts(&self, run: &Run) -> impl Iterator<Item = Run> {
        let mut parts = Vec::new();
        self.homes(run.slot * PAGE_BYTES, u64::from(run.pages) * PAGE_BYTES, &mut |offset, bytes, home| {
            if matches!(home, Home::Later(_)) {
                let slot = offset / PAGE_BYTES;
                // A part of a run has no more pages than it.
                let pages = (bytes / PAGE_BYTES) as u32;
                parts.push(Run { page: run.page + (slot - run.slot), pages, slot, ..*run });
            }
        });
        parts.into_iter()
    }

    fn copy_later(&self, file: &File, size: u64, run: &Run) -> std::io::Result<()> {
        let (begin, end) = (run.slot * PAGE_BYTES, (run.slot + u64::from(run.pages)) * PAGE_BYTES);
        let mut buffer = Vec::new();
        let mut at = begin;
        while at < end {
            let bytes = (end - at).min(PIECE_BYTES as u64);
            let offset = run.page * PAGE_BYTES + (at - begin);
            let inside = size.saturating_sub(offset).min(bytes);
            buffer.resize(usize::try_from(inside).unwrap_or(0), 0);
            read_filled(&self.later, at, &mut buffer)?;
            for (piece, offset) in buffer.chunks(PAGE_SIZE).zip((offset..).step_by(PAGE_SIZE)) {
                // What was never written there is a hole.
                if !is_zero(piece) {
                    file.write_all_at(piece, offset)?;
                }
            }
            at += bytes;
        }
        Ok(())
    }

    /// Tells where bytes of the space are, piece by piece: offset in the space, number, and place.
    fn homes(&self, offset: u64, bytes: u64, each: &mut dyn FnMut(u64, u64, Home)) {
        let (mut at, end) = (offset, offset.saturating_add(bytes));
        let begins = |run: &Run| run.slot * PAGE_BYTES;
        let ends = |run: &Run| (run.slot + u64::from(run.pages)) * PAGE_BYTES;
        let first = self.runs.partition_point(|run| ends(run) <= offset);
        for run in self.runs.iter().skip(first).take_while(|run| begins(run) < end) {
            if begins(run) > at {
                each(at, begins(run) - at, Home::Later(at));
                at = begins(run);
            }
            let until = ends(run).min(end);
            each(at, until - at, Home::File(run.process, run.page * PAGE_BYTES + (at - begins(run))));
            at = until;
        }
        if at < end {
            each(at, end - at, Home::Later(at));
        }
    }

    /// A file of the first tree.
    fn file(&self, number: u32) -> Result<Arc<File>> {
        if let Some((_, file)) = lock(&self.open).iter().find(|(known, _)| *known == number) {
            return Ok(Arc::clone(file));
        }
        let path = self.files.get(&number).map(|at| self.first.path(*at)).unwrap_or_default();
        let file = self
            .top
            .at(&path, OFlags::RDWR | OFlags::NONBLOCK | OFlags::NOCTTY, Mode::empty())
            .map_err(|error| failed("opened", &path, error))?;
        let file: Arc<File> = Arc::new(file.into());
        let mut open = lock(&self.open);
        open.truncate(OPEN_FILES - 1);
        open.push_front((number, Arc::clone(&file)));
        Ok(file)
    }

    fn first_size(&self, number: u32) -> u64 {
        match self.files.get(&number).and_then(|at| self.first.entries.get(*at)).map(|entry| &entry.kind) {
            Some(Kind::File { size, .. }) => *size,
            _ => 0,
        }
    }

    /// Calls something for each piece of a range, with its file, the offset there and its place in the range.
    fn each(
        &self,
        offset: u64,
        bytes: u64,
        call: &mut dyn FnMut(Option<u32>, u64, std::ops::Range<usize>) -> Result<()>,
    ) -> Result<()> {
        let mut result = Ok(());
        self.homes(offset, bytes, &mut |at, bytes, home| {
            let begin = usize::try_from(at - offset).unwrap_or(usize::MAX);
            let range = begin..begin.saturating_add(usize::try_from(bytes).unwrap_or(usize::MAX));
            if result.is_ok() {
                result = match home {
                    Home::File(number, offset) => call(Some(number), offset, range),
                    Home::Later(offset) => call(None, offset, range),
                };
            }
        });
        result
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.each(offset, bytes.len() as u64, &mut |number, offset, range| {
            let piece = bytes.get(range).unwrap_or_default();
            let Some(number) = number else {
                return self.later.write_all_at(piece, offset).map_err(|error| unwritten(&error));
            };
            let file = self.file(number)?;
            // The last page goes beyond the end; what is zeros there is there already.
            let inside =
                usize::try_from(self.first_size(number).saturating_sub(offset)).unwrap_or(usize::MAX);
            let (inside, behind) = piece.split_at(inside.min(piece.len()));
            let is_longer = lock(&self.longer).contains(&number) || !is_zero(behind);
            if is_longer {
                lock(&self.longer).insert(number);
            }
            let written = if is_longer { piece } else { inside };
            file.write_all_at(written, offset).map_err(|error| unwritten(&error))
        })?;
        self.wrote(bytes.len() as u64)
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.each(offset, buffer.len() as u64, &mut |number, offset, range| {
            let piece = buffer.get_mut(range).unwrap_or_default();
            let file = number.map(|number| self.file(number)).transpose()?;
            read_filled(file.as_deref().unwrap_or(&self.later), offset, piece)
                .map_err(|error| Error::Host(format!("the container's files could not be read: {error}")))
        })
    }

    fn zero(&self, offset: u64, bytes: u64) -> Result<()> {
        let mut zeroed = false;
        self.each(offset, bytes, &mut |number, offset, range| {
            let file = number.map(|number| self.file(number)).transpose()?;
            let file = file.as_deref().unwrap_or(&self.later);
            let end = offset + range.len() as u64;
            let size = file.metadata().map_err(|error| unwritten(&error))?.len().min(end);
            for (first, count) in data_pages(file, offset..size).map_err(|error| unwritten(&error))? {
                let begin = (first * PAGE_BYTES).max(offset);
                let bytes = ((first + count) * PAGE_BYTES).min(end).saturating_sub(begin);
                zeroed = true;
                let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
                match rustix::io::retry_on_intr(|| fallocate(file, how, begin, bytes)) {
                    Ok(()) => {}
                    Err(Errno::OPNOTSUPP) => {
                        let bytes = size.saturating_sub(begin).min(bytes);
                        let zeros = vec![0; usize::try_from(bytes).unwrap_or(0)];
                        file.write_all_at(&zeros, begin).map_err(|error| unwritten(&error))?;
                    }
                    Err(error) => return Err(unwritten(&error.into())),
                }
            }
            Ok(())
        })?;
        if zeroed { self.wrote(1) } else { Ok(()) }
    }

    /// Notes that something was written, and makes all of it safe when that is much: whoever writes waits for it.
    fn wrote(&self, bytes: u64) -> Result<()> {
        let before = self.unsafe_bytes.fetch_add(bytes, Ordering::AcqRel);
        if before + bytes < MOST_UNSAFE_BYTES { Ok(()) } else { self.settle() }
    }

    fn settle(&self) -> Result<()> {
        if self.unsafe_bytes.swap(0, Ordering::AcqRel) == 0 {
            return Ok(());
        }
        syncfs(&self.top)
            .map_err(|error| Error::Host(format!("the container's files could not be made safe: {error}")))
    }
}

fn unwritten(error: &std::io::Error) -> Error {
    Error::Host(format!("the container's files could not be written: {error}"))
}

/// That there is room for what is known to come, as the file system counts it.
fn check_room(bundle: &Bundle, tree: &Tree, runs: &[Run]) -> Result<()> {
    let cannot =
        |error: Errno| Error::Host(format!("the room in {} is not known: {error}", bundle.path.display()));
    let found = rustix::fs::statvfs(&bundle.path).map_err(cannot)?;
    let pages: u64 = runs.iter().map(|run| u64::from(run.pages)).sum();
    let needed = pages * PAGE_BYTES;
    let free = found.f_bavail.saturating_mul(found.f_frsize);
    let mib = |bytes: u64| bytes.div_ceil(1 << 20);
    if needed > free {
        return Err(Error::Host(format!(
            "its files take {} MiB, and {} has room for {} MiB: make room, or name another folder with --containers",
            mib(needed),
            bundle.path.display(),
            free >> 20
        )));
    }
    let names = tree.entries.len() as u64;
    // Some file systems make them as they are needed, and say 0.
    if found.f_files > 0 && names > found.f_favail {
        return Err(Error::Host(format!(
            "it has {names} files, and {} has room for {}: make room, or name another folder with --containers",
            bundle.path.display(),
            found.f_favail
        )));
    }
    Ok(())
}

/// That an overlay can be made here of these layers.
fn try_overlay(bundle: &Bundle, overlay: &Overlay, lower: &[PathBuf]) -> Result<()> {
    let cannot = |error: std::io::Error| {
        Error::Host(format!("its overlay cannot be tried in {}: {error}", bundle.path.display()))
    };
    let trial = bundle.folder(Part::Trial).map_err(cannot)?;
    let path = |name: &str| {
        let path = trial.join(name);
        std::fs::create_dir(&path).map(|()| path).map_err(cannot)
    };
    let (upper, work, at) = (path("upper")?, path("work")?, path("rootfs")?);
    Mounted::mount(overlay, lower, &upper, &work, &at)?;
    rustix::mount::unmount(&at, rustix::mount::UnmountFlags::empty())
        .map_err(|error| cannot(error.into()))?;
    bundle.forget(Part::Trial).map_err(cannot)
}

/// The memory of a container whose files come with it.
pub(super) struct WithFiles {
    pub(super) memory: Arc<GuestMemory>,
    pub(super) root: Arc<Incoming>,
}

impl PageReader for WithFiles {
    fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        match self.root.is_at(space) {
            true => self.root.read(offset, buffer),
            false => self.memory.read(space, offset, buffer),
        }
    }

    fn is_untouched(&self, run: PageRun) -> Result<bool> {
        if self.root.is_at(run.space) { Ok(false) } else { self.memory.is_untouched(run) }
    }
}

impl PageMemory for WithFiles {
    fn write(&self, space: SpaceId, offset: u64, bytes: &[u8]) -> Result<()> {
        match self.root.is_at(space) {
            true => self.root.write(offset, bytes),
            false => self.memory.write(space, offset, bytes),
        }
    }

    fn zero(&self, run: PageRun) -> Result<()> {
        match self.root.is_at(run.space) {
            true => self.root.zero(run.offset(), run.bytes() as u64),
            false => self.memory.zero(run),
        }
    }

    fn settle(&self) -> Result<()> {
        self.memory.settle()?;
        self.root.settle()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::container::Slots;
    use crate::container::files::scribbler::{changes, everything, scribble};
    use crate::container::files::{Listing, walk};
    use proptest::prelude::*;
    use rustix::fs::{XattrFlags, llistxattr};
    use std::path::Path;

    const SPACE: SpaceId = SpaceId(1);
    const PAGES: u64 = 4096;

    /// A source without any cleverness: everything is sent each time.
    struct From {
        folder: tempfile::TempDir,
        numbers: HashMap<(u64, u64), u32>,
        slots: Slots,
    }

    impl From {
        fn new() -> Self {
            let folder = tempfile::tempdir_in(".").unwrap();
            Self { folder, numbers: HashMap::new(), slots: Slots::alone(SPACE, PAGES) }
        }

        fn look(&mut self) -> Listing {
            let mut listing = walk(&Folder::open(self.folder.path()).unwrap(), None, false).unwrap();
            let files: Vec<_> = listing.files().collect();
            // Others have the numbers of files that are gone.
            self.numbers.retain(|identity, _| files.iter().any(|(_, stamp)| stamp.identity == *identity));
            for (at, stamp) in files {
                let free = (0..).find(|number| self.numbers.values().all(|used| used != number)).unwrap();
                let number = *self.numbers.entry(stamp.identity).or_insert(free);
                listing.set_number(at, number);
                let mut new = Vec::new();
                for (first, count) in self.data(&listing, at) {
                    self.slots.find(number, first, count, &mut |page, count, place| {
                        new.extend((place == crate::container::Place::Nowhere).then_some((page, count)));
                    });
                }
                for (page, count) in new {
                    self.slots.add(number, page, count).unwrap();
                }
            }
            listing
        }

        fn file(&self, listing: &Listing, at: usize) -> File {
            let path = String::from_utf8(listing.tree.path(at)).unwrap();
            File::open(self.folder.path().join(path)).unwrap()
        }

        fn data(&self, listing: &Listing, at: usize) -> Vec<(u64, u64)> {
            let file = self.file(listing, at);
            let size = file.metadata().unwrap().len();
            data_pages(&file, 0..size).unwrap()
        }

        /// Sends what all slots hold.
        fn send(&self, listing: &Listing, to: &Incoming) {
            let mut zeros: Vec<Run> = self.slots.placement().runs;
            for (at, _) in listing.files() {
                let (file, number) = (self.file(listing, at), listing.tree.number(at).unwrap());
                for run in self.slots.placement().runs.iter().filter(|run| run.process == number) {
                    zeros.retain(|other| other != run);
                    let mut bytes = vec![0; run.pages as usize * PAGE_SIZE];
                    read_filled(&file, run.page * PAGE_BYTES, &mut bytes).unwrap();
                    let offset = run.slot * PAGE_BYTES;
                    // As it comes from a connection, in pieces of any length; zeros as such.
                    let mut at = 0;
                    for piece in bytes.chunks(10_001) {
                        to.write(offset + at, piece).unwrap();
                        at += piece.len() as u64;
                    }
                    for (page, bytes) in (run.slot..).zip(bytes.chunks(PAGE_SIZE)) {
                        if is_zero(bytes) {
                            to.zero(page * PAGE_BYTES, PAGE_BYTES).unwrap();
                        }
                    }
                    let mut found = vec![1; bytes.len()];
                    to.read(offset, &mut found).unwrap();
                    assert!(found == bytes);
                }
            }
            for run in zeros {
                to.zero(run.slot * PAGE_BYTES, u64::from(run.pages) * PAGE_BYTES).unwrap();
            }
            to.settle().unwrap();
        }
    }

    fn bundle(folder: &Path) -> Bundle {
        Bundle::make(folder.join("bundle"), b"{}", true).unwrap()
    }

    const FILES: Files = Files { space: SPACE.0, overlay: None };

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]
        #[test]
        fn what_arrives_is_what_there_was_in_the_end(
            first in changes(),
            last in changes(),
            sends_between in any::<bool>(),
        ) {
            let (mut from, parent) = (From::new(), tempfile::tempdir_in(".").unwrap());
            scribble(from.folder.path(), &first);
            let listing = from.look();
            let bundle = bundle(parent.path());
            let placement = from.slots.placement();
            let to = Incoming::make(&bundle, &FILES, Vec::new(), listing.tree.clone(), &placement, PAGES).unwrap();
            if sends_between {
                from.send(&listing, &to);
            }
            scribble(from.folder.path(), &last);
            let listing = from.look();
            from.send(&listing, &to);
            to.finish(&listing.tree, &from.slots.placement()).unwrap();
            let arrived = everything(&bundle.path.join("rootfs"));
            let expected = everything(from.folder.path());
            prop_assert_eq!(arrived, expected);
            drop(to);
            drop(bundle);
            assert_eq!(std::fs::read_dir(parent.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn what_cannot_be_made_is_said_before_a_page_comes() {
        let parent = tempfile::tempdir_in(".").unwrap();
        let bundle = bundle(parent.path());
        let mut from = From::new();
        std::fs::write(from.folder.path().join("a"), "x").unwrap();
        let listing = from.look();
        let mut placement = from.slots.placement();
        placement.runs[0].pages = u32::MAX;
        let refused = |files: &Files, tree: &Tree| {
            Incoming::make(&bundle, files, Vec::new(), tree.clone(), &placement, PAGES)
                .err()
                .unwrap()
                .to_string()
        };
        let error = refused(&FILES, &listing.tree);
        assert!(error.contains("16777216 MiB") && error.contains("has room for"), "{error}");
        let layers = |lower: &[&str]| Files {
            overlay: Some(Overlay {
                lower: lower.iter().map(|path| (*path).into()).collect(),
                options: Vec::new(),
            }),
            ..FILES
        };
        let files = layers(&["/", "/nowhere/at/all"]);
        let error = lower_layers(&files, &[]).unwrap_err().to_string();
        assert!(error.contains("/nowhere/at/all") && error.contains("--lower"), "{error}");
        let error = lower_layers(&files, &["/".into()]).unwrap_err().to_string();
        assert!(error.contains("2 lower layers"), "{error}");
        assert_eq!(lower_layers(&files, &["/".into(), "/tmp".into()]).unwrap().len(), 2);
        assert_eq!(lower_layers(&FILES, &[]).unwrap().len(), 0);
    }

    #[test]
    fn an_attribute_that_is_gone_does_not_come_back() {
        let parent = tempfile::tempdir_in(".").unwrap();
        let (bundle, mut from) = (bundle(parent.path()), From::new());
        let path = from.folder.path().join("a");
        std::fs::write(&path, "x").unwrap();
        let set = rustix::fs::setxattr(&path, "user.a", b"1", XattrFlags::empty());
        if let Err(error) = set {
            eprintln!("attributes are not tested: this file system has none: {error}");
            return;
        }
        let listing = from.look();
        let placement = from.slots.placement();
        let to = Incoming::make(&bundle, &FILES, Vec::new(), listing.tree, &placement, PAGES).unwrap();
        rustix::fs::removexattr(&path, "user.a").unwrap();
        // Also where it has another name by then.
        std::fs::rename(&path, from.folder.path().join("b")).unwrap();
        let listing = from.look();
        from.send(&listing, &to);
        to.finish(&listing.tree, &from.slots.placement()).unwrap();
        let mut list = [0; 100];
        assert_eq!(llistxattr(bundle.path.join("rootfs/b"), &mut list[..]), Ok(0));
    }
}

//! A container under runc as a source.

mod files;
mod memory;
mod tracking;

use crate::container::keeper::{Keeper, Order};
use crate::container::{
    Digests, IMAGE_LIMIT, Images, Process, RootCopy, Runtime, Slots, SoftDirty, Tracking, Tree, Which, Wishes,
};
use crate::error::{Error, Result};
use crate::inbound::MAX_MACHINE_BYTES;
use crate::memory::PageReader;
use crate::paths::RuntimeDir;
use crate::source::{Committed, Dirty, Donor, Durable, NoDonor, Source, Workload};
use files::Root;
use memory::{Memory, PAGE_BYTES, lock, read, write};
use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::container::pagemap::Pagemap;
use protocol::container::{self as format, Description, SECTION_VERSION, WITH_FILES_VERSION};
use protocol::control::{WorkloadKind, check_name};
use protocol::monitor::Pledge;
use protocol::page::{PageRun, PageSet, SpaceId};
use protocol::state::State;
use std::fs::File;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use tracking::DIGESTS;

/// Room for pages that come while it moves: half of what there is, and no less than this.
const ROOM_PAGES: u64 = (64 << 20) / PAGE_BYTES;

/// A running container. Dropped, it goes on, unless it was pledged.
pub struct ContainerSource {
    runtime_dir: RuntimeDir,
    workload: Workload,
    destination: String,
    wishes: Wishes,
    watch: Watch,
    /// Where the watch goes when this source does.
    post: Option<WatchPost>,
    frozen: Option<Frozen>,
    keeper: Option<Keeper>,
}

/// Where it is kept what is known of a container's pages, from one source to the next: so that the next checkpoint can be a delta on the last.
#[derive(Clone, Default)]
pub struct WatchPost(Arc<Mutex<Option<Watch>>>);

/// What is known of a container's pages.
#[derive(Default)]
struct Watch {
    /// Its first process: another one is another container.
    first: i32,
    tree: Tree,
    memory: Arc<Memory>,
    /// The checkpoint that has everything but what was written since.
    baseline: Option<CheckpointId>,
    /// What the last harvest saw. What is written behind it is not taken with it, though it lies between.
    seen: Vec<PageSet>,
    /// Pages that are dirty whatever the kernel says: they were taken and are safe nowhere.
    owed: Vec<PageSet>,
    /// Pages that were taken since the source began.
    taken: Vec<PageSet>,
    /// If the kernel's soft-dirty bits tell what is written.
    soft_dirty: Option<SoftDirty>,
}

/// What is known once it stands still.
struct Frozen {
    /// CRIU still writes its log there, until it lets go.
    _images: Images,
    /// What it wrote, by name.
    files: Vec<(String, Vec<u8>)>,
    /// The pages that CRIU left in place, of each process.
    left: Vec<(u32, Pagemap)>,
}

impl Watch {
    fn begin(id: &str, first: i32, root: &Path, copy_root: Option<RootCopy>) -> Result<Self> {
        let tree = Tree::of(first)?;
        let mut pages = Vec::new();
        for process in &tree.processes {
            let mut runs = Vec::new();
            process
                .pages(Which::All, &mut |first, count| runs.push((first, count)))
                .map_err(|error| unreadable(process, &error))?;
            pages.push((process.inside, runs));
        }
        let count: u64 = pages.iter().flat_map(|(_, runs)| runs).map(|(_, count)| count).sum();
        let slots = Slots::new(&pages, ROOM_PAGES.max(count / 2)).map_err(|processes| {
            Error::Workload(format!("{id} has {processes} processes, which are too many to move"))
        })?;
        // Behind all memory: of that, the last space is the one that everything later goes to.
        let space = SpaceId(slots.layout().spaces.len() as u16);
        let root = copy_root.map(|copy| Root::begin(root, space, copy, &tree.processes)).transpose()?;
        let memory = Memory {
            slots: RwLock::new(slots),
            files: RwLock::new(files_of(&tree)?),
            wanted: RwLock::default(),
            is_full: AtomicBool::new(false),
            missed: Mutex::default(),
            digests: Mutex::default(),
            root,
        };
        let none: Vec<PageSet> =
            memory.layout().spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
        Ok(Self {
            first,
            tree,
            memory: Arc::new(memory),
            baseline: None,
            seen: none.clone(),
            owed: none.clone(),
            taken: none,
            soft_dirty: None,
        })
    }

    /// Looks for files that changed; what did is owed.
    fn look_at_files(&mut self, still: bool) -> Result<()> {
        let (Some(root), Some(owed)) = (&self.memory.root, self.owed.last_mut()) else { return Ok(()) };
        // Whoever comes next begins anew: it is not known what was noted and what was not.
        let failed = |_: &Error| self.memory.is_full.store(true, Ordering::Release);
        root.look(&self.tree.processes, still, owed).inspect_err(failed)
    }

    /// A source is gone: what it took and did not make safe is owed.
    fn give_back(&mut self) {
        *write(&self.memory.wanted) = None;
        for (owed, taken) in self.owed.iter_mut().zip(&mut self.taken) {
            owed.union(taken);
            taken.clear();
        }
    }
}

impl ContainerSource {
    /// Takes hold of a container. `destination` is where it will go, as an operator writes it; `program` is this program. What an earlier
    /// source left at the post is gone on with.
    ///
    /// # Errors
    /// `Workload` when there is no such container or it does not run, `Host` when its memory cannot be read.
    pub fn connect(
        id: &str,
        runtime: &Runtime,
        runtime_dir: &RuntimeDir,
        program: &Path,
        destination: &str,
        wishes: Wishes,
        post: Option<&WatchPost>,
    ) -> Result<Self> {
        check_name(id)?;
        // First: one that stands still is to be settled, and says so.
        let keeper = Keeper::start(program, runtime_dir, runtime, id)?;
        let state = runtime.state(id)?;
        if state.status != "running" {
            return Err(Error::Workload(format!(
                "{id} is {}: only a container that runs can be moved or written down",
                state.status
            )));
        }
        let config = std::fs::read(state.bundle.join("config.json")).map_err(|error| {
            Error::Host(format!(
                "the configuration of {id} in {} cannot be read: {error}",
                state.bundle.display()
            ))
        })?;
        let kept = post.and_then(|post| lock(&post.0).take());
        let kept =
            kept.filter(|watch| watch.first == state.pid && !watch.memory.is_full.load(Ordering::Acquire));
        let kept = kept.and_then(|mut watch| match watch.look_at_files(false) {
            Ok(()) => Some(watch),
            Err(error) => {
                tracing::info!("the files of {id} are counted anew: {error}");
                None
            }
        });
        let begin = || Watch::begin(id, state.pid, &state.rootfs, wishes.copy_root);
        let watch = kept.map_or_else(begin, Ok)?;
        let layout = watch.memory.layout();
        layout.validate(u64::MAX)?;
        let version = runtime.criu().version;
        let description = Description {
            id: id.into(),
            criu: [version.major, version.minor, version.patch],
            root: state.rootfs.to_string_lossy().into_owned(),
            tcp_established: wishes.tcp_established,
            files: watch.memory.root.as_ref().map(Root::description),
        };
        let version = if description.files.is_some() { WITH_FILES_VERSION } else { SECTION_VERSION };
        let mut machine = State::default();
        machine.push(format::DESCRIPTION, version, description.encode());
        machine.push(format::CONFIG, SECTION_VERSION, config);
        if let Some(root) = &watch.memory.root {
            root.describe(&mut machine)?;
        }
        let machine = machine.encode()?;
        if machine.len() as u64 > u64::from(MAX_MACHINE_BYTES) {
            return Err(Error::Workload(format!(
                "the listing of the files of {id} takes {} MiB, which is more than the {} MiB of an offer: leave them where both hosts reach them, \
                 and move it without --copy-rootfs",
                machine.len() >> 20,
                MAX_MACHINE_BYTES >> 20
            )));
        }
        let workload = Workload { kind: WorkloadKind::Container, name: id.into(), machine, layout };
        Ok(Self {
            runtime_dir: runtime_dir.clone(),
            workload,
            destination: destination.into(),
            wishes,
            watch,
            post: post.cloned(),
            frozen: None,
            keeper: Some(keeper),
        })
    }

    fn order(&mut self, order: &Order) -> Result<()> {
        match &mut self.keeper {
            Some(keeper) => keeper.order(order),
            None => Err(Error::Workload(format!("{} has no keeper any more", self.workload.name))),
        }
    }
}

impl Source for ContainerSource {
    fn workload(&self) -> &Workload {
        &self.workload
    }

    fn track(&mut self, dirty: Dirty) -> Result<String> {
        if dirty == Dirty::Everything || self.watch.baseline.is_none() {
            // Those that have a slot; what has none is dirty anyway.
            for run in read(&self.watch.memory.slots).placement().runs {
                if let Some(owed) = self.watch.owed.get_mut(usize::from(run.space.0)) {
                    owed.insert(run.slot, u64::from(run.pages));
                }
            }
            if let (Some(root), Some(owed)) = (&self.watch.memory.root, self.watch.owed.last_mut()) {
                root.placed(owed);
            }
        }
        if self.watch.soft_dirty.is_some() || lock(&self.watch.memory.digests).is_none() {
            match self.track_by_kernel() {
                Ok(how) => return Ok(how.into()),
                Err(error) if matches!(self.wishes.tracking, Tracking::Kernel | Tracking::SoftDirty) => {
                    return Err(error);
                }
                Err(error) => {
                    tracing::info!("every page is compared: {error}");
                    *lock(&self.watch.memory.digests) = Some(Digests::default());
                }
            }
        }
        Ok(DIGESTS.into())
    }

    fn baseline(&self) -> Option<CheckpointId> {
        self.watch.baseline
    }

    fn set_baseline(&mut self, checkpoint: CheckpointId) -> Result<()> {
        self.watch.taken.iter_mut().for_each(PageSet::clear);
        self.watch.baseline = Some(checkpoint);
        Ok(())
    }

    fn harvest(&mut self) -> Result<Vec<PageSet>> {
        if self.frozen.is_none() {
            self.look()?;
        }
        for run in std::mem::take(&mut *lock(&self.watch.memory.missed)) {
            if let Some(owed) = self.watch.owed.get_mut(usize::from(run.space.0)) {
                owed.insert(run.first, u64::from(run.count));
            }
        }
        self.watch.look_at_files(self.frozen.is_some())?;
        let mut dirty = self.watch.owed.clone();
        // All of those are files' whatever memory has.
        let of_files = self.watch.memory.root.is_some().then(|| dirty.pop()).flatten();
        self.mark_written(&mut dirty)?;
        dirty.extend(of_files);
        self.watch.seen.clone_from(&dirty);
        Ok(dirty)
    }

    fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()> {
        let Watch { tree, memory, seen, owed, taken, .. } = &mut self.watch;
        let at = usize::from(space.0);
        let (Some(seen), Some(owed), Some(taken)) = (seen.get_mut(at), owed.get_mut(at), taken.get_mut(at))
        else {
            return Ok(());
        };
        let end = first.saturating_add(count).min(seen.pages());
        let mut pieces = Vec::new();
        let mut next = first;
        let slots = read(&memory.slots);
        while let Some(run) = seen.next_set_before(next, end) {
            next = seen.next_clear_before(run, end).unwrap_or(end);
            taken.insert(run, next - run);
            slots.at(space, run, next - run, &mut |_, count, process, page| {
                pieces.push((process, page, count));
            });
        }
        seen.remove(first, end.saturating_sub(first));
        owed.remove(first, end.saturating_sub(first));
        for (inside, page, count) in pieces {
            if let Some(process) = tree.processes.iter().find(|process| process.inside == inside) {
                process.clean(page, count).map_err(|error| unreadable(process, &error))?;
            }
        }
        Ok(())
    }

    fn present(&mut self, space: SpaceId, first: u64, count: u64, pages: &mut PageSet) -> Result<()> {
        if let Some(root) = self.watch.memory.root.as_ref().filter(|root| root.is_at(space)) {
            return root.present(first, count, pages);
        }
        let end = first.saturating_add(count).min(pages.pages());
        let mut next = first;
        read(&self.watch.memory.slots).at(
            space,
            first,
            end.saturating_sub(first),
            &mut |slot, count, _, _| {
                pages.remove(next, slot - next);
                next = slot + count;
            },
        );
        pages.remove(next, end.saturating_sub(next));
        // What the container has no more need not be read.
        let wanted = read(&self.watch.memory.wanted);
        let Some(wanted) = wanted.as_ref().and_then(|wanted| wanted.get(usize::from(space.0))) else {
            return Ok(());
        };
        let mut next = first;
        while let Some(gap) = wanted.next_clear_before(next, end) {
            next = wanted.next_set_before(gap, end).unwrap_or(end);
            pages.remove(gap, next - gap);
        }
        Ok(())
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        self.watch.memory.copy(run.space, run.offset(), buffer)?;
        if let Some(root) = self.watch.memory.root.as_ref().filter(|root| root.is_at(run.space)) {
            root.delivered(run.first, buffer);
            return Ok(());
        }
        if let Some(digests) = &mut *lock(&self.watch.memory.digests) {
            digests.delivered(run.space, run.first, buffer);
        }
        Ok(())
    }

    fn reader(&self) -> Result<Box<dyn PageReader>> {
        Ok(Box::new(Arc::clone(&self.watch.memory)))
    }

    fn redirty(&mut self, pages: &[PageSet]) -> Result<()> {
        self.watch.owed.iter_mut().zip(pages).for_each(|(owed, pages)| owed.union(pages));
        Ok(())
    }

    fn can_throttle(&self) -> bool {
        false
    }

    fn throttle(&mut self, _: u8) -> Result<()> {
        Ok(())
    }

    fn freeze(&mut self) -> Result<()> {
        let images = Images::new(self.runtime_dir.path())?;
        let folder = images.folder("dump")?;
        let tcp_established = self.wishes.tcp_established;
        self.order(&Order::Freeze { images: folder.clone(), tcp_established })?;
        // One that was started since the last round cannot be tracked any more, and need not be: all of it counts as written.
        if self.watch.tree.look()? {
            *write(&self.watch.memory.files) = files_of(&self.watch.tree)?;
        }
        let files = image_files(&folder)?;
        let left = pagemaps(&files)?;
        self.frozen = Some(Frozen { _images: images, files, left });
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        let Some(frozen) = &self.frozen else {
            return Err(Error::Workload(format!("{} runs: it has no state", self.workload.name)));
        };
        let mut state = State::default();
        let placement = read(&self.watch.memory.slots).placement();
        state.push(format::PLACEMENT, SECTION_VERSION, placement.encode()?);
        if let Some(root) = &self.watch.memory.root {
            root.describe(&mut state)?;
        }
        for (name, bytes) in &frozen.files {
            state.push(format!("{}{name}", format::IMAGE), SECTION_VERSION, bytes.clone());
        }
        Ok(state.encode()?)
    }

    fn pledge(&mut self, migration: MigrationId, _: &str) -> Result<()> {
        let peer = self.destination.clone();
        self.order(&Order::Pledge(Pledge { migration, peer }))
    }

    fn thaw(&mut self) -> Result<()> {
        self.order(&Order::Thaw)?;
        *write(&self.watch.memory.wanted) = None;
        self.frozen = None;
        Ok(())
    }

    fn resume(mut self: Box<Self>) -> Result<()> {
        self.order(&Order::Resume)
    }

    fn end(mut self: Box<Self>, _: Durable) -> Result<()> {
        self.order(&Order::HandOver)
    }

    fn hand_over(mut self: Box<Self>, _: Committed) -> Result<()> {
        self.order(&Order::HandOver)
    }

    fn can_donate(&self) -> bool {
        false
    }

    fn donate(self: Box<Self>, _: Committed) -> Box<dyn Donor> {
        Box::new(NoDonor(self.workload.clone()))
    }

    fn leave_frozen(self: Box<Self>) {}
}

impl Drop for ContainerSource {
    fn drop(&mut self) {
        if let Some(post) = self.post.take() {
            self.watch.give_back();
            *lock(&post.0) = Some(std::mem::take(&mut self.watch));
        }
    }
}

/// The memory of each process once more, for several threads.
fn files_of(tree: &Tree) -> Result<Vec<(u32, File)>> {
    let files = tree.processes.iter().map(|process| {
        let file = process.memory.try_clone().map_err(|error| unreadable(process, &error))?;
        Ok((process.inside, file))
    });
    files.collect()
}

fn unreadable(process: &Process, error: &std::io::Error) -> Error {
    Error::Host(format!(
        "the memory of process {} ({} in the container) cannot be read: {error}",
        process.pid, process.inside
    ))
}

/// The files that CRIU wrote, without its logs.
fn image_files(folder: &Path) -> Result<Vec<(String, Vec<u8>)>> {
    let cannot = |error: std::io::Error| Error::Host(format!("what CRIU wrote cannot be read: {error}"));
    let mut files = Vec::new();
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder).map_err(cannot)? {
        let entry = entry.map_err(cannot)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.ends_with(".img") && name != "descriptors.json" {
            continue;
        }
        format::check_image_name(&name)?;
        bytes += entry.metadata().map_err(cannot)?.len();
        if bytes > IMAGE_LIMIT {
            return Err(Error::Workload(format!(
                "what the container has beside private memory (shared memory, files in a tmpfs) is more than {} MiB, which cannot be moved",
                IMAGE_LIMIT >> 20
            )));
        }
        files.push((name, std::fs::read(entry.path()).map_err(cannot)?));
    }
    files.sort();
    Ok(files)
}

/// The pagemaps among them, by process.
fn pagemaps(files: &[(String, Vec<u8>)]) -> Result<Vec<(u32, Pagemap)>> {
    let found = files.iter().filter_map(|(name, bytes)| {
        let process = format::process_of_pagemap(name)?;
        Some(Pagemap::decode(bytes).map(|pagemap| (process, pagemap)))
    });
    Ok(found.collect::<std::result::Result<_, _>>()?)
}

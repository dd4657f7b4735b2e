//! A program that writes itself down while it works, and goes on from there when it was killed.
//!
//! ```text
//! Program::new ─▶ restore ─┬─▶ work in values_mut ─┬─▶ … done
//!                          └──◀── checkpoint ◀─────┘
//! ```
//!
//! The program keeps what it computes with in regions that this maps for it, and calls [`Program::checkpoint`] between two steps.
//! The first checkpoint has everything that was touched; the others have the pages that were written since, which the kernel tells
//! (userfaultfd(2) write protection in its asynchronous mode, and `PAGEMAP_SCAN`, Linux 6.7). Where it cannot, every page that was touched is
//! compared by its digest, which costs a checkpoint the time to read and hash them; [`Program::tracking`] says which it is. They lie in a store like those of VMs: `migrate store list`, `verify`, `prune`, `copy`
//! and `gc` work on them.
//!
//! ```
//! use migrate::program::Program;
//! use migrate::vault::Vault;
//!
//! # fn main() -> migrate::Result<()> {
//! # let directory = tempfile::tempdir().unwrap();
//! let store = migrate::store::open(&directory.path().join("store").to_string_lossy())?;
//! let vault = Vault::open_or_create(store, None)?;
//!
//! let mut sums = Program::new("sums", &[1 << 20])?;
//! let mut step = match sums.restore(&vault)? {
//!     Some(state) => u64::from_le_bytes(state.try_into().unwrap_or_default()),
//!     None => 0,
//! };
//! while step < 100 {
//!     sums.values_mut::<u64>(0)[step as usize] = step * step;
//!     step += 1;
//!     if step % 50 == 0 {
//!         let report = sums.checkpoint(&vault, &step.to_le_bytes())?;
//!         assert_eq!(report.deltas, u32::from(step == 100 && sums.tracking().is_ok()));
//!     }
//! }
//!
//! // What a new process finds.
//! let mut again = Program::new("sums", &[1 << 20])?;
//! assert_eq!(again.restore(&vault)?, Some(100_u64.to_le_bytes().to_vec()));
//! assert_eq!(again.values::<u64>(0)[99], 99 * 99);
//! # Ok(())
//! # }
//! ```

mod digests;
mod source;
mod arrival;
#[cfg(test)]
mod tests;

pub use crate::sys::Plain;

use crate::cancel::CancelFlag;
use crate::checkpoint::{self, CheckpointReport, Options};
use crate::error::{Error, Result};
use crate::memory::GuestMemory;
use crate::report::Quiet;
use crate::restore;
use crate::source::Workload;
use crate::sys::{Mapped, WriteTracker};
use crate::vault::{Vault, new_id};
use arrival::Arrival;
use digests::Digests;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::{WorkloadKind, check_name};
use protocol::layout::{Layout, MAX_SPACES, Space, SpaceKind};
use protocol::page::{PAGE_SIZE, PageSet, SpaceId};
use source::{Books, ProgramSource, Tracking};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a checkpoint waits for whoever else writes to the store.
const LOCK_LIMIT: Duration = Duration::from_secs(60);

/// Where the first region lies in the layout, and what is between two: addresses mean nothing to a program, but no two may overlap.
const APART: u64 = 1 << 40;

/// Memory that a program works in, and that can be written down.
pub struct Program {
    workload: Workload,
    regions: Arc<Vec<Mapped>>,
    files: Vec<OwnedFd>,
    books: Arc<Mutex<Books>>,
    by_digests: bool,
    /// When the last checkpoint was taken, of which the next one is the successor even within one millisecond.
    last_unix_ms: u64,
}

impl Program {
    /// New memory, all zeros: a region for each length in bytes, rounded up to whole pages. The name is what its checkpoints are found
    /// by.
    ///
    /// # Errors
    /// `Usage` for a name or lengths that cannot be, `Host` when there is no memory.
    pub fn new(name: &str, region_bytes: &[usize]) -> Result<Self> {
        check_name(name)
            .map_err(|error| Error::Usage(format!("{name:?} cannot be a program's name: {error}")))?;
        if region_bytes.is_empty() || region_bytes.len() > MAX_SPACES || region_bytes.contains(&0) {
            return Err(Error::Usage(format!("a program has 1 to {MAX_SPACES} regions, none of them empty")));
        }
        let (mut spaces, mut regions, mut files) = (Vec::new(), Vec::new(), Vec::new());
        for (number, bytes) in region_bytes.iter().enumerate() {
            let pages = bytes.div_ceil(PAGE_SIZE);
            let (mapped, file) = pages
                .checked_mul(PAGE_SIZE)
                .filter(|bytes| (*bytes as u64) < APART)
                .ok_or(rustix::io::Errno::NOMEM)
                .and_then(Mapped::new)
                .map_err(|error| Error::Host(format!("no memory for {bytes} bytes of {name}: {error}")))?;
            regions.push(mapped);
            files.push(file);
            let guest_address = number as u64 * APART;
            spaces.push(Space {
                id: SpaceId(number as u16),
                kind: SpaceKind::Memory,
                pages: pages as u64,
                guest_address,
            });
        }
        let layout = Layout { spaces };
        layout.validate(u64::MAX)?;
        let books = Arc::new(Mutex::new(Books::new(&layout)));
        let workload =
            Workload { kind: WorkloadKind::Program, name: name.into(), layout, machine: Vec::new() };
        let program =
            Self { workload, regions: Arc::new(regions), files, books, by_digests: false, last_unix_ms: 0 };
        program.track();
        Ok(program)
    }

    /// Finds out what was written by comparing digests, also where the kernel could tell: the program's writes cost nothing then, and its
    /// checkpoints more. Whatever was known is forgotten: the next checkpoint is a full one.
    pub fn compare_digests(&mut self) {
        self.by_digests = true;
        self.track();
    }

    /// What a region holds, as numbers of one type.
    ///
    /// # Panics
    /// If there is no such region.
    pub fn values<T: Plain>(&self, region: usize) -> &[T] {
        self.regions[region].values()
    }

    /// The same, to be changed.
    ///
    /// # Panics
    /// If there is no such region.
    #[allow(
        clippy::expect_used,
        reason = "sources and destinations share the regions only within calls that borrow all of this"
    )]
    pub fn values_mut<T: Plain>(&mut self, region: usize) -> &mut [T] {
        let regions =
            Arc::get_mut(&mut self.regions).expect("the regions are shared during a checkpoint alone");
        regions[region].values_mut()
    }

    /// How it is found what was written, or why it is not.
    ///
    /// # Errors
    /// The reason for which every checkpoint is a full one.
    pub fn tracking(&self) -> std::result::Result<&'static str, String> {
        self.books().tracking()
    }

    /// Takes a checkpoint: a delta on the last one or, if there was none, a full one. `state` is whatever else the program
    /// needs to go on; [`Program::restore`] gives it back. Answers when all of it is durable.
    ///
    /// # Errors
    /// `Store` and others: there is no new checkpoint then, and the next one misses nothing.
    pub fn checkpoint(&mut self, vault: &Vault, state: &[u8]) -> Result<CheckpointReport> {
        let owner = format!("the program {}", self.workload.name);
        let lease = vault.store().lock_within(&owner, LOCK_LIMIT)?;
        let source = ProgramSource::new(
            self.workload.clone(),
            Arc::clone(&self.regions),
            self.memory()?,
            Arc::clone(&self.books),
            state,
        );
        let mut options = Options::new(new_id()?);
        options.after_unix_ms = self.last_unix_ms;
        let report = checkpoint::take(
            Box::new(source),
            vault,
            lease.as_ref(),
            &options,
            &CancelFlag::default(),
            &mut Quiet,
        )
        .map_err(|failed| failed.error)?;
        self.last_unix_ms = report.taken_unix_ms;
        Ok(report)
    }

    /// Fills the regions from the newest checkpoint of this name, and answers the state that was saved with it; `None` if there is no
    /// checkpoint. The next checkpoint is a delta on it.
    ///
    /// # Errors
    /// `Store` naming what is damaged, `Refused` when the checkpoint is of other regions: they hold anything then.
    pub fn restore(&mut self, vault: &Vault) -> Result<Option<Vec<u8>>> {
        let ours = |manifest: &protocol::checkpoint::manifest::Manifest| {
            manifest.workload == self.workload.name && manifest.kind == WorkloadKind::Program
        };
        let listing = vault.manifests()?;
        // One that cannot be read may be the newest of this program: to go on from an older one is nothing to do in silence.
        if let Some(damaged) = listing.damaged.into_iter().next() {
            return Err(damaged.error);
        }
        let found = listing.committed.iter().map(|found| &found.manifest).filter(|manifest| ours(manifest));
        let Some(newest) =
            found.max_by_key(|manifest| (manifest.taken_unix_ms, manifest.deltas, manifest.id))
        else {
            return Ok(None);
        };
        let state = self.restore_from(vault, newest.id)?;
        self.last_unix_ms = self.last_unix_ms.max(newest.taken_unix_ms);
        Ok(Some(state))
    }

    /// Fills the regions from one checkpoint.
    ///
    /// # Errors
    /// As [`Program::restore`].
    pub fn restore_from(&mut self, vault: &Vault, id: CheckpointId) -> Result<Vec<u8>> {
        // What is filled in is no write of the program's: it is tracked from then on.
        self.books().forget();
        let saved = Arc::new(Mutex::new(None));
        let memory = Arc::new(self.memory()?);
        // A region that was worked in holds what the checkpoint may have as zeros.
        arrival::clear(&self.workload.layout, &memory)?;
        let arrival = Arrival::new(self.workload.clone(), memory, Arc::clone(&saved));
        let options = restore::Options::new(u64::MAX);
        restore::restore(vault, id, Box::new(arrival), &options, &CancelFlag::default(), &mut |_| {})?;
        self.track();
        self.books().stands_on(id);
        let state = saved.lock().unwrap_or_else(PoisonError::into_inner).take();
        state.ok_or_else(|| Error::Store(format!("checkpoint {id} has no state of a program")))
    }

    /// Begins to track writes anew: all is clean, and nothing is known to be safe.
    fn track(&self) {
        let kernel = (!self.by_digests).then(|| WriteTracker::start(&self.regions));
        let tracking = match kernel {
            Some(Ok(tracker)) => Tracking::Kernel(tracker),
            None => self.digests(),
            Some(Err(error)) => {
                tracing::info!(
                    program = self.workload.name,
                    %error,
                    "this kernel does not tell what was written (userfaultfd and PAGEMAP_SCAN of Linux 6.7 do): pages are compared by \
                     their digests"
                );
                self.digests()
            }
        };
        self.books().start(tracking);
    }

    fn digests(&self) -> Tracking {
        let digests = self.memory().and_then(|mut memory| Digests::of(&self.workload.layout, &mut memory));
        digests.map_or_else(|error| Tracking::Not(error.to_string()), Tracking::Digests)
    }

    fn books(&self) -> std::sync::MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The regions as files, for the engine.
    fn memory(&self) -> Result<GuestMemory> {
        let files = self.files.iter().map(|file| file.try_clone());
        let files = files
            .collect::<std::io::Result<Vec<_>>>()
            .map_err(|error| Error::Host(format!("a memory file cannot be duplicated: {error}")))?;
        GuestMemory::open(&self.workload.layout, files, &[])
    }
}

/// No pages of any space.
fn none_of(layout: &Layout) -> Vec<PageSet> {
    layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect()
}

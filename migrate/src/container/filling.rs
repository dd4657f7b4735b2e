//! Memory of processes that CRIU makes anew, filled from what arrived.
//!
//! CRIU is told that memory comes later (`--lazy-pages`): it makes a userfaultfd(2) for every process, and gives it to whoever listens at the
//! socket `lazy-pages.socket` of its working directory (criu/uffd.c, `send_uffd`): the process's number inside as an i32, and then the
//! descriptor with one byte; of a process that has ended, only a negative number.
//!
//! All of it is filled before any of it runs, so nothing depends on this program afterwards. It is several times as fast as what CRIU does by
//! itself, which is to read images into memory that is cleared first, with a page fault for each page (512 MiB, November 2026, two cores: 310 to
//! 340 ms; this: 90 to 115 ms), and what was copied is given back at once, so a container is here once and not twice.

use super::gate::comes;
use crate::error::{Error, Result};
use crate::sys::{self, Filled, View};
use protocol::container::pagemap::{LAZY, Pagemap};
use protocol::container::{Placement, Run};
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, SpaceId};
use rustix::fs::{FallocateFlags, MemfdFlags};
use rustix::io::Errno;
use std::collections::HashMap;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The socket that CRIU connects to.
const SOCKET: &str = "lazy-pages.socket";

/// Pages that are filled at once, and then given back.
const PIECE_PAGES: u64 = 256;

/// Threads that fill: more only wait for memory.
const MAX_THREADS: usize = 8;

/// Between two looks at whether it is over.
const PAUSE: Duration = Duration::from_millis(1);

/// How long memory may be in the way of being filled because its process changes it. Nobody does: it does not run.
const BUSY_LIMIT: Duration = Duration::from_secs(10);

/// The longest that CRIU may take between a process's number and its descriptor.
const FOLLOW_LIMIT: Duration = Duration::from_secs(10);

const PAGE_BYTES: u64 = PAGE_SIZE as u64;

/// Where the pages of a container arrive: a memfd for each space, which only this process knows.
pub(crate) struct Arena {
    files: Vec<OwnedFd>,
    views: Vec<View>,
}

impl Arena {
    /// Room for a layout.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn new(layout: &Layout) -> Result<Self> {
        let mut arena = Self { files: Vec::new(), views: Vec::new() };
        for space in &layout.spaces {
            let bytes = space.pages.saturating_mul(PAGE_BYTES);
            let made = rustix::fs::memfd_create("migrate-container", MemfdFlags::CLOEXEC).and_then(|file| {
                rustix::fs::ftruncate(&file, bytes)?;
                let view = View::new(&file, usize::try_from(bytes).map_err(|_| Errno::NOMEM)?)?;
                Ok((file, view))
            });
            let (file, view) = made.map_err(|error| {
                Error::Host(format!("there is no memory for {} pages of the container: {error}", space.pages))
            })?;
            arena.files.push(file);
            arena.views.push(view);
        }
        Ok(arena)
    }

    /// The files once more, for those who write to them.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn files(&self) -> Result<Vec<OwnedFd>> {
        let again = |file: &OwnedFd| {
            file.try_clone()
                .map_err(|error| Error::Host(format!("a memory file cannot be duplicated: {error}")))
        };
        self.files.iter().map(again).collect()
    }

    /// Puts pages into a process's memory where there are none yet. Answers how many are there now, from the first on.
    fn put(&self, descriptor: &OwnedFd, piece: &Piece) -> std::result::Result<u64, Errno> {
        let view = self.views.get(usize::from(piece.space.0)).ok_or(Errno::INVAL)?;
        let (address, offset) = (piece.page * PAGE_BYTES, piece.slot * PAGE_BYTES);
        let mut count = piece.count;
        let until = Instant::now() + BUSY_LIMIT;
        loop {
            match sys::copy_mapped(descriptor, address, view, offset, count * PAGE_BYTES) {
                Ok(Filled::Bytes(bytes)) => return Ok(bytes / PAGE_BYTES),
                // It was asked for while it was made.
                Ok(Filled::Present) => return Ok(1),
                Ok(Filled::Again) if Instant::now() < until => std::thread::sleep(Duration::from_micros(100)),
                Ok(Filled::Again) => return Err(Errno::BUSY),
                // What is filled at once must be one mapping (mm/userfaultfd.c, `mfill_atomic`).
                Err(Errno::NOENT) if count > 1 => count /= 2,
                Err(error) => return Err(error),
            }
        }
    }

    /// These are in a process's memory: they are not needed here.
    fn give_back(&self, piece: &Piece) {
        let Some(file) = self.files.get(usize::from(piece.space.0)) else { return };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        // Where that fails there is less memory, and no harm.
        rustix::fs::fallocate(file, flags, piece.slot * PAGE_BYTES, piece.count * PAGE_BYTES).ok();
    }
}

/// Pages that follow one another in a process and in a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Piece {
    process: u32,
    page: u64,
    count: u64,
    space: SpaceId,
    slot: u64,
}

/// Which pages are whose: those that CRIU left in place at the source, by process and page.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pieces: Vec<Piece>,
}

impl Plan {
    /// By the images of pagemaps and where the pages arrived.
    ///
    /// # Errors
    /// `Workload` when a page never came.
    pub(crate) fn new(placement: &Placement, pagemaps: &[(u32, Pagemap)]) -> Result<Self> {
        let by_page = placement.by_page();
        let mut plan = Self::default();
        for (process, pagemap) in pagemaps {
            let begin = by_page.partition_point(|run| run.process < *process);
            let runs = by_page.get(begin..).unwrap_or(&[]);
            let end = runs.partition_point(|run| run.process == *process);
            plan.add(*process, pagemap, runs.get(..end).unwrap_or(&[]))?;
        }
        plan.pieces.sort_unstable_by_key(|piece| (piece.process, piece.page));
        Ok(plan)
    }

    /// The pages of one process; `runs` are its own, by page.
    fn add(&mut self, process: u32, pagemap: &Pagemap, runs: &[Run]) -> Result<()> {
        let end_of = |run: &Run| run.page + u64::from(run.pages);
        for entry in pagemap.entries.iter().filter(|entry| entry.flags & LAZY != 0) {
            let mut page = entry.first;
            while page < entry.end() {
                let at = runs.partition_point(|run| end_of(run) <= page);
                let run = runs.get(at).filter(|run| run.page <= page).ok_or_else(|| {
                    Error::Workload(format!(
                        "the container's state is unusable: page {:#x} of process {process} never came",
                        page * PAGE_BYTES
                    ))
                })?;
                let count = entry.end().min(end_of(run)) - page;
                let slot = run.slot + (page - run.page);
                self.pieces.push(Piece { process, page, count, space: run.space, slot });
                page += count;
            }
        }
        Ok(())
    }

    /// One page, if it is here.
    fn page(&self, process: u32, page: u64) -> Option<Piece> {
        let at = self.pieces.partition_point(|piece| (piece.process, piece.page) <= (process, page));
        let piece = self.pieces.get(at.checked_sub(1)?)?;
        let behind = page - piece.page;
        (piece.process == process && behind < piece.count).then(|| Piece {
            page,
            count: 1,
            slot: piece.slot + behind,
            ..*piece
        })
    }
}

/// What both threads know.
struct Shared {
    plan: Plan,
    arena: Arc<Arena>,
    /// The memory of each process, by its number inside.
    memories: Mutex<HashMap<u32, Arc<OwnedFd>>>,
    is_over: AtomicBool,
    /// Why somebody may not get what it asked for.
    trouble: Mutex<Option<Error>>,
}

/// Memory that is being made.
pub(crate) struct Filling {
    shared: Arc<Shared>,
    listening: Option<JoinHandle<Option<UnixStream>>>,
}

impl Filling {
    /// Waits for CRIU's descriptors, and for processes that want a page before all are filled.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn listen(work: &Path, plan: Plan, arena: Arc<Arena>) -> Result<Self> {
        let path = work.join(SOCKET);
        let cannot = |error: std::io::Error| {
            Error::Host(format!("CRIU cannot be answered at {}: {error}", path.display()))
        };
        let listener = UnixListener::bind(&path).map_err(cannot)?;
        let shared = Arc::new(Shared {
            plan,
            arena,
            memories: Mutex::default(),
            is_over: AtomicBool::new(false),
            trouble: Mutex::default(),
        });
        let theirs = Arc::clone(&shared);
        let listening = std::thread::Builder::new()
            .name("filling".into())
            .spawn(move || theirs.listen(&listener))
            .map_err(cannot)?;
        Ok(Self { shared, listening: Some(listening) })
    }

    /// Fills everything, once all processes are made and none has run. Nothing is left of it here then but what CRIU wants to keep until its end.
    ///
    /// # Errors
    /// `Workload` when memory of a process cannot be had or filled.
    pub(crate) fn fill(mut self) -> Result<Option<UnixStream>> {
        let next = AtomicUsize::new(0);
        let pieces: Vec<Piece> = self.shared.plan.pieces.iter().flat_map(cut).collect();
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
        std::thread::scope(|scope| {
            let shared = &self.shared;
            let fill = || {
                while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                    shared.fill(*piece)?;
                }
                Ok(())
            };
            let others: Vec<_> = (1..threads).map(|_| scope.spawn(fill)).collect();
            let joined = others.into_iter().map(|other| {
                other
                    .join()
                    .unwrap_or_else(|_| Err(Error::Host("a thread that filled memory is gone".into())))
            });
            std::iter::once(fill()).chain(joined).collect::<Result<()>>()
        })?;
        let stream = self.end();
        match lock(&self.shared.trouble).take() {
            Some(trouble) => Err(trouble),
            None => Ok(stream),
        }
    }

    /// Ends the thread, and lets go of all memory: behind this, what is missing there is zeros.
    fn end(&mut self) -> Option<UnixStream> {
        self.shared.is_over.store(true, Ordering::Release);
        let stream = self.listening.take().and_then(|listening| listening.join().ok().flatten());
        lock(&self.shared.memories).clear();
        stream
    }
}

impl Drop for Filling {
    fn drop(&mut self) {
        self.end();
    }
}

/// Into pieces that are filled at once.
fn cut(piece: &Piece) -> impl Iterator<Item = Piece> {
    let piece = *piece;
    (0..piece.count).step_by(PIECE_PAGES as usize).map(move |at| Piece {
        page: piece.page + at,
        slot: piece.slot + at,
        count: (piece.count - at).min(PIECE_PAGES),
        ..piece
    })
}

impl Shared {
    fn fill(&self, piece: Piece) -> Result<()> {
        let memory = lock(&self.memories).get(&piece.process).cloned().ok_or_else(|| {
            Error::Workload(format!("CRIU did not ask for the memory of process {}", piece.process))
        })?;
        let mut done = 0;
        while done < piece.count {
            let rest = Piece {
                page: piece.page + done,
                slot: piece.slot + done,
                count: piece.count - done,
                ..piece
            };
            done += self.arena.put(&memory, &rest).map_err(|error| unfilled(&rest, error))?;
        }
        self.arena.give_back(&piece);
        Ok(())
    }

    /// Takes what CRIU gives, and serves who waits, until it is over.
    fn listen(&self, listener: &UnixListener) -> Option<UnixStream> {
        let mut stream: Option<UnixStream> = None;
        while !self.is_over.load(Ordering::Acquire) {
            let answered = match &mut stream {
                None if comes(listener, PAUSE) => listener
                    .accept()
                    .map(|(accepted, _)| stream = Some(accepted))
                    .map_err(|error| Error::Host(format!("CRIU cannot be answered: {error}"))),
                None => Ok(()),
                Some(stream) => self.answer(stream),
            };
            if let Err(error) = answered {
                // Whoever fills tells it; until then nobody is served, and nothing runs.
                lock(&self.trouble).get_or_insert(error);
                break;
            }
        }
        stream
    }

    fn answer(&self, stream: &mut UnixStream) -> Result<()> {
        let memories: Vec<(u32, Arc<OwnedFd>)> =
            lock(&self.memories).iter().map(|(process, memory)| (*process, Arc::clone(memory))).collect();
        for (process, memory) in &memories {
            let cannot = |error: Errno| {
                Error::Host(format!("the memory of process {process} cannot be watched: {error}"))
            };
            for address in sys::page_faults(memory, Duration::ZERO).map_err(cannot)? {
                self.serve(*process, memory, address / PAGE_BYTES)?;
            }
        }
        if comes(&*stream, PAUSE) {
            self.take(stream)?;
        }
        Ok(())
    }

    /// Takes one process's memory.
    fn take(&self, stream: &mut UnixStream) -> Result<()> {
        let lost = |error: std::io::Error| Error::Workload(format!("CRIU gives no memory to fill: {error}"));
        stream.set_read_timeout(Some(FOLLOW_LIMIT)).map_err(lost)?;
        let mut number = [0; 4];
        stream.read_exact(&mut number).map_err(lost)?;
        // A negative number is that of a process that has ended, which has no memory.
        let Ok(process) = u32::try_from(i32::from_ne_bytes(number)) else { return Ok(()) };
        let descriptor = super::gate::receive_one(stream).map_err(lost)?;
        lock(&self.memories).insert(process, Arc::new(descriptor));
        Ok(())
    }

    /// Puts the page at which somebody waits.
    fn serve(&self, process: u32, memory: &OwnedFd, page: u64) -> Result<()> {
        let served = match self.plan.page(process, page) {
            Some(piece) => self.arena.put(memory, &piece).map(drop),
            None => sys::zero(memory, page * PAGE_BYTES, PAGE_BYTES).map(drop),
        };
        // Another may have been first; who waits looks again.
        let woken = served.and_then(|()| sys::wake(memory, page * PAGE_BYTES, PAGE_BYTES));
        woken.map_err(|error| {
            Error::Workload(format!(
                "page {:#x} of process {process} cannot be filled: {error}",
                page * PAGE_BYTES
            ))
        })
    }
}

fn unfilled(piece: &Piece, error: Errno) -> Error {
    Error::Workload(format!(
        "{} pages of process {} from {:#x} on cannot be filled: {error}",
        piece.count,
        piece.process,
        piece.page * PAGE_BYTES
    ))
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

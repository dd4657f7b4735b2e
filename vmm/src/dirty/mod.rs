//! Which pages changed, of memory and of disks: KVM's log, OR-ed with the VMM's own writes, and the books about them. A disk has
//! only the latter: nobody but its device writes to it.
//!
//! ```text
//! guest writes ──> KVM's log ─┐
//!                             ├─ harvest ─> pending ── take ──> taken ── (the taker reads the pages)
//! VMM's writes ──> own bits ──┘                ^                  │
//!                                              └──── give back ───┘
//! ```
//!
//! Beside them stands what is *owed*: the pages that no checkpoint has. Without a baseline that is every page. A baseline
//! covers what was taken so far: owed is then what is still pending, and grows with every harvest. It is what pending
//! becomes at the end of a session, and so a session that failed has never been, and the next one finds exactly what the
//! checkpoint lacks. For that, the log stays on between sessions.
//!
//! A page that is not owed is write-protected, or its bit is in the log and not harvested yet. A session that asks for every
//! page takes such pages too, and *must not clear them in the log*: they are protected already, and what was written to
//! them since the harvest would be known to that session alone.
//!
//! A page may be read only after it was *taken*: taking re-arms the write protection first, so a write
//! that comes later shows up in the next harvest. A page read while the guest writes it may be torn;
//! that is sound, because such a page is dirty again.

mod books;
mod kvm;

use std::sync::Arc;

use protocol::checkpoint::name::CheckpointId;

pub use books::{Books, Words};
pub use kvm::KvmLog;

use crate::{
    devices::virtio::Image,
    error::{Error, Result},
    memory::GuestMemory,
};

/// How the host keeps its log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogMode {
    /// Cleared by ranges; every page counts as dirty at the start, so that starting costs nothing.
    ManualInitiallySet,
    /// Cleared by ranges; starting write-protects all of memory.
    Manual,
    /// Reading the log clears all of it.
    Plain,
}

/// The host's dirty log of a VM, one bit a page, one slot a space.
pub trait DirtyLog: Send {
    /// How this log behaves.
    fn mode(&self) -> LogMode;
    /// Starts logging for all slots.
    ///
    /// # Errors
    /// When the host refuses; logging is then off.
    fn start(&mut self) -> Result<()>;
    /// The same with nothing logged, whatever the mode: the first write to any page is, from now on. Only while no vCPU has run
    /// yet, so that none can write to a page without a fault.
    ///
    /// # Errors
    /// When the host refuses; logging is then off.
    fn start_clean(&mut self) -> Result<()>;
    /// Stops logging for all slots.
    ///
    /// # Errors
    /// When the host refuses.
    fn stop(&mut self) -> Result<()>;
    /// Reads one slot's log into `bits`, one word for 64 of its pages. In [`LogMode::Plain`] this clears the log.
    ///
    /// # Errors
    /// When the host refuses; the bits are then of no use.
    fn get(&mut self, slot: usize, bits: &mut [u64]) -> Result<()>;
    /// Clears bits and write-protects their pages again. Bit n of `bits` is page `first + n`; `first` is
    /// a multiple of 64, and so is `pages` except at the slot's end. Not called in [`LogMode::Plain`].
    ///
    /// # Errors
    /// When the host refuses.
    fn clear(&mut self, slot: usize, first: u64, pages: u64, bits: &[u64]) -> Result<()>;
}

/// Dirty tracking of one VM.
pub struct Tracker {
    memory: Arc<GuestMemory>,
    /// Every disk that the guest may write: a baseline must cover all, whoever asks for which.
    disks: Vec<Arc<Image>>,
    log: Box<dyn DirtyLog>,
    /// One a space of memory, then one a disk; empty when the log is off.
    books: Vec<Books>,
    /// Which books are the spaces that a session knows, in its order.
    spaces: Vec<usize>,
    /// What the log said last of one space: kept, because fresh memory for it costs a harvest more than the reading. Empty when
    /// the log is off.
    log_bits: Vec<u64>,
    /// What covers the pages that are not owed. Only while the log is on.
    baseline: Option<CheckpointId>,
    /// A session tracks. With a baseline the log is on without one, too.
    in_session: bool,
}

impl Tracker {
    /// A tracker at rest. Its spaces are those of memory.
    pub(crate) fn new(memory: Arc<GuestMemory>, disks: Vec<Arc<Image>>, log: Box<dyn DirtyLog>) -> Self {
        let spaces = (0..memory.layout().len()).collect();
        let (books, log_bits) = (Vec::new(), Vec::new());
        Self { memory, disks, log, books, spaces, log_bits, baseline: None, in_session: false }
    }

    /// Lets the spaces be those of memory and, behind them, these disks. Only while no session tracks.
    pub(crate) fn choose_disks(&mut self, disks: &[usize]) {
        let memory = self.memory.layout().len();
        self.spaces = (0..memory).chain(disks.iter().map(|disk| memory + disk)).collect();
    }

    /// The pages of each space.
    pub fn space_pages(&self) -> Vec<u64> {
        let all = self.all_pages();
        self.spaces.iter().filter_map(|space| all.get(*space).copied()).collect()
    }

    /// The pages of whatever has books.
    fn all_pages(&self) -> Vec<u64> {
        let memory = self.memory.layout().into_iter().map(|space| space.pages);
        memory.chain(self.disks.iter().map(|disk| disk.pages())).collect()
    }

    /// How the host keeps its log.
    pub fn mode(&self) -> LogMode {
        self.log.mode()
    }

    /// Whether a session tracks.
    pub fn is_tracking(&self) -> bool {
        self.in_session
    }

    /// The checkpoint that has everything but what was written since, if there is one.
    pub fn baseline(&self) -> Option<CheckpointId> {
        self.baseline
    }

    /// Starts tracking, also anew while tracking. With `keep`, the pages that the baseline lacks are pending; without it, or
    /// without a baseline, every page is. Either way the baseline stays true.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses; tracking is then off.
    pub fn start(&mut self, keep: bool) -> Result<()> {
        if self.books.is_empty() {
            self.log.start()?;
            self.books = self.all_pages().into_iter().map(Books::all_pending).collect();
        }
        for books in &mut self.books {
            if keep { books.settle() } else { books.begin_with_every_page() }
        }
        self.in_session = true;
        Ok(())
    }

    /// Memory is what this checkpoint has, but for what is written from now on. Only before the first vCPU runs and before the
    /// state is loaded, which writes here and there.
    ///
    /// # Errors
    /// [`Error::WrongState`] while it is tracked, [`Error::Host`] when the host refuses; nothing is tracked then.
    pub fn begin_from(&mut self, checkpoint: CheckpointId) -> Result<()> {
        if !self.books.is_empty() {
            return Err(Error::WrongState { asked: "begin from a checkpoint", state: "being tracked" });
        }
        if self.spaces.len() != self.all_pages().len() {
            return Err(uncovered());
        }
        self.log.start_clean()?;
        self.books = self.all_pages().into_iter().map(Books::none_pending).collect();
        self.baseline = Some(checkpoint);
        Ok(())
    }

    /// Everything that was taken since tracking started is safe in this checkpoint.
    ///
    /// # Errors
    /// [`Error::WrongState`] when not tracking.
    pub fn set_baseline(&mut self, checkpoint: CheckpointId) -> Result<()> {
        self.must_track("have a baseline")?;
        if self.spaces.len() != self.books.len() {
            return Err(uncovered());
        }
        self.books.iter_mut().for_each(Books::cover);
        self.baseline = Some(checkpoint);
        Ok(())
    }

    /// No checkpoint counts any more: every page is pending, and the log goes off with the session.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses to stop its log; the baseline is gone all the same.
    pub fn forget_baseline(&mut self) -> Result<()> {
        self.baseline = None;
        self.books.iter_mut().for_each(Books::owe_every_page);
        if self.in_session { Ok(()) } else { self.rest() }
    }

    /// Moves what was written since the last harvest into the pending pages. Returns the number of
    /// pending pages of each space.
    ///
    /// # Errors
    /// [`Error::WrongState`] when not tracking, [`Error::Host`] when the host refuses: what it knew may be
    /// lost, so that every page is pending, and there is no baseline any more.
    pub fn harvest(&mut self) -> Result<Vec<u64>> {
        self.must_track("read the dirty log")?;
        if let Err(error) = self.read_log() {
            self.baseline = None;
            self.books.iter_mut().for_each(Books::owe_every_page);
            return Err(error);
        }
        Ok(self.pending())
    }

    fn read_log(&mut self) -> Result<()> {
        let memory = self.memory.layout().len();
        for (index, books) in self.books.iter_mut().enumerate() {
            self.log_bits.clear();
            self.log_bits.resize(books.pending().len(), 0);
            match index.checked_sub(memory).and_then(|disk| self.disks.get(disk)) {
                Some(disk) => disk.drain_writes(&mut self.log_bits),
                None => {
                    self.log.get(index, &mut self.log_bits)?;
                    self.memory.drain_own_writes(index, &mut self.log_bits);
                }
            }
            books.merge(&self.log_bits);
        }
        Ok(())
    }

    /// The number of pending pages of each space, as of the last harvest.
    pub fn pending(&self) -> Vec<u64> {
        self.books_of_spaces().map(Books::pending_pages).collect()
    }

    fn books_of_spaces(&self) -> impl Iterator<Item = &Books> {
        self.spaces.iter().filter_map(|space| self.books.get(*space))
    }

    /// The pending pages of each space as words from page 0 on, as of the last harvest.
    pub fn pending_words(&self) -> impl Iterator<Item = &[u64]> {
        self.books_of_spaces().map(Books::pending)
    }

    /// Takes the pending pages of a range: re-arms their write protection and returns them. Only then may
    /// they be read.
    ///
    /// # Errors
    /// [`Error::Protocol`] for a bad range, [`Error::WrongState`] when not tracking, [`Error::Host`]
    /// when the host refuses; nothing is taken then.
    pub fn take(&mut self, space: usize, first: u64, pages: u64) -> Result<Words> {
        self.must_track("take dirty pages")?;
        let place = self.spaces.get(space).copied().ok_or_else(|| no_such_space(space))?;
        let is_disk = place >= self.memory.layout().len();
        let books = self.books.get_mut(place).ok_or_else(|| no_such_space(space))?;
        let words = books.peek(first, pages)?;
        if words.count() > 0 {
            // A disk's writes are marked whatever was marked before: there is nothing to arm anew.
            if !is_disk && self.log.mode() != LogMode::Plain {
                // Bits that are not set in the words stay as they are, so the span may be wider than
                // what was asked for.
                let logged = books.owed_of(&words);
                self.log.clear(place, logged.first, books.span(&logged), &logged.bits)?;
            }
            books.move_to_taken(&words);
        }
        Ok(words)
    }

    /// Makes pages pending again that were taken but did not arrive. Bit n of `bits` is page `first + n`.
    ///
    /// # Errors
    /// [`Error::Protocol`] for a bad range or bits beyond the space, [`Error::WrongState`] when not
    /// tracking.
    pub fn redirty(&mut self, space: usize, first: u64, bits: &[u64]) -> Result<()> {
        self.must_track("give dirty pages back")?;
        let place = self.spaces.get(space).copied().ok_or_else(|| no_such_space(space))?;
        let books = self.books.get_mut(place).ok_or_else(|| no_such_space(space))?;
        books.redirty(first, bits)
    }

    /// Ends a session's tracking. What it took and no baseline covers is pending again. Without a baseline the log goes off, and
    /// a later start begins with every page pending. Does nothing when not tracking.
    ///
    /// # Errors
    /// [`Error::Host`] when the host refuses to stop its log; the books are closed all the same.
    pub fn stop(&mut self) -> Result<()> {
        if !std::mem::take(&mut self.in_session) {
            return Ok(());
        }
        self.books.iter_mut().for_each(Books::settle);
        if self.baseline.is_some() { Ok(()) } else { self.rest() }
    }

    /// Closes the books and lets the guest write without faults.
    fn rest(&mut self) -> Result<()> {
        if self.books.is_empty() {
            return Ok(());
        }
        self.books.clear();
        self.log_bits = Vec::new();
        self.log.stop()
    }

    fn must_track(&self, asked: &'static str) -> Result<()> {
        if self.is_tracking() { Ok(()) } else { Err(Error::WrongState { asked, state: "not being tracked" }) }
    }
}

fn uncovered() -> Error {
    Error::Protocol(
        "a checkpoint that is a baseline has all of the VM's writable disks: choose them all first".into(),
    )
}

fn no_such_space(space: usize) -> Error {
    Error::Protocol(format!("there is no space {space}"))
}

#[cfg(test)]
mod tests;

//! What the indexes of a chain say, read by two threads and merged in the chain's order.
//!
//! ```text
//! first thread:            newest ─▶ … two links at once … ─▶
//! second thread: the last one, kept ─▶ … two links at once … ─▶ the last one, merged
//! ```
//!
//! The last one is the full one, or the merged index of a link on the way down, which says what all from there on do.
//!
//! To read an index is to check all of it, and most of the work. Links are taken in turn from the newest on, and merged when all newer ones
//! were. The last one is read first of all: it is the largest by far, and would keep one thread busy when the other has nothing left to do. What is wrong
//! with an index is told when its turn comes, and not at all if newer links left nothing for it to say.

use super::fetch::Early;
use super::plan::{Merge, Plan, Sums};
use crate::cancel::CancelFlag;
use crate::error::{Error, Result};
use crate::vault::{Committed, Vault};
use protocol::checkpoint::index::Rows;
use protocol::checkpoint::manifest::MergedIndex;
use protocol::checkpoint::name;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;

/// Merges the indexes of a chain, the newest first, until no page is left of which an older one could tell; `below` stands for all that the
/// oldest of these links stands on. Answers how many that took, too. `early` is told of the segments that may be needed.
///
/// # Errors
/// `Store` naming checkpoint and object, `Interrupted`.
pub(super) fn merged(
    vault: &Vault,
    chain: &[Committed],
    below: Option<&MergedIndex>,
    sums: Sums,
    early: Option<&Early>,
    cancel: &CancelFlag,
) -> Result<(Plan, u64)> {
    let Some(newest) = chain.first() else { return Err(Error::Store("a chain is empty".into())) };
    if let Some(early) = early {
        early.look_for(chain.iter().flat_map(|link| &link.manifest.segments));
    }
    let merge = Merge::new(&newest.manifest.layout, sums);
    let work = Work {
        vault,
        chain,
        below,
        early,
        cancel,
        next: AtomicUsize::new(0),
        state: Mutex::new(State { merge, turn: 0, merged: 0, ended: None }),
        turned: Condvar::new(),
    };
    thread::scope(|scope| {
        let spawn = || {
            thread::Builder::new()
                .name("indexes".into())
                .spawn_scoped(scope, || work.run(Work::links_in_turn))
        };
        // Without another thread this one does it all.
        let helped = work.in_turn() > 0 && spawn().is_ok();
        tracing::debug!(links = chain.len(), helped, "indexes");
        work.run(Work::with_the_last);
    });
    let State { merge, merged, ended, .. } = work.state.into_inner().unwrap_or_else(PoisonError::into_inner);
    ended.map_or_else(|| Ok((merge.finish(), merged)), Err)
}

struct Work<'a> {
    vault: &'a Vault,
    chain: &'a [Committed],
    below: Option<&'a MergedIndex>,
    early: Option<&'a Early>,
    cancel: &'a CancelFlag,
    /// The link that is read next.
    next: AtomicUsize,
    state: Mutex<State>,
    /// Another link's turn came, or it ended.
    turned: Condvar,
}

struct State {
    merge: Merge,
    /// The link that is merged next.
    turn: usize,
    /// Links that had something to say.
    merged: u64,
    /// Why it ended early.
    ended: Option<Error>,
}

impl Work<'_> {
    fn run(&self, body: impl FnOnce(&Self) -> Result<()>) {
        let ends = EndsOnPanic(self);
        if let Err(error) = body(self) {
            self.end(error);
        }
        drop(ends);
    }

    /// Links that are read in turn: all but the last that is read.
    fn in_turn(&self) -> usize {
        self.chain.len() - usize::from(self.below.is_none())
    }

    fn links_in_turn(&self) -> Result<()> {
        let mut buffer = Vec::new();
        loop {
            let number = self.next.fetch_add(1, Relaxed);
            let link = self.chain.get(number).filter(|_| number < self.in_turn());
            let Some(link) = link else { return Ok(()) };
            self.cancel.check()?;
            let rows = self.rows(link, &mut buffer);
            if !self.merge(number, |merge| add(merge, link, rows))? {
                return Ok(());
            }
        }
    }

    fn with_the_last(&self) -> Result<()> {
        let Some(oldest) = self.chain.last() else { return Ok(()) };
        let mut buffer = Vec::new();
        if let Some(below) = self.below {
            let rows = self.vault.merged_rows(&oldest.manifest.layout, below, &mut buffer);
            if let (Some(early), Ok(rows)) = (self.early, &rows) {
                early.look_for(&rows.segments);
            }
            self.links_in_turn()?;
            let add = |merge: &mut Merge| {
                rows.and_then(|rows| {
                    let name = name::merged_index(below.id);
                    merge.add_merged(below, &rows).map_err(|error| self.vault.wrong(&name).damaged(&error))
                })
            };
            return self.merge(self.chain.len(), add).map(drop);
        }
        let rows = self.rows(oldest, &mut buffer);
        self.links_in_turn()?;
        self.merge(self.chain.len() - 1, |merge| add(merge, oldest, rows)).map(drop)
    }

    /// The index of a link, unless it has nothing to say any more.
    fn rows<'b>(&self, link: &Committed, buffer: &'b mut Vec<u8>) -> Option<Result<Rows<'b>>> {
        let needed = !self.state().merge.is_complete();
        needed.then(|| self.vault.index_rows(&link.manifest, buffer))
    }

    /// Merges what was read when its turn has come, unless it has nothing to say. Whether the turn came.
    fn merge(&self, number: usize, add: impl FnOnce(&mut Merge) -> Result<()>) -> Result<bool> {
        let mut state = self.state();
        while state.turn != number {
            if state.ended.is_some() {
                return Ok(false);
            }
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        if !state.merge.is_complete() {
            add(&mut state.merge)?;
            state.merged += 1;
        }
        state.turn += 1;
        drop(state);
        self.turned.notify_all();
        Ok(true)
    }

    fn end(&self, error: Error) {
        self.state().ended.get_or_insert(error);
        self.turned.notify_all();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Adds a link that was read, as it was while older ones still had something to say.
fn add(merge: &mut Merge, link: &Committed, rows: Option<Result<Rows<'_>>>) -> Result<()> {
    rows.transpose().map(|rows| rows.into_iter().for_each(|rows| merge.add(&link.manifest.segments, &rows)))
}

/// Whoever waits for the turn of a thread that is no more would wait for ever.
struct EndsOnPanic<'a>(&'a Work<'a>);

impl Drop for EndsOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.end(Error::Host("a thread that read the indexes ended unexpectedly".into()));
        }
    }
}

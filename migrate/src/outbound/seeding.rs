//! What the destination has already, because its memory began with a checkpoint of this workload.
//!
//! The rule is the same as for everything that was sent: the destination has a page as it was at some moment, and whatever is
//! written behind that moment is dirty. That moment is the checkpoint's, if the workload's writes are tracked from it on; else it
//! is now: every page of the checkpoint is taken, and *then* compared with the stored bytes. A page that the checkpoint has and that is
//! zeros by now is not as it is there, even if it was never touched here, and so is sent.

use super::Outbound;
use crate::conversation::out_of_order;
use crate::error::Result;
use crate::restore::fetch::Scratch;
use crate::seed::Seed;
use crate::select::{Batch, batches};
use crate::source::Dirty;
use protocol::handshake::SEED;
use protocol::page::PageSet;
use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How long to compare: half of the time for which a receiver waits for a sender that says nothing. What is left then is sent.
const COMPARE_LIMIT: Duration = Duration::from_secs(5);

/// What memory at the destination began with.
#[derive(Debug, Default)]
pub(super) struct There {
    /// As it is here, or dirty.
    pub(super) same: Vec<PageSet>,
    /// Taken here, and not as it is there: the first round sends it.
    differs: Vec<PageSet>,
}

impl Outbound<'_> {
    /// The checkpoint to offer.
    pub(super) fn seed(&self) -> Option<&Arc<Seed>> {
        self.options.seed.as_ref().filter(|_| self.agreed.contains(&SEED))
    }

    /// The destination's memory is as the checkpoint has it.
    pub(super) fn is_seeded(&mut self, pages: u64) -> Result<()> {
        if self.seed().is_none() {
            return Err(out_of_order("Accept of an offer without a checkpoint", "Seeded"));
        }
        tracing::info!(pages, "the destination begins with a checkpoint");
        self.there = Some(There::default());
        Ok(())
    }

    /// From where on writes count when tracking begins.
    pub(super) fn dirty_at_first(&self) -> Dirty {
        if self.there.is_some() { Dirty::SinceBaseline } else { Dirty::Everything }
    }

    /// Tracked: finds out what of the checkpoint need not be sent.
    pub(super) fn find_what_is_there(&mut self) -> Result<()> {
        let (Some(_), Some(seed)) = (&self.there, self.seed().cloned()) else { return Ok(()) };
        let dirty = self.source.harvest()?;
        let there = if self.source.baseline() == Some(seed.name().checkpoint) {
            let clean = dirty.iter().map(|dirty| {
                let mut clean = PageSet::full(dirty.pages());
                clean.subtract(dirty);
                clean
            });
            There { same: clean.collect(), differs: Vec::new() }
        } else {
            self.compare(&seed)?
        };
        let data = there.same.iter().zip(seed.data());
        self.report.seeded_pages = data
            .map(|(same, data)| {
                let mut data = data.clone();
                data.intersect(same);
                data.count()
            })
            .sum();
        tracing::info!(pages = self.report.seeded_pages, "need not be sent");
        self.there = Some(there);
        Ok(())
    }

    fn compare(&mut self, seed: &Seed) -> Result<There> {
        let begun = Instant::now();
        for Batch { space, first, count, .. } in batches(seed.data()) {
            self.cancel.check()?;
            self.take(space, first, count)?;
        }
        let mut differs = seed.data().to_vec();
        let mut same: Vec<_> = differs.iter().map(|data| PageSet::empty(data.pages())).collect();
        let (mut scratch, mut live) = (Scratch::default(), Vec::new());
        for extent in 0..seed.extents() {
            self.cancel.check()?;
            if begun.elapsed() > COMPARE_LIMIT {
                break;
            }
            let source = self.source.as_ref();
            let mut read = |run, buffer: &mut [u8]| source.read(run, buffer);
            if let Err(error) = seed.compare(extent, &mut scratch, &mut live, &mut read, &mut same) {
                // The destination has read it all, and this end can do without.
                tracing::warn!(%error, "a part of the checkpoint cannot be compared, and is sent");
                break;
            }
        }
        differs.iter_mut().zip(&same).for_each(|(differs, same)| differs.subtract(same));
        // A batch is wider than what it is made for: what it took besides is sent, too.
        for (space, differs) in differs.iter_mut().enumerate() {
            if let Some(taken) = self.taken.get(space) {
                differs.union(taken);
            }
            if let Some(same) = same.get(space) {
                differs.subtract(same);
            }
        }
        Ok(There { same, differs })
    }

    /// In the first round: what was taken to be compared, and must be sent.
    pub(super) fn add_what_differs(&self, dirty: &mut [PageSet]) {
        let differs = self.there.iter().flat_map(|there| &there.differs);
        dirty.iter_mut().zip(differs).for_each(|(dirty, differs)| dirty.union(differs));
    }

    /// Pages of a space that may be something else than zeros at the destination.
    pub(super) fn written_there(&self, space: usize) -> Option<Cow<'_, PageSet>> {
        let taken = self.taken.get(space)?;
        let seeded = self.there.as_ref().and(self.seed()).and_then(|seed| seed.data().get(space));
        Some(seeded.map_or(Cow::Borrowed(taken), |seeded| {
            let mut written = taken.clone();
            written.union(seeded);
            Cow::Owned(written)
        }))
    }
}

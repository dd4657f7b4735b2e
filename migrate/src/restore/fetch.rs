//! From stored bytes to checked pages.

use super::plan::{Need, Part, Plan};
use crate::error::{Error, Result};
use crate::vault::{SegmentReader, Unpacker, Vault};
use protocol::checkpoint::manifest::Segment;
use protocol::page::{PAGE_SIZE, PageRun};
use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;

/// Threads that look for segments, at most, besides the one that asks for it.
const OPENING: usize = 8;

/// Segments that are looked for before it is known whether they are needed, at most: each is an open file, and the VMM needs some, too.
const MOST_EARLY: usize = 256;

/// Where pages go: a run, and its bytes.
pub(crate) type Sink<'a> = dyn FnMut(PageRun, &[u8]) -> Result<()> + 'a;

/// A segment that is found once; whoever needs it meanwhile waits.
type Slot = Mutex<Option<Arc<SegmentReader>>>;

fn locked(slot: &Slot) -> MutexGuard<'_, Option<Arc<SegmentReader>>> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Looks for the segments that a chain speaks of while it is not known yet which of them are needed: where nobody opened a hundred files
/// lately, a start waited 12 ms for finding them (docs/performance.md, "Restoring"). What it does not find, or not in time, is found later or is told then. Dropped,
/// it begins with no other.
pub(crate) struct Early {
    vault: Vault,
    slots: Mutex<HashMap<Segment, Arc<Slot>>>,
    stop: Arc<AtomicBool>,
}

impl Early {
    pub(crate) fn new(vault: Vault) -> Self {
        Self { vault, slots: Mutex::default(), stop: Arc::default() }
    }

    /// Begins with some segments, unless they are few.
    pub(crate) fn look_for<'a>(&self, segments: impl IntoIterator<Item = &'a Segment>) {
        let segments: Vec<_> = segments.into_iter().take(MOST_EARLY).cloned().collect();
        let threads = OPENING.min(segments.len() / OPENING);
        if threads == 0 {
            return;
        }
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slotted =
            segments.into_iter().map(|segment| (segment.clone(), slots.entry(segment).or_default().clone()));
        let slotted: Arc<[_]> = slotted.collect();
        drop(slots);
        let next = Arc::new(AtomicUsize::new(0));
        for _ in 0..threads {
            let (vault, slotted, next, stop) =
                (self.vault.clone(), slotted.clone(), next.clone(), self.stop.clone());
            let look = move || {
                while let Some((segment, slot)) = slotted.get(next.fetch_add(1, Relaxed))
                    && !stop.load(Relaxed)
                {
                    let mut slot = locked(slot);
                    if slot.is_none() {
                        *slot = SegmentReader::open(&vault, segment).ok().map(Arc::new);
                    }
                }
            };
            if thread::Builder::new().name("early".into()).spawn(look).is_err() {
                return;
            }
        }
    }

    fn slot(&self, segment: &Segment) -> Arc<Slot> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner).get(segment).cloned().unwrap_or_default()
    }
}

impl Drop for Early {
    fn drop(&mut self) {
        self.stop.store(true, Relaxed);
    }
}

/// The segments of a plan. Several threads may read at once, each with a [`Scratch`] of its own.
pub(crate) struct Fetch {
    vault: Vault,
    plan: Plan,
    readers: Vec<Arc<Slot>>,
    /// The sums that only the merged index has, once [`Fetch::bring_sums`] has brought them: none if they cannot be read.
    merged_sums: OnceLock<Option<Vec<u64>>>,
}

/// What a thread reads into.
#[derive(Default)]
pub(crate) struct Scratch {
    stored: Vec<u8>,
    unpacker: Unpacker,
}

/// How an extent is read.
enum Way<'a> {
    /// All of it, checked by its digest.
    Whole(Range<u64>),
    /// Only what is needed, checked page by page: the range of each part, and its sums.
    Parts(Vec<(Range<u64>, &'a [u64])>),
}

impl Fetch {
    /// `early` may have found some of the segments.
    pub(crate) fn new(vault: Vault, plan: Plan, early: Option<&Early>) -> Self {
        let slot = |segment| early.map(|early| early.slot(segment)).unwrap_or_default();
        let readers = plan.segments.iter().map(slot).collect();
        Self { vault, plan, readers, merged_sums: OnceLock::new() }
    }

    /// What is read.
    pub(crate) fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Finds every segment that will be read, and that it is as long as it must be. Several are looked for at once: each may have to wait
    /// for a disk or a network.
    ///
    /// # Errors
    /// `Store` naming one that is not.
    pub(crate) fn open_all(&self) -> Result<()> {
        let next = AtomicUsize::new(0);
        let open = || {
            let segments = std::iter::from_fn(|| Some(next.fetch_add(1, Relaxed)));
            let opened = segments
                .take_while(|segment| *segment < self.readers.len())
                .try_for_each(|segment| self.reader(segment).map(drop));
            // The others need not go on.
            opened.inspect_err(|_| next.store(self.readers.len(), Relaxed))
        };
        thread::scope(|scope| {
            let helpers = OPENING.min(self.readers.len() / OPENING);
            let spawn = |_| thread::Builder::new().name("segments".into()).spawn_scoped(scope, open);
            // Where no more threads are to be had, fewer do it.
            let helpers: Vec<_> = (0..helpers).map_while(|number| spawn(number).ok()).collect();
            let opened = open();
            let ended = |_| Err(Error::Host("a thread that opened segments ended unexpectedly".into()));
            helpers.into_iter().fold(opened, |all, helper| all.and(helper.join().unwrap_or_else(ended)))
        })
    }

    /// Reads some neighbouring extents of one segment with one request, checks them, and gives what is needed of them.
    ///
    /// # Errors
    /// `Store` naming checkpoint and object, or the sink's.
    pub(super) fn group(
        &self,
        group: Range<usize>,
        scratch: &mut Scratch,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let needs = self.plan.needs.get(group).unwrap_or_default();
        let Some(first) = needs.first() else { return Ok(()) };
        let segment = first.segment as usize;
        let reader = self.reader(segment)?;
        let read = self.read(&reader, needs, scratch, sink);
        if read.as_ref().is_err_and(is_of_the_store) {
            // What was put back in its place, or mounted again, is found only by opening it anew.
            *self.slot(segment)? = None;
        }
        read
    }

    /// Reads one extent.
    ///
    /// # Errors
    /// As `group`.
    pub(crate) fn one(&self, extent: usize, scratch: &mut Scratch, sink: &mut Sink<'_>) -> Result<()> {
        self.group(extent..extent + 1, scratch, sink)
    }

    fn read(
        &self,
        reader: &SegmentReader,
        needs: &[Need],
        scratch: &mut Scratch,
        sink: &mut Sink<'_>,
    ) -> Result<()> {
        let ways: Vec<_> = needs.iter().map(|need| self.way(reader, need)).collect();
        let mut ranges = Vec::with_capacity(needs.len());
        for way in &ways {
            match way {
                Way::Whole(range) => ranges.push(range.clone()),
                Way::Parts(parts) => ranges.extend(parts.iter().map(|(range, _)| range.clone())),
            }
        }
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        // At most some extents, whose lengths are bounded; nothing is cleared that is overwritten anyway.
        scratch.stored.resize(bytes as usize, 0);
        match ranges.as_slice() {
            [range] => reader.fetch(range.start, &mut scratch.stored)?,
            ranges => reader.fetch_ranges(ranges, &mut scratch.stored)?,
        }
        let mut rest = scratch.stored.as_slice();
        let mut next = |range: &Range<u64>| {
            let (bytes, behind) = rest.split_at((range.end - range.start) as usize);
            rest = behind;
            bytes
        };
        for (need, way) in needs.iter().zip(&ways) {
            match way {
                Way::Whole(range) => {
                    let pages = reader.decode(&need.extent, next(range), &mut scratch.unpacker)?;
                    for part in self.plan.parts(need) {
                        sink(part.run(), bytes_of(part, pages)?)?;
                    }
                }
                Way::Parts(ranges) => {
                    for ((range, sums), part) in ranges.iter().zip(self.plan.parts(need)) {
                        let pages = reader.decode_part(
                            &need.extent,
                            part.page,
                            sums,
                            next(range),
                            &mut scratch.unpacker,
                        )?;
                        sink(part.run(), pages)?;
                    }
                }
            }
        }
        Ok(())
    }

    /// Pages of a raw extent are read alone where few of it are needed, and their sums are known.
    fn way(&self, reader: &SegmentReader, need: &Need) -> Way<'_> {
        let parts = self.plan.parts(need);
        let few = need.is_few(self.plan.pages(need));
        let merged = self.merged_sums.get().and_then(Option::as_deref);
        let alone = |part: &Part| {
            // No part leaves its extent of at most 256 pages.
            let range = reader.part(&need.extent, part.page, part.run().count as u16)?;
            Some((range, self.plan.sums(part, merged)?))
        };
        let ranges = few.then(|| parts.iter().map(alone).collect()).flatten();
        ranges.map_or_else(|| Way::Whole(reader.whole(&need.extent)), Way::Parts)
    }

    /// Reads the sums beside the merged index, if pages are read alone that need them. Without them, and until they are there, extents are
    /// read whole, which is as good; of many it takes longer, and of the first that a workload waits for it does not: to read 6 MB of sums
    /// and check them took it 9 ms (docs/performance.md, "Restoring").
    pub(crate) fn bring_sums(&self) {
        let Some((id, part, pages)) = self.plan.merged_sums.as_ref() else { return };
        let needed = |need: &Need| {
            self.plan.parts(need).iter().any(Plan::needs_merged_sums) && need.is_few(self.plan.pages(need))
        };
        if self.plan.needs.iter().any(needed) {
            self.merged_sums.get_or_init(|| {
                let sums = self.vault.merged_sums(*id, part, *pages);
                sums.inspect_err(|error| tracing::warn!(%error, "whole extents are read instead of pages"))
                    .ok()
            });
        }
    }

    fn slot(&self, segment: usize) -> Result<MutexGuard<'_, Option<Arc<SegmentReader>>>> {
        let slot = self.readers.get(segment);
        let slot = slot.ok_or_else(|| Error::Store(format!("there is no segment {segment} in the plan")))?;
        Ok(locked(slot))
    }

    fn reader(&self, segment: usize) -> Result<Arc<SegmentReader>> {
        let mut slot = self.slot(segment)?;
        if let Some(reader) = &*slot {
            return Ok(Arc::clone(reader));
        }
        let reader = Arc::new(SegmentReader::open(&self.vault, &self.plan.segments[segment])?);
        *slot = Some(Arc::clone(&reader));
        Ok(reader)
    }
}

/// Whether it is the store that did not do its part.
pub(super) fn is_of_the_store(error: &Error) -> bool {
    matches!(error.root(), Error::Store(_))
}

/// The bytes of a part in its extent's pages.
fn bytes_of<'a>(part: &Part, pages: &'a [u8]) -> Result<&'a [u8]> {
    let start = usize::from(part.page) * PAGE_SIZE;
    pages.get(start..start + part.run().bytes()).ok_or_else(|| {
        let run = part.run();
        Error::Store(format!("pages {}+{} leave their extent", run.first, run.count))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::sample;
    use protocol::checkpoint::name;

    #[test]
    fn what_was_found_early_is_taken_and_what_was_not_is_found_or_told() {
        let vault = sample::vault();
        let (links, _) = sample::chain(&vault, 30);
        let segments: Vec<_> = links.iter().flat_map(|link| link.manifest.segments.clone()).collect();
        let lost = segments.last().unwrap().clone();
        let plan = || {
            let mut plan = Plan::default();
            plan.segments.clone_from(&segments);
            plan
        };
        let early = Early::new(vault.clone());
        early.look_for(&segments);
        let fetch = Fetch::new(vault.clone(), plan(), Some(&early));
        fetch.open_all().unwrap();
        let first = Arc::as_ptr(&fetch.reader(0).unwrap());
        let again = Fetch::new(vault.clone(), plan(), Some(&early));
        assert_eq!(Arc::as_ptr(&again.reader(0).unwrap()), first, "found twice");
        // Few are not worth a thread.
        let early = Early::new(vault.clone());
        early.look_for(&segments[..2]);
        assert!(early.slots.lock().unwrap().is_empty());
        vault.store().delete(&name::segment(lost.checkpoint, lost.number)).unwrap();
        early.look_for(&segments);
        let lost = name::segment(lost.checkpoint, lost.number);
        let told = Fetch::new(vault, plan(), Some(&early)).open_all().unwrap_err().to_string();
        assert!(told.contains(&lost), "{told}");
    }
}

//! From loads to segments: zeros are told apart, the rest is packed where that pays, summed and written.
//!
//! Several writers work side by side, each on a segment of its own: while one waits for a segment to be durable, another writes.

use super::known::{Candidate, Known, Prover, without};
use super::packing::Packing;
use super::placement::{Lying, Written};
use super::stage::{Load, Stage};
use crate::error::{Error, Result};
use crate::vault::{SegmentWriter, Vault, ZSTD_EXTENT_PAGES};
use protocol::checkpoint::index::{At, Placed};
use protocol::checkpoint::manifest::Segment;
use protocol::checkpoint::name::CheckpointId;
use protocol::checkpoint::segment::Encoding;
use protocol::page::{PAGE_SIZE, PageRun};
use protocol::payload::is_zero;
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

/// A segment is full once it has so many bytes.
const SEGMENT_BYTES: u64 = 64 << 20;

/// Writers: one for each core of a small host. More would only wait for the store.
const WRITERS: usize = 2;

/// What the writers did so far, for whoever watches.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// Bytes of pages in segments, as they are stored.
    stored_bytes: AtomicU64,
    /// Pages with data.
    data_pages: AtomicU64,
    /// Pages of zeros.
    zero_pages: AtomicU64,
    /// Pages that were read again before they were written.
    stale_pages: AtomicU64,
    /// The number of the next segment, and so how many were begun.
    segments: AtomicU32,
}

impl Progress {
    /// Bytes of pages in segments, as they are stored.
    pub(super) fn stored_bytes(&self) -> u64 {
        self.stored_bytes.load(Ordering::Relaxed)
    }

    /// Pages written with data, each as often as it was.
    pub(super) fn data_pages(&self) -> u64 {
        self.data_pages.load(Ordering::Relaxed)
    }

    /// Pages looked at, each as often as it was.
    pub(super) fn pages(&self) -> u64 {
        let looked = [&self.data_pages, &self.zero_pages, &self.stale_pages];
        looked.iter().map(|pages| pages.load(Ordering::Relaxed)).sum()
    }

    /// Segments that were begun.
    pub(super) fn segments(&self) -> u32 {
        self.segments.load(Ordering::Relaxed)
    }
}

/// Where to, and how.
#[derive(Clone)]
pub(super) struct Target<'a> {
    pub(super) vault: &'a Vault,
    pub(super) id: CheckpointId,
    /// Whether pages may be packed.
    pub(super) pack: bool,
    /// What lies there already.
    pub(super) known: Arc<Known>,
}

/// The writers of one checkpoint. Dropped, they end once nothing is queued any more.
pub(super) struct Writers<'scope> {
    stage: Stage,
    threads: Vec<ScopedJoinHandle<'scope, Output>>,
}

/// What one writer wrote.
#[derive(Default)]
pub(super) struct Output {
    written: Written,
    segments: Vec<(u32, Segment)>,
}

impl<'scope> Writers<'scope> {
    /// Starts them.
    pub(super) fn start<'env: 'scope>(
        scope: &'scope Scope<'scope, 'env>,
        stage: &Stage,
        target: &Target<'env>,
        progress: &'env Progress,
    ) -> Self {
        let start = |_| {
            let (stage, target) = (stage.clone(), target.clone());
            scope.spawn(move || {
                let _guard = Guard(&stage);
                let writer = Writer {
                    target: &target,
                    progress,
                    prover: Prover::default(),
                    referred: HashMap::new(),
                    segment: None,
                    output: Output::default(),
                    packing: Packing::default(),
                };
                writer.run(&stage).unwrap_or_else(|error| {
                    stage.fail(error);
                    Output::default()
                })
            })
        };
        Self { threads: (0..WRITERS).map(start).collect(), stage: stage.clone() }
    }

    /// Whether all of them have ended.
    pub(super) fn are_done(&self) -> bool {
        self.threads.iter().all(ScopedJoinHandle::is_finished)
    }

    /// Waits for their end: what they wrote, all of which is durable, and its segments in the order of their numbers.
    ///
    /// # Errors
    /// Why one of them failed.
    pub(super) fn join(mut self) -> Result<(Written, Vec<Segment>)> {
        self.stage.close();
        let (mut written, mut segments) = (Written::default(), Vec::new());
        for thread in self.threads.drain(..) {
            let output = thread.join().map_err(|_| Error::Host("a thread that writes died".into()))?;
            written.append(output.written);
            segments.extend(output.segments);
        }
        self.stage.check()?;
        segments.sort_by_key(|(number, _)| *number);
        Ok((written, segments.into_iter().map(|(_, segment)| segment).collect()))
    }
}

impl Drop for Writers<'_> {
    fn drop(&mut self) {
        self.stage.close();
    }
}

/// Whoever waits for a writer must not wait for one that died.
struct Guard<'a>(&'a Stage);

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(Error::Host("a thread that writes died".into()));
        }
    }
}

struct Writer<'a> {
    target: &'a Target<'a>,
    progress: &'a Progress,
    prover: Prover,
    /// Of known extents that pages lie in: their positions among the written ones.
    referred: HashMap<u32, u32>,
    segment: Option<Open>,
    output: Output,
    packing: Packing,
}

struct Open {
    number: u32,
    writer: SegmentWriter,
}

impl Writer<'_> {
    fn run(mut self, stage: &Stage) -> Result<Output> {
        while let Some(Load { number, runs, mut buffer, stale, .. }) = stage.next() {
            self.write(number, &runs, stale, &mut buffer)?;
            stage.written(buffer);
        }
        self.finish_segment()?;
        Ok(self.output)
    }

    fn write(&mut self, load: u64, runs: &[PageRun], stale: u64, buffer: &mut [u8]) -> Result<()> {
        let mut data = self.part(load, runs, stale, buffer);
        if !self.target.known.is_empty() {
            data = self.share(load, data, buffer);
        }
        let bytes = &buffer[..data.iter().map(PageRun::bytes).sum()];
        self.progress.data_pages.fetch_add((bytes.len() / PAGE_SIZE) as u64, Ordering::Relaxed);
        // Whether packing pays is found out with the first few pages.
        let mut packs = self.target.pack && !bytes.is_empty() && self.packing.try_next();
        let mut at = 0;
        while at < bytes.len() {
            let most = if packs { usize::from(ZSTD_EXTENT_PAGES) * PAGE_SIZE } else { bytes.len() };
            let part = &bytes[at..bytes.len().min(at + most)];
            let (extent, packed) = self.append(part, packs)?;
            self.place(load, runs_of(&data, at / PAGE_SIZE, part.len() / PAGE_SIZE), extent, 0);
            if packs {
                self.packing.tried(packed);
                packs = packed;
            }
            at += part.len();
        }
        Ok(())
    }

    /// Notes the zeros among some pages, passes over those that are stale, and moves the bytes of the others to the front. Answers their
    /// runs.
    fn part(&mut self, load: u64, runs: &[PageRun], mut stale: u64, buffer: &mut [u8]) -> Vec<PageRun> {
        let mut data: Vec<PageRun> = Vec::with_capacity(runs.len());
        let (mut from, mut to) = (0, 0);
        for run in runs {
            for page in run.first..run.end() {
                let one = PageRun { space: run.space, first: page, count: 1 };
                let is_stale = stale & 1 == 1;
                stale >>= 1;
                if is_stale {
                    self.progress.stale_pages.fetch_add(1, Ordering::Relaxed);
                } else if is_zero(&buffer[from..from + PAGE_SIZE]) {
                    let placed = Placed { run: one, at: At::Zeros };
                    match self.output.written.lying.last_mut() {
                        Some(last) if last.load == load && last.placed.run.end() == page => {
                            last.placed.run.count += 1;
                        }
                        _ => self.output.written.lying.push(Lying { load, placed }),
                    }
                    self.progress.zero_pages.fetch_add(1, Ordering::Relaxed);
                } else {
                    if from != to {
                        buffer.copy_within(from..from + PAGE_SIZE, to);
                    }
                    to += PAGE_SIZE;
                    match data.last_mut() {
                        Some(last) if last.end() == page => last.count += 1,
                        _ => data.push(one),
                    }
                }
                from += PAGE_SIZE;
            }
        }
        data
    }

    /// Writes an extent. Answers its position, and whether it was worth packing.
    fn append(&mut self, bytes: &[u8], pack: bool) -> Result<(u32, bool)> {
        if self.segment.as_ref().is_some_and(|open| open.writer.bytes() >= SEGMENT_BYTES) {
            self.finish_segment()?;
        }
        let open = match &mut self.segment {
            Some(open) => open,
            none => {
                let number = self.progress.segments.fetch_add(1, Ordering::Relaxed);
                let writer = SegmentWriter::begin(self.target.vault, self.target.id, number)?;
                none.insert(Open { number, writer })
            }
        };
        let mut sums = Vec::with_capacity(bytes.len() / PAGE_SIZE);
        let extent = open.writer.append(bytes, pack, &mut sums)?;
        let stored_bytes = u64::from(extent.stored_bytes);
        self.progress.stored_bytes.fetch_add(stored_bytes, Ordering::Relaxed);
        let extents = &mut self.output.written.extents;
        extents.push((extent, sums));
        Ok((extents.len() as u32 - 1, extent.encoding == Encoding::Zstd))
    }

    /// Notes where runs lie: in an extent, one behind the other from a page on.
    fn place(&mut self, load: u64, runs: impl Iterator<Item = PageRun>, extent: u32, mut page: u16) {
        for run in runs {
            let placed = Placed { run, at: At::Extent { extent, page } };
            self.output.written.lying.push(Lying { load, placed });
            page += run.count as u16;
        }
    }

    /// Looks for pages that lie in the store already, and refers to them. Answers the runs of the others, whose bytes are at the front.
    fn share(&mut self, load: u64, data: Vec<PageRun>, buffer: &mut [u8]) -> Vec<PageRun> {
        let Target { vault, known, .. } = self.target;
        let bytes: usize = data.iter().map(PageRun::bytes).sum();
        let shared = self.prover.shared(vault, known, &buffer[..bytes]);
        if shared.is_empty() {
            return data;
        }
        for Candidate { first, pages, extent: number, page } in &shared {
            let Some((extent, sums)) = known.extent(*number) else { continue };
            let written = &mut self.output.written;
            let position = *self.referred.entry(*number).or_insert_with(|| {
                written.extents.push((*extent, sums.clone()));
                written.extents.len() as u32 - 1
            });
            self.place(load, runs_of(&data, *first, *pages), position, *page);
        }
        without(&shared, &data, &mut buffer[..bytes])
    }

    fn finish_segment(&mut self) -> Result<()> {
        if let Some(Open { number, writer, .. }) = self.segment.take() {
            self.output.segments.push((number, writer.finish()?));
        }
        Ok(())
    }
}

/// The part of some runs that begins behind so many of their pages and has so many.
pub(super) fn runs_of(runs: &[PageRun], skip: usize, pages: usize) -> impl Iterator<Item = PageRun> + '_ {
    let (mut skip, mut left) = (skip as u64, pages as u64);
    runs.iter().filter_map(move |run| {
        let skipped = skip.min(u64::from(run.count));
        let count = left.min(u64::from(run.count) - skipped);
        skip -= skipped;
        left -= count;
        (count > 0).then(|| PageRun { first: run.first + skipped, count: count as u32, ..*run })
    })
}

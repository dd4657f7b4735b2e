//! The page streams of the sender, each with a thread that encodes and writes.
//!
//! The engine's own thread reads memory into fresh buffers; a lane finds the zero pages in them, sums the frames and
//! hands them to its stream without copying. So reading overlaps with encoding and with sending. How much is read
//! ahead is bounded for all lanes together, by [`BUFFERS`], whatever their number and the guest's size.

use super::encode::{Encoder, Packs, Plan, Work};
use crate::cap::Cap;
use crate::error::{Error, Result};
use crate::link::{Link, PageSender};
use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use protocol::frame::{Frame, StreamPreamble, stream_of};
use protocol::page::PageRun;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most pieces that were read and not yet taken by the link: 16 MiB at 1 MiB each.
const BUFFERS: usize = 16;

/// What one write is filled up to, in bytes, as long as more is waiting.
const WRITE_BYTES: u64 = 1 << 20;

/// Stack of a lane: it has a few hundred bytes of locals.
const STACK_BYTES: usize = 256 << 10;

/// How long a wait for a free buffer goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

/// The page streams.
pub(super) struct Lanes {
    jobs: Vec<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    free_buffers: Receiver<()>,
    shared: Arc<Shared>,
    plan: Plan,
}

/// What the lanes handed to the link so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    /// Those of `pages` that went as less than they are.
    pub(super) packed_pages: u64,
    pub(super) bytes: u64,
}

#[derive(Default)]
struct Shared {
    pages: AtomicU64,
    zero_pages: AtomicU64,
    packed_pages: AtomicU64,
    bytes: AtomicU64,
    failure: Mutex<Option<Error>>,
}

enum Job {
    Pages { round: u32, frozen: bool, runs: Vec<PageRun>, contents: Contents },
    RoundEnd { round: u32 },
}

/// What the pages of some runs hold.
pub(super) enum Contents {
    /// The runs' bytes, one behind the other.
    Bytes(Bytes),
    /// Nothing but zeros.
    Zeros,
}

impl Lanes {
    /// Before the destination accepted there are none.
    pub(super) fn none() -> Self {
        let (_, free_buffers) = bounded(0);
        Self {
            jobs: Vec::new(),
            threads: Vec::new(),
            free_buffers,
            shared: Arc::default(),
            plan: Plan::new(Packs::Never, &[]),
        }
    }

    /// Opens `streams` page streams, which together send no faster than `cap`.
    pub(super) fn open(link: &mut dyn Link, streams: u16, plan: Plan, cap: &Cap) -> Result<Self> {
        let (free, free_buffers) = bounded(BUFFERS);
        let mut lanes = Self { free_buffers, plan, ..Self::none() };
        for _ in 0..BUFFERS {
            // There is room for exactly as many.
            let _ = free.try_send(());
        }
        for number in 0..streams {
            let stream = link.open_page_stream()?;
            let (jobs, todo) = unbounded();
            let (free, shared) = (free.clone(), lanes.shared.clone());
            let (plan, cap) = (lanes.plan.clone(), cap.clone());
            let thread = std::thread::Builder::new()
                .name(format!("pages-out-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || {
                    let lane = Lane {
                        stream,
                        encoder: Encoder::new(plan.clone(), streams),
                        plan,
                        cap,
                        free,
                        shared: &shared,
                    };
                    shared.note(lane.run(number, &todo));
                })
                .map_err(|error| Error::Host(format!("could not start a thread: {error}")))?;
            lanes.jobs.push(jobs);
            lanes.threads.push(thread);
        }
        Ok(lanes)
    }

    /// Counts on from what earlier lanes of the same migration sent.
    pub(super) fn counting_from(self, sent: Sent) -> Self {
        self.shared.count_pages(sent);
        self.shared.bytes.fetch_add(sent.bytes, Relaxed);
        self
    }

    /// Waits until one more piece may be in memory; `watch` is called before every slice of the wait.
    pub(super) fn reserve(&self, stall: Duration, mut watch: impl FnMut() -> Result<()>) -> Result<()> {
        let (mut still_since, mut moved) = (Instant::now(), self.sent().bytes);
        loop {
            watch()?;
            self.check()?;
            match self.free_buffers.recv_timeout(SLICE) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => {}
                // All lanes ended; the reason may be noted a moment later.
                Err(RecvTimeoutError::Disconnected) => {
                    self.check()?;
                    return Err(Error::Link("all page streams ended".into()));
                }
            }
            let now = self.sent().bytes;
            if now != moved {
                (still_since, moved) = (Instant::now(), now);
            } else if still_since.elapsed() >= stall {
                return Err(Error::TimedOut { what: "the destination to take pages", after: stall });
            }
        }
    }

    /// Sends the runs of one piece, for which a buffer was reserved.
    pub(super) fn send(&self, round: u32, frozen: bool, runs: Vec<PageRun>, contents: Contents) {
        let Some(first) = runs.first() else { return };
        let lane = stream_of(first.first, self.jobs.len() as u16);
        if let Some(jobs) = self.jobs.get(usize::from(lane)) {
            // A lane that ended has noted why, and that is found at the next check.
            let _ = jobs.send(Job::Pages { round, frozen, runs, contents });
        }
    }

    /// Pages of a new round follow.
    pub(super) fn begin_round(&self) {
        self.plan.round_begins();
    }

    /// No more pages of this round.
    pub(super) fn end_round(&self, round: u32) {
        for jobs in &self.jobs {
            // As in `send`.
            let _ = jobs.send(Job::RoundEnd { round });
        }
    }

    /// No more pages at all: the streams end behind what was sent.
    pub(super) fn finish(&mut self) {
        self.jobs.clear();
    }

    /// What was handed to the link so far.
    pub(super) fn sent(&self) -> Sent {
        let Shared { pages, zero_pages, packed_pages, bytes, .. } = &*self.shared;
        Sent {
            pages: pages.load(Relaxed),
            zero_pages: zero_pages.load(Relaxed),
            packed_pages: packed_pages.load(Relaxed),
            bytes: bytes.load(Relaxed),
        }
    }

    /// Whether every lane is well.
    ///
    /// # Errors
    /// What the first one failed with, once.
    pub(super) fn check(&self) -> Result<()> {
        match self.shared.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            Some(error) => Err(error),
            None => Ok(()),
        }
    }

    /// Waits for the threads, which end when everything is sent or the link is closed.
    /// Answers what they sent in all.
    pub(super) fn join(mut self) -> Sent {
        self.finish();
        for thread in self.threads.drain(..) {
            // A lane that panicked has failed its stream, and that was noticed.
            let _ = thread.join();
        }
        self.sent()
    }
}

impl Shared {
    fn note(&self, result: Result<()>) {
        if let Err(error) = result {
            self.failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    }

    /// Pages are counted once all of them are on their way.
    fn count_pages(&self, sent: Sent) {
        self.pages.fetch_add(sent.pages, Relaxed);
        self.zero_pages.fetch_add(sent.zero_pages, Relaxed);
        self.packed_pages.fetch_add(sent.packed_pages, Relaxed);
    }
}

/// One lane.
struct Lane<'a> {
    stream: Box<dyn PageSender>,
    encoder: Encoder,
    plan: Plan,
    cap: Cap,
    free: Sender<()>,
    shared: &'a Shared,
}

impl Lane<'_> {
    /// From the first byte of its stream to the last.
    fn run(mut self, number: u16, todo: &Receiver<Job>) -> Result<()> {
        self.stream.write(&mut [Bytes::copy_from_slice(&StreamPreamble { stream: number }.encode())])?;
        for job in todo {
            // A write costs the same for a page as for a megabyte, so what waits already goes along.
            let (mut load, mut next) = (Load::default(), Some(job));
            while let Some(job) = next {
                load.add(job, &mut self.encoder);
                next = if load.sent.bytes < WRITE_BYTES { todo.try_recv().ok() } else { None };
            }
            let begun = Instant::now();
            self.write(&mut load)?;
            self.plan.sent(&load.work, load.sent.bytes, begun.elapsed());
            self.shared.count_pages(load.sent);
            for _ in 0..load.pieces {
                // There is room for as many as were reserved.
                let _ = self.free.try_send(());
            }
        }
        Ok(())
    }

    /// Writes a load, in portions where there is a limit. The last pages of a workload that stands still are not held back:
    /// they are what the downtime was predicted for.
    fn write(&mut self, load: &mut Load) -> Result<()> {
        let mut rest = std::mem::take(&mut load.chunks);
        while !rest.is_empty() {
            let portion = if load.frozen { None } else { self.cap.portion_bytes() };
            let mut now = match portion {
                Some(bytes) => split_off_front(&mut rest, bytes),
                None => std::mem::take(&mut rest),
            };
            let bytes = now.iter().map(Bytes::len).sum::<usize>();
            if portion.is_some() {
                self.cap.take(bytes);
            }
            self.stream.write(&mut now)?;
            self.shared.bytes.fetch_add(bytes as u64, Relaxed);
        }
        Ok(())
    }
}

/// The first `bytes` of some chunks, or all there are.
fn split_off_front(chunks: &mut Vec<Bytes>, bytes: usize) -> Vec<Bytes> {
    let (mut whole, mut left) = (0, bytes);
    while let Some(chunk) = chunks.get(whole).filter(|chunk| chunk.len() <= left) {
        left -= chunk.len();
        whole += 1;
    }
    let mut front: Vec<Bytes> = chunks.drain(..whole).collect();
    if let Some(chunk) = chunks.first_mut().filter(|_| left > 0) {
        front.push(chunk.split_to(left));
    }
    front
}

/// What one write carries.
#[derive(Default)]
struct Load {
    chunks: Vec<Bytes>,
    sent: Sent,
    work: Work,
    /// Some of it is of the last round.
    frozen: bool,
    /// Buffers that were reserved for it.
    pieces: usize,
}

impl Load {
    fn add(&mut self, job: Job, encoder: &mut Encoder) {
        let sent = match job {
            Job::Pages { round, frozen, runs, contents } => {
                let (chunks, sent, work) = encoder.encode(round, frozen, &runs, &contents);
                self.chunks.extend(chunks);
                self.work = self.work.and(work);
                self.frozen |= frozen;
                self.pieces += 1;
                sent
            }
            Job::RoundEnd { round } => {
                let frame = Frame::RoundEnd { round }.encode(&[]);
                self.chunks.push(Bytes::copy_from_slice(&frame));
                Sent { bytes: frame.len() as u64, ..Sent::default() }
            }
        };
        self.sent.pages += sent.pages;
        self.sent.zero_pages += sent.zero_pages;
        self.sent.packed_pages += sent.packed_pages;
        self.sent.bytes += sent.bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_is_cut_anywhere_and_nothing_of_it_is_lost() {
        for portion in 1..12 {
            let mut rest = vec![Bytes::from("abc"), Bytes::from("defgh"), Bytes::from("i")];
            let mut found = vec![];
            while !rest.is_empty() {
                let front = split_off_front(&mut rest, portion).concat();
                assert!(front.len() == portion || rest.is_empty());
                found.extend(front);
            }
            assert_eq!(found, b"abcdefghi");
        }
    }
}

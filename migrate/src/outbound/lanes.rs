//! The page streams of the sender, each with a thread that encodes and writes.
//!
//! The engine's own thread reads memory into fresh buffers; a lane finds the zero pages in them, sums the frames and
//! hands them to its stream without copying. So reading overlaps with encoding and with sending. How much is read
//! ahead is bounded for all lanes together, by [`BUFFERS`], whatever their number and the guest's size.

use crate::error::{Error, Result};
use crate::link::{Link, PageSender};
use bytes::Bytes;
use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded, unbounded};
use protocol::frame::{Frame, HEADER_BYTES, StreamPreamble, stream_of};
use protocol::page::{PAGE_SIZE, PageRun};
use protocol::payload::{Encoding, is_zero};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The most pieces that were read and not yet taken by the link: 16 MiB at 1 MiB each.
const BUFFERS: usize = 16;

/// Below a half of its buffer, what is not zero is copied out of it: a link keeps what it has sent until it is
/// acknowledged, and a megabyte kept for the sake of one page, a thousand times, would be a gigabyte.
const KEPT_PART: usize = 2;

/// The longest payload that is copied in any case, to stand with its neighbours: 64 KiB, the most a packet carries.
const COPIED_BYTES: usize = 64 << 10;

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
}

/// What the lanes handed to the link so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sent {
    pub(super) pages: u64,
    pub(super) zero_pages: u64,
    pub(super) bytes: u64,
}

#[derive(Default)]
struct Shared {
    pages: AtomicU64,
    zero_pages: AtomicU64,
    bytes: AtomicU64,
    failure: Mutex<Option<Error>>,
}

enum Job {
    Pages { round: u32, runs: Vec<PageRun>, contents: Contents },
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
        Self { jobs: Vec::new(), threads: Vec::new(), free_buffers, shared: Arc::default() }
    }

    /// Opens `streams` page streams.
    pub(super) fn open(link: &mut dyn Link, streams: u16) -> Result<Self> {
        let (free, free_buffers) = bounded(BUFFERS);
        let mut lanes = Self { free_buffers, ..Self::none() };
        for _ in 0..BUFFERS {
            // There is room for exactly as many.
            let _ = free.try_send(());
        }
        for number in 0..streams {
            let stream = link.open_page_stream()?;
            let (jobs, todo) = unbounded();
            let (free, shared) = (free.clone(), lanes.shared.clone());
            let thread = std::thread::Builder::new()
                .name(format!("pages-out-{number}"))
                .stack_size(STACK_BYTES)
                .spawn(move || shared.note(run(number, stream, &todo, &free, &shared)))
                .map_err(|error| Error::Host(format!("could not start a thread: {error}")))?;
            lanes.jobs.push(jobs);
            lanes.threads.push(thread);
        }
        Ok(lanes)
    }

    /// Counts on from what earlier lanes of the same migration sent.
    pub(super) fn counting_from(self, sent: Sent) -> Self {
        self.shared.count(sent);
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
    pub(super) fn send(&self, round: u32, runs: Vec<PageRun>, contents: Contents) {
        let Some(first) = runs.first() else { return };
        let lane = stream_of(first.first, self.jobs.len() as u16);
        if let Some(jobs) = self.jobs.get(usize::from(lane)) {
            // A lane that ended has noted why, and that is found at the next check.
            let _ = jobs.send(Job::Pages { round, runs, contents });
        }
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
        let Shared { pages, zero_pages, bytes, .. } = &*self.shared;
        Sent { pages: pages.load(Relaxed), zero_pages: zero_pages.load(Relaxed), bytes: bytes.load(Relaxed) }
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

    fn count(&self, sent: Sent) {
        self.pages.fetch_add(sent.pages, Relaxed);
        self.zero_pages.fetch_add(sent.zero_pages, Relaxed);
        self.bytes.fetch_add(sent.bytes, Relaxed);
    }
}

/// One lane, from the first byte of its stream to the last.
fn run(
    number: u16,
    mut stream: Box<dyn PageSender>,
    todo: &Receiver<Job>,
    free: &Sender<()>,
    shared: &Shared,
) -> Result<()> {
    stream.write(&mut [Bytes::copy_from_slice(&StreamPreamble { stream: number }.encode())])?;
    for job in todo {
        // A write costs the same for a page as for a megabyte, so what waits already goes along.
        let (mut load, mut next) = (Load::default(), Some(job));
        while let Some(job) = next {
            load.add(job);
            next = if load.sent.bytes < WRITE_BYTES { todo.try_recv().ok() } else { None };
        }
        stream.write(&mut load.chunks)?;
        shared.count(load.sent);
        for _ in 0..load.pieces {
            // There is room for as many as were reserved.
            let _ = free.try_send(());
        }
    }
    Ok(())
}

/// What one write carries.
#[derive(Default)]
struct Load {
    chunks: Vec<Bytes>,
    sent: Sent,
    /// Buffers that were reserved for it.
    pieces: usize,
}

impl Load {
    fn add(&mut self, job: Job) {
        let sent = match job {
            Job::Pages { round, runs, contents } => {
                let (chunks, sent) = encode(round, &runs, &contents);
                self.chunks.extend(chunks);
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
        self.sent.bytes += sent.bytes;
    }
}

/// The frames for some runs, as chunks of bytes in their order on the stream.
fn encode(round: u32, runs: &[PageRun], contents: &Contents) -> (Vec<Bytes>, Sent) {
    let mut frames: Vec<(PageRun, Option<Bytes>)> = Vec::new();
    match contents {
        Contents::Zeros => frames.extend(runs.iter().map(|run| (*run, None))),
        Contents::Bytes(buffer) => {
            let mut rest = buffer.clone();
            for run in runs {
                let bytes = rest.split_to(run.bytes().min(rest.len()));
                split_zeros(*run, &bytes, &mut frames);
            }
        }
    }
    let buffer_bytes = if let Contents::Bytes(buffer) = contents { buffer.len() } else { 0 };
    let mut sent = Sent::default();
    for (run, bytes) in &frames {
        let pages = if bytes.is_some() { &mut sent.pages } else { &mut sent.zero_pages };
        *pages += u64::from(run.count);
    }
    let payload_bytes = sent.pages as usize * PAGE_SIZE;
    sent.bytes = (frames.len() * HEADER_BYTES + payload_bytes) as u64;
    let kept = payload_bytes >= buffer_bytes / KEPT_PART;
    (chunks(round, frames, if kept { COPIED_BYTES } else { usize::MAX }), sent)
}

/// Splits a run where its pages begin or cease to be zero.
fn split_zeros(run: PageRun, bytes: &Bytes, frames: &mut Vec<(PageRun, Option<Bytes>)>) {
    let pages: Vec<bool> = bytes.chunks(PAGE_SIZE).map(is_zero).collect();
    let mut at = 0;
    for same in pages.chunk_by(|left, right| left == right) {
        let part = PageRun { first: run.first + at as u64, count: same.len() as u32, ..run };
        let payload = bytes.slice(at * PAGE_SIZE..(at + same.len()) * PAGE_SIZE);
        frames.push((part, (!same[0]).then_some(payload)));
        at += same.len();
    }
}

/// Headers and payloads in turn. Payloads of up to `copied_bytes` are copied to stand in one chunk with their headers: a
/// transport walks over its chunks for every packet.
fn chunks(round: u32, frames: Vec<(PageRun, Option<Bytes>)>, copied_bytes: usize) -> Vec<Bytes> {
    let (mut chunks, mut gathered) = (Vec::new(), Vec::new());
    for (run, bytes) in frames {
        let encoding = if bytes.is_some() { Encoding::Raw } else { Encoding::Zero };
        let payload: &[u8] = bytes.as_deref().unwrap_or(&[]);
        let payload_bytes = payload.len() as u32;
        let frame = Frame::Pages { run, encoding, payload_bytes, round };
        gathered.extend_from_slice(&frame.encode(payload));
        match bytes {
            Some(bytes) if bytes.len() > copied_bytes => {
                chunks.push(std::mem::take(&mut gathered).into());
                chunks.push(bytes);
            }
            _ => gathered.extend_from_slice(payload),
        }
    }
    if !gathered.is_empty() {
        chunks.push(gathered.into());
    }
    chunks
}

#[cfg(test)]
mod tests {
    use super::*;
    use protocol::page::SpaceId;

    const SPACE: SpaceId = SpaceId(0);

    fn frames_of(mut bytes: &[u8]) -> Vec<(Frame, Vec<u8>)> {
        let mut frames = vec![];
        while let Some((header, rest)) = bytes.split_first_chunk::<HEADER_BYTES>() {
            let (frame, mut sum) = Frame::decode(header).unwrap();
            let (payload, rest) = rest.split_at(frame.payload_bytes());
            sum.update(payload);
            sum.verify().unwrap();
            frames.push((frame, payload.to_vec()));
            bytes = rest;
        }
        assert!(bytes.is_empty());
        frames
    }

    #[test]
    fn zero_pages_cost_a_header_and_the_others_are_sent_whole() {
        let runs =
            [PageRun { space: SPACE, first: 5, count: 3 }, PageRun { space: SPACE, first: 20, count: 2 }];
        let mut memory = vec![0; 5 * PAGE_SIZE];
        memory[PAGE_SIZE + 7] = 1; // page 6
        memory[3 * PAGE_SIZE..].fill(2); // pages 20 and 21
        let (chunks, sent) = encode(9, &runs, &Contents::Bytes(memory.clone().into()));
        assert_eq!(sent, Sent { pages: 3, zero_pages: 2, bytes: (4 * HEADER_BYTES + 3 * PAGE_SIZE) as u64 });
        let frames = frames_of(&chunks.concat());
        let shape: Vec<_> = frames
            .iter()
            .map(|(frame, payload)| match frame {
                Frame::Pages { run, round: 9, .. } => (run.first, run.count, payload.len() / PAGE_SIZE),
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(shape, [(5, 1, 0), (6, 1, 1), (7, 1, 0), (20, 2, 2)]);
        assert_eq!(frames[1].1, memory[PAGE_SIZE..2 * PAGE_SIZE]);
        assert_eq!(frames[3].1, memory[3 * PAGE_SIZE..]);
    }

    #[test]
    fn a_buffer_is_not_kept_for_the_sake_of_one_page() {
        let run = PageRun { space: SPACE, first: 0, count: 256 };
        let mut memory = vec![0; run.bytes()];
        memory[0] = 1;
        let buffer = Bytes::from(memory);
        let (chunks, _) = encode(0, &[run], &Contents::Bytes(buffer.clone()));
        assert!(chunks.iter().all(|chunk| !buffer.as_ptr_range().contains(&chunk.as_ptr())));
    }
}

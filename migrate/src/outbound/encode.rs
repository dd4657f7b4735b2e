//! From pages to frames: for every piece of memory the way that costs least.
//!
//! ```text
//! run ─▶ zero?   a header, no payload
//!    └─▶ known?  was sent before, there or elsewhere         while looking was found to pay
//!    └─▶ delta?  was sent before, and little of it changed   likewise
//!    └─▶ packable? (one page of a piece is packed) ─ no ─▶ raw
//!            └─ yes ─▶ Choice: raw, lz4 or zstd, by what each was measured to take
//! ```

mod choice;
mod look;
mod seen;

pub(crate) use choice::{LEARNS_BYTES, PACKING_FEE, PROMISE};

use super::lanes::{Contents, Sent};
use crate::codec::{Packer, Packing};
use bytes::Bytes;
use choice::{Choice, Method, Sample};
use protocol::frame::{Frame, HEADER_BYTES};
use protocol::handshake::{DELTA_PAGES, KNOWN_PAGES, PACKED_PAGES};
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use protocol::payload::{Encoding, is_zero};
use seen::{Kind, Seen};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Below a half of its buffer, what is sent raw is copied out of it: a link keeps what it has sent until it is
/// acknowledged, and a megabyte kept for the sake of one page, a thousand times, would be a gigabyte.
const KEPT_PART: usize = 2;

/// The longest payload that is copied in any case, to stand with its neighbours: 64 KiB, the most a packet carries.
const COPIED_BYTES: usize = 64 << 10;

/// Pages that are judged and packed together: 256 KiB, which stay in a core's cache.
const PIECE_PAGES: usize = 64;

/// A sample that keeps more than this part is not packed.
pub(crate) const PACKABLE_PART: f64 = 0.85;

/// Pieces in a row that could not be packed until fewer of them are sampled, and the fewest: one in so many.
const MOST_UNSAMPLED: u32 = 8;

/// Of how many samples one is packed the other way too, so that both are known.
const OTHER_WAY: u32 = 16;

/// Which ways of sending pages may be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Packs {
    /// Whichever is measured to be the fastest.
    #[default]
    Measured,
    /// None: zero pages and raw ones.
    Never,
    /// LZ4 wherever it makes pages shorter.
    Lz4,
    /// Zstandard wherever it makes pages shorter.
    Zstd,
    /// Every way there is, wherever it makes pages shorter.
    All,
}

/// What all lanes know together.
#[derive(Clone)]
pub(super) struct Plan {
    choice: Arc<Mutex<Choice>>,
    known: Use,
    delta: Use,
}

/// When a way is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Never,
    Measured,
    Always,
}

impl Plan {
    /// Nothing measured yet; `agreed` are the capabilities of both ends.
    pub(super) fn new(packs: Packs, agreed: &[&str]) -> Self {
        let can_pack = agreed.contains(&PACKED_PAGES);
        let choice = Choice::new(|method| match (packs, method) {
            (Packs::Measured, Method::Raw) | (Packs::Never, Method::Raw) => true,
            (Packs::Lz4 | Packs::Zstd | Packs::All, Method::Raw) => !can_pack,
            (Packs::Measured | Packs::Lz4, Method::Lz4) => can_pack,
            (Packs::Measured | Packs::Zstd | Packs::All, Method::Zstd) => can_pack,
            (Packs::Never, _) | (Packs::Lz4, Method::Zstd) | (Packs::Zstd | Packs::All, Method::Lz4) => false,
        });
        let when = |capability| match packs {
            _ if !agreed.contains(&capability) => Use::Never,
            Packs::Measured => Use::Measured,
            Packs::All => Use::Always,
            Packs::Never | Packs::Lz4 | Packs::Zstd => Use::Never,
        };
        Self { choice: Arc::new(Mutex::new(choice)), known: when(KNOWN_PAGES), delta: when(DELTA_PAGES) }
    }

    pub(super) fn round_begins(&self) {
        self.lock().round_begins();
    }

    /// What was encoded was written, as so many bytes, and that took so long.
    pub(super) fn sent(&self, work: &Work, wire_bytes: u64, writing: Duration) {
        if let Some(method) = work.method {
            let ns = u64::try_from((work.encoding + writing).as_nanos()).unwrap_or(u64::MAX);
            self.lock().sent(method, work.bytes, wire_bytes, ns);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Choice> {
        self.choice.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What some frames were made of.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Work {
    /// How the pages that are not zero were sent, if all in the same way.
    method: Option<Method>,
    /// Their memory.
    bytes: u64,
    encoding: Duration,
}

impl Work {
    fn of(method: Option<Method>, pages: &[u8]) -> Self {
        Self { method, bytes: pages.len() as u64, encoding: Duration::ZERO }
    }

    /// Both together.
    pub(super) fn and(self, other: Self) -> Self {
        let method = match (self.bytes, other.bytes) {
            (_, 0) => self.method,
            (0, _) => other.method,
            _ => self.method.filter(|method| Some(*method) == other.method),
        };
        Self { method, bytes: self.bytes + other.bytes, encoding: self.encoding + other.encoding }
    }
}

/// The encoder of one lane.
pub(super) struct Encoder {
    plan: Plan,
    packer: Packer,
    seen: Seen,
    /// Pieces in a row that could not be packed.
    refused: u32,
    /// Pieces until the next sample.
    unsampled: u32,
    samples: u32,
}

/// A part of a run that is written in one way.
struct Part {
    run: PageRun,
    encoding: Encoding,
    payload: Bytes,
}

impl Encoder {
    /// One of `lanes`.
    pub(super) fn new(plan: Plan, lanes: u16) -> Self {
        let seen = Seen::new(plan.known, plan.delta, lanes);
        Self { plan, packer: Packer::new(), seen, refused: 0, unsampled: 0, samples: 0 }
    }

    /// The frames for some runs, as chunks of bytes in their order on the stream.
    pub(super) fn encode(
        &mut self,
        round: u32,
        frozen: bool,
        runs: &[PageRun],
        contents: &Contents,
    ) -> (Vec<Bytes>, Sent, Work) {
        let begun = Instant::now();
        let mut parts = Vec::new();
        let mut work = Work::default();
        match contents {
            Contents::Zeros => parts.extend(runs.iter().map(|run| self.zeros(*run))),
            Contents::Bytes(buffer) => {
                let (packs, method) = {
                    let choice = self.plan.lock();
                    self.seen.begin(round, choice.ns_per_byte());
                    (choice.packs() || self.seen.looks(), choice.using(frozen))
                };
                let mut rest = buffer.clone();
                for run in runs {
                    let bytes = rest.split_to(run.bytes().min(rest.len()));
                    for (run, bytes) in split_zeros(*run, &bytes) {
                        match bytes {
                            None => parts.push(self.zeros(run)),
                            Some(bytes) if packs => self.pieces(run, &bytes, method, &mut parts, &mut work),
                            Some(bytes) => {
                                work = work.and(Work::of(Some(Method::Raw), &bytes));
                                parts.push(Part { run, encoding: Encoding::Raw, payload: bytes });
                            }
                        }
                    }
                }
            }
        }
        let buffer_bytes = if let Contents::Bytes(buffer) = contents { buffer.len() } else { 0 };
        let mut sent = Sent::default();
        let mut raw_bytes = 0;
        for Part { run, encoding, payload } in &parts {
            let count = u64::from(run.count);
            match encoding {
                Encoding::Zero => sent.zero_pages += count,
                Encoding::Raw => (sent.pages, raw_bytes) = (sent.pages + count, raw_bytes + payload.len()),
                _ => (sent.pages, sent.packed_pages) = (sent.pages + count, sent.packed_pages + count),
            }
            sent.bytes += (HEADER_BYTES + payload.len()) as u64;
        }
        let kept = raw_bytes >= buffer_bytes / KEPT_PART;
        let chunks = chunks(round, parts, if kept { COPIED_BYTES } else { usize::MAX });
        work.encoding = begun.elapsed();
        (chunks, sent, work)
    }

    fn zeros(&mut self, run: PageRun) -> Part {
        self.seen.zeros(run);
        Part { run, encoding: Encoding::Zero, payload: Bytes::new() }
    }

    /// Splits a run without zero pages into pieces, and writes each in the way that costs least.
    fn pieces(
        &mut self,
        run: PageRun,
        bytes: &Bytes,
        method: Method,
        parts: &mut Vec<Part>,
        work: &mut Work,
    ) {
        let mut out = Out { run, bytes, parts, raw: 0..0 };
        let pages = bytes.len() / PAGE_SIZE;
        for begin in (0..pages).step_by(PIECE_PAGES) {
            let piece = begin..(begin + PIECE_PAGES).min(pages);
            if !self.seen.looks() {
                self.piece(piece, method, &mut out, work);
                continue;
            }
            let kinds: Vec<Kind> =
                piece.clone().map(|at| self.seen.kind(out.page(at), out.content(at..at + 1))).collect();
            let mut at = begin;
            for same in kinds.chunk_by(Kind::is_like) {
                let pages = at..at + same.len();
                at = pages.end;
                let content = out.content(pages.clone());
                let coded = match same[0] {
                    Kind::Known(_) => Some((Encoding::Known, Kind::payload(same))),
                    Kind::Based => {
                        let (first, packer) = (out.page(pages.start), &mut self.packer);
                        self.seen.delta(packer, first, content).map(|payload| (Encoding::Delta, payload))
                    }
                    Kind::Other => None,
                };
                self.seen.sent(out.page(pages.start), content, same);
                match coded {
                    Some((encoding, payload)) => {
                        *work = work.and(Work::of(None, content));
                        out.coded(pages, encoding, payload);
                    }
                    None => self.piece(pages, method, &mut out, work),
                }
            }
        }
        out.flush();
    }

    /// Pages of which nothing is known: packed or raw.
    fn piece(&mut self, pages: Range<usize>, method: Method, out: &mut Out<'_>, work: &mut Work) {
        let content = out.content(pages.clone());
        let packing = match method {
            _ if !self.is_packable(content) => None,
            Method::Raw => None,
            Method::Lz4 => Some(Packing::Lz4),
            Method::Zstd => Some(Packing::Zstd),
        };
        match packing.and_then(|packing| Some((packing, self.packer.pack(packing, content)?))) {
            Some((packing, packed)) => {
                *work = work.and(Work::of(Some(method), content));
                out.coded(pages, packing.encoding(), Bytes::copy_from_slice(packed));
            }
            None => {
                *work = work.and(Work::of(Some(Method::Raw), content));
                out.raw(pages);
            }
        }
    }

    /// Whether one page of a piece gets shorter. Where none does, fewer are looked at.
    fn is_packable(&mut self, piece: &[u8]) -> bool {
        if self.unsampled > 0 {
            self.unsampled -= 1;
            return false;
        }
        let pages = piece.len() / PAGE_SIZE;
        let Some(page) = piece.chunks(PAGE_SIZE).nth(pages / 2) else { return false };
        let way = self.plan.lock().sampled_by();
        let Some(sample) = self.sample(way, page).filter(|sample| sample.part <= PACKABLE_PART) else {
            self.refused = self.refused.saturating_add(1);
            self.unsampled = (self.refused / MOST_UNSAMPLED).min(MOST_UNSAMPLED - 1);
            return false;
        };
        self.refused = 0;
        self.samples = self.samples.wrapping_add(1);
        self.plan.lock().sampled(way, sample);
        if self.samples % OTHER_WAY == 1 {
            let other = if way == Method::Zstd { Method::Lz4 } else { Method::Zstd };
            if let Some(sample) = self.sample(other, page) {
                self.plan.lock().sampled(other, sample);
            }
        }
        true
    }

    fn sample(&mut self, way: Method, page: &[u8]) -> Option<Sample> {
        let packing = match way {
            Method::Raw => return None,
            Method::Lz4 => Packing::Lz4,
            Method::Zstd => Packing::Zstd,
        };
        let begun = Instant::now();
        let part = self.packer.pack(packing, page)?.len() as f64 / page.len() as f64;
        let ns_per_byte = begun.elapsed().as_nanos() as f64 / page.len() as f64;
        Some(Sample { ns_per_byte, part })
    }
}

/// The parts of a run that are made one behind the other.
struct Out<'a> {
    run: PageRun,
    bytes: &'a Bytes,
    parts: &'a mut Vec<Part>,
    /// Raw pages that follow each other, and will be one part.
    raw: Range<usize>,
}

impl<'a> Out<'a> {
    /// Where the page at this index of the run is.
    fn page(&self, at: usize) -> (SpaceId, u64) {
        (self.run.space, self.run.first + at as u64)
    }

    fn content(&self, pages: Range<usize>) -> &'a [u8] {
        &self.bytes[pages.start * PAGE_SIZE..pages.end * PAGE_SIZE]
    }

    fn part(&self, pages: Range<usize>) -> PageRun {
        PageRun { first: self.run.first + pages.start as u64, count: pages.len() as u32, ..self.run }
    }

    fn raw(&mut self, pages: Range<usize>) {
        if self.raw.is_empty() {
            self.raw = pages;
        } else {
            self.raw.end = pages.end;
        }
    }

    fn coded(&mut self, pages: Range<usize>, encoding: Encoding, payload: Bytes) {
        self.flush();
        self.parts.push(Part { run: self.part(pages), encoding, payload });
    }

    fn flush(&mut self) {
        let raw = std::mem::take(&mut self.raw);
        if !raw.is_empty() {
            let payload = self.bytes.slice(raw.start * PAGE_SIZE..raw.end * PAGE_SIZE);
            self.parts.push(Part { run: self.part(raw), encoding: Encoding::Raw, payload });
        }
    }
}

/// Splits a run where its pages begin or cease to be zero; zeros have no bytes.
fn split_zeros(run: PageRun, bytes: &Bytes) -> Vec<(PageRun, Option<Bytes>)> {
    let pages: Vec<bool> = bytes.chunks(PAGE_SIZE).map(is_zero).collect();
    let mut at = 0;
    let parts = pages.chunk_by(|left, right| left == right).map(|same| {
        let part = PageRun { first: run.first + at as u64, count: same.len() as u32, ..run };
        let payload = bytes.slice(at * PAGE_SIZE..(at + same.len()) * PAGE_SIZE);
        at += same.len();
        (part, (!same[0]).then_some(payload))
    });
    parts.collect()
}

/// Headers and payloads in turn. Payloads of up to `copied_bytes` are copied to stand in one chunk with their headers: a
/// transport walks over its chunks for every packet.
fn chunks(round: u32, parts: Vec<Part>, copied_bytes: usize) -> Vec<Bytes> {
    let (mut chunks, mut gathered) = (Vec::new(), Vec::new());
    for Part { run, encoding, payload } in parts {
        let payload_bytes = payload.len() as u32;
        let frame = Frame::Pages { run, encoding, payload_bytes, round };
        gathered.extend_from_slice(&frame.encode(&payload));
        if payload.len() > copied_bytes {
            chunks.push(std::mem::take(&mut gathered).into());
            chunks.push(payload);
        } else {
            gathered.extend_from_slice(&payload);
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

    fn encoder(packs: Packs) -> Encoder {
        Encoder::new(Plan::new(packs, &[PACKED_PAGES, DELTA_PAGES, KNOWN_PAGES]), 1)
    }

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
        let (chunks, sent, _) =
            encoder(Packs::Never).encode(9, false, &runs, &Contents::Bytes(memory.clone().into()));
        let bytes = (4 * HEADER_BYTES + 3 * PAGE_SIZE) as u64;
        assert_eq!(sent, Sent { pages: 3, zero_pages: 2, packed_pages: 0, bytes });
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
        let (chunks, ..) = encoder(Packs::Never).encode(0, false, &[run], &Contents::Bytes(buffer.clone()));
        assert!(chunks.iter().all(|chunk| !buffer.as_ptr_range().contains(&chunk.as_ptr())));
    }

    fn noise(bytes: &mut [u8]) {
        let mut state = 7u64;
        for byte in bytes {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            *byte = (state >> 56) as u8;
        }
    }

    #[test]
    fn pieces_are_packed_where_that_pays_and_come_back_in_order() {
        let run = PageRun { space: SPACE, first: 100, count: 256 };
        let mut memory = vec![b'a'; run.bytes()];
        noise(&mut memory[64 * PAGE_SIZE..192 * PAGE_SIZE]);
        memory[200 * PAGE_SIZE..201 * PAGE_SIZE].fill(0);
        let mut unpacker = crate::codec::Unpacker::new();
        for (packs, packing) in [(Packs::Lz4, Packing::Lz4), (Packs::Zstd, Packing::Zstd)] {
            let (chunks, sent, work) =
                encoder(packs).encode(1, false, &[run], &Contents::Bytes(memory.clone().into()));
            assert_eq!((sent.pages, sent.zero_pages, sent.packed_pages), (255, 1, 127));
            assert_eq!(sent.bytes as usize, chunks.concat().len());
            assert_eq!((work.method, work.bytes), (None, 255 << 12));
            let mut at = run.first;
            for (frame, payload) in frames_of(&chunks.concat()) {
                let Frame::Pages { run, encoding, .. } = frame else { panic!("{frame:?}") };
                assert_eq!(run.first, at);
                at = run.end();
                let expected = &memory[(run.first - 100) as usize * PAGE_SIZE..][..run.bytes()];
                match encoding {
                    Encoding::Zero => assert!(is_zero(expected)),
                    Encoding::Raw => assert_eq!(payload, expected),
                    _ => assert_eq!(unpacker.unpack(packing, run, &payload).unwrap(), expected),
                }
            }
            assert_eq!(at, run.end());
        }
    }

    #[test]
    fn a_peer_without_the_capability_gets_raw_pages() {
        let run = PageRun { space: SPACE, first: 0, count: 64 };
        let mut encoder = Encoder::new(Plan::new(Packs::All, &[]), 1);
        let (_, sent, _) = encoder.encode(0, false, &[run], &Contents::Bytes(vec![1; run.bytes()].into()));
        assert_eq!((sent.pages, sent.packed_pages), (64, 0));
    }

    #[test]
    fn noise_is_looked_at_less_and_less() {
        let mut encoder = encoder(Packs::Measured);
        let mut page = vec![0; PAGE_SIZE];
        noise(&mut page);
        let looked_at = (0..1000).filter(|_| {
            let before = encoder.refused;
            encoder.is_packable(&page);
            encoder.refused > before
        });
        assert!(looked_at.count() < 200);
        // And text is found again soon.
        assert!((0..MOST_UNSAMPLED).any(|_| encoder.is_packable(&[b'a'; PAGE_SIZE])));
    }
}

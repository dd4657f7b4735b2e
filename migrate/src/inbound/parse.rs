//! The bytes of one page stream, in whatever pieces they arrive, checked before anything is done with them.
//!
//! Raw payload is passed on as it comes, without being gathered: a frame whose checksum turns out wrong has been written
//! in part by then. That is sound, because a destination whose stream failed is discarded as a whole. Any other payload is
//! gathered, and handed out only once its checksum was right.

use protocol::frame::{
    Frame, FrameSum, HEADER_BYTES, PREAMBLE_BYTES, STRIPE_PAGES, StreamPreamble, stream_of,
};
use protocol::layout::Layout;
use protocol::page::{PageRun, SpaceId};
use protocol::payload::Encoding;
use protocol::{ProtocolError, Result};
use std::sync::Arc;

/// What a page stream says next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Item<'a> {
    /// Which stream this is. Always the first item.
    Stream(u16),
    /// Bytes of a run, from a byte offset of its space on.
    Bytes { space: SpaceId, offset: u64, bytes: &'a [u8] },
    /// These pages are zero.
    Zeros(PageRun),
    /// These pages stand in [`Parser::payload`], written so.
    Coded(PageRun, Encoding),
    /// This stream has no more pages of this round.
    RoundEnd(u32),
}

/// Reads one page stream.
pub(super) struct Parser {
    layout: Arc<Layout>,
    streams: u16,
    stream: u16,
    round: u32,
    /// The raw run whose payload came last.
    raw: Option<PageRun>,
    stage: Stage,
    /// The payload of a frame that can only be decoded whole, as far as it came.
    payload: Vec<u8>,
}

#[allow(
    clippy::large_enum_variant,
    reason = "one a stream; a box would be made and dropped with every frame"
)]
enum Stage {
    Preamble(Gather<PREAMBLE_BYTES>),
    Header(Gather<HEADER_BYTES>),
    Payload { space: SpaceId, offset: u64, left: usize, sum: FrameSum },
    Coded { run: PageRun, encoding: Encoding, length: usize, sum: FrameSum },
}

impl Parser {
    /// A stream out of `streams`, carrying pages of `layout`.
    pub(super) fn new(layout: Arc<Layout>, streams: u16) -> Self {
        Self {
            layout,
            streams,
            stream: 0,
            round: 0,
            raw: None,
            stage: Stage::Preamble(Gather::new()),
            payload: Vec::new(),
        }
    }

    /// The same stream of a link that was taken up in this round.
    pub(super) fn beginning_with(mut self, round: u32) -> Self {
        self.round = round;
        self
    }

    /// The run that the last [`Item::Bytes`] completed: all of it was handed out, and its sum was right.
    pub(super) fn completed(&self) -> Option<PageRun> {
        self.raw.filter(|_| matches!(self.stage, Stage::Header(_)))
    }

    /// What the last [`Item::Coded`] came with: whole, and as it was sent. Less than 1 MiB.
    pub(super) fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// The next item, taken off the front of `chunk`; `None` when more bytes are needed.
    pub(super) fn next<'a>(&mut self, chunk: &mut &'a [u8]) -> Result<Option<Item<'a>>> {
        while !chunk.is_empty() {
            match &mut self.stage {
                Stage::Preamble(gather) => {
                    let Some(bytes) = gather.fill(chunk) else { continue };
                    self.stream = StreamPreamble::decode(&bytes, self.streams)?.stream;
                    self.stage = Stage::Header(Gather::new());
                    return Ok(Some(Item::Stream(self.stream)));
                }
                Stage::Header(gather) => {
                    let Some(bytes) = gather.fill(chunk) else { continue };
                    let (frame, sum) = Frame::decode(&bytes)?;
                    if let Some(item) = self.begin(&frame, sum)? {
                        return Ok(Some(item));
                    }
                }
                Stage::Payload { space, offset, left, sum } => {
                    let (bytes, rest) = chunk.split_at(chunk.len().min(*left));
                    *chunk = rest;
                    sum.update(bytes);
                    let item = Item::Bytes { space: *space, offset: *offset, bytes };
                    *offset += bytes.len() as u64;
                    *left -= bytes.len();
                    if *left == 0 {
                        sum.verify()?;
                        self.stage = Stage::Header(Gather::new());
                    }
                    return Ok(Some(item));
                }
                Stage::Coded { run, encoding, length, sum } => {
                    // Gathered as it arrives, not as it is announced.
                    let missing = *length - self.payload.len();
                    let (bytes, rest) = chunk.split_at(chunk.len().min(missing));
                    *chunk = rest;
                    sum.update(bytes);
                    self.payload.extend_from_slice(bytes);
                    if self.payload.len() == *length {
                        sum.verify()?;
                        let item = Item::Coded(*run, *encoding);
                        self.stage = Stage::Header(Gather::new());
                        return Ok(Some(item));
                    }
                }
            }
        }
        Ok(None)
    }

    /// Checks that the stream may end here: between two frames.
    pub(super) fn end(&self) -> Result<()> {
        let (what, found, needed) = match &self.stage {
            Stage::Preamble(gather) => ("the beginning of a page stream", gather.filled, PREAMBLE_BYTES),
            Stage::Header(gather) if gather.filled == 0 => return Ok(()),
            Stage::Header(gather) => ("a page frame's header", gather.filled, HEADER_BYTES),
            Stage::Payload { left, .. } => ("a page frame's payload", 0, *left),
            Stage::Coded { length, .. } => ("a page frame's payload", self.payload.len(), *length),
        };
        Err(ProtocolError::Truncated { what, found: found as u64, needed: needed as u64 })
    }

    /// Takes a frame's header; an item when nothing follows it.
    fn begin<'a>(&mut self, frame: &Frame, sum: FrameSum) -> Result<Option<Item<'a>>> {
        let (Frame::Pages { round, .. } | Frame::RoundEnd { round }) = *frame;
        if round != self.round {
            return Err(ProtocolError::OutOfOrder {
                expected: "a frame of the round under way",
                found: format!("one of round {round} in round {}", self.round),
            });
        }
        self.stage = Stage::Header(Gather::new());
        let Frame::Pages { run, encoding, payload_bytes, .. } = *frame else {
            sum.verify()?;
            self.round = round
                .checked_add(1)
                .ok_or(ProtocolError::Value { what: "the number of a round", found: u64::from(round) })?;
            return Ok(Some(Item::RoundEnd(round)));
        };
        self.layout.check(&run)?;
        let one_stripe = run.first / STRIPE_PAGES == (run.end() - 1) / STRIPE_PAGES;
        if !one_stripe || stream_of(run.first, self.streams) != self.stream {
            return Err(ProtocolError::OutOfOrder {
                expected: "pages that belong to this page stream",
                found: format!("pages {}+{} on stream {}", run.first, run.count, self.stream),
            });
        }
        match encoding {
            Encoding::Zero => {
                sum.verify()?;
                Ok(Some(Item::Zeros(run)))
            }
            Encoding::Raw => {
                let (space, offset, left) = (run.space, run.offset(), payload_bytes as usize);
                self.raw = Some(run);
                self.stage = Stage::Payload { space, offset, left, sum };
                Ok(None)
            }
            Encoding::Zstd | Encoding::Lz4 | Encoding::Delta | Encoding::Known => {
                self.payload.clear();
                self.stage = Stage::Coded { run, encoding, length: payload_bytes as usize, sum };
                Ok(None)
            }
        }
    }
}

/// A few bytes that may come in pieces.
struct Gather<const N: usize> {
    bytes: [u8; N],
    filled: usize,
}

impl<const N: usize> Gather<N> {
    fn new() -> Self {
        Self { bytes: [0; N], filled: 0 }
    }

    /// Takes what is missing off the front of `chunk`; all bytes once they are there.
    fn fill(&mut self, chunk: &mut &[u8]) -> Option<[u8; N]> {
        let missing = &mut self.bytes[self.filled..];
        let (taken, rest) = chunk.split_at(chunk.len().min(missing.len()));
        missing[..taken.len()].copy_from_slice(taken);
        self.filled += taken.len();
        *chunk = rest;
        (self.filled == N).then_some(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::layout::{Space, SpaceKind};
    use protocol::page::PAGE_SIZE;

    fn layout() -> Arc<Layout> {
        let space = Space { id: SpaceId(0), kind: SpaceKind::Memory, pages: 2048, guest_address: 0 };
        Arc::new(Layout { spaces: vec![space] })
    }

    fn pages(first: u64, count: u32, round: u32, fill: u8) -> Vec<u8> {
        let run = PageRun { space: SpaceId(0), first, count };
        let payload = if fill == 0 { vec![] } else { vec![fill; run.bytes()] };
        let encoding = if fill == 0 { Encoding::Zero } else { Encoding::Raw };
        let payload_bytes = payload.len() as u32;
        let mut bytes = Frame::Pages { run, encoding, payload_bytes, round }.encode(&payload).to_vec();
        bytes.extend(payload);
        bytes
    }

    fn coded(first: u64, count: u32, round: u32, encoding: Encoding, payload: &[u8]) -> Vec<u8> {
        let run = PageRun { space: SpaceId(0), first, count };
        let payload_bytes = payload.len() as u32;
        let header = Frame::Pages { run, encoding, payload_bytes, round }.encode(payload);
        [&header, payload].concat()
    }

    fn round_end(round: u32) -> Vec<u8> {
        Frame::RoundEnd { round }.encode(&[]).to_vec()
    }

    fn preamble(stream: u16) -> Vec<u8> {
        StreamPreamble { stream }.encode().to_vec()
    }

    /// What a stream does to a memory of 2048 pages, fed in pieces of the given lengths.
    fn feed(bytes: &[u8], mut lengths: impl Iterator<Item = usize>) -> Result<(Vec<u8>, Vec<u32>)> {
        let mut parser = Parser::new(layout(), 2);
        let mut memory = vec![0xee; 2048 * PAGE_SIZE];
        let mut rounds = vec![];
        let mut rest = bytes;
        while !rest.is_empty() {
            let (mut chunk, behind) = rest.split_at(lengths.next().unwrap_or(1 << 16).clamp(1, rest.len()));
            rest = behind;
            while let Some(item) = parser.next(&mut chunk)? {
                match item {
                    Item::Stream(_) => {}
                    Item::Bytes { offset, bytes, .. } => {
                        memory[offset as usize..][..bytes.len()].copy_from_slice(bytes);
                    }
                    Item::Zeros(run) => memory[run.offset() as usize..][..run.bytes()].fill(0),
                    // Not decoded here: what was gathered is what matters.
                    Item::Coded(run, _) => memory[run.offset() as usize..][..parser.payload().len()]
                        .copy_from_slice(parser.payload()),
                    Item::RoundEnd(round) => rounds.push(round),
                }
            }
        }
        parser.end()?;
        Ok((memory, rounds))
    }

    fn good() -> Vec<u8> {
        [
            preamble(1),
            pages(512, 3, 0, 7),
            pages(600, 256, 0, 0),
            round_end(0),
            pages(513, 1, 1, 9),
            coded(520, 2, 1, Encoding::Lz4, &[7; 3000]),
            coded(524, 1, 1, Encoding::Zstd, &[8]),
            pages(1536 + 511, 1, 1, 4),
            round_end(1),
        ]
        .concat()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn pieces_make_no_difference(lengths in proptest::collection::vec(1usize..5000, 0..40)) {
            let whole = feed(&good(), std::iter::empty()).unwrap();
            prop_assert_eq!(&whole.1, &[0, 1]);
            prop_assert_eq!(&feed(&good(), lengths.into_iter()).unwrap(), &whole);
        }

        #[test]
        fn a_flipped_bit_is_an_error(at in 0usize..48 + 3 * PAGE_SIZE, bit in 0u32..8) {
            let mut bytes = good();
            bytes[at] ^= 1 << bit;
            // Bytes 12 to 16 of the preamble are reserved and not looked at.
            prop_assume!(!(12..16).contains(&at));
            prop_assert!(feed(&bytes, std::iter::empty()).is_err());
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 1..400)) {
            prop_assert!(feed(&bytes, std::iter::empty()).is_err());
            let framed = [preamble(0), bytes].concat();
            prop_assert!(feed(&framed, std::iter::empty()).is_err());
        }
    }

    #[test]
    fn a_stream_carries_only_its_own_pages_of_the_round_under_way() {
        let bad = [
            ("outside the layout", pages(2047, 2, 0, 1)),
            ("far outside the layout", pages(u64::MAX - 1, 1, 0, 1)),
            ("another stream's stripe", pages(0, 1, 0, 1)),
            ("over the end of a stripe", pages(1023, 2, 0, 1)),
            ("a round that has not begun", pages(512, 1, 1, 1)),
            ("the end of a round that has not begun", round_end(1)),
            ("a round that is over", [round_end(0), pages(512, 1, 0, 1)].concat()),
            ("a round that ends twice", [round_end(0), round_end(0)].concat()),
        ];
        for (name, frame) in bad {
            let bytes = [preamble(1), frame].concat();
            assert!(feed(&bytes, std::iter::empty()).is_err(), "{name}");
        }
    }

    #[test]
    fn a_stream_ends_between_two_frames_or_is_an_error() {
        let bytes = good();
        let ends: Vec<usize> = (0..=bytes.len())
            .filter(|end| *end < 200 || end.is_multiple_of(1009))
            .filter(|end| feed(&bytes[..*end], std::iter::empty()).is_ok())
            .collect();
        assert_eq!(ends, [PREAMBLE_BYTES]);
    }
}

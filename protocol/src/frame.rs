//! What travels on a page stream: a preamble once, then frames, pages flowing one way.
//!
//! ```text
//! preamble   16 bytes   "MIGPAGE\0"  u16 major  u16 stream  u32 zero
//! frame      32 bytes   u8 kind  u8 encoding  u16 space  u32 count  u64 first  u32 payload bytes
//!                       u32 round  u64 checksum                           then the payload
//! ```
//!
//! All numbers are little-endian. The checksum is XXH3-64 (seed 0) over the first 24 bytes of the header and
//! the payload. A round ends on a stream with a `RoundEnd` frame: all of its other fields but `round` are zero.

use crate::error::{ProtocolError, Result};
use crate::layout::MAX_SPACE_PAGES;
use crate::page::{PageRun, SpaceId};
use crate::payload::Encoding;
use twox_hash::XxHash3_64;

/// First bytes of a page stream.
pub const PAGE_STREAM_MAGIC: [u8; 8] = *b"MIGPAGE\0";

/// Bytes of [`StreamPreamble`].
pub const PREAMBLE_BYTES: usize = 16;

/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 32;

/// The most pages in one frame: 1 MiB of memory, so that no receiver needs a larger buffer.
pub const MAX_FRAME_PAGES: u32 = 256;

/// The most page streams in one migration.
pub const MAX_PAGE_STREAMS: u16 = 64;

/// The page streams of a post-copy: stream 0 carries pages that nobody asked for yet, stream 1 those that somebody did
/// and their neighbours. Every page is sent once, on either, so stripes do not bind it.
pub const POST_COPY_STREAMS: u16 = 2;

/// Pages that lie together on one stream: 2 MiB stripes. A page's stream is
/// `(first / STRIPE_PAGES) % streams`, so two versions of it can never overtake each other. No frame crosses the
/// border of a stripe.
pub const STRIPE_PAGES: u64 = 512;

const KIND_PAGES: u8 = 1;
const KIND_ROUND_END: u8 = 2;

/// First bytes of a page stream, decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamPreamble {
    /// The number of the stream, from 0.
    pub stream: u16,
}

impl StreamPreamble {
    /// The bytes on the wire.
    pub fn encode(self) -> [u8; PREAMBLE_BYTES] {
        let mut bytes = [0; PREAMBLE_BYTES];
        bytes[..8].copy_from_slice(&PAGE_STREAM_MAGIC);
        bytes[8..10].copy_from_slice(&crate::handshake::MAJOR.to_le_bytes());
        bytes[10..12].copy_from_slice(&self.stream.to_le_bytes());
        bytes
    }

    /// Reads the first bytes of a page stream; `streams` is how many were agreed.
    ///
    /// # Errors
    /// `Magic`, `Version`, or `Value` for a stream number that was not agreed.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES], streams: u16) -> Result<Self> {
        if bytes[..8] != PAGE_STREAM_MAGIC {
            return Err(ProtocolError::Magic { expected: "the page-stream mark" });
        }
        let found = u16::from_le_bytes([bytes[8], bytes[9]]);
        if found != crate::handshake::MAJOR {
            return Err(ProtocolError::Version {
                what: "page-stream",
                found,
                supported: crate::handshake::MAJOR,
            });
        }
        let stream = u16::from_le_bytes([bytes[10], bytes[11]]);
        if stream >= streams {
            return Err(ProtocolError::Value {
                what: "the number of a page stream",
                found: u64::from(stream),
            });
        }
        Ok(Self { stream })
    }
}

/// The header of a frame on a page stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Frame {
    /// A run of pages; `payload_bytes` follow.
    Pages {
        /// Which pages.
        run: PageRun,
        /// How the payload stands for them.
        encoding: Encoding,
        /// Length of the payload in bytes.
        payload_bytes: u32,
        /// The round that sent them, from 0.
        round: u32,
    },
    /// This stream will carry no more pages of `round`.
    RoundEnd {
        /// The round that ends, from 0.
        round: u32,
    },
}

impl Frame {
    /// Bytes that follow the header.
    pub fn payload_bytes(&self) -> usize {
        match self {
            Self::Pages { payload_bytes, .. } => *payload_bytes as usize,
            Self::RoundEnd { .. } => 0,
        }
    }

    /// The header on the wire, its checksum taken over `payload` too.
    pub fn encode(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let mut bytes = self.fields();
        let mut sum = FrameSum::new(&bytes);
        sum.update(payload);
        bytes[24..].copy_from_slice(&sum.hasher.finish_u64().to_le_bytes());
        bytes
    }

    /// Reads a header. The checksum can be checked only once the payload is there: feed it to the
    /// [`FrameSum`] and call [`FrameSum::verify`].
    ///
    /// # Errors
    /// `Value` or `TooLarge` for a field that cannot be, `OutsideLayout` for pages that no layout can have: so a run
    /// that was decoded never overflows, and never crosses a stripe. Whether it lies in the layout is the caller's to
    /// check, with [`Layout::check`](crate::layout::Layout::check), and whether it came on its own stream, with
    /// [`check_stream`].
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(Self, FrameSum)> {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let u64_at = |at: usize| u64::from(u32_at(at)) | u64::from(u32_at(at + 4)) << 32;
        let round = u32_at(20);
        let frame = match bytes[0] {
            KIND_PAGES => {
                let encoding = Encoding::from_wire(bytes[1])?;
                let run = PageRun { space: SpaceId(u16_at(2)), first: u64_at(8), count: u32_at(4) };
                if run.count == 0 {
                    return Err(ProtocolError::Value { what: "the page count of a page frame", found: 0 });
                }
                if run.count > MAX_FRAME_PAGES {
                    return Err(ProtocolError::TooLarge {
                        what: "the page count of a page frame",
                        found: u64::from(run.count),
                        limit: u64::from(MAX_FRAME_PAGES),
                    });
                }
                let payload_bytes = u32_at(16);
                encoding.check_payload(run.count, payload_bytes)?;
                check_place(&run)?;
                Self::Pages { run, encoding, payload_bytes, round }
            }
            KIND_ROUND_END => {
                if bytes[1..20].iter().any(|byte| *byte != 0) {
                    return Err(ProtocolError::Value {
                        what: "a reserved field of a round-end frame",
                        found: 1,
                    });
                }
                Self::RoundEnd { round }
            }
            other => {
                return Err(ProtocolError::Value {
                    what: "the kind of a page-stream frame",
                    found: u64::from(other),
                });
            }
        };
        let mut sum = FrameSum::new(bytes);
        sum.expected = u64_at(24);
        Ok((frame, sum))
    }

    fn fields(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        match *self {
            Self::Pages { run, encoding, payload_bytes, round } => {
                bytes[0] = KIND_PAGES;
                bytes[1] = encoding as u8;
                bytes[2..4].copy_from_slice(&run.space.0.to_le_bytes());
                bytes[4..8].copy_from_slice(&run.count.to_le_bytes());
                bytes[8..16].copy_from_slice(&run.first.to_le_bytes());
                bytes[16..20].copy_from_slice(&payload_bytes.to_le_bytes());
                bytes[20..24].copy_from_slice(&round.to_le_bytes());
            }
            Self::RoundEnd { round } => {
                bytes[0] = KIND_ROUND_END;
                bytes[20..24].copy_from_slice(&round.to_le_bytes());
            }
        }
        bytes
    }
}

/// The running checksum of one frame, so that a receiver can write a payload to memory piece by piece.
pub struct FrameSum {
    hasher: Xxh3,
    expected: u64,
}

impl FrameSum {
    fn new(header: &[u8; HEADER_BYTES]) -> Self {
        let mut hasher = Xxh3(XxHash3_64::with_seed(0));
        hasher.0.write(&header[..24]);
        Self { hasher, expected: 0 }
    }

    /// Takes the next bytes of the payload.
    pub fn update(&mut self, payload: &[u8]) {
        self.hasher.0.write(payload);
    }

    /// Whether header and payload are what was sent.
    ///
    /// # Errors
    /// `Checksum`.
    pub fn verify(&self) -> Result<()> {
        if self.hasher.finish_u64() == self.expected {
            return Ok(());
        }
        Err(ProtocolError::Checksum { what: "a page frame" })
    }
}

use std::hash::Hasher as _;

struct Xxh3(XxHash3_64);

impl Xxh3 {
    fn finish_u64(&self) -> u64 {
        self.0.finish()
    }
}

/// The stream that pages from `first` on travel on, out of `streams` (at least one).
pub fn stream_of(first: u64, streams: u16) -> u16 {
    ((first / STRIPE_PAGES) % u64::from(streams.max(1))) as u16
}

/// Checks that a run came on the stream it belongs to: on another one, an older version of a page could arrive
/// behind a newer one and stay.
///
/// # Errors
/// `Value` naming the stream it came on.
pub fn check_stream(run: &PageRun, stream: u16, streams: u16) -> Result<()> {
    if stream_of(run.first, streams) == stream {
        return Ok(());
    }
    Err(ProtocolError::Value { what: "the stream of these pages", found: u64::from(stream) })
}

/// What can be said of a run without the layout. Before this, its arithmetic may overflow.
fn check_place(run: &PageRun) -> Result<()> {
    let (first, count) = (run.first, u64::from(run.count));
    if first > MAX_SPACE_PAGES - count {
        return Err(ProtocolError::OutsideLayout { space: run.space.0, first, count });
    }
    let in_stripe = first % STRIPE_PAGES;
    if in_stripe + count > STRIPE_PAGES {
        return Err(ProtocolError::Value {
            what: "the page count of a page frame that would leave its stripe",
            found: count,
        });
    }
    Ok(())
}

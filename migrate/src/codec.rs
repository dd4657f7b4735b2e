//! Pages as fewer bytes, and back: bounded both ways, whatever a peer sends.
//!
//! A frame has at most 1 MiB of pages, so neither end ever holds more than that of one: what does not decode to exactly its
//! pages is an error before a byte of it is used.

pub(crate) mod delta;
pub(crate) mod known;

use protocol::frame::MAX_FRAME_PAGES;
use protocol::page::{PAGE_SIZE, PageRun};
use protocol::payload::Encoding;
use protocol::{ProtocolError, Result};

/// The most bytes of pages in one frame.
pub(crate) const MAX_PAGES_BYTES: usize = MAX_FRAME_PAGES as usize * PAGE_SIZE;

/// The level of Zstandard: on the text of docs/performance.md it packs to 0.19 at 2.5 ns a byte, level 3 to 0.18 at 2.9, and
/// the levels below 1 are no faster there.
const ZSTD_LEVEL: i32 = 1;

/// What does not fall below this part of its length, in eighths, is sent as it is: the receiver's time is worth something.
const WORTH_EIGHTHS: usize = 7;

/// How pages are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Packing {
    /// Fast, for links of more than about 1 GB/s a core.
    Lz4,
    /// Half as long, at twice the time.
    Zstd,
}

impl Packing {
    /// Its name on the wire.
    pub(crate) fn encoding(self) -> Encoding {
        match self {
            Self::Lz4 => Encoding::Lz4,
            Self::Zstd => Encoding::Zstd,
        }
    }
}

/// Packs pages. Its buffers are made once.
pub(crate) struct Packer {
    zstd: Option<zstd::bulk::Compressor<'static>>,
    packed: Vec<u8>,
}

impl Packer {
    pub(crate) fn new() -> Self {
        Self { zstd: None, packed: Vec::new() }
    }

    /// The pages packed, if that is worth it. `pages` are at most [`MAX_PAGES_BYTES`].
    pub(crate) fn pack(&mut self, packing: Packing, pages: &[u8]) -> Option<&[u8]> {
        let needed = match packing {
            Packing::Lz4 => lz4_flex::block::get_maximum_output_size(pages.len()),
            Packing::Zstd => zstd::zstd_safe::compress_bound(pages.len()),
        };
        if self.packed.len() < needed {
            self.packed.resize(needed, 0);
        }
        let length = match packing {
            Packing::Lz4 => lz4_flex::block::compress_into(pages, &mut self.packed).ok()?,
            Packing::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
                };
                zstd.compress_to_buffer(pages, &mut self.packed).ok()?
            }
        };
        (length < pages.len() / 8 * WORTH_EIGHTHS).then(|| &self.packed[..length])
    }
}

/// Reads packed pages. Its buffers are made once, when the first packed frame comes.
pub(crate) struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
    pages: Vec<u8>,
}

impl Unpacker {
    pub(crate) fn new() -> Self {
        Self { zstd: None, pages: Vec::new() }
    }

    /// The pages of a run that a payload stands for: exactly as many bytes as the run has.
    ///
    /// # Errors
    /// `Payload` when it stands for anything else.
    pub(crate) fn unpack(&mut self, packing: Packing, run: PageRun, payload: &[u8]) -> Result<&[u8]> {
        let length = run.bytes().min(MAX_PAGES_BYTES);
        if self.pages.len() < length {
            self.pages.resize(length, 0);
        }
        let pages = &mut self.pages[..length];
        let found = match packing {
            Packing::Lz4 => {
                lz4_flex::block::decompress_into(payload, pages).map_err(|error| error.to_string())
            }
            Packing::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => Ok(zstd),
                    none => zstd::bulk::Decompressor::new().map(|new| none.insert(new)),
                };
                zstd.and_then(|zstd| zstd.decompress_to_buffer(payload, pages))
                    .map_err(|error| error.to_string())
            }
        };
        match found {
            Ok(found) if found == run.bytes() => Ok(pages),
            Ok(found) => Err(bad(packing.encoding(), run, format!("it stands for {found} bytes"))),
            Err(why) => Err(bad(packing.encoding(), run, why)),
        }
    }
}

/// The error for a payload that does not stand for the pages of `run`.
pub(crate) fn bad(encoding: Encoding, run: PageRun, why: String) -> ProtocolError {
    let encoding = match encoding {
        Encoding::Zero => "zero",
        Encoding::Raw => "raw",
        Encoding::Zstd => "zstd",
        Encoding::Lz4 => "lz4",
        Encoding::Delta => "delta",
        Encoding::Known => "known",
    };
    ProtocolError::Payload { encoding, space: run.space.0, first: run.first, count: run.count, why }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::page::SpaceId;

    const BOTH: [Packing; 2] = [Packing::Lz4, Packing::Zstd];

    fn run(count: u32) -> PageRun {
        PageRun { space: SpaceId(0), first: 0, count }
    }

    /// Pages of few different words, of one word each, or of noise.
    fn pages() -> impl Strategy<Value = Vec<u8>> {
        (1usize..=6, 0u64..4, any::<u64>()).prop_map(|(count, kind, seed)| {
            let mut state = seed | 1;
            (0..count * PAGE_SIZE / 8)
                .flat_map(|at| {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    let word = match kind {
                        0 => state,
                        1 => state % 5,
                        2 => seed ^ (at as u64 / 512),
                        _ => at as u64,
                    };
                    word.to_le_bytes()
                })
                .collect()
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn what_is_packed_comes_back_and_is_shorter(pages in pages()) {
            let run = run((pages.len() / PAGE_SIZE) as u32);
            let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
            for packing in BOTH.into_iter().chain(BOTH) {
                let Some(packed) = packer.pack(packing, &pages) else { continue };
                packing.encoding().check_payload(run.count, packed.len() as u32).unwrap();
                prop_assert_eq!(unpacker.unpack(packing, run, packed).unwrap(), &pages[..]);
                // One page less or more than it stands for.
                for count in [run.count - 1, run.count + 1].into_iter().filter(|count| *count > 0) {
                    let other = PageRun { count, ..run };
                    prop_assert!(unpacker.unpack(packing, other, packed).is_err());
                }
            }
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(
            bytes in proptest::collection::vec(any::<u8>(), 0..300),
            (pages, at, bit) in (pages(), any::<prop::sample::Index>(), 0u32..8),
        ) {
            let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
            for packing in BOTH {
                prop_assert!(unpacker.unpack(packing, run(6), &bytes).is_err());
                // A flipped bit: whatever comes of it is as long as the pages, or an error.
                if let Some(packed) = packer.pack(packing, &pages) {
                    let mut packed = packed.to_vec();
                    *at.get_mut(&mut packed) ^= 1 << bit;
                    let count = (pages.len() / PAGE_SIZE) as u32;
                    if let Ok(found) = unpacker.unpack(packing, run(count), &packed) {
                        prop_assert_eq!(found.len(), pages.len());
                    }
                }
            }
        }
    }

    #[test]
    fn a_bomb_stands_for_more_than_its_run_and_is_refused() {
        let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
        let zeros = vec![0; MAX_PAGES_BYTES];
        for packing in BOTH {
            let bomb = packer.pack(packing, &zeros).unwrap().to_vec();
            assert!(bomb.len() < 8 << 10, "{}", bomb.len());
            assert!(unpacker.unpack(packing, run(1), &bomb).is_err());
            assert_eq!(unpacker.pages.len(), PAGE_SIZE, "no more room is made than the run needs");
            unpacker.unpack(packing, run(MAX_FRAME_PAGES), &bomb).unwrap();
            unpacker = Unpacker::new();
        }
        // Two frames behind each other, and one that announces a window of terabytes.
        let one = packer.pack(Packing::Zstd, &zeros).unwrap().to_vec();
        assert!(unpacker.unpack(Packing::Zstd, run(MAX_FRAME_PAGES), &[one.clone(), one].concat()).is_err());
        let window = [0x28, 0xb5, 0x2f, 0xfd, 0x00, 0xf8, 0x01, 0x00, 0x00];
        assert!(unpacker.unpack(Packing::Zstd, run(1), &window).is_err());
    }

    #[test]
    fn noise_is_not_packed() {
        let mut state = 7u64;
        let noise: Vec<u8> = (0..2 * PAGE_SIZE)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        for packing in BOTH {
            assert!(Packer::new().pack(packing, &noise).is_none());
        }
    }
}

//! A page stream played into memory without a link, for what is hostile: the tests here, and the fuzz target of this name.

use super::decode::Decoder;
use super::parse::{Item, Parser};
use crate::destination::PageMemory;
use crate::error::Result;
use crate::memory::PageReader;
use protocol::frame::{Frame, MAX_FRAME_PAGES, StreamPreamble};
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::{PageRun, SpaceId};
use protocol::payload::Encoding;
use std::sync::{Arc, Mutex, PoisonError};

/// The memory of the tests: two frames of the longest kind.
const PAGES: u64 = 2 * MAX_FRAME_PAGES as u64;

/// Memory in which a range outside is a panic: the parser has to have found it.
struct Memory(Mutex<Vec<u8>>);

impl Memory {
    fn with<T>(&self, offset: u64, length: usize, body: impl FnOnce(&mut [u8]) -> T) -> T {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        body(&mut bytes[offset as usize..][..length])
    }
}

impl PageReader for Memory {
    fn read(&self, _: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
        self.with(offset, buffer.len(), |bytes| buffer.copy_from_slice(bytes));
        Ok(())
    }

    fn is_untouched(&self, _: PageRun) -> Result<bool> {
        Ok(false)
    }
}

impl PageMemory for Memory {
    fn settle(&self) -> Result<()> {
        Ok(())
    }

    fn write(&self, _: SpaceId, offset: u64, bytes: &[u8]) -> Result<()> {
        self.with(offset, bytes.len(), |memory| memory.copy_from_slice(bytes));
        Ok(())
    }

    fn zero(&self, run: PageRun) -> Result<()> {
        self.with(run.offset(), run.bytes(), |memory| memory.fill(0));
        Ok(())
    }
}

/// What a stream makes of memory.
///
/// # Errors
/// `Protocol`, for whatever is not as docs/wire-protocol.md says.
pub(crate) fn play(mut bytes: &[u8]) -> Result<Vec<u8>> {
    let kind = SpaceKind::Memory;
    let layout =
        Arc::new(Layout { spaces: vec![Space { id: SpaceId(0), kind, pages: PAGES, guest_address: 0 }] });
    let memory = Memory(Mutex::new(vec![0; PAGES as usize * 4096]));
    let (mut parser, mut decoder) = (Parser::new(layout.clone(), 1), Decoder::new(layout, 1));
    while let Some(item) = parser.next(&mut bytes)? {
        match item {
            Item::Stream(stream) => decoder.stream = stream,
            Item::Bytes { space, offset, bytes } => memory.write(space, offset, bytes)?,
            Item::Zeros(run) => memory.zero(run)?,
            Item::Coded(run, encoding) => decoder.write(&memory, run, encoding, parser.payload())?,
            Item::RoundEnd(_) => {}
        }
    }
    parser.end()?;
    Ok(memory.0.into_inner().unwrap_or_else(PoisonError::into_inner))
}

/// Frames of these bytes, in a stream with the right sums: kind, first page, pages and length of each, then its payload.
pub(crate) fn framed(mut data: &[u8]) -> Vec<u8> {
    let mut stream = StreamPreamble { stream: 0 }.encode().to_vec();
    while let Some(([kind, first, first_high, count, length, length_high], rest)) = data.split_first_chunk() {
        let encoding =
            [Encoding::Zero, Encoding::Raw, Encoding::Lz4, Encoding::Zstd, Encoding::Delta, Encoding::Known]
                [usize::from(kind % 6)];
        let first = u64::from(u16::from_le_bytes([*first, *first_high]) % 600);
        let count = u32::from(*count) + 1;
        let length = usize::from(u16::from_le_bytes([*length, *length_high])).min(rest.len());
        let (payload, rest) = rest.split_at(length);
        data = rest;
        let run = PageRun { space: SpaceId(0), first, count };
        let payload_bytes = payload.len() as u32;
        stream.extend(Frame::Pages { run, encoding, payload_bytes, round: 0 }.encode(payload));
        stream.extend(payload);
    }
    stream
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::{Packer, Packing};
    use proptest::prelude::*;

    fn frame(kind: u8, first: u16, count: u8, payload: &[u8]) -> Vec<u8> {
        let [low, high] = first.to_le_bytes();
        let length = (payload.len() as u16).to_le_bytes();
        [&[kind, low, high, count - 1][..], &length, payload].concat()
    }

    /// A payload that is any bytes, or packed pages of which one bit may be flipped.
    fn payload() -> impl Strategy<Value = (u8, Vec<u8>)> {
        let bytes = (0u8..6, proptest::collection::vec(any::<u8>(), 0..9000));
        let packed =
            (2u8..4, any::<u8>(), any::<prop::sample::Index>(), 0u32..9).prop_map(|(kind, fill, at, bit)| {
                let packing = if kind == 2 { Packing::Lz4 } else { Packing::Zstd };
                let mut packed = Packer::new().pack(packing, &[fill; 2 * 4096]).unwrap().to_vec();
                if bit < 8 {
                    *at.get_mut(&mut packed) ^= 1 << bit;
                }
                (kind, packed)
            });
        prop_oneof![bytes, packed]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn hostile_frames_with_right_sums_are_errors_and_no_panic(
            frames in proptest::collection::vec((payload(), 0u16..600, 1u8..=4), 1..6),
        ) {
            let data: Vec<u8> = frames
                .iter()
                .flat_map(|((kind, payload), first, count)| frame(*kind, *first, *count, payload))
                .collect();
            // Whatever comes of it: a range outside memory, and more bytes than the pages have, panic in `Memory`.
            let _ = play(&framed(&data));
            let _ = play(&data);
        }
    }

    #[test]
    fn frames_that_are_right_are_played_in_order() {
        let packed = Packer::new().pack(Packing::Lz4, &[7; 2 * 4096]).unwrap().to_vec();
        let data = [frame(2, 510, 2, &packed), frame(1, 0, 1, &[9; 4096]), frame(0, 511, 1, &[])].concat();
        let memory = play(&framed(&data)).unwrap();
        assert_eq!((memory[0], memory[4096], memory[510 * 4096], memory[511 * 4096]), (9, 0, 7, 0));
        assert!(play(&framed(&frame(2, 511, 2, &packed))).is_err(), "behind the end of memory");
        assert!(play(&framed(&frame(4, 0, 2, &packed))).is_err(), "no delta of what is there");
        assert!(play(&framed(&frame(5, 0, 1, &[0; 40]))).is_err(), "a page that is not there");
    }
}

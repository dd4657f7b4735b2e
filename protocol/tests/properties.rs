//! What holds for every value and for every byte from outside: what was encoded is decoded; what was damaged is an
//! error or a valid value, never a panic; and where there is a checksum, damage is always found.

mod common;

use common::{files, reader, samples, strategies};
use proptest::prelude::*;
use proptest::test_runner::TestCaseResult;
use protocol::control::{self, Downstream, Offer, Upstream};
use protocol::envelope;
use protocol::frame::{self, Frame, HEADER_BYTES, STRIPE_PAGES, StreamPreamble};
use protocol::handshake::Preamble;
use protocol::layout::{Layout, MAX_SPACES};
use protocol::monitor::{Reply, Request};
use protocol::page::{PageRun, PageSet, SpaceId};
use protocol::payload::Encoding;
use protocol::state::State;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;

const BLOB_LIMIT: u32 = 1 << 20;

fn roundtrip<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T, blob: &[u8]) -> TestCaseResult {
    let bytes = envelope::encode(value, blob).map_err(|error| TestCaseError::fail(error.to_string()))?;
    let mut rest = &bytes[..];
    let (found, found_blob) = reader::message::<T>(&mut rest, BLOB_LIMIT)
        .map_err(|error| TestCaseError::fail(error.to_string()))?;
    prop_assert_eq!(&found, value);
    prop_assert_eq!(found_blob, blob);
    prop_assert!(rest.is_empty());
    // Cut off anywhere, it is never taken for a message.
    for length in (0..bytes.len()).step_by(bytes.len() / 64 + 1) {
        prop_assert!(reader::message::<T>(&mut &bytes[..length], BLOB_LIMIT).is_err());
    }
    Ok(())
}

/// Every decoder in turn, over bytes of which nothing is known. Panics are what it looks for.
fn every_decoder(bytes: &[u8]) {
    let _ = reader::message::<Downstream>(&mut &bytes[..], BLOB_LIMIT);
    let _ = reader::message::<Upstream>(&mut &bytes[..], BLOB_LIMIT);
    let _ = reader::message::<Request>(&mut &bytes[..], BLOB_LIMIT);
    let _ = reader::message::<Reply>(&mut &bytes[..], BLOB_LIMIT);
    let _ = envelope::decode::<Request>("test", bytes);
    if let Ok(Downstream::Hello(hello)) = envelope::decode("test", bytes) {
        let _ = hello.agree();
    }
    if let Ok(Downstream::Offer(offer)) = envelope::decode("test", bytes) {
        every_question(&offer.layout);
        let _ = offer.check(1 << 30);
    }
    if let Ok(layout) = envelope::decode::<Layout>("test", bytes) {
        every_question(&layout);
    }
    if let Some(head) = bytes.first_chunk() {
        let _ = Preamble::decode(head);
        let _ = StreamPreamble::decode(head, 4);
    }
    let _ = reader::page_stream(bytes, &samples::layout(), 4);
    let _ = State::decode(bytes);
    for pages in [0, 1, bytes.len() as u64 * 8, u64::MAX] {
        let _ = PageSet::from_bytes(pages, bytes);
    }
}

/// What a receiver may ask of a layout before it has validated it.
fn every_question(layout: &Layout) {
    let _ = layout.validate(1 << 40);
    let _ = (layout.total_pages(), layout.total_bytes(), layout.space(SpaceId(u16::MAX)));
    for first in [0, 1, u64::MAX] {
        for count in [0, 1, u32::MAX] {
            let _ = layout.check(&PageRun { space: SpaceId(0), first, count });
        }
    }
}

proptest! {
    #[test]
    fn messages_roundtrip(
        downstream in strategies::downstream(),
        upstream in strategies::upstream(),
        request in strategies::request(),
        reply in strategies::reply(),
        order in strategies::order(),
        answer in strategies::answer(),
        blob in proptest::collection::vec(any::<u8>(), 0..100),
    ) {
        roundtrip(&downstream, &blob)?;
        roundtrip(&upstream, &blob)?;
        roundtrip(&request, &blob)?;
        roundtrip(&reply, &blob)?;
        roundtrip(&order, &blob)?;
        roundtrip(&answer, &blob)?;
    }

    #[test]
    fn preambles_roundtrip(minor in any::<u16>(), stream in 0u16..64) {
        prop_assert_eq!(Preamble::decode(&Preamble { minor }.encode()).unwrap().minor, minor);
        let preamble = StreamPreamble { stream };
        prop_assert_eq!(StreamPreamble::decode(&preamble.encode(), stream + 1).unwrap(), preamble);
        prop_assert!(StreamPreamble::decode(&preamble.encode(), stream).is_err());
    }

    #[test]
    fn frames_roundtrip_and_every_flipped_bit_is_found(
        (frame, payload) in strategies::frame(),
        flips in proptest::collection::vec(any::<proptest::sample::Index>(), 20),
    ) {
        let header = frame.encode(&payload);
        let (found, mut sum) = Frame::decode(&header).unwrap();
        prop_assert_eq!(found, frame);
        // Payloads come in pieces; how they are cut must not matter.
        for piece in payload.chunks(1000) {
            sum.update(piece);
        }
        sum.verify().unwrap();

        let bytes = [&header[..], &payload].concat();
        let header_flips = 0..HEADER_BYTES * 8;
        for bit in header_flips.chain(flips.iter().map(|flip| flip.index(bytes.len() * 8))) {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(!reads_as_frame(&damaged), "bit {}", bit);
        }
    }

    #[test]
    fn states_roundtrip_and_every_flipped_bit_and_cut_is_found(state in strategies::state()) {
        let bytes = state.encode().unwrap();
        prop_assert_eq!(&State::decode(&bytes).unwrap(), &state);
        for length in 0..bytes.len() {
            prop_assert!(State::decode(&bytes[..length]).is_err(), "{} bytes", length);
        }
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            prop_assert!(State::decode(&damaged).is_err(), "bit {}", bit);
        }
        prop_assert!(State::decode(&[&bytes[..], &[0]].concat()).is_err());
    }

    #[test]
    fn a_state_that_is_encoded_is_decodable(
        sections in proptest::collection::vec((".{0,3}", any::<u16>()), 0..6),
    ) {
        let mut state = State::default();
        for (name, version) in sections {
            state.push(name, version, vec![1]);
        }
        if let Ok(bytes) = state.encode() {
            prop_assert_eq!(State::decode(&bytes).unwrap(), state);
        }
    }

    #[test]
    fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        every_decoder(&bytes);
    }

    #[test]
    fn damaged_golden_files_never_panic(
        edits in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<proptest::sample::Index>(),
    ) {
        for name in files::on_disk() {
            let mut bytes = files::read(&name);
            for (at, byte) in &edits {
                let at = at.index(bytes.len());
                bytes[at] = *byte;
            }
            every_decoder(&bytes);
            every_decoder(&bytes[..cut.index(bytes.len())]);
        }
    }

    #[test]
    fn a_frame_from_outside_stays_in_its_stripe(header in any::<[u8; HEADER_BYTES]>(), kind in 0u8..4) {
        // Random headers with plausible small fields, so that many get past the first check.
        let mut header = header;
        header[0] = kind;
        header[1] %= 6;
        header[6..8].fill(0);
        header[5] %= 2;
        header[13..16].fill(0);
        let count = u32::from_le_bytes([header[4], header[5], 0, 0]);
        let payload = [0, count * 4096, 1, 9, 100, count * 40][usize::from(header[1])];
        header[16..20].copy_from_slice(&payload.to_le_bytes());
        if let Ok((Frame::Pages { run, .. }, _)) = Frame::decode(&header) {
            prop_assert!(run.count >= 1 && run.count <= frame::MAX_FRAME_PAGES);
            prop_assert_eq!(run.first / STRIPE_PAGES, (run.end() - 1) / STRIPE_PAGES);
            prop_assert_eq!(frame::stream_of(run.first, 7), frame::stream_of(run.end() - 1, 7));
            frame::check_stream(&run, frame::stream_of(run.first, 7), 7).unwrap();
            prop_assert!(frame::check_stream(&run, 7, 7).is_err());
        }
    }

    #[test]
    fn a_valid_layout_has_room_for_what_it_checks(layout in strategies::any_layout(), first in any::<u64>(), count in any::<u32>()) {
        every_question(&layout);
        let run = PageRun { space: SpaceId(0), first, count };
        if layout.validate(u64::MAX).is_ok() && layout.check(&run).is_ok() {
            let space = layout.space(run.space).unwrap();
            prop_assert!(run.end() <= space.pages);
            prop_assert!(space.guest_address.checked_add(run.offset() + run.bytes() as u64).is_some());
        }
    }

    #[test]
    fn a_name_is_neither_a_path_nor_an_option(name in any::<String>(), plausible in "[a-c./_-]{0,5}") {
        for name in [name, plausible] {
            let valid = control::check_name(&name).is_ok();
            let bytes = name.as_bytes();
            let expected = (1..=control::MAX_NAME_BYTES).contains(&bytes.len())
                && bytes[0].is_ascii_alphanumeric()
                && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte));
            prop_assert_eq!(valid, expected, "{}", name);
        }
    }
}

#[test]
fn every_bit_of_the_golden_frames_and_states_counts() {
    for name in ["frame/zero.bin", "frame/raw.bin", "frame/round-end.bin"] {
        let bytes = files::read(name);
        assert!(reads_as_frame(&bytes));
        for bit in 0..bytes.len() * 8 {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert!(!reads_as_frame(&damaged), "{name}, bit {bit}");
        }
    }
}

#[test]
fn golden_files_cut_or_flipped_anywhere_never_panic() {
    for name in files::on_disk() {
        let bytes = files::read(&name);
        // Behind the first page of a payload there is nothing new to cut.
        for length in (0..bytes.len()).filter(|length| *length < 600 || length % 509 == 0) {
            every_decoder(&bytes[..length]);
        }
        for bit in (0..bytes.len() * 8).filter(|bit| *bit < 4800 || bit % 509 == 0) {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            every_decoder(&damaged);
        }
    }
}

#[test]
fn a_page_stream_may_end_only_between_frames() {
    let bytes = files::read("page-stream/two-rounds.bin");
    let mut ends = vec![16];
    for frame in files::two_rounds() {
        ends.push(ends[ends.len() - 1] + HEADER_BYTES + frame.payload_bytes());
    }
    for length in 0..=bytes.len() {
        let whole = reader::page_stream(&bytes[..length], &samples::layout(), 4).is_ok();
        assert_eq!(whole, ends.contains(&length), "{length} bytes");
    }
}

#[test]
fn frames_that_the_decoder_must_refuse() {
    let pages = |first, count, encoding, payload_bytes| {
        let run = PageRun { space: SpaceId(0), first, count };
        Frame::Pages { run, encoding, payload_bytes, round: 0 }.encode(&[])
    };
    let zero = |first, count| pages(first, count, Encoding::Zero, 0);
    let good = [zero(0, 256), zero(256, 256), zero(511, 1), zero((1 << 36) - 1, 1)];
    for header in good {
        Frame::decode(&header).unwrap();
    }
    let mut bad = vec![
        zero(0, 0),
        zero(0, 257),
        zero(257, 256),
        zero(511, 2),
        zero(1 << 36, 1),
        zero((1 << 36) - 1, 2),
        zero(u64::MAX, 1),
        zero(u64::MAX, u32::MAX),
        pages(0, 1, Encoding::Zero, 1),
        pages(0, 1, Encoding::Raw, 0),
        pages(0, 2, Encoding::Raw, 4096),
        pages(0, 1, Encoding::Raw, u32::MAX),
        pages(0, 1, Encoding::Zstd, 0),
        pages(0, 1, Encoding::Zstd, 4096),
        pages(0, 2, Encoding::Lz4, u32::MAX),
        pages(0, 1, Encoding::Delta, 8),
        pages(0, 1, Encoding::Delta, 4096),
        pages(0, 2, Encoding::Known, 40),
    ];
    for (at, byte) in [(0, 0), (0, 3), (1, 2), (1, 255)] {
        let mut header = zero(0, 1);
        header[at] = byte;
        bad.push(header);
    }
    for at in 1..20 {
        let mut header = Frame::RoundEnd { round: 9 }.encode(&[]);
        header[at] = 1;
        bad.push(header);
    }
    for header in bad {
        assert!(Frame::decode(&header).is_err(), "{}", header.escape_ascii());
    }
}

#[test]
fn an_offer_from_outside_is_checked() {
    let offer = |name: &str, page_streams| Offer {
        migration: samples::MIGRATION,
        kind: control::WorkloadKind::Vm,
        name: name.into(),
        layout: samples::layout(),
        page_streams,
        connections: 1,
        seed: None,
    };
    offer("web-1.example_com", 1).check(4 << 30).unwrap();
    offer(&"x".repeat(control::MAX_NAME_BYTES), frame::MAX_PAGE_STREAMS).check(4 << 30).unwrap();
    assert!(offer("web-1", 1).check((4 << 30) - 1).is_err());
    assert!(offer("web-1", 0).check(4 << 30).is_err());
    assert!(offer("web-1", frame::MAX_PAGE_STREAMS + 1).check(4 << 30).is_err());
    let over = |connections, page_streams| {
        let offer = Offer { connections, ..offer("web-1", page_streams) };
        offer.check(4 << 30).is_ok()
    };
    let most = control::MAX_CONNECTIONS;
    assert!(over(1, 1) && over(2, 2) && over(most, most));
    assert!(!over(0, 1) && !over(2, 1) && !over(most + 1, most + 1));
    let old = serde_json::to_value(offer("web-1", 1)).unwrap();
    assert!(old.get("connections").is_none(), "an older peer is told of no more than it knows");
    assert_eq!(serde_json::from_value::<Offer>(old).unwrap().connections, 1);
    for name in ["", ".", "..", "../x", "a/b", "-v", "a b", "a\n", "ä", "_", &"x".repeat(65)] {
        assert!(offer(name, 1).check(4 << 30).is_err(), "{name:?}");
    }
}

#[test]
fn the_largest_layout_fits_a_message() {
    let mut layout = samples::layout();
    let space = layout.spaces[0].clone();
    layout.spaces = vec![space; MAX_SPACES];
    for (index, space) in layout.spaces.iter_mut().enumerate() {
        space.id = SpaceId(index as u16);
        space.pages = 1 << 36;
        space.guest_address = u64::MAX;
    }
    envelope::encode(&Request::Prepare { name: "x".repeat(64), layout }, &[]).unwrap();
}

/// Whether these bytes are one whole frame whose checksum is right.
fn reads_as_frame(bytes: &[u8]) -> bool {
    let Some((header, payload)) = bytes.split_first_chunk::<HEADER_BYTES>() else { return false };
    let Ok((frame, mut sum)) = Frame::decode(header) else { return false };
    sum.update(payload);
    frame.payload_bytes() == payload.len() && sum.verify().is_ok()
}

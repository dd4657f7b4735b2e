//! A page stream: its preamble and frames.
#![no_main]

#[path = "../../tests/common/reader.rs"]
#[allow(dead_code, reason = "this target reads one format")]
mod reader;

use libfuzzer_sys::fuzz_target;
use protocol::frame::{Frame, HEADER_BYTES, PREAMBLE_BYTES};
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;

fuzz_target!(|data: &[u8]| {
    let kind = SpaceKind::Memory;
    let space = |id, pages, guest_address| Space { id: SpaceId(id), kind, pages, guest_address };
    let layout = Layout { spaces: vec![space(0, 786_432, 0), space(1, 262_144, 1 << 32)] };
    let _ = reader::page_stream(data, &layout, 4);
    // No fuzzer finds a checksum: set them right, so that what lies behind them is reached.
    let mut bytes = data.to_vec();
    let mut at = PREAMBLE_BYTES;
    while let Some(header) = bytes.get(at..).and_then(|rest| rest.first_chunk::<HEADER_BYTES>()) {
        let Ok((frame, _)) = Frame::decode(header) else { break };
        let from = at + HEADER_BYTES;
        let Some(payload) = bytes.get(from..from + frame.payload_bytes()) else { break };
        let header = frame.encode(payload);
        let (again, mut sum) = Frame::decode(&header).expect("what was decoded is encoded well");
        sum.update(payload);
        assert_eq!((again, sum.verify()), (frame, Ok(())));
        bytes[at..from].copy_from_slice(&header);
        at = from + frame.payload_bytes();
    }
    let _ = reader::page_stream(&bytes, &layout, 4);
});

//! Payloads as a peer may send them: any bytes, and packed pages of which some were changed.
#![no_main]

/// A directory of the engine, for the one file of it that is under test.
#[path = "../../src"]
mod engine {
    #[allow(dead_code, reason = "one end packs and the other unpacks")]
    pub mod codec;
}


use engine::codec::{MAX_PAGES_BYTES, Packer, Packing, Unpacker, delta, known};
use libfuzzer_sys::fuzz_target;
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use twox_hash::XxHash3_64;

fuzz_target!(|data: &[u8]| {
    let Some(([pages, at, change], payload)) = data.split_first_chunk() else { return };
    let count = u32::from(*pages) + 1;
    let run = PageRun { space: SpaceId(0), first: 0, count };
    let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
    // A guest's pages: the payload over and over, so that it packs.
    let content: Vec<u8> = payload.iter().copied().chain([*at]).cycle().take(run.bytes()).collect();
    for packing in [Packing::Lz4, Packing::Zstd] {
        check(unpacker.unpack(packing, run, payload), run);
        let Some(packed) = packer.pack(packing, &content) else { continue };
        let mut packed = packed.to_vec();
        assert_eq!(unpacker.unpack(packing, run, &packed).expect("what was packed"), content);
        let at = usize::from(*at) % packed.len();
        packed[at] ^= change;
        check(unpacker.unpack(packing, run, &packed), run);
        packed.truncate(at);
        check(unpacker.unpack(packing, run, &packed), run);
    }
    let mut base = vec![*change; run.bytes()];
    let _ = delta::apply(&mut unpacker, run, &mut base, payload);
    // No fuzzer finds a checksum: with the right one, so that what lies behind it is reached.
    let sum = XxHash3_64::oneshot(&base).to_le_bytes();
    let _ = delta::apply(&mut unpacker, run, &mut base, &[&sum, payload].concat());
    assert_eq!(base.len(), run.bytes());
    if let Ok(known) = known::named(run, payload) {
        assert_eq!(known.len(), count as usize);
        assert!(known::check(run, &known[0], &[*at; PAGE_SIZE]).is_err() || known[0].digest == *blake3::hash(&[*at; PAGE_SIZE]).as_bytes());
    }
});

fn check(found: protocol::Result<&[u8]>, run: PageRun) {
    if let Ok(pages) = found {
        assert!(pages.len() == run.bytes() && pages.len() <= MAX_PAGES_BYTES);
    }
}

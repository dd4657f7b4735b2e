//! The page sets of an announcement: what is read is written as the same sets.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;
use protocol::sparse;

fuzz_target!(|data: &[u8]| {
    let Some(([a, b], bytes)) = data.split_first_chunk() else { return };
    let space = |id, pages| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address: 0 };
    let layout = Layout { spaces: vec![space(0, 1 + u64::from(*a) * 9), space(1, 1 + u64::from(*b))] };
    let Ok(sets) = sparse::decode(&layout, bytes) else { return };
    assert_eq!(sparse::decode(&layout, &sparse::encode(&sets)), Ok(sets));
});

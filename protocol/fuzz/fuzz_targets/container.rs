//! What is said of a container: what is read is written as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::container::pagemap::Pagemap;
use protocol::container::{Description, Placement, Tree};
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;

fuzz_target!(|data: &[u8]| {
    if let Ok(description) = Description::decode(data) {
        assert_eq!(Description::decode(&description.encode()), Ok(description));
    }
    if let Ok(pagemap) = Pagemap::decode(data) {
        assert_eq!(Pagemap::decode(&pagemap.encode()), Ok(pagemap));
    }
    if let Ok(tree) = Tree::decode(data) {
        assert_eq!(tree.encode().as_deref(), Ok(data));
        assert!((0..tree.entries.len()).all(|index| tree.find(&tree.path(index)) == Some(index)));
    }
    let Some(([a, b], bytes)) = data.split_first_chunk() else { return };
    let space = |id, pages| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address: 0 };
    let layout = Layout { spaces: vec![space(0, 1 + u64::from(*a)), space(1, 1 + u64::from(*b))] };
    if let Ok(placement) = Placement::decode(&layout, bytes) {
        let written = placement.encode().expect("no more runs than were read");
        assert_eq!(Placement::decode(&layout, &written), Ok(placement));
    }
});

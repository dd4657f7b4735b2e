//! Where the pages of a checkpoint and of its chain lie, and in which order they are touched.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::checkpoint::index::{At, Index};
use protocol::checkpoint::merged::{Merged, Stored};
use protocol::checkpoint::object::HEADER_BYTES;
use protocol::checkpoint::touched;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;

fuzz_target!(|data: &[u8]| {
    judge(data);
    // One of the seeds is a whole object.
    judge(data.get(HEADER_BYTES..).unwrap_or_default());
});

fn judge(data: &[u8]) {
    // The layout of the golden files.
    let space =
        |id, pages, guest_address| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address };
    let layout = Layout { spaces: vec![space(0, 786_432, 0), space(1, 262_144, 1 << 32)] };
    if let Ok(index) = Index::decode(&layout, 2, data) {
        assert_eq!(index.encode(), data);
        let starts = index.sum_starts();
        for placed in &index.runs {
            layout.check(&placed.run).expect("a run lies in the layout");
            if let At::Extent { extent, page } = placed.at {
                let pages = index.extents[extent as usize].pages;
                assert!(u32::from(page) + placed.run.count <= u32::from(pages));
                assert!(starts[extent as usize] + usize::from(pages) <= index.sums.len());
            }
        }
        for pair in index.runs.windows(2) {
            assert!((pair[0].run.space, pair[0].run.end()) <= (pair[1].run.space, pair[1].run.first));
        }
    }
    if let Ok(merged) = Merged::decode(&layout, data) {
        assert_eq!(merged.encode(&layout), data);
        for Stored { run, extent, page } in &merged.runs {
            layout.check(run).expect("a run lies in the layout");
            let pages = merged.extents[*extent as usize].pages;
            assert!(u32::from(*page) + run.count <= u32::from(pages));
        }
        assert!(merged.runs.is_sorted_by_key(|stored| (stored.extent, stored.page)));
    }
    if let Ok(runs) = touched::decode(&layout, data) {
        assert_eq!(touched::encode(&runs), data);
    }
}

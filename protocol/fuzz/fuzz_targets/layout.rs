//! A layout, its checks and its questions.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::envelope;
use protocol::layout::Layout;
use protocol::page::{PageRun, SpaceId};

fuzz_target!(|data: &[u8]| {
    let Ok(layout) = envelope::decode::<Layout>("fuzz", data) else { return };
    let valid = layout.validate(u64::MAX).is_ok();
    let total = layout.total_bytes();
    for space in 0..4 {
        let run = |first, count| PageRun { space: SpaceId(space), first, count };
        for first in [0, 1, u64::MAX, layout.spaces.first().map_or(0, |space| space.pages.wrapping_sub(1))] {
            for count in [0, 1, 256, u32::MAX] {
                let run = run(first, count);
                if layout.check(&run).is_ok() && valid {
                    assert!(run.offset() + run.bytes() as u64 <= total);
                }
            }
        }
    }
});

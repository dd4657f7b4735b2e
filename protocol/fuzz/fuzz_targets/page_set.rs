//! A page set from the control socket, and the arithmetic of sets: the first two bytes choose the size of the space,
//! the next the run that is asked for.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::page::{PageSet, SpaceId};

fuzz_target!(|data: &[u8]| {
    let Some(([a, b, c, d, e], bytes)) = data.split_first_chunk() else { return };
    // As many pages as the bytes hold, less a few, or whatever was asked for.
    let fitting = (bytes.len() as u64 * 8).saturating_sub(u64::from(*a % 64));
    for pages in [fitting, u64::from(u16::from_le_bytes([*a, *b])), u64::MAX - u64::from(*a)] {
        let Ok(mut set) = PageSet::from_bytes(pages, bytes) else { continue };
        let mut out = Vec::new();
        set.write_to(&mut out);
        assert_eq!(PageSet::from_bytes(pages, &out).as_ref(), Ok(&set));
        let in_runs: u64 = set.runs(SpaceId(0), 256).map(|run| u64::from(run.count)).sum();
        assert_eq!(in_runs, set.count());
        let (first, count) = (u64::from(u16::from_le_bytes([*c, *d])), u64::from(*e));
        for (first, count) in [(first, count), (first, u64::MAX), (u64::MAX, count)] {
            let before = set.clone();
            set.insert(first, count);
            assert_eq!(set.contains(first), first < pages && (count > 0 || before.contains(first)));
            set.remove(first, count);
            let mut union = before.clone();
            union.union(&set);
            assert_eq!(union, before);
            let _ = (set.next_set(first), set.next_clear(first));
            set = before;
        }
    }
});

//! Which pages to leave out, so that leaving them out does not cost more downtime than it saves. Pure.
//!
//! The destination has to discard its copies of the missing pages while the workload stands still, with one call for
//! every run of them. A call costs 10 us, because the kernel looks for mappings to take the run out of, and every page in
//! it about 1.3 us (November 2026, 256 MiB in a memfd, on a busy host: 8000 runs of one page 92 to 111 ms, 1000 runs of
//! fourteen 31 ms, one run of 14,000 18 ms). So where the runs are many, the gaps
//! between them are left out too: a page that was there already is sent once more, behind the start, where it costs
//! nobody anything but a few microseconds of the link.

use protocol::page::PageSet;

/// Runs that may be discarded as they are: up to 10 ms.
const FEW_RUNS: u64 = 1024;

/// The largest gap that is closed, in pages. Beyond this, a page costs more to send than a call to make.
const MAX_GAP_PAGES: u64 = 64;

/// Closes gaps, the smallest first, until the runs of all sets together are few, as long as what is missing does not grow to
/// more than twice of what it was.
pub(in crate::outbound) fn widen(missing: &mut [PageSet]) {
    let most_pages = 2 * missing.iter().map(PageSet::count).sum::<u64>();
    let mut gap = 1;
    while gap <= MAX_GAP_PAGES && missing.iter().map(runs).sum::<u64>() > FEW_RUNS {
        let wider: Vec<PageSet> = missing.iter().map(|set| closed(set, gap)).collect();
        if wider.iter().map(PageSet::count).sum::<u64>() > most_pages {
            return;
        }
        missing.clone_from_slice(&wider);
        gap *= 2;
    }
}

fn runs(set: &PageSet) -> u64 {
    let (mut at, mut runs) = (0, 0);
    while let Some(first) = set.next_set(at) {
        at = set.next_clear(first);
        runs += 1;
    }
    runs
}

/// The set with its gaps of up to `gap` pages.
fn closed(set: &PageSet, gap: u64) -> PageSet {
    let mut wider = set.clone();
    let mut end = set.next_set(0).map_or(set.pages(), |first| set.next_clear(first));
    while let Some(next) = set.next_set(end) {
        if next - end <= gap {
            wider.insert(end, next - end);
        }
        end = set.next_clear(next);
    }
    wider
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn every(step: u64, pages: u64) -> PageSet {
        let mut set = PageSet::empty(pages);
        (0..pages).step_by(step as usize).for_each(|page| set.insert(page, 1));
        set
    }

    proptest! {
        #[test]
        fn nothing_is_taken_away_and_never_more_than_as_much_is_added(
            inserts in proptest::collection::vec((0u64..100_000, 1u64..6), 0..4000)
        ) {
            let mut set = PageSet::empty(100_000);
            inserts.iter().for_each(|(first, count)| set.insert(*first, *count));
            let mut wider = vec![set.clone()];
            widen(&mut wider);
            prop_assert!(wider[0].count() <= 2 * set.count());
            if runs(&set) <= FEW_RUNS {
                prop_assert_eq!(&wider[0], &set);
            }
            let mut lost = set;
            lost.subtract(&wider[0]);
            prop_assert!(lost.is_empty());
        }
    }

    #[test]
    fn many_small_gaps_are_closed_and_large_ones_are_not() {
        let mut sets = vec![every(2, 40_000)];
        widen(&mut sets);
        assert_eq!(runs(&sets[0]), 1);
        let mut sets = vec![every(500, 1_000_000)];
        widen(&mut sets);
        assert_eq!(sets[0], every(500, 1_000_000));
    }
}

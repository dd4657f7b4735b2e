//! From what was written, in whatever order, to the runs of an index: of every page the newest version.
//!
//! Pages are read in loads, one behind the other, and a page that was read again comes in a later load. Whoever writes them need
//! not keep to that order.

use protocol::checkpoint::index::{At, Extent, Index, Placed};
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet};
use std::collections::HashMap;

/// Pages that lie somewhere now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Lying {
    /// The load they were read in: of two versions of a page the one of the later load counts.
    pub(super) load: u64,
    /// Which pages, and where: positions of extents are those of [`Written::extents`].
    pub(super) placed: Placed,
}

/// Everything that was written, in any order.
#[derive(Debug, Default)]
pub(super) struct Written {
    /// Extents and the sums of their pages.
    pub(super) extents: Vec<(Extent, Vec<u64>)>,
    /// What lies in them, and the zeros.
    pub(super) lying: Vec<Lying>,
}

impl Written {
    /// Adds what another writer wrote.
    pub(super) fn append(&mut self, mut other: Self) {
        let before = self.extents.len() as u32;
        self.extents.append(&mut other.extents);
        self.lying.extend(other.lying.into_iter().map(|mut lying| {
            if let At::Extent { extent, .. } = &mut lying.placed.at {
                *extent += before;
            }
            lying
        }));
    }

    /// The index: the newest version of every page, in runs as long as can be, and no extent that none lies in.
    pub(super) fn into_index(mut self, layout: &Layout) -> Index {
        self.lying.sort_by_key(|lying| std::cmp::Reverse(lying.load));
        let mut claimed: Vec<PageSet> =
            layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
        let mut newest = Vec::with_capacity(self.lying.len());
        for Lying { placed, .. } in self.lying {
            if let Some(claimed) = claimed.get_mut(usize::from(placed.run.space.0)) {
                newest.extend(unclaimed(claimed, placed));
                claimed.insert(placed.run.first, u64::from(placed.run.count));
            }
        }
        newest.sort_by_key(|placed: &Placed| (placed.run.space, placed.run.first));
        let mut runs: Vec<Placed> = Vec::with_capacity(newest.len());
        for next in newest {
            match runs.last_mut() {
                Some(last) if continues(last, &next) => last.run.count += next.run.count,
                _ => runs.push(next),
            }
        }
        let mut index = Index::default();
        let mut positions: HashMap<u32, u32> = HashMap::new();
        for placed in &mut runs {
            if let At::Extent { extent: position, .. } = &mut placed.at
                && let Some((extent, sums)) = self.extents.get(*position as usize)
            {
                *position = *positions.entry(*position).or_insert_with(|| index.push(*extent, sums));
            }
        }
        index.runs = runs;
        index
    }
}

/// The parts of a run that no newer one has.
fn unclaimed(claimed: &PageSet, placed: Placed) -> Vec<Placed> {
    let Placed { run, at } = placed;
    let mut parts = Vec::new();
    let mut page = run.first;
    loop {
        let first = claimed.next_clear(page);
        if first >= run.end() {
            return parts;
        }
        let end = claimed.next_set(first).unwrap_or(u64::MAX).min(run.end());
        let at = match at {
            At::Zeros => At::Zeros,
            At::Extent { extent, page } => At::Extent { extent, page: page + (first - run.first) as u16 },
        };
        parts.push(Placed { run: PageRun { space: run.space, first, count: (end - first) as u32 }, at });
        page = end;
    }
}

/// Whether a run begins where another ends, in memory and where it lies.
fn continues(last: &Placed, next: &Placed) -> bool {
    let adjoins = last.run.space == next.run.space
        && last.run.end() == next.run.first
        && last.run.count.checked_add(next.run.count).is_some();
    adjoins
        && match (last.at, next.at) {
            (At::Zeros, At::Zeros) => true,
            (At::Extent { extent, page }, At::Extent { extent: other, page: begins }) => {
                extent == other && u32::from(page) + last.run.count == u32::from(begins)
            }
            _ => false,
        }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::checkpoint::segment::{Encoding, HEADER_BYTES};
    use protocol::layout::{Space, SpaceKind};
    use protocol::page::SpaceId;
    use std::collections::BTreeMap;

    const PAGES: u64 = 300;

    fn layout() -> Layout {
        let space = |id, guest_address| Space {
            id: SpaceId(id),
            kind: SpaceKind::Memory,
            pages: PAGES,
            guest_address,
        };
        Layout { spaces: vec![space(0, 0), space(1, 1 << 40)] }
    }

    /// An extent of so many pages, which is told from others by its offset; the sums say which page is which.
    fn extent(number: u64, pages: u16) -> (Extent, Vec<u64>) {
        let extent = Extent {
            segment: 0,
            offset: HEADER_BYTES as u64 + number,
            stored_bytes: u32::from(pages) * 4096,
            pages,
            encoding: Encoding::Raw,
            digest: [0; 32],
        };
        (extent, (0..u64::from(pages)).map(|page| number << 16 | page).collect())
    }

    /// A run, and whether it is zeros.
    fn any_runs() -> impl Strategy<Value = Vec<(u16, u64, u32, bool)>> {
        proptest::collection::vec((0u16..2, 0..PAGES, 1u32..64, any::<bool>()), 0..60)
    }

    proptest! {
        #[test]
        fn every_page_lies_where_its_newest_version_was_written(
            runs in any_runs(), first_writer in proptest::collection::vec(any::<bool>(), 60),
        ) {
            // What a page is in the end: zeros, or the sum of a page of an extent.
            let mut model: BTreeMap<(u16, u64), Option<u64>> = BTreeMap::new();
            let mut writers = [Written::default(), Written::default()];
            for (load, (space, first, count, zeros)) in runs.into_iter().enumerate() {
                let count = count.min((PAGES - first) as u32);
                let (writer, number) = (&mut writers[usize::from(first_writer[load])], load as u64);
                // Every other run lies behind another page in its extent.
                let skipped = (load % 2) as u16;
                let at = if zeros { At::Zeros } else {
                    writer.extents.push(extent(number, count as u16 + skipped));
                    At::Extent { extent: writer.extents.len() as u32 - 1, page: skipped }
                };
                for page in 0..u64::from(count) {
                    let sum = number << 16 | (page + u64::from(skipped));
                    model.insert((space, first + page), (!zeros).then_some(sum));
                }
                let run = PageRun { space: SpaceId(space), first, count };
                // The later a load, the earlier it is told.
                writer.lying.insert(0, Lying { load: number, placed: Placed { run, at } });
            }
            let [mut written, other] = writers;
            written.append(other);
            let index = written.into_index(&layout());

            let starts = index.sum_starts();
            let mut found = BTreeMap::new();
            for Placed { run, at } in &index.runs {
                for page in 0..u64::from(run.count) {
                    let sum = match *at {
                        At::Zeros => None,
                        At::Extent { extent, page: begins } => {
                            Some(index.sums[starts[extent as usize] + usize::from(begins) + page as usize])
                        }
                    };
                    prop_assert!(found.insert((run.space.0, run.first + page), sum).is_none());
                }
            }
            prop_assert_eq!(found, model);
            // Nothing that could be one run is two, nothing is kept that nobody needs, and all of it can be read back.
            prop_assert!(index.runs.windows(2).all(|pair| !continues(&pair[0], &pair[1])));
            for extent in 0..index.extents.len() as u32 {
                let needed = |placed: &Placed| matches!(placed.at, At::Extent { extent: found, .. } if found == extent);
                prop_assert!(index.runs.iter().any(needed));
            }
            prop_assert_eq!(Index::decode(&layout(), 1, &index.encode()).unwrap(), index);
        }
    }
}

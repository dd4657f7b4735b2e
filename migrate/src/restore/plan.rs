//! Which stored bytes go where. Pure.
//!
//! The indexes of a chain are merged newest first, never the data: a page that a newer link has, as bytes or as zeros, hides every older
//! version of it, and is read once. Zeros need no reading, because the memory they go to is new. What is left is put in the order in
//! which it lies in the store, so that a disk reads forwards; an extent that several links share is read once for all of them.

use protocol::checkpoint::index::{At, Extent, Index};
use protocol::checkpoint::manifest::Segment;
use protocol::layout::Layout;
use protocol::page::{PageRun, PageSet, SpaceId};
use std::collections::HashMap;
use std::ops::Range;

/// An extent of which pages are needed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Need {
    /// Position in [`Plan::segments`]; the extent's own speaks of its manifest's list.
    pub segment: u32,
    /// Where it lies there, and what it must be.
    pub extent: Extent,
    /// Which of the plan's sums are those of its pages, all of them.
    pub sums: Range<usize>,
    /// Which of the plan's parts are its.
    pub parts: Range<usize>,
}

/// Some pages of an extent, and where they go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Where the first of them stands in the extent.
    pub page: u16,
    /// Where they go.
    pub run: PageRun,
}

/// What must be read for a restore.
#[derive(Debug, Default)]
pub struct Plan {
    /// The segments that are read, in the order of their names.
    pub segments: Vec<Segment>,
    /// The extents, in the order of segment and offset.
    pub needs: Vec<Need>,
    parts: Vec<Part>,
    sums: Vec<u64>,
    /// Every page that has bytes, one set for each space. All others are zeros.
    pub data: Vec<PageSet>,
}

impl Plan {
    /// Where the pages of an extent go, ascending in the extent.
    pub fn parts(&self, need: &Need) -> &[Part] {
        &self.parts[need.parts.clone()]
    }

    /// The sums of all pages of an extent.
    pub fn sums(&self, need: &Need) -> &[u64] {
        &self.sums[need.sums.clone()]
    }

    /// Pages of it that are needed.
    pub fn pages(&self, need: &Need) -> u64 {
        self.parts(need).iter().map(|part| u64::from(part.run.count)).sum()
    }

    /// Pages that have bytes.
    pub fn data_pages(&self) -> u64 {
        self.data.iter().map(PageSet::count).sum()
    }

    /// Stored bytes of all extents that are needed.
    pub fn stored_bytes(&self) -> u64 {
        self.needs.iter().map(|need| u64::from(need.extent.stored_bytes)).sum()
    }

    /// The extents in groups that are read at once: neighbours in a segment with no more than `gap_bytes` between them, of together at
    /// most `most_bytes` with the gaps, or one that is larger.
    pub fn groups(&self, gap_bytes: u64, most_bytes: u64) -> Vec<Range<usize>> {
        let mut groups: Vec<Range<usize>> = Vec::new();
        for (at, need) in self.needs.iter().enumerate() {
            let end = need.extent.offset.saturating_add(u64::from(need.extent.stored_bytes));
            let joins =
                groups.last().and_then(|group| Some((self.needs.get(group.start)?, self.needs.get(at - 1)?)));
            let joins = joins.is_some_and(|(first, last)| {
                let last_end = last.extent.offset.saturating_add(u64::from(last.extent.stored_bytes));
                first.segment == need.segment
                    && need.extent.offset >= last_end
                    && need.extent.offset - last_end <= gap_bytes
                    && end - first.extent.offset <= most_bytes
            });
            match groups.last_mut().filter(|_| joins) {
                Some(group) => group.end = at + 1,
                None => groups.push(at..at + 1),
            }
        }
        groups
    }
}

/// The indexes of a chain, merged as they come.
pub struct Merge {
    /// What newer links said something about.
    covered: Vec<PageSet>,
    uncovered_pages: u64,
    known: HashMap<Segment, u32>,
    plan: Plan,
}

impl Merge {
    /// Nothing is known of any page.
    pub fn new(layout: &Layout) -> Self {
        let empty = || layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
        Self {
            covered: empty(),
            uncovered_pages: layout.total_pages(),
            known: HashMap::new(),
            plan: Plan { data: empty(), ..Plan::default() },
        }
    }

    /// Whether older links have nothing more to say.
    pub fn is_complete(&self) -> bool {
        self.uncovered_pages == 0
    }

    /// Adds the next older link: its index, decoded for this layout and so many segments.
    pub fn add(&mut self, segments: &[Segment], index: &Index) {
        let mut found: Vec<(u32, Part)> = Vec::new();
        for placed in &index.runs {
            let Some(covered) = self.covered.get_mut(usize::from(placed.run.space.0)) else { continue };
            let mut at = placed.run.first;
            while let Some(first) = covered.next_clear_before(at, placed.run.end()) {
                let end = covered.next_set_before(first, placed.run.end()).unwrap_or(placed.run.end());
                if let At::Extent { extent, page } = placed.at {
                    let run = PageRun { first, count: (end - first) as u32, ..placed.run };
                    // It lies in an extent of at most 256 pages.
                    found.push((extent, Part { page: page + (first - placed.run.first) as u16, run }));
                }
                at = end;
            }
            let before = covered.count_in(placed.run.first, u64::from(placed.run.count));
            covered.insert(placed.run.first, u64::from(placed.run.count));
            self.uncovered_pages -= u64::from(placed.run.count) - before;
        }
        found.sort_by_key(|(extent, part)| (*extent, part.page));
        let starts = index.sum_starts();
        for group in found.chunk_by(|(a, _), (b, _)| a == b) {
            self.need(segments, index, &starts, group);
        }
    }

    /// Everything that must be read, in the order in which it lies in the store.
    pub fn finish(self) -> Plan {
        let Plan { segments, mut needs, parts, sums, data } = self.plan;
        let mut order: Vec<u32> = (0..).take(segments.len()).collect();
        order.sort_by_key(|at| name(&segments[*at as usize]));
        let mut place = vec![0; segments.len()];
        for (new, old) in (0..).zip(&order) {
            place[*old as usize] = new;
        }
        let segments = order.iter().map(|at| segments[*at as usize].clone()).collect();
        needs.iter_mut().for_each(|need| need.segment = place[need.segment as usize]);
        needs.sort_by_key(|need| (need.segment, need.extent.offset));
        let mut plan =
            Plan { segments, needs: Vec::new(), parts: Vec::with_capacity(parts.len()), sums, data };
        for same in needs.chunk_by(|a, b| a.segment == b.segment && alike(&a.extent, &b.extent)) {
            let Some(first) = same.first() else { continue };
            let start = plan.parts.len();
            plan.parts.extend(same.iter().flat_map(|need| parts[need.parts.clone()].iter().copied()));
            plan.parts[start..].sort_by_key(|part| part.page);
            plan.needs.push(Need { parts: start..plan.parts.len(), ..first.clone() });
        }
        plan
    }

    /// One extent of a link, and the pages of it that no newer link has.
    fn need(&mut self, segments: &[Segment], index: &Index, starts: &[usize], group: &[(u32, Part)]) {
        let Some((number, _)) = group.first() else { return };
        let Some((extent, start)) = index.extents.get(*number as usize).zip(starts.get(*number as usize))
        else {
            return;
        };
        let Some(segment) = segments.get(extent.segment as usize) else { return };
        let plan = &mut self.plan;
        let segment = *self.known.entry(segment.clone()).or_insert_with(|| {
            plan.segments.push(segment.clone());
            // No more than a chain's manifests name.
            (plan.segments.len() - 1) as u32
        });
        let (sums, parts) = (plan.sums.len(), plan.parts.len());
        plan.sums.extend_from_slice(&index.sums[*start..*start + usize::from(extent.pages)]);
        for (_, part) in group {
            plan.data[usize::from(part.run.space.0)].insert(part.run.first, u64::from(part.run.count));
            plan.parts.push(*part);
        }
        let need =
            Need { segment, extent: *extent, sums: sums..plan.sums.len(), parts: parts..plan.parts.len() };
        plan.needs.push(need);
    }
}

fn name(segment: &Segment) -> (protocol::checkpoint::name::CheckpointId, u32, u64) {
    (segment.checkpoint, segment.number, segment.bytes)
}

/// Whether two links speak of the same bytes; where they lie in their manifests' lists says nothing.
fn alike(a: &Extent, b: &Extent) -> bool {
    *a == Extent { segment: a.segment, ..*b }
}

/// The need in which each page lies.
pub struct Places {
    /// First page, pages, need: ascending, one list for each space.
    spaces: Vec<Vec<(u64, u32, u32)>>,
}

impl Places {
    /// Of a plan.
    pub fn of(plan: &Plan) -> Self {
        let mut spaces = vec![Vec::new(); plan.data.len()];
        for (number, need) in (0..).zip(&plan.needs) {
            for part in plan.parts(need) {
                spaces[usize::from(part.run.space.0)].push((part.run.first, part.run.count, number));
            }
        }
        spaces.iter_mut().for_each(|list| list.sort_unstable());
        Self { spaces }
    }

    /// The need that has this page.
    pub fn need(&self, space: SpaceId, page: u64) -> Option<u32> {
        let list = self.spaces.get(usize::from(space.0))?;
        let at = list.partition_point(|(first, ..)| *first <= page).checked_sub(1)?;
        let (first, count, need) = *list.get(at)?;
        (page - first < u64::from(count)).then_some(need)
    }

    /// Needs in the order of the lowest address of each.
    pub fn by_address(&self) -> impl Iterator<Item = u32> + '_ {
        self.spaces.iter().flatten().map(|(.., need)| *need)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::checkpoint::name::CheckpointId;
    use protocol::checkpoint::segment::Encoding;
    use protocol::layout::{Space, SpaceKind};
    use std::collections::BTreeMap;

    pub(crate) const PAGES: [u64; 2] = [300, 130];

    /// Space and number of a page.
    type Page = (u16, u64);

    /// The digest of an extent, and a page in it.
    type Stored = ([u8; 32], u16);

    pub(crate) fn layout() -> Layout {
        let space = |(id, pages): (u16, u64)| Space {
            id: SpaceId(id),
            kind: SpaceKind::Memory,
            pages,
            guest_address: u64::from(id) << 32,
        };
        Layout { spaces: (0..).zip(PAGES).map(space).collect() }
    }

    fn segment(number: u32) -> Segment {
        Segment { checkpoint: CheckpointId::new(1000 + u64::from(number % 3), 7), number, bytes: 1 << 20 }
    }

    /// A link: runs of pages, each with the segment and the extent it lies in; `None` for zeros.
    pub(crate) type Script = Vec<(u16, u64, u32, Option<(u32, bool)>)>;

    pub(crate) fn scripts() -> impl Strategy<Value = Vec<Script>> {
        let run = (0u16..2, 0u64..300, 1u32..40, proptest::option::weighted(0.8, (0u32..4, any::<bool>())));
        proptest::collection::vec(proptest::collection::vec(run, 0..12), 1..7)
    }

    /// The index that a script describes. Extents are named by their digest: link, number.
    pub(crate) fn index(link: u8, script: &Script) -> (Vec<Segment>, Index) {
        let mut runs: Vec<_> = script.clone();
        runs.sort_by_key(|(space, first, ..)| (*space, *first));
        let (mut index, mut end) = (Index::default(), (0, 0));
        for (space, first, count, at) in runs {
            let first = if space == end.0 { first.max(end.1) } else { first };
            let last = (first + u64::from(count)).min(PAGES[usize::from(space)]);
            if first >= last {
                continue;
            }
            end = (space, last);
            let run = PageRun { space: SpaceId(space), first, count: (last - first) as u32 };
            let at = match at {
                None => At::Zeros,
                Some((segment, raw)) => {
                    let number = index.extents.len() as u32;
                    let pages = (run.count + 3) as u16;
                    let mut digest = [link; 32];
                    digest[0] = number as u8;
                    let sums: Vec<u64> = (0..u64::from(pages))
                        .map(|page| u64::from(link) << 32 | u64::from(number) << 16 | page)
                        .collect();
                    let encoding = if raw { Encoding::Raw } else { Encoding::Zstd };
                    let offset = (u64::from(link) * 16 + u64::from(number)) * 0x1_0000 + 16;
                    let extent = Extent {
                        segment,
                        offset,
                        stored_bytes: u32::from(pages) * 4096,
                        pages,
                        encoding,
                        digest,
                    };
                    At::Extent { extent: index.push(extent, &sums), page: 2 }
                }
            };
            index.runs.push(Placed { run, at });
        }
        ((0..4).map(segment).collect(), index)
    }

    use protocol::checkpoint::index::Placed;

    proptest! {
        #[test]
        fn every_page_comes_once_from_the_newest_link_that_has_it(scripts in scripts()) {
            let links: Vec<_> = (0..).zip(&scripts).map(|(link, script)| index(link, script)).collect();
            // Oldest last: the model lets newer links overwrite.
            let mut model: BTreeMap<Page, Option<Stored>> = BTreeMap::new();
            for (_, index) in links.iter().rev() {
                for placed in &index.runs {
                    for (step, page) in (0..).zip(placed.run.first..placed.run.end()) {
                        let value = match placed.at {
                            At::Zeros => None,
                            At::Extent { extent, page } => Some((index.extents[extent as usize].digest, page + step)),
                        };
                        model.insert((placed.run.space.0, page), value);
                    }
                }
            }
            model.retain(|_, value| value.is_some());
            let mut merge = Merge::new(&layout());
            for (segments, index) in &links {
                merge.add(segments, index);
            }
            let complete = merge.is_complete();
            let plan = merge.finish();
            prop_assert!(!complete || plan.data_pages() <= PAGES.iter().sum());
            let mut found = BTreeMap::new();
            let mut before = (0, 0);
            for need in &plan.needs {
                prop_assert!((need.segment, need.extent.offset) > before, "not in the order of the store");
                before = (need.segment, need.extent.offset);
                let (link, number) = (need.extent.digest[1], need.extent.digest[0]);
                prop_assert_eq!(&plan.segments[need.segment as usize], &segment(need.extent.segment));
                prop_assert_eq!(plan.sums(need).len(), usize::from(need.extent.pages));
                prop_assert_eq!(plan.sums(need)[1], u64::from(link) << 32 | u64::from(number) << 16 | 1);
                for part in plan.parts(need) {
                    for (step, page) in (0..).zip(part.run.first..part.run.end()) {
                        let value = Some((need.extent.digest, part.page + step));
                        prop_assert!(found.insert((part.run.space.0, page), value).is_none(), "page {page} twice");
                    }
                }
            }
            prop_assert_eq!(&found, &model);
            let places = Places::of(&plan);
            for (space, pages) in (0..).zip(PAGES) {
                for page in 0..pages + 2 {
                    let known = model.get(&(space, page)).copied().flatten().map(|(digest, _)| digest);
                    let need = places.need(SpaceId(space), page).map(|need| plan.needs[need as usize].extent.digest);
                    prop_assert_eq!(need, known);
                    prop_assert_eq!(plan.data[usize::from(space)].contains(page), known.is_some());
                }
            }
            for (gap, most) in [(0, 0), (0x1_0000, 0x8_0000)] {
                let groups = plan.groups(gap, most);
                let all: Vec<_> = groups.iter().cloned().flatten().collect();
                prop_assert_eq!(all, (0..plan.needs.len()).collect::<Vec<_>>());
                for group in groups.iter().filter(|group| group.len() > 1) {
                    let (first, last) = (&plan.needs[group.start], &plan.needs[group.end - 1]);
                    prop_assert_eq!(first.segment, last.segment);
                    prop_assert!(last.extent.offset + u64::from(last.extent.stored_bytes) - first.extent.offset <= most);
                }
            }
        }
    }

    #[test]
    fn a_whole_memory_needs_nothing_older() {
        let whole: Script = vec![(0, 0, 300, None), (1, 0, 130, Some((0, true)))];
        let (segments, newest) = index(0, &whole);
        let mut merge = Merge::new(&layout());
        merge.add(&segments, &newest);
        assert!(merge.is_complete());
        merge.add(&segments, &index(1, &whole).1);
        let plan = merge.finish();
        assert_eq!((plan.needs.len(), plan.segments.len(), plan.data_pages()), (1, 1, 130));
    }

    #[test]
    fn an_extent_that_two_links_share_is_read_once() {
        let (segments, mut newest) = index(0, &vec![(0, 10, 2, Some((1, true)))]);
        let mut older = newest.clone();
        newest.runs[0].run.count = 1;
        older.runs[0].run.first = 11;
        older.runs[0].run.count = 1;
        let mut merge = Merge::new(&layout());
        merge.add(&segments, &newest);
        merge.add(&segments, &older);
        let plan = merge.finish();
        assert_eq!((plan.needs.len(), plan.pages(&plan.needs[0])), (1, 2));
    }
}

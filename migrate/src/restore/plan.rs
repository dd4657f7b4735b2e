//! Which stored bytes go where. Pure.
//!
//! The indexes of a chain are merged newest first, never the data: a page that a newer link has, as bytes or as zeros, hides every older
//! version of it, and is read once. Zeros need no reading, because the memory they go to is new. What is left is put in the order in
//! which it lies in the store, so that a disk reads forwards; an extent that several links share is read once for all of them.

use protocol::ProtocolError;
use protocol::checkpoint::index::{At, Extent, Rows};
use protocol::checkpoint::manifest::{self, MergedIndex, Segment};
use protocol::checkpoint::merged::{MergedRows, Stored};
use protocol::checkpoint::name::CheckpointId;
use protocol::checkpoint::segment::Encoding;
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
    /// Which of the plan's parts are its.
    pub parts: Range<usize>,
}

impl Need {
    /// Whether so few pages of it are needed that they are read alone, where that can be: less than seven of eight. Whole
    /// extents were read from half of their pages on before; restores of long chains were slower (docs/performance.md, "Restoring").
    pub fn is_few(&self, pages: u64) -> bool {
        is_few(&self.extent, pages)
    }
}

/// Which sums a plan keeps. To restore, only those pages are checked by them that are read alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sums {
    /// Those of all pages that are needed.
    All,
    /// Those of extents of which few pages are.
    Few,
}

/// Some pages of an extent, and where they go. A large chain has a million of them, so it is kept short: 16 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// The space, and below that the first page there, which is less than 2^36 in any layout.
    place: u64,
    /// Where their sums are.
    sums: SumsAt,
    /// Where the first of them stands in the extent.
    pub page: u16,
    /// An extent has at most 256.
    count: u16,
}

/// The bits of a place that are the page's.
const PAGE_BITS: u32 = 48;

impl Part {
    fn new(page: u16, sums: SumsAt, run: PageRun) -> Self {
        Self { place: u64::from(run.space.0) << PAGE_BITS | run.first, sums, page, count: run.count as u16 }
    }

    /// Where they go.
    pub fn run(&self) -> PageRun {
        PageRun {
            space: SpaceId((self.place >> PAGE_BITS) as u16),
            first: self.place & ((1 << PAGE_BITS) - 1),
            count: self.count.into(),
        }
    }
}

/// Where the sums of a part's pages stand, one behind the other: in the plan, in what a merged index has beside it, or nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct SumsAt(u32);

/// The bit of a position that stands for the merged index.
const MERGED: u32 = 1 << 31;

impl SumsAt {
    const NOWHERE: Self = Self(u32::MAX);

    /// In the plan. Those behind 2^31 of them, of more than 8 TiB, are done without.
    fn here(position: usize) -> Self {
        u32::try_from(position).ok().filter(|position| *position < MERGED - 1).map_or(Self::NOWHERE, Self)
    }

    fn merged(position: u64) -> Self {
        usize::try_from(position).map_or(Self::NOWHERE, Self::here).behind_merged()
    }

    fn behind_merged(self) -> Self {
        Self(self.0 | MERGED)
    }

    /// The same, so many pages further on.
    fn plus(self, pages: u64) -> Self {
        match self {
            Self::NOWHERE => self,
            Self(at) if at & MERGED == 0 => Self::here(at as usize + pages as usize),
            Self(at) => Self::merged(u64::from(at & !MERGED) + pages),
        }
    }

    fn position(self) -> usize {
        (self.0 & !MERGED) as usize
    }
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
    /// Where the sums are that only the merged index has: its checkpoint, how they are known, and how many.
    pub merged_sums: Option<(CheckpointId, manifest::Part, u64)>,
}

impl Plan {
    /// Where the pages of an extent go, ascending in the extent.
    pub fn parts(&self, need: &Need) -> &[Part] {
        &self.parts[need.parts.clone()]
    }

    /// The sums of a part's pages, if they are known; `merged` is what the merged index has of them.
    pub fn sums<'a>(&'a self, part: &Part, merged: Option<&'a [u64]>) -> Option<&'a [u64]> {
        let all = match part.sums {
            SumsAt::NOWHERE => return None,
            SumsAt(at) if at & MERGED == 0 => &self.sums,
            SumsAt(_) => merged?,
        };
        let start = part.sums.position();
        all.get(start..start.checked_add(part.count.into())?)
    }

    /// Whether the merged index must be asked for the sums of a part's pages.
    pub fn needs_merged_sums(part: &Part) -> bool {
        part.sums != SumsAt::NOWHERE && part.sums.0 & MERGED != 0
    }

    /// One need for those that several links have of one extent.
    fn joined(&mut self, first: &Need, same: &[Need]) -> Need {
        let mut parts: Vec<_> = same.iter().flat_map(|need| self.parts(need)).copied().collect();
        parts.sort_by_key(|part| part.page);
        let begin = self.parts.len();
        self.parts.extend(parts);
        Need { parts: begin..self.parts.len(), ..first.clone() }
    }

    /// Pages of it that are needed.
    pub fn pages(&self, need: &Need) -> u64 {
        self.parts(need).iter().map(|part| u64::from(part.count)).sum()
    }

    /// Needs by the address of what stands first in each: mostly the lowest.
    pub fn by_address(&self) -> Vec<u32> {
        let first = |need: &Need| self.parts(need).first().map(|part| part.place);
        let mut order: Vec<_> = (0..).zip(&self.needs).map(|(number, need)| (first(need), number)).collect();
        order.sort_unstable();
        order.into_iter().map(|(_, number)| number).collect()
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
    kept: Sums,
    /// Parts of the link that is being added, by address, each with its extent. It lies here to be made once.
    found: Vec<(u32, Part)>,
}

/// So many parts are put in the order of their extents at once, or some more: more than a delta mostly has, and few enough for a cache.
const BATCH: usize = 1 << 14;

impl Merge {
    /// Nothing is known of any page.
    pub fn new(layout: &Layout, kept: Sums) -> Self {
        let empty = || layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
        Self {
            covered: empty(),
            uncovered_pages: layout.total_pages(),
            known: HashMap::new(),
            plan: Plan { data: empty(), ..Plan::default() },
            kept,
            found: Vec::new(),
        }
    }

    /// Whether older links have nothing more to say.
    pub fn is_complete(&self) -> bool {
        self.uncovered_pages == 0
    }

    /// Adds the next older link: its index, checked for this layout and so many segments.
    pub fn add(&mut self, segments: &[Segment], index: &Rows<'_>) {
        let starts = index.sum_starts();
        let mut known = vec![None; segments.len()];
        for placed in index.runs() {
            let (extent, page, sums) = match placed.at {
                At::Zeros => (None, 0, SumsAt::NOWHERE),
                At::Extent { extent, page } => {
                    let start = starts.get(extent as usize).copied().unwrap_or(usize::MAX);
                    (Some(extent), page, SumsAt::here(start.saturating_add(page.into())))
                }
            };
            self.cover(placed.run, extent, page, sums);
            if self.found.len() >= BATCH {
                self.batch(segments, index, &mut known);
            }
        }
        self.batch(segments, index, &mut known);
    }

    /// Adds what all links say from a checkpoint on down: the last that there is to add.
    ///
    /// # Errors
    /// As [`MergedRows::each`]: then nothing of this merge can be used.
    pub fn add_merged(&mut self, of: &MergedIndex, index: &MergedRows<'_>) -> Result<(), ProtocolError> {
        let mut known = vec![None; index.segments.len()];
        let (mut sum, mut begin, mut here) = (0, self.plan.parts.len(), 0);
        let before = self.covered.clone();
        self.plan.needs.reserve(index.extents.len());
        index.each(|Stored { run, extent, page }| {
            if extent != here {
                begin = self.need_from(begin, index, here, &mut known);
                here = extent;
            }
            let parts = &mut self.plan.parts;
            uncovered(&mut self.covered, run, page, SumsAt::merged(sum), |part| parts.push(part));
            sum += u64::from(run.count);
        })?;
        self.need_from(begin, index, here, &mut known);
        self.plan.merged_sums = Some((of.id, index.sums, sum));
        // All runs have bytes, so their pages are put together, in less time than one by one.
        for ((data, covered), before) in self.plan.data.iter_mut().zip(&self.covered).zip(&before) {
            let mut new = covered.clone();
            new.subtract(before);
            data.union(&new);
        }
        // What it does not name is zeros.
        self.uncovered_pages = 0;
        Ok(())
    }

    /// An extent of a merged index has the parts from `begin` on, if there are any. Answers where those of the next begin.
    fn need_from(
        &mut self,
        begin: usize,
        index: &MergedRows<'_>,
        extent: u32,
        known: &mut [Option<u32>],
    ) -> usize {
        let end = self.plan.parts.len();
        if let Some(extent) = index.extents.get(extent as usize).filter(|_| begin < end) {
            self.need(&index.segments, known, extent, begin..end);
        }
        end
    }

    /// Takes what newer links do not have of a run. Without an extent, it is zeros.
    fn cover(&mut self, run: PageRun, extent: Option<u32>, page: u16, sums: SumsAt) {
        let Self { covered, uncovered_pages, plan, found, .. } = self;
        let Some(extent) = extent else {
            if let Some(covered) = covered.get_mut(usize::from(run.space.0)) {
                covered.insert_new(run.first, run.count.into(), |_, count| *uncovered_pages -= count);
            }
            return;
        };
        let Some(data) = plan.data.get_mut(usize::from(run.space.0)) else { return };
        uncovered(covered, run, page, sums, |part| {
            *uncovered_pages -= u64::from(part.count);
            let run = part.run();
            data.insert(run.first, run.count.into());
            found.push((extent, part));
        });
    }

    /// Puts what was found in the order of the extents. Within one it comes by address, which is mostly how it lies there.
    fn batch(&mut self, segments: &[Segment], index: &Rows<'_>, known: &mut [Option<u32>]) {
        let Some((_, any)) = self.found.first() else { return };
        let mut begin = self.plan.parts.len();
        self.plan.parts.resize(begin + self.found.len(), *any);
        let mut ends = vec![0; index.extents().len()];
        self.found.iter().for_each(|(extent, _)| ends[*extent as usize] += 1);
        let mut next = begin;
        for end in &mut ends {
            next += std::mem::replace(end, next);
        }
        for (extent, part) in &self.found {
            let at = &mut ends[*extent as usize];
            self.plan.parts[*at] = *part;
            *at += 1;
        }
        self.found.clear();
        for (extent, end) in index.extents().iter().zip(ends) {
            let parts = std::mem::replace(&mut begin, end)..end;
            if parts.is_empty() {
                continue;
            }
            self.need(segments, known, extent, parts.clone());
            self.keep_sums(index, extent, parts);
        }
    }

    /// Everything that must be read, in the order in which it lies in the store.
    pub fn finish(self) -> Plan {
        let mut plan = self.plan;
        let mut order: Vec<u32> = (0..).take(plan.segments.len()).collect();
        order.sort_by_key(|at| name(&plan.segments[*at as usize]));
        let mut place = vec![0; plan.segments.len()];
        for (new, old) in (0..).zip(&order) {
            place[*old as usize] = new;
        }
        plan.segments = order.iter().map(|at| plan.segments[*at as usize].clone()).collect();
        // Needs stay in the memory they are in: fresh memory is the dearest part of putting them in order.
        let mut needs = std::mem::take(&mut plan.needs);
        needs.iter_mut().for_each(|need| need.segment = place[need.segment as usize]);
        needs.sort_by_cached_key(|need| (need.segment, need.extent.offset));
        let same = |a: &Need, b: &Need| a.segment == b.segment && alike(&a.extent, &b.extent);
        let (mut kept, mut next) = (0, 0);
        while let Some(first) = needs.get(next) {
            let more = needs[next + 1..].iter().take_while(|need| same(first, need)).count();
            let need = if more == 0 { first.clone() } else { plan.joined(first, &needs[next..=next + more]) };
            needs[kept] = need;
            (kept, next) = (kept + 1, next + 1 + more);
        }
        needs.truncate(kept);
        plan.needs = needs;
        plan
    }

    /// The plan's number of a segment.
    fn segment(&mut self, segment: &Segment) -> u32 {
        *self.known.entry(segment.clone()).or_insert_with(|| {
            self.plan.segments.push(segment.clone());
            // No more than a chain's manifests name.
            (self.plan.segments.len() - 1) as u32
        })
    }

    /// One extent of a link, and the parts of it that no newer link has.
    fn need(
        &mut self,
        segments: &[Segment],
        known: &mut [Option<u32>],
        extent: &Extent,
        parts: Range<usize>,
    ) {
        let at = extent.segment as usize;
        let Some((segment, known)) = segments.get(at).zip(known.get_mut(at)) else { return };
        let segment = *known.get_or_insert_with(|| self.segment(segment));
        self.plan.parts[parts.clone()].sort_unstable_by_key(|part| part.page);
        self.plan.needs.push(Need { segment, extent: *extent, parts });
    }

    /// Takes the sums of an extent's parts out of the link's index, if they may be asked for, so that that need not stay.
    fn keep_sums(&mut self, index: &Rows<'_>, extent: &Extent, parts: Range<usize>) {
        let plan = &mut self.plan;
        let here = &mut plan.parts[parts];
        let pages = here.iter().map(|part| u64::from(part.count)).sum();
        let kept = self.kept == Sums::All || is_few(extent, pages);
        for part in here {
            let there = std::mem::replace(&mut part.sums, SumsAt::NOWHERE);
            if kept && there != SumsAt::NOWHERE {
                part.sums = SumsAt::here(plan.sums.len());
                plan.sums.extend(index.sums_from(there.position(), part.count.into()));
            }
        }
    }
}

/// Takes what is not covered yet of some pages that have bytes, as runs that are covered from now on.
fn uncovered(covered: &mut [PageSet], run: PageRun, page: u16, sums: SumsAt, mut each: impl FnMut(Part)) {
    let Some(covered) = covered.get_mut(usize::from(run.space.0)) else { return };
    covered.insert_new(run.first, u64::from(run.count), |first, count| {
        let further = first - run.first;
        // It lies in an extent of at most 256 pages.
        let page = page + further as u16;
        each(Part::new(page, sums.plus(further), PageRun { first, count: count as u32, ..run }));
    });
}

/// See [`Need::is_few`].
fn is_few(extent: &Extent, pages: u64) -> bool {
    extent.encoding == Encoding::Raw && pages * 8 < u64::from(extent.pages) * 7
}

fn name(segment: &Segment) -> (CheckpointId, u32, u64) {
    (segment.checkpoint, segment.number, segment.bytes)
}

/// Whether two links speak of the same bytes; where they lie in their manifests' lists says nothing.
fn alike(a: &Extent, b: &Extent) -> bool {
    *a == Extent { segment: a.segment, ..*b }
}

/// The need in which each page lies: four bytes for each page of the workload that has data, which is a thousandth of it. Lists that are put in
/// order take longer to make than anybody should wait for a first page.
pub struct Places {
    /// For each space and page: one more than the number of the need, or 0.
    spaces: Vec<Vec<u32>>,
}

impl Places {
    /// Of a plan.
    pub fn of(plan: &Plan) -> Self {
        // Zeros that were never written take no memory.
        let mut spaces: Vec<Vec<u32>> = plan.data.iter().map(|set| vec![0; set.pages() as usize]).collect();
        for (number, need) in (1..).zip(&plan.needs) {
            for part in plan.parts(need) {
                let run = part.run();
                let first = run.first as usize;
                spaces[usize::from(run.space.0)][first..first + run.count as usize].fill(number);
            }
        }
        Self { spaces }
    }

    /// The need that has this page.
    pub fn need(&self, space: SpaceId, page: u64) -> Option<u32> {
        let found = self.spaces.get(usize::from(space.0))?.get(usize::try_from(page).ok()?)?;
        found.checked_sub(1)
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

    use protocol::checkpoint::index::{Index, Placed};

    /// Adds a link as it is stored.
    fn add(merge: &mut Merge, segments: &[Segment], index: &Index) {
        let stored = index.encode();
        merge.add(segments, &Rows::check(&layout(), segments.len() as u32, &stored).unwrap());
    }

    proptest! {
        #[test]
        fn every_page_comes_once_from_the_newest_link_that_has_it(
            scripts in scripts(),
            sums in prop_oneof![Just(Sums::All), Just(Sums::Few)],
        ) {
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
            let mut merge = Merge::new(&layout(), sums);
            for (segments, index) in &links {
                add(&mut merge, segments, index);
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
                prop_assert!(plan.parts(need).is_sorted_by_key(|part| part.page));
                let kept = sums == Sums::All || need.is_few(plan.pages(need));
                for part in plan.parts(need) {
                    let sums = plan.sums(part, None).unwrap_or_default();
                    let first = u64::from(link) << 32 | u64::from(number) << 16 | u64::from(part.page);
                    let right: Vec<_> = (first..).take(part.count.into()).collect();
                    prop_assert!(sums == right || !kept && sums.is_empty(), "{sums:?} {right:?}");
                    for (step, page) in (0..).zip(part.run().first..part.run().end()) {
                        let value = Some((need.extent.digest, part.page + step));
                        prop_assert!(found.insert((part.run().space.0, page), value).is_none(), "page {page} twice");
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
        let mut merge = Merge::new(&layout(), Sums::All);
        add(&mut merge, &segments, &newest);
        assert!(merge.is_complete());
        add(&mut merge, &segments, &index(1, &whole).1);
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
        let mut merge = Merge::new(&layout(), Sums::All);
        add(&mut merge, &segments, &newest);
        add(&mut merge, &segments, &older);
        let plan = merge.finish();
        assert_eq!((plan.needs.len(), plan.pages(&plan.needs[0])), (1, 2));
    }
}

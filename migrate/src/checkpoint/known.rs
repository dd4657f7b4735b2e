//! What is stored already: candidates by the sums of indexes, proved by comparing bytes.
//!
//! A full checkpoint of a VM that was written down before, or of one that runs what another runs, has much that lies in the store. It is
//! looked for by runs: some pages in sequence whose sums are those of pages in sequence of one extent. Sums of 64 bits prove nothing,
//! so the stored bytes are read and compared before they are referred to; that costs about what writing them would, and saves the room.
//! A delta has what was just written, which hardly ever lies anywhere, so there nothing is looked for.

use super::writer::runs_of;
use crate::error::Result;
use crate::vault::{Committed, SegmentReader, Unpacker, Vault};
use protocol::checkpoint::index::{Extent, Index};
use protocol::checkpoint::manifest::Segment;
use protocol::page::{PAGE_SIZE, PageRun};
use std::collections::{BTreeMap, HashMap};
use twox_hash::XxHash3_64;

/// Shorter runs are not worth a reference: 24 bytes of index, and a seek when it is read.
const LEAST_PAGES: usize = 8;

/// One page in so many of an extent can be found by its sum; its neighbours are found beside it.
const ANCHOR: usize = 8;

/// The most pages that are known, 16 GiB of them: 8 bytes each, and 24 for every anchor.
const MOST_PAGES: usize = 4 << 20;

/// In place of the position of an own segment: one of [`Known::segments`].
pub(super) const FOREIGN: u32 = 1 << 31;

/// Pages that lie in a store.
#[derive(Default)]
pub(super) struct Known {
    segments: Vec<Segment>,
    extents: Vec<(Extent, Vec<u64>)>,
    anchors: HashMap<u64, (u32, u16)>,
    pages: usize,
}

/// Some pages of a load, in sequence, that may lie somewhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Candidate {
    /// The first of them.
    pub(super) first: usize,
    /// How many they are.
    pub(super) pages: usize,
    /// Which extent of the known ones.
    pub(super) extent: u32,
    /// The position of the first of them in it.
    pub(super) page: u16,
}

impl Known {
    /// What the newest checkpoint of every VM has with its chain, this VM's first, as far as there is room. What cannot be read is
    /// no reason not to take a checkpoint.
    pub(super) fn of(vault: &Vault, workload: &str) -> Result<Self> {
        let listing = vault.manifests()?;
        let mut newest: BTreeMap<(bool, &str), &Committed> = BTreeMap::new();
        for found in &listing.committed {
            let name = found.manifest.workload.as_str();
            let slot = newest.entry((name != workload, name)).or_insert(found);
            if slot.manifest.taken_unix_ms <= found.manifest.taken_unix_ms {
                *slot = found;
            }
        }
        let mut known = Self::default();
        for found in newest.values() {
            for link in vault.chain(found.manifest.id).unwrap_or_default() {
                if known.pages >= MOST_PAGES {
                    return Ok(known);
                }
                match vault.index(&link.manifest) {
                    Ok(index) => known.add(&index, &link.manifest.segments),
                    Err(error) => tracing::warn!(%error, "nothing is shared with this checkpoint"),
                }
            }
        }
        Ok(known)
    }

    fn add(&mut self, index: &Index, segments: &[Segment]) {
        let before = self.segments.len() as u32;
        self.segments.extend_from_slice(segments);
        for (extent, start) in index.extents.iter().zip(index.sum_starts()) {
            let Some(sums) = index.sums.get(start..start + usize::from(extent.pages)) else { continue };
            let number = self.extents.len() as u32;
            for (page, sum) in sums.iter().enumerate().step_by(ANCHOR) {
                self.anchors.entry(*sum).or_insert((number, page as u16));
            }
            let extent = Extent { segment: FOREIGN | (before + extent.segment), ..*extent };
            self.extents.push((extent, sums.to_vec()));
            self.pages += sums.len();
        }
    }

    /// Whether there is anything to find.
    pub(super) fn is_empty(&self) -> bool {
        self.extents.is_empty()
    }

    /// A known extent, its segment as a position in [`Known::segments`] marked by [`FOREIGN`], and the sums of its pages.
    pub(super) fn extent(&self, number: u32) -> Option<&(Extent, Vec<u64>)> {
        self.extents.get(number as usize)
    }

    /// The segment of a known extent.
    pub(super) fn segment(&self, marked: u32) -> Option<&Segment> {
        self.segments.get((marked & !FOREIGN) as usize)
    }

    /// Runs of pages with these sums that may be known, ascending, none over another.
    pub(super) fn candidates(&self, sums: &[u64]) -> Vec<Candidate> {
        let (mut found, mut done, mut at) = (Vec::new(), 0, 0);
        while at < sums.len() {
            let candidate = sums.get(at).and_then(|sum| self.anchors.get(sum)).and_then(|(extent, page)| {
                let (_, known) = self.extent(*extent)?;
                let page = usize::from(*page);
                let back = (0..=page.min(at - done)).take_while(|back| known[page - back] == sums[at - back]);
                let back = back.last()?;
                let ahead = known[page..].iter().zip(&sums[at..]).take_while(|(known, sum)| known == sum);
                let (first, pages) = (at - back, back + ahead.count());
                Some(Candidate { first, pages, extent: *extent, page: (page - back) as u16 })
            });
            match candidate {
                Some(candidate) if candidate.pages >= LEAST_PAGES => {
                    at = candidate.first + candidate.pages;
                    done = at;
                    found.push(candidate);
                }
                _ => at += 1,
            }
        }
        found
    }
}

/// Compares candidates with what lies there, for one writer.
#[derive(Default)]
pub(super) struct Prover {
    readers: HashMap<u32, Option<SegmentReader>>,
    unpacker: Unpacker,
    sums: Vec<u64>,
}

impl Prover {
    /// Those of a load's pages that lie somewhere, byte for byte.
    pub(super) fn shared(&mut self, vault: &Vault, known: &Known, pages: &[u8]) -> Vec<Candidate> {
        self.sums.clear();
        self.sums.extend(pages.as_chunks::<PAGE_SIZE>().0.iter().map(|page| XxHash3_64::oneshot(page)));
        let mut candidates = known.candidates(&self.sums);
        candidates.retain(|candidate| self.is_same(vault, known, candidate, pages));
        candidates
    }

    fn is_same(&mut self, vault: &Vault, known: &Known, candidate: &Candidate, pages: &[u8]) -> bool {
        let Some((extent, _)) = known.extent(candidate.extent) else { return false };
        let reader = self.readers.entry(extent.segment).or_insert_with(|| {
            let opened = known.segment(extent.segment).map(|segment| SegmentReader::open(vault, segment));
            opened.and_then(|opened| {
                opened.inspect_err(|error| tracing::warn!(%error, "nothing is shared with this segment")).ok()
            })
        });
        let Some(reader) = reader else { return false };
        match reader.read(extent, &mut self.unpacker) {
            Ok(stored) => {
                let from = usize::from(candidate.page) * PAGE_SIZE;
                let ours = &pages[candidate.first * PAGE_SIZE..][..candidate.pages * PAGE_SIZE];
                stored.get(from..from + ours.len()) == Some(ours)
            }
            Err(error) => {
                tracing::warn!(%error, "nothing is shared with this extent");
                false
            }
        }
    }
}

/// The runs of all pages but those of some candidates, whose bytes are moved to the front.
pub(super) fn without(candidates: &[Candidate], runs: &[PageRun], pages: &mut [u8]) -> Vec<PageRun> {
    let count: usize = runs.iter().map(|run| run.count as usize).sum();
    let (mut kept, mut from, mut to) = (Vec::new(), 0, 0);
    let ends = candidates.iter().map(|one| (one.first, one.first + one.pages));
    for (first, end) in ends.chain([(count, count)]) {
        kept.extend(runs_of(runs, from, first - from));
        pages.copy_within(from * PAGE_SIZE..first * PAGE_SIZE, to * PAGE_SIZE);
        to += first - from;
        from = end;
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::checkpoint::name::CheckpointId;
    use protocol::checkpoint::segment::{Encoding, HEADER_BYTES};
    use protocol::page::SpaceId;

    /// One extent with these sums.
    fn known(extents: &[Vec<u64>]) -> Known {
        let mut index = Index::default();
        for sums in extents {
            let extent = Extent {
                segment: 0,
                offset: HEADER_BYTES as u64,
                stored_bytes: 4096,
                pages: sums.len() as u16,
                encoding: Encoding::Raw,
                digest: [0; 32],
            };
            index.push(extent, sums);
        }
        let mut known = Known::default();
        known.add(&index, &[Segment { checkpoint: CheckpointId::new(1, 2), number: 0, bytes: 1 << 20 }]);
        known
    }

    proptest! {
        #[test]
        fn what_is_found_is_there_and_long_runs_are_found(
            extents in proptest::collection::vec(proptest::collection::vec(0u64..40, 1..64), 1..5),
            copies in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), 0usize..9), 1..6),
        ) {
            // Sums of their own, and of every extent a part that is as long as can be.
            let extents: Vec<Vec<u64>> = extents.iter().enumerate().map(|(number, sums)| {
                sums.iter().enumerate().map(|(page, sum)| (number as u64) << 32 | (page as u64) << 16 | sum).collect()
            }).collect();
            let known = known(&extents);
            let (mut sums, mut long) = (Vec::new(), 0);
            for (extent, from, strangers) in copies {
                let extent = extent.get(&extents);
                let part = &extent[from.index(extent.len())..];
                sums.extend(part);
                // A run of 15 has an anchor, and 8 pages behind or before it.
                long += if part.len() >= LEAST_PAGES + ANCHOR - 1 { part.len() } else { 0 };
                sums.extend((0..strangers as u64).map(|stranger| u64::MAX - stranger));
            }
            let found = known.candidates(&sums);
            let mut end = 0;
            for one in &found {
                prop_assert!(one.first >= end && one.pages >= LEAST_PAGES);
                end = one.first + one.pages;
                let there = &known.extent(one.extent).unwrap().1[usize::from(one.page)..][..one.pages];
                prop_assert_eq!(there, &sums[one.first..end]);
            }
            prop_assert!(found.iter().map(|one| one.pages).sum::<usize>() >= long);
        }

        #[test]
        fn what_is_not_shared_is_kept_in_order(
            cuts in proptest::collection::btree_set(1usize..60, 0..9), lengths in proptest::collection::vec(1u32..12, 1..6),
        ) {
            let space = SpaceId(0);
            let mut first = 0;
            let runs: Vec<PageRun> = lengths.iter().map(|count| {
                first += 100;
                PageRun { space, first, count: *count }
            }).collect();
            let numbers: Vec<u64> = runs.iter().flat_map(|run| run.first..run.end()).collect();
            let mut pages: Vec<u8> = numbers.iter().flat_map(|number| vec![*number as u8; PAGE_SIZE]).collect();
            let cuts: Vec<usize> = cuts.into_iter().filter(|cut| *cut < numbers.len()).collect();
            let candidates: Vec<Candidate> = cuts.as_chunks::<2>().0.iter().map(|[from, to]| {
                Candidate { first: *from, pages: to - from, extent: 0, page: 0 }
            }).collect();
            let left: Vec<u64> = (0..numbers.len())
                .filter(|at| candidates.iter().all(|one| *at < one.first || *at >= one.first + one.pages))
                .map(|at| numbers[at]).collect();
            let kept = without(&candidates, &runs, &mut pages);
            prop_assert_eq!(kept.iter().flat_map(|run| run.first..run.end()).collect::<Vec<_>>(), &left[..]);
            for (page, number) in pages.chunks(PAGE_SIZE).zip(left) {
                prop_assert!(page.iter().all(|byte| *byte == number as u8));
            }
        }
    }
}

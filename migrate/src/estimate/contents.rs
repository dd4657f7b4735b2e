//! What of a workload's memory would go over the wire, by a sample of its pages.
//!
//! The sample is encoded as a move would encode it: zero pages, pages that were there before, pages packed by LZ4 and by
//! Zstandard, and pages as the difference to what they were some time ago. Which of these a move uses it decides by
//! measurement; here it is guessed from the time that packing took and the bandwidth, by the same rule.

use crate::codec::{Packer, Packing, delta::delta};
use crate::converge::simulate::Cost;
use crate::error::Result;
use crate::outbound::{PACKABLE_PART, PACKING_FEE, PROMISE};
use crate::source::Source;
use protocol::frame::HEADER_BYTES;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use protocol::payload::is_zero;
use serde::Serialize;
use std::collections::HashSet;
use std::time::Instant;
use twox_hash::XxHash3_128;

/// The most pages of a sample: 4 MiB, some 20 ms of packing.
const SAMPLE_PAGES: u64 = 1024;

/// Pages that are read and packed together, as a move packs neighbours.
const GROUP_PAGES: u64 = 8;

/// What a sample was made of.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct Contents {
    /// Pages that were looked at.
    pub sampled_pages: u64,
    /// Those of them that were zero.
    pub zero_pages: u64,
    /// Those that were like another page of the sample. In all memory there are more of them.
    pub known_pages: u64,
    /// What LZ4 leaves of all others, as a part; what does not shrink counts in full.
    pub lz4_part: f64,
    /// What it takes for a byte.
    pub lz4_ns_per_byte: f64,
    /// The same of Zstandard.
    pub zstd_part: f64,
    /// The same of Zstandard.
    pub zstd_ns_per_byte: f64,
    /// Of pages that were read twice: the part that a difference leaves. 1 where none were.
    pub delta_part: f64,
    /// What it takes for a byte.
    pub delta_ns_per_byte: f64,
}

/// Pages as they were.
#[derive(Debug, Default)]
pub(super) struct Versions(Vec<(PageRun, Vec<u8>)>);

impl Versions {
    /// Reads pages of these sets, evenly from all over them.
    pub(super) fn read(source: &dyn Source, sets: &[PageSet]) -> Result<Self> {
        let pages: u64 = sets.iter().map(PageSet::count).sum();
        // One group in so many.
        let every = pages.div_ceil(SAMPLE_PAGES).max(1) * GROUP_PAGES;
        let (mut versions, mut seen, mut next) = (Vec::new(), 0, 0);
        for (space, set) in (0u16..).zip(sets) {
            let mut at = 0;
            while let Some(first) = set.next_set(at) {
                at = set.next_clear(first).min(first + GROUP_PAGES);
                let count = at - first;
                if seen + count > next {
                    let run = PageRun { space: SpaceId(space), first, count: count as u32 };
                    let mut bytes = vec![0; run.bytes()];
                    source.read(run, &mut bytes)?;
                    versions.push((run, bytes));
                    next += every;
                }
                seen += count;
            }
        }
        Ok(Self(versions))
    }

    /// Reads those of the same pages anew that are in these sets.
    pub(super) fn again(&self, source: &dyn Source, sets: &[PageSet]) -> Result<Self> {
        let mut versions = Vec::new();
        for (run, _) in &self.0 {
            let Some(set) = sets.get(usize::from(run.space.0)) else { continue };
            for first in (run.first..run.end()).filter(|page| set.contains(*page)) {
                let run = PageRun { first, count: 1, ..*run };
                let mut bytes = vec![0; PAGE_SIZE];
                source.read(run, &mut bytes)?;
                versions.push((run, bytes));
            }
        }
        Ok(Self(versions))
    }

    /// Whether nothing was read.
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What they are made of; `since` is what some of them were before.
    pub(super) fn contents(&self, since: &Self) -> Contents {
        let mut packer = Packer::new();
        let mut seen = HashSet::new();
        let (mut lz4, mut zstd, mut changed) = (Tally::default(), Tally::default(), Tally::default());
        let mut contents = Contents { delta_part: 1.0, ..Contents::default() };
        for (run, bytes) in &self.0 {
            contents.sampled_pages += u64::from(run.count);
            let mut rest = Vec::with_capacity(bytes.len());
            for (number, page) in (run.first..).zip(bytes.chunks(PAGE_SIZE)) {
                if is_zero(page) {
                    contents.zero_pages += 1;
                } else if !seen.insert(XxHash3_128::oneshot(page)) {
                    contents.known_pages += 1;
                } else {
                    rest.extend_from_slice(page);
                    if let Some(before) = since.page(run.space, number) {
                        let mut base = before.to_vec();
                        let begun = Instant::now();
                        let left = delta(&mut packer, &mut base, page, &mut Vec::new()).map(<[u8]>::len);
                        changed.add(page.len(), left, begun);
                    }
                }
            }
            if !rest.is_empty() {
                for (packing, tally) in [(Packing::Lz4, &mut lz4), (Packing::Zstd, &mut zstd)] {
                    let begun = Instant::now();
                    let left = packer.pack(packing, &rest).map(<[u8]>::len);
                    tally.add(rest.len(), left, begun);
                }
            }
        }
        (contents.lz4_part, contents.lz4_ns_per_byte) = lz4.shares();
        (contents.zstd_part, contents.zstd_ns_per_byte) = zstd.shares();
        (contents.delta_part, contents.delta_ns_per_byte) = changed.shares();
        contents
    }

    fn page(&self, space: SpaceId, page: u64) -> Option<&[u8]> {
        let holds = |run: &PageRun| run.space == space && run.first <= page && page < run.end();
        let (run, bytes) = self.0.iter().find(|(run, _)| holds(run))?;
        bytes.chunks(PAGE_SIZE).nth(usize::try_from(page - run.first).ok()?)
    }
}

/// What one way of packing did to all of a sample.
#[derive(Debug, Default)]
struct Tally {
    bytes: f64,
    left: f64,
    ns: f64,
}

impl Tally {
    fn add(&mut self, bytes: usize, left: Option<usize>, begun: Instant) {
        let (bytes, left) = (bytes as f64, left.map_or(bytes as f64, |left| left as f64));
        self.bytes += bytes;
        self.left += if left > bytes * PACKABLE_PART { bytes } else { left };
        self.ns += begun.elapsed().as_nanos() as f64;
    }

    /// The part that is left, and nanoseconds for a byte.
    fn shares(&self) -> (f64, f64) {
        if self.bytes > 0.0 { (self.left / self.bytes, self.ns / self.bytes) } else { (1.0, 0.0) }
    }
}

impl Contents {
    /// What such a page costs on a path of this bandwidth, as parts of what a page costs that is sent as it is.
    pub(super) fn cost(&self, bandwidth_bytes_per_s: f64) -> Cost {
        if self.sampled_pages == 0 {
            return Cost::RAW;
        }
        let raw_ns = 1e9 / bandwidth_bytes_per_s.max(1.0);
        let ways = [
            (self.lz4_part, self.lz4_ns_per_byte),
            (self.zstd_part, self.zstd_ns_per_byte),
            (self.delta_part, self.delta_ns_per_byte),
        ];
        let promised = |(part, ns): (f64, f64)| (part, (ns + part * raw_ns) * PACKING_FEE);
        let best = ways.into_iter().map(promised).filter(|(_, ns)| ns * PROMISE < raw_ns);
        let (part, ns) = best.min_by(|left, right| left.1.total_cmp(&right.1)).unwrap_or((1.0, raw_ns));
        let pages = self.sampled_pages as f64;
        // Zero pages, and those that are named, are a header and a few bytes.
        let named = (self.zero_pages + self.known_pages) as f64 / pages;
        let header = HEADER_BYTES as f64 / PAGE_SIZE as f64;
        // The fee is what it takes from the workload; the move itself is not longer by it.
        let time = if part < 1.0 { ns / PACKING_FEE / raw_ns } else { 1.0 };
        Cost {
            bytes_part: named * header + (1.0 - named) * part,
            time_part: named * header + (1.0 - named) * time,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Pages of words (which pack), of noise, and zeros.
    fn pages(words: u32, noise: u32, zeros: u32) -> Versions {
        let mut seed = 1u64;
        let mut random = move || {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 56) as u8
        };
        let mut versions = Vec::new();
        for number in 0..words + noise + zeros {
            let page: Vec<u8> = match number {
                _ if number < words => {
                    (0..PAGE_SIZE).map(|at| b"migrate "[at % 8] ^ (random() & 1)).collect()
                }
                _ if number < words + noise => (0..PAGE_SIZE).map(|_| random()).collect(),
                _ => vec![0; PAGE_SIZE],
            };
            versions.push((PageRun { space: SpaceId(0), first: u64::from(number), count: 1 }, page));
        }
        Versions(versions)
    }

    #[test]
    fn noise_costs_what_it_is_and_words_less_on_a_slow_link() {
        let noise = pages(0, 100, 0).contents(&Versions::default());
        assert_eq!((noise.lz4_part, noise.zstd_part, noise.delta_part), (1.0, 1.0, 1.0));
        assert_eq!(noise.cost(1e8), Cost::RAW);
        let words = pages(100, 0, 0).contents(&Versions::default());
        assert!(words.zstd_part < 0.5, "{words:?}");
        let slow = words.cost(1e6);
        assert!(slow.bytes_part < 0.5 && slow.time_part < 0.6, "{slow:?}");
        assert_eq!(words.cost(1e12), Cost::RAW, "a link faster than any packing");
    }

    #[test]
    fn zeros_and_twins_are_named_and_small_changes_are_differences() {
        let mut half = pages(0, 50, 50);
        let contents = half.contents(&Versions::default());
        assert_eq!((contents.sampled_pages, contents.zero_pages), (100, 50));
        let cost = contents.cost(1e8);
        assert!((0.5..0.52).contains(&cost.bytes_part), "{cost:?}");
        let before = pages(0, 50, 50);
        half.0.iter_mut().for_each(|(_, page)| page[7] ^= 1);
        let changed = half.contents(&before);
        assert!(changed.delta_part < 0.05, "{changed:?}");
        assert!(changed.cost(1e6).bytes_part < 0.1, "{changed:?}");
        half.0.push((PageRun { space: SpaceId(0), first: 1000, count: 1 }, half.0[3].1.clone()));
        assert_eq!(half.contents(&Versions::default()).known_pages, 1 + 49, "the zeros are alike now");
    }

    #[test]
    fn nothing_that_was_sampled_costs_what_it_is() {
        assert_eq!(Versions::default().contents(&Versions::default()).cost(1e9), Cost::RAW);
    }
}

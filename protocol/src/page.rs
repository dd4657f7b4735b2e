//! Pages, runs of pages and sets of pages.

use crate::error::{ProtocolError, Result};
use serde::{Deserialize, Serialize};

/// Bytes in a page: the only page size in the protocol. Larger pages of a host are runs of these.
pub const PAGE_SIZE: usize = 4096;

/// One linear run of memory that a workload owns, for instance one memory slot of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SpaceId(pub u16);

/// `count` pages of one space from page number `first` on. Never empty where this crate made it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PageRun {
    /// The space.
    pub space: SpaceId,
    /// Number of the first page in its space.
    pub first: u64,
    /// Length in pages.
    pub count: u32,
}

impl PageRun {
    /// Byte offset of the run in its space.
    pub fn offset(&self) -> u64 {
        self.first * PAGE_SIZE as u64
    }

    /// Length of the run in bytes.
    pub fn bytes(&self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Page number just behind the run.
    pub fn end(&self) -> u64 {
        self.first + u64::from(self.count)
    }
}

/// A set of pages of one space: one bit a page, page 0 in bit 0 of word 0.
///
/// 32 KiB for each GiB of the space. Bits behind the last page are always zero.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set over a space of `pages` pages.
    pub fn empty(pages: u64) -> Self {
        Self { pages, words: vec![0; pages.div_ceil(64) as usize] }
    }

    /// Every page of a space of `pages` pages.
    pub fn full(pages: u64) -> Self {
        let mut set = Self { pages, words: vec![u64::MAX; pages.div_ceil(64) as usize] };
        set.trim();
        set
    }

    /// A set from its words, as a kernel's dirty bitmap has them; bits behind the last page are dropped.
    ///
    /// # Errors
    /// `Truncated` when there are fewer words than the pages need, `TooLarge` when there are more.
    pub fn from_words(pages: u64, words: Vec<u64>) -> Result<Self> {
        let needed = pages.div_ceil(64);
        let found = words.len() as u64;
        if found < needed {
            return Err(ProtocolError::Truncated {
                what: "a page set",
                found: found * 8,
                needed: needed * 8,
            });
        }
        if found > needed {
            return Err(ProtocolError::TooLarge { what: "a page set in words", found, limit: needed });
        }
        let mut set = Self { pages, words };
        set.trim();
        Ok(set)
    }

    /// A set from little-endian words, `8 * ceil(pages / 64)` bytes of them.
    ///
    /// # Errors
    /// As [`PageSet::from_words`].
    pub fn from_bytes(pages: u64, bytes: &[u8]) -> Result<Self> {
        let needed = Self::byte_len(pages);
        let found = bytes.len() as u64;
        if found < needed {
            return Err(ProtocolError::Truncated { what: "a page set", found, needed });
        }
        if found > needed {
            return Err(ProtocolError::TooLarge { what: "a page set in bytes", found, limit: needed });
        }
        let words = bytes.as_chunks::<8>().0.iter().map(|chunk| u64::from_le_bytes(*chunk)).collect();
        Self::from_words(pages, words)
    }

    /// Bytes that [`PageSet::write_to`] appends for a space of `pages` pages.
    pub fn byte_len(pages: u64) -> u64 {
        pages.div_ceil(64) * 8
    }

    /// Appends the words in little-endian order.
    pub fn write_to(&self, out: &mut Vec<u8>) {
        out.reserve(self.words.len() * 8);
        for word in &self.words {
            out.extend_from_slice(&word.to_le_bytes());
        }
    }

    /// The words, page 0 in bit 0 of the first.
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// Pages in the space, not in the set.
    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Pages in the set.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Pages of the set among `count` from `first` on. Looks at no others.
    pub fn count_in(&self, first: u64, count: u64) -> u64 {
        let end = first.saturating_add(count).min(self.pages);
        let (mut at, mut found) = (first, 0);
        while at < end {
            let upto = (at / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (upto - at))) << (at % 64);
            found += u64::from((self.words[(at / 64) as usize] & mask).count_ones());
            at = upto;
        }
        found
    }

    /// The first page of the set from `from` on and before `end`. Looks at no others, where [`PageSet::next_set`] may look at
    /// all of a large and empty set.
    pub fn next_set_before(&self, from: u64, end: u64) -> Option<u64> {
        self.scan_before(from, end, 0)
    }

    /// The first page that is not in the set from `from` on and before `end`. Looks at no others.
    pub fn next_clear_before(&self, from: u64, end: u64) -> Option<u64> {
        self.scan_before(from, end, u64::MAX)
    }

    /// As `scan`, and no further than `end`.
    fn scan_before(&self, from: u64, end: u64, flip: u64) -> Option<u64> {
        let end = end.min(self.pages);
        let mut at = from;
        while at < end {
            let word = (self.words[(at / 64) as usize] ^ flip) >> (at % 64);
            if word != 0 {
                return Some(at + u64::from(word.trailing_zeros())).filter(|page| *page < end);
            }
            at = at / 64 * 64 + 64;
        }
        None
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// Whether `page` is in the set; a page outside the space never is.
    pub fn contains(&self, page: u64) -> bool {
        page < self.pages && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Puts `count` pages from `first` on into the set; what lies outside the space is ignored.
    pub fn insert(&mut self, first: u64, count: u64) {
        self.each_mask(first, count, |word, mask| *word |= mask);
    }

    /// Puts `count` pages from `first` on into the set, and tells which of them it did not have, as runs: first page and pages,
    /// ascending, as long as they can be. What lies outside the space is ignored.
    pub fn insert_new(&mut self, first: u64, count: u64, mut each: impl FnMut(u64, u64)) {
        // The run that may go on in the next word.
        let (mut start, mut end) = (0, 0);
        let mut at = first;
        let limit = first.saturating_add(count).min(self.pages);
        if let Some(word) = self.words.get_mut((first / 64) as usize).filter(|_| first < limit) {
            // Mostly it is few pages, and none of them was there.
            let mask = (u64::MAX >> (64 - (limit - first).min(64))) << (first % 64);
            if limit - first <= 64 - first % 64 && *word & mask == 0 {
                *word |= mask;
                return each(first, limit - first);
            }
        }
        while at < limit {
            let base = at / 64 * 64;
            let upto = (base + 64).min(limit);
            let word = &mut self.words[(at / 64) as usize];
            let mask = (u64::MAX >> (64 - (upto - at))) << (at % 64);
            let mut new = mask & !*word;
            *word |= mask;
            while new != 0 {
                let skipped = new.trailing_zeros();
                let ones = (new >> skipped).trailing_ones();
                let found = base + u64::from(skipped);
                if found != end {
                    if start < end {
                        each(start, end - start);
                    }
                    start = found;
                }
                end = found + u64::from(ones);
                // A shift by 64 is none: then this was the last run of the word.
                new &= u64::MAX.checked_shl(skipped + ones).unwrap_or(0);
            }
            at = upto;
        }
        if start < end {
            each(start, end - start);
        }
    }

    /// Takes `count` pages from `first` on out of the set; what lies outside the space is ignored.
    pub fn remove(&mut self, first: u64, count: u64) {
        self.each_mask(first, count, |word, mask| *word &= !mask);
    }

    /// Puts every page of `other` into this set. Both are over spaces of one size; extra words are ignored.
    pub fn union(&mut self, other: &Self) {
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word |= theirs;
        }
        self.trim();
    }

    /// Takes every page of `other` out of this set.
    pub fn subtract(&mut self, other: &Self) {
        for (word, theirs) in self.words.iter_mut().zip(&other.words) {
            *word &= !theirs;
        }
    }

    /// Keeps only the pages that are in `other` too.
    pub fn intersect(&mut self, other: &Self) {
        for (index, word) in self.words.iter_mut().enumerate() {
            *word &= other.words.get(index).copied().unwrap_or(0);
        }
    }

    /// Empties the set.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// The first page at or behind `from` that is in the set.
    pub fn next_set(&self, from: u64) -> Option<u64> {
        self.scan(from, 0)
    }

    /// The first page at or behind `from` that is not in the set, at most the number of pages.
    pub fn next_clear(&self, from: u64) -> u64 {
        self.scan(from, u64::MAX).unwrap_or(self.pages)
    }

    /// The set as runs in ascending order, none longer than `max_pages` (at least one).
    pub fn runs(&self, space: SpaceId, max_pages: u32) -> impl Iterator<Item = PageRun> + '_ {
        let max_pages = u64::from(max_pages.max(1));
        let mut at = 0;
        std::iter::from_fn(move || {
            let first = self.next_set(at)?;
            let end = self.next_clear(first).min(first + max_pages);
            at = end;
            Some(PageRun { space, first, count: (end - first) as u32 })
        })
    }

    /// First page at or behind `from` whose bit differs from the bits of `flip` (0: set, all ones: clear).
    fn scan(&self, from: u64, flip: u64) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let mut index = (from / 64) as usize;
        let mut word = (self.words[index] ^ flip) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let page = index as u64 * 64 + u64::from(word.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            index += 1;
            word = self.words.get(index)? ^ flip;
        }
    }

    fn each_mask(&mut self, first: u64, count: u64, mut apply: impl FnMut(&mut u64, u64)) {
        let end = first.saturating_add(count).min(self.pages);
        let mut at = first;
        while at < end {
            let upto = (at / 64 * 64 + 64).min(end);
            let mask = (u64::MAX >> (64 - (upto - at))) << (at % 64);
            apply(&mut self.words[(at / 64) as usize], mask);
            at = upto;
        }
    }

    fn trim(&mut self) {
        let used = self.pages % 64;
        if used != 0
            && let Some(last) = self.words.last_mut()
        {
            *last &= u64::MAX >> (64 - used);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn a_page_set_is_a_set_of_numbers(
            pages in 1u64..400,
            edits in proptest::collection::vec((any::<bool>(), 0u64..420, 0u64..90), 0..40),
            max_pages in 1u32..70,
        ) {
            let mut set = PageSet::empty(pages);
            let mut model = BTreeSet::new();
            for (insert, first, count) in edits {
                let range = first..(first + count).min(pages);
                if insert {
                    let new: Vec<u64> = range.clone().filter(|page| !model.contains(page)).collect();
                    let (mut told, mut runs) = (Vec::new(), 0);
                    let mut other = set.clone();
                    other.insert_new(first, count, |first, count| {
                        told.extend(first..first + count);
                        runs += 1;
                    });
                    let breaks = new.windows(2).filter(|pair| pair[0] + 1 < pair[1]).count();
                    prop_assert_eq!(runs, if new.is_empty() { 0 } else { breaks + 1 });
                    prop_assert_eq!(told, new);
                    set.insert(first, count);
                    prop_assert_eq!(&other, &set);
                    model.extend(range);
                } else {
                    set.remove(first, count);
                    model.retain(|page| !range.contains(page));
                }
            }
            prop_assert_eq!(set.count(), model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            let some = (pages / 3)..(pages / 3 + u64::from(max_pages));
            prop_assert_eq!(
                set.count_in(some.start, u64::from(max_pages)),
                model.iter().filter(|page| some.contains(*page)).count() as u64
            );
            prop_assert_eq!(
                set.next_set_before(some.start, some.end),
                model.iter().copied().find(|page| some.contains(page))
            );
            prop_assert_eq!(
                set.next_clear_before(some.start, some.end),
                { some }.find(|page| *page < pages && !model.contains(page))
            );
            let mut seen = BTreeSet::new();
            for run in set.runs(SpaceId(3), max_pages) {
                prop_assert!(run.count >= 1 && run.count <= max_pages);
                seen.extend(run.first..run.end());
            }
            prop_assert_eq!(&seen, &model);
            for page in 0..pages + 70 {
                prop_assert_eq!(set.contains(page), model.contains(&page));
            }
            let mut bytes = Vec::new();
            set.write_to(&mut bytes);
            prop_assert_eq!(bytes.len() as u64, PageSet::byte_len(pages));
            prop_assert_eq!(PageSet::from_bytes(pages, &bytes).unwrap(), set);
        }

        #[test]
        fn union_subtract_and_intersect_agree_with_bits(pages in 1u64..200, a in any::<[u64; 4]>(), b in any::<[u64; 4]>()) {
            let words = pages.div_ceil(64) as usize;
            let left = PageSet::from_words(pages, a[..words].to_vec()).unwrap();
            let right = PageSet::from_words(pages, b[..words].to_vec()).unwrap();
            let (mut union, mut subtract, mut intersect) = (left.clone(), left.clone(), left.clone());
            union.union(&right);
            subtract.subtract(&right);
            intersect.intersect(&right);
            for page in 0..pages {
                let (l, r) = (left.contains(page), right.contains(page));
                prop_assert_eq!(union.contains(page), l || r);
                prop_assert_eq!(subtract.contains(page), l && !r);
                prop_assert_eq!(intersect.contains(page), l && r);
            }
        }
    }

    #[test]
    fn a_full_set_has_no_bits_behind_its_last_page() {
        let set = PageSet::full(65);
        assert_eq!(set.count(), 65);
        assert_eq!(set.words()[1], 1);
        assert!(PageSet::from_bytes(65, &[0; 8]).is_err());
        assert!(PageSet::from_words(64, vec![0, 0]).is_err());
    }
}

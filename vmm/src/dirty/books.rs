//! The books of one space: which pages are pending, which are taken. Pure; no I/O.

use crate::error::{Error, Result};

/// Pages as whole words of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Words {
    /// The page of the first bit; a multiple of 64.
    pub first: u64,
    /// Bit n is page `first + n`.
    pub bits: Vec<u64>,
}

impl Words {
    /// How many pages are in them.
    pub fn count(&self) -> u64 {
        self.bits.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

/// Sets of pages of one space.
///
/// A page can be in several: taken, and dirty again since. Whatever is pending in a session that was not begun with every
/// page is owed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Books {
    pages: u64,
    pending: Vec<u64>,
    taken: Vec<u64>,
    /// What no checkpoint has: every page that was ever written as far as the log was read, but for what a baseline covers.
    owed: Vec<u64>,
    /// What this session took for a baseline.
    covered: Vec<u64>,
}

impl Books {
    /// Books in which every page is pending and owed, and none taken.
    pub fn all_pending(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        let all = all_of(pages, words);
        Self { pages, pending: all.clone(), taken: vec![0; words], owed: all, covered: vec![0; words] }
    }

    /// Books in which no page is pending or owed: a checkpoint has all of them.
    pub fn none_pending(pages: u64) -> Self {
        let mut books = Self::all_pending(pages);
        books.owed.fill(0);
        books.settle();
        books
    }

    /// How many pages are pending.
    pub fn pending_pages(&self) -> u64 {
        // Counting bits is several steps on a plain x86-64, and most words have none.
        self.pending.iter().filter(|word| **word != 0).map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds pages that were written; bit n is page n. Bits beyond the space are ignored.
    pub fn merge(&mut self, bits: &[u64]) {
        for ((pending, owed), bits) in self.pending.iter_mut().zip(&mut self.owed).zip(bits) {
            // Mostly nothing was written, and then only the log is read.
            if *bits != 0 {
                *pending |= bits;
                *owed |= bits;
            }
        }
        self.trim();
    }

    /// Makes every page pending, whatever is owed.
    pub fn begin_with_every_page(&mut self) {
        self.pending = all_of(self.pages, self.pending.len());
        self.taken.fill(0);
        self.covered.fill(0);
    }

    /// What was taken is safe: only what is pending is owed.
    pub fn cover(&mut self) {
        self.owed.clone_from(&self.pending);
        for (covered, taken) in self.covered.iter_mut().zip(&mut self.taken) {
            *covered |= std::mem::take(taken);
        }
    }

    /// Nothing is safe anywhere: every page is owed and pending.
    pub fn owe_every_page(&mut self) {
        self.owed = all_of(self.pages, self.owed.len());
        self.settle();
    }

    /// Ends a session: what is owed is pending.
    pub fn settle(&mut self) {
        self.pending.clone_from(&self.owed);
        self.taken.fill(0);
        self.covered.fill(0);
    }

    /// Those of these pages that are owed.
    pub fn owed_of(&self, words: &Words) -> Words {
        let owed = self.owed.iter().skip(index(words.first / 64));
        Words {
            first: words.first,
            bits: words.bits.iter().zip(owed).map(|(bits, owed)| bits & owed).collect(),
        }
    }

    /// The pending pages of a range, as whole words with nothing outside the range in them.
    ///
    /// # Errors
    /// [`Error::Protocol`] when the range is empty or not inside the space.
    pub fn peek(&self, first: u64, pages: u64) -> Result<Words> {
        let end =
            first.checked_add(pages).filter(|end| *end <= self.pages && pages > 0).ok_or_else(|| {
                Error::Protocol(format!(
                    "{pages} pages from page {first} are not in a space of {}",
                    self.pages
                ))
            })?;
        let start = first - first % 64;
        let (skip, words) = (index(start / 64), index((end - start).div_ceil(64)));
        let mut bits: Vec<u64> = self.pending.iter().skip(skip).take(words).copied().collect();
        if let Some(word) = bits.first_mut() {
            *word &= u64::MAX << (first % 64);
        }
        if let (Some(word), 1..) = (bits.last_mut(), end % 64) {
            *word &= (1 << (end % 64)) - 1;
        }
        Ok(Words { first: start, bits })
    }

    /// How many pages the words starting at page `first` really stand for: fewer than 64 each only at the
    /// end of the space, as KVM_CLEAR_DIRTY_LOG wants it (kvm api.rst).
    pub fn span(&self, words: &Words) -> u64 {
        (words.bits.len() as u64 * 64).min(self.pages.saturating_sub(words.first))
    }

    /// The pending pages as words from page 0 on.
    pub fn pending(&self) -> &[u64] {
        &self.pending
    }

    /// Moves pages from pending to taken.
    pub fn move_to_taken(&mut self, words: &Words) {
        let skip = index(words.first / 64);
        for ((pending, taken), bits) in
            self.pending.iter_mut().skip(skip).zip(self.taken.iter_mut().skip(skip)).zip(&words.bits)
        {
            *pending &= !bits;
            *taken |= bits;
        }
    }

    /// Makes pages pending again; bit n is page `first + n`. Those that this session's own baseline covers are owed again: it
    /// has retracted them. Any others are given back to this session alone.
    ///
    /// # Errors
    /// [`Error::Protocol`] when `first` is not a multiple of 64, or a word lies beyond the space.
    pub fn redirty(&mut self, first: u64, bits: &[u64]) -> Result<()> {
        let pages = (bits.len() as u64).saturating_mul(64);
        let fits = first.is_multiple_of(64)
            && first.checked_add(pages).is_some_and(|end| end <= self.pages.next_multiple_of(64));
        if !fits {
            return Err(Error::Protocol(format!(
                "{} words of pages from page {first} are not in a space of {}",
                bits.len(),
                self.pages
            )));
        }
        let skip = index(first / 64);
        let pending = self.pending.iter_mut().skip(skip);
        let books = pending.zip(self.taken.iter_mut().skip(skip));
        let owed = self.owed.iter_mut().zip(&self.covered).skip(skip);
        for (((pending, taken), (owed, covered)), bits) in books.zip(owed).zip(bits) {
            *owed |= bits & covered;
            *pending |= bits;
            *taken &= !bits;
        }
        self.trim();
        Ok(())
    }

    /// Clears the bits after the last page.
    fn trim(&mut self) {
        for bits in [&mut self.pending, &mut self.owed] {
            trim(self.pages, bits);
        }
    }
}

fn trim(pages: u64, bits: &mut [u64]) {
    let rest = pages % 64;
    if let (Some(last), 1..) = (bits.last_mut(), rest) {
        *last &= (1 << rest) - 1;
    }
}

fn all_of(pages: u64, words: usize) -> Vec<u64> {
    let mut all = vec![u64::MAX; words];
    trim(pages, &mut all);
    all
}

fn index(words: u64) -> usize {
    usize::try_from(words).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_beyond_the_last_page_never_count() {
        let mut books = Books::all_pending(70);
        assert_eq!(books.pending_pages(), 70);
        books.merge(&[u64::MAX; 3]);
        books.redirty(64, &[u64::MAX]).unwrap();
        assert_eq!(books.pending_pages(), 70);
    }

    #[test]
    fn a_range_is_masked_to_what_was_asked() {
        let books = Books::all_pending(70);
        assert_eq!(books.peek(64, 6).unwrap(), Words { first: 64, bits: vec![0b11_1111] });
        assert_eq!(books.peek(62, 3).unwrap(), Words { first: 0, bits: vec![0b11 << 62, 1] });
        assert_eq!(books.peek(5, 1).unwrap(), Words { first: 0, bits: vec![1 << 5] });
        assert_eq!(books.peek(0, 70).unwrap().count(), 70);
        assert_eq!(books.span(&books.peek(0, 70).unwrap()), 70);
        assert_eq!(books.span(&books.peek(3, 2).unwrap()), 64);
    }

    #[test]
    fn a_taken_page_can_be_pending_again() {
        let mut books = Books::all_pending(64);
        books.move_to_taken(&Words { first: 0, bits: vec![0b1] });
        books.merge(&[0b1]);
        assert_eq!(books.pending_pages(), 64);
        books.move_to_taken(&Words { first: 0, bits: vec![u64::MAX] });
        assert_eq!(books.pending_pages(), 0);
        books.settle();
        assert_eq!(books.pending_pages(), 64);
    }
}

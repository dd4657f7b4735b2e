//! The books of one space: which pages are pending, which are taken. Pure; no I/O.

use crate::error::{Error, Result};

/// Two sets of pages of one space.
///
/// A page can be in both: taken, and dirty again since.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Books {
    pages: u64,
    pending: Vec<u64>,
    taken: Vec<u64>,
}

impl Books {
    /// Books in which every page is pending and none taken.
    pub fn all_pending(pages: u64) -> Self {
        let words = usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX);
        let mut books = Self { pages, pending: vec![u64::MAX; words], taken: vec![0; words] };
        books.trim();
        books
    }

    /// How many pages are pending.
    pub fn pending_pages(&self) -> u64 {
        self.pending.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    /// Adds pages to the pending ones; bit n is page n. Bits beyond the space are ignored.
    pub fn merge(&mut self, bits: &[u64]) {
        for (pending, bits) in self.pending.iter_mut().zip(bits) {
            *pending |= bits;
        }
        self.trim();
    }

    /// Whether a range may be taken: inside the space, and made of whole words of 64 pages except where
    /// it ends with the space (the rule of KVM_CLEAR_DIRTY_LOG, kvm api.rst).
    ///
    /// # Errors
    /// [`Error::Protocol`] that says which rule is broken.
    pub fn check_range(&self, first: u64, pages: u64) -> Result<()> {
        let end = first.checked_add(pages).filter(|end| *end <= self.pages && pages > 0).ok_or_else(|| {
            Error::Protocol(format!("{pages} pages from page {first} are not in a space of {}", self.pages))
        })?;
        if !first.is_multiple_of(64) || (!pages.is_multiple_of(64) && end != self.pages) {
            return Err(Error::Protocol(format!("{pages} pages from page {first} are not whole words of 64")));
        }
        Ok(())
    }

    /// The pending bits of a range that [`Self::check_range`] accepted.
    pub fn peek(&self, first: u64, pages: u64) -> Vec<u64> {
        let (first, words) = (index(first / 64), index(pages.div_ceil(64)));
        self.pending.iter().skip(first).take(words).copied().collect()
    }

    /// Moves pages from pending to taken; bit n is page `first + n`.
    pub fn move_to_taken(&mut self, first: u64, bits: &[u64]) {
        let skip = index(first / 64);
        for ((pending, taken), bits) in
            self.pending.iter_mut().skip(skip).zip(self.taken.iter_mut().skip(skip)).zip(bits)
        {
            *pending &= !bits;
            *taken |= bits;
        }
    }

    /// Makes pages pending again; bit n is page `first + n`.
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
        for (pending, bits) in self.pending.iter_mut().skip(index(first / 64)).zip(bits) {
            *pending |= bits;
        }
        self.trim();
        Ok(())
    }

    /// Makes every taken page pending again.
    pub fn give_back(&mut self) {
        for (pending, taken) in self.pending.iter_mut().zip(&mut self.taken) {
            *pending |= std::mem::take(taken);
        }
    }

    /// Clears the bits after the last page.
    fn trim(&mut self) {
        let rest = self.pages % 64;
        if let (Some(last), 1..) = (self.pending.last_mut(), rest) {
            *last &= (1 << rest) - 1;
        }
    }
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
    fn a_range_may_end_with_the_space_unaligned() {
        let books = Books::all_pending(70);
        books.check_range(64, 6).unwrap();
        books.check_range(0, 70).unwrap();
        assert!(books.check_range(64, 5).is_err());
        assert_eq!(books.peek(64, 6), [0b11_1111]);
    }

    #[test]
    fn a_taken_page_can_be_pending_again() {
        let mut books = Books::all_pending(64);
        books.move_to_taken(0, &[0b1]);
        books.merge(&[0b1]);
        assert_eq!(books.peek(0, 64), [u64::MAX]);
        books.move_to_taken(0, &[u64::MAX]);
        assert_eq!(books.pending_pages(), 0);
        books.give_back();
        assert_eq!(books.pending_pages(), 64);
    }
}

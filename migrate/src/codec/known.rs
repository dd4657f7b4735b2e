//! Pages that equal one that was sent before.
//!
//! Which pages may be equal is guessed by a fast sum with a seed that no guest can know. Whether they are is for the receiver to
//! find: it hashes what it has with BLAKE3, and takes nothing else.

use super::bad;
use protocol::Result;
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use protocol::payload::{Encoding, KNOWN_PAGE_BYTES, KnownPage};
use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use twox_hash::XxHash3_128;

type Place = (SpaceId, u64);

/// What was sent on one stream and lies where it was sent to, for as many pages as there is room. An entry takes about 150
/// bytes.
pub(crate) struct Index {
    seed: u64,
    places: HashMap<(SpaceId, u128), u64>,
    sums: HashMap<Place, u128>,
    most: usize,
}

impl Index {
    /// Room for so many pages; memory is taken as it is used.
    pub(crate) fn new(most: usize) -> Self {
        // The standard library's own seed for hash maps is the kernel's randomness.
        let seed = RandomState::new().hash_one(0u64);
        Self { seed, places: HashMap::new(), sums: HashMap::new(), most }
    }

    /// The sum of a page.
    pub(crate) fn sum(&self, page: &[u8]) -> u128 {
        XxHash3_128::oneshot_with_seed(self.seed, page)
    }

    /// A page of this space that has this content at the receiver, if one is known.
    pub(crate) fn find(&self, space: SpaceId, sum: u128, page: &[u8]) -> Option<KnownPage> {
        let place = *self.places.get(&(space, sum))?;
        Some(KnownPage { page: place, digest: *blake3::hash(page).as_bytes() })
    }

    /// A page was sent, and what was there before is there no more. `sum` is of what it is now, if that was looked at.
    pub(crate) fn sent(&mut self, space: SpaceId, page: u64, sum: Option<u128>) {
        if self.sums.is_empty() && sum.is_none() {
            return;
        }
        if let Some(old) = self.sums.remove(&(space, page))
            && self.places.get(&(space, old)) == Some(&page)
        {
            self.places.remove(&(space, old));
        }
        if let Some(sum) = sum.filter(|_| self.sums.len() < self.most) {
            self.sums.insert((space, page), sum);
            self.places.entry((space, sum)).or_insert(page);
        }
    }
}

/// The pages that a payload of [`Encoding::Known`] names, in the order of the run.
///
/// # Errors
/// `Payload` for a payload of another length, `OutsideLayout` for a page that cannot be.
pub(crate) fn named(run: PageRun, payload: &[u8]) -> Result<Vec<KnownPage>> {
    let (entries, rest) = payload.as_chunks::<KNOWN_PAGE_BYTES>();
    if entries.len() != run.count as usize || !rest.is_empty() {
        return Err(bad(Encoding::Known, run, format!("{} bytes name no page each", payload.len())));
    }
    entries.iter().map(|entry| KnownPage::decode(run.space, entry)).collect()
}

/// Checks that a page is the one that was meant.
///
/// # Errors
/// `Payload` when it is not.
pub(crate) fn check(run: PageRun, known: &KnownPage, page: &[u8; PAGE_SIZE]) -> Result<()> {
    if *blake3::hash(page).as_bytes() == known.digest {
        return Ok(());
    }
    Err(bad(Encoding::Known, run, format!("page {} is not what it is said to be", known.page)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: SpaceId = SpaceId(0);

    proptest! {
        #[test]
        fn whatever_is_found_lies_there(
            most in 0usize..6,
            steps in proptest::collection::vec((0u64..8, 0u8..4, any::<bool>()), 1..80),
        ) {
            let mut index = Index::new(most);
            let mut receiver = HashMap::new();
            for (page, fill, looked_at) in steps {
                let content = [fill; PAGE_SIZE];
                let sum = looked_at.then(|| index.sum(&content));
                if let Some(known) = sum.and_then(|sum| index.find(SPACE, sum, &content)) {
                    prop_assert_eq!(receiver.get(&known.page), Some(&fill));
                    let run = PageRun { space: SPACE, first: page, count: 1 };
                    prop_assert!(check(run, &known, &content).is_ok());
                    prop_assert!(check(run, &known, &[fill + 1; PAGE_SIZE]).is_err());
                    prop_assert_eq!(named(run, &known.encode()).unwrap(), vec![known]);
                    let two = PageRun { count: 2, ..run };
                    prop_assert!(named(two, &known.encode()).is_err());
                }
                index.sent(SPACE, page, sum);
                receiver.insert(page, fill);
                prop_assert!(index.sums.len() <= most && index.places.len() <= most);
            }
        }
    }

    #[test]
    fn a_page_that_comes_twice_is_found_and_one_of_another_space_is_not() {
        let mut index = Index::new(9);
        let page = [7; PAGE_SIZE];
        let sum = index.sum(&page);
        index.sent(SPACE, 5, Some(sum));
        assert_eq!(index.find(SPACE, sum, &page).unwrap().page, 5);
        assert!(index.find(SpaceId(1), sum, &page).is_none());
        index.sent(SPACE, 5, None);
        assert!(index.find(SPACE, sum, &page).is_none());
        assert_ne!(Index::new(1).sum(&page), Index::new(1).sum(&page), "the seed is new each time");
    }
}

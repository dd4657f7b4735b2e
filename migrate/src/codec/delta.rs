//! Pages as what changed in them since they were sent last.
//!
//! Both ends hold the base: the sender in a [`Versions`], which is bounded, the receiver in the workload's memory. Frames of a
//! page travel on one stream, in order, so the two can differ only if a host is broken; the sum in front of a delta finds that.

use super::{Packer, Packing, Unpacker, bad};
use protocol::Result;
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use protocol::payload::{DELTA_SUM_BYTES, Encoding};
use std::collections::HashMap;
use twox_hash::XxHash3_64;

/// The versions of pages that were sent last, for as many as there is room. Which pages are kept is decided by a clock: a page
/// that was sent again since the hand came by is kept for another turn.
pub(crate) struct Versions {
    places: HashMap<(SpaceId, u64), usize>,
    slots: Vec<Slot>,
    bytes: Vec<u8>,
    most: usize,
    hand: usize,
}

struct Slot {
    page: (SpaceId, u64),
    again: bool,
}

impl Versions {
    /// Room for so many pages; memory is taken as it is used.
    pub(crate) fn new(most: usize) -> Self {
        Self { places: HashMap::new(), slots: Vec::new(), bytes: Vec::new(), most, hand: 0 }
    }

    /// What was sent last for a page, if it is here.
    pub(crate) fn get(&self, space: SpaceId, page: u64) -> Option<&[u8]> {
        let at = *self.places.get(&(space, page))?;
        self.bytes.get(at * PAGE_SIZE..(at + 1) * PAGE_SIZE)
    }

    /// A page was sent in this version, whichever way.
    pub(crate) fn put(&mut self, space: SpaceId, page: u64, version: &[u8]) {
        if self.most == 0 {
            return;
        }
        let page = (space, page);
        let at = match self.places.get(&page) {
            Some(at) => {
                self.slots[*at].again = true;
                *at
            }
            None => {
                let at = self.free_slot(page);
                self.places.insert(page, at);
                at
            }
        };
        self.bytes[at * PAGE_SIZE..(at + 1) * PAGE_SIZE].copy_from_slice(version);
    }

    /// A page was sent, and what it was need not be kept.
    pub(crate) fn forget(&mut self, space: SpaceId, page: u64) {
        // The slot's page stays in it, and is overwritten when the hand comes by.
        if let Some(at) = self.places.remove(&(space, page)) {
            self.slots[at].again = false;
        }
    }

    fn free_slot(&mut self, page: (SpaceId, u64)) -> usize {
        if self.slots.len() < self.most {
            self.slots.push(Slot { page, again: false });
            self.bytes.resize(self.slots.len() * PAGE_SIZE, 0);
            return self.slots.len() - 1;
        }
        // One turn clears every mark, so this ends.
        while std::mem::take(&mut self.slots[self.hand].again) {
            self.hand = (self.hand + 1) % self.slots.len();
        }
        let at = self.hand;
        self.hand = (self.hand + 1) % self.slots.len();
        let old = std::mem::replace(&mut self.slots[at].page, page);
        if self.places.get(&old) == Some(&at) {
            self.places.remove(&old);
        }
        at
    }
}

/// The payload of a delta from `base` to `pages`, which are equally long, if it is worth it.
pub(crate) fn delta<'a>(
    packer: &'a mut Packer,
    base: &mut [u8],
    pages: &[u8],
    payload: &'a mut Vec<u8>,
) -> Option<&'a [u8]> {
    let sum = XxHash3_64::oneshot(base);
    xor(base, pages);
    let packed = packer.pack(Packing::Lz4, base)?;
    if packed.len() + DELTA_SUM_BYTES >= pages.len() {
        return None;
    }
    payload.clear();
    payload.extend_from_slice(&sum.to_le_bytes());
    payload.extend_from_slice(packed);
    Some(payload)
}

/// Makes the pages of a run of `base`, which is what they are now, by a payload of [`Encoding::Delta`].
///
/// # Errors
/// `Payload` when it does not stand for these pages, or not for a change of what they are.
pub(crate) fn apply(unpacker: &mut Unpacker, run: PageRun, base: &mut [u8], payload: &[u8]) -> Result<()> {
    let wrong = |why: String| bad(Encoding::Delta, run, why);
    let (sum, packed) =
        payload.split_first_chunk::<DELTA_SUM_BYTES>().ok_or_else(|| wrong("it has no sum".to_owned()))?;
    if XxHash3_64::oneshot(base) != u64::from_le_bytes(*sum) {
        return Err(wrong("these pages are not what they were when they were sent last".to_owned()));
    }
    let change = unpacker.unpack(Packing::Lz4, run, packed)?;
    xor(base, change);
    Ok(())
}

fn xor(left: &mut [u8], right: &[u8]) {
    left.iter_mut().zip(right).for_each(|(left, right)| *left ^= right);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SPACE: SpaceId = SpaceId(0);

    fn run(count: u32) -> PageRun {
        PageRun { space: SPACE, first: 7, count }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn a_delta_makes_the_new_pages_of_the_old_ones(
            count in 1u32..5,
            seed in any::<u64>(),
            edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..60),
        ) {
            let old: Vec<u8> = (0..u64::from(count) * PAGE_SIZE as u64 / 8)
                .flat_map(|at| (seed ^ at.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes())
                .collect();
            let mut new = old.clone();
            for (at, byte) in edits {
                *at.get_mut(&mut new) = byte;
            }
            let (mut packer, mut unpacker) = (Packer::new(), Unpacker::new());
            let (mut base, mut payload) = (old.clone(), vec![]);
            let payload = delta(&mut packer, &mut base, &new, &mut payload).expect("little changed").to_vec();
            Encoding::Delta.check_payload(count, payload.len() as u32).unwrap();
            prop_assert!(payload.len() < 2000);
            let mut memory = old.clone();
            apply(&mut unpacker, run(count), &mut memory, &payload).unwrap();
            prop_assert_eq!(&memory, &new);
            // On any other base it is an error, and changes nothing.
            let mut other = old;
            other[9] ^= 1;
            let before = other.clone();
            prop_assert!(apply(&mut unpacker, run(count), &mut other, &payload).is_err());
            prop_assert_eq!(other, before);
        }

        #[test]
        fn garbage_is_an_error_and_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let mut memory = vec![0; PAGE_SIZE];
            let sum = XxHash3_64::oneshot(&memory).to_le_bytes();
            prop_assert!(apply(&mut Unpacker::new(), run(1), &mut memory, &bytes).is_err());
            prop_assert!(apply(&mut Unpacker::new(), run(1), &mut memory, &[&sum[..], &bytes].concat()).is_err());
            prop_assert_eq!(memory, vec![0; PAGE_SIZE]);
        }

        #[test]
        fn what_is_kept_is_what_was_put_last(
            most in 1usize..5,
            steps in proptest::collection::vec((0u64..8, any::<u8>(), any::<bool>()), 1..80),
        ) {
            let mut versions = Versions::new(most);
            let mut truth = HashMap::new();
            for (page, fill, put) in steps {
                if put {
                    versions.put(SPACE, page, &[fill; PAGE_SIZE]);
                    truth.insert(page, fill);
                    prop_assert_eq!(versions.get(SPACE, page), Some(&[fill; PAGE_SIZE][..]));
                } else {
                    versions.forget(SPACE, page);
                    truth.remove(&page);
                }
                let kept = (0..8).filter(|page| versions.get(SPACE, *page).is_some()).count();
                prop_assert!(kept <= most && versions.bytes.len() <= most * PAGE_SIZE);
                for page in 0..8 {
                    if let Some(found) = versions.get(SPACE, page) {
                        prop_assert_eq!(Some(&found[0]), truth.get(&page));
                    }
                }
            }
        }
    }

    #[test]
    fn a_page_that_comes_again_outlives_those_that_come_once() {
        let mut versions = Versions::new(8);
        for page in 0..100 {
            versions.put(SPACE, 1000, &[1; PAGE_SIZE]);
            versions.put(SPACE, page, &[2; PAGE_SIZE]);
        }
        assert!(versions.get(SPACE, 1000).is_some());
    }
}

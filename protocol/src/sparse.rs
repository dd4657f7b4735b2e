//! Page sets of a whole layout in few bytes: what is missing at a destination that starts before its memory is there, and what
//! a guest wrote that writes little.
//!
//! ```text
//! segment   u16 space   u16 zero   u32 words   u64 first word   then the words, 8 bytes each
//! ```
//!
//! Word *w* of a space stands for its pages 64 *w* to 64 *w* + 63, the lowest in bit 0. Segments come in ascending
//! order, so there is at most one word for a page. A segment ends where `GAP_WORDS` words or more are empty, which is
//! what another header costs: so the encoding is never longer than the plain bitmap by more than one header a space,
//! and a terabyte of which a few pages are missing takes a few bytes for each of them.

use crate::error::{ProtocolError, Result};
use crate::layout::Layout;
use crate::page::PageSet;

/// Bytes of a segment's header.
pub const SEGMENT_BYTES: usize = 16;

/// Empty words that end a segment.
const GAP_WORDS: usize = SEGMENT_BYTES / 8;

/// The bytes of one set for each space, in the order of the layout.
pub fn encode(sets: &[PageSet]) -> Vec<u8> {
    encode_words(sets.iter().map(PageSet::words))
}

/// As [`encode`], of sets that are kept as words: those of one space each, with no bits behind its last page.
pub fn encode_words<'a>(sets: impl Iterator<Item = &'a [u64]>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (space, words) in (0_u16..).zip(sets) {
        let mut at = 0;
        while let Some(first) = next_used(words, at) {
            at = segment_end(words, first);
            bytes.extend_from_slice(&space.to_le_bytes());
            bytes.extend_from_slice(&[0; 2]);
            // A space has at most 2^30 words.
            bytes.extend_from_slice(&((at - first) as u32).to_le_bytes());
            bytes.extend_from_slice(&(first as u64).to_le_bytes());
            bytes.extend(words[first..at].iter().flat_map(|word| word.to_le_bytes()));
        }
    }
    bytes
}

/// Reads one set for each space of a layout that was validated; allocates what the layout needs, whatever the bytes say.
///
/// # Errors
/// `Truncated`, or `Value` for a space, an order or a length that cannot be.
pub fn decode(layout: &Layout, bytes: &[u8]) -> Result<Vec<PageSet>> {
    const WHAT: &str = "a sparse page set";
    let mut words: Vec<Vec<u64>> =
        layout.spaces.iter().map(|space| vec![0; space.pages.div_ceil(64) as usize]).collect();
    let mut rest = bytes;
    let mut end = (0, 0);
    while !rest.is_empty() {
        let truncated = |needed: usize| ProtocolError::Truncated {
            what: WHAT,
            found: rest.len() as u64,
            needed: needed as u64,
        };
        let (header, behind) =
            rest.split_first_chunk::<SEGMENT_BYTES>().ok_or_else(|| truncated(SEGMENT_BYTES))?;
        let [s0, s1, z0, z1, c0, c1, c2, c3, first @ ..] = *header;
        let (space, zero) = (u16::from_le_bytes([s0, s1]), u16::from_le_bytes([z0, z1]));
        let (count, first) = (u32::from_le_bytes([c0, c1, c2, c3]), u64::from_le_bytes(first));
        let value = |what, found| Err(ProtocolError::Value { what, found });
        if zero != 0 {
            return value("a reserved field of a sparse page set", u64::from(zero));
        }
        let Some(target) = words.get_mut(usize::from(space)) else {
            return value("the space of a sparse page set", u64::from(space));
        };
        if (space, first) < end {
            return value("the order of a sparse page set", first);
        }
        let last = first.checked_add(u64::from(count)).filter(|last| *last <= target.len() as u64);
        let Some(last) = last.filter(|_| count > 0) else {
            return value("the words of a sparse page set", u64::from(count));
        };
        let length = count as usize * 8;
        let (body, behind) =
            behind.split_at_checked(length).ok_or_else(|| truncated(SEGMENT_BYTES + length))?;
        for (word, chunk) in target[first as usize..last as usize].iter_mut().zip(body.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*chunk);
        }
        end = (space, last);
        rest = behind;
    }
    let sets = layout.spaces.iter().zip(words);
    sets.map(|(space, words)| PageSet::from_words(space.pages, words)).collect()
}

fn next_used(words: &[u64], from: usize) -> Option<usize> {
    words[from..].iter().position(|word| *word != 0).map(|at| from + at)
}

/// Behind the last used word of the segment that begins at `first`.
fn segment_end(words: &[u64], first: usize) -> usize {
    let mut end = first + 1;
    while let Some(next) = next_used(words, end).filter(|next| next - end < GAP_WORDS) {
        end = next + 1;
    }
    end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::{Space, SpaceKind};
    use crate::page::SpaceId;
    use proptest::prelude::*;

    fn layout() -> Layout {
        let space = |id, pages| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address: 0 };
        Layout { spaces: vec![space(0, 5000), space(1, 70)] }
    }

    proptest! {
        #[test]
        fn what_was_written_is_read(
            inserts in proptest::collection::vec((0usize..2, 0u64..5000, 1u64..200), 0..40)
        ) {
            let layout = layout();
            let mut sets: Vec<_> = layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
            for (space, first, count) in inserts {
                sets[space].insert(first, count);
            }
            let bytes = encode(&sets);
            let plain: u64 = layout.spaces.iter().map(|space| PageSet::byte_len(space.pages)).sum();
            prop_assert!(bytes.len() as u64 <= plain + 2 * SEGMENT_BYTES as u64);
            prop_assert_eq!(decode(&layout, &bytes).unwrap(), sets);
        }

        #[test]
        fn garbage_is_no_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&layout(), &bytes);
        }
    }

    #[test]
    fn few_pages_of_much_memory_are_few_bytes() {
        let mut set = PageSet::empty(1 << 28);
        set.insert(1 << 20, 3);
        set.insert(1 << 27, 70);
        assert_eq!(encode(&[set]).len(), 2 * SEGMENT_BYTES + 3 * 8);
    }

    #[test]
    fn a_segment_that_does_not_fit_is_refused() {
        let segment = |space: u16, words: u32, first: u64, body: usize| {
            let mut bytes = space.to_le_bytes().to_vec();
            bytes.extend([0; 2]);
            bytes.extend(words.to_le_bytes());
            bytes.extend(first.to_le_bytes());
            bytes.extend(vec![0xff; body]);
            bytes
        };
        decode(&layout(), &segment(1, 2, 0, 16)).unwrap();
        for bad in [
            segment(2, 1, 0, 8),
            segment(1, 0, 0, 0),
            segment(1, 3, 0, 24),
            segment(1, 1, 2, 8),
            segment(1, u32::MAX, 0, 8),
            segment(1, 1, u64::MAX, 8),
            segment(1, 2, 0, 15),
            [segment(1, 1, 0, 8), segment(1, 1, 0, 8)].concat(),
            [segment(1, 1, 0, 8), segment(0, 1, 0, 8)].concat(),
            vec![0; 15],
        ] {
            assert!(decode(&layout(), &bad).is_err(), "{bad:?}");
        }
        let mut reserved = segment(0, 1, 0, 8);
        reserved[2] = 1;
        assert!(decode(&layout(), &reserved).is_err());
    }
}

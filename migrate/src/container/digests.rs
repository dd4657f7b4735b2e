//! What a container has written, where the kernel does not tell: pages whose digest is not that of what was read of them last.
//!
//! BLAKE3, so that a page of the same digest is the same page. It needs no standing still: what is compared is what is there when a round
//! looks with what was delivered, so a page that was read while it changed is found by the next look, and the last one is while nothing
//! writes. Each look reads all that there is, and 32 bytes for every page stay in memory.

use protocol::page::{PAGE_SIZE, SpaceId};
use protocol::payload::is_zero;

/// Digest of one page; none of what was never delivered.
type Digest = Option<[u8; 32]>;

/// Stands for a page of zeros, which need not be hashed.
const ZEROS: [u8; 32] = [0; 32];

/// The digests of what was delivered.
#[derive(Debug, Default)]
pub(crate) struct Digests {
    spaces: Vec<Vec<Digest>>,
}

impl Digests {
    /// These pages were delivered.
    pub(crate) fn delivered(&mut self, space: SpaceId, first: u64, bytes: &[u8]) {
        let at = usize::from(space.0);
        if self.spaces.len() <= at {
            self.spaces.resize_with(at + 1, Vec::new);
        }
        let Some(space) = self.spaces.get_mut(at) else { return };
        for (slot, page) in (usize::try_from(first).unwrap_or(usize::MAX)..).zip(bytes.chunks(PAGE_SIZE)) {
            if space.len() <= slot {
                space.resize(slot + 1, None);
            }
            space[slot] = Some(digest(page));
        }
    }

    /// The destination has zeros there: these pages were delivered as such, or never.
    pub(crate) fn delivered_zeros(&mut self, space: SpaceId, first: u64, count: u64) {
        let Some(space) = self.spaces.get_mut(usize::from(space.0)) else { return };
        let at = |slot: u64| usize::try_from(slot).unwrap_or(usize::MAX).min(space.len());
        let range = at(first)..at(first.saturating_add(count));
        space[range].fill(None);
    }

    /// Whether a page is not as it is where all that was never delivered is zeros.
    pub(crate) fn is_other_than_there(&self, space: SpaceId, slot: u64, page: Option<&[u8]>) -> bool {
        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
        let last = self.spaces.get(usize::from(space.0)).and_then(|space| *space.get(slot)?);
        last.unwrap_or(ZEROS) != page.map_or(ZEROS, digest)
    }

    /// Whether a page is not as it was delivered.
    pub(crate) fn differs(&self, space: SpaceId, slot: u64, page: &[u8]) -> bool {
        let slot = usize::try_from(slot).unwrap_or(usize::MAX);
        let last = self.spaces.get(usize::from(space.0)).and_then(|space| *space.get(slot)?);
        last != Some(digest(page))
    }
}

fn digest(page: &[u8]) -> [u8; 32] {
    if is_zero(page) { ZEROS } else { *blake3::hash(page).as_bytes() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_delivered_as_it_is_does_not_differ() {
        let mut digests = Digests::default();
        let (zeros, ones) = ([0; PAGE_SIZE], [1; PAGE_SIZE]);
        assert!(digests.differs(SpaceId(1), 7, &zeros), "a page of zeros must be delivered, too");
        digests.delivered(SpaceId(1), 6, &[ones, zeros].concat());
        assert!(!digests.differs(SpaceId(1), 6, &ones) && !digests.differs(SpaceId(1), 7, &zeros));
        assert!(digests.differs(SpaceId(1), 6, &zeros) && digests.differs(SpaceId(1), 5, &ones));
        assert!(digests.differs(SpaceId(0), 6, &ones));
        digests.delivered(SpaceId(1), 6, &zeros);
        assert!(!digests.differs(SpaceId(1), 6, &zeros));
    }

    #[test]
    fn what_was_never_delivered_is_zeros_where_it_is_new() {
        let mut digests = Digests::default();
        let (space, ones) = (SpaceId(2), [1; PAGE_SIZE]);
        assert!(!digests.is_other_than_there(space, 7, None));
        assert!(!digests.is_other_than_there(space, 7, Some(&[0; PAGE_SIZE])));
        assert!(digests.is_other_than_there(space, 7, Some(&ones)));
        digests.delivered(space, 6, &[ones, ones].concat());
        assert!(digests.is_other_than_there(space, 7, None));
        assert!(!digests.is_other_than_there(space, 7, Some(&ones)));
        digests.delivered_zeros(space, 7, 100);
        assert!(!digests.is_other_than_there(space, 7, None));
        assert!(digests.is_other_than_there(space, 7, Some(&ones)));
    }
}

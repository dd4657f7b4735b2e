//! What a lane remembers of the pages it sent, and what can be made of that.
//!
//! Every page that is sent goes through [`Seen::kind`] and [`Seen::sent`], or through [`Seen::zeros`], in the order of the stream and
//! whichever way it is written: what is remembered is always what the receiver will have by then. A lane that is opened anew
//! remembers nothing.

use super::Use;
use super::look::{ANYWAY, Look};
use crate::codec::Packer;
use crate::codec::delta::{Versions, delta};
use crate::codec::known::Index;
use bytes::Bytes;
use protocol::page::{PAGE_SIZE, PageRun, SpaceId};
use protocol::payload::{KNOWN_PAGE_BYTES, KnownPage};
use std::time::Instant;

/// Versions that are kept for deltas, by all lanes together: 64 MiB.
const VERSIONS_PAGES: usize = (64 << 20) / PAGE_SIZE;

/// Pages whose content is remembered, by all lanes together: 512 MiB of memory, in some 20 MiB.
const INDEX_PAGES: usize = 128 << 10;

/// What a delta must be shorter than, as a part of its pages: packing them without a base costs no reading at the receiver.
const DELTA_PART: usize = 2;

/// What a page is to the receiver.
#[derive(Debug, Clone, Copy)]
pub(super) enum Kind {
    /// It has it.
    Known(KnownPage),
    /// It has an older version, and so has this lane.
    Based,
    /// It is new.
    Other,
}

impl Kind {
    pub(super) fn is_like(&self, other: &Self) -> bool {
        std::mem::discriminant(self) == std::mem::discriminant(other)
    }

    /// The payload for known pages.
    pub(super) fn payload(kinds: &[Self]) -> Bytes {
        let mut payload = Vec::with_capacity(kinds.len() * KNOWN_PAGE_BYTES);
        for kind in kinds {
            if let Self::Known(known) = kind {
                payload.extend_from_slice(&known.encode());
            }
        }
        payload.into()
    }
}

pub(super) struct Seen {
    known: Use,
    delta: Use,
    index: Index,
    versions: Versions,
    known_look: Look,
    delta_look: Look,
    /// As it was found for what is being encoded.
    known_pays: bool,
    delta_pays: bool,
    round: u32,
    base: Vec<u8>,
    payload: Vec<u8>,
}

impl Seen {
    pub(super) fn new(known: Use, delta: Use, lanes: u16) -> Self {
        let lanes = usize::from(lanes.max(1));
        Self {
            known,
            delta,
            index: Index::new(INDEX_PAGES / lanes),
            versions: Versions::new(VERSIONS_PAGES / lanes),
            known_look: Look::default(),
            delta_look: Look::default(),
            known_pays: false,
            delta_pays: false,
            round: 0,
            base: Vec::new(),
            payload: Vec::new(),
        }
    }

    /// Pages of this round follow; sending a byte takes so long.
    pub(super) fn begin(&mut self, round: u32, send_ns_per_byte: Option<f64>) {
        self.round = round;
        self.known_pays = self.known_look.pays(send_ns_per_byte);
        self.delta_pays = self.delta_look.pays(send_ns_per_byte);
    }

    /// Whether any page is looked at.
    pub(super) fn looks(&self) -> bool {
        self.known != Use::Never || self.delta != Use::Never
    }

    /// What a page is that is sent next.
    pub(super) fn kind(&mut self, (space, page): (SpaceId, u64), content: &[u8]) -> Kind {
        if !self.asks_index(content) {
            self.index.sent(space, page, None);
        } else {
            let begun = Instant::now();
            let sum = self.index.sum(content);
            let found = self.index.find(space, sum, content);
            let took = begun.elapsed().as_nanos() as f64 / PAGE_SIZE as f64;
            let saved = if found.is_some() { 1.0 - KNOWN_PAGE_BYTES as f64 / PAGE_SIZE as f64 } else { 0.0 };
            self.known_look.took(took, saved);
            self.index.sent(space, page, Some(sum));
            if let Some(known) = found {
                return Kind::Known(known);
            }
        }
        if self.versions.get(space, page).is_some() { Kind::Based } else { Kind::Other }
    }

    /// The payload of a delta for pages that have a base, if that is short.
    pub(super) fn delta(
        &mut self,
        packer: &mut Packer,
        (space, first): (SpaceId, u64),
        content: &[u8],
    ) -> Option<Bytes> {
        let begun = Instant::now();
        self.base.clear();
        for page in (first..).take(content.len() / PAGE_SIZE) {
            self.base.extend_from_slice(self.versions.get(space, page)?);
        }
        let payload = delta(packer, &mut self.base, content, &mut self.payload)
            .filter(|payload| payload.len() * DELTA_PART <= content.len());
        let saved = payload.map_or(0.0, |payload| 1.0 - payload.len() as f64 / content.len() as f64);
        let took = begun.elapsed().as_nanos() as f64 / content.len() as f64;
        self.delta_look.took(took, saved);
        payload.map(Bytes::copy_from_slice)
    }

    /// Pages of these kinds were sent, one way or another.
    pub(super) fn sent(&mut self, (space, first): (SpaceId, u64), content: &[u8], kinds: &[Kind]) {
        for ((page, content), kind) in (first..).zip(content.chunks(PAGE_SIZE)).zip(kinds) {
            // A page is worth its room once it came again.
            if self.round > 0 && self.keeps_version(page) {
                self.versions.put(space, page, content);
            } else if !matches!(kind, Kind::Other) {
                self.versions.forget(space, page);
            }
        }
    }

    /// Pages were sent as zeros.
    pub(super) fn zeros(&mut self, run: PageRun) {
        if self.round > 0 && self.looks() {
            for page in run.first..run.end() {
                self.index.sent(run.space, page, None);
                self.versions.forget(run.space, page);
            }
        }
    }

    /// Where looking was not found to pay, one content in [`ANYWAY`] is looked at: always the same ones, so that equal pages
    /// meet.
    fn asks_index(&self, content: &[u8]) -> bool {
        match self.known {
            Use::Never => false,
            Use::Always => true,
            Use::Measured => self.known_pays || key(content).is_multiple_of(ANYWAY),
        }
    }

    fn keeps_version(&self, page: u64) -> bool {
        match self.delta {
            Use::Never => false,
            Use::Always => true,
            Use::Measured => self.delta_pays || page.is_multiple_of(ANYWAY),
        }
    }
}

/// A number that equal pages share, of a few words in the middle of them.
fn key(content: &[u8]) -> u64 {
    let words = content[content.len() / 2..].as_chunks::<8>().0.iter().take(4);
    words.fold(0, |key: u64, word| (key ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15))
        >> 32
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::page::PageRun;
    use std::collections::HashMap;

    const SPACE: SpaceId = SpaceId(0);

    /// One page in a few versions, some of them alike.
    fn content(version: u8) -> Vec<u8> {
        let mut page: Vec<u8> = (0..PAGE_SIZE).map(|at| ((at * at) >> 7) as u8).collect();
        page[100..100 + usize::from(version) * 9].fill(version);
        page
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        #[test]
        fn what_is_remembered_is_what_the_receiver_has(
            always in any::<bool>(),
            rounds in proptest::collection::vec(proptest::collection::vec((0u64..6, 0u8..5), 0..12), 1..8),
        ) {
            let when = if always { Use::Always } else { Use::Measured };
            let (mut seen, mut packer) = (Seen::new(when, when, 1), Packer::new());
            let mut receiver: HashMap<u64, Vec<u8>> = HashMap::new();
            for (round, pages) in (0u32..).zip(rounds) {
                seen.begin(round, Some(1.0));
                // In a round a page is sent once.
                let pages: std::collections::BTreeMap<u64, u8> = pages.into_iter().collect();
                for (page, version) in pages {
                    if version == 4 {
                        seen.zeros(PageRun { space: SPACE, first: page, count: 1 });
                        receiver.insert(page, vec![0; PAGE_SIZE]);
                        continue;
                    }
                    let new = content(version);
                    let kind = seen.kind((SPACE, page), &new);
                    match kind {
                        Kind::Known(known) => prop_assert_eq!(receiver.get(&known.page), Some(&new)),
                        Kind::Based => {
                            let payload = seen.delta(&mut packer, (SPACE, page), &new).expect("little changed");
                            let mut memory = receiver[&page].clone();
                            let run = PageRun { space: SPACE, first: page, count: 1 };
                            let mut unpacker = crate::codec::Unpacker::new();
                            crate::codec::delta::apply(&mut unpacker, run, &mut memory, &payload).unwrap();
                            prop_assert_eq!(&memory, &new);
                        }
                        Kind::Other => {}
                    }
                    seen.sent((SPACE, page), &new, &[kind]);
                    receiver.insert(page, new);
                }
            }
        }
    }

    #[test]
    fn a_look_that_never_saves_is_taken_seldom() {
        let mut seen = Seen::new(Use::Measured, Use::Measured, 1);
        let asked = (0..4096u64).filter(|number| {
            let page: Vec<u8> = (0..512)
                .flat_map(|at| (number * 512 + at).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())
                .collect();
            seen.begin(0, Some(100.0));
            seen.kind((SPACE, *number), &page);
            seen.asks_index(&page)
        });
        assert!((128..512).contains(&asked.count()));
    }
}

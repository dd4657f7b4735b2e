//! What a program has written, where the kernel does not tell: pages whose digest is another than the last one.
//!
//! BLAKE3, so that a page of the same digest is the same page. Each look reads all that was ever touched, and 32 bytes for every page stay
//! in memory. It is sound because the program stands still while it is looked at, and until its checkpoint is taken.

use crate::error::Result;
use crate::memory::GuestMemory;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet};
use protocol::payload::is_zero;

/// Pages that are read at once: what is read stays in a core's cache until it is hashed.
const PIECE_PAGES: u32 = 16;

/// Digest of one page.
type Digest = [u8; 32];

/// The digest of a page of zeros, whether it was touched or not.
const OF_ZEROS: Digest = [0; 32];

/// The digests of all pages, as of the last look.
pub(super) struct Digests {
    seen: Vec<Vec<Digest>>,
}

impl Digests {
    /// Those of what memory holds now.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(super) fn of(layout: &Layout, memory: &mut GuestMemory) -> Result<Self> {
        let zeros = |pages| vec![OF_ZEROS; usize::try_from(pages).unwrap_or(usize::MAX)];
        let mut digests = Self { seen: layout.spaces.iter().map(|space| zeros(space.pages)).collect() };
        let mut nothing = super::none_of(layout);
        digests.look(layout, memory, &mut nothing)?;
        Ok(digests)
    }

    /// Puts every page into `changed` that is not as it was at the last look.
    ///
    /// # Errors
    /// When memory cannot be read. What was found until then is in `changed`, and the next look finds the rest.
    pub(super) fn look(
        &mut self,
        layout: &Layout,
        memory: &mut GuestMemory,
        changed: &mut [PageSet],
    ) -> Result<()> {
        let mut buffer = vec![0; PIECE_PAGES as usize * PAGE_SIZE];
        for ((space, seen), changed) in layout.spaces.iter().zip(&mut self.seen).zip(changed) {
            let mut touched = PageSet::full(space.pages);
            memory.remove_holes(space.id, 0, space.pages, &mut touched)?;
            let mut note = |page: u64, digest: Digest| {
                let place = usize::try_from(page).ok().and_then(|page| seen.get_mut(page));
                if let Some(last) = place.filter(|last| **last != digest) {
                    *last = digest;
                    changed.insert(page, 1);
                }
            };
            for run in touched.runs(space.id, PIECE_PAGES) {
                let bytes = buffer.get_mut(..run.bytes()).unwrap_or_default();
                memory.read(run.space, run.offset(), bytes)?;
                for (page, bytes) in (run.first..).zip(bytes.chunks(PAGE_SIZE)) {
                    let digest = if is_zero(bytes) { OF_ZEROS } else { *blake3::hash(bytes).as_bytes() };
                    note(page, digest);
                }
            }
            // What is a hole now may have been something else.
            let mut holes = PageSet::full(space.pages);
            holes.subtract(&touched);
            for PageRun { first, count, .. } in holes.runs(space.id, u32::MAX) {
                (first..first + u64::from(count)).for_each(|page| note(page, OF_ZEROS));
            }
        }
        Ok(())
    }
}

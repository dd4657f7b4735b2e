//! Digests over a frozen workload's memory, stripe by stripe: what both ends compare when the operator wants to be sure.
//!
//! BLAKE3, so that equal digests are equal memory. Several threads read and hash; memory that was never touched is not
//! read where the host knows that, and is not allocated in any case. Zeros have a digest that nobody needs to compute.

use crate::error::{Error, Result};
use crate::memory::PageReader;
use protocol::control::STRIPE_DIGEST_BYTES;
use protocol::frame::STRIPE_PAGES;
use protocol::layout::{Layout, Space};
use protocol::page::{PAGE_SIZE, PageRun};
use protocol::payload::is_zero;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::thread;

/// What is read at once: it stays in a core's cache between the copy and the hash.
const PIECE_BYTES: usize = 64 << 10;

/// The most threads: behind that, memory is the limit.
const MOST_THREADS: usize = 16;

/// Digest of one stripe.
pub(crate) type Digest = [u8; STRIPE_DIGEST_BYTES];

/// The digest of a stripe of zeros.
const OF_ZEROS: Digest = [0; STRIPE_DIGEST_BYTES];

/// All stripes of a layout that was checked, in its order.
pub(crate) fn stripes(layout: &Layout) -> Vec<PageRun> {
    let starts = |space: &Space| (0..space.pages.div_ceil(STRIPE_PAGES)).map(|number| number * STRIPE_PAGES);
    layout.spaces.iter().flat_map(|space| starts(space).map(|first| stripe_of(space, first))).collect()
}

/// The stripe in which a page of this space lies.
pub(crate) fn stripe_of(space: &Space, page: u64) -> PageRun {
    let first = page / STRIPE_PAGES * STRIPE_PAGES;
    PageRun { space: space.id, first, count: STRIPE_PAGES.min(space.pages - first) as u32 }
}

/// The digests of these stripes, in their order.
///
/// # Errors
/// The memory's.
pub(crate) fn digests(memory: &dyn PageReader, stripes: &[PageRun]) -> Result<Vec<Digest>> {
    let wanted = thread::available_parallelism().map_or(1, |threads| threads.get().min(MOST_THREADS));
    let next = AtomicUsize::new(0);
    let work = || -> Result<Vec<(usize, Digest)>> {
        let (mut buffer, mut done) = (vec![0; PIECE_BYTES], Vec::new());
        loop {
            let index = next.fetch_add(1, Relaxed);
            let Some(stripe) = stripes.get(index) else { return Ok(done) };
            done.push((index, digest(memory, stripe, &mut buffer)?));
        }
    };
    let parts = thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().name("digest".into()).spawn_scoped(scope, work);
        // A thread that cannot be started is one fewer: this one does what is left.
        let threads: Vec<_> =
            (1..wanted.min(stripes.len())).filter_map(|number| spawn(number).ok()).collect();
        let mut parts = vec![work()];
        for thread in threads {
            parts.push(
                thread
                    .join()
                    .unwrap_or_else(|_| Err(Error::Host("a thread that hashes memory ended".into()))),
            );
        }
        parts
    });
    let mut digests = vec![OF_ZEROS; stripes.len()];
    for part in parts {
        for (index, digest) in part? {
            if let Some(place) = digests.get_mut(index) {
                *place = digest;
            }
        }
    }
    Ok(digests)
}

fn digest(memory: &dyn PageReader, stripe: &PageRun, buffer: &mut [u8]) -> Result<Digest> {
    if memory.is_untouched(*stripe)? {
        return Ok(OF_ZEROS);
    }
    let mut hasher = blake3::Hasher::new();
    // Zeros that nothing else came before: only what follows decides whether they are hashed.
    let (mut zeros, mut at, end) = (0_usize, 0_usize, stripe.bytes());
    while at < end {
        let length = buffer.len().min(end - at);
        let Some(piece) = buffer.get_mut(..length) else { break };
        memory.read(stripe.space, stripe.offset() + at as u64, piece)?;
        at += length;
        if hasher.count() == 0 && is_zero(piece) {
            zeros += length;
            continue;
        }
        for _ in 0..std::mem::take(&mut zeros) / PAGE_SIZE {
            hasher.update(&[0; PAGE_SIZE]);
        }
        hasher.update(piece);
    }
    Ok(if hasher.count() == 0 { OF_ZEROS } else { *hasher.finalize().as_bytes() })
}

/// What was found to differ.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Difference {
    /// The first stripe that differs.
    first: Option<PageRun>,
    /// How many do.
    differing: u64,
    /// How many were compared.
    pub(crate) compared: u64,
}

impl Difference {
    /// Compares stripes with what the other end says of them.
    pub(crate) fn compare(&mut self, stripes: &[PageRun], ours: &[Digest], theirs: &[Digest]) {
        for ((stripe, ours), theirs) in stripes.iter().zip(ours).zip(theirs) {
            self.compared += 1;
            if ours != theirs {
                self.first.get_or_insert(*stripe);
                self.differing += 1;
            }
        }
    }

    /// In words, if anything differs.
    pub(crate) fn describe(&self) -> Option<String> {
        let PageRun { space, first, .. } = self.first?;
        let last = self.first?.end() - 1;
        Some(format!(
            "memory differs between the two hosts: pages {first} to {last} of space {}, and {} of {} stripes of 2 MiB in \
             all. One of the hosts, or what lies between them, changes what it is given: test their memory",
            space.0, self.differing, self.compared
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use protocol::layout::SpaceKind;
    use protocol::page::SpaceId;
    use std::sync::atomic::AtomicU64;

    struct Bytes {
        spaces: Vec<Vec<u8>>,
        reads: AtomicU64,
        fails: bool,
    }

    impl Bytes {
        fn of(spaces: Vec<Vec<u8>>) -> Self {
            Self { spaces, reads: AtomicU64::new(0), fails: false }
        }
    }

    impl PageReader for Bytes {
        fn read(&self, space: SpaceId, offset: u64, buffer: &mut [u8]) -> Result<()> {
            if self.fails {
                return Err(Error::Host("it is gone".into()));
            }
            self.reads.fetch_add(1, Relaxed);
            let at = offset as usize;
            buffer.copy_from_slice(&self.spaces[usize::from(space.0)][at..at + buffer.len()]);
            Ok(())
        }

        fn is_untouched(&self, run: PageRun) -> Result<bool> {
            // Only the second space knows its holes.
            let at = run.offset() as usize;
            Ok(run.space.0 == 1 && is_zero(&self.spaces[1][at..at + run.bytes()]))
        }
    }

    fn layout(pages: [u64; 2]) -> Layout {
        let space = |id, pages, guest_address| Space {
            id: SpaceId(id),
            kind: SpaceKind::Memory,
            pages,
            guest_address,
        };
        Layout { spaces: vec![space(0, pages[0], 0), space(1, pages[1], 1 << 40)] }
    }

    fn zeros(pages: [u64; 2]) -> Vec<Vec<u8>> {
        pages.map(|pages| vec![0; pages as usize * PAGE_SIZE]).to_vec()
    }

    #[test]
    fn stripes_cover_every_page_once_and_in_order() {
        let runs = stripes(&layout([1100, 512]));
        let found: Vec<_> = runs.iter().map(|run| (run.space.0, run.first, run.count)).collect();
        assert_eq!(found, [(0, 0, 512), (0, 512, 512), (0, 1024, 76), (1, 0, 512)]);
    }

    #[test]
    fn zeros_have_their_digest_whether_they_are_read_or_known_to_be_holes() {
        let pages = [600, 600];
        let memory = Bytes::of(zeros(pages));
        let stripes = stripes(&layout(pages));
        assert_eq!(digests(&memory, &stripes).unwrap(), [OF_ZEROS; 4]);
        // 37 pieces of the first space, and nothing of the second, which knows.
        assert_eq!(memory.reads.load(Relaxed), 32 + 6);
    }

    #[test]
    fn memory_that_cannot_be_read_is_an_error_and_not_a_digest() {
        let memory = Bytes { fails: true, ..Bytes::of(zeros([600, 1])) };
        assert!(digests(&memory, &stripes(&layout([600, 1]))).is_err());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]

        #[test]
        fn a_stripe_with_any_byte_in_it_has_the_digest_of_its_bytes_and_no_other(
            space in 0_usize..2, at in any::<prop::sample::Index>(), bit in 0_u32..8,
        ) {
            let pages = [700, 530];
            let mut spaces = zeros(pages);
            let at = at.index(spaces[space].len());
            spaces[space][at] ^= 1 << bit;
            let stripes = stripes(&layout(pages));
            let expected: Vec<Digest> = stripes.iter().map(|run| {
                let from = run.offset() as usize;
                let bytes = &spaces[usize::from(run.space.0)][from..from + run.bytes()];
                if is_zero(bytes) { OF_ZEROS } else { *blake3::hash(bytes).as_bytes() }
            }).collect();
            let found = digests(&Bytes::of(spaces), &stripes).unwrap();
            prop_assert_eq!(&found, &expected);

            let mut difference = Difference::default();
            difference.compare(&stripes, &found, &[OF_ZEROS; 4]);
            let PageRun { first, .. } = stripes[found.iter().position(|digest| *digest != OF_ZEROS).unwrap()];
            let text = difference.describe().unwrap();
            let named = format!("pages {first} to");
            prop_assert!(text.contains(&named), "{}", text);
            prop_assert!(text.contains(&format!("of space {space}, and 1 of 4 stripes")), "{}", text);
        }
    }
}

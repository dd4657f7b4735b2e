//! Merging a chain into a new full checkpoint: the same memory, data of its own, no workload touched.
//!
//! The pages are read in the order in which they are stored and written so, both ways sequentially. Until the manifest is there the new
//! checkpoint does not exist, and the old ones are never changed: a crash leaves them and some data that `migrate store gc` removes.

use crate::cancel::CancelFlag;
use crate::error::Result;
use crate::restore::image::Image;
use crate::store::Lease;
use crate::vault::{Committed, RAW_EXTENT_PAGES, SegmentWriter, Vault, ZSTD_EXTENT_PAGES, new_id};
use protocol::checkpoint::index::{At, Index, Placed};
use protocol::checkpoint::manifest::{Manifest, Segment};
use protocol::checkpoint::name::{CheckpointId, DATA};
use protocol::checkpoint::segment::Encoding;
use protocol::page::{PAGE_SIZE, PageRun};

/// A segment that is as long is finished.
const SEGMENT_BYTES: u64 = 64 << 20;

/// What compacting a checkpoint does, or would do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Forecast {
    /// The checkpoint.
    pub id: CheckpointId,
    /// How many links its chain has.
    pub links: usize,
    /// Whether there is anything to merge: links below it, or data of others.
    pub is_needed: bool,
    /// Pages that are not zeros.
    pub data_pages: u64,
    /// Stored bytes that are read.
    pub stored_bytes: u64,
}

impl Forecast {
    /// Of this checkpoint's memory.
    pub fn of(image: &Image) -> Option<Self> {
        let newest = &image.chain().first()?.manifest;
        let id = newest.id;
        Some(Self {
            id,
            links: image.chain().len(),
            is_needed: newest.parent.is_some()
                || newest.segments.iter().any(|segment| segment.checkpoint != id),
            data_pages: image.plan().data_pages(),
            stored_bytes: image.plan().stored_bytes(),
        })
    }
}

/// Writes the memory of a checkpoint and its state as a new full one, that was taken when the old one was. It belongs to no group.
///
/// # Errors
/// `Store`, `Host` or `Interrupted`: there is no new checkpoint then, and what was written of it is removed as far as that is possible.
pub fn compact(vault: &Vault, image: &Image, lease: &dyn Lease, cancel: &CancelFlag) -> Result<Committed> {
    let id = new_id()?;
    let result = write(vault, image, id, lease, cancel);
    if result.is_err() {
        // What cannot be removed now is what a crash would leave, too.
        for object in vault.store().list(&format!("{DATA}{id}/")).unwrap_or_default() {
            vault.store().delete(&object.name).ok();
        }
    }
    result
}

fn write(
    vault: &Vault,
    image: &Image,
    id: CheckpointId,
    lease: &dyn Lease,
    cancel: &CancelFlag,
) -> Result<Committed> {
    let Some(Committed { manifest: old, .. }) = image.chain().first() else {
        return Err(crate::Error::Store(format!("{} has an empty chain", vault.place())));
    };
    let (machine, state) = vault.state(old)?;
    let mut rewriter = Rewriter::begin(vault, id)?;
    image.each(cancel, &mut |run, pages, encoding| rewriter.add(run, pages, encoding))?;
    let (segments, index) = rewriter.finish()?;
    let data_pages = image.plan().data_pages();
    let manifest = Manifest {
        id,
        parent: None,
        deltas: 0,
        segments,
        index: vault.put_index(id, &index)?,
        state: vault.put_state(id, &machine, &state)?,
        data_pages,
        shared_pages: 0,
        zero_pages: old.layout.total_pages().saturating_sub(data_pages),
        merged: None,
        group: None,
        ..old.clone()
    };
    cancel.check()?;
    vault.commit(lease, manifest)
}

/// Pages that wait until they are an extent.
struct Batch {
    pages: Vec<u8>,
    runs: Vec<PageRun>,
    most_pages: u16,
    pack: bool,
}

impl Batch {
    fn new(most_pages: u16, pack: bool) -> Self {
        Self { pages: Vec::new(), runs: Vec::new(), most_pages, pack }
    }

    /// How many pages it has room for.
    fn room(&self) -> usize {
        usize::from(self.most_pages) - self.pages.len() / PAGE_SIZE
    }
}

struct Rewriter<'a> {
    vault: &'a Vault,
    id: CheckpointId,
    writer: SegmentWriter,
    segments: Vec<Segment>,
    index: Index,
    sums: Vec<u64>,
    /// What was packed is worth packing, and what was not is not tried again.
    batches: [Batch; 2],
}

impl<'a> Rewriter<'a> {
    fn begin(vault: &'a Vault, id: CheckpointId) -> Result<Self> {
        Ok(Self {
            vault,
            id,
            writer: SegmentWriter::begin(vault, id, 0)?,
            segments: Vec::new(),
            index: Index::default(),
            sums: Vec::new(),
            batches: [Batch::new(RAW_EXTENT_PAGES, false), Batch::new(ZSTD_EXTENT_PAGES, true)],
        })
    }

    fn add(&mut self, run: PageRun, pages: &[u8], encoding: Encoding) -> Result<()> {
        let which = usize::from(encoding == Encoding::Zstd);
        let (mut run, mut pages) = (run, pages);
        while run.count > 0 {
            let Some(batch) = self.batches.get_mut(which) else { return Ok(()) };
            let count = batch.room().min(run.count as usize);
            let (now, rest) = pages.split_at(pages.len().min(count * PAGE_SIZE));
            batch.pages.extend_from_slice(now);
            batch.runs.push(PageRun { count: count as u32, ..run });
            if batch.room() == 0 {
                self.flush(which)?;
            }
            run = PageRun { first: run.first + count as u64, count: run.count - count as u32, ..run };
            pages = rest;
        }
        Ok(())
    }

    fn flush(&mut self, which: usize) -> Result<()> {
        let Some(batch) = self.batches.get_mut(which).filter(|batch| !batch.runs.is_empty()) else {
            return Ok(());
        };
        if self.writer.bytes() >= SEGMENT_BYTES {
            let number = self.segments.len() as u32 + 1;
            let next = SegmentWriter::begin(self.vault, self.id, number)?;
            self.segments.push(std::mem::replace(&mut self.writer, next).finish()?);
        }
        self.sums.clear();
        let extent = self.writer.append(&batch.pages, batch.pack, &mut self.sums)?;
        let extent = self.index.push(extent, &self.sums);
        let mut page = 0;
        for run in batch.runs.drain(..) {
            self.index.runs.push(Placed { run, at: At::Extent { extent, page } });
            page += run.count as u16;
        }
        batch.pages.clear();
        Ok(())
    }

    fn finish(mut self) -> Result<(Vec<Segment>, Index)> {
        self.flush(0)?;
        self.flush(1)?;
        self.segments.push(self.writer.finish()?);
        self.index.runs.sort_unstable_by_key(|placed| (placed.run.space, placed.run.first));
        Ok((self.segments, self.index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryStore, Store as _};
    use crate::vault::sample;
    use protocol::checkpoint::name;

    fn image_of(vault: &Vault, id: CheckpointId) -> Vec<Vec<u8>> {
        let mut spaces: Vec<_> =
            sample::layout().spaces.iter().map(|space| vec![0; space.pages as usize * PAGE_SIZE]).collect();
        let image = Image::open(vault, id).unwrap();
        let mut seen = 0;
        image
            .each(&CancelFlag::default(), &mut |run, pages, _| {
                assert_eq!(pages.len(), run.bytes());
                spaces[usize::from(run.space.0)][run.offset() as usize..][..run.bytes()]
                    .copy_from_slice(pages);
                seen += u64::from(run.count);
                Ok(())
            })
            .unwrap();
        assert_eq!(seen, image.plan().data_pages());
        spaces
    }

    fn compacted(vault: &Vault, id: CheckpointId) -> Result<Committed> {
        let lease = vault.store().lock("a test")?;
        compact(vault, &Image::open(vault, id)?, &*lease, &CancelFlag::default())
    }

    #[test]
    fn a_compacted_chain_is_the_same_memory_and_stands_alone() {
        let vault = sample::vault();
        let (links, images) = sample::chain(&vault, 4);
        let old = &links[3].manifest;
        let new = compacted(&vault, old.id).unwrap().manifest;
        assert_eq!(
            (new.taken_unix_ms, &new.workload, &new.parent, new.deltas),
            (old.taken_unix_ms, &old.workload, &None, 0)
        );
        assert_ne!(new.id, old.id);
        assert!(new.segments.iter().all(|segment| segment.checkpoint == new.id));
        assert_eq!(new.data_pages + new.zero_pages, old.layout.total_pages());
        // What stands on the old ones is as it was.
        assert!(image_of(&vault, links[4].manifest.id) == images[4]);
        // Without the old ones it is all there.
        for link in &links {
            for object in vault.store().list(&format!("{DATA}{}/", link.manifest.id)).unwrap() {
                vault.store().delete(&object.name).unwrap();
            }
            vault.store().delete(&name::manifest(link.manifest.id)).unwrap();
        }
        assert!(image_of(&vault, new.id) == images[3]);
        assert_eq!(vault.state(&new).unwrap().1, old.id.to_string().into_bytes());
        let again = Image::open(&vault, new.id).unwrap();
        assert!(!Forecast::of(&again).unwrap().is_needed);
    }

    #[test]
    fn compacting_what_is_damaged_leaves_the_store_as_it_was() {
        let store = MemoryStore::new();
        let vault = Vault::create(std::sync::Arc::new(store.clone()), None).unwrap();
        let (links, _) = sample::chain(&vault, 2);
        let segment = name::segment(links[0].manifest.id, 0);
        let reader = store.open(&segment).unwrap();
        let mut bytes = vec![0; reader.bytes() as usize];
        reader.read_at(0, &mut bytes).unwrap();
        let last = bytes.len() - 1;
        bytes[last] ^= 1;
        store.delete(&segment).unwrap();
        store.put(&segment, &bytes).unwrap();
        let names = |store: &MemoryStore| -> Vec<_> {
            store.list("").unwrap().into_iter().map(|found| found.name).collect()
        };
        let before = names(&store);
        let error = compacted(&vault, links[2].manifest.id).unwrap_err().to_string();
        assert!(error.contains(&segment), "{error}");
        assert_eq!(names(&store), before);
        assert!(store.leftovers().unwrap().is_empty());
    }

    #[test]
    fn compacting_that_is_stopped_leaves_the_store_as_it_was() {
        let vault = sample::vault();
        let (links, _) = sample::chain(&vault, 1);
        let before = vault.store().list("").unwrap();
        let cancel = CancelFlag::default();
        cancel.set();
        let lease = vault.store().lock("a test").unwrap();
        let image = Image::open(&vault, links[1].manifest.id).unwrap();
        let error = compact(&vault, &image, &*lease, &cancel).unwrap_err();
        assert!(matches!(error, crate::Error::Interrupted(_)), "{error}");
        assert_eq!(vault.store().list("").unwrap(), before);
    }
}

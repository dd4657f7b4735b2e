//! A memory that changes, and its checkpoints in a store: for tests of whatever reads one.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use super::{Committed, RAW_EXTENT_PAGES, SegmentWriter, Vault, ZSTD_EXTENT_PAGES};
use crate::store::MemoryStore;
use protocol::checkpoint::index::{At, Index, Placed};
use protocol::checkpoint::manifest::Manifest;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::WorkloadKind;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use std::sync::Arc;

/// The layout of the sample: two spaces with a hole between them.
pub(crate) fn layout() -> Layout {
    let space =
        |id, pages, guest_address| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address };
    Layout { spaces: vec![space(0, 300, 0), space(1, 90, 4 << 30)] }
}

/// A memory, written by a generator whose seed is given, and which pages that changed.
pub(crate) struct Memory {
    layout: Layout,
    pub(crate) spaces: Vec<Vec<u8>>,
    changed: Vec<PageSet>,
    random: u64,
}

impl Memory {
    /// All zeros.
    pub(crate) fn new(seed: u64) -> Self {
        Self::of(layout(), seed)
    }

    /// The same for another layout, of two spaces.
    pub(crate) fn of(layout: Layout, seed: u64) -> Self {
        Self {
            spaces: layout.spaces.iter().map(|space| vec![0; space.pages as usize * PAGE_SIZE]).collect(),
            changed: layout.spaces.iter().map(|space| PageSet::empty(space.pages)).collect(),
            random: seed | 1,
            layout,
        }
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    /// Writes runs of pages: noise, text-like, or zeros.
    pub(crate) fn write(&mut self, runs: usize) {
        for _ in 0..runs {
            let space = (self.random() % 2) as usize;
            let pages = self.changed[space].pages();
            let first = self.random() % pages;
            let count = (self.random() % 40 + 1).min(pages - first);
            let kind = self.random() % 3;
            self.changed[space].insert(first, count);
            for word in 0..count as usize * PAGE_SIZE / 8 {
                let value = match kind {
                    0 => 0,
                    1 => self.random() % 3,
                    _ => self.random(),
                };
                let at = first as usize * PAGE_SIZE + word * 8;
                self.spaces[space][at..at + 8].copy_from_slice(&value.to_le_bytes());
            }
        }
    }

    /// Writes noise into one page.
    pub(crate) fn noise(&mut self, space: usize, page: u64) {
        self.changed[space].insert(page, 1);
        for word in 0..PAGE_SIZE / 8 {
            let (value, at) = (self.random(), page as usize * PAGE_SIZE + word * 8);
            self.spaces[space][at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    /// Takes a checkpoint: on a parent what changed since the last one, and else everything.
    pub(crate) fn checkpoint(
        &mut self,
        vault: &Vault,
        id: CheckpointId,
        workload: &str,
        parent: Option<&Committed>,
    ) -> Committed {
        let lease = vault.store().lock("a test").unwrap();
        let mut index = Index::default();
        let mut segments = Vec::new();
        let (mut data_pages, mut zero_pages) = (0, 0);
        let mut writer = SegmentWriter::begin(vault, id, 0).unwrap();
        for space in &self.layout.spaces {
            let changed = &mut self.changed[usize::from(space.id.0)];
            if parent.is_none() {
                changed.insert(0, space.pages);
            }
            let bytes = &self.spaces[usize::from(space.id.0)];
            let pages = |run: &PageRun| &bytes[run.offset() as usize..][..run.bytes()];
            let is_zero =
                |page| pages(&PageRun { space: space.id, first: page, count: 1 }).iter().all(|b| *b == 0);
            let mut zeros = PageSet::empty(space.pages);
            (0..space.pages)
                .filter(|page| changed.contains(*page) && is_zero(*page))
                .for_each(|page| zeros.insert(page, 1));
            zero_pages += zeros.count();
            changed.subtract(&zeros);
            data_pages += changed.count();
            let mut placed: Vec<_> =
                zeros.runs(space.id, u32::MAX).map(|run| Placed { run, at: At::Zeros }).collect();
            // Every other run is packed, in extents of both lengths.
            let pack = |number: usize| number.is_multiple_of(2);
            let most = if parent.is_none() { RAW_EXTENT_PAGES } else { ZSTD_EXTENT_PAGES };
            for (number, run) in changed.runs(space.id, most.into()).enumerate() {
                if writer.bytes() > 1 << 20 {
                    let next = segments.len() as u32 + 1;
                    let full = std::mem::replace(&mut writer, SegmentWriter::begin(vault, id, next).unwrap());
                    segments.push(full.finish().unwrap());
                }
                let mut sums = Vec::new();
                let extent = writer.append(pages(&run), pack(number), &mut sums).unwrap();
                let extent = index.push(extent, &sums);
                placed.push(Placed { run, at: At::Extent { extent, page: 0 } });
            }
            placed.sort_by_key(|placed| placed.run.first);
            index.runs.extend(placed);
            *changed = PageSet::empty(space.pages);
        }
        segments.push(writer.finish().unwrap());
        let manifest = Manifest {
            id,
            taken_unix_ms: id.unix_s() * 1000 + 500,
            software: "migrate test".into(),
            workload: workload.into(),
            kind: WorkloadKind::Vm,
            layout: self.layout.clone(),
            parent: parent.map(Committed::as_parent),
            deltas: parent.map_or(0, |parent| parent.manifest.deltas + 1),
            segments,
            index: vault.put_index(id, &index).unwrap(),
            state: vault.put_state(id, b"machine", id.to_string().as_bytes()).unwrap(),
            data_pages,
            shared_pages: 0,
            zero_pages,
            pause_us: 1234,
            merged: None,
            group: None,
        };
        vault.commit(&*lease, manifest).unwrap()
    }
}

/// The `number`-th name.
pub(crate) fn id(number: u32) -> CheckpointId {
    CheckpointId::new(1_795_463_311 + u64::from(number) * 60, number)
}

/// A store in memory.
pub(crate) fn vault() -> Vault {
    Vault::create(Arc::new(MemoryStore::new()), None).unwrap()
}

/// A chain of so many deltas on a full checkpoint of `web-1`, and the memory that each was taken of.
pub(crate) fn chain(vault: &Vault, deltas: u32) -> (Vec<Committed>, Vec<Vec<Vec<u8>>>) {
    let mut memory = Memory::new(42);
    let (mut links, mut images) = (Vec::new(), Vec::new());
    for number in 0..=deltas {
        memory.write(if number == 0 { 12 } else { 4 });
        let link = memory.checkpoint(vault, id(number), "web-1", links.last());
        links.push(link);
        images.push(memory.spaces.clone());
    }
    (links, images)
}

//! A checkpoint that both ends of a migration can read: what it has need not cross the wire.
//!
//! ```text
//! source ── offer names store, checkpoint, manifest digest ──▶ destination
//!   │                                                          reads its pages into the new memory
//!   │  ◀───────────────────── Seeded ──────────────────────────┘
//!   └─ the first round leaves out what is as the checkpoint has it
//! ```
//!
//! Each end opens the store by a path of its own: a receiver never reads where a peer tells it to, only in the stores that its
//! operator named, and takes the checkpoint for the one that is meant by the digest of its manifest, which covers everything below.

use crate::cancel::CancelFlag;
use crate::destination::PageMemory;
use crate::error::{Error, Result};
use crate::restore::fetch::{Fetch, Scratch};
use crate::restore::plan::Sums;
use crate::restore::{eager, pages_of};
use crate::seal::StoreKey;
use crate::vault::{Committed, Vault};
use protocol::checkpoint::manifest::HexDigest;
use protocol::checkpoint::name::CheckpointId;
use protocol::control;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use std::fmt;
use std::path::Path;
use twox_hash::XxHash3_64;

/// Threads that fill a destination's memory.
const THREADS: usize = 2;

/// The most pages of a run that is made zero at once.
const ZERO_PAGES: u32 = 1 << 16;

/// A checkpoint at the source.
pub struct Seed {
    name: control::Seed,
    fetch: Fetch,
}

impl fmt::Debug for Seed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Seed").field("name", &self.name).finish_non_exhaustive()
    }
}

impl Seed {
    /// A checkpoint of a workload with this memory.
    ///
    /// # Errors
    /// `Store`, also when it is of other memory.
    pub fn open(vault: &Vault, id: CheckpointId, layout: &Layout, cancel: &CancelFlag) -> Result<Self> {
        let chain = vault.chain(id)?;
        let newest = of_layout(&chain, id, layout)?;
        let name = control::Seed {
            store: vault.info().id.clone(),
            checkpoint: id,
            manifest: HexDigest(newest.digest),
        };
        Ok(Self { name, fetch: pages_of(vault, &chain, Sums::All, cancel)? })
    }

    /// What the destination knows it by.
    pub fn name(&self) -> &control::Seed {
        &self.name
    }

    /// Every page that it has bytes of, one set for each space; all others are zeros.
    pub fn data(&self) -> &[PageSet] {
        &self.fetch.plan().data
    }

    /// Its extents.
    pub(crate) fn extents(&self) -> usize {
        self.fetch.plan().needs.len()
    }

    /// Puts those pages of an extent into `same` that are, byte for byte, what `read` gives. The stored bytes are read only where a sum
    /// says that this may be.
    ///
    /// # Errors
    /// `Store`, or what `read` says.
    pub(crate) fn compare(
        &self,
        extent: usize,
        scratch: &mut Scratch,
        live: &mut Vec<u8>,
        read: &mut dyn FnMut(PageRun, &mut [u8]) -> Result<()>,
        same: &mut [PageSet],
    ) -> Result<()> {
        let plan = self.fetch.plan();
        let Some(need) = plan.needs.get(extent) else { return Ok(()) };
        live.clear();
        let mut alike = false;
        for part in plan.parts(need) {
            let start = live.len();
            live.resize(start + part.run().bytes(), 0);
            read(part.run(), &mut live[start..])?;
            let pages = live[start..].as_chunks::<PAGE_SIZE>().0.iter();
            let sums = plan.sums(part, None).unwrap_or_default();
            alike |= pages.zip(sums).any(|(page, sum)| XxHash3_64::oneshot(page) == *sum);
        }
        if !alike {
            return Ok(());
        }
        let mut rest = live.as_slice();
        self.fetch.one(extent, scratch, &mut |run, stored| {
            let (ours, behind) = rest.split_at(run.bytes());
            rest = behind;
            let pages = ours.as_chunks::<PAGE_SIZE>().0.iter().zip(stored.as_chunks::<PAGE_SIZE>().0);
            for (page, _) in (run.first..).zip(pages).filter(|(_, (ours, stored))| ours == stored) {
                if let Some(same) = same.get_mut(usize::from(run.space.0)) {
                    same.insert(page, 1);
                }
            }
            Ok(())
        })
    }
}

fn of_layout<'a>(chain: &'a [Committed], id: CheckpointId, layout: &Layout) -> Result<&'a Committed> {
    let newest = chain.first().filter(|newest| newest.manifest.layout == *layout);
    newest.ok_or_else(|| Error::Store(format!("checkpoint {id} is of a VM with other memory")))
}

/// The stores that senders may refer to.
#[derive(Clone)]
pub struct Stores {
    vaults: Vec<Vault>,
}

impl fmt::Debug for Stores {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.vaults.iter().map(Vault::place)).finish()
    }
}

impl Stores {
    /// These.
    pub fn new(vaults: Vec<Vault>) -> Self {
        Self { vaults }
    }

    /// Puts the pages of a checkpoint into new memory; answers how many have bytes. Behind an error the memory is zeros again.
    ///
    /// # Errors
    /// `Store` when it is not here, or another one, or damaged; `Interrupted`; `Host`, and then the memory may be anything.
    pub(crate) fn load(
        &self,
        wanted: &control::Seed,
        layout: &Layout,
        memory: &dyn PageMemory,
        cancel: &CancelFlag,
    ) -> Result<u64> {
        let id = wanted.checkpoint;
        let vault = self.vaults.iter().find(|vault| vault.info().id == wanted.store);
        let vault =
            vault.ok_or_else(|| Error::Store("none of the stores here is the one that is meant".into()))?;
        let chain = vault.chain(id)?;
        if of_layout(&chain, id, layout)?.digest != wanted.manifest.0 {
            return Err(Error::Store(format!(
                "checkpoint {id} in {} is not the one that is meant",
                vault.place()
            )));
        }
        let fetch = pages_of(vault, &chain, Sums::Few, cancel)?;
        if let Err(error) = eager::read(&fetch, memory, THREADS, cancel, &mut |_| {}) {
            for (space, data) in (0..).map(SpaceId).zip(&fetch.plan().data) {
                data.runs(space, ZERO_PAGES).try_for_each(|run| memory.zero(run)).map_err(|cannot| {
                    Error::Host(format!("{error}; and memory could not be made zeros again: {cannot}"))
                })?;
            }
            return Err(error);
        }
        Ok(fetch.plan().data_pages())
    }
}

/// The store at a place, with the key in this file if it is sealed.
///
/// # Errors
/// As [`Vault::open`] and [`StoreKey::load`].
pub fn open_store(place: &str, key: Option<&Path>) -> Result<Vault> {
    Vault::open(crate::store::open(place)?, key.map(StoreKey::load).transpose()?.as_ref())
}

/// The stores at these places, those that are sealed all with one key.
///
/// # Errors
/// As [`open_store`].
pub fn open_stores(places: &[String], key: Option<&Path>) -> Result<Stores> {
    let open = |place: &String| open_store(place, key);
    Ok(Stores::new(places.iter().map(open).collect::<Result<_>>()?))
}

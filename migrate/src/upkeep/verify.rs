//! Finding damage: every object, extent and chain link is read and checked against its digest.
//!
//! An extent that several checkpoints share is read once. A checkpoint cannot be restored if anything of it is damaged, or of one that it
//! stands on.

use super::reached;
use crate::error::{Error, Result};
use crate::vault::{Committed, Listing, SegmentReader, Unpacker, Vault};
use protocol::checkpoint::index::{Extent, Index};
use protocol::checkpoint::manifest::Segment;
use protocol::checkpoint::name::{self, CheckpointId, MERGED, PRUNED, TOUCHED};
use protocol::checkpoint::object::{self, Kind};
use protocol::control::MAX_BLOB_BYTES;
use protocol::page::PAGE_SIZE;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;
use twox_hash::XxHash3_64;

/// The most threads that read: behind that, what is read from is the limit.
const MOST_THREADS: usize = 4;

/// The most bytes of a short object, which is read whole.
const MOST_SHORT_BYTES: u64 = 2 * MAX_BLOB_BYTES as u64;

/// Something that is not as it was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Damage {
    /// The object.
    pub object: String,
    /// The checkpoints that need it.
    pub checkpoints: BTreeSet<CheckpointId>,
    /// What is wrong with it.
    pub what: String,
}

/// What came of it.
#[derive(Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    /// Checkpoints that exist, damaged or not.
    pub checkpoints: u64,
    /// Objects that were read.
    pub objects: u64,
    /// Extents that were read.
    pub extents: u64,
    /// Bytes of page data that were read.
    pub bytes: u64,
    /// What is damaged.
    pub damages: Vec<Damage>,
    /// Checkpoints that cannot be restored.
    pub lost: BTreeSet<CheckpointId>,
}

/// Reads everything. `watch` is told how many bytes of page data are done, of how many, from several threads; it stops early if that fails.
///
/// # Errors
/// `Store` when the store cannot be listed; those of `watch`. Damage is no error.
pub fn verify(vault: &Vault, watch: &(dyn Fn(u64, u64) -> Result<()> + Sync)) -> Result<Verified> {
    let listing = vault.manifests()?;
    let mut verified = Verified { checkpoints: listing.committed.len() as u64, ..Verified::default() };
    // The store's own description was read when it was opened.
    verified.objects = 1 + (listing.committed.len() + listing.orphans.len() + listing.damaged.len()) as u64;
    for damaged in &listing.damaged {
        let checkpoints = damaged.id.into_iter().collect();
        let what = damaged.error.to_string();
        verified.damages.push(Damage { object: damaged.object.clone(), checkpoints, what });
    }
    let all: HashMap<_, _> =
        listing.committed.iter().chain(&listing.orphans).map(|link| (link.manifest.id, link)).collect();
    let needed = reached(listing.committed.iter(), &all);
    let mut links: Vec<_> = all.values().copied().filter(|link| needed.contains(&link.manifest.id)).collect();
    // A parent has one delta fewer, so it comes first.
    links.sort_unstable_by_key(|link| (link.manifest.deltas, link.manifest.id));
    verified.damages.extend(links.iter().filter_map(|link| broken_link(link, &all, &listing)));
    let mut segments = HashMap::new();
    for link in &links {
        let id = link.manifest.id;
        let mut add = |object: String, error: &Error| {
            let (checkpoints, what) = (BTreeSet::from([id]), error.to_string());
            verified.damages.push(Damage { object, checkpoints, what });
        };
        verified.objects += 2;
        match vault.index(&link.manifest) {
            Ok(index) => gather(link, &index, &mut segments),
            Err(error) => add(name::index(id), &error),
        }
        if let Err(error) = vault.state(&link.manifest) {
            add(name::state(id), &error);
        }
    }
    notes(vault, &mut verified)?;
    let mut work: Vec<_> = segments.into_values().collect();
    work.sort_unstable_by_key(|work| (work.segment.checkpoint, work.segment.number));
    pages(vault, &work, &mut verified, watch)?;
    verified.lost = lost(&links, &verified.damages);
    Ok(verified)
}

/// What is wrong if a checkpoint does not stand on what it was taken on.
fn broken_link(
    link: &Committed,
    all: &HashMap<CheckpointId, &Committed>,
    listing: &Listing,
) -> Option<Damage> {
    let parent = link.manifest.parent.as_ref()?;
    let why = match all.get(&parent.id) {
        None if listing.damaged.iter().any(|damaged| damaged.id == Some(parent.id)) => "which cannot be read",
        None => "which is gone",
        Some(found) if found.digest != parent.digest.0 => "whose manifest is not the one it was taken on",
        Some(found) if found.manifest.layout != link.manifest.layout => "which is of other memory",
        Some(found) if found.manifest.deltas.checked_add(1) != Some(link.manifest.deltas) => {
            "which counts the chain's deltas in another way"
        }
        Some(_) => return None,
    };
    let (object, checkpoints) = (name::manifest(link.manifest.id), BTreeSet::from([link.manifest.id]));
    Some(Damage { object, checkpoints, what: format!("it stands on {}, {why}", parent.id) })
}

/// Notes of what was given up, orders of first touches, merged indexes and their sums. No checkpoint needs them.
fn notes(vault: &Vault, verified: &mut Verified) -> Result<()> {
    for (folder, kind) in [(PRUNED, Kind::Pruned), (TOUCHED, Kind::Touched), (MERGED, Kind::Merged)] {
        for found in vault.store().list(folder)? {
            let is_sums = kind == Kind::Merged && found.name.ends_with("/sums");
            let kind = if is_sums { Kind::Sums } else { kind };
            verified.objects += 1;
            if let Err(error) = note(vault, &found.name, kind) {
                let what = error.to_string();
                verified.damages.push(Damage { object: found.name, checkpoints: BTreeSet::new(), what });
            }
        }
    }
    Ok(())
}

fn note(vault: &Vault, name: &str, kind: Kind) -> Result<()> {
    let reader = vault.store().open(name)?;
    let damaged = |why: &str| Error::Store(format!("object {name} of {} is damaged: {why}", vault.place()));
    let is_short = matches!(kind, Kind::Pruned | Kind::Touched);
    let most_bytes = if is_short { MOST_SHORT_BYTES } else { u64::MAX };
    let length = usize::try_from(reader.bytes()).ok().filter(|bytes| *bytes as u64 <= most_bytes);
    let length = length.ok_or_else(|| damaged("it is longer than any of its kind"))?;
    let mut bytes = Vec::new();
    let room = bytes.try_reserve_exact(length);
    room.map_err(|_| Error::Host(format!("there is no memory for the {length} bytes of {name}")))?;
    bytes.resize(length, 0);
    reader.read_at(0, &mut bytes)?;
    object::decode(&bytes, kind, "it").map(|_| ()).map_err(|error| damaged(&error.to_string()))
}

/// What there is to read of one segment.
struct Work {
    segment: Segment,
    users: BTreeSet<CheckpointId>,
    extents: BTreeMap<Key, Expected>,
}

/// What tells extents of one segment apart: an index that says something else of one is checked by itself.
type Key = (u64, u32, u16, u8, [u8; 32], u64);

struct Expected {
    extent: Extent,
    sums: Vec<u64>,
    users: BTreeSet<CheckpointId>,
}

/// Adds what a checkpoint needs of segments.
fn gather(link: &Committed, index: &Index, segments: &mut HashMap<Segment, Work>) {
    let id = link.manifest.id;
    for segment in &link.manifest.segments {
        let none = || Work { segment: segment.clone(), users: BTreeSet::new(), extents: BTreeMap::new() };
        segments.entry(segment.clone()).or_insert_with(none).users.insert(id);
    }
    let mut sums = index.sums.as_slice();
    for extent in &index.extents {
        let (own, behind) = sums.split_at(usize::from(extent.pages).min(sums.len()));
        sums = behind;
        let Some(work) =
            link.manifest.segments.get(extent.segment as usize).and_then(|segment| segments.get_mut(segment))
        else {
            continue;
        };
        let sum = own.iter().fold(0_u64, |sum, next| sum.rotate_left(7) ^ next);
        let key =
            (extent.offset, extent.stored_bytes, extent.pages, extent.encoding as u8, extent.digest, sum);
        let new = || Expected { extent: *extent, sums: own.to_vec(), users: BTreeSet::new() };
        work.extents.entry(key).or_insert_with(new).users.insert(id);
    }
}

/// Reads all page data, with several threads.
fn pages(
    vault: &Vault,
    work: &[Work],
    verified: &mut Verified,
    watch: &(dyn Fn(u64, u64) -> Result<()> + Sync),
) -> Result<()> {
    let extents = || work.iter().flat_map(|work| work.extents.values());
    let total: u64 = extents().map(|expected| u64::from(expected.extent.stored_bytes)).sum();
    let (next, done) = (AtomicUsize::new(0), AtomicU64::new(0));
    let damages = Mutex::new(Vec::new());
    let run = || -> Result<()> {
        let mut unpacker = Unpacker::default();
        while let Some(work) = work.get(next.fetch_add(1, Relaxed)) {
            let advance = |bytes: u32| watch(done.fetch_add(bytes.into(), Relaxed) + u64::from(bytes), total);
            if let Some(damage) = segment(vault, work, &mut unpacker, &advance)? {
                damages.lock().unwrap_or_else(PoisonError::into_inner).push(damage);
            }
        }
        Ok(())
    };
    let threads = thread::available_parallelism().map_or(1, |threads| threads.get().min(MOST_THREADS));
    thread::scope(|scope| {
        let spawn = |_| thread::Builder::new().name("verify".into()).spawn_scoped(scope, run);
        // A thread that cannot be started is one fewer: this one does what is left.
        let helpers: Vec<_> = (1..threads.min(work.len())).filter_map(|number| spawn(number).ok()).collect();
        let ended = |_| Err(Error::Host("a thread that verifies ended".into()));
        helpers.into_iter().fold(run(), |result, helper| result.and(helper.join().unwrap_or_else(ended)))
    })?;
    let mut damages = damages.into_inner().unwrap_or_else(PoisonError::into_inner);
    damages.sort_unstable_by(|one: &Damage, other| one.object.cmp(&other.object));
    verified.damages.extend(damages);
    verified.objects += work.len() as u64;
    verified.extents += extents().count() as u64;
    verified.bytes += total;
    Ok(())
}

/// Reads one segment. All that is wrong with it is one damage.
fn segment(
    vault: &Vault,
    work: &Work,
    unpacker: &mut Unpacker,
    advance: &dyn Fn(u32) -> Result<()>,
) -> Result<Option<Damage>> {
    let object = name::segment(work.segment.checkpoint, work.segment.number);
    let reader = match SegmentReader::open(vault, &work.segment) {
        Ok(reader) => reader,
        Err(error) => {
            let (checkpoints, what) = (work.users.clone(), error.to_string());
            return Ok(Some(Damage { object, checkpoints, what }));
        }
    };
    let (mut first, mut more, mut checkpoints) = (None, 0, BTreeSet::new());
    for expected in work.extents.values() {
        advance(expected.extent.stored_bytes)?;
        let wrong = match reader.read(&expected.extent, unpacker) {
            Ok(pages) => unlike_sums(pages, &expected.sums).map(|page| {
                let at = expected.extent.offset;
                format!("the extent at {at} does not match the sum of its page {page}")
            }),
            Err(error) => Some(error.to_string()),
        };
        let Some(wrong) = wrong else { continue };
        checkpoints.extend(&expected.users);
        match first {
            None => first = Some(wrong),
            Some(_) => more += 1,
        }
    }
    let more = if more == 0 { String::new() } else { format!("; and {more} more extents of it") };
    Ok(first.map(|first| Damage { object, checkpoints, what: first + &more }))
}

/// The first page that does not match its sum.
fn unlike_sums(pages: &[u8], sums: &[u64]) -> Option<usize> {
    let (pages, _) = pages.as_chunks::<PAGE_SIZE>();
    let differ = pages.iter().zip(sums).position(|(page, sum)| XxHash3_64::oneshot(page) != *sum);
    differ.or((pages.len() != sums.len()).then_some(pages.len().min(sums.len())))
}

/// What cannot be restored: whatever needs something damaged, or stands on what cannot be restored. Parents come before what stands on
/// them.
fn lost(links: &[&Committed], damages: &[Damage]) -> BTreeSet<CheckpointId> {
    let mut lost: BTreeSet<_> =
        damages.iter().flat_map(|damage| damage.checkpoints.iter().copied()).collect();
    for link in links {
        if link.manifest.parent.as_ref().is_some_and(|parent| lost.contains(&parent.id)) {
            lost.insert(link.manifest.id);
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{MemoryStore, Store as _};
    use crate::vault::sample;
    use std::sync::Arc;

    fn quiet(_: u64, _: u64) -> Result<()> {
        Ok(())
    }

    fn found(vault: &Vault) -> Verified {
        verify(vault, &quiet).unwrap()
    }

    fn bytes_of(store: &MemoryStore, name: &str) -> Vec<u8> {
        let reader = store.open(name).unwrap();
        let mut bytes = vec![0; usize::try_from(reader.bytes()).unwrap()];
        reader.read_at(0, &mut bytes).unwrap();
        bytes
    }

    fn replace(store: &MemoryStore, name: &str, bytes: &[u8]) {
        store.delete(name).unwrap();
        store.put(name, bytes).unwrap();
    }

    fn names(store: &MemoryStore) -> Vec<String> {
        store.list("").unwrap().into_iter().map(|info| info.name).collect()
    }

    /// A store of two checkpoints that do not stand on each other, small enough to try everything.
    fn small() -> (Vault, MemoryStore) {
        use protocol::layout::{Layout, Space, SpaceKind};
        use protocol::page::SpaceId;
        let store = MemoryStore::new();
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        let space =
            |id, guest_address| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages: 2, guest_address };
        let layout = Layout { spaces: vec![space(0, 0), space(1, 1 << 20)] };
        for number in 0..2 {
            let mut memory = sample::Memory::of(layout.clone(), 7 + u64::from(number));
            memory.noise(0, 1);
            memory.checkpoint(&vault, sample::id(number), &format!("web-{number}"), None);
        }
        (vault, store)
    }

    #[test]
    fn a_store_that_is_whole_is_found_whole() {
        let vault = sample::vault();
        let (links, _) = sample::chain(&vault, 5);
        let verified = found(&vault);
        assert_eq!(verified.damages, []);
        assert!(verified.lost.is_empty());
        assert_eq!(verified.checkpoints, 6);
        let segments: usize = links.iter().map(|link| link.manifest.segments.len()).sum();
        assert_eq!(verified.objects, 1 + 6 * 3 + segments as u64);
        assert!(verified.extents >= 6 && verified.bytes > 100_000, "{verified:?}");
    }

    #[test]
    fn any_byte_that_is_flipped_is_found_and_the_rest_is_still_listed() {
        let (vault, store) = small();
        let ids = [sample::id(0), sample::id(1)];
        let mut flipped = 0;
        for name in names(&store) {
            let whole = bytes_of(&store, &name);
            for at in 0..whole.len() {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << (at % 8);
                replace(&store, &name, &bytes);
                flipped += 1;
                if name == name::STORE {
                    let text = Vault::open(Arc::new(store.clone()), None).err().unwrap().to_string();
                    assert!(text.contains(&name), "byte {at} of {name}: {text}");
                    continue;
                }
                let verified = found(&vault);
                let damages: Vec<_> = verified.damages.iter().map(|damage| damage.object.as_str()).collect();
                assert_eq!(damages, [name.as_str()], "byte {at}");
                let (own, other) = if name.contains(&ids[0].to_string()) { (0, 1) } else { (1, 0) };
                assert_eq!(verified.lost, BTreeSet::from([ids[own]]), "byte {at} of {name}");
                let listing = vault.manifests().unwrap();
                assert!(
                    listing.committed.iter().any(|link| link.manifest.id == ids[other]),
                    "byte {at} of {name}"
                );
            }
            replace(&store, &name, &whole);
        }
        assert!(flipped > 8192, "{flipped}");
        assert_eq!(found(&vault).damages, []);
    }

    #[test]
    fn what_is_cut_or_gone_is_found_and_what_stands_on_it_is_lost() {
        let store = MemoryStore::new();
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        let (links, _) = sample::chain(&vault, 3);
        let ids: Vec<_> = links.iter().map(|link| link.manifest.id).collect();
        for name in names(&store).into_iter().filter(|name| name != name::STORE) {
            let whole = bytes_of(&store, &name);
            let own = ids.iter().position(|id| name.contains(&id.to_string())).unwrap();
            for cut in [None, Some(0), Some(whole.len() - 1)] {
                match cut {
                    None => store.delete(&name).unwrap(),
                    Some(length) => replace(&store, &name, &whole[..length]),
                }
                let verified = found(&vault);
                let gone = cut.is_none() && name.starts_with("checkpoints/");
                // A manifest that is gone is a checkpoint that does not exist: only what stands on it is lost.
                let lost: BTreeSet<_> = ids[own + usize::from(gone)..].iter().copied().collect();
                assert_eq!(verified.lost, lost, "{name} cut to {cut:?}");
                if !gone {
                    assert_eq!(verified.damages[0].object, name);
                }
                assert!(gone && own == 3 || !verified.damages.is_empty());
            }
            replace(&store, &name, &whole);
        }
        assert_eq!(found(&vault).damages, []);
    }

    #[test]
    fn it_ends_when_whoever_watches_says_so() {
        let vault = sample::vault();
        sample::chain(&vault, 1);
        let stop = |_: u64, _: u64| -> Result<()> { Err(Error::Interrupted("as the test wants it".into())) };
        assert!(matches!(verify(&vault, &stop), Err(Error::Interrupted(_))));
        let told = AtomicU64::new(0);
        let watch = |done: u64, total: u64| {
            assert!(done <= total);
            told.fetch_max(done, Relaxed);
            Ok(())
        };
        let verified = verify(&vault, &watch).unwrap();
        assert_eq!(told.load(Relaxed), verified.bytes);
    }
}

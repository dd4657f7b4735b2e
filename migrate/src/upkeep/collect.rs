//! Collecting what nothing reaches.
//!
//! An object is kept as long as a manifest says that it belongs to it, and a grace period longer: whoever began to read a checkpoint when
//! it was given up may end. It counts from the note that the checkpoint was given up, or, where there is none because something crashed,
//! from the newest of its objects. Nothing is collected while a manifest cannot be read: what it reaches is not known.

use super::reached;
use crate::error::{Error, Result};
use crate::store::{Lease, ObjectInfo};
use crate::vault::{Committed, Listing, Vault};
use protocol::checkpoint::manifest::{Group, Pruned};
use protocol::checkpoint::name::{self, CHECKPOINTS, CheckpointId, DATA, GROUPS, MERGED, PRUNED, TOUCHED};
use protocol::checkpoint::object::Kind;
use serde::Serialize;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// How often it is asked whether the lock is still held: a deletion is at most so many objects behind.
const CHECK_EVERY: usize = 16;

/// Something to remove.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Removal {
    /// Its name.
    pub name: String,
    /// Its length in bytes.
    pub bytes: u64,
    /// Whether it is what a crash left of an object, and none.
    pub leftover: bool,
}

impl Removal {
    fn of(info: &ObjectInfo) -> Self {
        Self { name: info.name.clone(), bytes: info.bytes, leftover: false }
    }
}

/// What is in a store, as far as collecting goes.
struct Found {
    objects: Vec<ObjectInfo>,
    leftovers: Vec<ObjectInfo>,
    /// When checkpoints were given up.
    pruned: HashMap<CheckpointId, SystemTime>,
    groups: Vec<Group>,
    listing: Listing,
}

/// What can be removed now, in the order in which it is to be removed.
///
/// # Errors
/// `Store`, also when a manifest, a group or a note cannot be read.
pub fn plan(vault: &Vault, now: SystemTime, grace: Duration) -> Result<Vec<Removal>> {
    // What is written meanwhile is not listed, and what is listed and then committed is young.
    let objects = vault.store().list("")?;
    let listing = vault.manifests()?;
    if let Some(damaged) = listing.damaged.first() {
        return Err(Error::Store(format!(
            "nothing is collected in {} while {} cannot be read, since what it needs is not known ({}); `migrate store verify` \
             says what else is damaged: bring the object back from a copy, or remove it if it is lost for good",
            vault.place(),
            damaged.object,
            damaged.error
        )));
    }
    let (mut pruned, mut groups) = (HashMap::new(), Vec::new());
    for info in &objects {
        if info.name.starts_with(PRUNED) {
            let (note, _): (Pruned, _) = vault.get_json(Kind::Pruned, &info.name)?;
            pruned.insert(note.id, UNIX_EPOCH + Duration::from_millis(note.pruned_unix_ms));
        }
        if let Some(id) = info.name.strip_prefix(GROUPS).and_then(|id| id.parse().ok()) {
            groups.push(vault.group(id)?);
        }
    }
    let found = Found { objects, leftovers: vault.store().leftovers()?, pruned, groups, listing };
    Ok(choose(&found, now, grace))
}

/// What to remove of what was found.
fn choose(found: &Found, now: SystemTime, grace: Duration) -> Vec<Removal> {
    let is_over = |since: SystemTime| now.duration_since(since).is_ok_and(|age| age >= grace);
    let infos: HashMap<&str, &ObjectInfo> =
        found.objects.iter().map(|info| (info.name.as_str(), info)).collect();
    let (committed, orphans) = (&found.listing.committed, &found.listing.orphans);
    let all: HashMap<CheckpointId, &Committed> =
        committed.iter().chain(orphans).map(|link| (link.manifest.id, link)).collect();
    // A member of a group that is not there: as long as it is young, it may be completed yet.
    let is_young = |link: &&Committed| {
        infos.get(name::manifest(link.manifest.id).as_str()).is_some_and(|info| !is_over(info.written))
    };
    let live = reached(committed.iter().chain(orphans.iter().filter(is_young)), &all);
    let needed: HashSet<String> = all
        .values()
        .filter(|link| live.contains(&link.manifest.id))
        .flat_map(|link| &link.manifest.segments)
        .map(|segment| name::segment(segment.checkpoint, segment.number))
        .collect();

    let mut removals = Vec::new();
    // Manifests before what they need: killed in between, there is no manifest without its data.
    let manifests = found.objects.iter().filter(|info| info.name.starts_with(CHECKPOINTS));
    removals.extend(
        manifests
            .filter(|info| owner(&info.name).is_some_and(|id| all.contains_key(&id) && !live.contains(&id)))
            .map(Removal::of),
    );
    // A group goes behind the last of its members.
    let is_empty = |group: &&Group| !group.members.iter().any(|member| live.contains(&member.id));
    let empty =
        found.groups.iter().filter(is_empty).filter_map(|group| infos.get(name::group(group.id).as_str()));
    removals.extend(empty.filter(|info| is_over(info.written)).map(|info| Removal::of(info)));

    let mut by_owner = BTreeMap::<CheckpointId, Vec<&ObjectInfo>>::new();
    for info in &found.objects {
        let collected = [DATA, MERGED, TOUCHED, PRUNED].iter().any(|folder| info.name.starts_with(folder));
        if let Some(id) = owner(&info.name).filter(|id| collected && !live.contains(id)) {
            by_owner.entry(id).or_default().push(info);
        }
    }
    for (id, objects) in by_owner {
        let newest = objects.iter().map(|info| info.written).max().unwrap_or(now);
        if !is_over(found.pruned.get(&id).copied().unwrap_or(newest)) {
            continue;
        }
        let is_data = |info: &&&ObjectInfo| info.name.starts_with(DATA);
        let data: Vec<_> = objects.iter().filter(is_data).collect();
        let gone: Vec<_> =
            data.iter().filter(|info| is_ours(id, &info.name) && !needed.contains(&info.name)).collect();
        removals.extend(gone.iter().map(|info| Removal::of(info)));
        // The note goes last, when nothing is left that it is of use for.
        if gone.len() == data.len() {
            let note = name::pruned(id);
            let (notes, orders): (Vec<&ObjectInfo>, Vec<&ObjectInfo>) =
                objects.iter().copied().filter(|info| !is_data(&info)).partition(|info| info.name == note);
            removals.extend(orders.iter().chain(&notes).map(|info| Removal::of(info)));
        }
    }
    let left = found.leftovers.iter().filter(|info| is_over(info.written));
    removals.extend(left.map(|info| Removal { leftover: true, ..Removal::of(info) }));
    removals
}

/// The checkpoint that an object belongs to by its name.
fn owner(name: &str) -> Option<CheckpointId> {
    name.split('/').nth(1)?.parse().ok()
}

/// Whether this release knows what this is.
fn is_ours(id: CheckpointId, object: &str) -> bool {
    let number = object.rsplit_once("/segment-").and_then(|(_, number)| number.parse().ok());
    object == name::index(id)
        || object == name::state(id)
        || number.is_some_and(|number| object == name::segment(id, number))
}

/// Removes what was planned, as long as this is the one writer. Answers how many bytes that were. `watch` is told of each before it goes.
///
/// # Errors
/// `Store`, those of `watch`: what was removed so far stays removed, and the rest is for the next time.
pub fn collect(
    vault: &Vault,
    lease: &dyn Lease,
    removals: &[Removal],
    watch: &mut dyn FnMut(&Removal) -> Result<()>,
) -> Result<u64> {
    let mut bytes = 0;
    for some in removals.chunks(CHECK_EVERY) {
        lease.check()?;
        for removal in some {
            watch(removal)?;
            if removal.leftover {
                vault.store().remove_leftover(&removal.name)?;
            } else {
                vault.store().delete(&removal.name)?;
            }
            bytes += removal.bytes;
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Fault, FaultyStore, MemoryStore, Store};
    use crate::upkeep::fixture;
    use crate::upkeep::verify::verify;
    use crate::vault::sample;
    use std::sync::Arc;

    const HOUR: Duration = Duration::from_secs(3600);

    fn later(hours: u32) -> SystemTime {
        SystemTime::now() + HOUR * hours + Duration::from_secs(1)
    }

    fn names(removals: &[Removal]) -> Vec<&str> {
        removals.iter().map(|removal| removal.name.as_str()).collect()
    }

    fn all_is_well(vault: &Vault) {
        let verified = verify(vault, &|_, _| Ok(())).unwrap();
        assert_eq!(verified.damages, []);
    }

    fn collect_all(vault: &Vault, now: SystemTime) -> Result<u64> {
        let lease = vault.store().lock("a test")?;
        let removals = plan(vault, now, HOUR)?;
        collect(vault, &*lease, &removals, &mut |_| Ok(()))
    }

    /// A chain of which the last two links were given up, one with a note and one without, and what a crashed checkpoint left.
    fn littered() -> (Vault, MemoryStore, Vec<CheckpointId>) {
        let store = MemoryStore::new();
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        let links = fixture::chain(&vault, 3);
        let ids: Vec<_> = links.iter().map(|link| link.manifest.id).collect();
        let pruned_unix_ms = crate::vault::now_unix_ms();
        vault.put_json(Kind::Pruned, &name::pruned(ids[3]), &Pruned { id: ids[3], pruned_unix_ms }).unwrap();
        for id in &ids[2..] {
            store.delete(&name::manifest(*id)).unwrap();
        }
        vault.put(Kind::Touched, &name::touched(ids[3], 1), b"").unwrap();
        vault.put(Kind::Touched, &name::touched(ids[0], 1), b"").unwrap();
        store.put(&name::segment(sample::id(9), 0), b"half a checkpoint").unwrap();
        std::mem::forget(store.create(&name::segment(sample::id(9), 1)).unwrap());
        (vault, store, ids)
    }

    #[test]
    fn only_what_nothing_reaches_goes_and_only_when_the_grace_is_over() {
        let (vault, store, ids) = littered();
        assert_eq!(plan(&vault, SystemTime::now(), HOUR).unwrap(), []);
        // Something of a newer release stays, and so does the note on whose behalf.
        let kept = format!("{DATA}{}/journal", ids[2]);
        store.put(&kept, b"of a newer release").unwrap();
        store.put("elsewhere/x", b"not ours").unwrap();
        let removals = plan(&vault, later(1), HOUR).unwrap();
        let removed = names(&removals);
        for id in &ids[2..] {
            assert!(
                removed.contains(&name::index(*id).as_str()) && removed.contains(&name::state(*id).as_str())
            );
        }
        let position = |name: &str| removed.iter().position(|other| *other == name);
        assert!(position(&name::pruned(ids[3])) > position(&name::state(ids[3])));
        assert!(position(&name::touched(ids[3], 1)).is_some());
        assert!(position(&name::segment(sample::id(9), 0)).is_some());
        assert!(removals.last().unwrap().leftover);
        assert!(
            !removed
                .iter()
                .any(|name| name.contains(&ids[0].to_string()) || name.contains(&ids[1].to_string()))
        );
        assert!(position(&kept).is_none() && position("elsewhere/x").is_none());
        collect_all(&vault, later(1)).unwrap();
        assert_eq!(plan(&vault, later(2), HOUR).unwrap(), []);
        assert_eq!(store.leftovers().unwrap(), []);
        all_is_well(&vault);
        assert_eq!(vault.chain(ids[1]).unwrap().len(), 2);
    }

    #[test]
    fn the_grace_counts_from_the_note_and_else_from_the_newest_object() {
        let (vault, store, ids) = littered();
        store.delete(&name::pruned(ids[3])).unwrap();
        let pruned_unix_ms = crate::vault::now_unix_ms() + 3 * 3_600_000;
        vault.put_json(Kind::Pruned, &name::pruned(ids[3]), &Pruned { id: ids[3], pruned_unix_ms }).unwrap();
        let of = |now, id: CheckpointId| {
            plan(&vault, now, HOUR).unwrap().iter().any(|removal| removal.name.contains(&id.to_string()))
        };
        assert!(of(later(1), ids[2]) && !of(later(1), ids[3]));
        assert!(!of(later(3), ids[3]) && of(later(4), ids[3]));
    }

    #[test]
    fn a_segment_that_another_checkpoint_uses_stays_with_the_note_of_its_own() {
        let (vault, store, ids) = littered();
        let (mut borrower, own) = (vault.manifest(ids[1]).unwrap().manifest, name::segment(ids[2], 0));
        let bytes = store.open(&own).unwrap().bytes();
        let id = sample::id(20);
        borrower.id = id;
        borrower.segments.push(protocol::checkpoint::manifest::Segment {
            checkpoint: ids[2],
            number: 0,
            bytes,
        });
        let index = vault.index(&vault.manifest(ids[1]).unwrap().manifest).unwrap();
        borrower.index = vault.put_index(id, &index).unwrap();
        borrower.state = vault.put_state(id, b"", b"").unwrap();
        let lease = store.lock("a test").unwrap();
        vault.commit(&*lease, borrower).unwrap();
        drop(lease);
        collect_all(&vault, later(1)).unwrap();
        assert!(store.contains(&own).unwrap() && !store.contains(&name::index(ids[2])).unwrap());
        all_is_well(&vault);
    }

    #[test]
    fn nothing_is_collected_while_a_manifest_cannot_be_read() {
        let (vault, store, ids) = littered();
        store.delete(&name::manifest(ids[1])).unwrap();
        store.put(&name::manifest(ids[1]), b"not a manifest").unwrap();
        let text = plan(&vault, later(1), HOUR).unwrap_err().to_string();
        assert!(text.contains(&name::manifest(ids[1])) && text.contains("verify"), "{text}");
    }

    #[test]
    fn members_of_a_group_that_never_was_go_and_groups_without_members_do() {
        let store = MemoryStore::new();
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        let mut memory = sample::Memory::new(5);
        memory.write(3);
        let link = memory.checkpoint(&vault, sample::id(1), "web-1", None);
        let group = sample::id(2);
        let member = protocol::checkpoint::manifest::Manifest { group: Some(group), ..link.manifest.clone() };
        store.delete(&name::manifest(link.manifest.id)).unwrap();
        let lease = store.lock("a test").unwrap();
        let member = vault.commit(&*lease, member).unwrap();
        drop(lease);
        // It may be completed yet.
        assert_eq!(plan(&vault, SystemTime::now(), HOUR).unwrap(), []);
        let whole =
            Group { id: group, name: "app".into(), taken_unix_ms: 1, members: vec![member.as_parent()] };
        vault.put_json(Kind::Group, &name::group(group), &whole).unwrap();
        assert_eq!(plan(&vault, later(5), HOUR).unwrap(), []);
        store.delete(&name::group(group)).unwrap();
        let removals = plan(&vault, later(1), HOUR).unwrap();
        // The manifest goes first; its data was not younger, so it goes with it.
        assert_eq!(removals[0].name, name::manifest(member.manifest.id));
        collect_all(&vault, later(1)).unwrap();
        vault.put_json(Kind::Group, &name::group(group), &whole).unwrap();
        assert_eq!(names(&plan(&vault, later(1), HOUR).unwrap()), [name::group(group)]);
        collect_all(&vault, later(1)).unwrap();
        assert_eq!(store.list("").unwrap().len(), 1);
    }

    #[test]
    fn killed_anywhere_it_loses_nothing_and_the_next_time_ends_it() {
        for fault in [Fault::PowerLost, Fault::PowerLostBehind, Fault::Fails, Fault::AnswerLost] {
            for call in 0.. {
                let (_, store, ids) = littered();
                let faulty = FaultyStore::at(Arc::new(store.clone()), call, fault);
                let done = Vault::open(Arc::new(faulty.clone()), None)
                    .and_then(|vault| collect_all(&vault, later(1)));
                let vault = Vault::open(faulty.after_reboot(), None).unwrap();
                all_is_well(&vault);
                assert_eq!(vault.chain(ids[1]).unwrap().len(), 2);
                collect_all(&vault, later(1)).unwrap();
                assert_eq!(plan(&vault, later(2), HOUR).unwrap(), []);
                assert_eq!(store.leftovers().unwrap(), []);
                if faulty.calls() <= call {
                    done.unwrap();
                    assert!(call > 20, "{call} calls");
                    break;
                }
                assert!(done.is_err(), "{fault:?} in call {call}");
            }
        }
    }
}

//! Copying checkpoints to another store, with all that they stand on.
//!
//! Between stores that are sealed alike, bytes are copied, each extent checked against its digest on the way. Otherwise pages
//! are taken out and put in again: a checkpoint gets segments of its own there, and parents and groups are named by their new digests.
//! The oldest link goes first and its manifest last, so that what is there is whole whenever it is interrupted; what is there already is not
//! copied again.

use crate::error::{Error, Result};
use crate::store::{Lease, ObjectReader};
use crate::vault::{Committed, SegmentReader, SegmentWriter, Unpacker, Vault};
use protocol::checkpoint::index::{Extent, Index};
use protocol::checkpoint::manifest::{
    Group, HexDigest, MAX_JSON_BYTES, Manifest, MergedIndex, Parent, Segment,
};
use protocol::checkpoint::name::{self, CheckpointId, DATA};
use protocol::checkpoint::object::{self, Digest, Kind};
use protocol::checkpoint::segment::Encoding;
use protocol::layout::Layout;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// What is copied at once where there is no extent to check.
const PIECE_BYTES: u64 = 1 << 20;

/// How long a segment becomes that is put together anew, in bytes.
const SEGMENT_BYTES: u64 = 64 << 20;

/// What came of it.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize)]
pub struct Copied {
    /// Checkpoints that were copied.
    pub copied: Vec<CheckpointId>,
    /// Those that were there already.
    pub present: Vec<CheckpointId>,
    /// Bytes that were written.
    pub bytes: u64,
}

/// What is under way: a checkpoint, and which of how many it is.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// The checkpoint.
    pub id: CheckpointId,
    /// How many come before it.
    pub before: usize,
    /// How many there are in all.
    pub of: usize,
}

/// Copies checkpoints, what they stand on, and the other members of their groups. `lease` is of the store they go to.
/// `watch` is told of each before it is copied, and stops it by failing.
///
/// # Errors
/// `Store`: what was copied so far is there, and whole. Those of `watch`.
pub fn copy(
    from: &Vault,
    to: &Vault,
    lease: &dyn Lease,
    wanted: &[CheckpointId],
    watch: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<Copied> {
    let links = links(from, wanted)?;
    let mut copier = Copier { from, to, lease, digests: HashMap::new(), report: Copied::default() };
    for (before, link) in links.iter().enumerate() {
        watch(Step { id: link.manifest.id, before, of: links.len() })?;
        copier.link(link)?;
    }
    let groups: BTreeSet<_> = links.iter().filter_map(|link| link.manifest.group).collect();
    groups.into_iter().try_for_each(|group| copier.group(group))?;
    Ok(copier.report)
}

/// What [`copy`] would do. Its bytes are those that are not there yet as they are stored here; sealed in another way they are a few more or less.
///
/// # Errors
/// `Store`; those of `watch`.
pub fn copy_forecast(
    from: &Vault,
    to: &Vault,
    wanted: &[CheckpointId],
    watch: &mut dyn FnMut(Step) -> Result<()>,
) -> Result<Copied> {
    let links = links(from, wanted)?;
    let (mut report, mut needed) = (Copied::default(), BTreeSet::new());
    for (before, link) in links.iter().enumerate() {
        let manifest = &link.manifest;
        if to.store().contains(&name::manifest(manifest.id))? {
            report.present.push(manifest.id);
            continue;
        }
        watch(Step { id: manifest.id, before, of: links.len() })?;
        report.copied.push(manifest.id);
        needed.extend(manifest.segments.iter().map(|part| name::segment(part.checkpoint, part.number)));
        needed.extend([name::index(manifest.id), name::state(manifest.id), name::manifest(manifest.id)]);
        needed.extend(manifest.group.map(name::group));
        let as_it_is = manifest.merged.filter(|_| from.info().seal == to.info().seal);
        let merged = |named: MergedIndex| [name::merged_sums(named.id), name::merged_index(named.id)];
        needed.extend(as_it_is.into_iter().flat_map(merged));
    }
    for name in needed {
        if !to.store().contains(&name)? && from.store().contains(&name)? {
            report.bytes += from.store().open(&name)?.bytes();
        }
    }
    Ok(report)
}

/// All that is to be copied, whatever stands on something behind that.
fn links(from: &Vault, wanted: &[CheckpointId]) -> Result<Vec<Committed>> {
    let mut found = BTreeMap::new();
    let mut open = wanted.to_vec();
    while let Some(id) = open.pop() {
        if found.contains_key(&id) {
            continue;
        }
        for link in from.chain(id)? {
            if let Some(group) = link.manifest.group
                && from.store().contains(&name::group(group))?
            {
                for member in from.group(group)?.members {
                    if !found.contains_key(&member.id) && from.store().contains(&name::manifest(member.id))? {
                        open.push(member.id);
                    }
                }
            }
            found.insert(link.manifest.id, link);
        }
    }
    let mut links: Vec<_> = found.into_values().collect();
    links.sort_by_key(|link| (link.manifest.deltas, link.manifest.id));
    Ok(links)
}

struct Copier<'a> {
    from: &'a Vault,
    to: &'a Vault,
    lease: &'a dyn Lease,
    /// By which digests the manifests are known where they go.
    digests: HashMap<CheckpointId, Digest>,
    report: Copied,
}

impl Copier<'_> {
    fn link(&mut self, link: &Committed) -> Result<()> {
        let id = link.manifest.id;
        let alike = self.from.info().seal == self.to.info().seal;
        let there = self.to.store().contains(&name::manifest(id))?;
        let digest = if there {
            let (_, digest) = whole(self.to, Kind::Manifest, &name::manifest(id), MAX_JSON_BYTES as u64)?;
            if alike && digest != link.digest {
                return Err(Error::Store(format!(
                    "{} holds another checkpoint {id} than {}: verify both, and prune the wrong one",
                    self.to.place(),
                    self.from.place()
                )));
            }
            digest
        } else if alike {
            self.bytes_of(link)?;
            link.digest
        } else {
            self.pages_of(link)?
        };
        self.digests.insert(id, digest);
        if there {
            self.report.present.push(id);
        } else {
            self.report.copied.push(id);
        }
        Ok(())
    }

    /// Copies a checkpoint as it is.
    fn bytes_of(&mut self, link: &Committed) -> Result<()> {
        let manifest = &link.manifest;
        let index = self.from.index(manifest)?;
        for (number, segment) in manifest.segments.iter().enumerate() {
            let number = u32::try_from(number).unwrap_or(u32::MAX);
            let mut extents: Vec<_> =
                index.extents.iter().filter(|extent| extent.segment == number).collect();
            extents.sort_unstable_by_key(|extent| extent.offset);
            self.segment(segment, &extents)?;
        }
        let id = manifest.id;
        self.object(Kind::Index, &name::index(id), manifest.index.bytes, manifest.index.digest.0)?;
        self.object(Kind::State, &name::state(id), manifest.state.bytes, manifest.state.digest.0)?;
        if let Some(named) = &manifest.merged
            && let Err(error) = self.merged(&manifest.layout, named)
        {
            tracing::info!(%error, "a merged index is not copied: its chain says the same");
        }
        self.lease.check()?;
        self.object(Kind::Manifest, &name::manifest(id), MAX_JSON_BYTES as u64, link.digest)
    }

    fn segment(&mut self, segment: &Segment, extents: &[&Extent]) -> Result<()> {
        let name = name::segment(segment.checkpoint, segment.number);
        if self.to.store().contains(&name)? {
            // Objects are there whole or not at all: its header and its length tell that it is the one.
            return SegmentReader::open(self.to, segment).map(|_| ());
        }
        SegmentReader::open(self.from, segment)?;
        let reader = self.from.store().open(&name)?;
        let mut writer = self.to.store().create(&name)?;
        let (mut at, mut piece) = (0, Vec::new());
        let mut pass = |reader: &dyn ObjectReader, bytes: u64, digest: Option<&Digest>| {
            piece.resize(usize::try_from(bytes).unwrap_or(usize::MAX), 0);
            reader.read_at(at, &mut piece)?;
            if digest.is_some_and(|digest| blake3::hash(&piece).as_bytes() != digest) {
                return Err(Error::Store(format!(
                    "object {name} of {} is damaged: the extent at {at} does not match its digest; `migrate store verify` says \
                     what else is",
                    self.from.place()
                )));
            }
            at += bytes;
            writer.append(&piece)?;
            Ok(at)
        };
        let mut here = 0;
        for extent in extents {
            while here < extent.offset {
                here = pass(&*reader, (extent.offset - here).min(PIECE_BYTES), None)?;
            }
            if here == extent.offset {
                here = pass(&*reader, extent.stored_bytes.into(), Some(&extent.digest))?;
            }
        }
        while here < segment.bytes {
            here = pass(&*reader, (segment.bytes - here).min(PIECE_BYTES), None)?;
        }
        self.report.bytes += writer.finish()?;
        Ok(())
    }

    /// Copies the merged index that a manifest names, with its sums first.
    fn merged(&mut self, layout: &Layout, named: &MergedIndex) -> Result<()> {
        let (index, sums) = (name::merged_index(named.id), name::merged_sums(named.id));
        if self.to.store().contains(&index)? {
            return Ok(());
        }
        let of_sums = self.from.merged_rows(layout, named, &mut Vec::new())?.sums;
        self.object(Kind::Sums, &sums, of_sums.bytes, of_sums.digest.0)?;
        self.object(Kind::Merged, &index, named.index.bytes, named.index.digest.0)
    }

    /// Copies a short object that has this digest.
    fn object(&mut self, kind: Kind, name: &str, limit_bytes: u64, digest: Digest) -> Result<()> {
        if self.to.store().contains(name)? && whole(self.to, kind, name, limit_bytes)?.1 == digest {
            return Ok(());
        }
        let (bytes, found) = whole(self.from, kind, name, limit_bytes)?;
        if found != digest {
            return Err(Error::Store(format!(
                "object {name} of {} is damaged: its digest is not the one that is known of it",
                self.from.place()
            )));
        }
        self.to.store().put(name, &bytes)?;
        self.report.bytes += bytes.len() as u64;
        Ok(())
    }

    /// Takes a checkpoint's pages out and puts them in again. Answers its manifest's digest there.
    fn pages_of(&mut self, link: &Committed) -> Result<Digest> {
        let (manifest, id) = (&link.manifest, link.manifest.id);
        // What an interrupted copy left is sealed by keys that are lost.
        for left in self.to.store().list(&format!("{DATA}{id}/"))? {
            self.to.store().delete(&left.name)?;
        }
        let old = self.from.index(manifest)?;
        let readers = manifest.segments.iter().map(|segment| SegmentReader::open(self.from, segment));
        let readers = readers.collect::<Result<Vec<_>>>()?;
        let mut index = Index { runs: old.runs, ..Index::default() };
        let (mut segments, mut writer, mut unpacker) = (Vec::new(), None, Unpacker::default());
        let mut sums = Vec::new();
        for extent in &old.extents {
            let Some(reader) = readers.get(extent.segment as usize) else { continue };
            let pages = reader.read(extent, &mut unpacker)?;
            let open = match &mut writer {
                Some(open) => open,
                none => {
                    let number = u32::try_from(segments.len()).unwrap_or(u32::MAX);
                    none.insert(SegmentWriter::begin(self.to, id, number)?)
                }
            };
            sums.clear();
            let put = open.append(pages, extent.encoding == Encoding::Zstd, &mut sums)?;
            index.push(put, &sums);
            if open.bytes() >= SEGMENT_BYTES
                && let Some(full) = writer.take()
            {
                segments.push(full.finish()?);
            }
        }
        if let Some(last) = writer {
            segments.push(last.finish()?);
        }
        if index.sums != old.sums {
            return Err(Error::Store(format!(
                "checkpoint {id} in {} is damaged: its pages do not match their sums; `migrate store verify` says which",
                self.from.place()
            )));
        }
        self.report.bytes += segments.iter().map(|segment| segment.bytes).sum::<u64>();
        let (machine, state) = self.from.state(manifest)?;
        let (index, state) = (self.to.put_index(id, &index)?, self.to.put_state(id, &machine, &state)?);
        self.report.bytes += index.bytes + state.bytes;
        let parent = manifest.parent.as_ref().map(|parent| self.renamed(parent)).transpose()?;
        let put = self.to.commit(
            self.lease,
            Manifest { segments, index, state, parent, merged: None, ..manifest.clone() },
        )?;
        Ok(put.digest)
    }

    /// A checkpoint that was copied, as it is known there.
    fn renamed(&self, old: &Parent) -> Result<Parent> {
        let digest = self.digests.get(&old.id).ok_or_else(|| {
            Error::Store(format!("checkpoint {} was not copied to {}", old.id, self.to.place()))
        })?;
        Ok(Parent { id: old.id, digest: HexDigest(*digest) })
    }

    /// Makes the members of a group exist, which were all copied.
    fn group(&mut self, id: CheckpointId) -> Result<()> {
        let name = name::group(id);
        if self.to.store().contains(&name)? || !self.from.store().contains(&name)? {
            return Ok(());
        }
        self.lease.check()?;
        let group = self.from.group(id)?;
        let members = group.members.iter().filter(|member| self.digests.contains_key(&member.id));
        let members = members.map(|member| self.renamed(member)).collect::<Result<Vec<_>>>()?;
        let put = self.to.put_json(Kind::Group, &name, &Group { members, ..group })?;
        self.report.bytes += put.bytes;
        Ok(())
    }
}

/// All of an object of a known kind, and its digest. What is in it may be sealed.
fn whole(vault: &Vault, kind: Kind, name: &str, limit_bytes: u64) -> Result<(Vec<u8>, Digest)> {
    let reader = vault.store().open(name)?;
    let damaged = |why: &str| Error::Store(format!("object {name} of {} is damaged: {why}", vault.place()));
    if reader.bytes() > limit_bytes.saturating_add(object::HEADER_BYTES as u64 + 64) {
        return Err(damaged("it is longer than what is known of it"));
    }
    let mut bytes = Vec::new();
    let length = usize::try_from(reader.bytes()).unwrap_or(usize::MAX);
    let room = bytes.try_reserve_exact(length);
    room.map_err(|_| Error::Host(format!("there is no memory for the {length} bytes of {name}")))?;
    bytes.resize(length, 0);
    reader.read_at(0, &mut bytes)?;
    let digest = object::decode(&bytes, kind, "it").map_err(|error| damaged(&error.to_string()))?.digest;
    Ok((bytes, digest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seal::StoreKey;
    use crate::store::{Fault, FaultyStore, MemoryStore, Store};
    use crate::upkeep::fixture;
    use crate::upkeep::verify::verify;
    use crate::vault::sample;
    use std::sync::Arc;

    fn vault(store: &MemoryStore, key: Option<u8>) -> Vault {
        let key = key.map(|byte| StoreKey::from_bytes([byte; 32]));
        Vault::open_or_create(Arc::new(store.clone()), key.as_ref()).unwrap()
    }

    /// A chain of three, and one alone that is the member of a group.
    fn filled(key: Option<u8>) -> (Vault, Vec<CheckpointId>) {
        let store = MemoryStore::new();
        let vault = vault(&store, key);
        let links = fixture::chain(&vault, 2);
        let mut memory = sample::Memory::new(9);
        memory.write(2);
        let alone = memory.checkpoint(&vault, sample::id(7), "web-2", None);
        let group = sample::id(8);
        store.delete(&name::manifest(alone.manifest.id)).unwrap();
        let lease = store.lock("a test").unwrap();
        let member = vault.commit(&*lease, Manifest { group: Some(group), ..alone.manifest }).unwrap();
        let group =
            Group { id: group, name: "app".into(), taken_unix_ms: 1, members: vec![member.as_parent()] };
        vault.put_json(Kind::Group, &name::group(group.id), &group).unwrap();
        let ids = links.iter().map(|link| link.manifest.id).chain([member.manifest.id]).collect();
        (vault, ids)
    }

    #[test]
    fn a_merged_index_goes_with_the_manifest_that_names_it() {
        let from = vault(&MemoryStore::new(), None);
        let links = fixture::chain(&from, 3);
        let of = &links[1];
        crate::checkpoint::write_merged(&from, of, &crate::cancel::CancelFlag::default()).unwrap();
        let newest = &links[3].manifest;
        from.store().delete(&name::manifest(newest.id)).unwrap();
        let merged = from.merged_of(of.manifest.id).unwrap();
        let lease = from.store().lock("a test").unwrap();
        from.commit(&*lease, Manifest { merged, ..newest.clone() }).unwrap();
        let ids: Vec<_> = links.iter().map(|link| link.manifest.id).collect();
        for (key, goes) in [(None, true), (Some(3), false)] {
            let to = vault(&MemoryStore::new(), key);
            let forecast = copy_forecast(&from, &to, &ids, &mut |_| Ok(())).unwrap();
            let copied = copy_all(&from, &to, &ids).unwrap();
            is_a_copy(&from, &to, &ids);
            let there = to.merged_of(of.manifest.id).unwrap();
            assert_eq!(there, merged.filter(|_| goes));
            assert_eq!(to.manifest(newest.id).unwrap().manifest.merged, there);
            assert!(key.is_some() || forecast.bytes == copied.bytes, "{forecast:?} {copied:?}");
        }
    }

    fn copy_all(from: &Vault, to: &Vault, ids: &[CheckpointId]) -> Result<Copied> {
        let lease = to.store().lock("a test")?;
        copy(from, to, &*lease, ids, &mut |_| Ok(()))
    }

    /// What a checkpoint's own pages are, by their sums, and where they belong.
    fn pages(
        vault: &Vault,
        id: CheckpointId,
    ) -> (Vec<protocol::checkpoint::index::Placed>, Vec<u64>, Vec<u8>) {
        let manifest = vault.manifest(id).unwrap().manifest;
        let index = vault.index(&manifest).unwrap();
        (index.runs, index.sums, vault.state(&manifest).unwrap().1)
    }

    fn is_a_copy(from: &Vault, to: &Vault, ids: &[CheckpointId]) {
        let verified = verify(to, &|_, _| Ok(())).unwrap();
        assert_eq!(verified.damages, []);
        assert_eq!(verified.checkpoints, ids.len() as u64);
        for id in ids {
            assert_eq!(pages(to, *id), pages(from, *id));
            assert_eq!(to.chain(*id).unwrap().len(), from.chain(*id).unwrap().len());
        }
    }

    #[test]
    fn a_copy_is_the_same_whatever_either_store_is_sealed_with() {
        for (key_from, key_to) in
            [(None, None), (Some(1), Some(1)), (None, Some(1)), (Some(1), None), (Some(1), Some(2))]
        {
            let (from, ids) = filled(key_from);
            let to = vault(&MemoryStore::new(), key_to);
            let forecast = copy_forecast(&from, &to, &ids, &mut |_| Ok(())).unwrap();
            assert_eq!(to.manifests().unwrap().committed.len(), 0);
            let copied = copy_all(&from, &to, &ids).unwrap();
            assert_eq!(forecast.copied, copied.copied);
            if key_from == key_to {
                assert_eq!(forecast, copied);
            }
            assert_eq!((copied.copied.len(), copied.present.len()), (4, 0));
            is_a_copy(&from, &to, &ids);
            let again = copy_all(&from, &to, &ids).unwrap();
            assert_eq!((again.copied.len(), again.present.len(), again.bytes), (0, 4, 0));
            let digest = |vault: &Vault| vault.manifest(ids[0]).unwrap().digest;
            assert_eq!(digest(&from) == digest(&to), key_from == key_to);
        }
    }

    #[test]
    fn one_checkpoint_brings_what_it_stands_on_and_no_more() {
        let (from, ids) = filled(None);
        let to = vault(&MemoryStore::new(), None);
        copy_all(&from, &to, &ids[1..2]).unwrap();
        is_a_copy(&from, &to, &ids[..2]);
        copy_all(&from, &to, &ids[3..]).unwrap();
        assert_eq!(to.manifests().unwrap().committed.len(), 3);
        assert!(to.store().contains(&name::group(sample::id(8))).unwrap());
    }

    #[test]
    fn what_is_damaged_is_not_copied() {
        for key_to in [None, Some(3)] {
            let (from, ids) = filled(None);
            let name = name::segment(ids[0], 0);
            let reader = from.store().open(&name).unwrap();
            let mut bytes = vec![0; usize::try_from(reader.bytes()).unwrap()];
            reader.read_at(0, &mut bytes).unwrap();
            bytes[4000] ^= 1;
            from.store().delete(&name).unwrap();
            from.store().put(&name, &bytes).unwrap();
            let to = vault(&MemoryStore::new(), key_to);
            let text = copy_all(&from, &to, &ids[2..3]).unwrap_err().to_string();
            assert!(text.contains(&name) && text.contains("damaged"), "{text}");
            assert!(to.manifests().unwrap().committed.is_empty());
        }
    }

    #[test]
    fn interrupted_anywhere_what_is_there_is_whole_and_the_next_time_ends_it() {
        for (key_to, fault) in [
            (None, Fault::PowerLost),
            (None, Fault::AnswerLost),
            (Some(5), Fault::PowerLostBehind),
            (Some(5), Fault::Fails),
        ] {
            let (from, ids) = filled(None);
            for call in 0.. {
                let store = MemoryStore::new();
                let key = key_to.map(|byte| StoreKey::from_bytes([byte; 32]));
                vault(&store, key_to);
                let faulty = FaultyStore::at(Arc::new(store.clone()), call, fault);
                let done = Vault::open(Arc::new(faulty.clone()), key.as_ref())
                    .and_then(|to| copy_all(&from, &to, &ids).map(|_| ()));
                let to = vault(&store, key_to);
                assert_eq!(verify(&to, &|_, _| Ok(())).unwrap().damages, [], "{fault:?} in call {call}");
                copy_all(&from, &to, &ids).unwrap();
                is_a_copy(&from, &to, &ids);
                if faulty.calls() <= call {
                    done.unwrap();
                    assert!(call > 30, "{call} calls");
                    break;
                }
            }
        }
    }
}

//! Which checkpoints there are, and on what they stand.

use super::{Vault, what};
use crate::error::{Error, Result};
use crate::store::Lease;
use protocol::checkpoint::manifest::{Group, HexDigest, MAX_MEMBERS, Manifest, Parent};
use protocol::checkpoint::name::{self, CHECKPOINTS, CheckpointId, GROUPS};
use protocol::checkpoint::object::{Digest, Kind};
use protocol::control::check_name;
use std::collections::HashMap;

/// A checkpoint that exists: all of it is durable, and so is its group if it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Committed {
    /// What it is.
    pub manifest: Manifest,
    /// The digest of the manifest's object: what a delta on it names it by.
    pub digest: Digest,
}

impl Committed {
    /// What a delta on it says of it.
    pub fn as_parent(&self) -> Parent {
        Parent { id: self.manifest.id, digest: HexDigest(self.digest) }
    }
}

/// A manifest or a group that cannot be read.
#[derive(Debug)]
pub struct Damaged {
    /// The object's name.
    pub object: String,
    /// The checkpoint, unless the name is none.
    pub id: Option<CheckpointId>,
    /// What is wrong with it.
    pub error: Error,
}

/// All checkpoints of a store.
#[derive(Debug, Default)]
pub struct Listing {
    /// Those that exist, by their names: the oldest first.
    pub committed: Vec<Committed>,
    /// Manifests and groups that cannot be read.
    pub damaged: Vec<Damaged>,
    /// Members of a group that was never completed, or is gone: they do not exist.
    pub orphans: Vec<Committed>,
}

impl Vault {
    /// Makes a checkpoint exist, whose segments, index and state are durable. Whoever writes must still be the only one.
    ///
    /// # Errors
    /// `Store`: it does not exist, then.
    pub fn commit(&self, lease: &dyn Lease, manifest: Manifest) -> Result<Committed> {
        let name = name::manifest(manifest.id);
        manifest.validate(manifest.id).map_err(|error| self.wrong(&name).unwritable(&error))?;
        lease.check()?;
        let part = self.put_json(Kind::Manifest, &name, &manifest)?;
        Ok(Committed { manifest, digest: part.digest.0 })
    }

    /// The checkpoint of this name, if it exists.
    ///
    /// # Errors
    /// `Store` when it does not, or its manifest is damaged.
    pub fn manifest(&self, id: CheckpointId) -> Result<Committed> {
        let place = self.place();
        if !self.store.contains(&name::manifest(id))? {
            return Err(Error::Store(format!(
                "there is no checkpoint {id} in {place}: `migrate store list` says which there are"
            )));
        }
        let found = self.read_manifest(id)?;
        let Some(group) = found.manifest.group else { return Ok(found) };
        if !self.store.contains(&name::group(group))? {
            return Err(Error::Store(format!(
                "checkpoint {id} in {place} does not exist: its group {group} was never completed, or is gone"
            )));
        }
        if is_member(&self.group(group)?, &found) {
            return Ok(found);
        }
        Err(self.wrong(&name::group(group)).damaged(&format!("it does not list its member {id} as it is")))
    }

    /// All checkpoints. What cannot be read does not hide the rest.
    ///
    /// # Errors
    /// `Store` when the store cannot be listed.
    pub fn manifests(&self) -> Result<Listing> {
        let mut listing = Listing::default();
        // Groups are listed last: one that is completed meanwhile is seen, or its members are not there yet.
        let names = self.store.list(CHECKPOINTS)?;
        let mut groups = HashMap::new();
        for found in self.store.list(GROUPS)? {
            match self.named(&found.name, GROUPS).and_then(|id| self.group(id)) {
                Ok(group) => drop(groups.insert(group.id, group)),
                Err(error) => listing.damaged.push(damaged(found.name, error)),
            }
        }
        for found in names {
            match self.named(&found.name, CHECKPOINTS).and_then(|id| self.read_manifest(id)) {
                Ok(found) => {
                    let exists = found
                        .manifest
                        .group
                        .is_none_or(|group| groups.get(&group).is_some_and(|group| is_member(group, &found)));
                    if exists { listing.committed.push(found) } else { listing.orphans.push(found) }
                }
                Err(error) => listing.damaged.push(damaged(found.name, error)),
            }
        }
        Ok(listing)
    }

    /// A group checkpoint.
    ///
    /// # Errors
    /// `Store` when there is none, or it is damaged.
    pub fn group(&self, id: CheckpointId) -> Result<Group> {
        let name = name::group(id);
        let (group, _): (Group, _) = self.get_json(Kind::Group, &name)?;
        let wrong = self.wrong(&name);
        check_name(&group.name).map_err(|error| wrong.damaged(&error))?;
        if group.id != id {
            return Err(wrong.damaged(&format!("it is {} by its content", group.id)));
        }
        if group.members.is_empty() || group.members.len() > MAX_MEMBERS {
            return Err(wrong.damaged(&format!("it has {} members", group.members.len())));
        }
        Ok(group)
    }

    /// A checkpoint and all that it stands on, down to a full one: the newest first. Every parent is the one that was meant.
    ///
    /// # Errors
    /// `Store` naming the link that is missing or damaged, and the one that stands on it.
    pub fn chain(&self, id: CheckpointId) -> Result<Vec<Committed>> {
        self.chain_of(self.manifest(id)?)
    }

    /// The same for one whose manifest was read already.
    ///
    /// # Errors
    /// As [`Vault::chain`].
    pub(crate) fn chain_of(&self, newest: Committed) -> Result<Vec<Committed>> {
        self.links(newest, None)
    }

    /// The same down to the one that stands on `below`, which is not read.
    ///
    /// # Errors
    /// As [`Vault::chain`], and when no link stands on it.
    pub(crate) fn chain_above(&self, newest: Committed, below: CheckpointId) -> Result<Vec<Committed>> {
        let id = newest.manifest.id;
        let links = self.links(newest, Some(below))?;
        let stands_on = links.last().and_then(|last| last.manifest.parent.as_ref());
        if stands_on.is_some_and(|parent| parent.id == below) {
            return Ok(links);
        }
        let name = name::manifest(id);
        Err(self
            .wrong(&name)
            .damaged(&format!("it names a merged index of {below}, on which it does not stand")))
    }

    /// From a link down to the full one, or to the one that stands on `below`.
    fn links(&self, newest: Committed, below: Option<CheckpointId>) -> Result<Vec<Committed>> {
        let mut links = vec![newest];
        while let Some(last) = links.last() {
            let stands_on = last.manifest.parent.as_ref().map(|parent| parent.id);
            if below.is_some() && stands_on == below {
                break;
            }
            let Some(next) = self.below(&last.manifest)? else { break };
            links.push(next);
        }
        Ok(links)
    }

    /// What a checkpoint stands on, if it is no full one; and it is the one that was meant. Whoever follows a chain comes to its end, because
    /// links count down.
    ///
    /// # Errors
    /// `Store` naming what is missing or damaged, and what stands on it.
    fn below(&self, link: &Manifest) -> Result<Option<Committed>> {
        let Some(Parent { id: parent, digest }) = &link.parent else { return Ok(None) };
        let stands = |why: &str| {
            Error::Store(format!(
                "checkpoint {} in {} stands on {parent}, {why}: restore one that stands on another, `migrate store list` \
                 draws them",
                link.id,
                self.place()
            ))
        };
        if !self.store.contains(&name::manifest(*parent))? {
            return Err(stands("which is gone"));
        }
        let found = self
            .read_manifest(*parent)
            .map_err(|error| stands(&format!("which cannot be read ({error})")))?;
        if found.digest != digest.0 {
            return Err(stands("whose manifest is not the one it was taken on"));
        }
        if found.manifest.layout != link.layout {
            return Err(stands("which is of other memory"));
        }
        if found.manifest.deltas.checked_add(1) != Some(link.deltas) {
            return Err(stands("which counts the chain's deltas in another way"));
        }
        Ok(Some(found))
    }

    /// A manifest, whether its group exists or not. A chain's older links need no group: all of them were durable before a delta was
    /// taken on them.
    fn read_manifest(&self, id: CheckpointId) -> Result<Committed> {
        let name = name::manifest(id);
        let (manifest, part): (Manifest, _) = self.get_json(Kind::Manifest, &name)?;
        manifest.validate(id).map_err(|error| self.wrong(&name).damaged(&error))?;
        Ok(Committed { manifest, digest: part.digest.0 })
    }

    pub(super) fn named(&self, object: &str, folder: &str) -> Result<CheckpointId> {
        let id = object.strip_prefix(folder).and_then(|id| id.parse().ok());
        id.ok_or_else(|| {
            self.wrong(object).damaged(&format!("this is not the name of {}", what(Kind::Manifest)))
        })
    }
}

fn is_member(group: &Group, found: &Committed) -> bool {
    group.members.contains(&found.as_parent())
}

fn damaged(object: String, error: Error) -> Damaged {
    let id = super::wrong::checkpoint_of(&object);
    Damaged { object, id, error }
}

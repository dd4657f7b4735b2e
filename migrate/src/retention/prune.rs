//! Giving checkpoints up.
//!
//! First a note in `pruned/` for each, from which the grace period counts in which a restore that is under way still finds its data;
//! then the manifests, none before one that stands on it. A group's object goes before its members' manifests: they cease to exist all
//! at once. A crash at any point leaves fewer checkpoints gone than were meant to, and none that stands on nothing; doing it again
//! goes on. The data itself is removed by `store gc`.

use super::{Keep, Member, Retention, apply};
use crate::chains::Chains;
use crate::error::Result;
use crate::store::Lease;
use crate::vault::{Vault, now_unix_ms};
use protocol::checkpoint::manifest::Pruned;
use protocol::checkpoint::name::{self, CheckpointId};
use protocol::checkpoint::object::Kind;
use std::collections::{BTreeMap, BTreeSet};

/// What is to be done.
#[derive(Debug, Default)]
pub struct Plan {
    /// What stays and what goes.
    pub retention: Retention,
    /// Checkpoints that cannot be restored as they are, and are left alone.
    pub left_alone: Vec<CheckpointId>,
    /// The groups of those that go.
    groups: BTreeMap<CheckpointId, CheckpointId>,
}

impl Plan {
    /// Applies the rules to all checkpoints of a store; with names of workloads to those of these alone.
    pub fn new(chains: &Chains, keep: &Keep, workloads: &[&str]) -> Self {
        let (mut members, mut bystanders) = (Vec::new(), Vec::new());
        for link in chains.links() {
            let member = Member::from(&link.committed.manifest);
            let is_meant = workloads.is_empty() || workloads.contains(&member.workload.as_str());
            if link.wrong.is_none() && is_meant { &mut members } else { &mut bystanders }.push(member);
        }
        let left_alone =
            chains.links().filter(|link| link.wrong.is_some()).map(|link| link.committed.manifest.id);
        let retention = apply(&members, &bystanders, keep);
        let groups = members.iter().filter_map(|member| Some((member.id, member.group?))).collect();
        Self { left_alone: left_alone.collect(), groups, retention }
    }
}

/// Does it. Answers which were given up.
///
/// # Errors
/// `Store`: some may have been given up, then, and doing it again goes on.
pub fn prune(vault: &Vault, lease: &dyn Lease, plan: &Plan) -> Result<Vec<CheckpointId>> {
    let store = vault.store();
    for id in &plan.retention.dropped {
        lease.check()?;
        let note = name::pruned(*id);
        // What an attempt left that was interrupted: the time counts from now on.
        if store.contains(&note)? {
            store.delete(&note)?;
        }
        vault.put_json(Kind::Pruned, &note, &Pruned { id: *id, pruned_unix_ms: now_unix_ms() })?;
    }
    let mut groups = BTreeSet::new();
    for id in &plan.retention.dropped {
        lease.check()?;
        if let Some(group) = plan.groups.get(id).filter(|group| groups.insert(**group)) {
            store.delete(&name::group(*group))?;
        }
        store.delete(&name::manifest(*id))?;
    }
    Ok(plan.retention.dropped.clone())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::sample::{Memory, chain, id, vault};
    use protocol::checkpoint::manifest::{Group, Manifest};

    fn plan(vault: &Vault, last: u32) -> Plan {
        Plan::new(&Chains::of(&vault.manifests().unwrap()), &Keep { last, ..Keep::default() }, &[])
    }

    #[test]
    fn what_is_given_up_is_noted_and_the_rest_can_be_restored() {
        let vault = vault();
        let (old, _) = chain(&vault, 3);
        let mut memory = Memory::new(7);
        let full = memory.checkpoint(&vault, id(10), "web-1", None);
        memory.write(3);
        let delta = memory.checkpoint(&vault, id(11), "web-1", Some(&full));
        let lease = vault.store().lock("a test").unwrap();
        let gone = prune(&vault, &*lease, &plan(&vault, 1)).unwrap();
        let mut expected: Vec<_> = old.iter().map(|one| one.manifest.id).collect();
        expected.reverse();
        assert_eq!(gone, expected, "none before one that stands on it");
        assert_eq!(vault.chain(delta.manifest.id).unwrap().len(), 2);
        for id in gone {
            let (note, _): (Pruned, _) = vault.get_json(Kind::Pruned, &name::pruned(id)).unwrap();
            assert_eq!(note.id, id);
            assert!(!vault.store().contains(&name::manifest(id)).unwrap());
        }
        assert!(prune(&vault, &*lease, &plan(&vault, 1)).unwrap().is_empty());
    }

    #[test]
    fn a_group_goes_when_the_rules_are_applied_to_all_of_its_members() {
        let vault = vault();
        let lock = || vault.store().lock("a test").unwrap();
        for number in [0, 10] {
            let group = id(number + 9);
            let members: Vec<_> = (number..)
                .zip(["web-1", "db"])
                .map(|(number, workload)| {
                    let alone = Memory::new(u64::from(number)).checkpoint(&vault, id(number), workload, None);
                    vault.store().delete(&name::manifest(alone.manifest.id)).unwrap();
                    let manifest = Manifest { group: Some(group), ..alone.manifest };
                    vault.commit(&*lock(), manifest).unwrap().as_parent()
                })
                .collect();
            let group = Group { id: group, name: "shop".into(), taken_unix_ms: number.into(), members };
            vault.put_json(Kind::Group, &name::group(group.id), &group).unwrap();
        }
        let gone = |workloads: &[&str]| {
            let chains = Chains::of(&vault.manifests().unwrap());
            let plan = Plan::new(&chains, &Keep { last: 1, ..Keep::default() }, workloads);
            prune(&vault, &*lock(), &plan).unwrap()
        };
        assert_eq!(gone(&["db"]), [], "the other member is nobody's to give up");
        assert_eq!(gone(&["db", "web-1"]).len(), 2);
        assert!(!vault.store().contains(&name::group(id(9))).unwrap());
        let left: Vec<_> =
            vault.manifests().unwrap().committed.iter().map(|found| found.manifest.id).collect();
        assert_eq!(left, [id(10), id(11)]);
    }

    #[test]
    fn an_attempt_that_was_interrupted_is_gone_on_with() {
        let vault = vault();
        let (links, _) = chain(&vault, 2);
        let mut memory = Memory::new(7);
        memory.checkpoint(&vault, id(10), "web-1", None);
        let old = links[2].manifest.id;
        vault.put_json(Kind::Pruned, &name::pruned(old), &Pruned { id: old, pruned_unix_ms: 5 }).unwrap();
        let lease = vault.store().lock("a test").unwrap();
        assert_eq!(prune(&vault, &*lease, &plan(&vault, 1)).unwrap().len(), 3);
        let (note, _): (Pruned, _) = vault.get_json(Kind::Pruned, &name::pruned(old)).unwrap();
        assert!(note.pruned_unix_ms > 5, "the grace period begins anew");
    }

    #[test]
    fn one_that_cannot_be_restored_fulfils_no_rule_and_is_left_alone() {
        let vault = vault();
        let (good, _) = chain(&vault, 1);
        let mut memory = Memory::new(7);
        let full = memory.checkpoint(&vault, id(10), "web-1", None);
        memory.write(3);
        let torn = memory.checkpoint(&vault, id(11), "web-1", Some(&full));
        vault.store().delete(&name::manifest(full.manifest.id)).unwrap();
        let plan = plan(&vault, 1);
        assert_eq!(plan.left_alone, [torn.manifest.id]);
        assert!(plan.retention.dropped.is_empty(), "{:?}", plan.retention);
        assert!(good.iter().all(|one| plan.retention.kept.contains_key(&one.manifest.id)));
    }
}

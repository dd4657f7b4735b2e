//! The checkpoints of a store as the trees that they are: what stands on what, how large, and whether it can.
//!
//! ```text
//! 20261123T194831Z-3f9a1c07  full
//! ├─ 20261123T194901Z-00c1d2aa
//! │  └─ 20261123T195012Z-77aa01b2      a branch: a VM that was restored from the one above
//! ├─ 20261123T194931Z-1b2c3d4e         goes on from 194901Z
//! └─ 20261123T195001Z-5f6a7b8c
//! ```

use crate::vault::{Committed, Listing};
use protocol::checkpoint::manifest::Segment;
use protocol::checkpoint::name::CheckpointId;
use std::collections::{BTreeMap, BTreeSet};

/// A checkpoint in its chain.
#[derive(Debug, Clone)]
pub struct Link {
    /// What it is.
    pub committed: Committed,
    /// Bytes of the objects that it added.
    pub own_bytes: u64,
    /// Bytes of all objects that restoring it may need, each counted once.
    pub chain_bytes: u64,
    /// Why it cannot be restored, if that is known without reading its data.
    pub wrong: Option<String>,
    /// Segments of checkpoints that are not in its chain.
    foreign: BTreeSet<(CheckpointId, u32)>,
    /// Whether something in its chain is missing.
    is_torn: bool,
}

/// A link's place in a drawing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// What stands in front of it.
    pub branches: String,
    /// Which.
    pub id: CheckpointId,
    /// What it stands on, where the drawing alone does not say it.
    pub stands_on: Option<CheckpointId>,
}

/// All checkpoints of a store.
#[derive(Debug, Clone, Default)]
pub struct Chains {
    links: BTreeMap<CheckpointId, Link>,
    children: BTreeMap<CheckpointId, Vec<CheckpointId>>,
    roots: Vec<CheckpointId>,
}

impl Chains {
    /// From what a store has. Members of groups that do not exist are among them, as such.
    pub fn of(listing: &Listing) -> Self {
        let missing = |orphan: &Committed| {
            let group = orphan.manifest.group.map_or(String::new(), |group| group.to_string());
            format!("its group {group} was never completed, or is gone")
        };
        let orphans = listing.orphans.iter().map(|orphan| (orphan, Some(missing(orphan))));
        let found = listing.committed.iter().map(|found| (found, None)).chain(orphans);
        let mut chains = Self::default();
        for (committed, wrong) in found {
            let link = Link {
                committed: committed.clone(),
                own_bytes: 0,
                chain_bytes: 0,
                wrong,
                foreign: BTreeSet::new(),
                is_torn: false,
            };
            chains.links.insert(committed.manifest.id, link);
        }
        let parents: Vec<_> = chains.links.iter().map(|(id, link)| (*id, link.parent())).collect();
        for (id, parent) in parents {
            match parent.filter(|parent| chains.links.contains_key(parent)) {
                Some(parent) => chains.children.entry(parent).or_default().push(id),
                None => chains.roots.push(id),
            }
        }
        chains.measure();
        chains
    }

    /// All of them, in the order of their names.
    pub fn links(&self) -> impl Iterator<Item = &Link> {
        self.links.values()
    }

    /// One of them.
    pub fn get(&self, id: CheckpointId) -> Option<&Link> {
        self.links.get(&id)
    }

    /// Which stand on it.
    pub fn children(&self, id: CheckpointId) -> &[CheckpointId] {
        self.children.get(&id).map_or(&[], Vec::as_slice)
    }

    /// The trees, the one that begins with the oldest first. A chain goes on at the depth at which it began, and what branches off
    /// from it is drawn deeper: so a hundred deltas are no hundred columns.
    pub fn draw(&self) -> Vec<Line> {
        let mut lines = Vec::new();
        for root in &self.roots {
            lines.push(Line { branches: String::new(), id: *root, stands_on: None });
            self.draw_children(*root, "", &mut lines);
        }
        lines
    }

    /// What stands on this one, and all that goes on from there; the longest life last, in line.
    fn draw_children(&self, of: CheckpointId, indent: &str, lines: &mut Vec<Line>) {
        let mut main = self.children(of).to_vec();
        let mut above = of;
        // The newest goes on in line; the others branch off.
        while let Some(next) = main.pop() {
            let goes_on = !self.children(next).is_empty();
            for side in main {
                let follows =
                    if lines.last().is_some_and(|line| line.id == above) { None } else { Some(above) };
                lines.push(Line { branches: format!("{indent}│  ├─ "), id: side, stands_on: follows });
                self.draw_children(side, &format!("{indent}│  "), lines);
            }
            let fork = if goes_on { "├─ " } else { "└─ " };
            lines.push(Line { branches: format!("{indent}{fork}"), id: next, stands_on: None });
            main = self.children(next).to_vec();
            above = next;
        }
    }

    /// Sizes and faults, each link behind the one that it stands on.
    fn measure(&mut self) {
        // Names do not tell the order of a chain whose clock was set back: parents first, by going down the trees.
        let mut open: Vec<CheckpointId> = self.roots.clone();
        let mut done = BTreeSet::new();
        while let Some(id) = open.pop() {
            if !done.insert(id) {
                continue;
            }
            open.extend(self.children(id));
            let Some(link) = self.links.get(&id) else { continue };
            let measured = self.measured(link);
            self.links.insert(id, measured);
        }
        // What was not reached stands on itself in the end: nobody writes that.
        for (id, link) in &mut self.links {
            if !done.contains(id) {
                link.wrong = Some("it stands on itself".into());
                self.roots.push(*id);
                self.children.remove(id);
            }
        }
    }

    fn measured(&self, link: &Link) -> Link {
        let manifest = &link.committed.manifest;
        let id = manifest.id;
        let own =
            manifest.segments.iter().filter(|segment| segment.checkpoint == id).map(|segment| segment.bytes);
        let own_bytes =
            own.sum::<u64>().saturating_add(manifest.index.bytes).saturating_add(manifest.state.bytes);
        let parent = link.parent().and_then(|parent| self.links.get(&parent));
        let mut foreign = parent.map_or(BTreeSet::new(), |parent| parent.foreign.clone());
        let mut chain_bytes = own_bytes.saturating_add(parent.map_or(0, |parent| parent.chain_bytes));
        for Segment { checkpoint, number, bytes } in &manifest.segments {
            if *checkpoint != id
                && !self.is_ancestor(*checkpoint, link)
                && foreign.insert((*checkpoint, *number))
            {
                chain_bytes = chain_bytes.saturating_add(*bytes);
            }
        }
        let torn = manifest.parent.as_ref().and_then(|meant| match parent {
            None => Some(format!("it stands on {}, which is gone or cannot be read", meant.id)),
            Some(parent) if parent.committed.digest != meant.digest.0 => {
                Some(format!("it stands on another {} than there is", meant.id))
            }
            // A link that stands on a member of a group that is gone needs the group for nothing.
            Some(parent) if parent.is_torn => {
                Some(format!("it stands on {}, which cannot be restored", meant.id))
            }
            Some(_) => None,
        });
        let is_torn = torn.is_some();
        let wrong = link.wrong.clone().or(torn);
        Link { own_bytes, chain_bytes, wrong, foreign, is_torn, committed: link.committed.clone() }
    }

    fn is_ancestor(&self, id: CheckpointId, of: &Link) -> bool {
        let above = |id: CheckpointId| self.links.get(&id).and_then(Link::parent);
        std::iter::successors(of.parent(), |id| above(*id))
            .take(self.links.len())
            .any(|ancestor| ancestor == id)
    }
}

impl Link {
    fn parent(&self) -> Option<CheckpointId> {
        self.committed.manifest.parent.as_ref().map(|parent| parent.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vault::sample::{Memory, chain, id, vault};
    use protocol::checkpoint::name;

    fn drawn(chains: &Chains) -> Vec<String> {
        let line = |line: &Line| {
            let on = line.stands_on.map_or(String::new(), |on| format!(" on {}", on.unix_s() % 3600 / 60));
            format!("{}{}{on}", line.branches, line.id.unix_s() % 3600 / 60)
        };
        chains.draw().iter().map(line).collect()
    }

    #[test]
    fn chains_are_drawn_in_line_and_branches_deeper() {
        let vault = vault();
        let (links, _) = chain(&vault, 3);
        let mut memory = Memory::new(7);
        for (number, on) in [(5, 1), (6, 1)] {
            memory.write(1);
            memory.checkpoint(&vault, id(number), "web-1", Some(&links[on]));
        }
        memory.checkpoint(&vault, id(8), "db", None);
        let chains = Chains::of(&vault.manifests().unwrap());
        let first = u32::try_from(id(0).unix_s() % 3600 / 60).unwrap();
        let at = |number: u32| (first + number) % 60;
        // The newest child of the first delta is the last one's branch: it goes on in line.
        let expected = [
            format!("{}", at(0)),
            format!("├─ {}", at(1)),
            format!("│  ├─ {}", at(2)),
            format!("│  └─ {}", at(3)),
            format!("│  ├─ {} on {}", at(5), at(1)),
            format!("└─ {}", at(6)),
            format!("{}", at(8)),
        ];
        assert_eq!(drawn(&chains), expected);
    }

    #[test]
    fn sizes_add_up_along_a_chain() {
        let vault = vault();
        let (links, _) = chain(&vault, 2);
        let chains = Chains::of(&vault.manifests().unwrap());
        let found: Vec<_> = links.iter().map(|one| chains.get(one.manifest.id).unwrap()).collect();
        assert!(found.iter().all(|link| link.own_bytes > 0 && link.wrong.is_none()));
        assert_eq!(found[0].chain_bytes, found[0].own_bytes);
        let all: u64 = found.iter().map(|link| link.own_bytes).sum();
        assert_eq!(found[2].chain_bytes, all);
        let objects: u64 = vault.store().list("data/").unwrap().iter().map(|object| object.bytes).sum();
        assert_eq!(all, objects);
    }

    #[test]
    fn a_link_that_is_gone_is_told_of_all_that_stand_on_it() {
        let vault = vault();
        let (links, _) = chain(&vault, 3);
        vault.store().delete(&name::manifest(links[1].manifest.id)).unwrap();
        let chains = Chains::of(&vault.manifests().unwrap());
        let wrong = |at: usize| chains.get(links[at].manifest.id).unwrap().wrong.clone();
        assert_eq!(wrong(0), None);
        assert!(wrong(2).unwrap().contains(&links[1].manifest.id.to_string()));
        assert!(wrong(3).unwrap().contains(&links[2].manifest.id.to_string()));
    }
}

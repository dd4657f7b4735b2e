//! Which group checkpoint an operator means.

use super::Vault;
use crate::error::{Error, Result};
use protocol::checkpoint::manifest::Group;
use protocol::checkpoint::name::{CheckpointId, GROUPS};

impl Vault {
    /// All group checkpoints that can be read, the oldest first. One that cannot is a warning: its members do not exist.
    ///
    /// # Errors
    /// `Store` when the store cannot be listed.
    pub fn groups(&self) -> Result<Vec<Group>> {
        let mut groups = Vec::new();
        for found in self.store.list(GROUPS)? {
            match self.named(&found.name, GROUPS).and_then(|id| self.group(id)) {
                Ok(group) => groups.push(group),
                Err(error) => tracing::warn!(%error, "a group checkpoint cannot be read"),
            }
        }
        groups.sort_by_key(age);
        Ok(groups)
    }

    /// The group checkpoint that is meant by `NAME`, `NAME@latest` or `NAME@ID`.
    ///
    /// # Errors
    /// `Store` when there is none.
    pub fn resolve_group(&self, text: &str) -> Result<Group> {
        pick(self.groups()?, text).ok_or_else(|| {
            Error::Store(format!(
                "there is no checkpoint of a group {text:?} in {}: name it NAME, or NAME@ID as `migrate checkpoint --group` said it",
                self.place()
            ))
        })
    }
}

fn age(group: &Group) -> (u64, CheckpointId) {
    (group.taken_unix_ms, group.id)
}

fn pick(groups: Vec<Group>, text: &str) -> Option<Group> {
    let (name, id) = match text.split_once('@') {
        None | Some((_, "latest")) => (text.split('@').next().unwrap_or(text), None),
        Some((name, id)) => (name, Some(id.parse::<CheckpointId>().ok()?)),
    };
    let ours = groups.into_iter().filter(|group| group.name == name && id.is_none_or(|id| group.id == id));
    ours.max_by_key(age)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_its_name_is_meant_or_the_one_that_is_named() {
        let id = |number| CheckpointId::new(u64::from(number), number);
        let group = |number, name: &str| Group {
            id: id(number),
            name: name.into(),
            taken_unix_ms: u64::from(number) * 1000,
            members: Vec::new(),
        };
        let all = || vec![group(1, "a"), group(3, "a"), group(2, "a"), group(4, "b")];
        let picked = |text: &str| pick(all(), text).map(|group| group.id);
        assert_eq!(picked("a"), Some(id(3)));
        assert_eq!(picked("a@latest"), Some(id(3)));
        assert_eq!(picked(&format!("a@{}", id(1))), Some(id(1)));
        assert_eq!(picked("b"), Some(id(4)));
        for wrong in ["c", "", "a@", "a@x", &format!("b@{}", id(1)), "@latest"] {
            assert_eq!(picked(wrong), None, "{wrong}");
        }
    }
}

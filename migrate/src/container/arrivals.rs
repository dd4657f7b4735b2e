//! Which migrations brought the containers of this host, for senders that ask when the receiver that took one is gone.

use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use protocol::MigrationId;
use serde::{Deserialize, Serialize};

/// What the names of their files end with.
const SUFFIX: &str = "arrived";

#[derive(Serialize, Deserialize)]
struct Arrival {
    migration: MigrationId,
}

/// This migration brought the container of this name, which runs.
///
/// # Errors
/// `Host` when that cannot be written down.
pub(crate) fn note(runtime_dir: &RuntimeDir, name: &str, migration: MigrationId) -> Result<()> {
    let folder = super::folder(runtime_dir);
    let path = folder.join(format!("{name}.{SUFFIX}"));
    let written = std::fs::create_dir_all(&folder)
        .and_then(|()| serde_json::to_vec(&Arrival { migration }).map_err(std::io::Error::other))
        .and_then(|bytes| std::fs::write(&path, bytes));
    written.map_err(|error| {
        Error::Host(format!("that {name} has arrived cannot be noted in {}: {error}", path.display()))
    })
}

/// Whether this migration brought a container that is the last of its name here.
pub(crate) fn has(runtime_dir: &RuntimeDir, migration: MigrationId) -> bool {
    let Ok(entries) = std::fs::read_dir(super::folder(runtime_dir)) else { return false };
    entries.flatten().map(|entry| entry.path()).any(|path| {
        let is_one = path.extension().is_some_and(|extension| extension == SUFFIX);
        let read = || serde_json::from_slice::<Arrival>(&std::fs::read(&path).ok()?).ok();
        is_one && read().is_some_and(|arrival| arrival.migration == migration)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_arrival_of_a_name_is_known() {
        let parent = tempfile::tempdir().unwrap();
        let runtime_dir = RuntimeDir::open(Some(&parent.path().join("run"))).unwrap();
        assert!(!has(&runtime_dir, MigrationId(1)));
        note(&runtime_dir, "a", MigrationId(1)).unwrap();
        note(&runtime_dir, "b", MigrationId(2)).unwrap();
        assert!(has(&runtime_dir, MigrationId(1)) && has(&runtime_dir, MigrationId(2)));
        note(&runtime_dir, "a", MigrationId(3)).unwrap();
        assert!(!has(&runtime_dir, MigrationId(1)) && has(&runtime_dir, MigrationId(3)));
    }
}

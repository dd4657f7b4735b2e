//! What keeps a store in order: finding damage, collecting what nothing reaches, and copying to another store.
//!
//! Each makes a plan from what is listed, and then acts, in an order in which it may be killed anywhere.

pub mod verify;
pub mod collect;
pub mod copy;

use crate::vault::Committed;
use protocol::checkpoint::name::CheckpointId;
use std::collections::{HashMap, HashSet};

/// These checkpoints and all that they stand on. A delta needs what is below it even where that does not exist by itself any more, because its
/// group was given up.
fn reached<'a>(
    roots: impl Iterator<Item = &'a Committed>,
    all: &HashMap<CheckpointId, &'a Committed>,
) -> HashSet<CheckpointId> {
    let mut reached = HashSet::new();
    for root in roots {
        let mut next = Some(root);
        while let Some(link) = next.filter(|link| reached.insert(link.manifest.id)) {
            next = link.manifest.parent.as_ref().and_then(|parent| all.get(&parent.id).copied());
        }
    }
    reached
}

//! Checkpoints at rest: the objects of a store and what is in them.
//!
//! ```text
//! store.json                       what this store is
//! checkpoints/ID                   the manifest: a checkpoint exists if and only if this object does
//! data/ID/index                    where the pages lie that this checkpoint added
//! data/ID/state                    the machine description and the workload's state
//! data/ID/segment-NNNNN            page data: extents, one behind the other
//! groups/ID                        a group checkpoint: its members exist if and only if this object does
//! pruned/ID                        when a checkpoint was given up, so that its data may go once the grace period is over
//! touched/ID/RANDOM                in which order a restored workload touched its pages first
//! merged/ID/index                  where all pages lie that it or what it stands on has: what the indexes of its chain say, in one
//! merged/ID/sums                   the sums of these pages
//! ```
//!
//! docs/checkpoint-format.md says the same in words, byte for byte.

pub mod name;
pub mod object;
pub mod segment;
pub mod index;
pub mod manifest;
pub mod touched;
pub mod merged;

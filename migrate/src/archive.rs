//! A checkpoint as one file, to be carried from store to store: a tar of its objects.
//!
//! ```text
//! store.json   manifests, the newest first   groups   segments, index and state of each
//! ```
//!
//! On the way in nothing is trusted. Data goes into the store at once, manifests wait until all of it was read back from there and is what
//! they say; then they are put, the oldest first. So an archive that is cut short, damaged or made up leaves no checkpoint behind.
//! Objects are carried as they are stored: those of a sealed store fit another one that is sealed with the same key.

mod inbound;
mod outbound;

pub use inbound::{Imported, import, import_forecast};
pub use outbound::{Exported, export, export_forecast};

/// What is copied at once.
const PIECE_BYTES: usize = 1 << 20;

#[cfg(test)]
mod tests;

//! What is saved of a virtio device, in our own types: the format of a saved state is ours, not a library's.

use serde::{Deserialize, Serialize};

/// A queue as its driver set it up, and how far it was served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct SavedQueue {
    /// Entries.
    pub(super) size: u16,
    pub(super) ready: bool,
    /// Guest-physical addresses of its three parts.
    pub(super) descriptors: u64,
    pub(super) available: u64,
    pub(super) used: u64,
    /// The next request to be taken, and the next answer's place, both counted from the driver's readiness on.
    pub(super) next_available: u16,
    pub(super) next_used: u16,
}

/// The registers that a driver writes.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    pub(super) status: u32,
    pub(super) device_features_select: u32,
    pub(super) driver_features_select: u32,
    pub(super) driver_features: u64,
    pub(super) queue_select: u32,
    pub(super) queues: Vec<SavedQueue>,
}

/// A device, version 1.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Saved {
    pub(super) kind: u32,
    pub(super) interrupt_status: u32,
    pub(super) broken: bool,
    pub(super) registers: Registers,
}

impl Saved {
    /// Reads it, all of it.
    ///
    /// # Errors
    /// What is wrong with the bytes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        match postcard::take_from_bytes(bytes) {
            Ok((saved, [])) => Ok(saved),
            Ok((_, rest)) => Err(format!("{} bytes too many", rest.len())),
            Err(error) => Err(error.to_string()),
        }
    }
}

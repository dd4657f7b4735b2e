//! What a checkpoint was, in numbers.

use crate::report::{GuestSpeed, PhaseTime, RoundReport};
use protocol::checkpoint::name::CheckpointId;
use serde::{Deserialize, Serialize};

/// See [`CheckpointReport::version`].
const REPORT_VERSION: u32 = 1;

/// What one checkpoint did. Of one that failed: what it did until then.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CheckpointReport {
    /// The version of this JSON. Members may be added under the same version.
    pub version: u32,
    /// Its name.
    pub id: CheckpointId,
    /// The workload's name.
    pub workload: String,
    /// Where it lies.
    pub store: String,
    /// Whether it exists: all of it is durable.
    pub committed: bool,
    /// The checkpoint that it is a delta on; `None` for a full one.
    pub parent: Option<CheckpointId>,
    /// How many deltas there are from the full one to this.
    pub deltas: u32,
    /// When the workload stood still for it, in milliseconds since 1970; 0 if it did not come to that.
    #[serde(default)]
    pub taken_unix_ms: u64,
    /// How writes were tracked; empty when it did not come to that.
    pub tracking: String,
    /// The workload's memory in bytes.
    pub memory_bytes: u64,
    /// The phases in order.
    pub phases: Vec<PhaseTime>,
    /// The rounds in order. What they sent went to the stage; the rate is that of reading.
    pub rounds: Vec<RoundReport>,
    /// Pages that differ from the parent's, or that a full one has: of each of them one version is in it.
    pub dirty_pages: u64,
    /// Of them: pages with data of its own.
    pub data_pages: u64,
    /// Of them: zeros.
    pub zero_pages: u64,
    /// Of them: pages whose content was stored already.
    pub shared_pages: u64,
    /// Pages that were written, each as often as it was: more than `data_pages` by what was dirty again in a later round.
    pub written_pages: u64,
    /// Bytes of segments: pages as they are stored.
    pub stored_bytes: u64,
    /// The same of all links of its chain together.
    pub chain_bytes: u64,
    /// Bytes of the index and the manifest.
    pub index_bytes: u64,
    /// Bytes of the merged index that was written behind it, if it was time for one.
    #[serde(default)]
    pub merged_bytes: u64,
    /// Bytes of the state.
    pub state_bytes: u64,
    /// The pause that was predicted when the rounds ended.
    pub predicted_pause_us: u64,
    /// How long the workload stood still, measured from here.
    pub pause_us: u64,
    /// Of it: stopping the workload.
    pub freeze_us: u64,
    /// Of it: the state.
    pub state_us: u64,
    /// Of it: everything but copying pages.
    pub fixed_us: u64,
    /// From the first call to the end.
    pub total_us: u64,
    /// Whether the workload ended with it.
    pub suspended: bool,
    /// How fast the guest was meanwhile, if it says so itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestSpeed>,
    /// What went wrong without changing the outcome, for people.
    pub warnings: Vec<String>,
}

impl CheckpointReport {
    /// Nothing done yet.
    pub(super) fn new(id: CheckpointId, workload: &str, store: String, memory_bytes: u64) -> Self {
        Self {
            version: REPORT_VERSION,
            id,
            workload: workload.into(),
            store,
            committed: false,
            parent: None,
            deltas: 0,
            taken_unix_ms: 0,
            tracking: String::new(),
            memory_bytes,
            phases: Vec::new(),
            rounds: Vec::new(),
            dirty_pages: 0,
            data_pages: 0,
            zero_pages: 0,
            shared_pages: 0,
            written_pages: 0,
            stored_bytes: 0,
            chain_bytes: 0,
            index_bytes: 0,
            merged_bytes: 0,
            state_bytes: 0,
            predicted_pause_us: 0,
            pause_us: 0,
            freeze_us: 0,
            state_us: 0,
            fixed_us: 0,
            total_us: 0,
            suspended: false,
            guest: None,
            warnings: Vec::new(),
        }
    }
}

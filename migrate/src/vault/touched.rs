//! Records of first touches: hints, which are never worth an error.

use super::Vault;
use crate::error::Result;
use crate::outbound::new_migration_id;
use protocol::checkpoint::name::{self, CheckpointId, TOUCHED};
use protocol::checkpoint::object::Kind;
use protocol::checkpoint::touched;
use protocol::layout::Layout;
use protocol::page::PageRun;

/// The most records of one checkpoint: behind that, another one tells little.
const MAX_RECORDS: usize = 8;

impl Vault {
    /// What earlier restores of this checkpoint touched first, in their orders. What cannot be read is passed over.
    pub fn touched(&self, id: CheckpointId, layout: &Layout) -> Vec<Vec<PageRun>> {
        let names = self.store.list(&format!("{TOUCHED}{id}/")).unwrap_or_default();
        let read = |name: &str| {
            let (body, _) = self.read(Kind::Touched, name, None).ok()?;
            touched::decode(layout, &body).ok()
        };
        names.iter().take(MAX_RECORDS).filter_map(|found| read(&found.name)).collect()
    }

    /// Records what a restore of this checkpoint touched first, unless nothing was, or there are enough of these.
    ///
    /// # Errors
    /// `Store` or `Host`; the restore is none the worse for it.
    pub fn put_touched(&self, id: CheckpointId, runs: &[PageRun]) -> Result<()> {
        let folder = format!("{TOUCHED}{id}/");
        if runs.is_empty() || self.store.list(&folder)?.len() >= MAX_RECORDS {
            return Ok(());
        }
        // The crypto library's own randomness takes tens of milliseconds to begin with, and this needs no better than the kernel's.
        let name = name::touched(id, new_migration_id()?.0 as u64);
        self.put(Kind::Touched, &name, &touched::encode(runs)).map(drop)
    }
}

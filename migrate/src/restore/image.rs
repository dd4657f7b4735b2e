//! A checkpoint's memory for whoever wants no workload: page by page, checked.

use super::eager::{GAP_BYTES, GROUP_BYTES};
use super::fetch::{Fetch, Scratch};
use super::pages_of;
use super::plan::{Plan, Sums};
use crate::cancel::CancelFlag;
use crate::error::Result;
use crate::vault::{Committed, Vault};
use protocol::checkpoint::name::CheckpointId;
use protocol::checkpoint::segment::Encoding;
use protocol::page::PageRun;

/// Where pages go: a run, its bytes, and how they are stored.
pub type StoredSink<'a> = dyn FnMut(PageRun, &[u8], Encoding) -> Result<()> + 'a;

/// The memory of a checkpoint, its chain merged.
pub struct Image {
    chain: Vec<Committed>,
    fetch: Fetch,
}

impl Image {
    /// Merges the chain of a checkpoint, and finds every segment that it needs.
    ///
    /// # Errors
    /// `Store` naming checkpoint and object.
    pub fn open(vault: &Vault, id: CheckpointId) -> Result<Self> {
        let chain = vault.chain(id)?;
        let fetch = pages_of(vault, &chain, Sums::Few, &CancelFlag::default())?;
        Ok(Self { chain, fetch })
    }

    /// The checkpoint and what it stands on, the newest first; never empty.
    pub fn chain(&self) -> &[Committed] {
        &self.chain
    }

    /// What is read of it.
    pub fn plan(&self) -> &Plan {
        self.fetch.plan()
    }

    /// Gives every page that is not zeros, once, in the order in which they are stored, and how they are.
    ///
    /// # Errors
    /// `Store` naming checkpoint and object, `Interrupted`, or the sink's.
    pub fn each(&self, cancel: &CancelFlag, sink: &mut StoredSink<'_>) -> Result<()> {
        let mut scratch = Scratch::default();
        for group in self.plan().groups(GAP_BYTES, GROUP_BYTES) {
            cancel.check()?;
            let (mut at, end) = (group.start, group.end);
            while let Some(first) = self.plan().needs.get(at).filter(|_| at < end) {
                let encoding = first.extent.encoding;
                let rest = self.plan().needs.get(at..end).unwrap_or_default();
                let alike = rest.iter().take_while(|need| need.extent.encoding == encoding).count();
                self.fetch
                    .group(at..at + alike, &mut scratch, &mut |run, pages| sink(run, pages, encoding))?;
                at += alike;
            }
        }
        Ok(())
    }
}

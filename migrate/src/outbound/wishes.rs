//! Whether what the operator wants goes together, and the destination can do it.

use super::Outbound;
use crate::error::{Error, Result};
use protocol::handshake::{DISKS, VERIFY};

impl Outbound<'_> {
    /// Looks at all of it, once it is known what both ends can do and before anything is changed anywhere.
    ///
    /// # Errors
    /// `Usage`, saying what to do.
    pub(super) fn check_wishes(&self) -> Result<()> {
        self.check_disks()?;
        self.check_verify()
    }

    /// The disks that go with the workload.
    fn check_disks(&self) -> Result<()> {
        if !self.has_disks() {
            return Ok(());
        }
        if self.options.limits().post_copy_after.is_some() {
            return Err(Error::Usage(
                "a disk must be there whole before its guest runs there, and a guest that is moved by post-copy runs before: ask \
                 for --copy-disk or for --post-copy, not for both"
                    .into(),
            ));
        }
        if !self.agreed.contains(&DISKS) {
            return Err(Error::Usage(
                "the destination's release cannot take disks: update it, or move the workload without --copy-disk to a host that \
                 shares them"
                    .into(),
            ));
        }
        Ok(())
    }

    /// Whether a disk goes with the workload.
    fn has_disks(&self) -> bool {
        self.source.workload().layout.has_disks()
    }

    /// Memory that is compared.
    fn check_verify(&self) -> Result<()> {
        if !self.options.verify {
            return Ok(());
        }
        if self.options.limits().post_copy_after.is_some() {
            return Err(Error::Usage(
                "a workload that starts without all of its memory cannot be compared before: ask for --verify or for \
                 --post-copy, not for both"
                    .into(),
            ));
        }
        if !self.agreed.contains(&VERIFY) {
            return Err(Error::Usage(
                "the destination's release cannot compare memory: move the workload without --verify, or update it".into(),
            ));
        }
        Ok(())
    }

    /// Whether both ends can do post-copy, the operator does not want all memory compared before the start, and no disk must be
    /// there whole by then.
    pub(super) fn can_post_copy(&self) -> bool {
        self.peer_can_post_copy && self.source.can_donate() && !self.options.verify && !self.has_disks()
    }
}

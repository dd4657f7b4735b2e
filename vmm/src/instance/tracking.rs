//! Which pages are dirty, and how slow the guest is made to write.

use protocol::{
    checkpoint::name::CheckpointId,
    monitor::{MAX_THROTTLE_PERCENT, Phase, Reply, TrackingMode},
    sparse,
};

use super::{Answer, Instance};
use crate::{
    dirty::LogMode,
    error::{Error, Result},
};

impl Instance {
    pub(super) fn track_start(&mut self, keep: bool) -> Result<Answer> {
        self.check_complete("track dirty pages")?;
        let tracker = self.live("track dirty pages")?.tracker();
        tracker.start(keep)?;
        let mode = match tracker.mode() {
            LogMode::ManualInitiallySet => TrackingMode::ManualInitiallySet,
            LogMode::Manual => TrackingMode::Manual,
            LogMode::Plain => TrackingMode::Plain,
        };
        Ok(Reply::Tracking { mode, baseline: tracker.baseline(), can_keep: true }.into())
    }

    pub(super) fn baseline(&mut self, checkpoint: Option<CheckpointId>) -> Result<Answer> {
        if let (Phase::Prepared, Some(checkpoint), Some(vm)) = (self.phase, checkpoint, &mut self.vm) {
            vm.tracker().begin_from(checkpoint)?;
            tracing::debug!(%checkpoint, "the baseline of a VM that is restored");
            return Ok(Reply::Done.into());
        }
        let tracker = self.live("have a baseline")?.tracker();
        match checkpoint {
            Some(checkpoint) => tracker.set_baseline(checkpoint)?,
            None => tracker.forget_baseline()?,
        }
        tracing::debug!(?checkpoint, "baseline");
        Ok(Reply::Done.into())
    }

    pub(super) fn harvest(&mut self, may_be_sparse: bool) -> Result<Answer> {
        let tracker = self.live("harvest dirty pages")?.tracker();
        let pages = tracker.harvest()?.iter().sum();
        let plain_bytes: usize = tracker.pending_words().map(|words| words.len() * 8).sum();
        if may_be_sparse {
            let blob = sparse::encode_words(tracker.pending_words());
            // Never the longer one: the bound on memory is that plain sets fit a reply.
            if blob.len() < plain_bytes {
                return Ok(Answer { blob, ..Reply::Dirty { pages, sparse: true }.into() });
            }
        }
        let mut blob = Vec::with_capacity(plain_bytes);
        for words in tracker.pending_words() {
            blob.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        Ok(Answer { blob, ..Reply::Dirty { pages, sparse: false }.into() })
    }

    pub(super) fn take(&mut self, space: u16, first: u64, count: u64) -> Result<Answer> {
        self.live("take dirty pages")?.tracker().take(space.into(), first, count)?;
        Ok(Reply::Done.into())
    }

    pub(super) fn redirty(&mut self, blob: &[u8]) -> Result<Answer> {
        let vm = self.live("give dirty pages back")?;
        let spaces = vm.tracker().space_pages();
        let needed: u64 = spaces.iter().map(|pages| pages.div_ceil(64) * 8).sum();
        if blob.len() as u64 != needed {
            return Err(Error::Protocol(format!(
                "the page sets have {} bytes, this VM's have {needed}",
                blob.len()
            )));
        }
        let mut words = blob.as_chunks::<8>().0.iter().map(|chunk| u64::from_le_bytes(*chunk));
        for (index, pages) in spaces.iter().enumerate() {
            let count = usize::try_from(pages.div_ceil(64)).unwrap_or(0);
            let bits: Vec<u64> = words.by_ref().take(count).collect();
            vm.tracker().redirty(index, 0, &bits)?;
        }
        Ok(Reply::Done.into())
    }

    pub(super) fn track_stop(&mut self) -> Result<Answer> {
        self.live("stop tracking")?.tracker().stop()?;
        self.unthrottle();
        Ok(Reply::Done.into())
    }

    pub(super) fn throttle(&mut self, percent: u8) -> Result<Answer> {
        if percent > MAX_THROTTLE_PERCENT {
            return Err(Error::Protocol(format!(
                "{percent} % of its time a VM cannot stand still: {MAX_THROTTLE_PERCENT} % is the most"
            )));
        }
        self.in_phase(Phase::Running, "slow down")?.throttle(percent)?;
        tracing::debug!(percent, "throttled");
        Ok(Reply::Done.into())
    }

    /// Whatever comes now, the guest shall not be slow in it.
    pub(super) fn unthrottle(&mut self) {
        if let Some(vm) = &mut self.vm
            && let Err(error) = vm.throttle(0)
        {
            tracing::warn!(%error, "the VM is still throttled");
        }
    }

    /// The session's tracking ends, however it did; see the module's text.
    pub(super) fn stop_tracking(&mut self) {
        if let Some(vm) = &mut self.vm
            && let Err(error) = vm.tracker().stop()
        {
            tracing::warn!(%error, "dirty tracking could not be stopped");
        }
    }
}

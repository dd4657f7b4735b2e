//! Behind the pause: everything becomes durable, then the manifest is written, and only then it is a checkpoint.

use super::known::FOREIGN;
use super::meeting::{Ended, Member};
use super::placement::Written;
use super::writer::Writers;
use super::{CheckpointReport, Failed, Taking, merged};
use crate::error::{Error, Result};
use crate::report::{Event, Phase, PhaseTime, micros};
use crate::source::Durable;
use protocol::checkpoint::index::{At, Index};
use protocol::checkpoint::manifest::{Group, Manifest, Parent, Segment};
use protocol::checkpoint::name;
use protocol::checkpoint::object::Kind;
use protocol::page::PageSet;
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// What takes checkpoints, as it says itself.
const SOFTWARE: &str = concat!("migrate ", env!("CARGO_PKG_VERSION"));

/// How often it is looked whether the writers are done.
const LOOK: Duration = Duration::from_millis(2);

impl Taking<'_, '_> {
    /// Waits until everything that was read is durable.
    pub(super) fn wait_for(&mut self, writers: Writers<'_>) -> Result<(Written, Vec<Segment>)> {
        self.stage.close();
        while !writers.are_done() {
            self.tell_writing();
            if let Err(error) = self.cancel.check() {
                self.stage.fail(Error::Interrupted(error.to_string()));
                return Err(error);
            }
            std::thread::sleep(LOOK);
        }
        writers.join()
    }

    /// Index, state, manifest.
    pub(super) fn commit(&mut self, written: Written, segments: Vec<Segment>) -> Result<()> {
        let workload = self.source.workload();
        let id = self.options.id;
        let mut body = written.into_index(&workload.layout);
        let own = segments.len() as u32;
        let segments = self.with_foreign(&mut body, segments);
        for placed in &body.runs {
            let pages = u64::from(placed.run.count);
            self.report.dirty_pages += pages;
            match placed.at {
                At::Zeros => self.report.zero_pages += pages,
                At::Extent { extent, .. } => {
                    let is_own = body.extents.get(extent as usize).is_some_and(|extent| extent.segment < own);
                    *if is_own { &mut self.report.data_pages } else { &mut self.report.shared_pages } +=
                        pages;
                }
            }
        }
        let index = self.vault.put_index(id, &body)?;
        let state = self.vault.put_state(id, &workload.machine, &self.state)?;
        self.report.index_bytes = index.bytes;
        self.report.written_pages = self.progress.data_pages();
        self.report.stored_bytes = self.progress.stored_bytes();
        self.report.chain_bytes += self.report.stored_bytes;
        let manifest = Manifest {
            id,
            taken_unix_ms: self.taken_unix_ms,
            software: SOFTWARE.into(),
            workload: workload.name.clone(),
            kind: workload.kind,
            layout: workload.layout.clone(),
            parent: self.parent.clone(),
            deltas: self.report.deltas,
            segments,
            index,
            state,
            data_pages: self.report.data_pages,
            shared_pages: self.report.shared_pages,
            zero_pages: self.report.zero_pages,
            pause_us: self.report.pause_us,
            merged: self.merged,
            group: self.options.group.as_ref().map(|(member, _)| member.group()),
        };
        self.lease.check()?;
        if self.options.group.is_none() {
            self.cancel.pass()?;
            self.may_exist = true;
        }
        let part = self.vault.put_json(Kind::Manifest, &name::manifest(id), &manifest)?;
        self.report.index_bytes += part.bytes;
        if let Some((member, name)) = self.options.group.clone() {
            self.commit_group(&member, name, Parent { id, digest: part.digest })?;
        }
        self.report.committed = true;
        Ok(())
    }

    /// The manifest is durable, and is no checkpoint before its group's object is.
    fn commit_group(&mut self, member: &Member, name: String, manifest: Parent) -> Result<()> {
        let (vault, lease, id) = (self.vault, self.lease, member.group());
        let ended = member.commit(manifest, |taken_unix_ms, members| {
            lease.check()?;
            let group = Group { id, name, taken_unix_ms, members };
            vault.put_json(Kind::Group, &name::group(id), &group).map(drop)
        });
        match ended {
            Ended::Exists => Ok(()),
            Ended::Failed(error) => Err(error),
            Ended::InDoubt(error) => {
                self.may_exist = true;
                Err(error)
            }
        }
    }

    /// The segments of an index: its own, and behind them those of others that its extents lie in.
    fn with_foreign(&self, index: &mut Index, mut segments: Vec<Segment>) -> Vec<Segment> {
        let mut positions = HashMap::new();
        for extent in index.extents.iter_mut().filter(|extent| extent.segment >= FOREIGN) {
            if let Some(segment) = self.known.segment(extent.segment) {
                extent.segment = *positions.entry(extent.segment).or_insert_with(|| {
                    segments.push(segment.clone());
                    segments.len() as u32 - 1
                });
            }
        }
        segments
    }

    /// The checkpoint exists: its pages count as safe from now on, and the workload goes on, or ends.
    pub(super) fn settle(mut self) -> std::result::Result<CheckpointReport, Box<Failed>> {
        let begun = Instant::now();
        self.observer.event(&Event::Phase { phase: Phase::Settle });
        let ended = if self.options.suspend {
            self.source.end(Durable::new(self.options.id))
        } else {
            if let Err(error) = self.source.set_baseline(self.options.id) {
                self.warn(format!("the next checkpoint will not be a delta on this one: {error}"));
            }
            self.source.resume()
        };
        let merged_bytes = merged::behind(self.vault, self.lease, self.options.id, self.cancel);
        let mut report = self.report;
        report.merged_bytes = merged_bytes;
        report.suspended = self.options.suspend && ended.is_ok();
        report.phases.push(PhaseTime { phase: Phase::Settle, duration_us: micros(begun.elapsed()) });
        report.total_us = micros(self.begun.elapsed());
        self.observer.event(&Event::Checkpointed(Box::new(report.clone())));
        match ended {
            Ok(()) => Ok(report),
            Err(error) if self.options.suspend => {
                let error = Error::Workload(format!(
                    "{} exists, but its workload could not be ended and may still run: {error}; do not restore it before \
                     migrate vm stop {}",
                    report.id, report.workload
                ));
                Err(Box::new(Failed { error, report }))
            }
            Err(error) => {
                // It was let go on behind the pause: what failed is the end of the tracking.
                report.warnings.push(format!("tracking could not be ended: {error}"));
                Ok(report)
            }
        }
    }

    /// There is no checkpoint: pages are given back, the workload goes on, and what was written goes.
    pub(super) fn give_up(mut self, error: Error) -> Box<Failed> {
        self.observer.event(&Event::Phase { phase: Phase::Settle });
        let begun = Instant::now();
        self.thaw();
        let redirtied =
            if self.taken.iter().all(PageSet::is_empty) { Ok(()) } else { self.source.redirty(&self.taken) };
        if let Err(error) = redirtied {
            // The VMM gives back what a session took and no checkpoint has, when the session ends.
            tracing::warn!(%error, "dirty bits could not be given back");
        }
        self.report.written_pages = self.progress.data_pages();
        self.report.stored_bytes = self.progress.stored_bytes();
        if !self.may_exist {
            self.remove_own();
        }
        let resumed = self.source.resume();
        let mut report = self.report;
        report.phases.push(PhaseTime { phase: Phase::Settle, duration_us: micros(begun.elapsed()) });
        report.total_us = micros(self.begun.elapsed());
        self.observer.event(&Event::Checkpointed(Box::new(report.clone())));
        let error = match resumed {
            Ok(()) => error,
            Err(resume) => Error::NotResumed { cause: Box::new(error), resume: Box::new(resume) },
        };
        Box::new(Failed { error, report })
    }

    /// Removes what was written, as far as the store lets it: whatever is left is no checkpoint, and is collected.
    fn remove_own(&self) {
        let id = self.options.id;
        let segments = (0..self.progress.segments()).map(|number| name::segment(id, number));
        // A group's member has a manifest perhaps, and goes first: nothing shall ever name what is gone.
        let manifest = self.options.group.is_some().then(|| name::manifest(id));
        for object in manifest.into_iter().chain(segments).chain([name::index(id), name::state(id)]) {
            if let Err(error) = self.vault.store().delete(&object) {
                tracing::debug!(%error, object, "left to the store's garbage collection");
            }
        }
    }
}

//! The rounds into the stage: pages while the workload runs, the last of them while it stands still, then its state.
//!
//! Rounds are as those of a migration: bits are cleared before bytes are read, so a page that is written meanwhile is dirty again
//! and comes with a later round. A round begins only once the stage has room for it, or holds nothing: copied at the speed of memory
//! it leaves little behind, whatever the store's speed.
//!
//! Pages that were never touched are left out only where all memory is looked at. Later on what is dirty was touched, mostly,
//! and asking for what was not costs more than reading it: the kernel walks through all of a memory file to find its next hole.

use super::Taking;
use super::stage::LOAD_PAGES;
use super::stop::{Decision, Measured, decide};
use crate::error::Result;
use crate::report::{Event, Progress, RoundReport, micros, rate};
use crate::select::{Batch, Selector, batches};
use crate::vault::now_unix_ms;
use protocol::ProtocolError;
use protocol::control::MAX_BLOB_BYTES;
use protocol::page::{PAGE_SIZE, PageRun, PageSet, SpaceId};
use std::time::{Duration, Instant};

/// The shortest time between two reports of progress.
const TICK: Duration = Duration::from_millis(100);

/// Pages that may be written between the last harvest of the rounds and the freeze, besides a quarter of what remains.
const WARM_PAGES: u64 = 1024;

/// How long a member of a group that could freeze waits for the others before it looks again at what it has left.
const PATIENCE: Duration = Duration::from_millis(20);

/// A pause that is longer than predicted by so much is worth a word: scheduling alone takes a millisecond now and then.
const LONGER: Duration = Duration::from_millis(2);

impl Taking<'_, '_> {
    /// Rounds until what remains can be copied within the pause, or nothing is gained any more.
    pub(super) fn rounds(&mut self) -> Result<()> {
        let selector = if self.parent.is_some() { Selector::Precopy } else { Selector::Full };
        let mut plan = self.harvest(selector)?;
        loop {
            let (mut report, mut measured) = self.read_pages(false, plan)?;
            let harvesting = Instant::now();
            plan = self.harvest(Selector::Precopy)?;
            let fixed = self.options.fixed_cost + harvesting.elapsed();
            let remaining_pages = plan.iter().map(PageSet::count).sum();
            (measured.remaining_pages, report.remaining_pages) = (remaining_pages, remaining_pages);
            self.measured.push(measured);
            let decision = decide(&self.measured, fixed, self.options.max_pause);
            let predicted = decision.predicted();
            report.predicted_downtime_us = micros(predicted);
            self.report.predicted_pause_us = micros(predicted);
            self.round_is_over(report);
            match decision {
                Decision::Round { .. } => plan = self.make_room(plan, remaining_pages)?,
                _ if !self.others_are_ready(fixed)? => plan = self.harvest(Selector::Precopy)?,
                Decision::Freeze { .. } => {
                    self.warm();
                    return Ok(());
                }
                Decision::Force { .. } => {
                    self.warm();
                    self.warn(format!(
                        "the pause could not be kept within {} ms: the workload writes faster than it can be copied, and was \
                         frozen with {} ms predicted",
                        self.options.max_pause.as_millis(),
                        predicted.as_millis()
                    ));
                    return Ok(());
                }
            }
        }
    }

    /// Takes memory for the last pages while nobody waits for it.
    fn warm(&mut self) {
        let remaining_pages = self.measured.last().map_or(0, |last| last.remaining_pages);
        self.stage.warm(remaining_pages + remaining_pages / 4 + WARM_PAGES);
    }

    /// Waits for the other members of the group, while what remains does not call for another round. Whether all can freeze.
    fn others_are_ready(&mut self, fixed: Duration) -> Result<bool> {
        let Some((member, _)) = self.options.group.clone() else { return Ok(true) };
        while !member.ready(PATIENCE)? {
            self.cancel.check()?;
            let plan = self.harvest(Selector::Precopy)?;
            if let Some(last) = self.measured.last_mut() {
                last.remaining_pages = plan.iter().map(PageSet::count).sum();
            }
            let decision = decide(&self.measured, fixed, self.options.max_pause);
            self.report.predicted_pause_us = micros(decision.predicted());
            if matches!(decision, Decision::Round { .. }) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until the stage has room for a plan. It is made anew if that took long.
    fn make_room(&mut self, plan: Vec<PageSet>, pages: u64) -> Result<Vec<PageSet>> {
        let waiting = Instant::now();
        let stage = self.stage.clone();
        stage.make_room(pages.min(stage.live_pages()), &mut || self.cancel.check())?;
        if waiting.elapsed() < Duration::from_millis(1) { Ok(plan) } else { self.harvest(Selector::Precopy) }
    }

    /// Stops the workload and reads what it wrote since the last round.
    pub(super) fn freeze(&mut self) -> Result<()> {
        self.cancel.check()?;
        let frozen_at = Instant::now();
        self.stage.hold(true);
        self.source.freeze()?;
        self.frozen_at = Some(frozen_at);
        self.taken_unix_ms = now_unix_ms().max(self.taken_unix_ms.saturating_add(1));
        self.report.taken_unix_ms = self.taken_unix_ms;
        if let Some((member, _)) = &self.options.group {
            member.stands_still(self.taken_unix_ms);
        }
        self.report.freeze_us = micros(frozen_at.elapsed());
        // Again, now that nothing writes: devices had writes in flight until this call.
        let plan = self.harvest(Selector::Precopy)?;
        let (mut report, measured) = self.read_pages(true, plan)?;
        self.frozen_copying = measured.copying;
        (report.frozen, report.duration_us) = (true, micros(frozen_at.elapsed()));
        self.round_is_over(report);
        Ok(())
    }

    /// Takes the state, and lets the workload go on unless it is to end.
    pub(super) fn state(&mut self) -> Result<()> {
        let saving = Instant::now();
        let state = self.source.state()?;
        self.report.state_us = micros(saving.elapsed());
        self.report.state_bytes = state.len() as u64;
        if let Some((member, _)) = &self.options.group {
            member.copied()?;
        }
        if !self.options.suspend {
            self.source.thaw()?;
        }
        let pause = self.frozen_at.map_or(Duration::ZERO, |frozen_at| frozen_at.elapsed());
        self.stage.hold(false);
        self.report.pause_us = micros(pause);
        self.report.fixed_us = micros(pause.saturating_sub(self.frozen_copying));
        if !self.options.suspend {
            self.frozen_at = None;
            let predicted = Duration::from_micros(self.report.predicted_pause_us);
            if pause > self.options.max_pause && pause > predicted + LONGER {
                self.warn(format!(
                    "the pause took {} ms, where {} ms were predicted",
                    pause.as_millis(),
                    predicted.as_millis()
                ));
            }
        }
        if state.len() as u64 > u64::from(MAX_BLOB_BYTES) {
            let (found, limit) = (state.len() as u64, u64::from(MAX_BLOB_BYTES));
            return Err(
                ProtocolError::TooLarge { what: "the workload's state in bytes", found, limit }.into()
            );
        }
        self.state = state;
        Ok(())
    }

    /// What is dirty now.
    fn harvest(&mut self, selector: Selector) -> Result<Vec<PageSet>> {
        let harvest = self.source.harvest()?;
        selector.plan(&self.source.workload().layout, harvest)
    }

    fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()> {
        // Noted before it is done: a call that fails may have taken some of them.
        if let Some(taken) = self.taken.get_mut(usize::from(space.0)) {
            taken.insert(first, count);
        }
        self.source.take(space, first, count)
    }

    /// Takes the pages of a plan and reads them into the stage, batch by batch.
    fn read_pages(&mut self, frozen: bool, mut plan: Vec<PageSet>) -> Result<(RoundReport, Measured)> {
        let begun = Instant::now();
        let (round, dirty_pages) = (self.round, plan.iter().map(PageSet::count).sum());
        self.round += 1;
        // There are fewer than 256: see the stop rule.
        let stage_round = round as u8;
        self.observer.event(&Event::RoundBegin { round, dirty_pages });
        let mut report = RoundReport { round, dirty_pages, ..RoundReport::default() };
        let mut copying = Duration::ZERO;
        let leaves_out_holes = round == 0 && self.parent.is_none();
        for batch in batches(&plan).collect::<Vec<_>>() {
            let Batch { space, first, count, .. } = batch;
            let Some(pages) = plan.get_mut(usize::from(space.0)) else { continue };
            self.take(space, first, count)?;
            if leaves_out_holes {
                self.source.present(space, first, count, pages)?;
            }
            for runs in loads(pages, &batch) {
                let mut buffer = self.buffer(frozen)?;
                let reading = Instant::now();
                let mut rest = &mut buffer[..];
                for run in &runs {
                    let (bytes, behind) = rest.split_at_mut(run.bytes());
                    self.source.read(*run, bytes)?;
                    rest = behind;
                }
                copying += reading.elapsed();
                report.sent_pages += runs.iter().map(|run| u64::from(run.count)).sum::<u64>();
                self.stage.push(stage_round, runs, buffer);
            }
            if !frozen {
                self.tell(&report, begun);
            }
        }
        report.skipped_pages = dirty_pages - report.sent_pages;
        report.sent_bytes = report.sent_pages * PAGE_SIZE as u64;
        report.duration_us = micros(begun.elapsed());
        report.rate_bytes_per_s = rate(report.sent_bytes, begun.elapsed());
        Ok((report, Measured { copied_pages: report.sent_pages, copying, remaining_pages: 0 }))
    }

    fn buffer(&mut self, frozen: bool) -> Result<Box<[u8]>> {
        let stage = self.stage.clone();
        stage.buffer(frozen, &mut || self.cancel.check())
    }

    /// Reports progress if the last report is long enough ago.
    fn tell(&mut self, round: &RoundReport, begun: Instant) {
        if self.told.elapsed() < TICK {
            return;
        }
        self.told = Instant::now();
        let sent_bytes = round.sent_pages * PAGE_SIZE as u64;
        self.observer.event(&Event::Progress(Progress {
            round: round.round,
            done_pages: round.sent_pages,
            remaining_pages: round.dirty_pages.saturating_sub(round.sent_pages),
            sent_bytes,
            rate_bytes_per_s: rate(sent_bytes, begun.elapsed()),
            predicted_downtime_us: Some(self.report.predicted_pause_us).filter(|us| *us > 0),
        }));
    }

    /// The same behind the rounds: what is not written yet.
    pub(super) fn tell_writing(&mut self) {
        if self.told.elapsed() < TICK {
            return;
        }
        self.told = Instant::now();
        let (done_pages, remaining_pages) = (self.progress.pages(), self.stage.staged_pages());
        let sent_bytes = done_pages * PAGE_SIZE as u64;
        self.observer.event(&Event::Progress(Progress {
            round: self.round.saturating_sub(1),
            done_pages,
            remaining_pages,
            sent_bytes,
            rate_bytes_per_s: rate(sent_bytes, self.begun.elapsed()),
            predicted_downtime_us: None,
        }));
    }

    fn round_is_over(&mut self, round: RoundReport) {
        let RoundReport { round: number, dirty_pages, sent_pages, remaining_pages, .. } = round;
        tracing::info!(round = number, dirty_pages, sent_pages, remaining_pages, "round over");
        self.observer.event(&Event::RoundEnd(round));
        self.report.rounds.push(round);
    }
}

/// The pages of a set that lie in a batch, in portions of one load.
fn loads(pages: &PageSet, batch: &Batch) -> impl Iterator<Item = Vec<PageRun>> {
    let (space, end) = (batch.space, batch.first + batch.count);
    let mut at = batch.first;
    std::iter::from_fn(move || {
        let (mut runs, mut room) = (Vec::new(), u64::from(LOAD_PAGES));
        while room > 0 {
            let Some(first) = pages.next_set(at).filter(|first| *first < end) else { break };
            at = pages.next_clear(first).min(end).min(first + room);
            runs.push(PageRun { space, first, count: (at - first) as u32 });
            room -= at - first;
        }
        (!runs.is_empty()).then_some(runs)
    })
}

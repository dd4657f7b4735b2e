//! The rounds: pages while the workload runs, then the last of them while it stands still, then its state.
//!
//! A round harvests what is dirty, then takes, looks at and reads it batch by batch. Bits are cleared before bytes are
//! read, so a page that is written meanwhile is dirty again and comes with a later round, whole or torn as it was read
//! now; the last round is read while nothing writes.
//!
//! Pages that were never touched are not read, because reading them would allocate them. In the first round they are
//! not sent either: the destination's memory is new and reads as zeros. In later rounds the same finding means
//! something else: the page may have been sent and *then* been given back to the host (a balloon, a hole punched), so
//! it must become zero there too, and that is sent. A page that is touched right behind the look is dirty again.

use super::lanes::{Contents, Sent};
use super::postcopy::widen;
use super::{Outbound, check_deadline};
use crate::converge::forecast::Forecast;
use crate::converge::trace::Entry;
use crate::converge::{Bound, Decision, Limits, Measured, Situation, bandwidth_bytes_per_s, decide};
use crate::conversation::out_of_order;
use crate::error::{Error, Result};
use crate::report::{Event, RoundReport, micros, rate};
use crate::select::{Batch, Piece, Selector, Window, batches};
use bytes::Bytes;
use protocol::ProtocolError;
use protocol::control::{Downstream, MAX_BLOB_BYTES, Upstream};
use protocol::page::{PAGE_SIZE, PageSet, SpaceId};
use protocol::sparse;
use std::time::{Duration, Instant};

impl Outbound<'_> {
    /// Rounds until the stop rule says freeze.
    pub(super) fn rounds(&mut self) -> Result<()> {
        let begun = *self.rounds_begun.get_or_insert_with(Instant::now);
        self.rounds_since = Some(begun);
        let mut harvested_at = Instant::now();
        let mut dirty = self.first_harvest()?;
        loop {
            let waiting_pages = self.hot.held_pages();
            let sends = self.hot.begin(dirty);
            let mut round = self.live_round(sends, harvested_at)?;
            harvested_at = Instant::now();
            dirty = self.harvest(Selector::Precopy)?;
            self.hot.end(&dirty);

            round.remaining_pages = self.hot.remaining(&dirty).iter().map(PageSet::count).sum();
            round.held_pages = self.hot.held_pages();
            self.measured.push(Measured {
                // What remains is counted in pages, so what was sent is too: packed ones for what they are.
                sent_bytes: round.sent_bytes.max(round.sent_pages * PAGE_SIZE as u64),
                duration: Duration::from_micros(round.duration_us),
                remaining_pages: round.remaining_pages,
                held_pages: round.held_pages,
                waiting_pages,
                throttle_percent: self.throttle_percent,
            });
            let entry = self.decide(begun.elapsed());
            let decision = entry.decided;
            let predicted = decision.predicted();
            round.predicted_downtime_us = micros(predicted);
            self.ticker.predict(predicted);
            self.round_is_over(round);
            self.ticker.event(&Event::Decided(Box::new(entry)));
            match decision {
                Decision::Round { .. } => {}
                Decision::Throttle { percent, .. } => self.throttle(percent)?,
                Decision::Freeze { .. } => return Ok(()),
                Decision::Minimum { .. } => {
                    self.report.warnings.push(format!(
                        "the downtime budget could not be met: what remained no longer fell, so it was frozen at a \
                         minimum, with {} ms predicted",
                        predicted.as_millis()
                    ));
                    return Ok(());
                }
                Decision::Force { .. } => {
                    self.report.warnings.push(format!(
                        "the downtime budget could not be met: frozen with {} ms predicted",
                        predicted.as_millis()
                    ));
                    return Ok(());
                }
                Decision::PostCopy { .. } => {
                    self.post_copy();
                    return Ok(());
                }
                Decision::GiveUp { bound, predicted } => return Err(self.not_converged(bound, predicted)),
            }
        }
    }

    /// What is dirty when the rounds begin; and where they begin again in the first round, what it had not come to.
    fn first_harvest(&mut self) -> Result<Vec<PageSet>> {
        if self.taken.iter().all(PageSet::is_empty) && self.there.is_none() {
            return self.harvest(Selector::Full);
        }
        let mut dirty = self.harvest(Selector::Precopy)?;
        if self.round == 0 {
            for (space, (dirty, taken)) in dirty.iter_mut().zip(&self.taken).enumerate() {
                let mut left = PageSet::full(taken.pages());
                left.subtract(taken);
                if let Some(there) = self.there.as_ref().and_then(|there| there.same.get(space)) {
                    left.subtract(there);
                }
                dirty.union(&left);
            }
            self.add_what_differs(&mut dirty);
        }
        Ok(dirty)
    }

    /// What is dirty now.
    fn harvest(&mut self, selector: Selector) -> Result<Vec<PageSet>> {
        let harvest = self.source.harvest()?;
        selector.plan(&self.source.workload().layout, harvest)
    }

    pub(super) fn take(&mut self, space: SpaceId, first: u64, count: u64) -> Result<()> {
        // Noted before it is done: a call that fails may have taken some of them.
        let index = usize::from(space.0);
        if let Some(taken) = self.taken.get_mut(index) {
            taken.insert(first, count);
        }
        self.hot.taken(index, first, count);
        self.source.take(space, first, count)
    }

    /// What the operator allows, as it is now: read anew for every decision.
    fn limits(&self) -> Limits {
        self.options.limits()
    }

    /// What to do behind the round that was just measured, and on what grounds.
    fn decide(&self, elapsed: Duration) -> Entry {
        // In whole microseconds, as a trace keeps them: what is replayed must be what was decided.
        let whole = |time| Duration::from_micros(micros(time));
        let (fixed, elapsed) = (whole(self.fixed_cost() + self.verify_cost), whole(elapsed));
        let (rounds, limits) = (&self.measured, self.limits());
        let (can_throttle, can_post_copy) = (self.source.can_throttle(), self.can_post_copy());
        let now = Situation { rounds, fixed, elapsed, can_throttle, can_post_copy, limits: &limits };
        let decided = decide(&now);
        let round = rounds.last().copied().unwrap_or_default();
        Entry { round, fixed, elapsed, can_throttle, can_post_copy, decided, limits }
    }

    /// Slows the workload down. It is the source that lets it run again, whatever ends the rounds.
    fn throttle(&mut self, percent: u8) -> Result<()> {
        if percent != self.throttle_percent {
            tracing::info!(percent, "throttled");
            self.source.throttle(percent)?;
            self.throttle_percent = percent;
        }
        Ok(())
    }

    /// Goes on with the memory behind the workload instead of before it: from now on what is missing is noted, and not
    /// sent.
    fn post_copy(&mut self) {
        self.missing = Some(Vec::new());
    }

    /// Stops the workload and sends what it wrote since the last round.
    pub(super) fn freeze(&mut self) -> Result<()> {
        self.cancel.check()?;
        self.rounds_since = None;
        let frozen_at = Instant::now();
        self.source.freeze()?;
        self.frozen_at = Some(frozen_at);
        self.report.fixed.pause_us = micros(frozen_at.elapsed());
        // Again, now that nothing writes: devices had writes in flight until this call.
        let dirty = self.harvest(Selector::Precopy)?;
        let plan = self.hot.remaining(&dirty);
        let round = self.last_round();
        let mut report = match self.missing {
            Some(_) => self.announce(round, plan)?,
            None => self.send_pages(round, true, plan)?,
        };
        self.lanes.end_round(round);
        self.lanes.finish();
        (report.frozen, report.duration_us) = (true, micros(frozen_at.elapsed()));
        self.report.rounds.push(report);
        Ok(())
    }

    /// Saves the state, while the lanes still send the last pages, and sends it behind them.
    pub(super) fn state(&mut self) -> Result<()> {
        let saving = Instant::now();
        let state = self.source.state()?;
        self.report.fixed.save_us = micros(saving.elapsed());
        self.report.state_bytes = state.len() as u64;
        if state.len() as u64 > u64::from(MAX_BLOB_BYTES) {
            let (found, limit) = (state.len() as u64, u64::from(MAX_BLOB_BYTES));
            return Err(
                ProtocolError::TooLarge { what: "the workload's state in bytes", found, limit }.into()
            );
        }
        let last_round = self.last_round();
        if let Some(missing) = &self.missing {
            let pages = missing.iter().map(PageSet::count).sum();
            let message = Downstream::Missing { pages };
            self.talk.say(&message, &sparse::encode(missing), self.options.stall)?;
        }
        self.talk.say(&Downstream::State { last_round }, &state, self.options.stall)
    }

    /// Instead of the last pages: notes which they are. Nothing is taken, because nothing is delivered. Pages that are
    /// dirty and were given back to the host are zeros, which cost nothing to send now.
    fn announce(&mut self, round: u32, plan: Vec<PageSet>) -> Result<RoundReport> {
        let dirty_pages = plan.iter().map(PageSet::count).sum();
        self.ticker.round_begins(round, dirty_pages, self.lanes.sent());
        let (mut missing, mut absent) = (plan.clone(), plan);
        let spaces = self.source.workload().layout.spaces.clone();
        for ((space, missing), absent) in spaces.iter().zip(&mut missing).zip(&mut absent) {
            self.source.present(space.id, 0, space.pages, missing)?;
            absent.subtract(missing);
        }
        for batch in batches(&absent).collect::<Vec<_>>() {
            let Some(pages) = absent.get(usize::from(batch.space.0)) else { continue };
            for piece in Window::of(pages, &batch)?.pieces() {
                self.reserve()?;
                self.lanes.send(round, true, piece.runs, Contents::Zeros);
            }
        }
        widen(&mut missing);
        for (space, missing) in spaces.iter().zip(&mut missing) {
            // What was never used lies in the gaps, too, and is right as it is.
            self.source.present(space.id, 0, space.pages, missing)?;
        }
        let remaining_pages = missing.iter().map(PageSet::count).sum();
        self.missing = Some(missing);
        Ok(RoundReport { round, dirty_pages, remaining_pages, ..RoundReport::default() })
    }

    /// Waits until the destination has everything and has checked it.
    pub(super) fn ready(&mut self) -> Result<()> {
        match self.hear("the destination to load the state", self.options.stall)? {
            Upstream::Ready => {}
            other => return Err(out_of_order("Ready", other.name())),
        }
        // Only now is it known what the lanes made of the last round.
        if let Some(mut last) = self.report.rounds.pop() {
            self.count(&mut last);
            self.round_is_over(last);
        }
        Ok(())
    }

    /// The number of the round that is sent while the workload stands still.
    pub(super) fn last_round(&self) -> u32 {
        self.round
    }

    /// What freezing costs with nothing left to send. One of the handshake's two round trips, and a harvest, are in
    /// the overhead that every round measures.
    fn fixed_cost(&self) -> Duration {
        let measured = Duration::from_micros(self.talk.stats().rtt_us);
        self.options.fixed_cost + if measured.is_zero() { self.round_trip } else { measured }
    }

    /// What of the downtime is left when round trips, the overhead of a round and the last pages are taken away: the
    /// same as [`Options::fixed_cost`](super::Options::fixed_cost) stands for, so that the next move can count with it.
    ///
    /// Comparing memory hides it: it begins while the last pages are on their way.
    pub(super) fn learn_fixed_part(&mut self, downtime: Duration) {
        if self.options.verify {
            return;
        }
        let trips = self.fixed_cost().saturating_sub(self.options.fixed_cost);
        let last = self.report.rounds.last();
        let last_bytes = last.map_or(0, |round| round.sent_bytes.max(round.sent_pages * PAGE_SIZE as u64));
        let explained =
            trips + Forecast::of(&self.measured, Duration::ZERO).moving(last_bytes, &self.measured);
        let fixed = &mut self.report.fixed;
        fixed.actual_us = micros(downtime.saturating_sub(explained));
    }

    /// A round from its harvest to the answer that all of it arrived.
    fn live_round(&mut self, plan: Vec<PageSet>, harvested_at: Instant) -> Result<RoundReport> {
        let round = self.round;
        let mut report = self.send_pages(round, false, plan)?;
        self.lanes.end_round(round);
        self.talk.say(&Downstream::RoundSent { round }, &[], self.options.stall)?;
        match self.hear("the destination to have a round in memory", self.options.stall)? {
            Upstream::RoundDone { round: done } if done == round => {}
            other => return Err(out_of_order("RoundDone of the round that was sent", other.name())),
        }
        self.owed.clear();
        self.round += 1;
        report.duration_us = micros(harvested_at.elapsed());
        self.count(&mut report);
        Ok(report)
    }

    /// Takes, reads and sends the pages of a plan, batch by batch.
    fn send_pages(&mut self, round: u32, frozen: bool, mut plan: Vec<PageSet>) -> Result<RoundReport> {
        let dirty_pages = plan.iter().map(PageSet::count).sum();
        // All of it at once: what is not taken when the link is lost is dirty still, and may be called dirty again.
        self.owed.clone_from(&plan);
        let throttle_percent = if self.frozen_at.is_none() { self.throttle_percent } else { 0 };
        let mut report = RoundReport { round, dirty_pages, throttle_percent, ..RoundReport::default() };
        self.lanes.begin_round();
        self.ticker.round_begins(round, dirty_pages, self.lanes.sent());
        for batch in batches(&plan).collect::<Vec<_>>() {
            if let Some(pages) = plan.get_mut(usize::from(batch.space.0)) {
                report.skipped_pages += self.send_batch(round, frozen, &batch, pages)?;
            }
            self.ticker.done(batch.dirty_pages);
            self.ticker.tick(self.lanes.sent());
        }
        Ok(report)
    }

    /// Sends the pages of one batch; answers how many need not be sent.
    fn send_batch(&mut self, round: u32, frozen: bool, batch: &Batch, pages: &mut PageSet) -> Result<u64> {
        let Batch { space, first, count, .. } = *batch;
        let wanted = Window::of(pages, batch)?;
        let at = usize::from(space.0);
        let before = self.written_there(at).map(|written| Window::of(&written, batch)).transpose()?;
        self.take(space, first, count)?;
        self.source.present(space, first, count, pages)?;
        let present = Window::of(pages, batch)?;
        let absent = wanted.without(&present);
        // What was never taken was never sent, and is zero there.
        let fresh = match before {
            Some(before) if round == 0 => absent.clone().without(&before),
            _ => absent.clone().without(&absent),
        };
        if let Some(owed) = self.owed.get_mut(at) {
            for run in fresh.pieces().flat_map(|piece| piece.runs) {
                owed.remove(run.first, u64::from(run.count));
            }
        }
        // Now, because what follows may be cut off.
        self.report.skipped_pages += fresh.count();
        for piece in absent.without(&fresh).pieces() {
            self.reserve()?;
            self.lanes.send(round, frozen, piece.runs, Contents::Zeros);
        }
        for piece in present.pieces() {
            self.reserve()?;
            let bytes = self.read(&piece)?;
            self.lanes.send(round, frozen, piece.runs, Contents::Bytes(bytes));
        }
        Ok(fresh.count())
    }

    /// Waits for room for one more piece, unless there is a reason to stop.
    fn reserve(&mut self) -> Result<()> {
        let Self { lanes, cancel, ticker, options, rounds_since, .. } = self;
        lanes.reserve(options.stall, || {
            cancel.check()?;
            check_deadline(*rounds_since, options)?;
            ticker.tick(lanes.sent());
            Ok(())
        })
    }

    fn read(&self, piece: &Piece) -> Result<Bytes> {
        self.buffers.filled(piece.pages as usize * PAGE_SIZE, |bytes| {
            let mut rest = bytes;
            for run in &piece.runs {
                let (buffer, behind) = rest.split_at_mut(run.bytes());
                self.source.read(*run, buffer)?;
                rest = behind;
            }
            Ok(())
        })
    }

    /// Fills in what the lanes sent since the last round, once it is known, and adds it to the totals.
    fn count(&mut self, round: &mut RoundReport) {
        let Sent { pages, zero_pages, packed_pages, bytes } = self.lanes.sent();
        let total = &mut self.report;
        round.sent_pages = pages - total.sent_pages;
        round.zero_pages = zero_pages - total.zero_pages;
        round.packed_pages = packed_pages - total.packed_pages;
        round.sent_bytes = bytes - total.sent_bytes;
        round.rate_bytes_per_s = rate(round.sent_bytes, Duration::from_micros(round.duration_us));
        (total.sent_pages, total.zero_pages, total.sent_bytes) = (pages, zero_pages, bytes);
        total.packed_pages = packed_pages;
    }

    fn round_is_over(&mut self, round: RoundReport) {
        let RoundReport { round: number, dirty_pages, sent_pages, remaining_pages, .. } = round;
        tracing::info!(round = number, dirty_pages, sent_pages, remaining_pages, "round over");
        self.ticker.event(&Event::RoundEnd(round));
        self.report.rounds.push(round);
    }

    fn not_converged(&self, bound: Bound, predicted: Duration) -> Error {
        let Limits { downtime, max_rounds, timeout, .. } = self.limits();
        let bound = match bound {
            Bound::Rounds => format!("{max_rounds} rounds"),
            Bound::Time => format!("{} s", timeout.as_secs_f32()),
            Bound::Stall => format!("{} rounds, the last of which gained nothing,", self.measured.len()),
        };
        let remaining = self.measured.last().map_or(0, |round| round.remaining_pages);
        Error::NotConverged(format!(
            "after {bound} {remaining} pages are still dirty, which at {:.1} MB/s is a downtime of {} ms, and {} ms \
             are allowed: allow more with --downtime, --max-downtime, --max-rounds or --timeout, let more be tried with \
             --on-stall, or move it all the same with --on-timeout force",
            bandwidth_bytes_per_s(&self.measured) / 1e6,
            predicted.as_millis(),
            downtime.as_millis(),
        ))
    }
}

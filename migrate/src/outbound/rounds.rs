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
use super::{Outbound, check_deadline};
use crate::converge::{Bound, Decision, Limits, Measured, Situation, bandwidth_bytes_per_s, decide};
use crate::conversation::out_of_order;
use crate::error::{Error, Result};
use crate::report::{Event, RoundReport, micros, rate};
use crate::select::{Batch, Piece, Selector, Window, batches};
use protocol::ProtocolError;
use protocol::control::{Downstream, MAX_BLOB_BYTES, Upstream};
use protocol::page::{PAGE_SIZE, PageSet};
use std::time::{Duration, Instant};

impl Outbound<'_> {
    /// Rounds until the stop rule says freeze.
    pub(super) fn rounds(&mut self) -> Result<()> {
        let begun = *self.rounds_begun.get_or_insert_with(Instant::now);
        self.rounds_since = Some(begun);
        let mut selector = Selector::Precopy;
        let mut harvested_at = Instant::now();
        let mut harvest = self.source.harvest()?;
        if self.round == 0 {
            selector = self.first(&mut harvest);
        }
        loop {
            let plan = selector.plan(&self.source.workload().layout, harvest)?;
            let mut round = self.live_round(plan, harvested_at)?;
            harvested_at = Instant::now();
            harvest = self.source.harvest()?;
            selector = Selector::Precopy;

            round.remaining_pages = harvest.iter().map(PageSet::count).sum();
            self.measured.push(Measured {
                sent_bytes: round.sent_bytes,
                duration: Duration::from_micros(round.duration_us),
                remaining_pages: round.remaining_pages,
                ..Measured::default()
            });
            let decision = self.decide(begun.elapsed());
            let predicted = decision.predicted();
            round.predicted_downtime_us = micros(predicted);
            self.ticker.predict(predicted);
            self.round_is_over(round);
            match decision {
                Decision::Round { .. } | Decision::Throttle { .. } => {}
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
                Decision::PostCopy { predicted } => return self.post_copy(predicted),
                Decision::GiveUp { bound, predicted } => return Err(self.not_converged(bound, predicted)),
            }
        }
    }

    /// What the first round sends: everything; or, where it was cut off, what it had not come to.
    fn first(&self, harvest: &mut [PageSet]) -> Selector {
        if self.taken.iter().all(PageSet::is_empty) {
            return Selector::Full;
        }
        for (harvest, taken) in harvest.iter_mut().zip(&self.taken) {
            let mut left = PageSet::full(taken.pages());
            left.subtract(taken);
            harvest.union(&left);
        }
        Selector::Precopy
    }

    /// What the operator allows, as it is now: read anew for every decision.
    fn limits(&self) -> Limits {
        self.options.limits()
    }

    /// What to do behind the round that was just measured.
    fn decide(&self, elapsed: Duration) -> Decision {
        decide(&Situation {
            rounds: &self.measured,
            fixed: self.fixed_cost(),
            elapsed,
            can_throttle: false,
            can_post_copy: self.can_post_copy(),
            limits: &self.limits(),
        })
    }

    /// Whether both ends can do post-copy.
    fn can_post_copy(&self) -> bool {
        false
    }

    /// Goes on with the memory behind the workload instead of before it.
    fn post_copy(&mut self, predicted: Duration) -> Result<()> {
        Err(self.not_converged(Bound::Stall, predicted))
    }

    /// Stops the workload and sends what it wrote since the last round.
    pub(super) fn freeze(&mut self) -> Result<()> {
        self.cancel.check()?;
        self.rounds_since = None;
        let frozen_at = Instant::now();
        self.source.freeze()?;
        self.frozen_at = Some(frozen_at);
        // Again, now that nothing writes: devices had writes in flight until this call.
        let harvest = self.source.harvest()?;
        let plan = Selector::Precopy.plan(&self.source.workload().layout, harvest)?;
        let round = self.last_round();
        let mut report = self.send_pages(round, plan)?;
        self.lanes.end_round(round);
        self.lanes.finish();
        (report.frozen, report.duration_us) = (true, micros(frozen_at.elapsed()));
        self.report.rounds.push(report);
        Ok(())
    }

    /// Saves the state, while the lanes still send the last pages, and sends it behind them.
    pub(super) fn state(&mut self) -> Result<()> {
        let state = self.source.state()?;
        self.report.state_bytes = state.len() as u64;
        if state.len() as u64 > u64::from(MAX_BLOB_BYTES) {
            let (found, limit) = (state.len() as u64, u64::from(MAX_BLOB_BYTES));
            return Err(
                ProtocolError::TooLarge { what: "the workload's state in bytes", found, limit }.into()
            );
        }
        let last_round = self.last_round();
        self.talk.say(&Downstream::State { last_round }, &state, self.options.stall)
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
    fn last_round(&self) -> u32 {
        self.round
    }

    /// What freezing costs with nothing left to send. One of the handshake's two round trips, and a harvest, are in
    /// the overhead that every round measures.
    fn fixed_cost(&self) -> Duration {
        let measured = Duration::from_micros(self.talk.stats().rtt_us);
        self.options.fixed_cost + if measured.is_zero() { self.round_trip } else { measured }
    }

    /// A round from its harvest to the answer that all of it arrived.
    fn live_round(&mut self, plan: Vec<PageSet>, harvested_at: Instant) -> Result<RoundReport> {
        let round = self.round;
        let mut report = self.send_pages(round, plan)?;
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
    fn send_pages(&mut self, round: u32, mut plan: Vec<PageSet>) -> Result<RoundReport> {
        let dirty_pages = plan.iter().map(PageSet::count).sum();
        // All of it at once: what is not taken when the link is lost is dirty still, and may be called dirty again.
        self.owed.clone_from(&plan);
        let mut report = RoundReport { round, dirty_pages, ..RoundReport::default() };
        self.ticker.round_begins(round, dirty_pages, self.lanes.sent());
        for batch in batches(&plan).collect::<Vec<_>>() {
            if let Some(pages) = plan.get_mut(usize::from(batch.space.0)) {
                report.skipped_pages += self.send_batch(round, &batch, pages)?;
            }
            self.ticker.done(batch.dirty_pages);
            self.ticker.tick(self.lanes.sent());
        }
        Ok(report)
    }

    /// Sends the pages of one batch; answers how many need not be sent.
    fn send_batch(&mut self, round: u32, batch: &Batch, pages: &mut PageSet) -> Result<u64> {
        let Batch { space, first, count, .. } = *batch;
        let wanted = Window::of(pages, batch)?;
        // Noted before it is done: a call that fails may have taken some of them.
        let at = usize::from(space.0);
        let mut before = None;
        if let Some(taken) = self.taken.get_mut(at) {
            before = Some(Window::of(taken, batch)?);
            taken.insert(first, count);
        }
        self.source.take(space, first, count)?;
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
            self.lanes.send(round, piece.runs, Contents::Zeros);
        }
        for piece in present.pieces() {
            self.reserve()?;
            let bytes = self.read(&piece)?;
            self.lanes.send(round, piece.runs, Contents::Bytes(bytes.into()));
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

    fn read(&self, piece: &Piece) -> Result<Vec<u8>> {
        let mut bytes = vec![0; piece.pages as usize * PAGE_SIZE];
        let mut rest = bytes.as_mut_slice();
        for run in &piece.runs {
            let (buffer, behind) = rest.split_at_mut(run.bytes());
            self.source.read(*run, buffer)?;
            rest = behind;
        }
        Ok(bytes)
    }

    /// Fills in what the lanes sent since the last round, once it is known, and adds it to the totals.
    fn count(&mut self, round: &mut RoundReport) {
        let Sent { pages, zero_pages, bytes } = self.lanes.sent();
        let total = &mut self.report;
        round.sent_pages = pages - total.sent_pages;
        round.zero_pages = zero_pages - total.zero_pages;
        round.sent_bytes = bytes - total.sent_bytes;
        round.rate_bytes_per_s = rate(round.sent_bytes, Duration::from_micros(round.duration_us));
        (total.sent_pages, total.zero_pages, total.sent_bytes) = (pages, zero_pages, bytes);
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

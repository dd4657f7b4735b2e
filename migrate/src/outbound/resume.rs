//! A link that was lost before anything was decided: the workload runs on, tracked, and the rounds go on over another.
//!
//! The rounds are in lock-step, so exactly one is under way. What the destination must have of it is `owed`; what it had
//! whole when the link broke it says in `Resumed`, and that alone is taken off. The rest is called dirty again, so that
//! the round goes on like any other: with what is dirty. Nothing else needs to be remembered: what an earlier round
//! brought is there, and what was written since is in the dirty log.
//!
//! Where the state was sent, the destination may have loaded it, and then says `Anew`: its memory is new and all zeros, and it is
//! owed every page, as if nothing had been sent.
//!
//! The lanes are new ones, with new streams. Whatever a lane remembers of pages that it sent (to send differences) goes
//! with it: the destination of a new stream knows nothing.

use super::lanes::Lanes;
use super::settle::last_word;
use super::{Outbound, check_deadline, understood};
use crate::conversation::out_of_order;
use crate::error::{Error, Result};
use crate::report::{Event, micros};
use protocol::control::{Downstream, MAX_BLOB_BYTES, RefuseCode, Upstream};
use protocol::handshake;
use protocol::page::PageSet;
use protocol::sparse;
use std::time::{Duration, Instant};

/// How long to wait before dialling again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));

/// How long a wait goes on before it looks around.
const SLICE: Duration = Duration::from_millis(50);

impl Outbound<'_> {
    /// Whether an error before `Commit` is one behind which the rounds may go on over another link.
    pub(super) fn may_resume(&self, error: &Error) -> bool {
        is_lost(error) && self.agreed.contains(&handshake::RESUME) && !self.options.retry.is_zero()
    }

    /// Goes back into the rounds over another link. `lost` is why it must.
    ///
    /// # Errors
    /// `lost` where there is none in time; why the destination does not go on; `Interrupted`.
    pub(super) fn resume(&mut self, lost: Error) -> Result<()> {
        // The workload comes first: it shall not stand still for a link.
        self.thaw()?;
        let lost = last_word(&mut self.talk, lost);
        if !is_lost(&lost) {
            return Err(lost);
        }
        self.talk.hang_up("lost");
        let sent = std::mem::replace(&mut self.lanes, Lanes::none()).join();
        tracing::warn!(error = %lost, "the link is lost; trying again");
        let wait_us = micros(self.options.retry);
        self.ticker.event(&Event::LinkLost { reason: lost.to_string(), wait_us });
        let (begun, mut pause) = (Instant::now(), PAUSE.0);
        loop {
            self.check()?;
            match self.take_up(sent) {
                Err(error) if may_pass(&error) => tracing::info!(%error, "no link yet"),
                done => return done,
            }
            if begun.elapsed() + pause >= self.options.retry {
                return Err(lost);
            }
            let until = Instant::now() + pause;
            while Instant::now() < until {
                self.check()?;
                std::thread::sleep(SLICE.min(pause));
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Lets a workload that is frozen or slowed down go on.
    fn thaw(&mut self) -> Result<()> {
        // What was to follow behind the start is decided anew.
        self.missing = None;
        let frozen_at = self.frozen_at;
        if frozen_at.is_some() {
            self.source.thaw()?;
            self.frozen_at = None;
        }
        // Behind that, because a workload that stands still cannot be told how fast to run.
        if self.throttle_percent > 0 {
            self.source.throttle(0)?;
            self.throttle_percent = 0;
        }
        let Some(frozen_at) = frozen_at else { return Ok(()) };
        let ms = frozen_at.elapsed().as_millis();
        self.report.warnings.push(format!(
            "the workload stood still for {ms} ms and went on, because the link was lost before it was committed"
        ));
        if self.report.rounds.last().is_some_and(|round| round.frozen) {
            self.report.rounds.pop();
        }
        Ok(())
    }

    fn check(&self) -> Result<()> {
        self.cancel.check()?;
        check_deadline(self.rounds_begun, self.options)
    }

    /// Dials, says `Resume`, and gives back to the dirty log what the destination lacks.
    fn take_up(&mut self, sent: super::lanes::Sent) -> Result<()> {
        let (limit, migration, cancel) = (self.options.stall, self.options.migration, self.cancel);
        let mut watch = || cancel.check().map(|()| 0);
        let mut talk = self.dial_again(MAX_BLOB_BYTES)?;
        talk.say(&Downstream::Resume { migration }, &[], limit)?;
        // It may have to make room anew first.
        let answer_limit = limit.max(self.options.prepare);
        let (answer, blob) = talk.hear("the destination to say what arrived", answer_limit, &mut watch)?;
        match understood(answer)? {
            Upstream::Anew { round } if round == self.round && self.agreed.contains(&handshake::ANEW) => {
                self.begin_anew();
            }
            Upstream::Resumed { round } if round == self.round => {
                let arrived = sparse::decode(&self.source.workload().layout, &blob)?;
                self.owed.iter_mut().zip(&arrived).for_each(|(owed, arrived)| owed.subtract(arrived));
            }
            // All of the round arrived, and only the word of it was lost.
            Upstream::Resumed { round } if round.checked_sub(1) == Some(self.round) => {
                self.owed.clear();
                self.round = round;
            }
            Upstream::Resumed { .. } => return Err(out_of_order("the round under way", "another one")),
            other => return Err(out_of_order("Resumed", other.name())),
        }
        talk.allow_blobs(0);
        // What was taken and not sent, whichever round it was meant for.
        let unsent = self.hot.abandon();
        if self.owed.is_empty() {
            self.owed = unsent;
        } else {
            self.owed.iter_mut().zip(&unsent).for_each(|(owed, unsent)| owed.union(unsent));
        }
        // Before anything else can fail: from here on only the dirty log knows what the destination lacks.
        let missing_pages: u64 = self.owed.iter().map(PageSet::count).sum();
        if missing_pages > 0 {
            self.source.redirty(&self.owed)?;
        }
        self.owed.clear();
        self.talk = talk;
        self.lanes = self.open_lanes()?.counting_from(sent);
        self.report.resumes += 1;
        self.report.peer = self.talk.link()?.peer();
        self.ticker.event(&Event::Resumed {
            round: self.round,
            missing_pages,
            sent_pages: sent.pages + sent.zero_pages,
        });
        tracing::info!(round = self.round, missing_pages, "the rounds go on over a new link");
        Ok(())
    }
}

impl Outbound<'_> {
    /// The destination's memory is new: nothing that was sent, and nothing that it began with, is there.
    fn begin_anew(&mut self) {
        self.owed = self.taken.iter().map(|taken| PageSet::full(taken.pages())).collect();
        self.there = None;
        self.report.seeded_pages = 0;
        // Rounds that sent what is gone say nothing of those to come.
        self.measured.clear();
        self.report.warnings.push(
            "the link was lost when the destination had loaded the state: all memory was sent once more"
                .into(),
        );
    }
}

/// Whether an error says no more than that the link, or the peer behind it, is gone.
fn is_lost(error: &Error) -> bool {
    matches!(error.root(), Error::Link(_) | Error::TimedOut { .. })
}

/// Whether another attempt may succeed.
fn may_pass(error: &Error) -> bool {
    is_lost(error) || matches!(error.root(), Error::Refused { code: RefuseCode::Busy, .. })
}

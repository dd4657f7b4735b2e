//! The four ways in which a migration ends for its source.

use super::lanes::Lanes;
use super::postcopy::Donation;
use super::ticker::Ticker;
use super::{Failed, Outbound};
use crate::conversation::Sender;
use crate::error::{Error, Result, clean};
use crate::link::Link;
use crate::report::{Event, Outcome, Phase, PhaseTime, PostCopyReport, Report, micros};
use crate::source::{Committed, Source};
use protocol::control::{Downstream, Upstream};
use protocol::page::PageSet;
use std::time::{Duration, Instant};

/// How long the peer may think about its last word when the link has failed.
const LAST_WORD: Duration = Duration::from_millis(500);

/// The most messages that may stand before the last word.
const MESSAGES_BEFORE: usize = 8;

/// How long telling the peer how this end decided may take.
const FAREWELL: Duration = Duration::from_secs(1);

impl<'a> Outbound<'a> {
    /// Before `Commit`: the workload goes on at the source, and the peer is told if it still listens. The workload
    /// comes first.
    pub(super) fn give_up(self, error: Error) -> Box<Failed> {
        let frozen_at = self.frozen_at;
        let (source, taken, mut ending) = self.part(Phase::Settle);
        let resumed = give_back(source, &taken);
        ending.report.downtime_us = frozen_at.map_or(0, |frozen_at| micros(frozen_at.elapsed()));
        let error = ending.last_word(error);
        if !matches!(error.root(), Error::Link(_) | Error::PeerFailed { .. } | Error::Refused { .. }) {
            ending.tell(&Downstream::Cancel { reason: clean(&error.to_string()) });
        }
        ending.failed(error, resumed)
    }

    /// Behind `Commit`, by the destination's word that it will never start: the workload goes on at the source.
    pub(super) fn take_back(self, error: Error) -> Box<Failed> {
        let (frozen_at, migration) = (self.frozen_at, self.options.migration);
        let (source, taken, mut ending) = self.part(Phase::Settle);
        let resumed = give_back(source, &taken);
        ending.report.downtime_us = frozen_at.map_or(0, |frozen_at| micros(frozen_at.elapsed()));
        ending.tell(&Downstream::Done { migration });
        ending.failed(error.during(Phase::Commit), resumed)
    }

    /// Behind `Commit`, by the destination's word that it started: the workload ends here.
    pub(super) fn hand_over(self, committed: Committed) -> Report {
        let migration = committed.migration();
        let (source, _, mut ending) = self.part(Phase::Settle);
        if let Err(error) = source.hand_over(committed) {
            ending.report.warnings.push(not_ended(&error));
        }
        ending.tell(&Downstream::Done { migration });
        ending.close(Outcome::Moved)
    }

    /// Behind `Commit`, by the destination's word that it started without its last pages: they follow, and only then the
    /// workload ends here. It left `missing` over a link that may be gone.
    pub(super) fn donate(
        self,
        committed: Committed,
        missing: Vec<PageSet>,
    ) -> std::result::Result<Report, Box<Failed>> {
        let (options, cancel) = (self.options, self.cancel);
        let migration = committed.migration();
        let begun = Instant::now();
        let peer = self.report.peer.clone();
        let (source, _, mut ending) = self.part(Phase::PostCopy);
        let donor = source.donate(committed);
        let missing = ending.talk.link().is_ok().then_some(missing);
        let mut donation = Donation {
            donor: donor.as_ref(),
            migration,
            peer,
            dial: ending.dial,
            stall: options.stall,
            ask: options.ask,
            cancel,
            ticker: &mut ending.ticker,
            report: PostCopyReport::default(),
        };
        let served = donation.serve(&mut ending.talk, missing);
        ending.report.post_copy = Some(donation.report);
        ending.report.phases.push(PhaseTime { phase: Phase::PostCopy, duration_us: micros(begun.elapsed()) });
        ending.settling_since = Instant::now();
        match served {
            Ok(completed) => {
                if let Err(error) = donor.finish(completed) {
                    ending.report.warnings.push(not_ended(&error));
                }
                ending.tell(&Downstream::Done { migration });
                Ok(ending.close(Outcome::Moved))
            }
            Err(error) => {
                // Dropping it leaves it pledged and whole.
                drop(donor);
                let report = ending.close(Outcome::InDoubt { reason: error.to_string() });
                Err(Box::new(Failed { error, report }))
            }
        }
    }

    /// Behind `Commit`, without any word: the workload stands still until an operator knows more.
    pub(super) fn leave_in_doubt(self, error: Error) -> Box<Failed> {
        let (source, _, ending) = self.part(Phase::Settle);
        source.leave_frozen();
        let error = match error {
            Error::During { error, .. } => *error,
            error => error,
        };
        let report = ending.close(Outcome::InDoubt { reason: error.to_string() });
        Box::new(Failed { error, report })
    }

    fn part(mut self, phase: Phase) -> (Box<dyn Source>, Vec<PageSet>, Ending<'a>) {
        self.ticker.event(&Event::Phase { phase });
        let ending = Ending {
            talk: self.talk,
            dial: self.dial,
            lanes: self.lanes,
            ticker: self.ticker,
            report: self.report,
            begun: self.begun,
            settling_since: Instant::now(),
        };
        (self.source, self.taken, ending)
    }
}

fn not_ended(error: &Error) -> String {
    format!("the workload runs at the destination, but what is left of it here could not be ended: {error}")
}

/// Gives back the dirty bits that were taken, and resumes. Both are tried, whatever comes of the other.
fn give_back(mut source: Box<dyn Source>, taken: &[PageSet]) -> Result<()> {
    let redirtied = if taken.iter().all(PageSet::is_empty) { Ok(()) } else { source.redirty(taken) };
    source.resume()?;
    if let Err(error) = redirtied {
        // Tracking begins anew with every attempt, and then every page counts as dirty.
        tracing::warn!(%error, "dirty bits could not be given back");
    }
    Ok(())
}

/// What is left of the engine once the source has gone its way.
struct Ending<'a> {
    talk: Sender,
    dial: &'a mut dyn FnMut() -> Result<Box<dyn Link>>,
    lanes: Lanes,
    ticker: Ticker<'a>,
    report: Report,
    begun: Instant,
    settling_since: Instant,
}

impl Ending<'_> {
    /// See [`last_word`].
    fn last_word(&mut self, error: Error) -> Error {
        last_word(&mut self.talk, error)
    }

    /// Says something that nothing depends on.
    fn tell(&mut self, message: &Downstream) {
        if let Err(error) = self.talk.say(message, &[], FAREWELL) {
            tracing::debug!(%error, message = message.name(), "the peer could not be told");
        }
    }

    fn failed(self, error: Error, resumed: Result<()>) -> Box<Failed> {
        let error = match resumed {
            Ok(()) => error,
            Err(resume) => Error::NotResumed { cause: Box::new(error), resume: Box::new(resume) },
        };
        let report = self.close(Outcome::Failed { reason: error.to_string() });
        Box::new(Failed { error, report })
    }

    /// Closes everything and completes the report.
    fn close(mut self, outcome: Outcome) -> Report {
        self.report.link = self.talk.stats();
        self.talk.hang_up(match &outcome {
            Outcome::Moved => "done",
            _ => "the migration ended at the source",
        });
        self.lanes.join();
        let mut report = self.report;
        report
            .phases
            .push(PhaseTime { phase: Phase::Settle, duration_us: micros(self.settling_since.elapsed()) });
        report.total_us = micros(self.begun.elapsed());
        report.outcome = outcome;
        self.ticker.event(&Event::Done(Box::new(report.clone())));
        report
    }
}

/// Why the peer went away, if it said so before the link failed: its word explains more than the link's.
pub(super) fn last_word(talk: &mut Sender, error: Error) -> Error {
    if !matches!(error.root(), Error::Link(_) | Error::TimedOut { .. }) {
        return error;
    }
    for _ in 0..MESSAGES_BEFORE {
        let word = match talk.hear("the peer's last word", LAST_WORD, &mut || Ok(0)) {
            Ok((Upstream::Failed { reason }, _)) => Error::PeerFailed { reason: clean(&reason) },
            Ok((Upstream::Refuse { code, reason }, _)) => Error::Refused { code, reason: clean(&reason) },
            Ok(_) => continue,
            Err(_) => return error,
        };
        return match error {
            Error::During { phase, .. } => word.during(phase),
            _ => word,
        };
    }
    error
}

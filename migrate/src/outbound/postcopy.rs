//! Behind `Started` of a workload that was started without its last pages: it runs elsewhere, and they follow.
//!
//! ```text
//!  main: hears Want, Complete ──▶ shelf ──▶ asked for, and their neighbours ══▶ (urgent stream)
//!                                      └──▶ all others, from the last fault on ══▶
//! ```
//!
//! The source is a [`Donor`] now: it never runs again, and its memory stays whole until the destination has said that
//! nothing is missing. A link that is lost is made again for as long as [`Options::ask`](super::Options::ask) says; what
//! the destination then says is missing goes back on the shelf. When that time is over, or the operator does not want to wait,
//! the donor is left as it is (frozen, pledged, whole) and `migrate recover` goes on from there.

mod widen;
mod shelf;
mod streams;

use super::commit::{Word, question};
use super::ticker::Ticker;
use crate::cancel::CancelFlag;
use crate::conversation::{Sender, out_of_order};
use crate::error::{Error, Result, clean};
use crate::link::Link;
use crate::report::{Event, PostCopyReport, micros};
use crate::source::{Completed, Donor};
use protocol::MigrationId;
use protocol::ProtocolError;
use protocol::control::{Downstream, Outcome, Upstream};
use protocol::page::{PageRun, PageSet, SpaceId};
use protocol::sparse;
use std::time::{Duration, Instant};
use streams::Streams;
pub(super) use widen::widen;

/// How long to wait before dialling again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));

/// The longest wait for one answer of a destination that is asked.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often progress is told and the operator's wishes are looked at.
const LOOK: Duration = Duration::from_millis(100);

/// Serves a workload that runs elsewhere with the memory it left here.
pub(super) struct Donation<'a, 'b> {
    pub(super) donor: &'a dyn Donor,
    pub(super) migration: MigrationId,
    pub(super) peer: String,
    pub(super) dial: &'a mut dyn FnMut() -> Result<Box<dyn Link>>,
    pub(super) stall: Duration,
    /// How long to try to make a lost link again.
    pub(super) ask: Duration,
    pub(super) cancel: &'a CancelFlag,
    pub(super) ticker: &'a mut Ticker<'b>,
    pub(super) report: PostCopyReport,
}

/// What the destination has.
enum Course {
    /// Everything: the link on which it said so, if it did just now.
    Complete,
    /// The link is lost; why.
    Lost(Error),
}

impl Donation<'_, '_> {
    /// Serves until the destination has everything. `talk` and what is missing, where the link lives; otherwise it is
    /// made first. Answers the proof, and leaves the link open in `talk` for the last word.
    pub(super) fn serve(
        &mut self,
        talk: &mut Sender,
        mut missing: Option<Vec<PageSet>>,
    ) -> Result<Completed> {
        let begun = Instant::now();
        let _answers = self.cancel.answers();
        let mut pause = PAUSE.0;
        // A link that comes and goes without a page arriving is as good as none: the time to make another goes on.
        let (mut lost_at, mut fewest, mut gained) = (begun, u64::MAX, true);
        self.report.missing_pages = missing.iter().flatten().map(PageSet::count).sum();
        let completed = loop {
            let linked_at = Instant::now();
            let lost = match missing.take() {
                Some(missing) => match self.over(talk, missing)? {
                    Course::Complete => break Completed::new(self.migration),
                    Course::Lost(error) => {
                        talk.hang_up(&clean(&error.to_string()));
                        tracing::warn!(%error, "the link to the destination was lost: dialling again");
                        self.report.lost_links += 1;
                        if gained || linked_at.elapsed() >= self.ask {
                            (lost_at, pause) = (Instant::now(), PAUSE.0);
                        }
                        error
                    }
                },
                None => match self.dial_again(talk) {
                    Ok(None) => break Completed::new(self.migration),
                    Ok(Some(again)) => {
                        let pages = again.iter().map(PageSet::count).sum();
                        gained = pages < fewest;
                        fewest = fewest.min(pages);
                        self.report.missing_pages = self.report.missing_pages.max(pages);
                        missing = Some(again);
                        continue;
                    }
                    Err(error @ (Error::InDoubt(_) | Error::PeerFailed { .. })) => return Err(error),
                    Err(error) => error,
                },
            };
            if pause >= self.ask.saturating_sub(lost_at.elapsed()) {
                return Err(self.left_alone(&lost.to_string()));
            }
            self.wait(pause)?;
            pause = (pause * 2).min(PAUSE.1);
        };
        self.report.duration_us = micros(begun.elapsed());
        Ok(completed)
    }

    /// Sends what is missing over one link.
    fn over(&mut self, talk: &mut Sender, missing: Vec<PageSet>) -> Result<Course> {
        let donor = self.donor;
        let streams = match Streams::open(&mut *talk, missing) {
            Ok(streams) => streams,
            Err(error) => return Ok(Course::Lost(error)),
        };
        let course = std::thread::scope(|scope| {
            streams.start(scope, donor);
            let course = self.hear(talk, &streams);
            if !matches!(course, Ok(Course::Complete)) {
                // Whoever writes ends with the link.
                talk.hang_up("it is given up at this end");
            }
            streams.stop();
            course
        });
        let sent = streams.report();
        self.report.asked_pages += sent.asked_pages;
        self.report.prefetched_pages += sent.prefetched_pages;
        self.report.pushed_pages += sent.pushed_pages;
        self.report.sent_bytes += sent.sent_bytes;
        course
    }

    /// Hears what the destination wants until it has everything.
    fn hear(&mut self, talk: &mut Sender, streams: &Streams) -> Result<Course> {
        loop {
            let mut told = Instant::now();
            let heard = talk.hear("the destination to have the missing pages", self.stall, &mut || {
                if told.elapsed() >= LOOK {
                    told = Instant::now();
                    let report = streams.report();
                    self.ticker.event(&Event::Donating { missing_pages: streams.left_pages(), report });
                }
                self.check_cancelled(streams.left_pages())?;
                streams.check()?;
                Ok(streams.report().sent_bytes)
            });
            match heard {
                Ok((Upstream::Want { space, page }, _)) => {
                    let run = PageRun { space: SpaceId(space), first: page, count: 1 };
                    if let Err(error) = self.donor.layout().check(&run) {
                        return Ok(Course::Lost(error.into()));
                    }
                    streams.want(run.space, page);
                }
                Ok((Upstream::Complete { migration }, _)) if migration == self.migration => {
                    return Ok(Course::Complete);
                }
                Ok((Upstream::Failed { reason }, _)) => return Err(self.gone(&clean(&reason))),
                Ok((other, _)) => return Ok(Course::Lost(out_of_order("Want or Complete", other.name()))),
                Err(error @ (Error::InDoubt(_) | Error::Host(_) | Error::Workload(_))) => return Err(error),
                Err(error) => return Ok(Course::Lost(error)),
            }
        }
    }

    /// Dials, and asks what is missing; `None`: nothing.
    fn dial_again(&mut self, talk: &mut Sender) -> Result<Option<Vec<PageSet>>> {
        let (word, again) = question((self.dial)()?, self.migration, PATIENCE)?;
        *talk = again;
        match word {
            Word::Incomplete => {}
            Word::Outcome(Outcome::Started) => return Ok(None),
            Word::Outcome(Outcome::Discarded) => {
                return Err(self.gone("the destination says that it never started it"));
            }
            Word::Outcome(Outcome::Unknown) => {
                return Err(self.left_alone("the destination does not know this migration now"));
            }
        }
        let migration = self.migration;
        talk.say(&Downstream::Recover { migration }, &[], self.stall)?;
        match talk.hear("the destination to say what is missing", self.stall, &mut || Ok(0))? {
            (Upstream::Missing { pages }, sets) => {
                let missing = sparse::decode(self.donor.layout(), &sets)?;
                let found: u64 = missing.iter().map(PageSet::count).sum();
                if found != pages {
                    return Err(
                        ProtocolError::Value { what: "the number of missing pages", found: pages }.into()
                    );
                }
                Ok(Some(missing))
            }
            (other, _) => Err(out_of_order("Missing", other.name())),
        }
    }

    fn wait(&mut self, pause: Duration) -> Result<()> {
        let until = Instant::now() + pause;
        while Instant::now() < until {
            self.check_cancelled(self.report.missing_pages)?;
            std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
        }
        Ok(())
    }

    /// The first wish to stop is answered with what it would mean, the second one is followed.
    fn check_cancelled(&mut self, left_pages: u64) -> Result<()> {
        if !self.cancel.take() {
            return Ok(());
        }
        if self.ticker.warned() {
            return Err(self.left_alone("it was interrupted"));
        }
        tracing::warn!(
            "{} runs at {} already and still needs {left_pages} pages of the memory here, so this goes on; interrupted \
             once more, it leaves the rest to migrate recover {0}",
            self.donor.name(),
            self.peer
        );
        Ok(())
    }

    fn left_alone(&self, why: &str) -> Error {
        let (name, peer) = (self.donor.name(), &self.peer);
        Error::InDoubt(format!(
            "{name} runs at {peer} and still needs pages of the memory here ({why}). What it touches of them it waits for, \
             and nothing is lost: go on with `migrate recover {name}`"
        ))
    }

    fn gone(&self, why: &str) -> Error {
        let (name, peer) = (self.donor.name(), &self.peer);
        Error::InDoubt(format!(
            "{name} was started at {peer} and ended there before all of its memory had followed ({why}). Here it stands still as \
             it was when it was handed over: go back to that with `migrate recover {name} --resume`, or let it go with \
             `migrate recover {name} --discard`"
        ))
    }
}

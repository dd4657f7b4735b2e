//! The one step that cannot be taken back, and what is known behind it.

use super::Outbound;
use super::ticker::Ticker;
use crate::cancel::CancelFlag;
use crate::conversation::{Sender, out_of_order};
use crate::error::{Error, Result, clean};
use crate::link::Link;
use crate::report::{Report, micros};
use crate::source::Committed;
use protocol::MigrationId;
use protocol::control::{self, Downstream, MAX_BLOB_BYTES, Upstream};
use protocol::handshake::Hello;
use std::time::{Duration, Instant};

/// The longest wait for one answer of a destination that is asked; then it is asked again.
const PATIENCE: Duration = Duration::from_secs(5);

/// How often it is looked whether somebody wants to stop.
const LOOK: Duration = Duration::from_millis(50);

/// How long to wait before asking again, at first and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// The destination's word.
pub(super) enum Answer {
    /// It runs there.
    Started(Committed),
    /// It will never run there; why.
    Discarded(Error),
}

impl Outbound<'_> {
    /// Sends `Commit` and reads what comes of it. An error says only that nothing is known.
    pub(super) fn commit(&mut self) -> Result<Answer> {
        let (migration, stall) = (self.options.migration, self.options.stall);
        self.talk.say(&Downstream::Commit { migration }, &[], stall)?;
        let Self { talk, cancel, ticker, report, .. } = self;
        let mut watch = || heed(cancel, ticker, report).map(|()| 0);
        match talk.hear("the destination to start", stall, &mut watch)?.0 {
            Upstream::Started { migration: started } if started == migration => Ok(self.started()),
            Upstream::Failed { reason } => {
                Ok(Answer::Discarded(Error::PeerFailed { reason: clean(&reason) }))
            }
            other => Err(out_of_order("Started", other.name())),
        }
    }

    /// Asks over new connections until there is an answer. `lost` is why it must.
    pub(super) fn ask(&mut self, lost: Error) -> Result<Answer> {
        if matches!(lost.root(), Error::InDoubt(_)) {
            // It is wanted no more.
            return Err(lost);
        }
        // Only once this end is closed does the destination stop waiting on it.
        self.talk.hang_up("no answer to Commit");
        let (begun, mut pause, mut lost) = (Instant::now(), PAUSE.0, lost);
        loop {
            let left = self.options.ask.saturating_sub(begun.elapsed());
            match self.ask_once(left.min(PATIENCE)) {
                Ok(Word::Incomplete) => return Ok(self.started_incomplete()),
                Ok(Word::Outcome(control::Outcome::Started)) => {
                    // Whatever was to follow has: nothing is missing there.
                    self.missing = None;
                    return Ok(self.started());
                }
                Ok(Word::Outcome(control::Outcome::Discarded)) => {
                    let reason = format!("it discarded the workload because the link failed ({lost})");
                    return Ok(Answer::Discarded(Error::PeerFailed { reason }));
                }
                Ok(Word::Outcome(control::Outcome::Unknown)) => {
                    let why = "the destination does not know this migration; it may have been restarted";
                    return Err(self.in_doubt(why));
                }
                Err(error) => lost = error,
            }
            tracing::warn!(error = %lost, "no answer yet");
            if pause >= self.options.ask.saturating_sub(begun.elapsed()) {
                return Err(self.in_doubt(&lost.to_string()));
            }
            let until = Instant::now() + pause;
            while Instant::now() < until {
                heed(self.cancel, &mut self.ticker, &self.report)?;
                std::thread::sleep(LOOK.min(until.saturating_duration_since(Instant::now())));
            }
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    fn ask_once(&mut self, limit: Duration) -> Result<Word> {
        let (word, talk) = question((self.dial)()?, self.options.migration, limit)?;
        self.talk = talk;
        Ok(word)
    }

    /// The only place where the proof is made: the destination's word was read right before.
    fn started(&mut self) -> Answer {
        let downtime = self.frozen_at.map_or(Duration::ZERO, |frozen_at| frozen_at.elapsed());
        self.report.downtime_us = micros(downtime);
        self.learn_fixed_part(downtime);
        Answer::Started(Committed::new(self.options.migration))
    }

    /// It runs, and its pages are to follow over a connection that is made for them.
    fn started_incomplete(&mut self) -> Answer {
        self.talk.hang_up("asked");
        self.started()
    }

    fn in_doubt(&self, why: &str) -> Error {
        in_doubt(&self.report, why)
    }
}

fn in_doubt(report: &Report, why: &str) -> Error {
    let (name, peer) = (&report.workload, &report.peer);
    Error::InDoubt(format!(
        "{name} was committed to {peer} and no answer came back ({why}). It stands still here and nothing is \
         lost: find out whether it runs at {peer}, then settle it with `migrate recover {name}`"
    ))
}

/// Behind `Commit` the first wish to stop is answered with what it would mean, the second one is followed.
fn heed(cancel: &CancelFlag, ticker: &mut Ticker<'_>, report: &Report) -> Result<()> {
    if !cancel.take() {
        return Ok(());
    }
    if ticker.warned() {
        return Err(in_doubt(report, "it was interrupted"));
    }
    let (name, peer) = (&report.workload, &report.peer);
    tracing::warn!(
        "{name} was committed to {peer} and may run there already, so the answer is waited for; interrupted once more this ends, \
         {name} stands still here, and migrate recover {name} finds out"
    );
    Ok(())
}

/// Asks what became of a migration, for an operator who settles a source that was left in doubt. Each answer is waited
/// for no longer than `limit`.
///
/// # Errors
/// `Link`, `TimedOut`, `Refused`, or `Protocol`: nothing is known then.
pub fn ask(link: Box<dyn Link>, migration: MigrationId, limit: Duration) -> Result<Word> {
    let (word, mut talk) = question(link, migration, limit)?;
    if !matches!(word, Word::Incomplete | Word::Outcome(control::Outcome::Unknown)) {
        talk.say(&Downstream::Done { migration }, &[], limit)?;
    }
    talk.hang_up("answered");
    Ok(word)
}

/// What a destination says of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Word {
    /// How it ended.
    Outcome(control::Outcome),
    /// It runs there and misses pages that only the source has.
    Incomplete,
}

pub(super) fn question(
    link: Box<dyn Link>,
    migration: MigrationId,
    limit: Duration,
) -> Result<(Word, Sender)> {
    let nothing = &mut || Ok(0);
    // Which pages are missing may come over the same connection.
    let mut talk = Sender::new(link, MAX_BLOB_BYTES);
    talk.introduce(&Downstream::Hello(Hello::ours()), limit)?;
    talk.preamble(limit, nothing)?;
    match talk.hear("the destination's greeting", limit, nothing)?.0 {
        Upstream::Hello(hello) => hello.agree()?,
        other => return Err(out_of_order("Hello", other.name())),
    };
    talk.say(&Downstream::Ask { migration }, &[], limit)?;
    match talk.hear("the destination to say what became of the workload", limit, nothing)?.0 {
        Upstream::Outcome { migration: of, outcome } if of == migration => Ok((Word::Outcome(outcome), talk)),
        Upstream::Incomplete { migration: of } if of == migration => Ok((Word::Incomplete, talk)),
        Upstream::Refuse { code, reason } => Err(Error::Refused { code, reason: clean(&reason) }),
        other => Err(out_of_order("Outcome", other.name())),
    }
}

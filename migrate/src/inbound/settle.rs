//! From `Ready` on: the decision, and telling it to a sender that may have lost its link.

use super::desk::Visitors;
use super::visitor::{Visitor, Wish, tell};
use super::{Inbound, Options, Order};
use crate::conversation::out_of_order;
use crate::destination::Destination;
use crate::error::{Error, Result, clean};
use crate::report::{ArrivalReport, Event, Phase, micros};
use protocol::MigrationId;
use protocol::control::{Downstream, Outcome, RefuseCode, Upstream};
use std::time::{Duration, Instant};

/// How long the link may be silent behind `Ready` before new connections are looked at too. A healthy handshake
/// takes a few milliseconds.
const LOOK: Duration = Duration::from_millis(100);

/// The most messages that may stand before a sender's last word.
const MESSAGES_BEFORE: usize = 8;

/// What a sender is told that wants to go back where that cannot be.
pub(super) const LOADED: &str =
    "it had loaded the state when the link was lost, and begins anew only with a new offer";

/// What is heard behind `Ready`.
pub(super) enum Word {
    /// A message.
    Said(Downstream),
    /// The sender wants to go back to its rounds.
    Resumes(Box<Visitor>),
}

impl Inbound<'_> {
    /// Loaded: waits for the word that decides. Only `Commit` of this migration starts it; every error means that it
    /// is discarded.
    pub(super) fn commit(&mut self) -> Result<Order> {
        let ours = self.report.migration;
        let Options { linger, forget, keep, .. } = *self.options;
        let without_link = if self.comes_back_when_loaded() { keep.max(forget) } else { forget };
        let (what, until, mut told) = ("Commit, or a question about it", Instant::now() + linger, false);
        let look = |me: &mut Self| {
            if me.talk.link().is_ok() {
                return Ok(());
            }
            if me.comes_back_when_loaded() && !std::mem::replace(&mut told, true) {
                let reason = "it was lost before Commit arrived".into();
                me.observer.event(&Event::LinkLost { reason, wait_us: micros(without_link) });
            }
            me.may_be_given_up()
        };
        match self.next_word(what, until, without_link, look)? {
            Word::Said(Downstream::Commit { migration }) if Some(migration) == ours => Ok(Order::Start),
            Word::Said(Downstream::Ask { migration }) if Some(migration) == ours => Ok(Order::Answer),
            // It has not committed.
            Word::Resumes(visitor) if self.comes_back_when_loaded() => Ok(Order::BeginAnew(visitor)),
            Word::Resumes(visitor) => {
                visitor.refuse(RefuseCode::NoSuchMigration, LOADED);
                Err(Error::PeerFailed { reason: "it went back to its rounds".into() })
            }
            Word::Said(Downstream::Cancel { reason }) => Err(Error::PeerFailed { reason: clean(&reason) }),
            Word::Said(other) => Err(out_of_order("Commit", other.name())),
        }
    }

    /// Committed: the workload runs here, or it never will.
    pub(super) fn start(&mut self, destination: Box<dyn Destination>, migration: MigrationId) -> Result<()> {
        if self.missing.is_some() {
            return self.start_incomplete(destination, migration);
        }
        let started = destination.start(migration).map_err(|error| error.during(Phase::Commit));
        match &started {
            Ok(name) => {
                self.report.workload.clone_from(name);
                self.desk.ledger().record(migration, Outcome::Started);
                tell(&mut self.talk, &Upstream::Started { migration });
                self.settle(self.options.linger);
            }
            Err(error) => self.never_starts(migration, error),
        }
        started.map(drop)
    }

    /// It could not be started, and never will be.
    pub(super) fn never_starts(&mut self, migration: MigrationId, error: &Error) {
        self.desk.ledger().record(migration, Outcome::Discarded);
        tell(&mut self.talk, &Upstream::Failed { reason: clean(&error.to_string()) });
        self.settle(self.options.forget);
    }

    /// Loaded, and it shall not start: first it cannot any more, then the sender is told so.
    pub(super) fn discard(
        &mut self,
        destination: Box<dyn Destination>,
        migration: MigrationId,
        error: Error,
        word: &Upstream,
    ) -> Error {
        destination.discard();
        self.desk.ledger().record(migration, Outcome::Discarded);
        // A sender that cancels has resumed already, and will not ask.
        if !matches!(error.root(), Error::PeerFailed { .. }) {
            tell(&mut self.talk, word);
            self.settle(self.options.forget);
        }
        error
    }

    /// Before `Ready`: the sender is told if it still listens, and nothing is left.
    pub(super) fn fail(&mut self, destination: Box<dyn Destination>, error: Error) -> Error {
        let error = self.last_word(error);
        if !matches!(error.root(), Error::Link(_) | Error::PeerFailed { .. } | Error::Refused { .. }) {
            tell(&mut self.talk, &Upstream::Failed { reason: clean(&error.to_string()) });
        }
        self.talk.hang_up("the migration failed");
        // Nothing may write to the memory that is about to go.
        self.streams.join();
        destination.discard();
        match self.report.migration {
            // A workload that was refused may be somebody else's, or here already: nothing is known of it.
            Some(migration) if !matches!(error.root(), Error::Refused { .. }) => {
                self.desk.ledger().record(migration, Outcome::Discarded);
            }
            _ => {}
        }
        error
    }

    /// The outcome is known here: sees to it that the sender knows it too, for as long as it may be without a link.
    pub(super) fn settle(&mut self, without_link: Duration) {
        let until = Instant::now() + self.options.linger;
        let outcome = self.report.migration.map(|migration| self.desk.ledger().outcome(migration));
        let started = outcome == Some(Outcome::Started);
        let _answers = started.then(|| self.cancel.answers());
        let mut warned = false;
        loop {
            let look = |me: &mut Self| if started { me.heed(&mut warned, until) } else { Ok(()) };
            match self.next_word("the sender to know the outcome", until, without_link, look) {
                Ok(Word::Said(Downstream::Done { .. })) => return,
                Ok(Word::Said(Downstream::Ask { migration })) => {
                    let outcome = self.desk.ledger().outcome(migration);
                    tell(&mut self.talk, &Upstream::Outcome { migration, outcome });
                }
                Ok(Word::Said(other)) => tracing::warn!(message = other.name(), "not expected any more"),
                Ok(Word::Resumes(visitor)) => visitor.refuse(RefuseCode::NoSuchMigration, LOADED),
                Err(Error::Protocol(error)) => {
                    tracing::warn!(%error, "the sender's words make no sense");
                    self.talk.hang_up("not understood");
                }
                Err(error) => {
                    tracing::warn!(%error, "the sender may not know the outcome");
                    return;
                }
            }
        }
    }

    /// It runs here. The first wish to stop is answered with what it would mean, the second one is followed.
    fn heed(&self, warned: &mut bool, until: Instant) -> Result<()> {
        if !self.cancel.take() {
            return Ok(());
        }
        let name = &self.report.workload;
        if std::mem::replace(warned, true) {
            return Err(Error::Interrupted(format!(
                "{name} runs here; migrate recover there asks whoever receives here next"
            )));
        }
        let left = until.saturating_duration_since(Instant::now()).as_secs();
        tracing::warn!(
            "{name} runs here already, and its sender does not know it yet: it is waited for up to {left} s; interrupted once more \
             this ends, {name} runs on, and at the source migrate recover {name} asks the next migrate receive"
        );
        Ok(())
    }

    /// Loaded, and without a link: no `Commit` can come any more, so whoever wants it ends the wait.
    fn may_be_given_up(&mut self) -> Result<()> {
        self.cancel.reopen();
        self.cancel.check()?;
        if self.visitors.as_ref().is_some_and(Visitors::is_superseded) {
            return Err(Error::Link("its sender has begun anew".into()));
        }
        Ok(())
    }

    /// The next message about this migration, on this link or, if it is silent or lost, on a new one that takes its
    /// place; `without_link` is how long a lost one is missed, unless `look` ends the wait.
    fn next_word(
        &mut self,
        what: &'static str,
        until: Instant,
        without_link: Duration,
        mut look: impl FnMut(&mut Self) -> Result<()>,
    ) -> Result<Word> {
        let begun = Instant::now();
        let mut linked = begun;
        loop {
            match self.talk.hear(what, LOOK, &mut || Ok(0)) {
                Ok((message, _)) => return Ok(Word::Said(message)),
                Err(Error::TimedOut { .. }) => {}
                Err(Error::Link(_)) => self.talk.hang_up("lost"),
                Err(error) => return Err(error),
            }
            look(self)?;
            let now = Instant::now();
            let left = if self.talk.link().is_ok() {
                linked = now;
                until.saturating_duration_since(now)
            } else {
                without_link.saturating_sub(now - linked)
            };
            if left.is_zero() {
                return Err(Error::TimedOut { what, after: begun.elapsed() });
            }
            let wait = if self.talk.link().is_ok() { Duration::ZERO } else { left.min(LOOK) };
            match self.visitors.as_ref().and_then(|visitors| visitors.next(wait)) {
                Some(visitor) => {
                    if let Some(asked) = self.visit(visitor) {
                        return Ok(asked);
                    }
                }
                // Nobody else can come. As long as the link lives, the sender itself still can.
                None if self.talk.link().is_err() => self.desk.check()?,
                None => {}
            }
        }
    }

    /// A new connection of the peer that made the offer. If it asks about it, it takes the place of the old one.
    pub(super) fn visit(&mut self, visitor: Visitor) -> Option<Word> {
        match visitor.wish {
            Wish::Ask(migration) => {
                self.talk.hang_up("taken up on another connection");
                self.talk = visitor.talk;
                Some(Word::Said(Downstream::Ask { migration }))
            }
            Wish::Resume(_) => Some(Word::Resumes(Box::new(visitor))),
            _ => {
                let reason = "that migration is past its rounds there";
                visitor.refuse(RefuseCode::NoSuchMigration, reason);
                None
            }
        }
    }

    /// Why the sender went away, if it said so before the link failed: its word explains more than the link's.
    pub(super) fn last_word(&mut self, error: Error) -> Error {
        if !matches!(error.root(), Error::Link(_)) {
            return error;
        }
        for _ in 0..MESSAGES_BEFORE {
            match self.talk.hear("the sender's last word", LOOK, &mut || Ok(0)) {
                Ok((Downstream::Cancel { reason }, _)) => {
                    let word = Error::PeerFailed { reason: clean(&reason) };
                    return match error {
                        Error::During { phase, .. } => word.during(phase),
                        _ => word,
                    };
                }
                Ok(_) => {}
                Err(_) => break,
            }
        }
        error
    }

    /// Closes everything and completes the report.
    pub(super) fn end(mut self, result: Result<()>, begun: Instant) -> Result<ArrivalReport> {
        self.talk.hang_up(if result.is_ok() { "done" } else { "the migration failed" });
        self.streams.join();
        // Who asks from now on is answered from the ledger.
        self.visitors = None;
        let mut report = self.report;
        report.received_bytes = self.received_before_bytes + self.streams.bytes();
        report.total_us = micros(begun.elapsed());
        report.error = result.as_ref().err().map(ToString::to_string);
        self.observer.event(&Event::Arrived(Box::new(report.clone())));
        result.map(|()| report)
    }
}

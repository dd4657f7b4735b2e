//! From `Ready` on: the decision, and telling it to a sender that may have lost its link.

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

impl Inbound<'_> {
    /// Loaded: waits for the word that decides. Only `Commit` of this migration starts it; every error means that it
    /// is discarded.
    pub(super) fn commit(&mut self) -> Result<Order> {
        let ours = self.report.migration;
        let Options { linger, forget, .. } = *self.options;
        match self.next_word("Commit, or a question about it", Instant::now() + linger, forget)? {
            Downstream::Commit { migration } if Some(migration) == ours => Ok(Order::Start),
            Downstream::Ask { migration } if Some(migration) == ours => Ok(Order::Answer),
            // A sender that has not committed may go back to its rounds; what is loaded here cannot.
            Downstream::Resume { .. } => {
                Err(Error::PeerFailed { reason: "it went back to its rounds".into() })
            }
            Downstream::Cancel { reason } => Err(Error::PeerFailed { reason: clean(&reason) }),
            other => Err(out_of_order("Commit", other.name())),
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
        loop {
            match self.next_word("the sender to know the outcome", until, without_link) {
                Ok(Downstream::Done { .. }) => return,
                Ok(Downstream::Ask { migration }) => {
                    let outcome = self.desk.ledger().outcome(migration);
                    tell(&mut self.talk, &Upstream::Outcome { migration, outcome });
                }
                Ok(other) => tracing::warn!(message = other.name(), "not expected any more"),
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

    /// The next message about this migration, on this link or, if it is silent or lost, on a new one that takes its
    /// place; `without_link` is how long a lost one is missed.
    fn next_word(
        &mut self,
        what: &'static str,
        until: Instant,
        without_link: Duration,
    ) -> Result<Downstream> {
        let begun = Instant::now();
        let mut linked = begun;
        loop {
            match self.talk.hear(what, LOOK, &mut || Ok(0)) {
                Ok((message, _)) => return Ok(message),
                Err(Error::TimedOut { .. }) => {}
                Err(Error::Link(_)) => self.talk.hang_up("lost"),
                Err(error) => return Err(error),
            }
            let now = Instant::now();
            if self.talk.link().is_ok() {
                linked = now;
            }
            let left = until.saturating_duration_since(now).min(without_link.saturating_sub(now - linked));
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
    pub(super) fn visit(&mut self, visitor: Visitor) -> Option<Downstream> {
        match visitor.wish {
            Wish::Ask(migration) => {
                self.talk.hang_up("taken up on another connection");
                self.talk = visitor.talk;
                Some(Downstream::Ask { migration })
            }
            Wish::Resume(migration) => {
                let reason =
                    "it had loaded the state when the link was lost, and begins anew only with a new offer";
                visitor.refuse(RefuseCode::NoSuchMigration, reason);
                Some(Downstream::Resume { migration })
            }
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

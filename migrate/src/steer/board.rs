//! What is known of a running migration at any moment, for whoever looks.

use super::eta::{Underway, eta_s};
use crate::cancel::CancelFlag;
use crate::controls::Controls;
use crate::converge::Decision;
use crate::error::clean;
use crate::report::{self, ArrivalReport, Event, Observer, Phase, Progress, Report, RoundReport, micros};
use protocol::MigrationId;
use protocol::page::PAGE_SIZE;
use protocol::steer::{End, Limits, Outcome, Status};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Which migration it is about.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Which end this process is.
    pub end: End,
    /// The migration.
    pub migration: MigrationId,
    /// The workload's name here.
    pub workload: String,
    /// Who is at the other end.
    pub peer: String,
    /// The workload's memory in bytes.
    pub memory_bytes: u64,
}

/// The numbers of one migration. A clone is another handle on the same ones.
#[derive(Debug, Clone)]
pub struct Board(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    ended: Condvar,
    cancel: CancelFlag,
    /// Only the source has any.
    controls: Option<Controls>,
}

#[derive(Debug)]
struct Known {
    subject: Subject,
    begun: Instant,
    phase: &'static str,
    outcome: Option<(Outcome, Option<String>)>,
    round: u32,
    round_begun: Instant,
    dirty_pages: u64,
    done_pages: u64,
    moved_bytes: u64,
    rate_bytes_per_s: u64,
    dirty_pages_per_s: Option<f64>,
    predicted_downtime_us: Option<u64>,
    throttle_percent: u8,
    elapsed: Option<Duration>,
}

impl Board {
    /// A migration that begins now.
    pub fn new(subject: Subject, cancel: CancelFlag, controls: Option<Controls>) -> Self {
        let now = Instant::now();
        let known = Known {
            subject,
            begun: now,
            phase: Phase::Greet.name(),
            outcome: None,
            round: 0,
            round_begun: now,
            dirty_pages: 0,
            done_pages: 0,
            moved_bytes: 0,
            rate_bytes_per_s: 0,
            dirty_pages_per_s: None,
            predicted_downtime_us: None,
            throttle_percent: 0,
            elapsed: None,
        };
        Self(Arc::new(Shared { known: Mutex::new(known), ended: Condvar::new(), cancel, controls }))
    }

    /// What stops it.
    pub fn cancel(&self) -> &CancelFlag {
        &self.0.cancel
    }

    /// What bounds it; nothing does at the destination.
    pub fn controls(&self) -> Option<&Controls> {
        self.0.controls.as_ref()
    }

    /// How it is.
    pub fn status(&self) -> Status {
        let known = self.lock();
        let (outcome, reason) = known.outcome.clone().unzip();
        let elapsed = known.elapsed.unwrap_or_else(|| known.begun.elapsed());
        Status {
            software: concat!("migrate ", env!("CARGO_PKG_VERSION")).into(),
            pid: std::process::id(),
            end: known.subject.end,
            migration: known.subject.migration,
            workload: known.subject.workload.clone(),
            peer: clean(&known.subject.peer),
            phase: known.phase.into(),
            cancellable: outcome.is_none() && self.0.cancel.is_open(),
            outcome,
            reason: reason.flatten(),
            elapsed_us: micros(elapsed),
            memory_bytes: known.subject.memory_bytes,
            round: known.round,
            dirty_pages: known.dirty_pages,
            done_pages: known.done_pages,
            moved_bytes: known.moved_bytes,
            rate_bytes_per_s: known.rate_bytes_per_s,
            dirty_bytes_per_s: known.dirty_pages_per_s.map(|pages| (pages * PAGE_SIZE as f64) as u64),
            predicted_downtime_us: known.predicted_downtime_us,
            throttle_percent: Some(known.throttle_percent).filter(|percent| *percent > 0),
            eta_us: known.eta_us(),
            limits: self.0.controls.as_ref().map_or_else(Limits::default, Controls::in_force),
        }
    }

    /// How it is once it has ended, or when `limit` is over.
    pub fn status_at_end(&self, limit: Duration) -> Status {
        let until = Instant::now() + limit;
        let mut known = self.lock();
        while known.outcome.is_none() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            known = self.0.ended.wait_timeout(known, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(known);
        self.status()
    }

    /// Something happened.
    pub fn note(&self, event: &Event) {
        let mut known = self.lock();
        match event {
            Event::Phase { phase } => known.phase = phase.name(),
            Event::RoundBegin { round, dirty_pages } => {
                (known.round, known.dirty_pages, known.done_pages) = (*round, *dirty_pages, 0);
                known.round_begun = Instant::now();
            }
            Event::Progress(Progress { round, done_pages, sent_bytes, rate_bytes_per_s, .. }) => {
                (known.round, known.done_pages) = (*round, *done_pages);
                (known.moved_bytes, known.rate_bytes_per_s) = (*sent_bytes, *rate_bytes_per_s);
            }
            Event::RoundEnd(round) => known.round_is_over(round),
            Event::Decided(entry) => {
                if let Decision::Throttle { percent, .. } = entry.decided {
                    known.throttle_percent = percent;
                }
            }
            Event::Receiving { round, received_bytes, rate_bytes_per_s } => {
                (known.round, known.moved_bytes) = (*round, *received_bytes);
                known.rate_bytes_per_s = *rate_bytes_per_s;
            }
            Event::Donating { missing_pages, report } => {
                known.done_pages = known.dirty_pages.saturating_sub(*missing_pages);
                known.moved_bytes = report.sent_bytes;
            }
            Event::Following { missing_pages } => {
                known.dirty_pages = known.dirty_pages.max(*missing_pages);
                known.done_pages = known.dirty_pages - missing_pages;
            }
            Event::LinkLost { .. } => known.rate_bytes_per_s = 0,
            Event::Resumed { round, .. } | Event::CameBack { round, .. } => known.round = *round,
            Event::Done(report) => known.left(report),
            Event::Arrived(report) => known.arrived(report),
            // No move: a board is for those.
            Event::Checkpointed(_) => {}
        }
        if known.outcome.is_some() {
            let elapsed = known.begun.elapsed();
            known.elapsed.get_or_insert(elapsed);
            self.0.ended.notify_all();
        }
    }

    /// Whoever made it goes: if nobody said how it ended, it failed.
    pub fn close(&self) {
        let mut known = self.lock();
        known.outcome.get_or_insert((Outcome::Failed, Some("it ended before it began".into())));
        self.0.ended.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Known {
    fn round_is_over(&mut self, round: &RoundReport) {
        self.done_pages = self.dirty_pages;
        self.rate_bytes_per_s = round.rate_bytes_per_s;
        if !round.frozen {
            self.predicted_downtime_us = Some(round.predicted_downtime_us);
            let took_s = round.duration_us as f64 / 1e6;
            self.dirty_pages_per_s = (took_s > 0.0).then(|| round.remaining_pages as f64 / took_s);
        }
    }

    fn left(&mut self, report: &Report) {
        self.moved_bytes = report.sent_bytes;
        let (outcome, reason) = match &report.outcome {
            report::Outcome::Moved => (Outcome::Moved, None),
            report::Outcome::Failed { reason } => (Outcome::Failed, Some(reason)),
            report::Outcome::InDoubt { reason } => (Outcome::InDoubt, Some(reason)),
            report::Outcome::Underway => return,
        };
        self.outcome = Some((outcome, reason.map(|reason| clean(reason))));
    }

    fn arrived(&mut self, report: &ArrivalReport) {
        self.moved_bytes = report.received_bytes;
        self.outcome = Some(match &report.error {
            None => (Outcome::Moved, None),
            Some(error) => (Outcome::Failed, Some(clean(error))),
        });
    }

    fn eta_us(&self) -> Option<u64> {
        if self.outcome.is_some() || self.subject.end == End::Receive {
            return None;
        }
        if self.phase != Phase::Rounds.name() {
            // Before the rounds nothing is known; behind them the forecast is what is left.
            return self.predicted_downtime_us;
        }
        let seconds = eta_s(Underway {
            round_s: self.round_begun.elapsed().as_secs_f64(),
            done_pages: self.done_pages,
            left_pages: self.dirty_pages.saturating_sub(self.done_pages),
            dirty_pages_per_s: self.dirty_pages_per_s,
        })?;
        Duration::try_from_secs_f64(seconds).ok().map(micros)
    }
}

/// An observer that also writes on a board.
pub struct Watched<'a> {
    /// The board.
    pub board: Board,
    /// Who is told as well.
    pub inner: &'a mut dyn Observer,
}

impl Observer for Watched<'_> {
    fn event(&mut self, event: &Event) {
        self.board.note(event);
        self.inner.event(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::converge;

    fn board() -> Board {
        let subject = Subject {
            end: End::Send,
            migration: MigrationId(7),
            workload: "web".into(),
            peer: "b\u{1b}[31m".into(),
            memory_bytes: 1 << 30,
        };
        Board::new(subject, CancelFlag::default(), Some(Controls::new(converge::Limits::default())))
    }

    #[test]
    fn what_the_engine_says_stands_on_the_board() {
        let board = board();
        assert_eq!(board.status().peer, "b [31m", "words of the peer are cleaned");
        board.note(&Event::Phase { phase: Phase::Rounds });
        board.note(&Event::RoundBegin { round: 0, dirty_pages: 100 });
        board.note(&Event::RoundEnd(RoundReport {
            duration_us: 500_000,
            remaining_pages: 50,
            predicted_downtime_us: 9_000,
            ..RoundReport::default()
        }));
        board.note(&Event::RoundBegin { round: 1, dirty_pages: 50 });
        let status = board.status();
        assert_eq!((status.phase.as_str(), status.round, status.dirty_pages), ("rounds", 1, 50));
        assert_eq!(status.dirty_bytes_per_s, Some(100 * PAGE_SIZE as u64));
        assert_eq!(status.predicted_downtime_us, Some(9_000));
        assert_eq!(status.limits.downtime_us, Some(50_000));
        assert!(status.cancellable && status.outcome.is_none());
        board.cancel().pass().unwrap();
        assert!(!board.status().cancellable);
    }

    #[test]
    fn whoever_waits_is_told_of_the_end() {
        let board = board();
        let begun = Instant::now();
        assert_eq!(board.status_at_end(Duration::from_millis(10)).outcome, None);
        assert!(begun.elapsed() >= Duration::from_millis(10));
        let waiter = std::thread::spawn({
            let board = board.clone();
            move || board.status_at_end(Duration::from_secs(30))
        });
        board.close();
        let status = waiter.join().unwrap();
        assert_eq!(status.outcome, Some(Outcome::Failed));
        assert!(status.reason.is_some() && status.eta_us.is_none() && !status.cancellable);
    }
}

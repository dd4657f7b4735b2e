//! What is known of a series of checkpoints at any moment, for whoever looks.

use super::server::Steered;
use crate::cancel::CancelFlag;
use crate::checkpoint::CheckpointReport;
use crate::error::{Error, clean};
use crate::report::{Event, Observer, micros};
use crate::vault::now_unix_ms;
use protocol::steer::{Answer, ErrorCode, LastCheckpoint, MAX_AWAIT_MS, Order, Series};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The phase between two checkpoints.
const WAITING: &str = "waiting";

/// The numbers of one series. A clone is another handle on the same ones.
#[derive(Debug, Clone)]
pub struct SeriesBoard(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    known: Mutex<Known>,
    ended: Condvar,
    cancel: CancelFlag,
    begun: Instant,
}

#[derive(Debug)]
struct Known {
    series: Series,
    next: Option<Instant>,
}

impl SeriesBoard {
    /// A series that begins now, of this workload into this store; `cancel` ends it.
    pub fn new(workload: &str, store: String, cancel: CancelFlag) -> Self {
        let series = Series {
            software: concat!("migrate ", env!("CARGO_PKG_VERSION")).into(),
            pid: std::process::id(),
            workload: workload.into(),
            store,
            phase: WAITING.into(),
            ended: false,
            elapsed_us: 0,
            interval_us: None,
            next_us: None,
            taken: 0,
            failed: 0,
            missed: 0,
            stored_bytes: 0,
            last: None,
            failure: None,
        };
        let known = Mutex::new(Known { series, next: None });
        Self(Arc::new(Shared { known, ended: Condvar::new(), cancel, begun: Instant::now() }))
    }

    /// How it is.
    pub fn series(&self) -> Series {
        let known = self.lock();
        let left = |next: Instant| micros(next.saturating_duration_since(Instant::now()));
        Series {
            elapsed_us: micros(self.0.begun.elapsed()),
            next_us: known.next.map(left),
            ..known.series.clone()
        }
    }

    /// How it is once it has ended, or when `limit` is over.
    pub fn series_at_end(&self, limit: Duration) -> Series {
        let waits = |known: &mut Known| !known.series.ended;
        // Poisoned or not, and whether the time was over: what it looked like is asked for below.
        drop(self.0.ended.wait_timeout_while(self.lock(), limit, waits));
        self.series()
    }

    /// One exists.
    pub fn taken(&self, report: &CheckpointReport) {
        let mut known = self.lock();
        let stored_bytes =
            report.stored_bytes + report.index_bytes + report.state_bytes + report.merged_bytes;
        let series = &mut known.series;
        series.taken += 1;
        series.stored_bytes = series.stored_bytes.saturating_add(stored_bytes);
        series.failure = None;
        series.last = Some(LastCheckpoint {
            id: report.id,
            durable_unix_ms: now_unix_ms(),
            deltas: report.deltas,
            pause_us: report.pause_us,
            stored_bytes,
        });
    }

    /// One does not.
    pub fn failed(&self, error: &Error) {
        let series = &mut self.lock().series;
        series.failed += 1;
        series.failure = Some(clean(&error.to_string()));
    }

    /// An interval went by without one.
    pub fn missed(&self) {
        self.lock().series.missed += 1;
    }

    /// Nothing is done until the next one begins.
    pub fn waits_until(&self, next: Instant, interval: Duration) {
        let mut known = self.lock();
        known.next = Some(next);
        known.series.interval_us = Some(micros(interval));
        known.series.phase = WAITING.into();
    }

    /// There will be no further one.
    pub fn end(&self) {
        let mut known = self.lock();
        known.next = None;
        known.series.ended = true;
        known.series.phase = WAITING.into();
        self.0.ended.notify_all();
    }

    fn note(&self, event: &Event) {
        if let Event::Phase { phase } = event {
            let mut known = self.lock();
            known.next = None;
            known.series.phase = phase.name().into();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Steered for SeriesBoard {
    fn answer(&self, order: &Order) -> Answer {
        match order {
            Order::Status => Answer::Series(Box::new(self.series())),
            Order::Await { limit_ms } => {
                let limit = Duration::from_millis((*limit_ms).min(MAX_AWAIT_MS));
                Answer::Series(Box::new(self.series_at_end(limit)))
            }
            Order::Cancel if self.lock().series.ended => {
                Answer::Error { code: ErrorCode::TooLate, message: "the series is over".into() }
            }
            Order::Cancel => {
                tracing::info!("an operator ends the series");
                self.0.cancel.set_all();
                Answer::Done
            }
            Order::Set(_) => {
                let message = "a series of checkpoints has no limits to set: end it and start another".into();
                Answer::Error { code: ErrorCode::BadValue, message }
            }
        }
    }

    fn close(&self) {
        self.end();
    }
}

/// An observer that also writes on the board of a series.
pub struct WatchedSeries<'a> {
    /// The board.
    pub board: SeriesBoard,
    /// Who is told as well.
    pub inner: &'a mut dyn Observer,
}

impl Observer for WatchedSeries<'_> {
    fn event(&mut self, event: &Event) {
        self.board.note(event);
        self.inner.event(event);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::{Phase, Quiet};

    #[test]
    fn what_a_series_does_stands_on_its_board_until_somebody_ends_it() {
        let cancel = CancelFlag::default();
        let board = SeriesBoard::new("web", "a store".into(), cancel.clone());
        let mut watched = WatchedSeries { board: board.clone(), inner: &mut Quiet };
        watched.event(&Event::Phase { phase: Phase::Rounds });
        assert_eq!((board.series().phase.as_str(), board.series().next_us), ("rounds", None));
        board.failed(&Error::Store("there is no space left".into()));
        board.missed();
        board.waits_until(Instant::now() + Duration::from_secs(60), Duration::from_secs(90));
        let series = board.series();
        assert_eq!((series.phase.as_str(), series.failed, series.missed), ("waiting", 1, 1));
        assert!(series.next_us > Some(50_000_000) && series.interval_us == Some(90_000_000), "{series:?}");
        assert!(series.failure.unwrap().contains("no space left"));
        assert!(matches!(board.answer(&Order::Set(Default::default())), Answer::Error { .. }));
        assert!(!cancel.is_set());
        assert_eq!(board.answer(&Order::Cancel), Answer::Done);
        assert!(cancel.is_set() && cancel.for_one().is_set() && !board.series().ended);
        let waiter = std::thread::spawn({
            let board = board.clone();
            move || board.series_at_end(Duration::from_secs(30))
        });
        board.end();
        assert!(waiter.join().unwrap().ended);
        assert!(matches!(board.answer(&Order::Cancel), Answer::Error { code: ErrorCode::TooLate, .. }));
    }
}

//! What the sending engine says while it works: events, and progress not too often.

use super::lanes::Sent;
use crate::report::{Event, Observer, Progress, micros, rate};
use std::time::{Duration, Instant};

/// The shortest time between two reports of progress.
const TICK: Duration = Duration::from_millis(100);

pub(super) struct Ticker<'a> {
    observer: &'a mut dyn Observer,
    last: Instant,
    round_begun: Instant,
    round: u32,
    dirty_pages: u64,
    done_pages: u64,
    bytes_before: u64,
    predicted: Option<Duration>,
    warned: bool,
}

impl<'a> Ticker<'a> {
    pub(super) fn new(observer: &'a mut dyn Observer) -> Self {
        let now = Instant::now();
        Self {
            observer,
            last: now,
            round_begun: now,
            round: 0,
            dirty_pages: 0,
            done_pages: 0,
            bytes_before: 0,
            predicted: None,
            warned: false,
        }
    }

    /// Whether the operator was told before what stopping means; from now on it is so.
    pub(super) fn warned(&mut self) -> bool {
        std::mem::replace(&mut self.warned, true)
    }

    pub(super) fn event(&mut self, event: &Event) {
        self.observer.event(event);
    }

    pub(super) fn round_begins(&mut self, round: u32, dirty_pages: u64, before: Sent) {
        (self.round, self.dirty_pages, self.done_pages) = (round, dirty_pages, 0);
        (self.round_begun, self.bytes_before) = (Instant::now(), before.bytes);
        self.event(&Event::RoundBegin { round, dirty_pages });
    }

    pub(super) fn done(&mut self, pages: u64) {
        self.done_pages += pages;
    }

    pub(super) fn predict(&mut self, downtime: Duration) {
        self.predicted = Some(downtime);
    }

    /// Reports progress if the last report is long enough ago.
    pub(super) fn tick(&mut self, sent: Sent) {
        if self.last.elapsed() < TICK {
            return;
        }
        self.last = Instant::now();
        self.event(&Event::Progress(Progress {
            round: self.round,
            done_pages: self.done_pages,
            remaining_pages: self.dirty_pages.saturating_sub(self.done_pages),
            sent_bytes: sent.bytes,
            rate_bytes_per_s: rate(sent.bytes - self.bytes_before, self.round_begun.elapsed()),
            predicted_downtime_us: self.predicted.map(micros),
        }));
    }
}

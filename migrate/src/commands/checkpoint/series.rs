//! One checkpoint behind the other, until somebody says that it is enough.

use super::{Every, SHORTEST, Wanted, Writer, show};
use crate::checkpoint::CheckpointReport;
use crate::error::Result;
use crate::exit;
use crate::metrics::Fleet;
use crate::paths::RuntimeDir;
use crate::schedule::{Chain, FAULT, Kind, Schedule, Taken};
use crate::steer::{Place, SeriesBoard, Server};
use protocol::page::PAGE_SIZE;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often a wait looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(20);

/// What the last pause took without pages is what the next is counted with, and a quarter more.
const CAUTION: f64 = 1.25;

/// What opening one more link of a chain takes: on a disk, and where it takes a few round trips.
const LINK: Duration = Duration::from_millis(1);
const REMOTE_LINK: Duration = Duration::from_millis(100);

/// What a series came to.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct Tally {
    /// Checkpoints that exist.
    pub(super) taken: u64,
    /// Attempts that failed.
    pub(super) failed: u64,
    /// Intervals that went by without one, because the one before took longer.
    pub(super) missed: u64,
}

/// Takes a checkpoint in every interval until it is interrupted. One that fails is told and the next is tried; the exit code says
/// at the end whether any did.
///
/// # Errors
/// When the first one cannot be taken: what is wrong then will not mend itself.
pub(super) fn run(writer: &Writer<'_>, runtime: &RuntimeDir, every: Every) -> Result<ExitCode> {
    let link = if writer.store.is_remote() { REMOTE_LINK } else { LINK };
    let (name, memory_bytes) = (writer.subject.check()?, writer.subject.memory_bytes()?);
    let board = SeriesBoard::new(&name, writer.store.place(), writer.cancel.clone());
    let fleet = Fleet::default();
    fleet.add_series(board.clone());
    let at = writer.args.aim.metrics;
    let _metrics = at.map(|at| crate::commands::serve_metrics(writer.common, at, &fleet)).transpose()?;
    let place = Place::of_series(runtime);
    let _server = place
        .and_then(|place| Server::start(&place, &name, board.clone()))
        .inspect_err(|error| tracing::warn!("this series cannot be looked at from outside: {error}"));
    let mut rules = Rules {
        schedule: Schedule::new(writer.args.aim.aim(), memory_bytes, link),
        every,
        last: None,
        wanted: Wanted::first(writer.args),
    };
    let mut tally = Tally::default();
    let mut last_failure = 0;
    loop {
        let begun = Instant::now();
        let cancel = writer.cancel.for_one();
        let taken = writer.take(&rules.wanted, &cancel, Some(&board));
        match taken {
            Ok(report) => {
                tally.taken += 1;
                board.taken(&report);
                rules.learn(begun, &report);
            }
            Err(_) if writer.cancel.is_set() => break,
            Err(error) if tally.taken == 0 => return Err(error),
            Err(error) => {
                tally.failed += 1;
                board.failed(&error);
                last_failure = exit::code(&error);
                show::failed(writer.common, &error, rules.interval());
            }
        }
        let interval = rules.interval();
        if every == Every::Auto {
            show::planned(writer.common, &rules.schedule.plan());
        }
        let mut due = begun + interval;
        while due < Instant::now() {
            tally.missed += 1;
            board.missed();
            show::missed(writer.common, due.elapsed());
            due += interval;
        }
        board.waits_until(due, interval);
        while Instant::now() < due && !writer.cancel.is_set() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()).min(LOOK));
        }
        if writer.cancel.is_set() {
            break;
        }
    }
    board.end();
    show::tally(writer.common, &tally);
    Ok(ExitCode::from(last_failure))
}

/// When the next one is due and what it is, by what the last ones were.
struct Rules {
    schedule: Schedule,
    every: Every,
    /// When the last one was begun.
    last: Option<Instant>,
    wanted: Wanted,
}

impl Rules {
    /// From the beginning of one to that of the next.
    fn interval(&self) -> Duration {
        match self.every {
            Every::Interval(interval) => interval,
            Every::Auto => self.schedule.plan().interval.max(SHORTEST),
        }
    }

    fn learn(&mut self, begun: Instant, report: &CheckpointReport) {
        let bytes = |pages: u64| pages * PAGE_SIZE as u64;
        let since = self.last.replace(begun).map(|last| begun - last);
        self.schedule.taken(&Taken {
            is_full: report.parent.is_none(),
            since_parent: since.filter(|_| report.parent.is_some()),
            page_bytes: bytes(report.data_pages),
            stored_bytes: report.stored_bytes,
            pause: Duration::from_micros(report.pause_us),
            slowed: FAULT.saturating_mul(u32::try_from(report.dirty_pages).unwrap_or(u32::MAX)),
            took: Duration::from_micros(report.total_us),
        });
        let chain = Chain { deltas: report.deltas, stored_bytes: report.chain_bytes };
        let expected = self.schedule.expected_page_bytes(self.interval());
        let kind = self.schedule.kind(Some(&chain), expected);
        if let Kind::Full(why) = kind {
            tracing::info!("the next checkpoint is a full one: {why}");
        }
        self.wanted = Wanted {
            full: kind != Kind::Delta,
            fixed_cost: Some(Duration::from_micros(report.fixed_us).mul_f64(CAUTION)),
        };
    }
}

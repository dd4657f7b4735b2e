//! One checkpoint behind the other, until somebody says that it is enough.

use super::{Wanted, Writer, show};
use crate::checkpoint::CheckpointReport;
use crate::error::{Error, Result};
use crate::exit;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// How often a wait looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(20);

/// What the last pause took is what the next is counted with, and a quarter more.
const CAUTION: f64 = 1.25;

/// What a series came to.
#[derive(Debug, Default, serde::Serialize)]
pub(super) struct Series {
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
pub(super) fn run(writer: &Writer<'_>, interval: Duration) -> Result<ExitCode> {
    if interval < Duration::from_millis(100) {
        return Err(Error::Usage("--every takes 100ms or more".into()));
    }
    let mut series = Series::default();
    let mut wanted = Wanted::first(writer.args);
    let mut last_failure = 0;
    let mut due = Instant::now();
    loop {
        let cancel = writer.cancel.for_one();
        match writer.take(&wanted, &cancel) {
            Ok(report) => {
                series.taken += 1;
                wanted = next(&report, writer.args.max_deltas);
            }
            Err(_) if writer.cancel.is_set() => break,
            Err(error) if series.taken == 0 => return Err(error),
            Err(error) => {
                series.failed += 1;
                last_failure = exit::code(&error);
                show::failed(writer.common, &error, interval);
            }
        }
        due += interval;
        while due < Instant::now() {
            series.missed += 1;
            show::missed(writer.common, due.elapsed());
            due += interval;
        }
        while Instant::now() < due && !writer.cancel.is_set() {
            std::thread::sleep(due.saturating_duration_since(Instant::now()).min(LOOK));
        }
        if writer.cancel.is_set() {
            break;
        }
    }
    show::series(writer.common, &series);
    Ok(ExitCode::from(last_failure))
}

/// What the next one is, behind this.
fn next(report: &CheckpointReport, max_deltas: u32) -> Wanted {
    let fixed_cost = Duration::from_micros(report.fixed_us).mul_f64(CAUTION);
    Wanted { full: report.deltas >= max_deltas, fixed_cost: Some(fixed_cost) }
}

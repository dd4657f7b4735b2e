//! What a checkpoint was, for people and for scripts.

use super::series::Tally;
use crate::checkpoint::CheckpointReport;
use crate::cli::Common;
use crate::commands::{emit, say};
use crate::error::Error;
use crate::exit;
use crate::report::micros;
use crate::schedule::Plan;
use crate::units::{show_bytes, show_rate, show_us};
use protocol::checkpoint::name::CheckpointId;
use protocol::page::PAGE_SIZE;
use serde::Serialize;
use std::io::Write as _;
use std::time::Duration;

/// Prints a report; of a checkpoint that failed only for scripts, because its error says it to people.
pub(super) fn report(common: &Common, report: &CheckpointReport) {
    if common.json {
        event("checkpoint", report);
    } else if report.committed {
        text(report);
    }
}

fn text(report: &CheckpointReport) {
    let kind = match report.parent {
        Some(parent) => format!("a delta on {parent}, the {} of its chain", ordinal(report.deltas)),
        None => "full".into(),
    };
    let bytes = |pages: u64| show_bytes(pages * PAGE_SIZE as u64);
    say(&format!("{} of {} in {}: {kind}", report.id, report.workload, report.store));
    say(&format!(
        "pages     {} new: {} with data, {} zeros, {} stored already",
        bytes(report.dirty_pages),
        bytes(report.data_pages),
        bytes(report.zero_pages),
        bytes(report.shared_pages)
    ));
    let rate = report.written_pages * PAGE_SIZE as u64 * 1_000_000 / report.total_us.max(1);
    say(&format!(
        "stored    {} for {} of pages, {} of index, {} of state, at {}",
        show_bytes(report.stored_bytes),
        bytes(report.written_pages),
        show_bytes(report.index_bytes),
        show_bytes(report.state_bytes),
        show_rate(rate)
    ));
    if report.merged_bytes > 0 {
        say(&format!("merged    {} of an index for all of the chain", show_bytes(report.merged_bytes)));
    }
    let after = if report.suspended { "; the VM has ended" } else { "" };
    say(&format!(
        "pause     {}, predicted {}, behind {} rounds{after}",
        show_us(report.pause_us),
        show_us(report.predicted_pause_us),
        report.rounds.len().saturating_sub(1)
    ));
    say(&format!("total     {}", show_us(report.total_us)));
    for warning in &report.warnings {
        say(&format!("warning   {warning}"));
    }
}

fn ordinal(number: u32) -> String {
    let end = match (number % 10, number % 100) {
        (_, 11..=13) => "th",
        (1, _) => "st",
        (2, _) => "nd",
        (3, _) => "rd",
        _ => "th",
    };
    format!("{number}{end}")
}

/// Says that one of a series failed.
pub(super) fn failed(common: &Common, error: &Error, interval: Duration) {
    if common.json {
        emit(&serde_json::json!({
            "event": "checkpoint-failed",
            "class": exit::class(error),
            "exit_code": exit::code(error),
            "message": error.to_string(),
        }));
    }
    note(&format!(
        "migrate: NO CHECKPOINT was taken: {error}; the last one is still good, and another is tried within {} s",
        interval.as_secs_f32()
    ));
}

/// Says which checkpoints were given up behind this one.
pub(super) fn pruned(common: &Common, gone: &[CheckpointId]) {
    if common.json {
        emit(&serde_json::json!({"event": "pruned", "pruned": gone}));
    } else if !gone.is_empty() {
        say(&format!("pruned    {} checkpoints that no rule keeps", gone.len()));
    }
}

/// Says that giving up old checkpoints failed.
pub(super) fn not_pruned(common: &Common, error: &Error) {
    if common.json {
        emit(
            &serde_json::json!({"event": "prune-failed", "class": exit::class(error), "message": error.to_string()}),
        );
    }
    note(&format!(
        "migrate: old checkpoints could not be given up: {error}; the new one is there, and it is tried again behind the next"
    ));
}

/// Says that an interval went by without one.
pub(super) fn missed(common: &Common, late: Duration) {
    if common.json {
        emit(&serde_json::json!({"event": "checkpoint-missed", "late_us": micros(late)}));
    }
    note("migrate: a checkpoint was missed: the one before took longer than the interval");
}

/// Says when the next one is due, and why then.
pub(super) fn planned(common: &Common, plan: &Plan) {
    let interval_us = micros(plan.interval);
    if common.json {
        let bound = plan.bound.to_string();
        emit(
            &serde_json::json!({"event": "planned", "interval_us": interval_us, "overhead": plan.overhead, "bound": bound}),
        );
    } else {
        let percent = plan.overhead * 100.0;
        say(&format!(
            "next      {} behind this one, for {percent:.2} % of the VM's time: {}",
            show_us(interval_us),
            plan.bound
        ));
    }
}

/// Prints what a series came to.
pub(super) fn tally(common: &Common, tally: &Tally) {
    if common.json {
        event("series", tally);
    } else {
        let Tally { taken, failed, missed } = tally;
        say(&format!("{taken} checkpoints were taken, {failed} failed, {missed} were missed"));
    }
}

fn event<T: Serialize>(name: &str, value: &T) {
    let mut line = serde_json::to_value(value).unwrap_or_default();
    line["event"] = name.into();
    emit(&line);
}

fn note(line: &str) {
    // Nobody reads: that is no reason to stop.
    writeln!(std::io::stderr(), "{line}").ok();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ordinals_are_those_of_english() {
        let found: Vec<_> = [1, 2, 3, 4, 11, 12, 13, 21, 100, 112].map(ordinal).to_vec();
        assert_eq!(found, ["1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "100th", "112th"]);
    }
}

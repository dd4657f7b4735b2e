//! What is aimed at, and whether it was met.

use super::peer::OURS;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;

/// The medians that targets are judged by.
#[derive(Default)]
pub(super) struct Figures {
    /// By guest and by who moved it.
    pub moves: BTreeMap<(&'static str, &'static str), Value>,
    /// The best raw pipe of these runs.
    pub pipe_bytes_per_s: Option<f64>,
    pub harvest: Option<Value>,
    pub ceiling: Option<Value>,
}

/// Downtime of an idle guest, in microseconds.
const IDLE_DOWNTIME_US: f64 = 5_000.0;
/// Our downtime by QEMU's.
const DOWNTIME_SHARE: f64 = 0.25;
/// Our total time by QEMU's with TLS.
const TOTAL_SHARE_OF_TLS: f64 = 1.0 / 3.0;
/// Text against random memory.
const TEXT_SHARE: f64 = 0.5;
/// The work that a guest loses by QEMU's.
const LOST_SHARE: f64 = 0.5;
/// Bulk by the raw pipe.
const BULK_SHARE: f64 = 0.95;
/// The raw pipe, in bytes per second.
const PIPE_BYTES_PER_S: f64 = 1e9;
/// One harvest of a clean guest of 16 GiB, in microseconds.
const HARVEST_US: f64 = 2_000.0;
/// What the VMM's memory may grow by with harvests, in KiB: allocators keep a few pages.
const RSS_GROWN_KIB: f64 = 512.0;

impl Figures {
    fn median(&self, case: &str, way: &str, name: &str) -> Option<f64> {
        let found = self.moves.iter().find(|((of, by), _)| *of == case && *by == way);
        found.and_then(|(_, result)| result[name]["median"].as_f64())
    }

    fn cases(&self) -> Vec<&'static str> {
        let mut cases: Vec<_> = self.moves.keys().map(|(case, _)| *case).collect();
        cases.dedup();
        cases
    }
}

/// Every target for which there are figures.
pub(super) fn judge(figures: &Figures) -> Vec<Value> {
    let mut all = Vec::new();
    let mut at_most = |what: String, unit: &str, found: Option<f64>, bound: Option<f64>, least: bool| {
        all.extend(verdict(&what, unit, found, bound, least));
    };
    for case in figures.cases() {
        let median = |way: &str, name: &str| figures.median(case, way, name);
        let failed = figures.moves.get(&(case, OURS)).and_then(|result| result["failed"].as_f64());
        at_most(format!("{case}: moves of ours that did not arrive"), "moves", failed, Some(0.0), false);
        let downtime = median(OURS, "downtime_guest_us");
        if case.contains("idle") {
            at_most(format!("{case}: downtime, by the guest"), "us", downtime, Some(IDLE_DOWNTIME_US), false);
        } else {
            let theirs = median("qemu", "downtime_guest_us").map(|us| us * DOWNTIME_SHARE);
            at_most(format!("{case}: downtime, a quarter of QEMU's"), "us", downtime, theirs, false);
            let theirs = median("qemu", "work_lost_bytes").map(|bytes| bytes * LOST_SHARE);
            let lost = median(OURS, "work_lost_bytes");
            at_most(format!("{case}: work lost, half of QEMU's"), "bytes", lost, theirs, false);
        }
        let share = if case.contains("text") { TEXT_SHARE } else { 1.0 };
        let total = median(OURS, "wall_us");
        let tls = median("qemu-tls", "wall_us").map(|us| us * TOTAL_SHARE_OF_TLS * share);
        at_most(format!("{case}: total, a third of QEMU's with TLS"), "us", total, tls, false);
        let multifd = median("qemu-multifd", "wall_us").map(|us| us * share);
        at_most(format!("{case}: total, QEMU's plain multifd"), "us", total, multifd, false);
    }
    let bulk = figures.median("4GiB-idle", OURS, "first_round_bytes_per_s");
    let pipe = figures.pipe_bytes_per_s;
    at_most(
        "bulk rate, of the best raw pipe".into(),
        "bytes/s",
        bulk,
        pipe.map(|rate| rate * BULK_SHARE),
        true,
    );
    at_most("the best raw pipe".into(), "bytes/s", pipe, Some(PIPE_BYTES_PER_S), true);
    if let Some(ceiling) = &figures.ceiling {
        let (ours, theirs) = (ceiling["ours_mb_per_s"].as_f64(), ceiling["qemu_mb_per_s"].as_f64());
        at_most("the highest dirty rate that converges".into(), "MB/s", ours, theirs, true);
    }
    for harvest in figures.harvest.iter().filter_map(Value::as_array).flatten() {
        let gib = &harvest["memory_gib"];
        let median = harvest["harvest_us"]["median"].as_f64();
        at_most(format!("{gib} GiB, clean: one harvest"), "us", median, Some(HARVEST_US), false);
        let grown = harvest["vmm_rss_grown_kib"].as_f64();
        at_most(format!("{gib} GiB, clean: RSS grown"), "KiB", grown, Some(RSS_GROWN_KIB), false);
    }
    all
}

/// What is measured, in which unit, what was found, and the bound: an upper one unless it says least.
pub(super) fn verdict(
    what: &str,
    unit: &str,
    found: Option<f64>,
    bound: Option<f64>,
    least: bool,
) -> Option<Value> {
    let (found, bound) = found.zip(bound)?;
    let met = if least { found >= bound } else { found <= bound };
    let bound_is = if least { "at least" } else { "at most" };
    Some(
        json!({"what": what, "unit": unit, "found": found, "bound_is": bound_is, "bound": bound, "met": met}),
    )
}

/// Says which targets were met.
pub(super) fn print(verdicts: &[Value]) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{:<56} {:>14} {:>24}", "target", "found", "").ok();
    for verdict in verdicts {
        let number = |name: &str| verdict[name].as_f64().unwrap_or(f64::NAN);
        let text = |name: &str| verdict[name].as_str().unwrap_or_default();
        writeln!(
            out,
            "{:<56} {:>14.0} {:>8} {:>14.0} {:<8} {}",
            text("what"),
            number("found"),
            text("bound_is"),
            number("bound"),
            text("unit"),
            if verdict["met"] == true { "met" } else { "MISSED" },
        )
        .ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moved(us: f64, downtime: f64, lost: f64) -> Value {
        json!({"wall_us": {"median": us}, "downtime_guest_us": {"median": downtime}, "work_lost_bytes": {"median": lost}})
    }

    #[test]
    fn targets_are_met_and_missed_as_their_bounds_say() {
        let mut figures = Figures::default();
        figures.moves.insert(("1GiB-50", OURS), moved(90.0, 24.0, 51.0));
        figures.moves.insert(("1GiB-50", "qemu"), moved(200.0, 100.0, 100.0));
        figures.moves.insert(("1GiB-50", "qemu-tls"), moved(300.0, 100.0, 100.0));
        figures.moves.insert(("1GiB-50", "qemu-multifd"), moved(80.0, 100.0, 100.0));
        let met: Vec<_> = judge(&figures).iter().map(|verdict| verdict["met"] == true).collect();
        // Downtime below a quarter; work above half; total below a third, and above plain multifd.
        assert_eq!(met, [true, false, true, false]);
    }

    #[test]
    fn a_target_without_figures_is_not_judged() {
        assert!(judge(&Figures::default()).is_empty());
    }
}

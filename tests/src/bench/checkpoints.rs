//! Checkpoints of a running guest, and restores of them: what `migrate checkpoint` and `migrate restore` take, as a user runs them.
//!
//! ```text
//! pause     deltas of one guest in 1, 4 and 16 GiB: the gap on the guest's clock, the bytes
//! every     the guest's speed under --every 5s
//! full      a full checkpoint and dd of as many bytes, in turn
//! snapshot  full, delta and both restores with the store in memory: what other VMMs were measured at
//! chain     restores behind 1, 10 and 100 deltas, and of one full checkpoint of each state, in turn
//! lazy      from the command until a guest of 4 GiB runs, behind 1, 10 and 100 deltas
//! ```

mod scene;
mod taking;
mod restoring;

use super::Options;
use super::cases::Case;
use super::figures::summary;
use serde_json::{Value, json};
use std::io::Write as _;

/// What is measured, by the name that `--only` asks for.
type Part = fn(&Options) -> Vec<(String, Value)>;

/// The part that is measured beside a peer.
const COMPARED: &str = "checkpoint-snapshot";

const PARTS: &[(&str, Part)] = &[
    ("checkpoint-pause", taking::pauses),
    ("checkpoint-every", taking::under_a_schedule),
    ("checkpoint-full", taking::full_beside_dd),
    (COMPARED, taking::snapshots),
    ("restore-chain", restoring::chains),
    ("restore-lazy", restoring::lazily),
];

/// Every part that is wanted: its cases with all of their samples, their medians, and what was aimed at.
pub(super) fn run(options: &Options) -> Value {
    let mut results = Vec::new();
    let mut samples = Vec::new();
    let mut verdicts = Vec::new();
    let compared = |name: &str| !options.peer || name == COMPARED;
    for (name, part) in PARTS.iter().filter(|(name, _)| options.wants(name) && compared(name)) {
        let mut cases: Vec<(String, Vec<Value>)> = Vec::new();
        for (case, sample) in part(options) {
            match cases.iter_mut().find(|(name, _)| *name == case) {
                Some((_, samples)) => samples.push(sample),
                None => cases.push((case, vec![sample])),
            }
        }
        let medians: Vec<(String, Value)> =
            cases.iter().map(|(case, samples)| (case.clone(), summary(samples))).collect();
        if !options.json {
            table(name, &medians);
        }
        verdicts.extend(judge(name, &medians));
        for ((case, samples_of), (_, mut result)) in cases.into_iter().zip(medians) {
            result["case"] = format!("{name} {case}").into();
            results.push(result);
            samples.push(json!({"case": format!("{name} {case}"), "samples": samples_of}));
        }
    }
    if !options.json && !verdicts.is_empty() {
        super::targets::print(&verdicts);
    }
    json!({"results": results, "samples": samples, "targets": verdicts})
}

/// Pause of a delta, seen by the guest, in microseconds.
const PAUSE_US: f64 = 10_000.0;
/// The pause by the engine at 16 GiB by that at 1 GiB. Nothing in it grows with memory; medians differ.
const PAUSE_GROWTH: f64 = 1.5;
/// Bytes written for a delta by its dirty pages.
const DELTA_SHARE: f64 = 1.05;
/// The guest's speed under a schedule by its own.
const SPEED_SHARE: f64 = 0.9;
/// A full checkpoint by dd.
const DD_SHARE: f64 = 0.8;
/// A full checkpoint, which tries to pack and to share, by one that does not.
const PLAIN_SHARE: f64 = 0.9;
/// A chain by one full checkpoint.
const CHAIN_SHARE: f64 = 1.2;
/// From the command until a guest that is restored lazily has run, in microseconds.
const LAZY_US: f64 = 50_000.0;

fn judge(part: &str, cases: &[(String, Value)]) -> Vec<Value> {
    let median = |case: &str, name: &str| {
        cases.iter().find(|(of, _)| of == case).and_then(|(_, result)| result[name]["median"].as_f64())
    };
    let mut all = Vec::new();
    let mut add = |what: String, unit: &str, found: Option<f64>, bound: Option<f64>, least: bool| {
        all.extend(super::targets::verdict(&what, unit, found, bound, least));
    };
    for (case, _) in cases {
        match part {
            "checkpoint-pause" => {
                let gap = median(case, "pause_guest_us");
                add(format!("{case}: pause of a delta, by the guest"), "us", gap, Some(PAUSE_US), false);
                let share = median(case, "written_by_dirty").map(|share| share * 1e3);
                add(format!("{case}: bytes of a delta"), "per mille", share, Some(DELTA_SHARE * 1e3), false);
                let all = median(case, "all_written_by_dirty").map(|share| share * 1e3);
                add(format!("{case}: with merged indexes"), "per mille", all, Some(DELTA_SHARE * 1e3), false);
            }
            // A guest that writes as fast as it can wants every core there is; it is measured, and no bound is set.
            "checkpoint-every" if !case.contains("max") => {
                let own = median(case, "guest_mb_per_s_undisturbed").map(|speed| speed * SPEED_SHARE);
                let speed = median(case, "guest_mb_per_s");
                add(format!("{case}: speed under --every 5s"), "MB/s", speed, own, true);
            }
            "checkpoint-full" => {
                let ours = median(case, "store_bytes_per_s");
                let dd = median(case, "dd_bytes_per_s").map(|rate| rate * DD_SHARE);
                add(format!("{case}: a full checkpoint, 80 % of dd"), "bytes/s", ours, dd, true);
                let plain = median(case, "plain_bytes_per_s").map(|rate| rate * PLAIN_SHARE);
                add(format!("{case}: with packing and sharing tried, 90 %"), "bytes/s", ours, plain, true);
            }
            "restore-chain" => {
                // Of neighbours in time, because what a restore takes changes more from minute to minute.
                let share = median(case, "by_full").map(|share| share * 1e3);
                add(
                    format!("{case}: restore, by one full"),
                    "per mille",
                    share,
                    Some(CHAIN_SHARE * 1e3),
                    false,
                );
            }
            "restore-lazy" => {
                let us = median(case, "tick_wall_us");
                add(format!("{case}: command until it has ticked"), "us", us, Some(LAZY_US), false);
            }
            _ => {}
        }
    }
    if part == "checkpoint-pause" {
        let small = cases.first().and_then(|(case, _)| median(case, "pause_engine_us"));
        let large = cases.last().and_then(|(case, _)| median(case, "pause_engine_us"));
        let bound = small.map(|us| us * PAUSE_GROWTH);
        add("the largest guest's pause, by the engine".into(), "us", large, bound, false);
    }
    all
}

/// Every number of every case: median, least and most.
fn table(part: &str, cases: &[(String, Value)]) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n{part}").ok();
    for (case, result) in cases {
        writeln!(out, "  {case}, {} samples", result["runs"]).ok();
        for (name, value) in result.as_object().into_iter().flatten() {
            let number = |of: &str| value[of].as_f64();
            if let (Some(median), Some(least), Some(most)) =
                (number("median"), number("least"), number("most"))
            {
                writeln!(out, "    {name:<28} {median:>16.2} ({least:.2}–{most:.2})").ok();
            }
        }
    }
}

/// A guest of this module.
const fn guest(name: &'static str, memory_mib: u64, cmdline: &'static str) -> Case {
    Case { name, memory_mib, cmdline, most_runs: u64::MAX }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdicts(part: &str, case: &str, members: &Value) -> Vec<bool> {
        let medians: serde_json::Map<String, Value> = members
            .as_object()
            .into_iter()
            .flatten()
            .map(|(name, value)| (name.clone(), json!({"median": value})))
            .collect();
        judge(part, &[(case.into(), medians.into())]).iter().map(|verdict| verdict["met"] == true).collect()
    }

    #[test]
    fn each_part_is_judged_by_its_bounds() {
        let pause = |us: f64, share: f64| json!({"pause_guest_us": us, "written_by_dirty": share, "all_written_by_dirty": share});
        assert_eq!(verdicts("checkpoint-pause", "x", &pause(9_000.0, 1.06)), [true, false, false]);
        assert_eq!(verdicts("checkpoint-pause", "x", &pause(11_000.0, 1.04)), [false, true, true]);
        let full = |rate: f64| json!({"store_bytes_per_s": rate, "dd_bytes_per_s": 100.0});
        assert_eq!(verdicts("checkpoint-full", "x", &full(79.0)), [false]);
        assert_eq!(verdicts("checkpoint-full", "x", &full(81.0)), [true]);
        assert_eq!(verdicts("restore-chain", "x", &json!({"by_full": 1.21})), [false]);
        assert_eq!(verdicts("restore-lazy", "x", &json!({"tick_wall_us": 49_000.0})), [true]);
        let every = json!({"guest_mb_per_s": 44.0, "guest_mb_per_s_undisturbed": 50.0});
        assert_eq!(verdicts("checkpoint-every", "x", &every), [false]);
    }
}

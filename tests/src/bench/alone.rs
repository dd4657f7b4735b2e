//! Our own figures: moves with the raw pipe of the same run, and checkpoints.

use super::Options;
use super::cases::{ALONE, Case, QUICK};
use super::container::How;
use super::figures::{self, described, summary};
use super::ours::Ours;
use super::{checkpoints, container, first_write, pipe};
use serde_json::{Value, json};
use std::io::Write as _;

/// Payload of the raw pipe's runs, in MiB.
pub(super) const PIPE_MIB: u64 = 768;

pub(super) fn run(options: &Options) -> Value {
    let all = if options.quick { QUICK } else { ALONE };
    let cases: Vec<&Case> = all.iter().filter(|case| options.wants(case.name)).collect();
    let mut samples: Vec<Vec<Value>> = vec![Vec::new(); cases.len()];
    for run in 0..options.runs {
        for (case, samples) in cases.iter().zip(&mut samples) {
            let ours = Ours::start(&options.program, case, run + 1, None);
            let mut sample = ours.measure(case.memory_mib, &[]);
            sample["raw_pipe_bytes_per_s"] = pipe::raw(&options.program, PIPE_MIB, 1).into();
            eprintln!("{} run {run}: {sample}", case.name);
            samples.push(sample);
        }
    }
    let results: Vec<_> = cases
        .iter()
        .zip(&samples)
        .map(|(case, samples)| {
            let mut result = summary(samples);
            result["case"] = case.name.into();
            result["guest"] = case.cmdline.into();
            result["memory_mib"] = case.memory_mib.into();
            result
        })
        .collect();
    if !options.json && !cases.is_empty() {
        table(&cases, &results);
    }
    let first_writes: Vec<_> = (0..options.runs)
        .filter(|_| !options.quick && options.wants("first-write"))
        .map(|run| {
            let sample = first_write::measure(&options.program);
            eprintln!("first-write run {run}: {sample}");
            sample
        })
        .collect();
    let mut containers = vec![Vec::new(); How::ALL.len()];
    let wants_containers =
        !options.quick && options.wants("container") && rustix::process::geteuid().is_root();
    for run in (0..options.runs).filter(|_| wants_containers) {
        for (how, samples) in How::ALL.into_iter().zip(&mut containers) {
            let sample = container::measure(&options.program, how);
            eprintln!("container {} run {run}: {sample}", how.name());
            samples.push(sample);
        }
    }
    let containers = How::ALL.iter().zip(&containers);
    let containers: serde_json::Map<_, _> =
        containers.map(|(how, samples)| (how.name().into(), summary(samples))).collect();
    let checkpoints = checkpoints::run(options);
    let samples = figures::named(&cases, &samples);
    described(
        options,
        &json!({
            "results": results,
            "samples": samples,
            "first_write": summary(&first_writes),
            "containers": containers,
            "checkpoints": checkpoints,
        }),
    )
}

fn table(cases: &[&Case], results: &[Value]) {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<10} {:>9} {:>11} {:>12} {:>10} {:>7} {:>10} {:>10} {:>9} {:>9} {:>9} {:>9}",
        "case",
        "total ms",
        "guest gap",
        "engine down",
        "undist gap",
        "rounds",
        "round0",
        "raw pipe",
        "send RSS",
        "recv RSS",
        "guest",
        "in move"
    )
    .ok();
    for (case, result) in cases.iter().zip(results) {
        let median = |name: &str| result[name]["median"].as_f64().unwrap_or(f64::NAN);
        writeln!(
            out,
            "{:<10} {:>9.0} {:>8.2} ms {:>9.2} ms {:>7.2} ms {:>7} {:>5.0} MB/s {:>5.0} MB/s {:>5.1} MiB {:>5.1} MiB {:>4.0} MB/s {:>4.0} MB/s",
            case.name,
            median("total_us") / 1e3,
            median("downtime_guest_us") / 1e3,
            median("downtime_engine_us") / 1e3,
            median("longest_gap_undisturbed_us") / 1e3,
            median("rounds"),
            median("first_round_bytes_per_s") / 1e6,
            median("raw_pipe_bytes_per_s") / 1e6,
            median("sender_rss_kib") / 1024.0,
            median("receiver_rss_kib") / 1024.0,
            median("guest_mb_per_s_undisturbed"),
            median("guest_mb_per_s_in_move"),
        )
        .ok();
    }
}

//! Ours and QEMU's, in turn, on the same guests.

use super::cases::{COMPARED, Case, QUICK};
use super::figures::{described, output, summary};
use super::ours::Ours;
use super::qemu::{Qemu, WAYS, Way};
use super::targets::{self, Figures};
use super::{Options, alone, ceiling, checkpoints, harvest, pipe};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Write as _;
use std::time::Duration;

/// The peer's program.
pub(super) const QEMU: &str = "qemu-system-x86_64";

/// The longest that one move may take before it counts as failed. A guest that writes faster than QEMU encrypts never arrives.
pub(super) const MOVE_LIMIT: Duration = Duration::from_secs(90);

/// Our name in the tables.
pub(super) const OURS: &str = "ours";

pub(super) fn run(options: &Options) -> Value {
    let all = if options.quick { QUICK } else { COMPARED };
    let cases: Vec<&Case> = all.iter().filter(|case| options.wants(case.name)).collect();
    let mut samples: BTreeMap<(usize, &'static str), Vec<Value>> = BTreeMap::new();
    let mut pipes = Vec::new();
    let mut tsc_khz = None;
    for run in 0..options.runs {
        for (number, case) in cases.iter().enumerate().filter(|(_, case)| run < case.most_runs) {
            let mut keep = |way: &'static str, sample: Value| {
                eprintln!("{} {way} run {run}: {sample}", case.name);
                samples.entry((number, way)).or_default().push(sample);
            };
            // Never one after the other in blocks: what changes on this machine meanwhile changes for both.
            let ours = Ours::start(&options.program, case, run + 1, None);
            let khz = *tsc_khz.get_or_insert_with(|| ours.tsc_khz());
            keep(OURS, ours.try_measure(case.memory_mib, &[]).unwrap_or_else(|why| failed(&why)));
            for way in WAYS {
                keep(way.name, theirs(case, run + 1, khz, *way));
            }
        }
        if !options.quick && options.wants("pipe") {
            for streams in [1, 2] {
                pipes.push(json!({
                    "streams": streams,
                    "bytes_per_s": pipe::raw(&options.program, alone::PIPE_MIB, streams),
                }));
            }
        }
    }
    let mut figures = Figures::default();
    for ((number, way), samples) in &samples {
        figures.moves.insert((cases[*number].name, way), summary(samples));
    }
    figures.pipe_bytes_per_s = pipes.iter().filter_map(|pipe| pipe["bytes_per_s"].as_f64()).reduce(f64::max);
    if options.quick || options.wants("harvest") {
        figures.harvest = Some(harvest::measure(&options.program, options.quick));
    }
    if !options.quick && options.wants("ceiling") {
        figures.ceiling = ceiling::measure(&options.program, tsc_khz);
    }
    let checkpoints = checkpoints::run(options);
    let verdicts = targets::judge(&figures);
    if !options.json {
        table(&cases, &figures);
        targets::print(&verdicts);
    }
    let moves: Vec<_> = samples
        .iter()
        .map(|((number, way), samples)| {
            let case = cases[*number];
            let mut result = figures.moves[&(case.name, *way)].clone();
            result["case"] = case.name.into();
            result["way"] = (*way).into();
            result["guest"] = case.cmdline.into();
            result["memory_mib"] = case.memory_mib.into();
            result["samples"] = samples.clone().into();
            result
        })
        .collect();
    described(
        options,
        &json!({
            "peer": output(QEMU, &["--version"]),
            "results": moves,
            "raw_pipe": pipes,
            "harvest": figures.harvest,
            "ceiling": figures.ceiling,
            "checkpoints": checkpoints,
            "targets": verdicts,
        }),
    )
}

/// A move that did not arrive: what comes behind it is measured all the same.
fn failed(why: &str) -> Value {
    json!({"failed": why})
}

fn theirs(case: &Case, seed: u64, tsc_khz: u64, way: Way) -> Value {
    let moved = Qemu::start(case, seed, tsc_khz, way, None)
        .and_then(|qemu| qemu.measure(case.memory_mib, MOVE_LIMIT))
        .unwrap_or_else(|error| panic!("{} {}: {error}", case.name, way.name));
    moved.unwrap_or_else(|why| {
        // It would have taken longer: so targets are judged by less than it took.
        let mut sample = failed(&why);
        sample["wall_us"] = (MOVE_LIMIT.as_secs_f64() * 1e6).into();
        sample
    })
}

fn table(cases: &[&Case], figures: &Figures) {
    let mut out = std::io::stdout().lock();
    writeln!(
        out,
        "{:<14} {:<18} {:>24} {:>24} {:>22} {:>10} {:>7}",
        "guest", "moved by", "total s", "downtime ms, by guest", "work lost MB", "sent MB", "rounds"
    )
    .ok();
    for case in cases {
        for way in std::iter::once(OURS).chain(WAYS.iter().map(|way| way.name)) {
            let Some(result) = figures.moves.get(&(case.name, way)) else { continue };
            let spread = |name: &str, unit: f64, digits: usize| {
                let value = |of: &str| result[name][of].as_f64().unwrap_or(f64::NAN) / unit;
                let (median, least, most) = (value("median"), value("least"), value("most"));
                format!("{median:.digits$} ({least:.digits$}–{most:.digits$})")
            };
            writeln!(
                out,
                "{:<14} {way:<18} {:>24} {:>24} {:>22} {:>10.0} {:>7.0}{}",
                case.name,
                spread("wall_us", 1e6, 2),
                spread("downtime_guest_us", 1e3, 1),
                spread("work_lost_bytes", 1e6, 1),
                result["sent_bytes"]["median"].as_f64().unwrap_or(f64::NAN) / 1e6,
                result["rounds"]["median"].as_f64().unwrap_or(f64::NAN),
                match result["failed"].as_u64() {
                    None | Some(0) => String::new(),
                    Some(moves) => format!("  {moves} of {} did not arrive", result["runs"]),
                },
            )
            .ok();
        }
    }
}

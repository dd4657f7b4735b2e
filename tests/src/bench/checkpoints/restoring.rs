//! What restoring costs, by the length of the chain.

use super::super::Options;
use super::super::cases::Case;
use super::guest;
use super::scene::{Medium, Scene};
use serde_json::{Value, json};
use std::time::Duration;

/// Deltas of the chains.
const LENGTHS: [usize; 3] = [1, 10, 100];

/// Chains of one guest: for each length, the name of the checkpoint at its end.
fn build(scene: &Scene, lengths: &[usize], between: Duration) -> Vec<(usize, String)> {
    let mut ends = Vec::new();
    scene.take(&[]);
    for deltas in 1..=lengths.last().copied().unwrap_or(0) {
        std::thread::sleep(between);
        let (report, _) = scene.take(&[]);
        assert_eq!(report["deltas"], deltas, "not a delta on the last one: {report:#}");
        if lengths.contains(&deltas) {
            ends.push((deltas, report["id"].as_str().expect("a name").to_owned()));
        }
    }
    ends
}

fn lengths(options: &Options) -> &'static [usize] {
    if options.quick { &LENGTHS[..1] } else { &LENGTHS }
}

fn case(options: &Options, case: Case) -> Case {
    if options.quick { guest("quick", 128, "fill=64M ws=16M rate=50") } else { case }
}

/// Whole restores of chains, and of one full checkpoint of each state, in turn.
pub(super) fn chains(options: &Options) -> Vec<(String, Value)> {
    let case = case(options, guest("1GiB-50", 1024, "fill=768M ws=256M rate=50"));
    let scene = Scene::start(options, &case, 1, Medium::Disk);
    let ends = build(&scene, lengths(options), Duration::from_millis(500));
    let ends: Vec<_> = ends.into_iter().map(|(deltas, id)| (deltas, scene.compacted(&id), id)).collect();
    // The guest would take a core from what is measured.
    scene.host.run(&["vm", "stop", "bench"]).success();
    let mut samples = Vec::new();
    for run in 0..options.runs {
        for (deltas, full, id) in &ends {
            let restore = |id: &str| {
                let restored = scene.restore(id, false);
                scene.end_restored(run == 0);
                restored
            };
            // Each is first in every other run.
            let (alone, chain) = if run % 2 == 0 {
                let alone = restore(full);
                (alone, restore(id))
            } else {
                let chain = restore(id);
                (restore(full), chain)
            };
            let sample = json!({
                "wall_us": chain.wall_us,
                "full_wall_us": alone.wall_us,
                "by_full": chain.wall_us as f64 / alone.wall_us as f64,
                "stored_bytes": chain.report["stored_bytes"],
                "full_stored_bytes": alone.report["stored_bytes"],
            });
            let name = format!("{} behind {deltas}", case.name);
            eprintln!("{name} run {run}: {sample} {}", chain.report["steps"]);
            samples.push((name, sample));
        }
    }
    samples
}

/// Lazy restores of a large guest.
pub(super) fn lazily(options: &Options) -> Vec<(String, Value)> {
    let case = case(options, guest("4GiB-50", 4096, "fill=3040M ws=1024M rate=50"));
    let scene = Scene::start(options, &case, 1, Medium::Disk);
    let ends = build(&scene, lengths(options), Duration::from_secs(1));
    scene.host.run(&["vm", "stop", "bench"]).success();
    let mut samples = Vec::new();
    for run in 0..options.runs {
        for (deltas, id) in &ends {
            let restored = scene.restore(id, true);
            scene.end_restored(run == 0);
            let report = &restored.report;
            let us = |value: &Value| value.as_u64();
            // The program's clock begins a little behind the command. Nobody need have waited for a page: what was touched may just have come.
            let behind_us = us(&report["lazily"]["first_page_us"])
                .zip(us(&report["running_us"]))
                .map(|(page, running)| page.saturating_sub(running));
            let sample = json!({
                "runs_wall_us": restored.runs_wall_us,
                "first_page_wall_us": behind_us.map(|us| restored.runs_wall_us + us),
                "tick_wall_us": restored.tick_wall_us,
                "running_us": report["running_us"],
                "all_wall_us": restored.wall_us,
                "wait_max_us": report["lazily"]["wait_max_us"],
            });
            let name = format!("{} behind {deltas}", case.name);
            eprintln!("{name} run {run}: {sample} {}", report["steps"]);
            samples.push((name, sample));
        }
    }
    samples
}

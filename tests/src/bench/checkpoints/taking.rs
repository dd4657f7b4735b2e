//! What taking a checkpoint costs.

use super::super::Options;
use super::super::account::{micros, stats};
use super::super::cases::Case;
use super::super::memory::touch;
use super::super::peer;
use super::super::qemu::{Qemu, WAYS};
use super::guest;
use super::scene::{Medium, STORE, Scene, number};
use serde_json::{Value, json};
use std::io::{Read as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Deltas of one guest.
const DELTAS: usize = 10;

/// Time between two deltas.
const BETWEEN: Duration = Duration::from_secs(1);

/// How long a guest is watched under a schedule, and by itself.
const WATCHED: Duration = Duration::from_secs(20);

/// Deltas of the same guest with ever more memory around it.
pub(super) fn pauses(options: &Options) -> Vec<(String, Value)> {
    let busy = "fill=768M ws=256M rate=50 tick_us=1000";
    let cases = [guest("1GiB-50", 1024, busy), guest("4GiB-50", 4096, busy), guest("16GiB-50", 16384, busy)];
    let (cases, deltas) = if options.quick {
        (&[guest("quick", 128, "fill=64M ws=16M rate=50 tick_us=1000")][..], 2)
    } else {
        (&cases[..], DELTAS)
    };
    let mut samples = Vec::new();
    for run in 0..options.runs {
        for case in cases {
            let scene = Scene::start(options, case, run + 1, Medium::Disk);
            scene.take(&[]);
            let (mut all_dirty, mut all_written) = (0.0, 0.0);
            for _ in 0..deltas {
                std::thread::sleep(BETWEEN);
                let (report, wall_us, gap_us) = scene.take_watched(&[]);
                let dirty = number(&report, "dirty_pages") * 4096.0;
                let written =
                    ["stored_bytes", "index_bytes", "state_bytes"].map(|name| number(&report, name));
                let written = written.iter().sum::<f64>();
                all_dirty += dirty;
                all_written += written + number(&report, "merged_bytes");
                assert!(!report["parent"].is_null(), "not a delta: {report:#}");
                let sample = json!({
                    "pause_guest_us": gap_us,
                    "pause_engine_us": report["pause_us"],
                    "dirty_bytes": dirty,
                    "written_by_dirty": written / dirty,
                    // Of all deltas until now, with the merged indexes that were written behind some of them.
                    "all_written_by_dirty": all_written / all_dirty,
                    "total_us": report["total_us"],
                    "wall_us": wall_us,
                });
                eprintln!("{} run {run}: {sample}", case.name);
                samples.push((case.name.to_owned(), sample));
            }
        }
    }
    samples
}

/// The guest's speed by itself and with a checkpoint every five seconds.
pub(super) fn under_a_schedule(options: &Options) -> Vec<(String, Value)> {
    let cases = [
        guest("1GiB-50", 1024, "fill=768M ws=256M rate=50"),
        guest("1GiB-max", 1024, "fill=768M ws=256M rate=max"),
    ];
    let quick = [guest("quick", 128, "fill=64M ws=16M rate=50")];
    let (cases, every, watched, least) = if options.quick {
        (&quick[..], "500ms", Duration::from_secs(3), 2)
    } else {
        (&cases[..], "5s", WATCHED, 3)
    };
    let mut samples = Vec::new();
    for run in 0..options.runs {
        for case in cases {
            let scene = Scene::start(options, case, run + 1, Medium::Disk);
            let undisturbed = scene.speed(watched / 2);
            let mut speed = 0.0;
            let committed = scene.scheduled(every, || speed = scene.speed(watched));
            assert!(committed >= least, "only {committed} checkpoints");
            let sample = json!({
                "guest_mb_per_s_undisturbed": undisturbed,
                "guest_mb_per_s": speed,
                "checkpoints": committed,
            });
            eprintln!("{} run {run}: {sample}", case.name);
            samples.push((case.name.to_owned(), sample));
        }
    }
    samples
}

/// Full checkpoints of an idle guest, beside `dd` of as many random bytes with the same sync: as they are, and without packing and without
/// looking for what is stored already. The store has another guest's memory by then, so that there is something to look through.
pub(super) fn full_beside_dd(options: &Options) -> Vec<(String, Value)> {
    let case = if options.quick {
        guest("quick", 128, "fill=64M ws=16M rate=0 tick_us=1000")
    } else {
        guest("2GiB-idle", 2048, "fill=1520M ws=512M rate=0 tick_us=1000")
    };
    let mut random = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file in memory");
    fill(&mut random, case.memory_mib * 3 / 4);
    let mut samples = Vec::new();
    for run in 0..options.runs {
        let scene = Scene::start(options, &case, run + 1, Medium::Disk);
        scene.take_another(&case, run + 1001);
        let to = scene.directory().join("dd");
        let take = |name: &str, more: &[&str]| {
            let (report, wall_us) = scene.take_into(name, more);
            let stored_bytes = number(&report, "stored_bytes");
            // The guest's program and tables are no random bytes.
            assert!(
                stored_bytes >= number(&report, "data_pages") * 4096.0 * 0.99,
                "not all of it: {report:#}"
            );
            stored_bytes / wall_us as f64 * 1e6
        };
        let mut ways: [(&str, &dyn Fn() -> f64); 3] = [
            ("store_bytes_per_s", &|| take(STORE, &["--full"])),
            ("plain_bytes_per_s", &|| take("plain", &["--full", "--raw", "--unshared"])),
            ("dd_bytes_per_s", &|| dd(random.path(), &to)),
        ];
        // Each first in every third run: whoever comes later may find a disk that is still busy.
        ways.rotate_left(usize::try_from(run % 3).expect("less than three"));
        let mut sample = json!({});
        for (name, measure) in ways {
            touch(case.memory_mib);
            sample[name] = measure().into();
        }
        eprintln!("{} run {run}: {sample}", case.name);
        samples.push((case.name.to_owned(), sample));
    }
    samples
}

/// Random bytes in a file.
fn fill(file: &mut tempfile::NamedTempFile, mib: u64) {
    let mut random = std::fs::File::open("/dev/urandom").expect("random bytes").take(mib << 20);
    std::io::copy(&mut random, file).expect("a full file in memory");
    file.flush().expect("a full file in memory");
}

/// Bytes per second that `dd` writes, all of them on the disk.
fn dd(from: &Path, to: &Path) -> f64 {
    let bytes = std::fs::metadata(from).expect("its length").len();
    let begun = Instant::now();
    let status = Command::new("dd")
        .arg(format!("if={}", from.display()))
        .arg(format!("of={}", to.display()))
        .args(["bs=4M", "conv=fdatasync"])
        .stderr(Stdio::null())
        .status();
    assert!(status.is_ok_and(|status| status.success()), "dd failed");
    let rate = bytes as f64 / micros(begun) as f64 * 1e6;
    std::fs::remove_file(to).expect("what dd wrote");
    rate
}

/// What other VMMs were measured at: a guest at 200 MB/s, the store in memory. Beside a peer, in turn with it, on a guest that spins.
pub(super) fn snapshots(options: &Options) -> Vec<(String, Value)> {
    let (small, large) = if options.peer {
        ("fill=768M ws=256M rate=200 park=spin", "fill=3040M ws=1024M rate=200 park=spin")
    } else {
        ("fill=768M ws=256M rate=200", "fill=3040M ws=1024M rate=200")
    };
    let cases = [guest("1GiB-200", 1024, small), guest("4GiB-200", 4096, large)];
    let cases =
        if options.quick { &[guest("quick", 128, "fill=64M ws=16M rate=50")][..] } else { &cases[..] };
    let mut samples = Vec::new();
    for run in 0..options.runs {
        for case in cases {
            let scene = Scene::start(options, case, run + 1, Medium::Memory);
            touch(case.memory_mib);
            let (full, full_wall_us, full_pause_us) = scene.take_watched(&[]);
            std::thread::sleep(BETWEEN);
            let (delta, delta_wall_us, delta_pause_us) = scene.take_watched(&[]);
            let id = delta["id"].as_str().expect("a name");
            let eager = scene.restore(id, false);
            scene.end_restored(run == 0);
            let lazy = scene.restore(id, true);
            scene.end_restored(run == 0);
            let sample = json!({
                "full_pause_us": full_pause_us,
                "full_pause_engine_us": full["pause_us"],
                "full_wall_us": full_wall_us,
                "delta_dirty_bytes": number(&delta, "dirty_pages") * 4096.0,
                "delta_pause_us": delta_pause_us,
                "delta_pause_engine_us": delta["pause_us"],
                "delta_wall_us": delta_wall_us,
                "restore_runs_wall_us": eager.runs_wall_us,
                "lazy_runs_wall_us": lazy.runs_wall_us,
                "lazy_tick_wall_us": lazy.tick_wall_us,
                "lazy_all_wall_us": lazy.wall_us,
            });
            eprintln!("{} run {run}: {sample}", case.name);
            samples.push((case.name.to_owned(), sample));
            if options.peer {
                let khz = stats(&scene.window).tsc_khz.expect("our VMM tells its guests");
                drop(scene);
                let sample = theirs(case, run + 1, khz);
                eprintln!("{} qemu run {run}: {sample}", case.name);
                samples.push((format!("{} qemu", case.name), sample));
            }
        }
    }
    samples
}

/// The same by QEMU: a live migration into a file.
fn theirs(case: &Case, seed: u64, tsc_khz: u64) -> Value {
    let file = tempfile::NamedTempFile::new_in("/dev/shm").expect("a file in memory");
    let plain = WAYS.first().copied().expect("its plain way");
    Qemu::start(case, seed, tsc_khz, plain, None)
        .and_then(|qemu| qemu.snapshot(case.memory_mib, file.path(), peer::MOVE_LIMIT))
        .unwrap_or_else(|error| panic!("{} qemu: {error}", case.name))
}

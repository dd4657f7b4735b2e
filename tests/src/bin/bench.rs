//! The benchmark behind `scripts/bench`: figures as JSON, medians and spread over runs taken in turn.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a benchmark that goes wrong has no figures to give: it ends with the words of what went wrong"
)]

use e2e::guest::Window;
use e2e::{Running, trusting_pair};
use serde_json::{Value, json};
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// One guest to move.
struct Case {
    name: &'static str,
    memory: &'static str,
    memory_mib: usize,
    cmdline: &'static str,
}

const CASES: &[Case] = &[
    Case {
        name: "1GiB-idle",
        memory: "1GiB",
        memory_mib: 1024,
        cmdline: "fill=768M ws=256M rate=0 tick_us=1000",
    },
    Case { name: "1GiB-50", memory: "1GiB", memory_mib: 1024, cmdline: "fill=768M ws=256M rate=50" },
    Case { name: "1GiB-100", memory: "1GiB", memory_mib: 1024, cmdline: "fill=768M ws=256M rate=100" },
    Case { name: "1GiB-200", memory: "1GiB", memory_mib: 1024, cmdline: "fill=768M ws=256M rate=200" },
    Case { name: "4GiB-50", memory: "4GiB", memory_mib: 4096, cmdline: "fill=2304M ws=1024M rate=50" },
];

fn main() {
    let mut runs = 5;
    let mut only: Option<String> = None;
    let mut out = None;
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{argument} needs a value"));
        match argument.as_str() {
            "--runs" => runs = value().parse().expect("--runs takes a number"),
            "--only" => only = Some(value()),
            "--out" => out = Some(PathBuf::from(value())),
            _ => panic!("unknown option {argument}: see scripts/bench --help"),
        }
    }
    let program =
        PathBuf::from(std::env::var_os("MIGRATE_PROGRAM").expect("MIGRATE_PROGRAM names the binary"));
    let cases: Vec<_> =
        CASES.iter().filter(|case| only.as_deref().is_none_or(|only| case.name.contains(only))).collect();
    let mut samples: Vec<Vec<Value>> = vec![Vec::new(); cases.len()];
    for run in 0..runs {
        for (case, samples) in cases.iter().zip(&mut samples) {
            let mut sample = measure(&program, case, run);
            sample["raw_pipe_bytes_per_s"] = raw_pipe(&program);
            eprintln!("{} run {run}: {sample}", case.name);
            samples.push(sample);
        }
    }
    let results: Vec<_> = cases.iter().zip(&samples).map(|(case, samples)| summary(case, samples)).collect();
    let result = json!({
        "commit": output("git", &["describe", "--always", "--dirty"]),
        "kernel": output("uname", &["-sr"]),
        "cpu": cpu(),
        "cores": std::thread::available_parallelism().map_or(0, usize::from),
        "date": output("date", &["-u", "+%Y-%m-%dT%H:%M:%SZ"]),
        "runs": runs,
        "seeds": (1..=runs).collect::<Vec<u64>>(),
        "results": results,
        "samples": cases.iter().zip(&samples).map(|(case, samples)| json!({"case": case.name, "samples": samples})).collect::<Vec<_>>(),
    });
    if let Some(out) = out {
        std::fs::write(&out, format!("{result:#}\n")).expect("the result file can be written");
    }
    table(&cases, &results);
}

/// Moves one guest once.
fn measure(program: &Path, case: &Case, run: u64) -> Value {
    let (a, b) = trusting_pair(program);
    let cmdline = format!("{} seed={} report_ms=0", case.cmdline, run + 1);
    a.run_ledger("bench", case.memory, &cmdline, &["--serial", "none"]);
    let source = Window::open(a.vm_pid("bench")).expect("the guest's memory");
    wait_running(&source);
    let (speed_before, gap_before_us) = undisturbed(&source);

    touch(case.memory_mib);
    let (receiver, address) = b.receive(&["--serial", "none"]);
    let receiver_memory = MemoryWatch::start(receiver.pid());
    let start = source.stats().expect("stats");
    let mut sender = a.start(&["send", "bench", &address]);
    let sender_memory = MemoryWatch::start(sender.pid());
    let (during, frozen_tsc) = speed_of_rounds(&mut sender, &source, start.iterations, start.tsc_last);
    let sent = sender.finish().success();
    receiver.finish().success();

    let report = sent.event("report").cloned().unwrap_or_else(|| panic!("{sent:#?}"));
    let arrived = Window::open(b.vm_pid("bench")).expect("the guest's memory");
    std::thread::sleep(Duration::from_millis(50));
    let after = arrived.stats().expect("stats");
    let gap_since = |tsc| after.longest_gap_since(tsc).and_then(|gap| after.us(gap.cycles));
    // No gap longer than two ticks: then two ticks bound it.
    let bound_us = 2 * after.tick_us;
    // The gap that the freeze is part of is the first that ends behind it, and what comes later is the destination's.
    let frozen = after.gaps.iter().find(|gap| gap.tsc_end > frozen_tsc).and_then(|gap| after.us(gap.cycles));
    if std::env::var_os("BENCH_GAPS").is_some() {
        let ms = |cycles: u64| after.us(cycles).unwrap_or(0) as f64 / 1e3;
        for gap in after.gaps.iter().filter(|gap| gap.tsc_end > start.tsc_last) {
            let at = ms(gap.tsc_end.saturating_sub(start.tsc_last));
            eprintln!(
                "gap of {:.2} ms ends at {at:.2} ms; frozen at {:.2} ms",
                ms(gap.cycles),
                ms(frozen_tsc - start.tsc_last)
            );
        }
    }
    b.assert_sound("bench");
    let first = &report["rounds"][0];
    json!({
        "total_us": report["total_us"],
        "downtime_engine_us": report["downtime_us"],
        "downtime_guest_us": frozen.unwrap_or(bound_us),
        "longest_gap_us": gap_since(start.tsc_last).unwrap_or(bound_us),
        "longest_gap_undisturbed_us": gap_before_us,
        "rounds": report["rounds"].as_array().map(Vec::len),
        "first_round_bytes_per_s": first["rate_bytes_per_s"],
        "sent_bytes": report["sent_bytes"],
        "sender_rss_kib": sender_memory.stop(),
        "receiver_rss_kib": receiver_memory.stop(),
        "guest_mb_per_s_undisturbed": speed_before,
        "guest_mb_per_s_in_rounds": during,
    })
}

fn wait_running(window: &Window) {
    let until = Instant::now() + Duration::from_secs(60);
    while window.stats().is_none_or(|stats| stats.state != ledger::State::Running) {
        assert!(Instant::now() < until, "the guest does not get to run");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// MB/s that the guest writes, and its longest gap, with nothing else going on, for one second.
fn undisturbed(window: &Window) -> (f64, u64) {
    std::thread::sleep(Duration::from_millis(500));
    let begin = window.stats().expect("stats");
    std::thread::sleep(Duration::from_secs(1));
    let end = window.stats().expect("stats");
    let gap = end.longest_gap_since(begin.tsc_last).and_then(|gap| end.us(gap.cycles));
    (speed(&begin, &end), gap.unwrap_or(2 * end.tick_us))
}

fn speed(begin: &ledger::Stats, end: &ledger::Stats) -> f64 {
    let us = end.us(end.tsc_last.saturating_sub(begin.tsc_last)).unwrap_or(0).max(1);
    (end.bytes_written - begin.bytes_written) as f64 / us as f64
}

/// MB/s that the guest writes from the start of the migration until it is frozen, and the tsc of its last tick then.
fn speed_of_rounds(sender: &mut Running, window: &Window, iterations: u64, tsc: u64) -> (f64, u64) {
    sender.wait_for("the freeze", |line| line["event"] == "phase" && line["phase"] == "freeze");
    // The guest stands still now: its stats are those of the freeze.
    let Some(end) = window.stats() else { return (0.0, tsc) };
    let us = end.us(end.tsc_last.saturating_sub(tsc)).unwrap_or(0).max(1);
    (((end.iterations - iterations) * ledger::PAGE_SIZE) as f64 / us as f64, end.tsc_last)
}

/// The same quinn settings with no guest behind them, in bytes per second.
fn raw_pipe(program: &Path) -> Value {
    let (a, b) = trusting_pair(program);
    let mut receiver = b.start(&["bench-pipe", "receive", "--listen", "127.0.0.1:0"]);
    let listening = receiver.wait_event("listening");
    let address = listening["address"].as_str().expect("an address").to_owned();
    let sent = a.run(&["bench-pipe", "send", &address, "--mib", "768"]).success();
    receiver.finish().success();
    sent.lines.last().map_or(Value::Null, |line| line["bytes_per_second"].clone())
}

/// Touches memory and gives it back: the host behind this machine takes far longer for a first touch than the
/// machine's own kernel does, which would be measured instead of us.
fn touch(mib: usize) {
    let mut memory = vec![0_u8; mib << 20];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// Watches the memory of a process, guest pages (shared memory) aside.
struct MemoryWatch {
    stop: Arc<AtomicBool>,
    most_kib: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MemoryWatch {
    fn start(pid: i32) -> Self {
        let (stop, most_kib) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = {
            let (stop, most_kib) = (stop.clone(), most_kib.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
                    let field = |name: &str| {
                        let line = status.lines().find(|line| line.starts_with(name))?;
                        line.split_whitespace().nth(1)?.parse::<u64>().ok()
                    };
                    let kib = field("RssAnon:").unwrap_or(0) + field("RssFile:").unwrap_or(0);
                    most_kib.fetch_max(kib, Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(10));
                }
            })
        };
        Self { stop, most_kib, thread: Some(thread) }
    }

    fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
        self.most_kib.load(Ordering::Relaxed)
    }
}

fn summary(case: &Case, samples: &[Value]) -> Value {
    let mut result = json!({ "case": case.name, "guest": case.cmdline, "memory": case.memory });
    let Some(names) = samples.first().and_then(Value::as_object) else { return result };
    for name in names.keys() {
        let mut values: Vec<f64> = samples.iter().filter_map(|sample| sample[name].as_f64()).collect();
        values.sort_by(f64::total_cmp);
        if let (Some(least), Some(most)) = (values.first(), values.last()) {
            result[name] = json!({ "median": values[values.len() / 2], "least": least, "most": most });
        }
    }
    result
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
        "in rounds"
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
            median("guest_mb_per_s_in_rounds"),
        )
        .ok();
    }
}

fn output(program: &str, arguments: &[&str]) -> String {
    let output = std::process::Command::new(program).args(arguments).output();
    output.map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned()).unwrap_or_default()
}

fn cpu() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = info.lines().find_map(|line| line.strip_prefix("model name")?.split_once(": "));
    model.map(|(_, name)| name.to_owned()).unwrap_or_default()
}

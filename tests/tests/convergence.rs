//! Busy guests over a link that is too slow for them, and what was forecast against what came.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Finished, Host, trusting_pair, without_kvm};
use serde_json::Value;
use std::path::Path;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// Slow enough that the guest is faster, on any host that runs these tests.
const LINK: [&str; 2] = ["--bandwidth", "60MB/s"];

/// How often a guest is moved until it did what a test looks for.
const MOVES: u32 = 4;

fn pair(cmdline: &str) -> (Host, Host) {
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "128MiB", cmdline, &[]);
    a.wait_ledger_running("v");
    (a, b)
}

fn send(a: &Host, address: &str, more: &[&str]) -> Finished {
    a.run(&[&["send", "v", address][..], &LINK, more].concat())
}

fn report(sent: &Finished) -> Value {
    sent.event("report").unwrap_or_else(|| panic!("{sent:#?}")).clone()
}

fn throttles(report: &Value) -> Vec<u64> {
    let rounds = report["rounds"].as_array().expect("rounds");
    rounds.iter().map(|round| round["throttle_percent"].as_u64().expect("a number")).collect()
}

fn forecast(a: &Host) -> Value {
    let estimated = a.run(&[&["estimate", "v"][..], &LINK].concat()).success();
    let estimate = estimated.event("estimate").unwrap_or_else(|| panic!("{estimated:#?}")).clone();
    let forecasts = estimate["forecasts"].as_array().expect("forecasts");
    assert_eq!(forecasts.len(), 1, "{estimate:#}");
    forecasts[0].clone()
}

/// The trace of a move is decided again as it was decided then.
fn replays_alike(a: &Host, trace: &str, sent: &Finished) {
    let replayed = a.run(&["replay", trace]).success();
    let decision = |one: &Value| ["decision", "predicted_us", "percent"].map(|name| one[name].clone());
    let told = |lines: &[Value], event: &str| -> Vec<Value> {
        lines.iter().filter(|line| line["event"] == event).cloned().collect()
    };
    let then: Vec<_> = told(&sent.lines, "decided").iter().map(|line| decision(&line["decided"])).collect();
    let now: Vec<_> = told(&replayed.lines, "decision").iter().map(decision).collect();
    assert!(then.len() > 2, "{sent:#?}");
    assert_eq!(now, then);
}

#[test]
fn a_guest_that_outruns_the_link_moves_only_when_it_is_slowed_down() {
    if without_kvm("a_guest_that_outruns_the_link_moves_only_when_it_is_slowed_down") {
        return;
    }
    let (a, b) = pair("fill=32M ws=16M rate=400 scrub=0");
    let (receiver, address) = b.receive(&[]);
    let stays = send(&a, &address, &["--on-stall", "cancel"]);
    assert_eq!(stays.code, 9, "{stays:#?}");
    let failed = report(&stays);
    assert!(throttles(&failed).iter().all(|percent| *percent == 0), "{failed:#}");
    a.assert_sound("v");

    let trace = a.path("trace").display().to_string();
    let sent =
        send(&a, &address, &["--on-stall", "throttle,cancel", "--max-throttle", "99", "--trace", &trace]);
    receiver.finish().success();
    let sent = sent.success();
    replays_alike(&a, &trace, &sent);
    let moved = report(&sent);
    assert!(throttles(&moved).iter().any(|percent| *percent > 0), "{moved:#}");
    assert_eq!(moved["warnings"], Value::Array(vec![]), "within the budget: {moved:#}");
    b.assert_sound("v");
    let vm = b.vms().into_iter().find(|vm| vm["name"] == "v").expect("it runs at B");
    assert_eq!(vm["throttle_percent"], 0, "it is free there");
}

#[test]
fn a_sender_that_dies_leaves_no_slow_guest_behind() {
    if without_kvm("a_sender_that_dies_leaves_no_slow_guest_behind") {
        return;
    }
    let (a, b) = pair("fill=32M ws=16M rate=400 scrub=0");
    let (_receiver, address) = b.receive(&[]);
    let mut args = vec!["send", "v", &address, "--on-stall", "throttle", "--downtime", "1us"];
    args.extend(LINK);
    let sender = a.start(&args);
    let throttle = || a.vms()[0]["throttle_percent"].as_u64().expect("a number");
    let until = std::time::Instant::now() + e2e::process::STEP_LIMIT;
    while throttle() == 0 {
        assert!(std::time::Instant::now() < until, "it is never slowed down");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    sender.signal(rustix::process::Signal::KILL);
    while throttle() != 0 {
        assert!(std::time::Instant::now() < until, "it stays slow");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    a.assert_sound("v");
}

#[test]
fn hot_pages_wait_for_the_others_and_arrive() {
    if without_kvm("hot_pages_wait_for_the_others_and_arrive") {
        return;
    }
    // 491 pages that are written all the time, and others that are written now and then. A guest that waits for a CPU while it
    // is moved does not write them, and then nothing waits.
    for _ in 0..MOVES {
        let (a, b) = pair("fill=80M ws=64M rate=25 scrub=0 pattern=hot hot_pages=3 hot_writes=80");
        let (receiver, address) = b.receive(&[]);
        let sent = a.run(&["send", "v", &address, "--bandwidth", "20MB/s", "--on-timeout", "force"]);
        let report = report(&sent.success());
        receiver.finish().success();
        b.assert_sound("v");
        let rounds = report["rounds"].as_array().expect("rounds");
        let number = |round: &Value, name: &str| round[name].as_u64().expect("a number");
        let Some(at) = rounds.iter().position(|round| number(round, "held_pages") > 0) else { continue };
        let (held, remaining) = (number(&rounds[at], "held_pages"), number(&rounds[at], "remaining_pages"));
        assert!(held >= 256 && remaining >= 2 * held, "{report:#}");
        assert_eq!(number(&rounds[at + 1], "dirty_pages"), remaining - held, "{report:#}");
        let last = rounds.last().expect("a round");
        assert_eq!(number(last, "held_pages"), 0, "{report:#}");
        return;
    }
    panic!("in {MOVES} moves nothing waited");
}

#[test]
fn a_forecast_is_near_what_comes() {
    if without_kvm("a_forecast_is_near_what_comes") {
        return;
    }
    let (a, b) = pair("fill=48M ws=16M rate=10 scrub=0");
    let forecast = forecast(&a);
    assert_eq!(forecast["converges"], true, "{forecast:#}");
    a.assert_sound("v");
    let (receiver, address) = b.receive(&[]);
    let report = report(&send(&a, &address, &[]).success());
    receiver.finish().success();
    b.assert_sound("v");
    let live = report["rounds"].as_array().expect("rounds").len() as f64 - 1.0;
    let rounds_us: u64 = report["rounds"]
        .as_array()
        .expect("rounds")
        .iter()
        .map(|round| round["duration_us"].as_u64().expect("a number"))
        .sum();
    let near = |what: &str, forecast: f64, came: f64| {
        assert!(
            forecast <= came * 3.0 && came <= forecast * 3.0,
            "{what}: {forecast} was forecast, {came} came\n{report:#}"
        );
    };
    let number = |value: &Value| value.as_f64().expect("a number");
    near("rounds", number(&forecast["rounds"]), live);
    near("time", number(&forecast["total_us"]), rounds_us as f64);
    near("bytes", number(&forecast["sent_bytes"]), number(&report["sent_bytes"]));
}

#[test]
fn a_forecast_counts_what_packs() {
    if without_kvm("a_forecast_counts_what_packs") {
        return;
    }
    let (a, b) = pair("fill=48M ws=16M rate=10 scrub=0 content=text");
    let estimated = a.run(&[&["estimate", "v"][..], &LINK].concat()).success();
    let estimate = estimated.event("estimate").unwrap_or_else(|| panic!("{estimated:#?}"));
    let number = |value: &Value| value.as_f64().unwrap_or_else(|| panic!("{value} in {estimate:#}"));
    let memory = &estimate["memory"];
    assert!(number(&memory["sampled_pages"]) >= 512.0, "{estimate:#}");
    assert!(number(&memory["zstd_part"]) < 0.6 && number(&memory["lz4_part"]) < 0.8, "{estimate:#}");
    assert!(number(&estimate["dirtied"]["sampled_pages"]) > 0.0, "{estimate:#}");
    let forecast = &estimate["forecasts"][0];
    let (receiver, address) = b.receive(&[]);
    let report = report(&send(&a, &address, &[]).success());
    receiver.finish().success();
    b.assert_sound("v");
    let (told, came) = (number(&forecast["sent_bytes"]), number(&report["sent_bytes"]));
    // The engine begins raw and finds out by trying, so it sends some more.
    assert!(came < 48e6 && told < 48e6, "{told} was forecast, {came} came\n{estimate:#}\n{report:#}");
    assert!(
        told <= came * 2.0 && came <= told * 2.5,
        "{told} was forecast, {came} came\n{estimate:#}\n{report:#}"
    );
}

#[test]
fn a_forecast_says_what_does_not_converge_and_the_path_is_measured() {
    if without_kvm("a_forecast_says_what_does_not_converge_and_the_path_is_measured") {
        return;
    }
    let (a, b) = pair("fill=32M ws=16M rate=400 scrub=0");
    let slow = ["--bandwidth", "10MB/s", "--on-stall", "cancel"];
    let estimated = a.run(&[&["estimate", "v"][..], &slow].concat()).success();
    let stuck = &estimated.event("estimate").unwrap_or_else(|| panic!("{estimated:#?}"))["forecasts"][0];
    assert_eq!((&stuck["converges"], &stuck["decision"]), (&false.into(), &"give-up".into()), "{stuck:#}");
    let follows = a.run(&["estimate", "v", "--bandwidth", "10MB/s", "--on-stall", "post-copy"]).success();
    let follows = &follows.event("estimate").unwrap_or_else(|| panic!("{follows:#?}"))["forecasts"][0];
    assert_eq!(follows["decision"], "post-copy", "{follows:#}");
    assert!(follows["follow_us"].as_u64() > Some(0), "{follows:#}");
    let (_receiver, address) = b.receive(&[]);
    let stays = a.run(&[&["send", "v", address.as_str()][..], &slow].concat());
    assert_eq!(stays.code, 9, "{stays:#?}");
    let estimated = a.run(&["estimate", "v", &address, "--sample", "200ms"]).success();
    let estimate = estimated.event("estimate").unwrap_or_else(|| panic!("{estimated:#?}")).clone();
    let measured = estimate["forecasts"][0]["bandwidth_bytes_per_s"].as_u64().expect("a number");
    assert!(measured > 20_000_000, "loopback does more: {estimate:#}");
    assert_eq!(estimate["intervals"].as_array().expect("intervals").len(), 5);
    let dirty: u64 = estimate["regions"]
        .as_array()
        .expect("regions")
        .iter()
        .map(|region| region["dirty_pages"].as_u64().expect("a number"))
        .sum();
    assert!(dirty > 0, "{estimate:#}");
    a.assert_sound("v");
}

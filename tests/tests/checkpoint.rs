//! Real guests are written down while they run, and what lies in the store is what they were.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::process::{Finished, STEP_LIMIT};
use e2e::{Host, trusting_pair, without_kvm};
use rustix::process::Signal;
use serde_json::Value;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

const BUSY: &str = "fill=64M ws=32M rate=40 pattern=uniform seed=5";

/// A host with a ledger guest `v` that writes, and the place of a store that is not there yet.
fn scene(cmdline: &str) -> (Host, String) {
    let host = Host::new(Path::new(PROGRAM));
    host.run_ledger("v", "128MiB", cmdline, &[]);
    host.wait_ledger_running("v");
    let store = host.path("store").to_string_lossy().into_owned();
    (host, store)
}

fn report(finished: &Finished) -> Value {
    finished.event("checkpoint").unwrap_or_else(|| panic!("{finished:#?}")).clone()
}

fn take(host: &Host, store: &str, more: &[&str]) -> Value {
    report(&host.run(&[&["checkpoint", "v", "--store", store][..], more].concat()).success())
}

fn number(report: &Value, name: &str) -> u64 {
    report[name].as_u64().unwrap_or_else(|| panic!("{name} of {report:#}"))
}

/// Restores a checkpoint and lets the guest and the computation from outside judge its memory.
fn assert_restores(host: &Host, store: &str, id: &str, name: &str) {
    let restored = host.run(&["restore", "--store", store, id, "--name", name]);
    assert_eq!(restored.code, 0, "{restored:#?}");
    host.assert_sound(name);
    host.run(&["vm", "stop", name]).success();
}

/// What is served at `http://ADDR/metrics`.
fn scrape(url: &str) -> String {
    let address = url.strip_prefix("http://").and_then(|rest| rest.strip_suffix("/metrics")).expect("a URL");
    let mut stream = TcpStream::connect(address).expect("a connection");
    stream.set_read_timeout(Some(STEP_LIMIT)).expect("a limit");
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n").expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    answer
}

fn id(report: &Value) -> &str {
    report["id"].as_str().unwrap_or_else(|| panic!("{report:#}"))
}

#[test]
fn a_guest_that_writes_is_written_down_and_every_link_of_the_chain_is_sound() {
    if without_kvm("a_guest_that_writes_is_written_down_and_every_link_of_the_chain_is_sound") {
        return;
    }
    let (host, store) = scene(BUSY);
    let full = take(&host, &store, &[]);
    assert!(full["committed"] == true && full["parent"].is_null(), "{full:#}");
    assert!(number(&full, "data_pages") >= (64 << 20) / 4096, "{full:#}");
    let mut links = vec![full];
    for _ in 0..3 {
        let delta = take(&host, &store, &[]);
        assert_eq!(delta["parent"], links[links.len() - 1]["id"], "{delta:#}");
        assert_eq!(number(&delta, "deltas"), links.len() as u64);
        // Half of the memory is never written again.
        assert!(number(&delta, "data_pages") < number(&links[0], "data_pages") * 3 / 4, "{delta:#}");
        assert!(number(&delta, "pause_us") > 0 && number(&delta, "data_pages") > 0, "{delta:#}");
        host.assert_sound("v");
        links.push(delta);
    }
    let again = take(&host, &store, &["--full"]);
    assert!(again["parent"].is_null(), "{again:#}");
    links.push(again);
    for link in &links {
        assert_restores(&host, &store, id(link), "r");
    }
    host.assert_sound("v");
}

#[test]
fn text_takes_less_room_than_it_has() {
    if without_kvm("text_takes_less_room_than_it_has") {
        return;
    }
    let (host, store) = scene("fill=64M ws=16M rate=10 content=text");
    let report = take(&host, &store, &[]);
    assert!(number(&report, "stored_bytes") < number(&report, "written_pages") * 4096 / 2, "{report:#}");
    assert_restores(&host, &store, "latest", "r");
}

#[test]
fn killed_in_any_phase_it_leaves_the_guest_running_and_the_next_checkpoint_right() {
    if without_kvm("killed_in_any_phase_it_leaves_the_guest_running_and_the_next_checkpoint_right") {
        return;
    }
    let (host, store) = scene(BUSY);
    let mut last = take(&host, &store, &[]);
    for phase in ["track", "rounds", "freeze", "state", "write", "commit"] {
        let mut taking = host.start_held(&["checkpoint", "v", "--store", &store], phase);
        taking.wait_held();
        taking.signal(Signal::KILL);
        let killed = taking.finish();
        assert!(killed.event("checkpoint").is_none(), "{phase}: {killed:#?}");
        host.wait_phase("v", Some("running"));
        host.assert_sound("v");
        let next = take(&host, &store, &[]);
        assert_eq!(next["parent"], last["id"], "killed in {phase}: {next:#}");
        last = next;
    }
    assert_restores(&host, &store, "latest", "r");
}

#[test]
fn interrupted_it_leaves_nothing_and_says_so() {
    if without_kvm("interrupted_it_leaves_nothing_and_says_so") {
        return;
    }
    let (host, store) = scene(BUSY);
    let mut taking = host.start_held(&["checkpoint", "v", "--store", &store], "rounds");
    taking.wait_held();
    taking.signal(Signal::INT);
    taking.signal(Signal::CONT);
    let interrupted = taking.finish();
    assert_eq!(interrupted.code, 130, "{interrupted:#?}");
    assert_eq!(report(&interrupted)["committed"], false);
    let objects = |folder: &str| std::fs::read_dir(Path::new(&store).join(folder)).map_or(0, Iterator::count);
    assert_eq!(objects("checkpoints"), 0);
    host.assert_sound("v");
    take(&host, &store, &[]);
    assert_restores(&host, &store, "latest", "r");
}

#[test]
fn a_suspended_guest_goes_on_elsewhere_where_it_stood() {
    if without_kvm("a_suspended_guest_goes_on_elsewhere_where_it_stood") {
        return;
    }
    let (host, store) = scene(BUSY);
    let before = host.ledger("v")["iterations"].as_u64();
    let report = take(&host, &store, &["--suspend"]);
    assert_eq!(report["suspended"], true, "{report:#}");
    host.wait_phase("v", None);
    let other = Host::new(Path::new(PROGRAM));
    other.run(&["restore", "--store", &store, "v"]).success();
    other.assert_sound("v");
    assert!(other.ledger("v")["iterations"].as_u64() >= before);
}

#[test]
fn a_series_goes_on_until_it_is_interrupted() {
    if without_kvm("a_series_goes_on_until_it_is_interrupted") {
        return;
    }
    let (host, store) = scene(BUSY);
    let words = [
        "checkpoint",
        "v",
        "--store",
        &store,
        "--every",
        "300ms",
        "--max-deltas",
        "2",
        "--recovery-time",
        "1h",
    ];
    let mut series = host.start(&words);
    let mut kinds = Vec::new();
    for _ in 0..5 {
        let taken = series.wait_event("checkpoint");
        assert_eq!(taken["committed"], true, "{taken:#}");
        kinds.push(taken["deltas"].as_u64());
    }
    assert_eq!(kinds, [0, 1, 2, 0, 1].map(Some));
    // Between two checkpoints neither the VM nor the store is held.
    let other = take(&host, &store, &[]);
    assert_eq!(other["committed"], true);
    series.signal(Signal::INT);
    let ended = series.finish();
    assert_eq!(ended.code, 0, "{ended:#?}");
    let told = ended.event("series").unwrap_or_else(|| panic!("{ended:#?}"));
    assert!(number(told, "taken") >= 5 && number(told, "failed") == 0, "{told:#}");
    host.assert_sound("v");
    assert_restores(&host, &store, "latest", "r");
}

#[test]
fn a_series_is_seen_scraped_and_ended_from_outside() {
    if without_kvm("a_series_is_seen_scraped_and_ended_from_outside") {
        return;
    }
    let (host, store) = scene(BUSY);
    let words = ["checkpoint", "v", "--store", &store, "--every", "5s", "--metrics", "127.0.0.1:0"];
    let mut series = host.start(&words);
    let served = series.wait_event("metrics");
    let taken = series.wait_event("checkpoint");
    let until = Instant::now() + STEP_LIMIT;
    let status = loop {
        let asked = host.run(&["status", "v"]).success();
        let status = asked.event("series-status").unwrap_or_else(|| panic!("{asked:#?}")).clone();
        if status["phase"] == "waiting" && number(&status, "taken") == 1 {
            break status;
        }
        assert!(Instant::now() < until, "{status:#}");
        std::thread::sleep(Duration::from_millis(20));
    };
    assert_eq!(status["last"]["id"], taken["id"], "{status:#}");
    assert!(number(&status, "next_us") <= 5_000_000 && status["failure"].is_null(), "{status:#}");
    assert!(host.run(&["status"]).success().event("series-status").is_some());
    let page = scrape(served["url"].as_str().unwrap_or_default());
    for line in [
        "migrate_checkpoints_total{vm=\"v\",outcome=\"committed\"} 1",
        "migrate_checkpoint_interval_seconds{vm=\"v\"} 5.0",
    ] {
        assert!(page.lines().any(|found| found == line), "{line}\n{page}");
    }
    // It is no migration: there is nothing to set.
    assert_eq!(host.run(&["set", "v", "--downtime", "1ms"]).code, 4);
    let cancelled = host.run(&["cancel", "v"]).success();
    assert_eq!(cancelled.event("cancelled").map(|told| told["taken"].clone()), Some(1.into()));
    let ended = series.finish();
    assert_eq!(ended.code, 0, "{ended:#?}");
    assert_eq!(ended.event("series").map(|told| told["taken"].clone()), Some(1.into()));
    assert_eq!(host.run(&["status", "v"]).code, 4);
    host.assert_sound("v");
    assert_restores(&host, &store, "latest", "r");
}

#[test]
fn a_store_without_space_costs_a_checkpoint_and_nothing_else() {
    if without_kvm("a_store_without_space_costs_a_checkpoint_and_nothing_else") {
        return;
    }
    // Its runtime directory lies on a small disk: what is in there has 24 MiB.
    let host = Host::new(Path::new(PROGRAM)).with_small_disk(24 << 20);
    host.run_ledger("v", "128MiB", BUSY, &[]);
    host.wait_ledger_running("v");
    let small = host.runtime_dir().join("store").to_string_lossy().into_owned();
    let failed = host.run(&["checkpoint", "v", "--store", &small]);
    assert_eq!(failed.code, 12, "{failed:#?}");
    let error = failed.event("error").unwrap_or_else(|| panic!("{failed:#?}"));
    assert!(error["message"].as_str().is_some_and(|text| text.contains("space")), "{error:#}");
    host.assert_sound("v");
    let good = host.path("store").to_string_lossy().into_owned();
    take(&host, &good, &[]);
    assert_restores(&host, &good, "latest", "r");
}

#[test]
fn whoever_holds_the_guest_or_the_store_is_named_and_a_move_between_two_checkpoints_harms_none() {
    if without_kvm(
        "whoever_holds_the_guest_or_the_store_is_named_and_a_move_between_two_checkpoints_harms_none",
    ) {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "128MiB", BUSY, &[]);
    a.wait_ledger_running("v");
    let store = a.path("store").to_string_lossy().into_owned();
    let first = take(&a, &store, &[]);

    let (receiver, address) = b.receive(&[]);
    let mut sender = a.start_held(&["send", "v", &address], "rounds");
    sender.wait_held();
    let refused = a.run(&["checkpoint", "v", "--store", &store]);
    assert_eq!(refused.code, 4, "{refused:#?}");
    assert!(refused.stderr.contains("migrate send"), "{refused:#?}");
    sender.signal(Signal::INT);
    sender.signal(Signal::CONT);
    assert_eq!(sender.finish().code, 130);
    drop(receiver);

    // A move that failed gave back what it took, so this is a delta, and right.
    let second = take(&a, &store, &[]);
    assert_eq!(second["parent"], first["id"], "{second:#}");
    assert_restores(&a, &store, id(&second), "r");

    let mut holder = a.start_held(&["checkpoint", "v", "--store", &store], "rounds");
    holder.wait_held();
    a.run_ledger("w", "64MiB", "fill=16M ws=4M rate=0", &[]);
    a.wait_ledger_running("w");
    let refused = a.run(&["checkpoint", "w", "--store", &store, "--wait", "100ms"]);
    assert_eq!(refused.code, 12, "{refused:#?}");
    assert!(refused.stderr.contains("migrate checkpoint v"), "{refused:#?}");
    holder.signal(Signal::CONT);
    holder.finish().success();
    a.run(&["checkpoint", "w", "--store", &store]).success();
}

#[test]
fn a_move_that_begins_with_a_checkpoint_carries_what_was_written_since() {
    if without_kvm("a_move_that_begins_with_a_checkpoint_carries_what_was_written_since") {
        return;
    }
    const MEMORY: u64 = 96 << 20;
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    // Random memory, of which a twelfth is written again: nothing but the checkpoint can save its bytes.
    a.run_ledger("v", "192MiB", "fill=96M ws=8M rate=4 pattern=uniform seed=9", &[]);
    a.wait_ledger_running("v");
    let store = a.path("store").to_string_lossy().into_owned();
    take(&a, &store, &[]);
    let (receiver, address) = b.receive(&["--seed-from", &store]);
    let sent = a.run(&["send", "v", &address, "--seed-from", &store]).success();
    receiver.finish().success();
    b.assert_sound("v");
    a.wait_phase("v", None);
    let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}"));
    println!("{} bytes, {} pages from the store", report["sent_bytes"], report["seeded_pages"]);
    assert!(number(report, "seeded_pages") > MEMORY / 2 / 4096, "{report:#}");
    assert!(number(report, "sent_bytes") < MEMORY / 4, "{report:#}");

    // The other end names no store: nothing is taken from one, and it moves back all the same.
    let (receiver, address) = a.receive(&[]);
    let back = b.run(&["send", "v", &address, "--seed-from", &store]).success();
    receiver.finish().success();
    a.assert_sound("v");
    let report = back.event("report").unwrap_or_else(|| panic!("{back:#?}"));
    assert_eq!(number(report, "seeded_pages"), 0, "{report:#}");
    assert!(number(report, "sent_bytes") > MEMORY / 2, "{report:#}");
}

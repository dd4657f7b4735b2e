//! The ledger guest, whose memory is checked by what it must hold.

use super::{LAB_FAILED, Pair};
use e2e::Host;
use rustix::process::Signal;
use serde_json::Value;
use std::time::Duration;

/// A guest on `host` that writes and checks what it wrote.
fn busy(host: &Host, more: &[&str]) {
    host.run_ledger("v", "64MiB", "fill=16M ws=4M rate=5 pattern=hot seed=3", more);
    host.wait_ledger_running("v");
}

/// Moves `v` and gives the sender's report.
fn hop(from: &Host, to: &Host, more: &[&str]) -> Value {
    let (receiver, address) = to.receive(&[]);
    let mut arguments = [&["send", "v", &address], more].concat();
    if !more.contains(&"--downtime") {
        // An emulated host takes tens of milliseconds for a fork.
        arguments.extend(["--downtime", "500ms"]);
    }
    let sent = from.run(&arguments).success();
    receiver.finish().success();
    from.wait_phase("v", None);
    to.assert_sound("v");
    let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}")).clone();
    assert_eq!(report["outcome"]["type"], "moved");
    println!("moved in {} us, down for {} us", report["total_us"], report["downtime_us"]);
    report
}

#[test]
fn a_busy_guest_moves_there_and_back() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_busy_guest_moves_there_and_back") else { return };
    busy(a, &[]);
    let before = a.ledger("v")["iterations"].as_u64();
    let report = hop(a, b, &[]);
    assert!(report["rounds"].as_array().expect("rounds").len() >= 2, "{report:#}");
    hop(b, a, &["--verify", "--downtime", "20s"]);
    assert!(a.ledger("v")["iterations"].as_u64() > before);
}

#[test]
fn four_vcpus_and_a_guest_that_never_rests_move_when_forced() {
    let Some(Pair { a, b, .. }) = &Pair::new("four_vcpus_and_a_guest_that_never_rests_move_when_forced")
    else {
        return;
    };
    a.run_ledger("v", "64MiB", "fill=8M ws=3M rate=max", &["--vcpus", "4"]);
    a.wait_ledger_running("v");
    // No downtime is short enough, so it goes on until it is forced: by the rounds that are allowed, or because they no longer help.
    let tight = ["--downtime", "1ms", "--max-downtime", "1ms", "--max-rounds", "3", "--on-timeout", "force"];
    let report = hop(a, b, &tight);
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    assert!((3..=4).contains(&rounds), "{report:#}");
}

#[test]
fn a_guest_moves_by_post_copy() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_guest_moves_by_post_copy") else { return };
    busy(a, &[]);
    let report = hop(a, b, &["--downtime", "1us", "--post-copy=1", "--on-timeout=post-copy"]);
    let phases = report["phases"].to_string();
    assert!(phases.contains("post-copy"), "{report:#}");
    assert_eq!(report["resumes"], 0, "{report:#}");
}

#[test]
fn a_killed_receiver_costs_nothing() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_killed_receiver_costs_nothing") else { return };
    busy(a, &[]);
    let (receiver, address) = b.receive(&[]);
    // So slow that it is killed in the rounds.
    let mut sender = a.start(&["send", "v", &address, "--bandwidth", "1MB/s", "--link-timeout", "3s"]);
    sender.wait_for("the rounds", |line| line["phase"] == "rounds");
    receiver.signal(Signal::KILL);
    let sent = sender.finish();
    assert!(![0, LAB_FAILED].contains(&sent.code), "{sent:#?}");
    b.wait_phase("v", None);
    a.assert_sound("v");
    hop(a, b, &[]);
}

#[test]
fn a_network_that_is_gone_for_a_while_does_not_end_a_move() {
    let Some(pair) = &Pair::new("a_network_that_is_gone_for_a_while_does_not_end_a_move") else { return };
    let Pair { a, b, .. } = pair;
    busy(a, &[]);
    let (receiver, address) = b.receive(&["--keep", "60s", "--link-timeout", "2s"]);
    let limits = ["--bandwidth", "4MB/s", "--link-timeout", "2s", "--retry-for", "60s", "--downtime", "2s"];
    let mut sender = a.start(&[&["send", "v", &address][..], &limits].concat());
    sender.wait_for("the rounds", |line| line["phase"] == "rounds");
    std::thread::sleep(Duration::from_secs(1));
    pair.plug_in(false);
    std::thread::sleep(Duration::from_secs(4));
    pair.plug_in(true);
    let sent = sender.finish().success();
    receiver.finish().success();
    assert!(sent.event("resumed").is_some(), "{sent:#?}");
    a.wait_phase("v", None);
    b.assert_sound("v");
}

#[test]
fn a_checkpoint_is_restored_on_the_other_host() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_checkpoint_is_restored_on_the_other_host") else { return };
    busy(a, &[]);
    let store = a.path("store").to_string_lossy().into_owned();
    for _ in ["full", "delta"] {
        a.run(&["checkpoint", "v", "--store", &store]).success();
    }
    let store = a.copy_to(b, "store").to_string_lossy().into_owned();
    for (name, lazy) in [("eager", None), ("lazy", Some("--lazy"))] {
        let mut arguments = vec!["restore", "--store", &store, "v", "--name", name];
        arguments.extend(lazy);
        let restored = b.run(&arguments).success();
        assert_eq!(restored.event("restored").expect("a report")["report"]["links"], 2);
        b.assert_sound(name);
    }
    a.assert_sound("v");
}

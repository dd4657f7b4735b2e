//! Real guests move between real processes, and say themselves that nothing was lost.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Host, trusting_pair, without_kvm};
use serde_json::Value;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

fn pair() -> (Host, Host) {
    trusting_pair(Path::new(PROGRAM))
}

/// Moves the VM `v` and gives the sender's report.
fn hop(from: &Host, to: &Host) -> Value {
    let (receiver, address) = to.receive(&[]);
    let sent = from.run(&["send", "v", &address]).success();
    let received = receiver.finish().success();
    let arrived = received.event("arrived").unwrap_or_else(|| panic!("{received:#?}"));
    assert_eq!(arrived["name"], "v");
    from.wait_phase("v", None);
    assert_eq!(to.phase("v").as_deref(), Some("running"));
    sent.event("report").unwrap_or_else(|| panic!("{sent:#?}")).clone()
}

fn moves_soundly(cmdline: &str, more: &[&str]) -> Value {
    let (a, b) = pair();
    a.run_ledger("v", "128MiB", cmdline, more);
    a.wait_ledger_running("v");
    let before = a.ledger("v")["iterations"].as_u64().expect("iterations");
    let report = hop(&a, &b);
    b.assert_sound("v");
    assert!(b.ledger("v")["iterations"].as_u64() >= Some(before));
    assert_eq!(report["outcome"]["type"], "moved");
    report
}

#[test]
fn an_idle_guest_moves() {
    if without_kvm("an_idle_guest_moves") {
        return;
    }
    let report = moves_soundly("fill=64M ws=16M rate=0", &[]);
    assert!(report["sent_pages"].as_u64().expect("pages") >= (64 << 20) / 4096, "{report:#}");
}

#[test]
fn a_busy_guest_moves_in_every_pattern() {
    if without_kvm("a_busy_guest_moves_in_every_pattern") {
        return;
    }
    for pattern in ["seq", "uniform", "hot"] {
        let report = moves_soundly(&format!("fill=64M ws=32M rate=40 pattern={pattern} seed=7"), &[]);
        assert!(report["rounds"].as_array().expect("rounds").len() >= 2, "{report:#}");
    }
}

#[test]
fn a_busy_guest_moves_over_two_connections() {
    if without_kvm("a_busy_guest_moves_over_two_connections") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "128MiB", "fill=64M ws=32M rate=40 seed=9", &[]);
    a.wait_ledger_running("v");
    let (receiver, address) = b.receive(&[]);
    let sent = a.run(&["send", "v", &address, "--connections", "2"]).success();
    receiver.finish().success();
    b.assert_sound("v");
    let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}")).clone();
    assert_eq!(report["outcome"]["type"], "moved");
    assert_eq!(report["connections"]["number"], 2, "{report:#}");
    assert_eq!(report["connections"]["reason"], "asked for");
}

#[test]
fn a_guest_that_writes_as_fast_as_it_can_moves_when_forced() {
    if without_kvm("a_guest_that_writes_as_fast_as_it_can_moves_when_forced") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "128MiB", "fill=64M ws=48M rate=max", &[]);
    a.wait_ledger_running("v");
    let (receiver, address) = b.receive(&[]);
    let limits = ["--max-rounds", "4", "--on-timeout", "force"];
    a.run(&[&["send", "v", address.as_str()][..], &limits].concat()).success();
    receiver.finish().success();
    b.assert_sound("v");
}

#[test]
fn zero_pages_cost_no_payload_and_text_moves() {
    if without_kvm("zero_pages_cost_no_payload_and_text_moves") {
        return;
    }
    let report = moves_soundly("fill=64M ws=16M rate=20 content=zero", &[]);
    let zero_pages = report["zero_pages"].as_u64().expect("pages");
    assert!(zero_pages > 0, "{report:#}");
    let most = (report["sent_pages"].as_u64().expect("pages") + 200) * 4200 + (64 << 10);
    assert!(report["sent_bytes"].as_u64().expect("bytes") < most, "{report:#}");
    moves_soundly("fill=32M ws=16M rate=20 content=text", &[]);
}

#[test]
fn text_moves_in_less_than_its_bytes_whichever_way_it_is_packed() {
    if without_kvm("text_moves_in_less_than_its_bytes_whichever_way_it_is_packed") {
        return;
    }
    for pack in ["lz4", "zstd", "all"] {
        let (a, b) = pair();
        a.run_ledger("v", "128MiB", "fill=64M ws=32M rate=20 pattern=hot content=text", &[]);
        a.wait_ledger_running("v");
        let (receiver, address) = b.receive(&[]);
        let sent = a.run(&["send", "v", &address, "--pack", pack, "--bandwidth", "4Gbit/s"]).success();
        receiver.finish().success();
        b.assert_sound("v");
        let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}"));
        let pages = report["sent_pages"].as_u64().expect("pages");
        assert!(report["packed_pages"].as_u64().expect("pages") > pages / 2, "{pack}: {report:#}");
        assert!(report["sent_bytes"].as_u64().expect("bytes") < pages * 4096 / 2, "{pack}: {report:#}");
    }
}

#[test]
fn memory_that_was_never_touched_is_neither_sent_nor_allocated() {
    if without_kvm("memory_that_was_never_touched_is_neither_sent_nor_allocated") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "2GiB", "fill=16M ws=8M rate=5", &[]);
    a.wait_ledger_running("v");
    let report = hop(&a, &b);
    assert!(report["sent_bytes"].as_u64().expect("bytes") < 128 << 20, "{report:#}");
    let kib = allocated_kib(&b);
    assert!(kib < 192 << 10, "{kib} KiB of guest memory are there at the destination");
    b.assert_sound("v");
}

/// Memory of the VM `v` that its host has given it, by the files that hold it.
fn allocated_kib(host: &Host) -> u64 {
    let files = std::fs::read_dir(format!("/proc/{}/fd", host.vm_pid("v"))).expect("the files of the VMM");
    let paths = files.filter_map(|file| Some(file.ok()?.path()));
    let memory = paths.filter(|path| {
        std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:"))
    });
    memory.map(|path| std::fs::metadata(path).expect("a memory file").blocks() / 2).sum()
}

#[test]
fn memory_is_compared_and_not_allocated_by_that() {
    if without_kvm("memory_is_compared_and_not_allocated_by_that") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "2GiB", "fill=48M ws=16M rate=20", &[]);
    a.wait_ledger_running("v");
    let before = allocated_kib(&a);
    assert!((48 << 10..1 << 20).contains(&before), "{before} KiB");
    let (receiver, address) = b.receive(&[]);
    let sent = a.run(&["send", "v", &address, "--verify", "--downtime", "20s"]).success();
    let received = receiver.finish().success();
    b.assert_sound("v");
    let after = allocated_kib(&b);
    assert!(after < before + (64 << 10), "{before} KiB were there, and {after} KiB are");
    let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}"));
    let verify_us = report["verify_us"].as_u64().expect("a time");
    assert!(verify_us > 0 && verify_us < report["downtime_us"].as_u64().expect("a time"), "{report:#}");
    assert_eq!(report["fixed"]["actual_us"], 0, "{report:#}");
    for lines in [&sent.lines, &received.lines] {
        assert!(lines.iter().any(|line| line["phase"] == "verify"), "{lines:#?}");
    }
    let refused = b.run(&["send", "v", &address, "--verify", "--post-copy"]);
    assert_eq!(refused.code, 2, "{refused:#?}");
    println!("compared in {verify_us} us");
}

#[test]
fn a_guest_with_several_vcpus_and_memory_above_4_gib_moves() {
    if without_kvm("a_guest_with_several_vcpus_and_memory_above_4_gib_moves") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "3100MiB", "fill=32M ws=8M rate=10", &["--vcpus", "4"]);
    a.wait_ledger_running("v");
    hop(&a, &b);
    let vm = b.vms().remove(0);
    assert_eq!(vm["vcpus"], 4);
    assert_eq!(vm["memory_bytes"], 3100_u64 << 20);
    b.assert_sound("v");
}

#[test]
fn a_guest_moves_there_and_back() {
    if without_kvm("a_guest_moves_there_and_back") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "96MiB", "fill=48M ws=16M rate=30", &[]);
    a.wait_ledger_running("v");
    hop(&a, &b);
    b.assert_sound("v");
    hop(&b, &a);
    a.assert_sound("v");
}

#[test]
fn ten_hops_in_a_row() {
    if without_kvm("ten_hops_in_a_row") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "64MiB", "fill=32M ws=8M rate=30 pattern=hot", &[]);
    a.wait_ledger_running("v");
    let before = a.ledger("v")["iterations"].as_u64().expect("iterations");
    for hop_number in 0..10 {
        let (from, to) = if hop_number % 2 == 0 { (&a, &b) } else { (&b, &a) };
        hop(from, to);
    }
    a.assert_sound("v");
    assert!(a.ledger("v")["iterations"].as_u64() > Some(before));
}

#[test]
fn a_guest_arrives_under_another_name() {
    if without_kvm("a_guest_arrives_under_another_name") {
        return;
    }
    let (a, b) = pair();
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let (receiver, address) = b.receive(&["--name", "w"]);
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("w");
}

#[test]
fn a_vm_is_known_by_its_socket_too() {
    if without_kvm("a_vm_is_known_by_its_socket_too") {
        return;
    }
    let (a, b) = pair();
    let socket = a.path("elsewhere.sock");
    let socket = socket.to_str().expect("a path");
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &["--socket", socket]);
    assert!(a.vms().is_empty(), "list looks into the runtime directory only");
    let shown = a.run(&["vm", "show", socket]).success();
    assert_eq!(shown.lines[0]["name"], "v");
    a.wait_ledger_running(socket);
    let (receiver, address) = b.receive(&[]);
    a.run(&["send", socket, &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
    b.run(&["vm", "stop", "v"]).success();
    assert!(b.vms().is_empty());
}

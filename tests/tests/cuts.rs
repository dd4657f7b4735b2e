//! The link is cut, loses packets, or carries garbage.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::relay::{Relay, Way, Weather};
use e2e::{Host, Running, trusting_pair, without_kvm};
use rustix::process::Signal;
use std::path::Path;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

fn scene(cmdline: &str) -> (Host, Host, Running, String) {
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", cmdline, &[]);
    a.wait_ledger_running("v");
    let (receiver, address) = b.receive(&["--link-timeout", "2s"]);
    (a, b, receiver, address)
}

#[test]
fn a_link_cut_in_any_phase_before_commit_leaves_the_source_running() {
    if without_kvm("a_link_cut_in_any_phase_before_commit_leaves_the_source_running") {
        return;
    }
    for phase in ["greet", "offer", "track", "rounds", "freeze", "state", "ready"] {
        println!("the link is cut when the sender enters {phase}");
        let (a, b, mut receiver, address) = scene("fill=24M ws=8M rate=30");
        let relay = Relay::start(&address, Weather::default(), 1);
        let mut sender = a.start_held(
            &["send", "v", &relay.address(), "--link-timeout", "2s", "--ask-timeout", "3s"],
            phase,
        );
        sender.wait_held();
        relay.cut(Way::Both);
        sender.signal(Signal::CONT);
        let sent = sender.finish();
        if phase == "ready" && sent.code == 10 {
            // Ready was on this host before the cut, so Commit was sent into it: asked past the cut, the receiver decides.
            assert_eq!(a.phase("v").as_deref(), Some("pledged"));
            a.run(&["recover", "v", "--at", &address]).success();
        } else {
            assert_eq!(sent.code, 7, "{phase}: {sent:#?}");
        }
        assert_eq!(a.phase("v").as_deref(), Some("running"), "{phase}");
        b.wait_phase("v", None);
        a.assert_sound("v");
        // The receiver took no harm: the next attempt, past the broken link, arrives.
        assert!(receiver.is_running());
        a.run(&["send", "v", &address]).success();
        receiver.finish().success();
        b.assert_sound("v");
    }
}

#[test]
fn a_link_cut_at_commit_is_asked_about_and_settled_when_it_is_back() {
    if without_kvm("a_link_cut_at_commit_is_asked_about_and_settled_when_it_is_back") {
        return;
    }
    let (a, b, receiver, address) = scene("fill=24M ws=8M rate=30");
    let relay = Relay::start(&address, Weather::default(), 1);
    let arguments = ["send", "v", &relay.address(), "--link-timeout", "2s", "--ask-timeout", "40s"];
    let mut sender = a.start_held(&arguments, "commit");
    sender.wait_held();
    relay.cut(Way::Both);
    sender.signal(Signal::CONT);
    sender.wait_for("the question", |line| line["event"] == "phase" && line["phase"] == "ask");
    assert_eq!(a.phase("v").as_deref(), Some("pledged"));
    relay.mend();
    let sent = sender.finish();
    // Whether Commit had arrived or not, exactly one of the two runs, and it is sound.
    if sent.code == 0 {
        receiver.finish().success();
        a.wait_phase("v", None);
        b.assert_sound("v");
    } else {
        assert_eq!(sent.code, 7, "{sent:#?}");
        assert_eq!(a.phase("v").as_deref(), Some("running"));
        b.wait_phase("v", None);
        a.assert_sound("v");
    }
}

#[test]
fn a_link_that_loses_packets_still_moves_the_guest_soundly() {
    if without_kvm("a_link_that_loses_packets_still_moves_the_guest_soundly") {
        return;
    }
    for seed in 1..=3 {
        println!("seed {seed}");
        let (a, b, receiver, address) = scene("fill=24M ws=8M rate=10");
        let relay = Relay::start(&address, Weather { lose_one_in: 50, ..Weather::default() }, seed);
        a.run(&["send", "v", &relay.address()]).success();
        receiver.finish().success();
        b.assert_sound("v");
    }
}

#[test]
fn a_link_that_dies_after_any_number_of_bytes_leaves_exactly_one() {
    if without_kvm("a_link_that_dies_after_any_number_of_bytes_leaves_exactly_one") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=16M ws=4M rate=20", &[]);
    a.wait_ledger_running("v");
    let (mut receiver, address) = b.receive(&["--link-timeout", "1s"]);
    for (seed, bytes) in [3_000, 9_000, 200_000, 5_000_000, 16_500_000].into_iter().enumerate() {
        println!("the link dies after {bytes} bytes");
        let weather = Weather { cut_after_bytes: bytes, ..Weather::default() };
        let relay = Relay::start(&address, weather, seed as u64);
        let sent = a.run(&["send", "v", &relay.address(), "--link-timeout", "1s", "--ask-timeout", "2s"]);
        assert_eq!(sent.code, 7, "{sent:#?}");
        assert_eq!(a.phase("v").as_deref(), Some("running"));
        b.wait_phase("v", None);
    }
    assert!(receiver.is_running());
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
}

#[test]
fn a_link_that_is_cut_for_seconds_is_taken_up_where_it_stood() {
    if without_kvm("a_link_that_is_cut_for_seconds_is_taken_up_where_it_stood") {
        return;
    }
    for round in [0, 1] {
        println!("the link is cut for 3 s in round {round}");
        let (a, b) = trusting_pair(Path::new(PROGRAM));
        a.run_ledger("v", "128MiB", "fill=96M ws=32M rate=30", &[]);
        a.wait_ledger_running("v");
        let (receiver, address) = b.receive(&["--link-timeout", "1s", "--keep", "60s"]);
        let relay = Relay::start(&address, Weather::default(), 1);
        // Slow enough that the cut comes in the middle of a round.
        let to = relay.address();
        let arguments =
            ["send", "v", &to, "--link-timeout", "1s", "--retry-for", "60s", "--bandwidth", "80MB/s"];
        let mut sender = a.start(&arguments);
        sender.wait_for("the round", |line| line["event"] == "round-begin" && line["round"] == round);
        sender.wait_for("some of it", |line| line["event"] == "progress" && line["round"] == round);
        relay.cut(Way::Both);
        sender.wait_for("the loss", |line| line["event"] == "link-lost");
        assert_eq!(a.phase("v").as_deref(), Some("running"), "it runs on without a link");
        std::thread::sleep(std::time::Duration::from_secs(3));
        relay.mend();
        let sent = sender.finish().success();
        receiver.finish().success();
        b.assert_sound("v");
        let report = sent.lines.last().expect("a report");
        assert_eq!(report["resumes"], 1, "{report:#}");
        let resumed = sent.lines.iter().find(|line| line["event"] == "resumed").expect("it was taken up");
        // A round may pass between the word of it and the cut.
        assert!(resumed["round"].as_u64() >= Some(round), "{resumed}");
        let (missing, all) = (resumed["missing_pages"].as_u64(), Some(128 << 8));
        assert!(missing < all, "{resumed}");
    }
}

//! Every process is killed in every phase. Before the commit point the source goes on and the next attempt is
//! correct; behind it the VM runs at the destination, or stands still until `migrate recover` has asked. Never two.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Host, Running, trusting_pair, without_kvm};
use rustix::process::Signal;
use std::path::Path;
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// The guest of these tests: small, so that the matrix is quick, and busy, so that a lost page shows.
const GUEST: &str = "fill=24M ws=8M rate=30 pattern=hot";

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Sender,
    Receiver,
    SourceVmm,
    DestinationVmm,
}

/// The sender's phases before it is pledged, in order, and whether a destination VMM is there by then.
const BEFORE_COMMIT: &[(&str, bool)] = &[
    ("greet", false),
    ("offer", false),
    ("track", true),
    ("rounds", true),
    ("freeze", true),
    ("verify", true),
    ("state", true),
    ("ready", true),
    ("pledge", true),
];

struct Scene {
    a: Host,
    b: Host,
    sender: Running,
    receiver: Running,
}

/// A migration whose sender has stopped itself on entering `phase`.
fn held_at(phase: &str) -> Scene {
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", GUEST, &[]);
    a.wait_ledger_running("v");
    let (receiver, address) = b.receive(&["--link-timeout", "2s"]);
    let mut words = vec!["send", "v", &address, "--link-timeout", "2s", "--ask-timeout", "3s"];
    if phase == "verify" {
        // Comparing memory is downtime, and a busy host shall not refuse it.
        words.extend(["--verify", "--downtime", "20s"]);
    }
    let mut sender = a.start_held(&words, phase);
    sender.wait_held();
    Scene { a, b, sender, receiver }
}

fn kill(pid: i32) {
    let pid = rustix::process::Pid::from_raw(pid).expect("a pid");
    rustix::process::kill_process(pid, Signal::KILL).expect("the victim is there");
}

impl Scene {
    fn kill(&self, victim: Victim) {
        match victim {
            Victim::Sender => self.sender.signal(Signal::KILL),
            Victim::Receiver => self.receiver.signal(Signal::KILL),
            Victim::SourceVmm => kill(self.a.vm_pid("v")),
            Victim::DestinationVmm => kill(self.b.vm_pid("v")),
        }
    }
}

/// The next attempt, over fresh processes, moves the VM, and the guest is sound at the other end.
fn next_attempt_is_correct(a: &Host, b: &Host) {
    b.wait_phase("v", None);
    let (receiver, address) = b.receive(&[]);
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    a.wait_phase("v", None);
    b.assert_sound("v");
}

fn dies_before_commit(victim: Victim) {
    if without_kvm(&format!("{victim:?} dies before commit")) {
        return;
    }
    for (phase, has_destination) in BEFORE_COMMIT {
        // A sender that has pledged and then finds nobody cannot know what became of its Commit: that is the doubt
        // which the tests below are about.
        let doubt = victim == Victim::Receiver && *phase == "pledge";
        if doubt || (victim == Victim::DestinationVmm && !has_destination) {
            continue;
        }
        println!("{victim:?} is killed when the sender enters {phase}");
        let scene = held_at(phase);
        scene.kill(victim);
        scene.sender.signal(Signal::CONT);
        let Scene { a, b, sender, receiver } = scene;
        let sent = sender.finish();
        assert_ne!(sent.code, 0, "{phase}: {sent:#?}");
        if victim == Victim::SourceVmm {
            // The VM died with its VMM; what matters is that no half of it runs at the destination.
            b.wait_phase("v", None);
            continue;
        }
        if victim == Victim::Receiver && *phase == "ready" && sent.code == 10 {
            // Its Ready was on this host before it died, so Commit was sent to nobody: a doubt, and not a second VM.
            assert_eq!(a.phase("v").as_deref(), Some("pledged"));
            b.wait_phase("v", None);
            a.run(&["recover", "v", "--resume"]).success();
        }
        a.wait_phase("v", Some("running"));
        assert_ne!(b.phase("v").as_deref(), Some("running"), "{phase}: two of them");
        a.assert_sound("v");
        drop(receiver);
        next_attempt_is_correct(&a, &b);
    }
}

#[test]
fn the_sender_dies_before_commit() {
    dies_before_commit(Victim::Sender);
}

#[test]
fn the_receiver_dies_before_commit() {
    dies_before_commit(Victim::Receiver);
}

#[test]
fn the_source_vmm_dies_before_commit() {
    dies_before_commit(Victim::SourceVmm);
}

#[test]
fn the_destination_vmm_dies_before_commit() {
    dies_before_commit(Victim::DestinationVmm);
}

#[test]
fn the_receiver_dies_in_each_of_its_own_phases() {
    if without_kvm("the_receiver_dies_in_each_of_its_own_phases") {
        return;
    }
    for phase in ["offer", "rounds", "state", "ready"] {
        println!("the receiver is killed when it enters {phase}");
        let (a, b) = trusting_pair(Path::new(PROGRAM));
        a.run_ledger("v", "64MiB", GUEST, &[]);
        a.wait_ledger_running("v");
        let (mut receiver, address) = b.receive_held(&["--link-timeout", "2s"], phase);
        let sender = a.start(&["send", "v", &address, "--link-timeout", "2s"]);
        receiver.wait_held();
        receiver.signal(Signal::KILL);
        receiver.finish();
        let sent = sender.finish();
        assert_eq!(sent.code, 7, "{phase}: {sent:#?}");
        assert_eq!(a.phase("v").as_deref(), Some("running"), "{phase}");
        a.assert_sound("v");
        next_attempt_is_correct(&a, &b);
    }
}

#[test]
fn a_receiver_that_dies_with_commit_unread_leaves_one_vm_and_at_most_a_doubt() {
    if without_kvm("a_receiver_that_dies_with_commit_unread_leaves_one_vm_and_at_most_a_doubt") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", GUEST, &[]);
    a.wait_ledger_running("v");
    let (mut receiver, address) = b.receive_held(&["--link-timeout", "2s"], "commit");
    let sender = a.start(&["send", "v", &address, "--link-timeout", "2s", "--ask-timeout", "2s"]);
    receiver.wait_held();
    receiver.signal(Signal::KILL);
    receiver.finish();
    let sent = sender.finish();
    b.wait_phase("v", None);
    // Its Ready may have left the host before the process stood still, or not.
    if sent.code == 10 {
        assert_eq!(a.phase("v").as_deref(), Some("pledged"));
        a.run(&["recover", "v", "--resume"]).success();
    } else {
        assert_eq!(sent.code, 7, "{sent:#?}");
    }
    assert_eq!(a.phase("v").as_deref(), Some("running"));
    a.assert_sound("v");
}

#[test]
fn a_receiver_outlives_a_failed_attempt_and_takes_the_next() {
    if without_kvm("a_receiver_outlives_a_failed_attempt_and_takes_the_next") {
        return;
    }
    let Scene { a, b, sender, receiver } = held_at("rounds");
    let address = {
        sender.signal(Signal::KILL);
        sender.finish();
        a.wait_phase("v", Some("running"));
        b.wait_phase("v", None);
        receiver_address(&b, receiver)
    };
    let (receiver, address) = address;
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
}

/// The address of a receiver that goes on listening, checked by its being there still.
fn receiver_address(_b: &Host, mut receiver: Running) -> (Running, String) {
    let failed = receiver.wait_for("the failed attempt", |line| line["event"] == "attempt-failed");
    let address = failed["address"].as_str().expect("an address").to_owned();
    assert!(receiver.is_running());
    (receiver, address)
}

#[test]
fn a_sender_that_dies_pledged_leaves_the_source_frozen_until_recover_has_asked() {
    if without_kvm("a_sender_that_dies_pledged_leaves_the_source_frozen_until_recover_has_asked") {
        return;
    }
    // Commit was not sent: the receiver discards, and says so when it is asked.
    let Scene { a, b, sender, receiver } = held_at("commit");
    sender.signal(Signal::KILL);
    sender.finish();
    a.wait_phase("v", Some("pledged"));
    let listed = a.run(&["recover"]);
    assert_eq!(listed.lines[0]["name"], "v", "{listed:#?}");
    a.run(&["recover", "v"]).success();
    assert_eq!(a.phase("v").as_deref(), Some("running"));
    b.wait_phase("v", None);
    a.assert_sound("v");
    drop(receiver);
    next_attempt_is_correct(&a, &b);
}

#[test]
fn a_sender_that_dies_behind_started_has_its_source_handed_over_by_recover() {
    if without_kvm("a_sender_that_dies_behind_started_has_its_source_handed_over_by_recover") {
        return;
    }
    let Scene { a, b, sender, receiver } = held_at("settle");
    sender.signal(Signal::KILL);
    sender.finish();
    a.wait_phase("v", Some("pledged"));
    b.wait_phase("v", Some("running"));
    // Whether the first receiver still listens or a new one has to be asked, the VM that runs there is the answer.
    a.run(&["recover", "v"]).success();
    a.wait_phase("v", None);
    assert_eq!(b.phase("v").as_deref(), Some("running"));
    b.assert_sound("v");
    drop(receiver);
}

#[test]
fn a_receiver_that_dies_at_commit_leaves_a_doubt_that_only_the_operator_settles() {
    if without_kvm("a_receiver_that_dies_at_commit_leaves_a_doubt_that_only_the_operator_settles") {
        return;
    }
    let Scene { a, b, sender, receiver } = held_at("commit");
    receiver.signal(Signal::KILL);
    receiver.finish();
    sender.signal(Signal::CONT);
    let sent = sender.finish();
    assert_eq!(sent.code, 10, "{sent:#?}");
    assert!(sent.stderr.contains("migrate recover"), "{sent:#?}");
    assert_eq!(a.phase("v").as_deref(), Some("pledged"));
    b.wait_phase("v", None);
    // Nobody answers: recover does not guess, and a VM in doubt cannot be sent.
    assert_eq!(a.run(&["recover", "v"]).code, 10);
    let again = a.run(&["send", "v", "127.0.0.1:9"]);
    assert_eq!(again.code, 4, "{again:#?}");
    a.run(&["recover", "v", "--resume"]).success();
    a.assert_sound("v");
    next_attempt_is_correct(&a, &b);
}

#[test]
fn a_sender_without_an_answer_to_its_commit_is_left_by_a_second_interrupt() {
    if without_kvm("a_sender_without_an_answer_to_its_commit_is_left_by_a_second_interrupt") {
        return;
    }
    let Scene { a, b, mut sender, receiver } = held_at("commit");
    receiver.signal(Signal::STOP);
    sender.signal(Signal::CONT);
    std::thread::sleep(Duration::from_millis(300));
    sender.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(300));
    assert!(sender.is_running(), "the first one is answered");
    sender.signal(Signal::INT);
    let sent = sender.finish();
    assert_eq!(sent.code, 10, "{sent:#?}");
    assert!(sent.stderr.contains("interrupted once more"), "{sent:#?}");
    assert!(sent.stderr.contains("it was interrupted"), "{sent:#?}");
    assert_eq!(a.phase("v").as_deref(), Some("pledged"));
    receiver.signal(Signal::CONT);
    a.run(&["recover", "v"]).success();
    let here = a.phase("v").as_deref() == Some("running");
    if here {
        a.assert_sound("v");
    } else {
        b.assert_sound("v");
    }
    assert!(!here || b.phase("v").is_none(), "it runs twice");
}

#[test]
fn a_receiver_whose_sender_does_not_know_yet_is_left_by_a_second_interrupt() {
    if without_kvm("a_receiver_whose_sender_does_not_know_yet_is_left_by_a_second_interrupt") {
        return;
    }
    let Scene { a, b, sender, mut receiver } = held_at("settle");
    receiver.signal(Signal::INT);
    std::thread::sleep(Duration::from_millis(700));
    assert!(receiver.is_running(), "the first one is answered");
    receiver.signal(Signal::INT);
    let arrived = receiver.finish();
    assert_eq!(arrived.code, 0, "{arrived:#?}");
    assert!(arrived.stderr.contains("its sender does not know it yet"), "{arrived:#?}");
    assert_eq!(b.phase("v").as_deref(), Some("running"));
    sender.signal(Signal::CONT);
    // It had the answer already.
    sender.finish().success();
    a.wait_phase("v", None);
    b.assert_sound("v");
}

#[test]
fn a_destination_vmm_that_dies_at_commit_gives_the_vm_back() {
    if without_kvm("a_destination_vmm_that_dies_at_commit_gives_the_vm_back") {
        return;
    }
    let Scene { a, b, sender, receiver } = held_at("commit");
    kill(b.vm_pid("v"));
    sender.signal(Signal::CONT);
    let sent = sender.finish();
    assert_eq!(sent.code, 7, "{sent:#?}");
    a.wait_phase("v", Some("running"));
    a.assert_sound("v");
    drop(receiver);
    next_attempt_is_correct(&a, &b);
}

#[test]
fn an_interrupt_leaves_the_vm_running_in_every_phase_before_commit() {
    if without_kvm("an_interrupt_leaves_the_vm_running_in_every_phase_before_commit") {
        return;
    }
    for (phase, _) in BEFORE_COMMIT {
        let Scene { a, b, sender, receiver } = held_at(phase);
        sender.signal(Signal::INT);
        sender.signal(Signal::CONT);
        let sent = sender.finish();
        assert_eq!(sent.code, 130, "{phase}: {sent:#?}");
        assert_eq!(a.phase("v").as_deref(), Some("running"));
        drop(receiver);
        b.wait_phase("v", None);
        a.assert_sound("v");
    }
}

//! A guest that writes faster than can be sent is started at the destination without its last pages.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::relay::{Relay, Way, Weather};
use e2e::{Host, Running, trusting_pair, without_kvm};
use rustix::process::Signal;
use serde_json::Value;
use std::path::Path;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// A guest that writes 150 MB/s to 96 MiB, and checks what it wrote.
const BUSY: &str = "fill=160M ws=96M rate=150";

fn busy(more: &[&str]) -> (Host, Host) {
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "256MiB", BUSY, more);
    a.wait_ledger_running("v");
    (a, b)
}

fn report(lines: &[Value]) -> &Value {
    lines.iter().find(|line| line["event"] == "report").expect("a report")
}

#[test]
fn a_busy_guest_moves_by_post_copy_and_is_sound() {
    if without_kvm("a_busy_guest_moves_by_post_copy_and_is_sound") {
        return;
    }
    let (a, b) = busy(&[]);
    let (receiver, address) = b.receive(&[]);
    let sent = a.run(&["send", "v", &address, "--post-copy", "--downtime", "1us"]).success();
    let received = receiver.finish().success();
    a.wait_phase("v", None);
    b.assert_sound("v");
    let post_copy = &report(&sent.lines)["post_copy"];
    println!("{post_copy}");
    println!("{}", report(&sent.lines)["downtime_us"]);
    let missing = post_copy["missing_pages"].as_u64().expect("a number");
    assert!(missing > 1000, "{post_copy}");
    let number = |name: &str| post_copy[name].as_u64().expect("a number");
    assert_eq!(number("asked_pages") + number("prefetched_pages") + number("pushed_pages"), missing);
    let arrived = received.lines.iter().find(|line| line["event"] == "arrived").expect("the arrival");
    println!("{}", arrived["report"]["post_copy"]);
    assert_eq!(arrived["report"]["post_copy"]["received_pages"], missing);
    let vm = b.vms().remove(0);
    assert!(vm.get("awaiting_pages").is_none(), "{vm}");
}

/// By post-copy behind the first round, whatever the guest does.
fn send(address: &str) -> Vec<&str> {
    vec![
        "send",
        "v",
        address,
        "--post-copy",
        "--downtime",
        "1us",
        "--link-timeout",
        "2s",
        "--ask-timeout",
        "30s",
    ]
}

/// A post-copy whose sender stands still on entering it: the guest runs at `b` and gets no pages.
fn held_sender(relayed: bool) -> (Host, Host, Running, Running, String, Option<Relay>) {
    let (a, b) = busy(&[]);
    let (receiver, address) = b.receive(&["--link-timeout", "2s"]);
    let relay = relayed.then(|| Relay::start(&address, Weather::default(), 1));
    let to = relay.as_ref().map_or(address.clone(), Relay::address);
    let mut sender = a.start_held(&send(&to), "post-copy");
    sender.wait_held();
    (a, b, sender, receiver, address, relay)
}

fn awaiting(host: &Host) -> u64 {
    host.vms().first().and_then(|vm| vm["awaiting_pages"].as_u64()).unwrap_or(0)
}

fn assert_arrived_whole(a: &Host, b: &Host) {
    a.wait_phase("v", None);
    b.wait_phase("v", Some("running"));
    assert_eq!(awaiting(b), 0);
    b.assert_sound("v");
}

#[test]
fn a_guest_that_misses_pages_is_shown_and_cannot_be_sent_on() {
    if without_kvm("a_guest_that_misses_pages_is_shown_and_cannot_be_sent_on") {
        return;
    }
    let (a, b, sender, receiver, ..) = held_sender(false);
    assert!(awaiting(&b) > 1000, "{:?}", b.vms());
    assert_eq!(b.phase("v").as_deref(), Some("running"));
    assert_eq!(a.phase("v").as_deref(), Some("pledged"));
    let on = b.run(&["send", "v", "127.0.0.1:9"]);
    assert_eq!(on.code, 4, "{on:#?}");
    assert!(on.stderr.contains("cannot be sent on yet"), "{on:#?}");
    sender.signal(Signal::CONT);
    sender.finish().success();
    receiver.finish().success();
    assert_arrived_whole(&a, &b);
}

#[test]
fn a_link_cut_while_pages_follow_is_recovered() {
    if without_kvm("a_link_cut_while_pages_follow_is_recovered") {
        return;
    }
    let (a, b, mut sender, receiver, _, relay) = held_sender(true);
    let relay = relay.expect("a relay");
    relay.cut(Way::Both);
    sender.signal(Signal::CONT);
    // The guest waits, and nothing is lost.
    std::thread::sleep(std::time::Duration::from_secs(3));
    assert!(sender.is_running());
    assert!(awaiting(&b) > 1000);
    relay.mend();
    let sent = sender.finish().success();
    receiver.finish().success();
    assert!(report(&sent.lines)["post_copy"]["lost_links"].as_u64() > Some(0), "{sent:#?}");
    assert_arrived_whole(&a, &b);
}

#[test]
fn a_sender_that_dies_while_pages_follow_is_replaced_by_recover() {
    if without_kvm("a_sender_that_dies_while_pages_follow_is_replaced_by_recover") {
        return;
    }
    let (a, b, sender, receiver, ..) = held_sender(false);
    sender.signal(Signal::KILL);
    sender.finish();
    assert_eq!(a.phase("v").as_deref(), Some("pledged"));
    assert!(awaiting(&b) > 1000);
    let recovered = a.run(&["recover", "v"]).success();
    assert!(recovered.event("donated").is_some(), "{recovered:#?}");
    receiver.finish().success();
    assert_arrived_whole(&a, &b);
}

#[test]
fn a_receiver_that_dies_while_pages_follow_is_replaced_by_another() {
    if without_kvm("a_receiver_that_dies_while_pages_follow_is_replaced_by_another") {
        return;
    }
    let (a, b) = busy(&[]);
    let (mut receiver, address) = b.receive_held(&["--link-timeout", "2s"], "post-copy");
    let mut sender = a.start(&send(&address));
    receiver.wait_held();
    receiver.signal(Signal::KILL);
    receiver.finish();
    // Nobody answers the guest's faults, and it sees no zeros.
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert_eq!(b.phase("v").as_deref(), Some("running"));
    assert!(awaiting(&b) > 1000);
    assert!(sender.is_running());
    let mut next = b.start(&["receive", "--listen", &address, "--link-timeout", "2s"]);
    next.wait_event("listening");
    sender.finish().success();
    next.finish().success();
    assert_arrived_whole(&a, &b);
}

#[test]
fn a_receiver_is_interrupted_twice_while_pages_follow_and_the_next_goes_on() {
    if without_kvm("a_receiver_is_interrupted_twice_while_pages_follow_and_the_next_goes_on") {
        return;
    }
    let (a, b, sender, mut receiver, address, _) = held_sender(false);
    receiver.signal(Signal::INT);
    std::thread::sleep(std::time::Duration::from_millis(700));
    assert!(receiver.is_running(), "the first one is answered");
    receiver.signal(Signal::INT);
    let ended = receiver.finish();
    assert_eq!(ended.code, 130, "{ended:#?}");
    assert!(ended.stderr.contains("runs here and still needs"), "{ended:#?}");
    assert!(ended.stderr.contains("start migrate receive to go on"), "{ended:#?}");
    assert_eq!(b.phase("v").as_deref(), Some("running"));
    assert!(awaiting(&b) > 1000);
    let mut next = b.start(&["receive", "--listen", &address, "--link-timeout", "2s"]);
    next.wait_event("listening");
    sender.signal(Signal::CONT);
    sender.finish().success();
    next.finish().success();
    assert_arrived_whole(&a, &b);
}

#[test]
fn both_engines_die_and_others_bring_it_to_its_end() {
    if without_kvm("both_engines_die_and_others_bring_it_to_its_end") {
        return;
    }
    let (a, b, sender, receiver, address, _) = held_sender(false);
    for process in [sender, receiver] {
        process.signal(Signal::KILL);
        process.finish();
    }
    let mut next = b.start(&["receive", "--listen", &address, "--link-timeout", "2s"]);
    next.wait_event("listening");
    a.run(&["recover", "v"]).success();
    next.finish().success();
    assert_arrived_whole(&a, &b);
}

#[test]
fn four_vcpus_and_a_second_space_move_by_post_copy() {
    if without_kvm("four_vcpus_and_a_second_space_move_by_post_copy") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    // What is more than 3 GiB lies above 4 GiB, in a space of its own. The pages that follow are those of the first.
    a.run_ledger("v", "3328MiB", "fill=64M ws=48M rate=120", &["--vcpus", "4"]);
    a.wait_ledger_running("v");
    let (receiver, address) = b.receive(&[]);
    a.run(&send(&address)).success();
    receiver.finish().success();
    assert_arrived_whole(&a, &b);
}

#[test]
fn a_vm_that_waits_for_pages_can_be_ended() {
    if without_kvm("a_vm_that_waits_for_pages_can_be_ended") {
        return;
    }
    let (a, b, sender, receiver, ..) = held_sender(false);
    receiver.signal(Signal::KILL);
    receiver.finish();
    b.run(&["vm", "stop", "v"]).success();
    b.wait_phase("v", None);
    sender.signal(Signal::KILL);
    sender.finish();
    assert_eq!(a.phase("v").as_deref(), Some("pledged"));
    a.run(&["recover", "v", "--resume"]).success();
    a.assert_sound("v");
}

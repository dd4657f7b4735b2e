//! A guest that writes faster than can be sent is started at the destination without its last pages.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Host, trusting_pair, without_kvm};
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

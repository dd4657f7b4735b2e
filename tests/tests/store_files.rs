//! Checkpoints of a real guest, merged, looked at with other programs, and carried to another store.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Finished, Host, without_kvm};
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// The guest's memory: one space, from address 0 on.
const MEMORY_BYTES: u64 = 128 << 20;

/// A guest that writes, and a chain of three checkpoints of it.
fn scene() -> (Host, String) {
    let host = Host::new(Path::new(PROGRAM));
    host.run_ledger("v", "128MiB", "fill=48M ws=16M rate=40 pattern=uniform seed=5", &[]);
    host.wait_ledger_running("v");
    let store = host.path("store").to_string_lossy().into_owned();
    for _ in 0..3 {
        host.run(&["checkpoint", "v", "--store", &store]).success();
    }
    (host, store)
}

fn restores(host: &Host, store: &str, checkpoint: &str) {
    host.run(&["restore", "--store", store, checkpoint, "--name", "r"]).success();
    host.assert_sound("r");
    host.run(&["vm", "stop", "r"]).success();
}

#[test]
fn a_compacted_chain_restores_and_an_archive_of_it_restores_elsewhere() {
    if without_kvm("a_compacted_chain_restores_and_an_archive_of_it_restores_elsewhere") {
        return;
    }
    let (host, store) = scene();
    let forecast = host.run(&["store", "compact", "--store", &store, "v", "--dry-run"]).success();
    assert_eq!(forecast.event("would-compact").unwrap()["links"], 3, "{forecast:#?}");
    let compacted = host.run(&["store", "compact", "--store", &store, "v"]).success();
    let compacted = compacted.event("compacted").unwrap();
    let id = compacted["id"].as_str().unwrap();
    restores(&host, &store, id);
    restores(&host, &store, compacted["from"].as_str().unwrap());
    // The running guest's next checkpoint stands on the old chain, which is as it was.
    host.run(&["checkpoint", "v", "--store", &store]).success();
    restores(&host, &store, "v");
    let archive = host.path("v.tar").to_string_lossy().into_owned();
    let other = Host::new(Path::new(PROGRAM));
    let elsewhere = other.path("store").to_string_lossy().into_owned();
    for (checkpoint, count) in [(id, 1), ("v", 4)] {
        std::fs::remove_file(&archive).ok();
        let export = ["store", "export", "--store", &store, checkpoint, "--archive", &archive];
        let would = host.run(&[&export[..], &["--dry-run"]].concat()).success();
        assert!(!Path::new(&archive).exists(), "a dry run wrote {archive}");
        let exported = host.run(&export).success();
        let bytes = |finished: &Finished, event: &str| finished.event(event).unwrap()["bytes"].as_u64();
        assert_eq!(bytes(&would, "would-export"), bytes(&exported, "exported"));
        let import = ["store", "import", "--store", &elsewhere, &archive];
        let would = other.run(&[&import[..], &["--dry-run"]].concat()).success();
        assert_eq!(Path::new(&elsewhere).exists(), count > 1, "a dry run made a store");
        let imported = other.run(&import).success();
        assert_eq!(bytes(&would, "would-import"), bytes(&imported, "imported"));
        let imported = imported.event("imported").unwrap();
        assert_eq!(imported["checkpoints"], count, "{imported}");
        restores(&other, &elsewhere, imported["id"].as_str().unwrap());
    }
    let copy = host.path("copy").to_string_lossy().into_owned();
    let would = host.run(&["store", "copy", &store, &copy, "--dry-run"]).success();
    assert!(!Path::new(&copy).exists(), "a dry run made a store");
    let copied = host.run(&["store", "copy", &store, &copy]).success();
    let bytes = |finished: &Finished| finished.event("copied").unwrap()["bytes"].as_u64();
    assert_eq!(bytes(&would), bytes(&copied));
    assert!(would.event("would-copy").is_some(), "{would:#?}");
}

#[test]
fn gdb_sees_the_memory_and_the_registers_of_a_guest() {
    if without_kvm("gdb_sees_the_memory_and_the_registers_of_a_guest") {
        return;
    }
    let (host, store) = scene();
    let path = |name: &str| host.path(name).to_string_lossy().into_owned();
    let (raw, core, dump) = (path("v.raw"), path("v.core"), path("v.dump"));
    host.run(&["store", "export", "--store", &store, "v", "--raw", &raw]).success();
    host.run(&["store", "export", "--store", &store, "v", "--core", &core]).success();
    assert_eq!(host.run(&["store", "export", "--store", &store, "v", "--raw", &raw]).code, 2);
    let memory = File::open(&raw).unwrap();
    assert_eq!(memory.metadata().unwrap().len(), MEMORY_BYTES);
    assert!(memory.metadata().unwrap().blocks() * 512 < 120 << 20, "it has no holes");
    let shown = Command::new("gdb")
        .args(["-nx", "-batch", "-ex", "info threads", "-ex", "p/x $rip", "-ex", "p/x $rsp"])
        .args(["-ex", &format!("dump binary memory {dump} 0 {MEMORY_BYTES:#x}")])
        .args(["-c", &core])
        .env("LC_ALL", "C")
        .output()
        .expect("gdb runs: install gdb");
    let text = String::from_utf8_lossy(&shown.stdout) + String::from_utf8_lossy(&shown.stderr);
    assert!(text.contains("$1 = 0x") && !text.contains("$1 = 0x0\n"), "{text}");
    let expected = std::fs::read(&raw).unwrap();
    assert!(expected.iter().any(|byte| *byte != 0), "there is nothing to compare");
    let found = std::fs::read(&dump).unwrap_or_else(|error| panic!("{error}: {text}"));
    assert!(found == expected, "gdb sees other memory: {text}");
}

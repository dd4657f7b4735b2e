//! The benchmark works, alone and against QEMU. What it finds on a loaded machine is nobody's business here.
#![allow(clippy::expect_used, reason = "helpers of tests: what goes wrong in them fails the test")]

use e2e::without_kvm;
use serde_json::Value;
use std::process::Command;

fn quick(more: &[&str]) -> Value {
    let output = Command::new(env!("CARGO_BIN_EXE_bench"))
        .env("MIGRATE_PROGRAM", env!("CARGO_BIN_EXE_migrate-under-test"))
        .args(["--quick", "--json"])
        .args(more)
        .output()
        .expect("the benchmark");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn names<'a>(result: &'a Value, list: &str, member: &str) -> Vec<&'a str> {
    let list = result[list].as_array().expect("a list");
    list.iter().map(|one| one[member].as_str().expect("a name")).collect()
}

#[test]
fn it_measures_ours_alone() {
    if without_kvm("it_measures_ours_alone") {
        return;
    }
    let result = quick(&[]);
    assert_eq!(names(&result, "results", "case"), ["quick-idle", "quick-50"]);
    for case in result["results"].as_array().expect("a list") {
        assert!(case["total_us"]["median"].as_f64() > Some(0.0), "{case:#}");
        assert!(case["raw_pipe_bytes_per_s"]["median"].as_f64() > Some(0.0), "{case:#}");
    }
    let checkpoints = &result["checkpoints"];
    let parts = [
        "checkpoint-pause quick",
        "checkpoint-every quick",
        "checkpoint-full quick",
        "checkpoint-snapshot quick",
        "restore-chain quick behind 1",
        "restore-lazy quick behind 1",
    ];
    assert_eq!(names(checkpoints, "results", "case"), parts);
    let targets = checkpoints["targets"].as_array().expect("a list");
    assert!(targets.len() >= 7 && targets.iter().all(|target| target["met"].is_boolean()), "{targets:#?}");
}

#[test]
fn it_measures_ours_and_qemu_in_turn_and_judges() {
    if without_kvm("it_measures_ours_and_qemu_in_turn_and_judges") {
        return;
    }
    let result = quick(&["--peer", "qemu"]);
    let ways = ["ours", "qemu", "qemu-50ms", "qemu-multifd", "qemu-multifd-tls", "qemu-tls"];
    assert_eq!(names(&result, "results", "way"), [ways, ways].concat());
    for case in result["results"].as_array().expect("a list") {
        let median = |name: &str| case[name]["median"].as_f64().expect("a number");
        assert!(median("wall_us") > 0.0 && median("downtime_guest_us") > 0.0, "{case:#}");
        if case["case"] == "quick-50" {
            assert!((5.0..60.0).contains(&median("guest_mb_per_s_undisturbed")), "{case:#}");
        }
    }
    let targets = result["targets"].as_array().expect("a list");
    assert!(targets.len() >= 8 && targets.iter().all(|target| target["met"].is_boolean()), "{targets:#?}");
}

#[test]
fn its_script_answers_help_and_refuses_what_it_does_not_know() {
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/../scripts/bench");
    let help = Command::new(script).arg("--help").output().expect("the script");
    assert!(String::from_utf8_lossy(&help.stdout).contains("--peer qemu"));
    for wrong in [&["--peer", "nobody"][..], &["--runs", "0"], &["--bogus"]] {
        let refused = Command::new(env!("CARGO_BIN_EXE_bench"))
            .env("MIGRATE_PROGRAM", "none")
            .args(wrong)
            .output()
            .expect("the benchmark");
        assert_eq!(refused.status.code(), Some(2), "{wrong:?}");
    }
}

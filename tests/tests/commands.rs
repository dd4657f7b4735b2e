//! The command line: every verb has help with an example, and says JSON.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::{Host, Running, without_kvm};
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

#[test]
fn the_help_of_a_verb_is_where_people_look_for_it() {
    for verb in [&[][..], &["send"], &["vm", "run"], &["keys", "trust"]] {
        let output = Command::new(PROGRAM).args(verb).arg("--help").output().expect("help");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("Example"), "{verb:?}:\n{text}");
    }
}

#[test]
fn completions_and_manual_pages_are_written() {
    let host = Host::new(Path::new(PROGRAM));
    for (shell, word) in
        [("bash", "complete -F"), ("zsh", "#compdef migrate"), ("fish", "complete -c migrate")]
    {
        let printed = Command::new(PROGRAM).args(["completions", shell]).output().expect("completions");
        let text = String::from_utf8_lossy(&printed.stdout);
        assert!(printed.status.success() && text.contains(word) && text.contains("max-rounds"), "{shell}");
        let json = host.run(&["completions", shell]).success();
        assert_eq!(json.lines[0]["script"].as_str(), Some(&*text), "{shell}");
    }
    let bash = Command::new(PROGRAM).args(["completions", "bash"]).output().expect("completions").stdout;
    let script = host.path("completions.bash");
    std::fs::write(&script, bash).expect("a file");
    assert!(
        Command::new("bash").arg("-n").arg(&script).status().expect("bash").success(),
        "bash understands it"
    );

    let directory = host.path("man1");
    let written = host.run(&["man", directory.to_str().expect("a path")]).success();
    let pages = std::fs::read_dir(&directory).expect("the pages").count();
    assert_eq!(written.lines[0]["pages"], pages);
    for page in
        ["migrate.1", "migrate-send.1", "migrate-vm-run.1", "migrate-keys-trust.1", "migrate-status.1"]
    {
        let text =
            std::fs::read_to_string(directory.join(page)).unwrap_or_else(|error| panic!("{page}: {error}"));
        assert!(text.contains(".TH") && text.contains("SYNOPSIS"), "{page}");
    }
    let send = std::fs::read_to_string(directory.join("migrate-send.1")).expect("a page");
    assert!(send.contains("migrate send") && send.contains("Example"), "{send}");
}

#[test]
fn keys_are_made_shown_trusted_listed_and_revoked() {
    let host = Host::new(Path::new(PROGRAM));
    host.run(&["keys", "init"]).success();
    let shown = host.run(&["keys", "show"]).success();
    let fingerprint = shown.lines[0]["fingerprint"].as_str().expect("a fingerprint").to_owned();
    assert!(fingerprint.starts_with("SHA256:"), "{fingerprint}");
    host.run(&["keys", "trust", "self", &fingerprint]).success();
    let listed = host.run(&["keys", "list"]).success();
    assert_eq!(listed.lines[0]["name"], "self");
    assert_eq!(listed.lines[0]["fingerprint"], fingerprint);
    host.run(&["keys", "revoke", "self"]).success();
    assert!(host.run(&["keys", "list"]).success().lines.is_empty());
    assert_eq!(host.run(&["keys", "revoke", "self"]).code, 5);
    assert_eq!(host.run(&["keys", "trust", "x", "SHA256:nonsense"]).code, 2);
    for file in ["host.key", "trusted"] {
        let mode = std::fs::metadata(host.keys_dir().join(file)).expect("the file").permissions();
        assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600, "{file}");
    }
}

#[test]
fn what_cannot_be_booted_is_refused_with_the_name_of_what_is_wrong() {
    let host = Host::new(Path::new(PROGRAM));
    let file = |name: &str, bytes: &[u8]| {
        let path = host.path(name);
        std::fs::write(&path, bytes).expect("a file");
        path.to_str().expect("a path").to_owned()
    };
    let script = file("script", b"#!/bin/sh\n");
    let mut arm = vec![0; 0x1000];
    arm[0x38..0x3c].copy_from_slice(b"ARM\x64");
    let arm = file("arm64", &arm);
    let packed = file("vmlinux.gz", b"\x1f\x8b\x08");
    let ledger = file("ledger", ledger::IMAGE);
    let large = file("large", &vec![1; 4 << 20]);
    let long = "x".repeat(4000);
    for (arguments, says) in [
        (&["--kernel", &script][..], "neither an ELF file nor a bzImage"),
        (&["--kernel", "/nowhere/vmlinuz"], "/nowhere/vmlinuz: No such file"),
        (&["--kernel", &arm], "made for AArch64, not for x86-64"),
        (&["--kernel", &packed], "packed with gzip: unpack it first"),
        (
            &["--kernel", &ledger, "--initrd", "/nowhere/initrd"],
            "its initramfs /nowhere/initrd: No such file",
        ),
        (&["--cmdline", &long], "the command line has 4000 bytes, at most 2047 fit"),
        (&["--cpus", "300"], "300 vCPUs"),
        (&["--cpus", "0"], "0 vCPUs"),
        (&["--memory", "1MiB"], "memory of 1048576 bytes"),
        (&["--kernel", &ledger, "--initrd", &large, "--memory", "4MiB"], "give the VM more memory"),
    ] {
        for detach in [&["--detach"][..], &[]] {
            let mut line = vec!["vm", "run", "--name", "bad", "--serial", "none"];
            line.extend_from_slice(arguments);
            line.extend_from_slice(detach);
            let refused = host.run(&line);
            assert_eq!(refused.code, 2, "{arguments:?}: {refused:#?}");
            assert!(refused.stderr.contains(says), "{arguments:?}: {refused:#?}");
        }
        assert!(host.vms().is_empty(), "{arguments:?}");
        assert!(!host.runtime_dir().join("bad.sock").exists(), "{arguments:?}");
    }
}

#[test]
fn a_host_with_no_vms_lists_none() {
    let host = Host::new(Path::new(PROGRAM));
    assert!(host.vms().is_empty());
    assert!(host.run(&["recover"]).success().lines.is_empty());
}

#[test]
fn the_doctor_says_what_works_here_and_what_to_do_about_what_does_not() {
    let host = Host::new(Path::new(PROGRAM));
    let doctor = host.command(&["doctor"]);
    let mut command = Command::new("/bin/sh");
    // With a soft limit that a long chain's segments would soon reach.
    command.args(["-c", "ulimit -Sn 40; PATH= exec \"$0\" \"$@\""]);
    command.arg(doctor.get_program()).args(doctor.get_args());
    command.envs(doctor.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let finished = Running::start(command).finish();
    let [report] = &finished.lines[..] else { panic!("one object: {finished:#?}") };
    assert_eq!(report["event"], "doctor");
    let checks = report["checks"].as_array().expect("checks");
    let check = |name: &str| {
        checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report:#}"))
    };

    // Tests that run VMs need it anyway.
    if !without_kvm("what the doctor says of KVM") {
        assert_eq!(check("kvm")["verdict"], "ok", "{report:#}");
        assert_eq!(check("kvm")["figures"]["api_version"], 12, "{report:#}");
    }
    let criu = check("criu");
    assert_eq!((&criu["verdict"], &criu["required"]), (&"missing".into(), &false.into()), "{report:#}");
    assert!(criu["advice"].as_str().is_some_and(|advice| advice.contains("install criu")), "{report:#}");
    let hard = rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum.unwrap_or(u64::MAX);
    assert_eq!(check("open-files")["figures"]["limit"], hard.min(1 << 16), "{report:#}");
    assert_eq!(check("runtime-directory")["verdict"], "ok", "{report:#}");
    assert!(!host.runtime_dir().exists(), "looking makes nothing");
    for check in checks {
        assert_eq!(check["advice"].is_null(), check["verdict"] == "ok", "{check:#}");
    }

    let unsuitable = checks.iter().any(|check| check["required"] == true && check["verdict"] == "missing");
    let code = if unsuitable { 3 } else { 0 };
    assert_eq!((finished.code, &report["exit_code"]), (code, &code.into()), "{report:#}");
    assert_eq!(report["suitable"], !unsuitable, "{report:#}");

    // A file where the directory should be.
    std::fs::write(host.runtime_dir(), "").expect("a file");
    let finished = host.run(&["doctor"]);
    assert_eq!((finished.code, &finished.lines[0]["suitable"]), (3, &false.into()), "{finished:#?}");
}

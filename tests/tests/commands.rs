//! The command line: every verb has help with an example, and says JSON.

use e2e::Host;
use std::path::Path;
use std::process::Command;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

#[test]
fn every_verb_has_help_with_an_example() {
    let verbs: &[&[&str]] = &[
        &[],
        &["vm", "run"],
        &["vm", "show"],
        &["vm", "list"],
        &["vm", "stop"],
        &["send"],
        &["receive"],
        &["recover"],
        &["ledger"],
        &["keys", "init"],
        &["keys", "show"],
        &["keys", "trust"],
        &["keys", "list"],
        &["keys", "revoke"],
    ];
    for verb in verbs {
        let output = Command::new(PROGRAM).args(*verb).arg("--help").output().expect("help");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{verb:?}");
        assert!(text.contains("Example"), "{verb:?} shows no example:\n{text}");
        assert!(text.contains("--json"), "{verb:?} does not offer --json:\n{text}");
    }
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
fn a_host_with_no_vms_lists_none() {
    let host = Host::new(Path::new(PROGRAM));
    assert!(host.vms().is_empty());
    assert!(host.run(&["recover"]).success().lines.is_empty());
}

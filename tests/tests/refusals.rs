//! What cannot work ends in one line that says why, with its exit code, and harms nobody.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::host::trust;
use e2e::{Host, says, trusting_pair, without_kvm};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

#[test]
fn no_such_vm() {
    let (a, _b) = trusting_pair(Path::new(PROGRAM));
    for args in [
        &["vm", "show", "ghost"][..],
        &["vm", "stop", "ghost"],
        &["ledger", "ghost"],
        &["send", "ghost", "127.0.0.1:9"],
    ] {
        says(&a.run(args), 4, &["ghost", "vm list"]);
    }
}

#[test]
fn names_that_could_leave_the_directory_are_refused() {
    let (host, other) = trusting_pair(Path::new(PROGRAM));
    for name in ["../x", ".hidden", "a/b", ""] {
        says(&host.run(&["vm", "run", "--serial", "none", "--name", name]), 2, &["name"]);
        says(&other.run(&["receive", "--listen", "127.0.0.1:0", "--name", name]), 2, &["name"]);
    }
    says(&host.run(&["vm", "show", ".hidden"]), 2, &["name"]);
    says(&host.run(&["vm", "show", "/nonexistent/x.sock"]), 4, &["/nonexistent/x.sock"]);
}

#[test]
fn no_kvm_and_no_permission_to_use_it() {
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::process::CommandExt as _;
    const NOBODY: u32 = 65534;
    if without_kvm("no_kvm_and_no_permission_to_use_it") {
        return;
    }
    let kvm = std::fs::metadata("/dev/kvm").expect("/dev/kvm");
    if !rustix::process::geteuid().is_root() || kvm.mode() & 0o006 != 0 || kvm.gid() == NOBODY {
        println!(
            "SKIPPED: no_kvm_and_no_permission_to_use_it: it needs root, and a /dev/kvm that is not for everybody"
        );
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    std::os::unix::fs::chown(dir.path(), Some(NOBODY), Some(NOBODY)).expect("chown");
    // The tests' own program may lie where nobody else may go.
    let program = dir.path().join("migrate");
    std::fs::copy(PROGRAM, &program).expect("a copy");
    let run = |command: &mut std::process::Command| {
        command.args(["vm", "run", "--name", "v", "--serial", "none", "--json", "--runtime-dir"]);
        let output = command.arg(dir.path().join("run")).output().expect("the program starts");
        (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
    };
    let (code, stderr) = run(std::process::Command::new(&program).uid(NOBODY).gid(NOBODY));
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("/dev/kvm") && stderr.contains("permission"), "{stderr}");

    // A mount namespace in which the device is missing: an empty directory hides all of /dev.
    let hide = "mount -t tmpfs none /dev && exec \"$0\" \"$@\"";
    let (code, stderr) =
        run(std::process::Command::new("unshare").args(["-m", "sh", "-c", hide]).arg(&program));
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stderr.contains("/dev/kvm does not exist"), "{stderr}");
}

#[test]
fn no_key_and_a_key_that_others_can_read() {
    let host = Host::new(Path::new(PROGRAM));
    says(&host.run(&["receive", "--listen", "127.0.0.1:0"]), 5, &["keys init"]);
    host.run(&["keys", "init"]).success();
    let again = host.run(&["keys", "init"]);
    says(&again, 5, &["--force"]);
    let key = host.keys_dir().join("host.key");
    std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o644)).expect("chmod");
    says(&host.run(&["receive", "--listen", "127.0.0.1:0"]), 5, &["chmod 600"]);
}

#[test]
fn a_port_in_use_and_an_address_that_is_none() {
    let (_a, b) = trusting_pair(Path::new(PROGRAM));
    let taken = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    says(&b.run(&["receive", "--listen", &address]), 3, &["in use", &address]);
    let nonsense = b.run(&["receive", "--listen", "no port here"]);
    assert_eq!(nonsense.code, 2, "{nonsense:#?}");
}

#[test]
fn an_image_that_is_none_and_memory_that_is_too_small() {
    if without_kvm("an_image_that_is_none_and_memory_that_is_too_small") {
        return;
    }
    let host = Host::new(Path::new(PROGRAM));
    let image = host.path("image");
    std::fs::write(&image, "this is not a kernel").expect("a file");
    let image = image.to_string_lossy();
    let run = |more: &[&str]| host.run(&[&["vm", "run", "--name", "v", "--serial", "none"], more].concat());
    says(&run(&["--kernel", &image]), 2, &["ELF"]);
    says(&run(&["--kernel", "/nonexistent/kernel"]), 2, &["/nonexistent/kernel"]);
    says(&run(&["--memory", "64KiB"]), 2, &["memory"]);
    says(&run(&["--vcpus", "0"]), 2, &["vCPU"]);
    says(&run(&["--vcpus", "100000"]), 2, &["vCPU"]);
    says(&host.run(&["vm", "run", "--name", "v", "--detach", "--kernel", &image]), 2, &["ELF"]);
    assert!(host.vms().is_empty());
}

#[test]
fn too_many_vcpus_a_long_command_line_and_a_cpu_that_is_none() {
    if without_kvm("too_many_vcpus_a_long_command_line_and_a_cpu_that_is_none") {
        return;
    }
    let host = Host::new(Path::new(PROGRAM));
    let run = |more: &[&str]| host.run(&[&["vm", "run", "--name", "v", "--serial", "none"], more].concat());
    let long = "x".repeat(70_000);
    let file = host.path("cpu.json");
    let file_name = file.to_string_lossy().into_owned();
    for detach in [&[][..], &["--detach"]] {
        let run = |more: &[&str]| run(&[more, detach].concat());
        says(&run(&["--vcpus", "300"]), 2, &["300 vCPUs", "1 to 254"]);
        says(&run(&["--cmdline", &long]), 2, &["command line", "70000"]);
        says(&run(&["--cpu", "x86-64-v9"]), 2, &["x86-64-v9", "x86-64-v3"]);
        for (text, word) in [
            ("{", "EOF"),
            (r#"{"format": 1, "name": "t", "features": ["sse5"]}"#, "sse5"),
            (r#"{"format": 7, "name": "t", "features": []}"#, "format 7"),
        ] {
            std::fs::write(&file, text).expect("a file");
            says(&run(&["--cpu", &file_name]), 2, &["cpu.json", word]);
        }
        // No processor of anybody's.
        std::fs::write(&file, r#"{"format": 1, "name": "t", "vendor": "CentaurHauls", "features": []}"#)
            .expect("a file");
        says(&run(&["--cpu", &file_name]), 3, &["CentaurHauls", "CPU t"]);
    }
    says(&host.run(&["cpu", "check", &file_name]), 3, &["CentaurHauls"]);
    let nested = run(&["--nested", "--kernel", "/nonexistent/kernel"]);
    assert_ne!(nested.code, 0, "{nested:#?}");
    assert!(host.vms().is_empty());
}

#[test]
fn a_guest_that_was_shown_more_than_the_destination_shows() {
    if without_kvm("a_guest_that_was_shown_more_than_the_destination_shows") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    let shown = a.run(&["cpu", "show"]).success();
    let mut template = shown.lines[0].clone();
    let features = template["features"].as_array_mut().expect("features");
    // What the host has of these depends on its processor; the last is on all.
    let has = |name: &&str| features.iter().any(|feature| feature == name);
    let lacking: Vec<&str> = ["popcnt", "clflushopt", "umip", "pse36"].into_iter().filter(has).collect();
    assert!(!lacking.is_empty(), "{shown:#?}");
    features.retain(|feature| !lacking.iter().any(|name| feature == name));
    let (less, whole) = (b.path("less.json"), b.path("whole.json"));
    std::fs::write(&less, template.to_string()).expect("a file");
    std::fs::write(&whole, shown.lines[0].to_string()).expect("a file");
    let (less, whole) = (less.to_string_lossy(), whole.to_string_lossy());

    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.run_ledger("w", "64MiB", "fill=8M ws=4M rate=5", &["--cpu", &less]);
    a.wait_ledger_running("v");
    a.wait_ledger_running("w");
    let (mut receiver, address) = b.receive(&["--cpu", &less]);
    says(&a.run(&["send", "v", &address]), 6, &lacking);
    assert!(receiver.is_running() && b.vms().is_empty());
    a.assert_sound("v");
    // What both have is what two hosts exchange guests by: there, and back to the whole host.
    let common = a.run(&["cpu", "common", "--name", "fleet", &whole, &less]).success();
    assert_eq!(
        (&common.lines[0]["features"], &common.lines[0]["name"]),
        (&template["features"], &"fleet".into())
    );
    a.run(&["send", "w", &address]).success();
    receiver.finish().success();
    b.assert_sound("w");
    let (receiver, address) = a.receive(&[]);
    b.run(&["send", "w", &address]).success();
    receiver.finish().success();
    a.assert_sound("w");
}

#[test]
fn a_name_that_runs_already() {
    if without_kvm("a_name_that_runs_already") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    b.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    says(&a.run(&["vm", "run", "--name", "v", "--detach"]), 4, &["v", "already"]);
    says(&a.run(&["vm", "run", "--name", "v", "--serial", "none"]), 4, &["v", "already"]);
    a.wait_ledger_running("v");
    b.wait_ledger_running("v");
    let (_receiver, address) = b.receive(&[]);
    says(&a.run(&["send", "v", &address]), 6, &["v", "--name"]);
    a.assert_sound("v");
    b.assert_sound("v");
}

#[test]
fn strangers_are_refused_on_either_side() {
    if without_kvm("strangers_are_refused_on_either_side") {
        return;
    }
    let (a, b) = (Host::new(Path::new(PROGRAM)), Host::new(Path::new(PROGRAM)));
    for host in [&a, &b] {
        host.run(&["keys", "init"]).success();
    }
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let (mut receiver, address) = b.receive(&[]);
    says(&a.run(&["send", "v", &address]), 5, &["keys trust"]);
    trust(&a, "b", &b);
    says(&a.run(&["send", "v", &address]), 5, &["keys trust"]);
    trust(&b, "a", &a);
    b.run(&["keys", "revoke", "a"]).success();
    says(&a.run(&["send", "v", &address]), 5, &["keys trust"]);
    assert!(b.vms().is_empty(), "something was made for a stranger");
    a.assert_sound("v");
    trust(&b, "a", &a);
    assert!(receiver.is_running());
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
}

#[test]
fn more_memory_than_the_destination_allows() {
    if without_kvm("more_memory_than_the_destination_allows") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let (mut receiver, address) = b.receive(&["--max-memory", "32MiB"]);
    says(&a.run(&["send", "v", &address]), 6, &["memory"]);
    assert!(receiver.is_running());
    assert!(b.vms().is_empty());
    a.assert_sound("v");
}

#[test]
fn nobody_listens() {
    if without_kvm("nobody_listens") {
        return;
    }
    let (a, _b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    // A port that was free a moment ago, and one that is bound by something that does not answer.
    let silent = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let silent_address = silent.local_addr().expect("an address").to_string();
    for address in [silent_address.as_str(), "127.0.0.1:1"] {
        let sent = a.run(&["send", "v", address, "--link-timeout", "1s"]);
        says(&sent, 7, &["migrate receive", address]);
    }
    let unknown = a.run(&["send", "v", "no-such-host.invalid:7700", "--link-timeout", "1s"]);
    says(&unknown, 7, &["no-such-host.invalid"]);
    a.assert_sound("v");
}

#[test]
fn garbage_on_the_port_harms_nobody() {
    if without_kvm("garbage_on_the_port_harms_nobody") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let (mut receiver, address) = b.receive(&[]);
    let socket = UdpSocket::bind("127.0.0.1:0").expect("a port");
    let mut bytes = [0_u8; 1400];
    for round in 0..400_usize {
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = (at * 31 + round * 17 + (at * round) % 251) as u8;
        }
        socket.send_to(&bytes[..1 + round * 3], &address).expect("a datagram");
    }
    assert!(receiver.is_running());
    a.run(&["send", "v", &address]).success();
    receiver.finish().success();
    b.assert_sound("v");
}

#[test]
fn garbage_and_silence_on_the_control_socket_harm_nobody() {
    use std::io::Write as _;
    if without_kvm("garbage_and_silence_on_the_control_socket_harm_nobody") {
        return;
    }
    let (a, _b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let socket = a.runtime_dir().join("v.sock");
    let mode = std::fs::metadata(&socket).expect("the socket").permissions();
    assert_eq!(std::os::unix::fs::PermissionsExt::mode(&mode) & 0o777, 0o600);
    let silent = UnixStream::connect(&socket).expect("the socket answers");
    for seed in 0..20_u8 {
        let mut garbage = UnixStream::connect(&socket).expect("the socket answers");
        let bytes: Vec<u8> = (0..5000_u32).map(|at| (at as u8).wrapping_mul(seed | 1)).collect();
        // The VMM may have hung up before all of it was written.
        garbage.write_all(&bytes).ok();
    }
    std::thread::sleep(Duration::from_millis(50));
    a.assert_sound("v");
    drop(silent);
}

#[test]
fn a_second_client_is_told_who_holds_the_vm() {
    if without_kvm("a_second_client_is_told_who_holds_the_vm") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let (_receiver, address) = b.receive(&[]);
    let mut sender = a.start_held(&["send", "v", &address], "rounds");
    sender.wait_held();
    let pid = sender.pid().to_string();
    says(&a.run(&["send", "v", &address]), 4, &[&pid]);
    says(&a.run(&["vm", "stop", "v"]), 4, &[&pid]);
    let shown = a.run(&["vm", "show", "v"]).success();
    assert_eq!(shown.lines[0]["holder_pid"].to_string(), pid);
}

#[test]
fn a_guest_that_does_not_converge_is_cancelled() {
    if without_kvm("a_guest_that_does_not_converge_is_cancelled") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "256MiB", "fill=192M ws=160M rate=max", &[]);
    a.wait_ledger_running("v");
    let (_receiver, address) = b.receive(&[]);
    let limits = ["--downtime", "1us", "--max-rounds", "3", "--on-timeout", "cancel"];
    says(&a.run(&[&["send", "v", address.as_str()][..], &limits].concat()), 9, &["--on-timeout force"]);
    a.assert_sound("v");
    b.wait_phase("v", None);
}

#[test]
fn a_sender_that_stops_talking_is_given_up() {
    if without_kvm("a_sender_that_stops_talking_is_given_up") {
        return;
    }
    let (a, b) = trusting_pair(Path::new(PROGRAM));
    a.run_ledger("v", "64MiB", "fill=8M ws=4M rate=5", &[]);
    a.wait_ledger_running("v");
    let (mut receiver, address) = b.receive(&["--link-timeout", "1s"]);
    let mut sender = a.start_held(&["send", "v", &address, "--link-timeout", "1s"], "rounds");
    sender.wait_held();
    receiver.wait_for("the failed attempt", |line| line["event"] == "attempt-failed");
    b.wait_phase("v", None);
    sender.signal(rustix::process::Signal::CONT);
    assert_eq!(sender.finish().code, 7);
    a.assert_sound("v");
}

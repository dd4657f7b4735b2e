//! Real guests move between two hosts with a real KVM: two machines of the laboratory, or, with `scripts/test --host-kvm`, two network
//! namespaces of this machine and its own /dev/kvm.
//!
//! What is known of other tests as right is tried here once: nested pages instead of a software back end, a dirty log of real
//! hardware, faults on missing pages that come from a guest, and nothing shared between the ends but a network.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::Host;
use e2e::host::{Bench, Place, introduce};
use e2e::lab::Lab;
use e2e::lab::access::{Order, TIMED_OUT};
use e2e::lab::keeper::READY;
use e2e::network::{self, Cable};
use e2e::process::STEP_LIMIT;
use rustix::process::Signal;
use serde_json::Value;
use std::io::BufRead as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const MIGRATE: &str = env!("CARGO_BIN_EXE_migrate-under-test");
const LAB: &str = env!("CARGO_BIN_EXE_lab");

/// The exit code of the laboratory's program when it fails itself.
const LAB_FAILED: i32 = 255;

/// Says that the suite is left out, which `scripts/test --no-lab` decides.
const NO_LAB: &str = "MIGRATE_TEST_NO_LAB";

/// Says that this machine's own KVM is to be used instead of a laboratory's.
const HOST_KVM: &str = "MIGRATE_TEST_HOST_KVM";

/// The laboratory of all tests of this process. Its keeper ends when this process does, because nothing else holds the other end
/// of its standard input.
struct Shared {
    _keeper: Child,
    lab: Lab,
    /// Hosts that have keys and trust each other, and nothing else: to make keys takes an emulated host its time.
    keys: [Host; 2],
}

/// The place of a machine.
fn machine(lab: &Lab, index: usize) -> Place {
    Place::Machine(Bench {
        program: LAB.into(),
        folder: lab.folder.clone(),
        machine: lab.hosts[index].name.clone(),
        ip: lab.hosts[index].ip.clone(),
    })
}

/// A folder that nobody else may look into.
fn private_folder(prefix: &str) -> tempfile::TempDir {
    let private = std::os::unix::fs::PermissionsExt::from_mode(0o700);
    tempfile::Builder::new().prefix(prefix).permissions(private).tempdir().expect("a directory")
}

fn laboratory() -> &'static Shared {
    static SHARED: OnceLock<Shared> = OnceLock::new();
    SHARED.get_or_init(|| {
        network::sweep();
        let begun = Instant::now();
        // A killed test's directory is removed by the next sweep, which goes by the name.
        let prefix = format!("migrate-e2e-{}-lab-", std::process::id());
        let folder = private_folder(&prefix).keep();
        let program = format!("migrate={MIGRATE}");
        let mut command = Command::new(LAB);
        command.arg("--folder").arg(&folder).args([
            "keep",
            "--discard",
            "--hours",
            "1",
            "--program",
            &program,
        ]);
        let mut keeper = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the laboratory's program can be started");
        let said = std::io::BufReader::new(keeper.stdout.take().expect("stdout is piped"));
        let ready = said.lines().map_while(Result::ok).any(|line| line == READY);
        assert!(ready, "the laboratory does not come up: {:?}", keeper.wait());
        println!("the laboratory was up after {:.1} s", begun.elapsed().as_secs_f64());
        let lab = Lab::open(&folder).expect("it is up");
        let keys = [0, 1].map(|index| Host::new(Path::new(MIGRATE)).moved_to(machine(&lab, index)));
        introduce(&keys[0], &keys[1]);
        Shared { _keeper: keeper, lab, keys }
    })
}

/// Two hosts that trust each other, alone on their machines as long as this lives.
struct Pair {
    a: Host,
    b: Host,
    cable: Option<Cable>,
    // Last: what was on the machines is gone before the next test begins.
    _turn: MutexGuard<'static, ()>,
}

impl Pair {
    /// `None`, and said, if the suite is left out of this run.
    fn new(test: &str) -> Option<Self> {
        static TURN: Mutex<()> = Mutex::new(());
        if std::env::var_os(NO_LAB).is_some() {
            println!("SKIPPED: {test}: it needs the laboratory, or a real KVM (scripts/test --host-kvm)");
            return None;
        }
        let _turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let (a, b, cable) = if std::env::var_os(HOST_KVM).is_some() {
            let cable = Cable::new(1500);
            let host = |name: &str, ip: &str| {
                Host::new(Path::new(MIGRATE)).moved_to(Place::Namespace { name: name.into(), ip: ip.into() })
            };
            let (a, b) = (host(cable.near(), network::NEAR), host(cable.far(), network::FAR));
            introduce(&a, &b);
            (a, b, Some(cable))
        } else {
            let Shared { lab, keys, .. } = laboratory();
            let [a, b] = [0, 1].map(|index| keys[index].anew_at(machine(lab, index)));
            (a, b, None)
        };
        Some(Self { a, b, cable, _turn })
    }

    /// Plugs the second host's private network in, or pulls it out.
    fn plug_in(&self, up: bool) {
        let card = if self.cable.is_some() { "wire" } else { "eth1" };
        let mut command = self.b.there(Path::new("ip"));
        command.args(["link", "set", card, if up { "up" } else { "down" }]).stdin(Stdio::null());
        assert!(command.status().is_ok_and(|status| status.success()), "{command:?}");
    }
}

/// A guest on `host` that writes and checks what it wrote.
fn busy(host: &Host, more: &[&str]) {
    host.run_ledger("v", "64MiB", "fill=16M ws=4M rate=5 pattern=hot seed=3", more);
    host.wait_ledger_running("v");
}

/// Moves `v` and gives the sender's report.
fn hop(from: &Host, to: &Host, more: &[&str]) -> Value {
    let (receiver, address) = to.receive(&[]);
    let mut arguments = [&["send", "v", &address], more].concat();
    if !more.contains(&"--downtime") {
        // An emulated host takes tens of milliseconds for a fork.
        arguments.extend(["--downtime", "500ms"]);
    }
    let sent = from.run(&arguments).success();
    receiver.finish().success();
    from.wait_phase("v", None);
    to.assert_sound("v");
    let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}")).clone();
    assert_eq!(report["outcome"]["type"], "moved");
    println!("moved in {} us, down for {} us", report["total_us"], report["downtime_us"]);
    report
}

#[test]
fn a_busy_guest_moves_there_and_back() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_busy_guest_moves_there_and_back") else { return };
    busy(a, &[]);
    let before = a.ledger("v")["iterations"].as_u64();
    let report = hop(a, b, &[]);
    assert!(report["rounds"].as_array().expect("rounds").len() >= 2, "{report:#}");
    hop(b, a, &["--verify", "--downtime", "20s"]);
    assert!(a.ledger("v")["iterations"].as_u64() > before);
}

#[test]
fn four_vcpus_and_a_guest_that_never_rests_move_when_forced() {
    let Some(Pair { a, b, .. }) = &Pair::new("four_vcpus_and_a_guest_that_never_rests_move_when_forced")
    else {
        return;
    };
    a.run_ledger("v", "64MiB", "fill=8M ws=3M rate=max", &["--vcpus", "4"]);
    a.wait_ledger_running("v");
    // No downtime is short enough, so it goes on until it is forced: by the rounds that are allowed, or because they no longer help.
    let tight = ["--downtime", "1ms", "--max-downtime", "1ms", "--max-rounds", "3", "--on-timeout", "force"];
    let report = hop(a, b, &tight);
    let rounds = report["rounds"].as_array().map_or(0, Vec::len);
    assert!((3..=4).contains(&rounds), "{report:#}");
}

#[test]
fn a_guest_moves_by_post_copy() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_guest_moves_by_post_copy") else { return };
    busy(a, &[]);
    let report = hop(a, b, &["--downtime", "1us", "--post-copy=1", "--on-timeout=post-copy"]);
    let phases = report["phases"].to_string();
    assert!(phases.contains("post-copy"), "{report:#}");
    assert_eq!(report["resumes"], 0, "{report:#}");
}

#[test]
fn a_killed_receiver_costs_nothing() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_killed_receiver_costs_nothing") else { return };
    busy(a, &[]);
    let (receiver, address) = b.receive(&[]);
    // So slow that it is killed in the rounds.
    let mut sender = a.start(&["send", "v", &address, "--bandwidth", "1MB/s", "--link-timeout", "3s"]);
    sender.wait_for("the rounds", |line| line["phase"] == "rounds");
    receiver.signal(Signal::KILL);
    let sent = sender.finish();
    assert!(![0, LAB_FAILED].contains(&sent.code), "{sent:#?}");
    b.wait_phase("v", None);
    a.assert_sound("v");
    hop(a, b, &[]);
}

#[test]
fn a_network_that_is_gone_for_a_while_does_not_end_a_move() {
    let Some(pair) = &Pair::new("a_network_that_is_gone_for_a_while_does_not_end_a_move") else { return };
    let Pair { a, b, .. } = pair;
    busy(a, &[]);
    let (receiver, address) = b.receive(&["--keep", "60s", "--link-timeout", "2s"]);
    let limits = ["--bandwidth", "4MB/s", "--link-timeout", "2s", "--retry-for", "60s", "--downtime", "2s"];
    let mut sender = a.start(&[&["send", "v", &address][..], &limits].concat());
    sender.wait_for("the rounds", |line| line["phase"] == "rounds");
    std::thread::sleep(Duration::from_secs(1));
    pair.plug_in(false);
    std::thread::sleep(Duration::from_secs(4));
    pair.plug_in(true);
    let sent = sender.finish().success();
    receiver.finish().success();
    assert!(sent.event("resumed").is_some(), "{sent:#?}");
    a.wait_phase("v", None);
    b.assert_sound("v");
}

#[test]
fn a_checkpoint_is_restored_on_the_other_host() {
    let Some(Pair { a, b, .. }) = &Pair::new("a_checkpoint_is_restored_on_the_other_host") else { return };
    busy(a, &[]);
    let store = a.path("store").to_string_lossy().into_owned();
    for _ in ["full", "delta"] {
        a.run(&["checkpoint", "v", "--store", &store]).success();
    }
    let store = a.copy_to(b, "store").to_string_lossy().into_owned();
    for (name, lazy) in [("eager", None), ("lazy", Some("--lazy"))] {
        let mut arguments = vec!["restore", "--store", &store, "v", "--name", name];
        arguments.extend(lazy);
        let restored = b.run(&arguments).success();
        assert_eq!(restored.event("restored").expect("a report")["report"]["links"], 2);
        b.assert_sound(name);
    }
    a.assert_sound("v");
}

#[test]
fn commands_in_the_laboratory_end_as_they_do_anywhere() {
    let Some(Pair { a, .. }) = &Pair::new("commands_in_the_laboratory_end_as_they_do_anywhere") else {
        return;
    };
    if std::env::var_os(HOST_KVM).is_some() {
        println!("there is no laboratory in this run");
        return;
    }
    let code = |script: &str| {
        let mut command = a.there(Path::new("sh"));
        command.args(["-c", script]).stdin(Stdio::null()).status().expect("it can be started").code()
    };
    assert_eq!(code("exit 7"), Some(7));
    assert_eq!(code("kill -KILL $$"), Some(137));
    assert_eq!(code("test -c /dev/kvm && grep -q kvm_amd /proc/modules"), Some(0));
    // What is asked for from here ends with who asked.
    let mut asked = a.there(Path::new("sleep"));
    let mut asked = asked.arg("4321").stdin(Stdio::null()).spawn().expect("it can be started");
    let sleeps = || code("ps | grep -q '[s]leep 4321'") == Some(0);
    wait_until("the command to run", sleeps);
    asked.kill().expect("it runs");
    asked.wait().expect("it ends");
    wait_until("the command to end", || !sleeps());
    let lab = &laboratory().lab;
    let host = &lab.hosts[0];
    let order = Order { limit: Some(Duration::from_millis(300)), ..Order::new(&["sleep", "1234"]) };
    let none = &mut std::io::sink();
    assert_eq!(lab.run(host, &order, std::io::empty(), none, &mut std::io::sink()), Ok(TIMED_OUT));
    let missing = lab.put(host, Path::new("/nonexistent"), "/tmp").expect_err("it is not there");
    assert!(missing.contains("/nonexistent"), "{missing}");
}

#[test]
fn a_laboratory_ends_with_who_holds_it() {
    let Some(_turn) = Pair::new("a_laboratory_ends_with_who_holds_it") else { return };
    for killed in [true, false] {
        let folder = private_folder(&format!("migrate-e2e-{}-end-", std::process::id()));
        let mut command = Command::new(LAB);
        command.arg("--folder").arg(folder.path()).args(["keep", "--hosts", "1"]).stdin(Stdio::piped());
        let mut keeper = command.spawn().expect("the laboratory's program can be started");
        wait_until("a host", || machines(folder.path()) == 1);
        if killed {
            keeper.kill().expect("it runs");
        } else {
            drop(keeper.stdin.take());
        }
        wait_until("the host to end", || machines(folder.path()) == 0);
        keeper.wait().expect("it ends");
        assert!(folder.path().join("logs/host1.qemu").exists(), "logs stay");
        assert_eq!(folder.path().join("image").exists(), killed, "a keeper that can removes what it made");
    }
}

/// How many QEMU processes have to do with this folder.
fn machines(folder: &Path) -> usize {
    let folder = folder.to_string_lossy();
    let processes = std::fs::read_dir("/proc").expect("/proc").flatten();
    let commands = processes.filter_map(|process| std::fs::read(process.path().join("cmdline")).ok());
    let ours = |command: &Vec<u8>| {
        let command = String::from_utf8_lossy(command);
        command.starts_with("qemu-system") && command.contains(&*folder)
    };
    commands.filter(ours).count()
}

fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let until = Instant::now() + STEP_LIMIT;
    while !come() {
        assert!(Instant::now() < until, "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

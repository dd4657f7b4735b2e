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

mod itself;
mod containers;
mod linux;
mod trip;
mod moves;

use e2e::Host;
use e2e::host::{Bench, EMULATED_STEP_LIMIT, Place, introduce};
use e2e::lab::Lab;
use e2e::lab::access::Order;
use e2e::lab::keeper::READY;
use e2e::network::{self, Cable};
use std::io::BufRead as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

const MIGRATE: &str = env!("CARGO_BIN_EXE_migrate-under-test");
const LAB: &str = env!("CARGO_BIN_EXE_lab");
const LOAD: &str = env!("CARGO_BIN_EXE_lab-load");

/// The exit code of the laboratory's program when it fails itself.
const LAB_FAILED: i32 = 255;

/// Says that the suite is left out, which `scripts/test --no-lab` decides.
const NO_LAB: &str = "MIGRATE_TEST_NO_LAB";

/// Says that this machine's own KVM is to be used instead of a laboratory's.
const HOST_KVM: &str = "MIGRATE_TEST_HOST_KVM";

/// How long a machine of a failed test may take to say what its kernel logged.
const LAST_WORDS: Duration = Duration::from_secs(5);

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
            "--hosts",
            "3",
            "--program",
            &program,
            "--program",
            LOAD,
            // Disks of Linux guests are made and checked in a host.
            "--program",
            "/sbin/mke2fs",
            "--program",
            "/sbin/e2fsck",
            // Containers' networks and temporary files are written down with these.
            "--program",
            "/sbin/ip",
            "--program",
            "/bin/tar",
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

impl Drop for Pair {
    /// Says of a failed test what its machines said: they are gone with this process, logs and all.
    fn drop(&mut self) {
        if !std::thread::panicking() || self.cable.is_some() {
            return;
        }
        let lab = &laboratory().lab;
        for host in lab.hosts.iter().take(2) {
            let console = std::fs::read(lab.folder.join("logs").join(format!("{}.console", host.name)));
            eprintln!("the console of {}:\n{}", host.name, end_of(&console.unwrap_or_default()));
            let order = Order { limit: Some(LAST_WORDS), ..Order::new(&["dmesg"]) };
            let mut log = Vec::new();
            let asked = lab.run(host, &order, std::io::empty(), &mut log, &mut std::io::sink());
            eprintln!("the kernel of {} ({asked:?}):\n{}", host.name, end_of(&log));
        }
    }
}

/// The end of what was said, as much as somebody reads.
fn end_of(said: &[u8]) -> String {
    String::from_utf8_lossy(&said[said.len().saturating_sub(4000)..]).into_owned()
}

fn wait_until(what: &str, mut come: impl FnMut() -> bool) {
    let until = Instant::now() + EMULATED_STEP_LIMIT;
    while !come() {
        assert!(Instant::now() < until, "waited for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

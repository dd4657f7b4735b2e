//! Linux guests as a distribution ships them: memory, clocks, connections and disks outlive moves under load. A guest says itself whether it
//! holds what it must (`work.sh`), and a third host, which knows what it must hear, talks to it all the time.

use super::trip::{Trip, clock, sh};
use super::{HOST_KVM, MIGRATE, Pair, laboratory, machine, wait_until};
use e2e::Host;
use e2e::host::introduce;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::JoinHandle;

/// Where `work.sh` puts the guest on the private network.
const GUEST: &str = "10.78.0.100";

/// The tap on both hosts.
pub(super) const TAP: &str = "tap-guest";

/// How often a third host pings, in seconds, and how long a move may keep it waiting beyond the downtime: an emulated host takes its
/// time to start a VMM's threads.
const PING_EVERY_S: f64 = 0.2;
const PATIENCE_S: f64 = 3.0;

/// What a kernel's log must not tell of the time behind booting.
const COMPLAINTS: &[&str] = &[
    "lockup",
    "stall",
    "unstable",
    "clocksource",
    "BUG:",
    "Call Trace",
    "I/O error",
    "hung_task",
    "EXT4-fs error",
];

/// Two hosts whose guests are on one network with a third.
pub(super) struct Site {
    pub(super) pair: Pair,
    client: Host,
}

impl Site {
    /// `None`, and said, if the suite is left out of this run, or is run without a third host.
    pub(super) fn new(test: &str) -> Option<Self> {
        if std::env::var_os(HOST_KVM).is_some() {
            println!("SKIPPED: {test}: it needs three hosts, which only the laboratory has");
            return None;
        }
        let pair = Pair::new(test)?;
        for host in [&pair.a, &pair.b] {
            sh(
                host,
                &format!("tunctl -d {TAP}; tunctl -t {TAP} && brctl addif br0 {TAP} && ip link set {TAP} up"),
            );
        }
        let client = Host::new(Path::new(MIGRATE)).moved_to(machine(&laboratory().lab, 2));
        Some(Self { pair, client })
    }

    pub(super) fn on_client(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = self.client.there(Path::new(program));
        command.args(arguments);
        command
    }

    /// What the guest's kernel logged since it works.
    fn kernel_log(&self) -> String {
        let mut log = String::new();
        // A connection may be made while the network learns where the guest is.
        wait_until("the kernel's log", || {
            let said = self.on_client("nc", &["-w", "10", GUEST, "5001"]).stdin(Stdio::null()).output();
            log = String::from_utf8_lossy(&said.expect("nc").stdout).into_owned();
            log.contains("lab: at work")
        });
        log.split_once("lab: at work").map(|(_, log)| log.to_owned()).unwrap_or_default()
    }

    /// Nothing that every guest must keep was lost: neither its clocks nor its kernel noticed anything, and it says nothing is broken.
    fn assert_well(&self, trip: &Trip<'_>) {
        let now = || sh(trip.here(), "date +%s").trim().parse::<f64>().expect("a time");
        let before = now();
        let seen = clock(&trip.console()).len();
        wait_until("the time", || clock(&trip.console()).len() > seen + 1);
        let (behind, console) = (now(), trip.console());
        assert!(!console.contains("BROKEN"), "{console}");
        let times = clock(&console);
        let (first_up, first_wall) = times[0];
        for pair in times.windows(2) {
            let [(up_before, wall_before), (up, wall)] = pair else { continue };
            assert!(up >= up_before && wall >= wall_before, "a clock went backwards: {pair:?}\n{console}");
            let apart = (wall - first_wall) - (up - first_up);
            assert!(apart.abs() < 3.0, "the clocks are {apart} s apart: {pair:?}\n{console}");
        }
        let guest = times[times.len() - 1].1;
        assert!(
            (before - 2.0..=behind + 2.0).contains(&guest),
            "the guest's wall time is {guest}, the host's {before} to {behind}"
        );
        let log = self.kernel_log();
        assert!(!COMPLAINTS.iter().any(|word| log.contains(word)), "{log}");
    }
}

/// A program on the client that says something line by line.
pub(super) struct Talk {
    child: Child,
    hearing: JoinHandle<Vec<String>>,
}

impl Talk {
    pub(super) fn start(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("it can be started");
        let said = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let hearing = std::thread::spawn(move || said.lines().map_while(Result::ok).collect());
        Self { child, hearing }
    }

    /// Tells it by the end of its input, or ends it; and what it said.
    pub(super) fn finish(mut self, kill: bool) -> Vec<String> {
        drop(self.child.stdin.take());
        if kill {
            self.child.kill().expect("it runs");
        }
        wait_until("the end of a program", || self.child.try_wait().expect("it is a child").is_some());
        self.hearing.join().expect("it hears until the end")
    }
}

#[test]
fn a_key_value_server_and_its_connection_outlive_moves() {
    let Some(site) = &Site::new("a_key_value_server_and_its_connection_outlive_moves") else { return };
    let Pair { a, b, .. } = &site.pair;
    let mut trip = Trip::begin([a, b], "serve,memory", &["--vcpus", "2"]);
    let asking = Talk::start(site.on_client("lab-load", &["ask", &format!("{GUEST}:5000"), "11"]));
    let ping = Talk::start(site.on_client("ping", &["-i", &PING_EVERY_S.to_string(), "-W", "1", GUEST]));
    for _ in 0..4 {
        trip.hop(&[]);
        trip.wait_for("checked ", 1);
    }
    let replies = ping.finish(true);
    let said = asking.finish(false);
    let sent = replies.iter().filter_map(|line| line.split_once("seq=")?.1.split(' ').next()?.parse().ok());
    let (last, heard) = sent.fold((0.0, 0.0), |(_, heard), number: f64| (number, heard + 1.0));
    let lost = last + 1.0 - heard;
    let explained = (trip.down_s + f64::from(trip.hops()) * PATIENCE_S) / PING_EVERY_S;
    println!("{said:?}; {lost} of {} pings lost, down for {:.3} s in all", last + 1.0, trip.down_s);
    assert!(said.last().is_some_and(|line| line.starts_with("asked ")), "{said:?}\n{}", trip.console());
    assert!(heard > 0.0 && lost <= explained, "{lost} pings lost, {explained} explained: {replies:#?}");
    site.assert_well(&trip);
}

#[test]
fn four_vcpus_compress_and_check_memory_while_they_move() {
    let Some(site) = &Site::new("four_vcpus_compress_and_check_memory_while_they_move") else { return };
    let Pair { a, b, .. } = &site.pair;
    let mut trip = Trip::begin([a, b], "compress,memory", &["--vcpus", "4"]);
    for _ in 0..2 {
        trip.hop(&[]);
        trip.wait_for("packed ", 1);
        trip.wait_for("checked ", 1);
    }
    site.assert_well(&trip);
}

#[test]
fn an_idle_guest_moves_and_notices_nothing() {
    let Some(site) = &Site::new("an_idle_guest_moves_and_notices_nothing") else { return };
    let Pair { a, b, .. } = &site.pair;
    let mut trip = Trip::begin([a, b], "", &[]);
    for _ in 0..2 {
        trip.hop(&[]);
        trip.wait_for("T ", 5);
    }
    site.assert_well(&trip);
}

#[test]
fn files_are_durable_on_a_disk_that_both_ends_see() {
    let Some(site) = &Site::new("files_are_durable_on_a_disk_that_both_ends_see") else { return };
    // Both ends on one machine see the same file, as on shared storage. A disk that moves itself goes between `site.pair`'s hosts.
    let [a, b] = &[(); 2].map(|()| Host::new(Path::new(MIGRATE)).moved_to(machine(&laboratory().lab, 0)));
    introduce(a, b);
    let folder = a.path("disks").to_string_lossy().into_owned();
    let disk = format!("{folder}/disk");
    let options = "has_journal,extents,metadata_csum";
    sh(a, &format!("mkdir -p {folder} && truncate -s 96M {disk} && mke2fs -q -F -O {options} {disk}"));
    let mut trip = Trip::begin([a, b], "write", &["--disk", &disk]);
    trip.wait_for("wrote ", 4);
    for _ in 0..4 {
        trip.hop(&["--disks", &folder]);
        trip.wait_for("wrote ", 4);
    }
    site.assert_well(&trip);
    site.on_client("nc", &["-w", "10", GUEST, "5002"]).stdin(Stdio::null()).output().expect("nc");
    trip.here().wait_phase("v", None);
    let console = trip.console();
    let files = console.lines().find_map(|line| line.trim().strip_prefix("files: "));
    let files = files.unwrap_or_else(|| panic!("{console}"));
    println!("{files}");
    let counted = files.strip_suffix(" are right").and_then(|files| files.split_once(" of "));
    assert!(counted.is_some_and(|(right, all)| right == all), "{console}");
    assert!(!console.contains("BROKEN"), "{console}");
    sh(a, &format!("e2fsck -f -n {disk}"));
}

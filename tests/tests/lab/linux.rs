//! A Linux guest as a distribution ships it: its memory, its clock, its connections and its disk outlive moves under load. The guest
//! says itself whether it holds what it must (`work.sh`); a third host talks to it all the time.

use super::{HOST_KVM, MIGRATE, Pair, laboratory, machine, wait_until};
use e2e::Host;
use e2e::host::introduce;
use e2e::lab::image;
use serde_json::Value;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// What the guest does.
const WORK: &str = include_str!("work.sh");

/// Where `work.sh` puts it on the private network.
const GUEST: &str = "10.78.0.100";

const MAC: &str = "02:00:00:00:01:00";

/// The tap on both hosts.
const TAP: &str = "tap-guest";

/// How often a third host asks, and how long a move may keep it waiting beyond the downtime: an emulated host takes its time to start a
/// VMM's threads, and a connection waits for a retransmission, whose time doubles.
const ASKED_EVERY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(3);

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
struct Site {
    pair: Pair,
    client: Host,
}

impl Site {
    /// `None`, and said, if the suite is left out of this run, or is run without a third host.
    fn new(test: &str) -> Option<Self> {
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

    /// What the guest's kernel logged since it works.
    fn kernel_log(&self) -> String {
        let mut command = self.client.there(Path::new("nc"));
        let log = command.args([GUEST, "5001"]).stdin(Stdio::null()).output().expect("nc");
        let log = String::from_utf8_lossy(&log.stdout).into_owned();
        log.split_once("lab: at work").unwrap_or_else(|| panic!("no log of a kernel: {log}")).1.to_owned()
    }

    /// Tells the guest to end.
    fn end(&self) {
        let mut command = self.client.there(Path::new("nc"));
        command.args([GUEST, "5002"]).stdin(Stdio::null()).output().expect("nc");
    }
}

/// Boots the guest, with more options than it always has, and waits until it is at work.
fn boot(host: &Host, more: &[&str]) {
    let here = Host::new(Path::new(MIGRATE));
    std::fs::create_dir(here.path("files")).expect("a directory");
    std::fs::write(here.path("files/work"), image::script(WORK)).expect("a file");
    let files = here.copy_to(host, "files");
    sh(host, &format!("cat /boot/initramfs {0}/work >{0}/initramfs", files.display()));
    let (initramfs, card) = (files.join("initramfs"), format!("tap={TAP},mac={MAC}"));
    let fixed = [
        &["vm", "run", "--detach", "--name", "v", "--memory", "256MiB", "--kernel", "/boot/vmlinuz"][..],
        &["--initrd", &initramfs.to_string_lossy(), "--cmdline", "console=ttyS0 quiet panic=-1"],
        &["--net", &card, "--rng", "--serial", &console(host, 0)],
    ];
    host.run(&[&fixed.concat()[..], more].concat()).success();
    wait_until("the guest to work", || said(host, 0).contains("at work"));
}

/// A shell's output on a host.
fn sh(host: &Host, script: &str) -> String {
    let mut command = host.there(Path::new("sh"));
    let done = command.args(["-c", script]).stdin(Stdio::null()).output().expect("it can be started");
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// Where the guest's console goes during its stay of this number on a host.
fn console(host: &Host, stay: u32) -> String {
    host.path(&format!("console-{stay}")).to_string_lossy().into_owned()
}

/// What it said there.
fn said(host: &Host, stay: u32) -> String {
    let mut command = host.there(Path::new("cat"));
    let read = command.arg(console(host, stay)).stdin(Stdio::null()).output().expect("cat");
    String::from_utf8_lossy(&read.stdout).into_owned()
}

/// Moves `v` to its stay of this number, and gives the sender's report.
fn hop(from: &Host, to: &Host, stay: u32, more: &[&str]) -> Value {
    let console = console(to, stay);
    let (receiver, address) = to.receive(&[&["--taps", TAP, "--serial", &console][..], more].concat());
    // Emulated hosts with other work may be slower than the guest: then it is stopped behind the third round.
    let limits =
        ["--downtime", "400ms", "--max-downtime", "10s", "--max-rounds", "3", "--on-timeout", "force"];
    let sent = from.run(&[&["send", "v", &address][..], &limits].concat()).success();
    receiver.finish().success();
    let report = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}")).clone();
    assert_eq!(report["outcome"]["type"], "moved");
    println!("moved in {} us, down for {} us", report["total_us"], report["downtime_us"]);
    report
}

/// A command on the client that is asked line by line or speaks by itself, until it is finished.
struct Talk {
    child: Child,
    asking: Option<JoinHandle<u64>>,
    hearing: JoinHandle<Vec<String>>,
    enough: Arc<AtomicBool>,
}

impl Talk {
    /// `asked`: lines with a number are written to it, one in [`ASKED_EVERY`].
    fn start(mut command: Command, asked: bool) -> Self {
        command.stdin(if asked { Stdio::piped() } else { Stdio::null() }).stdout(Stdio::piped());
        let mut child = command.spawn().expect("it can be started");
        let said = BufReader::new(child.stdout.take().expect("stdout is piped"));
        let hearing = std::thread::spawn(move || said.lines().map_while(Result::ok).collect());
        let enough = Arc::new(AtomicBool::new(false));
        let asking = child.stdin.take().map(|mut stdin| {
            let enough = enough.clone();
            std::thread::spawn(move || {
                let mut asked = 0;
                while !enough.load(Ordering::Relaxed) && writeln!(stdin, "line {asked}").is_ok() {
                    asked += 1;
                    std::thread::sleep(ASKED_EVERY);
                }
                asked
            })
        });
        Self { child, asking, hearing, enough }
    }

    /// How many lines were asked, and what was said.
    fn finish(mut self) -> (u64, Vec<String>) {
        self.enough.store(true, Ordering::Relaxed);
        let asked = match self.asking.take() {
            Some(asking) => asking.join().expect("it asks until it is told to stop"),
            None => {
                self.child.kill().expect("it runs");
                0
            }
        };
        let child = &mut self.child;
        let mut ended = || child.try_wait().expect("it is a child").is_some();
        wait_until("the end of a connection", &mut ended);
        (asked, self.hearing.join().expect("it hears until the end"))
    }
}

/// "T UPTIME EPOCH" of a console.
fn clock(console: &str) -> Vec<(f64, f64)> {
    let times = console.lines().filter_map(|line| {
        let (uptime, epoch) = line.trim().strip_prefix("T ")?.split_once(' ')?;
        Some((uptime.parse().ok()?, epoch.parse().ok()?))
    });
    times.collect()
}

#[test]
fn a_linux_guest_keeps_its_memory_its_clock_and_its_connections() {
    let Some(site) = &Site::new("a_linux_guest_keeps_its_memory_its_clock_and_its_connections") else {
        return;
    };
    let Site { pair: Pair { a, b, .. }, client } = site;
    boot(a, &["--vcpus", "2"]);
    let mut connection = client.there(Path::new("nc"));
    connection.args([GUEST, "5000"]);
    let connection = Talk::start(connection, true);
    let mut ping = client.there(Path::new("ping"));
    ping.args(["-i", "0.2", "-W", "1", GUEST]);
    let ping = Talk::start(ping, false);

    let mut down_s = 0.0;
    for (stay, from, to) in [(1, a, b), (2, b, a)] {
        let report = hop(from, to, stay, &[]);
        down_s += report["downtime_us"].as_f64().expect("a downtime") / 1e6;
        wait_until("the guest to say more", || clock(&said(to, stay)).len() > 4);
    }
    let console = [said(a, 0), said(b, 1), said(a, 2)].concat();

    let (asked, answers) = connection.finish();
    let expected: Vec<_> = (0..asked).map(|number| format!("line {number}")).collect();
    assert_eq!(answers, expected, "a connection lost, doubled or reordered something");
    let (_, replies) = ping.finish();
    let numbers =
        replies.iter().filter_map(|line| line.split_once("seq=")?.1.split(' ').next()?.parse::<u32>().ok());
    let (last, heard) = numbers.fold((0, 0), |(_, heard), number| (number, heard + 1));
    let lost = last + 1 - heard;
    println!("{} answers, {lost} of {} pings lost, down for {down_s:.3} s in all", answers.len(), last + 1);
    let explained = (down_s + 2.0 * PATIENCE.as_secs_f64()) / ASKED_EVERY.as_secs_f64();
    assert!(f64::from(lost) <= explained, "{lost} pings lost, {explained} explained: {replies:#?}");

    assert!(!console.contains("BROKEN") && console.contains("kept"), "{console}");
    let times = clock(&console);
    for pair in times.windows(2) {
        let [(before, wall_before), (behind, wall_behind)] = pair else { continue };
        let (went, wall) = (behind - before, wall_behind - wall_before);
        assert!(went >= 0.0 && wall >= 0.0, "a clock went backwards: {pair:?}\n{console}");
        assert!((went - wall).abs() < 2.5, "the clocks disagree: {pair:?}\n{console}");
        assert!(went < 2.0 + down_s + PATIENCE.as_secs_f64(), "time jumped: {pair:?}\n{console}");
    }
    let guest = times.last().expect("it says the time").1;
    let host: f64 = sh(a, "date +%s").trim().parse().expect("a time");
    assert!((guest - host).abs() < 5.0, "the guest's wall time is {guest}, the host's {host}");
    let log = site.kernel_log();
    assert!(!COMPLAINTS.iter().any(|word| log.contains(word)), "{log}");
}

#[test]
fn a_linux_guest_writes_on_its_disk_while_it_moves() {
    let Some(site) = &Site::new("a_linux_guest_writes_on_its_disk_while_it_moves") else { return };
    // Both ends on one machine see the same file, as on shared storage.
    let [a, b] = &[(); 2].map(|()| Host::new(Path::new(MIGRATE)).moved_to(machine(&laboratory().lab, 0)));
    introduce(a, b);
    let folder = a.path("disks").to_string_lossy().into_owned();
    let disk = format!("{folder}/disk");
    sh(
        a,
        &format!(
            "mkdir -p {folder} && truncate -s 96M {disk} && mke2fs -q -F -O has_journal,extents,metadata_csum {disk}"
        ),
    );
    boot(a, &["--disk", &disk]);
    let wrote =
        |host: &Host, stay| said(host, stay).lines().filter(|line| line.starts_with("wrote ")).count();
    wait_until("writes", || wrote(a, 0) > 3);
    for (stay, from, to) in [(1, a, b), (2, b, a)] {
        hop(from, to, stay, &["--disks", &folder]);
        wait_until("writes behind a move", || wrote(to, stay) > 3);
    }
    let log = site.kernel_log();
    assert!(!COMPLAINTS.iter().any(|word| log.contains(word)), "{log}");
    site.end();
    a.wait_phase("v", None);
    let console = [said(a, 0), said(b, 1), said(a, 2)].concat();
    let files =
        console.lines().find_map(|line| line.strip_prefix("files: ")).unwrap_or_else(|| panic!("{console}"));
    let (right, all) = files
        .trim()
        .strip_suffix(" are right")
        .and_then(|files| files.split_once(" of "))
        .expect("two numbers");
    println!("{files}");
    assert!(right == all && !console.contains("BROKEN"), "{console}");
    sh(a, &format!("e2fsck -f -n {disk}"));
}

//! A Linux guest that is moved there and back, and what it said on the way.

use super::linux::TAP;
use super::{LOAD, MIGRATE};
use e2e::Host;
use e2e::host::EMULATED_STEP_LIMIT;
use e2e::lab::image;
use serde_json::Value;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

/// What the guest does.
const WORK: &str = include_str!("work.sh");

const MAC: &str = "02:00:00:00:01:00";

/// A guest on its way between two hosts.
pub(super) struct Trip<'a> {
    hosts: [&'a Host; 2],
    /// How often it has moved.
    hops: u32,
    /// The downtimes of its moves, summed.
    pub down_s: f64,
}

impl<'a> Trip<'a> {
    /// Boots the guest on the first host, with more options than it always has, and waits until it is at work.
    pub(super) fn begin(hosts: [&'a Host; 2], work: &str, more: &[&str]) -> Self {
        let (here, host) = (Host::new(Path::new(MIGRATE)), hosts[0]);
        std::fs::create_dir(here.path("files")).expect("a directory");
        let load = LOAD.parse().expect("a program");
        let scratch = tempfile::tempdir().expect("a directory");
        let files = image::script(WORK, &[load], scratch.path()).expect("an archive");
        std::fs::write(here.path("files/work"), files).expect("a file");
        let files = here.copy_to(host, "files");
        sh(host, &format!("cat /boot/initramfs {0}/work >{0}/initramfs", files.display()));
        let (initramfs, card) = (files.join("initramfs"), format!("tap={TAP},mac={MAC}"));
        let cmdline = format!("console=ttyS0 quiet panic=-1 work={work}");
        let trip = Self { hosts, hops: 0, down_s: 0.0 };
        let fixed = [
            &["vm", "run", "--detach", "--name", "v", "--memory", "256MiB", "--kernel", "/boot/vmlinuz"][..],
            &["--initrd", &initramfs.to_string_lossy(), "--cmdline", &cmdline],
            &["--net", &card, "--rng", "--serial", &trip.console_file(0)],
        ];
        host.run(&[&fixed.concat()[..], more].concat()).success();
        trip.wait_for("at work", 1);
        trip
    }

    /// Where it is.
    pub(super) fn here(&self) -> &'a Host {
        self.host(self.hops)
    }

    fn host(&self, stay: u32) -> &'a Host {
        self.hosts[stay as usize % 2]
    }

    pub(super) fn hops(&self) -> u32 {
        self.hops
    }

    /// Where its console goes during a stay.
    fn console_file(&self, stay: u32) -> String {
        self.host(stay).path(&format!("console-{stay}")).to_string_lossy().into_owned()
    }

    /// What it said during a stay.
    fn said(&self, stay: u32) -> String {
        let mut command = self.host(stay).there(Path::new("cat"));
        let read = command.arg(self.console_file(stay)).stdin(Stdio::null()).output().expect("cat");
        String::from_utf8_lossy(&read.stdout).into_owned()
    }

    /// What it said on its whole way.
    pub(super) fn console(&self) -> String {
        (0..=self.hops).map(|stay| self.said(stay)).collect()
    }

    /// Waits until so many lines of this stay begin so.
    pub(super) fn wait_for(&self, begin: &str, number: usize) {
        let until = Instant::now() + EMULATED_STEP_LIMIT;
        loop {
            let said = self.said(self.hops);
            assert!(!said.contains("BROKEN"), "{said}");
            if said.lines().filter(|line| line.starts_with(begin)).count() >= number {
                return;
            }
            assert!(Instant::now() < until, "waited for a guest to say {begin:?}: {}", self.console());
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Moves it to the other host, with these options of the receiver.
    pub(super) fn hop(&mut self, more: &[&str]) {
        let from = self.here();
        self.hops += 1;
        let console = self.console_file(self.hops);
        let (receiver, address) =
            self.here().receive(&[&["--taps", TAP, "--serial", &console][..], more].concat());
        // Emulated hosts with other work may be slower than the guest: then it is stopped behind the third round.
        let limits =
            ["--downtime", "400ms", "--max-downtime", "10s", "--max-rounds", "3", "--on-timeout", "force"];
        let sent = from.run(&[&["send", "v", &address][..], &limits].concat()).success();
        receiver.finish().success();
        let report: &Value = sent.event("report").unwrap_or_else(|| panic!("{sent:#?}"));
        assert_eq!(report["outcome"]["type"], "moved");
        println!("moved in {} us, down for {} us", report["total_us"], report["downtime_us"]);
        self.down_s += report["downtime_us"].as_f64().expect("a downtime") / 1e6;
    }
}

/// A shell's output on a host.
pub(super) fn sh(host: &Host, script: &str) -> String {
    let mut command = host.there(Path::new("sh"));
    let done = command.args(["-c", script]).stdin(Stdio::null()).output().expect("it can be started");
    assert!(done.status.success(), "{script}: {}", String::from_utf8_lossy(&done.stderr));
    String::from_utf8_lossy(&done.stdout).into_owned()
}

/// "T UPTIME EPOCH" of a console.
pub(super) fn clock(console: &str) -> Vec<(f64, f64)> {
    let times = console.lines().filter_map(|line| {
        let (uptime, epoch) = line.trim().strip_prefix("T ")?.split_once(' ')?;
        Some((uptime.parse().ok()?, epoch.parse().ok()?))
    });
    times.collect()
}

//! A guest, a store, and the two commands between them.

use super::super::Options;
use super::super::account::{SETTLE, await_tick, micros, speed, stats, wait_running};
use super::super::cases::Case;
use super::super::memory::touch;
use crate::Host;
use crate::guest::Window;
use crate::process::Finished;
use rustix::process::Signal;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What the guest that is written down is called, the one that is restored, and one beside it.
const VM: &str = "bench";
const RESTORED: &str = "restored";
const OTHER: &str = "other";

/// The usual store, in the scene's directory.
pub(super) const STORE: &str = "store";

/// Where the store lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Medium {
    /// Where `--store` says, or in the temporary directory.
    Disk,
    /// In memory.
    Memory,
}

/// A guest that writes, and a store for its checkpoints.
pub(super) struct Scene {
    pub host: Host,
    pub window: Window,
    memory_mib: u64,
    directory: tempfile::TempDir,
}

/// A restore that has ended, with its guest still there.
pub(super) struct Restored {
    pub report: Value,
    /// From the command's start to its end.
    pub wall_us: u64,
    /// From the command's start until it said that the guest was let go.
    pub runs_wall_us: u64,
    /// From the command's start until the guest had ticked.
    pub tick_wall_us: u64,
}

impl Scene {
    /// Starts the guest.
    pub(super) fn start(options: &Options, case: &Case, seed: u64, medium: Medium) -> Self {
        let host = Host::new(&options.program);
        let cmdline = format!("{} seed={seed} report_ms=0", case.cmdline);
        host.run_ledger(VM, &format!("{}MiB", case.memory_mib), &cmdline, &["--serial", "none"]);
        let window = Window::open(host.vm_pid(VM)).expect("the guest's memory");
        wait_running(&window);
        let parent = match medium {
            Medium::Disk => options.store.clone().unwrap_or_else(std::env::temp_dir),
            Medium::Memory => PathBuf::from("/dev/shm"),
        };
        let directory = tempfile::Builder::new()
            .prefix("migrate-bench-")
            .tempdir_in(&parent)
            .unwrap_or_else(|error| panic!("a directory in {}: {error}", parent.display()));
        Self { host, window, memory_mib: case.memory_mib, directory }
    }

    /// The directory in which the store is.
    pub(super) fn directory(&self) -> &Path {
        self.directory.path()
    }

    fn store(&self) -> String {
        self.place(STORE)
    }

    fn place(&self, name: &str) -> String {
        self.directory.path().join(name).to_string_lossy().into_owned()
    }

    /// Takes one checkpoint. Answers its report, and how long the command took.
    pub(super) fn take(&self, more: &[&str]) -> (Value, u64) {
        self.take_into(STORE, more)
    }

    /// As [`Scene::take`], with the longest gap on the guest's clock meanwhile, in microseconds.
    pub(super) fn take_watched(&self, more: &[&str]) -> (Value, u64, u64) {
        let before = stats(&self.window);
        let (report, wall_us) = self.take(more);
        std::thread::sleep(SETTLE);
        let after = stats(&self.window);
        let gap = after.longest_gap_since(before.tsc_last).and_then(|gap| after.us(gap.cycles));
        // No gap longer than two ticks: then two ticks bound it.
        (report, wall_us, gap.unwrap_or(2 * after.tick_us))
    }

    /// As [`Scene::take`], into another store beside the usual one.
    pub(super) fn take_into(&self, store: &str, more: &[&str]) -> (Value, u64) {
        self.take_of(VM, store, more)
    }

    /// A full checkpoint of another guest, of which nothing is left behind it but that.
    pub(super) fn take_another(&self, case: &Case, seed: u64) {
        let cmdline = format!("{} seed={seed} report_ms=0", case.cmdline);
        self.host.run_ledger(OTHER, &format!("{}MiB", case.memory_mib), &cmdline, &["--serial", "none"]);
        wait_running(&Window::open(self.host.vm_pid(OTHER)).expect("its memory"));
        self.take_of(OTHER, STORE, &[]);
        self.host.run(&["vm", "stop", OTHER]).success();
    }

    fn take_of(&self, vm: &str, store: &str, more: &[&str]) -> (Value, u64) {
        let store = self.place(store);
        let begun = Instant::now();
        let taken = self.host.run(&[&["checkpoint", vm, "--store", &store][..], more].concat()).success();
        (report(&taken), micros(begun))
    }

    /// Takes checkpoints by a schedule for a while, and answers how many were committed.
    pub(super) fn scheduled(&self, every: &str, during: impl FnOnce()) -> u64 {
        let taking = self.host.start(&["checkpoint", VM, "--store", &self.store(), "--every", every]);
        during();
        taking.signal(Signal::INT);
        let ended = taking.finish();
        let committed = |line: &&Value| line["event"] == "checkpoint" && line["committed"] == true;
        ended.lines.iter().filter(committed).count() as u64
    }

    /// Makes a full checkpoint of what another is a delta for, and answers its name.
    pub(super) fn compacted(&self, id: &str) -> String {
        let made = self.host.run(&["store", "compact", "--store", &self.store(), id]).success();
        let name =
            made.lines.iter().find_map(|line| line["compacted"]["id"].as_str().or(line["id"].as_str()));
        name.unwrap_or_else(|| panic!("no new checkpoint: {made:#?}")).to_owned()
    }

    /// Restores a checkpoint.
    ///
    /// # Panics
    /// If it does not come up.
    pub(super) fn restore(&self, id: &str, lazy: bool) -> Restored {
        touch(self.memory_mib);
        let store = self.store();
        let mut arguments = vec!["restore", "--store", &store, id, "--name", RESTORED, "--serial", "none"];
        arguments.extend(lazy.then_some("--lazy"));
        let begun = Instant::now();
        let mut restoring = self.host.start(&arguments);
        restoring.wait_event("running");
        let runs_wall_us = micros(begun);
        let pid = self.host.find_vm_pid(RESTORED).expect("the restored VM");
        await_tick(&Window::open(pid).expect("its memory"));
        let tick_wall_us = micros(begun);
        let ended = restoring.finish().success();
        let wall_us = micros(begun);
        let report = ended.event("restored").expect("a report")["report"].clone();
        Restored { report, wall_us, runs_wall_us, tick_wall_us }
    }

    /// Judges the restored guest's memory, if it is the first of its kind, and ends it.
    pub(super) fn end_restored(&self, judge: bool) {
        if judge {
            self.host.assert_sound(RESTORED);
        }
        self.host.run(&["vm", "stop", RESTORED]).success();
    }

    /// MB/s that the guest writes in so much time, while `during` goes on.
    pub(super) fn speed(&self, time: Duration) -> f64 {
        let begin = stats(&self.window);
        std::thread::sleep(time);
        speed(&begin, &stats(&self.window))
    }
}

/// What a checkpoint did.
fn report(taken: &Finished) -> Value {
    taken.event("checkpoint").unwrap_or_else(|| panic!("no report: {taken:#?}")).clone()
}

/// A member of a report that is a number.
pub(super) fn number(report: &Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("no {name} in {report:#}"))
}

//! Boots the image under QEMU, stops it at arbitrary moments and checks its memory from outside.
//!
//! Needs qemu-system-x86_64; says so and passes where there is none.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking, its helpers too")]

use std::fs::{File, OpenOptions};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use ledger::{Damage, Finder, IMAGE, PAGE_SIZE, State, Stats, Subject, Verdict, verify};
use tempfile::TempDir;

const RAM_MIB: u64 = 128;

/// A machine may be busy; a guest that has not come so far by then never will.
const PATIENCE: Duration = Duration::from_secs(60);

struct Vm {
    qemu: Child,
    memory: File,
    _folder: TempDir,
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

/// The back ends this machine has; prints why for each it does not.
fn accelerators() -> Vec<&'static str> {
    if let Err(error) = Command::new("qemu-system-x86_64").arg("--version").output() {
        eprintln!("skipped: qemu-system-x86_64 does not start: {error}");
        return Vec::new();
    }
    if let Err(error) = OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        eprintln!("skipped under KVM: /dev/kvm does not open: {error}");
        return vec!["tcg"];
    }
    vec!["tcg", "kvm"]
}

impl Vm {
    fn boot(accelerator: &str, line: &str) -> Vm {
        let folder = tempfile::tempdir().unwrap();
        let (image, ram) = (folder.path().join("ledger.elf"), folder.path().join("ram"));
        std::fs::write(&image, IMAGE).unwrap();
        let backend =
            format!("memory-backend-file,id=ram,size={RAM_MIB}M,share=on,mem-path={}", ram.display());
        let mut qemu = Command::new("qemu-system-x86_64")
            .args(["-accel", accelerator, "-machine", "microvm,memory-backend=ram", "-object", &backend])
            .args(["-m", &RAM_MIB.to_string(), "-nodefaults", "-no-reboot", "-display", "none"])
            .args(["-serial", "stdio", "-append", line, "-kernel"])
            .arg(image)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let started = Instant::now();
        let memory = loop {
            // QEMU creates the file, then sets its size.
            match OpenOptions::new().read(true).write(true).open(&ram) {
                Ok(file) if file.metadata().unwrap().len() == RAM_MIB << 20 => break file,
                _ if started.elapsed() < PATIENCE && qemu.try_wait().unwrap().is_none() => {
                    sleep(Duration::from_millis(5));
                }
                _ => panic!("QEMU did not start"),
            }
        };
        Vm { qemu, memory, _folder: folder }
    }

    fn read(&self) -> impl FnMut(u64, &mut [u8]) -> io::Result<()> {
        |gpa, bytes| self.memory.read_exact_at(bytes, gpa)
    }

    fn wait_for(&self, what: impl Fn(&Stats) -> bool) -> Stats {
        let started = Instant::now();
        loop {
            // While the guest runs, the block may also be caught between two of its stores.
            let stats = Stats::read(self.read());
            match stats {
                Ok(stats) if what(&stats) => return stats,
                stats => assert!(started.elapsed() < PATIENCE, "still {stats:?}"),
            }
            sleep(Duration::from_millis(2));
        }
    }

    fn signal(&self, signal: &str) {
        let status = Command::new("kill").args([signal, &self.qemu.id().to_string()]).status().unwrap();
        assert!(status.success());
    }

    /// Stops all of QEMU's threads, and with them the vCPU between two instructions.
    fn freeze(&self) {
        self.signal("-STOP");
        let tasks = format!("/proc/{}/task", self.qemu.id());
        let stopped = || {
            std::fs::read_dir(&tasks).unwrap().all(|task| {
                let stat = std::fs::read_to_string(task.unwrap().path().join("stat")).unwrap();
                stat.rsplit(") ").next().unwrap().starts_with('T')
            })
        };
        while !stopped() {
            sleep(Duration::from_millis(1));
        }
    }

    fn thaw(&self) {
        self.signal("-CONT");
    }

    fn verify(&self) -> Verdict {
        let stats = Stats::read(self.read()).unwrap();
        verify(&stats, self.read()).unwrap()
    }

    fn page(&self, gpa: u64) -> Vec<u8> {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        self.memory.read_exact_at(&mut bytes, gpa).unwrap();
        bytes
    }
}

#[test]
fn frozen_at_any_moment_its_memory_is_sound() {
    for accelerator in accelerators() {
        for content in ["random", "text", "zero"] {
            let line =
                format!("fill=48M ws=16M rate=max pattern=hot serial=none content={content} scrub=500");
            let vm = Vm::boot(accelerator, &line);
            let mut in_flight = 0;
            let mut last = 0;
            vm.wait_for(|stats| stats.setup.is_some());
            for turn in 0..12 {
                // The first turns commonly come while it fills.
                if turn == 4 {
                    vm.wait_for(|stats| stats.iterations > 0);
                }
                sleep(Duration::from_millis(7 * turn));
                vm.freeze();
                let verdict = vm.verify();
                vm.thaw();
                assert!(verdict.is_sound(), "{accelerator} {content}: {verdict}");
                in_flight += u32::from(verdict.in_flight.is_some());
                assert!(verdict.iterations >= last);
                last = verdict.iterations;
            }
            println!("{accelerator} {content}: {last} iterations, {in_flight} of 12 freezes in a write");
            assert!(last > 0);
        }
    }
}

#[test]
fn guest_and_host_both_notice_what_is_lost_stale_torn_and_foreign() {
    for accelerator in accelerators() {
        let line = "fill=32M ws=1M rate=2 pattern=seq serial=none scrub=2000";
        let vm = Vm::boot(accelerator, line);
        vm.wait_for(|stats| stats.state == State::Running);
        vm.freeze();
        let stats = Stats::read(vm.read()).unwrap();
        let (setup, seen) = (stats.setup.unwrap(), stats.iterations);
        let gpa = |page| setup.ranges.gpa_of(page).unwrap();
        let old = vm.page(gpa(255));
        vm.thaw();
        // Page 255 is the last of the working set; at 2 MB/s it is not written again before it is scrubbed.
        vm.wait_for(|stats| stats.iterations > seen + 256 && stats.iterations % 256 < 64);
        vm.freeze();
        vm.memory.write_all_at(&[0; PAGE_SIZE as usize], gpa(4000)).unwrap();
        vm.memory.write_all_at(&old, gpa(255)).unwrap();
        vm.memory.write_all_at(&[0x5A], gpa(5000) + 1234).unwrap();
        vm.memory.write_all_at(&vm.page(gpa(6001)), gpa(6000)).unwrap();
        let verdict = vm.verify();
        let found: Vec<_> = verdict.faults.iter().map(|fault| (fault.page, fault.damage)).collect();
        let damaged =
            [(255, Damage::Stale), (4000, Damage::Lost), (5000, Damage::Torn), (6000, Damage::Foreign)];
        assert_eq!(found, damaged, "{accelerator}: {verdict}");
        assert!(verdict.faults.iter().all(|fault| fault.subject == Subject::Page));
        vm.thaw();
        let stats = vm.wait_for(|stats| stats.errors.iter().all(|count| *count > 0));
        for (page, damage) in damaged {
            let noticed = stats.first_errors.iter().any(|error| (error.page, error.damage) == (page, damage));
            assert!(noticed, "{accelerator}: {page} {:?}", stats.first_errors);
        }
        assert!(stats.first_errors.iter().any(|error| error.finder == Finder::Scrub));
    }
}

#[test]
fn a_long_gap_is_noticed() {
    for accelerator in accelerators() {
        // Where the TSC frequency is not known it is taken for 1 GHz, so a tick is at most 10 ms here.
        let vm = Vm::boot(accelerator, "fill=8M rate=1 serial=none tick_us=1000");
        let before = vm.wait_for(|stats| stats.state == State::Running).tsc_last;
        vm.freeze();
        sleep(Duration::from_millis(400));
        vm.thaw();
        let long = |stats: &Stats| stats.longest_gap_since(before).filter(|gap| gap.cycles > 200_000_000);
        let stats = vm.wait_for(|stats| long(stats).is_some());
        vm.freeze();
        let gaps = Stats::read(vm.read()).unwrap().gaps;
        vm.thaw();
        assert!(gaps.windows(2).all(|pair| pair[0].tsc_end < pair[1].tsc_end), "{gaps:?}");
        assert!(gaps.windows(2).all(|pair| pair[0].cycles > pair[1].cycles), "{gaps:?}");
        assert!(stats.longest_gap.cycles >= long(&stats).unwrap().cycles);
    }
}

#[test]
fn it_prints_a_verdict_and_stops() {
    if accelerators().is_empty() {
        return;
    }
    // Port I/O at CPL 3, which a page-table based KVM does not have.
    let line = "fill=8M rate=max serial=port stop_after=5000 scrub=0";
    let mut vm = Vm::boot("tcg", line);
    vm.wait_for(|stats| stats.state == State::Done);
    let verdict = vm.verify();
    assert!(verdict.is_sound());
    assert_eq!(verdict.iterations, 5000);
    // The last line may still be in the serial port when the state is set: its end is waited for, QEMU is not killed first.
    let mut lines = BufReader::new(vm.qemu.stdout.take().unwrap());
    let reader = std::thread::spawn(move || {
        let mut printed = String::new();
        while lines.read_line(&mut printed).unwrap() > 0 && !printed.ends_with("iterations\n") {}
        printed
    });
    let started = Instant::now();
    while !reader.is_finished() && started.elapsed() < PATIENCE {
        sleep(Duration::from_millis(2));
    }
    vm.qemu.kill().unwrap();
    let printed = reader.join().unwrap();
    assert!(printed.contains("ledger: running boot_us="), "{printed}");
    assert!(printed.contains("ledger: sound after 5000 iterations\n"), "{printed}");
}

#[test]
fn it_says_why_it_cannot_start() {
    for accelerator in accelerators() {
        for (line, reason) in [
            ("fill=1G", "fill= wants 262144 pages"),
            ("fill=8M ws=9M", "ws= must not be larger than fill="),
            ("rate=fast", "rate= takes a whole decimal number"),
        ] {
            let vm = Vm::boot(accelerator, line);
            let stats = vm.wait_for(|stats| stats.state == State::Failed);
            assert!(stats.message.starts_with(reason), "{accelerator}: {}", stats.message);
            assert_eq!(stats.command_line, line);
            assert!(verify(&stats, vm.read()).is_err());
        }
    }
}

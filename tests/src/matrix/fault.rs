//! Bringing faults about, and taking away again those that last for a while.

use super::case::{Case, Fault, Moment, Process, Side};
use super::scene::Scene;
use crate::Host;
use crate::guest::Window;
use crate::network::Cable;
use rustix::process::{Pid, Resource, Rlimit, Signal};
use std::io::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};

/// The longest a sender may take to notice and to give up, with all its timeouts and a loaded machine.
const GIVE_UP: Duration = Duration::from_secs(60);

/// Memory that a process which gets no more has left, in bytes.
const LEFT_BYTES: u64 = 256 << 10;

/// What [`Moment::Before`] asks for before the sender starts.
pub(super) fn before(case: &Case, cable: &Cable, a: &Host, b: &Host) {
    match case.fault {
        Fault::Slow(bits_per_s, _) => cable.set_rate(Some(bits_per_s)),
        Fault::DiskFull(Side::Send) => fill_disk(&a.runtime_dir()),
        Fault::DiskFull(Side::Receive) => fill_disk(&b.runtime_dir()),
        _ => {}
    }
}

/// Brings the fault of the case about, lets go what was held, and waits until the sender has ended and everything
/// that lasts for a while is over.
pub(super) fn strike(case: &Case, scene: &mut Scene<'_>) {
    let begun = Instant::now();
    if case.moment != Moment::Before {
        apply(case.fault, scene);
    }
    let stopped = match case.fault {
        Fault::Stop(process, _) => scene.pid(process),
        _ => None,
    };
    // A process that is stopped by its fault and held by its moment goes on when its fault is over.
    if let Some(side) = scene.held
        && stopped != Some(scene.end(side).pid())
    {
        scene.end(side).signal(Signal::CONT);
    }
    let lasting = match case.fault {
        Fault::Stop(_, ms) | Fault::Stall(ms) | Fault::Slow(_, ms) => Some(ms),
        Fault::Blackhole(_, lasting) | Fault::Unplug(lasting) => lasting,
        _ => None,
    };
    let over = lasting.map(|ms| begun + Duration::from_millis(ms));
    let mut undone = false;
    while scene.sender.is_running() {
        assert!(begun.elapsed() < GIVE_UP, "the sender does not come to an end");
        if !undone && over.is_some_and(|over| Instant::now() >= over) {
            undo(case.fault, stopped, scene);
            undone = true;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    undo(case.fault, stopped, scene);
}

fn apply(fault: Fault, scene: &mut Scene<'_>) {
    match fault {
        Fault::Kill(process) => signal(scene.pid(process), Signal::KILL),
        Fault::Stop(process, _) => signal(scene.pid(process), Signal::STOP),
        Fault::Interrupt(side) => scene.end(side).signal(Signal::INT),
        Fault::Blackhole(way, _) => scene.relay.cut(way),
        Fault::Unplug(_) => scene.cable.set_up(false),
        Fault::Stall(_) => scene.relay.hold(),
        Fault::Slow(bits_per_s, _) => scene.cable.set_rate(Some(bits_per_s)),
        Fault::Weather(weather) => scene.relay.weather(weather),
        Fault::DiskFull(Side::Send) => fill_disk(&scene.a.runtime_dir()),
        Fault::DiskFull(Side::Receive) => fill_disk(&scene.b.runtime_dir()),
        Fault::MemoryShort(process) => limit(scene.pid(process), Resource::As, |pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
            let line = status.lines().find_map(|line| line.strip_prefix("VmSize:"))?;
            let kib: u64 = line.trim().strip_suffix(" kB")?.trim().parse().ok()?;
            Some((kib << 10) + LEFT_BYTES)
        }),
        Fault::FilesShort(process) => limit(scene.pid(process), Resource::Nofile, |pid| {
            Some(std::fs::read_dir(format!("/proc/{pid}/fd")).ok()?.count() as u64)
        }),
        Fault::Damage => damage(scene),
        // In place before the sender starts.
        Fault::TooLarge | Fault::Starve(_) | Fault::Reset(..) => {}
    }
}

/// Takes the fault away. What was killed stays dead, and a process that is short of something stays so.
fn undo(fault: Fault, stopped: Option<i32>, scene: &mut Scene<'_>) {
    signal(stopped, Signal::CONT);
    match fault {
        Fault::Blackhole(..) | Fault::Stall(_) | Fault::Weather(_) => scene.relay.mend(),
        Fault::Unplug(_) => scene.cable.set_up(true),
        Fault::Slow(..) => scene.cable.set_rate(None),
        Fault::DiskFull(Side::Send) => clear_disk(&scene.a.runtime_dir()),
        Fault::DiskFull(Side::Receive) => clear_disk(&scene.b.runtime_dir()),
        Fault::Starve(_) => scene.larder = None,
        _ => {}
    }
}

/// Changes a byte of the last page at the destination, which the guest never touches and nobody sends.
fn damage(scene: &Scene<'_>) {
    let pid = scene.pid(Process::DestinationVmm).expect("a VMM at the destination");
    Window::open(pid).expect("its memory").damage_last_page();
}

/// A process that is gone already needs no signal.
fn signal(pid: Option<i32>, signal: Signal) {
    if let Some(pid) = pid.and_then(Pid::from_raw) {
        rustix::process::kill_process(pid, signal).ok();
    }
}

fn limit(pid: Option<i32>, resource: Resource, most: impl Fn(i32) -> Option<u64>) {
    let Some((pid, most)) = pid.and_then(|pid| Some((Pid::from_raw(pid)?, most(pid)?))) else { return };
    let limit = Rlimit { current: Some(most), maximum: Some(most) };
    if let Err(error) = rustix::process::prlimit(Some(pid), resource, limit) {
        assert_eq!(error, rustix::io::Errno::SRCH, "prlimit");
    }
}

/// The file that fills the disk, and the files that use up its inodes.
const FILLER: &str = "filler";

fn fill_disk(dir: &Path) {
    let mut file = std::fs::File::create(dir.join(FILLER)).expect("a file on the small disk");
    while file.write_all(&[0x55; 4096]).is_ok() {}
    let mut number = 0;
    while std::fs::File::create(dir.join(format!("{FILLER}-{number}"))).is_ok() {
        number += 1;
        assert!(number < 100_000, "the disk at {} is no small one", dir.display());
    }
}

fn clear_disk(dir: &Path) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(FILLER) {
            std::fs::remove_file(entry.path()).ok();
        }
    }
}

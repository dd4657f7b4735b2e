//! A limit on the memory of some processes together, by the kernel's memory controller: version 1 or 2, as this host has it.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

/// Where cgroups are (cgroups(7)).
const ROOT: &str = "/sys/fs/cgroup";

/// Groups of this process are numbered.
static NUMBER: AtomicU32 = AtomicU32::new(0);

/// Processes that may use no more than so much memory; the kernel kills one of them when they do. It goes when dropped, and
/// its processes are back where they were.
#[derive(Debug)]
pub struct Larder {
    group: PathBuf,
    home: PathBuf,
}

/// Whether groups can be made here.
pub fn is_usable() -> bool {
    home().is_some_and(|home| Larder::make(&home, 64 << 20).is_ok())
}

/// Where groups with a limit on memory are made.
fn home() -> Option<PathBuf> {
    let first = Path::new(ROOT).join("memory");
    if first.join("memory.limit_in_bytes").exists() {
        return Some(first);
    }
    let controllers = std::fs::read_to_string(Path::new(ROOT).join("cgroup.controllers")).ok()?;
    controllers.split_whitespace().any(|name| name == "memory").then(|| ROOT.into())
}

impl Larder {
    /// Takes a process, and all that it will start, into a new group with so much memory.
    ///
    /// # Panics
    /// If no group can be made: see [`is_usable`].
    pub fn around(pid: i32, bytes: u64) -> Self {
        let home = home().expect("a memory controller");
        let larder = Self::make(&home, bytes).expect("a memory cgroup");
        std::fs::write(larder.group.join("cgroup.procs"), pid.to_string()).expect("the process in its group");
        larder
    }

    fn make(home: &Path, bytes: u64) -> std::io::Result<Self> {
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let group = home.join(format!("migrate-e2e-{}-{number}", std::process::id()));
        std::fs::create_dir(&group)?;
        let larder = Self { group, home: home.into() };
        let limit = |file: &str, value: &str| std::fs::write(larder.group.join(file), value);
        if larder.group.join("memory.limit_in_bytes").exists() {
            limit("memory.limit_in_bytes", &bytes.to_string())?;
        } else {
            limit("memory.max", &bytes.to_string())?;
            // Without swap accounting there is no such file, and then swap is not limited.
            limit("memory.swap.max", "0").ok();
        }
        Ok(larder)
    }
}

impl Drop for Larder {
    fn drop(&mut self) {
        let until = Instant::now() + Duration::from_secs(5);
        // A group can be removed when its last process is gone, also one that was killed a moment ago.
        while std::fs::remove_dir(&self.group).is_err() && Instant::now() < until {
            let inside = std::fs::read_to_string(self.group.join("cgroup.procs")).unwrap_or_default();
            for pid in inside.lines() {
                std::fs::write(self.home.join("cgroup.procs"), pid).ok();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

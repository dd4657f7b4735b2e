//! Memory of this machine, and of the processes that are measured.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Touches memory and gives it back: a host behind this machine may take far longer for a first touch than the machine's
/// own kernel does, which would be measured instead. Whoever takes the memory next has to do so within two seconds: then
/// the kernel reports what is free to such a host again.
pub(super) fn touch(mib: u64) {
    let mut memory = vec![0_u8; usize::try_from(mib << 20).expect("this machine has 64 bits")];
    for page in memory.chunks_mut(4096) {
        page[0] = 1;
    }
    std::hint::black_box(&memory);
}

/// A field of /proc/PID/status in KiB; 0 when the process is gone.
pub(super) fn status_kib(pid: i32, names: &[&str]) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let field = |name: &str| {
        let line =
            status.lines().find(|line| line.strip_prefix(name).is_some_and(|rest| rest.starts_with(':')))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    names.iter().filter_map(|name| field(name)).sum()
}

/// Watches the memory of a process, guest pages (shared memory) aside.
pub(super) struct MemoryWatch {
    stop: Arc<AtomicBool>,
    most_kib: Arc<AtomicU64>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl MemoryWatch {
    pub(super) fn start(pid: i32) -> Self {
        let (stop, most_kib) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let thread = {
            let (stop, most_kib) = (stop.clone(), most_kib.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    most_kib.fetch_max(status_kib(pid, &["RssAnon", "RssFile"]), Ordering::Relaxed);
                    std::thread::sleep(Duration::from_millis(10));
                }
            })
        };
        Self { stop, most_kib, thread: Some(thread) }
    }

    pub(super) fn stop(mut self) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            thread.join().ok();
        }
        self.most_kib.load(Ordering::Relaxed)
    }
}

//! How long a guest's vCPU ran, and how long it waited for a core.

use std::path::PathBuf;

/// What the kernel says of one thread since it began.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Turns {
    pub ran_us: u64,
    /// Ready to run, while others had the cores.
    pub waited_us: u64,
}

impl Turns {
    pub(super) fn since(self, before: Self) -> Self {
        Self {
            ran_us: self.ran_us.saturating_sub(before.ran_us),
            waited_us: self.waited_us.saturating_sub(before.waited_us),
        }
    }
}

/// The thread that runs a guest's only vCPU.
#[derive(Debug, Clone)]
pub(super) struct Vcpu {
    schedstat: PathBuf,
}

impl Vcpu {
    /// Of a VMM whose guest has been at work for a while: the thread that ran the longest.
    pub(super) fn of(vmm_pid: i32) -> Option<Self> {
        let threads = std::fs::read_dir(format!("/proc/{vmm_pid}/task")).ok()?.flatten();
        threads
            .map(|thread| Self { schedstat: thread.path().join("schedstat") })
            .max_by_key(|thread| thread.turns().ran_us)
    }

    /// Nothing once the thread is gone.
    pub(super) fn turns(&self) -> Turns {
        parse(&std::fs::read_to_string(&self.schedstat).unwrap_or_default()).unwrap_or_default()
    }
}

/// "ran waited timeslices", the first two in nanoseconds (Documentation/scheduler/sched-stats.rst).
fn parse(schedstat: &str) -> Option<Turns> {
    let mut micros = schedstat.split_whitespace().map(|nanos| nanos.parse::<u64>().ok().map(|ns| ns / 1000));
    Some(Turns { ran_us: micros.next()??, waited_us: micros.next()?? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_is_gone_has_no_turns() {
        assert_eq!(parse("2500000 1000999 7\n"), Some(Turns { ran_us: 2500, waited_us: 1000 }));
        assert_eq!(parse(""), None);
    }
}

//! A userfaultfd(2) for another process's memory. Only that process can make one, so it is made to: one of its threads is stopped
//! for less than a millisecond, calls the kernel once, and goes on as if nothing had been (ptrace(2)).

use crate::error::{Error, Result};
use nix::errno::Errno;
use nix::sys::ptrace;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::process::{PidfdFlags, PidfdGetfdFlags};
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt as _;
use std::time::{Duration, Instant};

/// `syscall`.
const SYSCALL: [u8; 2] = [0x0f, 0x05];

/// `PTRACE_O_SUSPEND_SECCOMP`: what the thread may not call itself it may call for us.
const SUSPEND_SECCOMP: ptrace::Options = ptrace::Options::from_bits_retain(1 << 21);

/// `UFFD_USER_MODE_ONLY`.
const USER_MODE_ONLY: u64 = 1;

/// How long a thread may take to stop. One that waits for a disk cannot.
const STOP_LIMIT: Duration = Duration::from_secs(2);

/// Bytes of the kernel's `sigset_t`.
const SIGNALS_BYTES: usize = 8;

/// Makes a userfaultfd for the memory of a process, which does not keep it.
///
/// # Errors
/// `Host` saying what did not work; the process goes on as it was.
pub(crate) fn userfaultfd(pid: i32) -> Result<OwnedFd> {
    let wrong = |what: &str, error: &dyn std::fmt::Display| {
        Error::Host(format!("process {pid} cannot be watched: {what}: {error}"))
    };
    let gate = gate(pid).map_err(|error| wrong("its code cannot be read", &error))?;
    let pidfd = rustix::process::Pid::from_raw(pid)
        .ok_or(rustix::io::Errno::SRCH)
        .and_then(|pid| rustix::process::pidfd_open(pid, PidfdFlags::empty()))
        .map_err(|error| wrong("it cannot be held", &error))?;
    let stopped = Stopped::stop(pid).map_err(|error| wrong("it cannot be stopped", &error))?;
    let flags = (libc::O_CLOEXEC | libc::O_NONBLOCK) as u64 | USER_MODE_ONLY;
    let number = stopped
        .call(gate, libc::SYS_userfaultfd as u64, flags)
        .map_err(|error| wrong("it may not make a userfaultfd", &error))?;
    let descriptor = i32::try_from(number)
        .map_err(|_| rustix::io::Errno::BADF)
        .and_then(|number| rustix::process::pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty()));
    stopped
        .call(gate, libc::SYS_close as u64, number)
        .map_err(|error| wrong("what it made cannot be closed there", &error))?;
    descriptor.map_err(|error| wrong("what it made cannot be had", &error))
}

/// Where the process has a `syscall` instruction: in the code that the kernel gives to every process (vdso(7)).
fn gate(pid: i32) -> io::Result<u64> {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let vdso = maps.lines().find(|line| line.ends_with("[vdso]")).and_then(|line| {
        let (start, end) = line.split_once(' ')?.0.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    });
    let (start, end) = vdso.ok_or_else(|| io::Error::other("it has no vdso"))?;
    // A few pages; whatever the file says.
    let mut code = vec![0; usize::try_from(end.saturating_sub(start)).unwrap_or(0).min(1 << 20)];
    File::open(format!("/proc/{pid}/mem"))?.read_exact_at(&mut code, start)?;
    let at = code.windows(SYSCALL.len()).position(|bytes| bytes == SYSCALL);
    at.map(|at| start + at as u64).ok_or_else(|| io::Error::other("its vdso has no syscall instruction"))
}

/// A thread that stands still. Dropped, it goes on where it was.
struct Stopped {
    thread: Pid,
    registers: libc::user_regs_struct,
    signals: [u8; SIGNALS_BYTES],
}

impl Stopped {
    fn stop(pid: i32) -> nix::Result<Self> {
        let thread = Pid::from_raw(pid);
        // Without the right to suspend filters: the call may be allowed all the same.
        ptrace::seize(thread, SUSPEND_SECCOMP)
            .or_else(|_| ptrace::seize(thread, ptrace::Options::empty()))?;
        let stopped = ptrace::interrupt(thread).and_then(|()| wait(thread)).and_then(|()| {
            let (registers, signals) = (ptrace::getregs(thread)?, signals(thread)?);
            Ok(Self { thread, registers, signals })
        });
        let stopped = stopped.inspect_err(|_| ptrace::detach(thread, None).unwrap_or_default())?;
        // Otherwise one that waits would be handled in the middle of our call.
        set_signals(thread, [0xff; SIGNALS_BYTES])?;
        Ok(stopped)
    }

    /// Lets the thread call the kernel.
    fn call(&self, gate: u64, number: u64, argument: u64) -> nix::Result<u64> {
        let mut registers = self.registers;
        registers.rip = gate;
        registers.rax = number;
        registers.rdi = argument;
        // The call that was interrupted is not to be repeated now.
        registers.orig_rax = u64::MAX;
        ptrace::setregs(self.thread, registers)?;
        ptrace::step(self.thread, None)?;
        wait(self.thread)?;
        let answer = ptrace::getregs(self.thread)?.rax as i64;
        match u64::try_from(answer) {
            Ok(answer) => Ok(answer),
            Err(_) => Err(Errno::from_raw(i32::try_from(-answer).unwrap_or(libc::EIO))),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let restored = ptrace::setregs(self.thread, self.registers)
            .and(set_signals(self.thread, self.signals))
            .and(ptrace::detach(self.thread, None));
        if let Err(error) = restored {
            // It was killed meanwhile, mostly.
            tracing::warn!(thread = self.thread.as_raw(), %error, "a thread that was looked at could not be let go");
        }
    }
}

/// Waits until the thread has stopped.
fn wait(thread: Pid) -> nix::Result<()> {
    let until = Instant::now() + STOP_LIMIT;
    loop {
        match waitpid(thread, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL))? {
            WaitStatus::StillAlive if Instant::now() < until => std::thread::sleep(Duration::from_micros(50)),
            WaitStatus::StillAlive => return Err(Errno::ETIMEDOUT),
            WaitStatus::Exited(..) | WaitStatus::Signaled(..) => return Err(Errno::ESRCH),
            _ => return Ok(()),
        }
    }
}

fn signals(thread: Pid) -> nix::Result<[u8; SIGNALS_BYTES]> {
    let mut signals = [0; SIGNALS_BYTES];
    let data = signals.as_mut_ptr();
    // SAFETY: the kernel writes as many bytes as it is told to `signals`.
    let answer = unsafe { libc::ptrace(libc::PTRACE_GETSIGMASK, thread.as_raw(), SIGNALS_BYTES, data) };
    Errno::result(answer).map(|_| signals)
}

fn set_signals(thread: Pid, signals: [u8; SIGNALS_BYTES]) -> nix::Result<()> {
    let data = signals.as_ptr();
    // SAFETY: the kernel reads as many bytes as it is told from `signals`.
    let answer = unsafe { libc::ptrace(libc::PTRACE_SETSIGMASK, thread.as_raw(), SIGNALS_BYTES, data) };
    Errno::result(answer).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::written::{self, Scan, WRITTEN};
    use std::process::{Command, Stdio};

    #[test]
    fn a_process_gives_a_userfaultfd_and_goes_on_as_it_was() {
        // Sleeps in the kernel, and has to be told the truth about how long.
        let child =
            Command::new("sh").args(["-c", "sleep 1; echo done"]).stdout(Stdio::piped()).spawn().unwrap();
        std::thread::sleep(Duration::from_millis(100));
        let fds = || std::fs::read_dir(format!("/proc/{}/fd", child.id())).unwrap().count();
        let before = fds();
        let descriptor = userfaultfd(child.id() as i32).unwrap();
        assert_eq!(fds(), before, "what was made is closed there");
        if written::begin(&descriptor).is_ok() {
            let maps = std::fs::read_to_string(format!("/proc/{}/maps", child.id())).unwrap();
            let line = maps.lines().find(|line| line.ends_with("[heap]")).unwrap();
            let (start, end) = line.split_once(' ').unwrap().0.split_once('-').unwrap();
            let number = |text| u64::from_str_radix(text, 16).unwrap();
            let (start, end) = (number(start), number(end));
            written::register(&descriptor, start, end - start).unwrap();
            let pagemap = File::open(format!("/proc/{}/pagemap", child.id())).unwrap();
            let count = |clean| {
                let mut pages = 0;
                let what =
                    Scan { all: WRITTEN, any: written::PRESENT, tell: WRITTEN, clean, ..Scan::default() };
                let mut tell = |start, end, _| pages += (end - start) / 4096;
                written::scan(&pagemap, start, end, what, &mut tell).unwrap();
                pages
            };
            let first = count(true);
            assert!(first > 0);
            assert_eq!(count(false), 0);
        }
        drop(descriptor);
        let output = child.wait_with_output().unwrap();
        assert!(output.status.success() && output.stdout == b"done\n");
        assert!(userfaultfd(i32::MAX).is_err());
    }
}

//! A program under test: its lines as they come, its exit code, and its end when the test ends.

use serde_json::Value;
use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The longest that any single step of a test may take before the test fails: far above what a loaded machine needs.
pub const STEP_LIMIT: Duration = Duration::from_secs(60);

/// A running program, killed when dropped.
pub struct Running {
    /// What it was started as, for failure texts.
    pub what: String,
    child: Child,
    lines: Receiver<Value>,
    seen: Vec<Value>,
    stderr: Option<JoinHandle<String>>,
    exit: Option<i32>,
    /// How long each step of it may take; [`STEP_LIMIT`] unless told otherwise.
    pub limit: Duration,
}

/// A program that ended.
#[derive(Debug)]
pub struct Finished {
    /// Its exit code, or minus the signal that ended it.
    pub code: i32,
    /// The JSON objects it printed.
    pub lines: Vec<Value>,
    /// What it said on stderr.
    pub stderr: String,
}

impl Finished {
    /// The object whose `event` is this, the last one if there are several.
    pub fn event(&self, name: &str) -> Option<&Value> {
        self.lines.iter().rev().find(|line| line["event"] == name)
    }

    /// This, if it exited with 0.
    ///
    /// # Panics
    /// With everything the program said, if not.
    pub fn success(self) -> Self {
        assert_eq!(self.code, 0, "{self:#?}");
        self
    }
}

/// That a program failed as it should: with this exit code, and one last line on stderr that has every one of these words in it.
///
/// # Panics
/// With everything the program said, if not.
pub fn says(finished: &Finished, code: i32, words: &[&str]) {
    assert_eq!(finished.code, code, "{finished:#?}");
    let last = finished.stderr.trim_end().lines().last().unwrap_or_default();
    assert!(last.starts_with("migrate: "), "{finished:#?}");
    for word in words {
        assert!(last.contains(word), "{word:?} is missing in {last:?}");
    }
    let event = finished.event("error").unwrap_or_else(|| panic!("{finished:#?}"));
    assert_eq!(event["exit_code"], code, "{finished:#?}");
}

impl Running {
    /// Starts a program that prints one JSON object a line.
    ///
    /// # Panics
    /// If it cannot be started.
    pub fn start(mut command: Command) -> Self {
        let what = format!("{command:?}");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
        let stdout = child.stdout.take().expect("stdout is piped");
        let stderr = child.stderr.take().expect("stderr is piped");
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let value = serde_json::from_str(&line).unwrap_or(Value::String(line));
                if send.send(value).is_err() {
                    break;
                }
            }
        });
        let stderr = std::thread::spawn(move || std::io::read_to_string(stderr).unwrap_or_default());
        Self { what, child, lines, seen: Vec::new(), stderr: Some(stderr), exit: None, limit: STEP_LIMIT }
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).expect("a pid is an i32")
    }

    /// Waits for the first line that `wanted` accepts, and gives it.
    ///
    /// # Panics
    /// After its limit, or when the program ends first.
    pub fn wait_for(&mut self, why: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        let until = Instant::now() + self.limit;
        loop {
            match self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    self.seen.push(line.clone());
                    if wanted(&line) {
                        return line;
                    }
                }
                Err(error) => {
                    let ended = error == RecvTimeoutError::Disconnected;
                    self.signal(rustix::process::Signal::KILL);
                    let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
                    panic!(
                        "{} while waiting for {why}: {}\n{:#?}\n{stderr}",
                        if ended { "the program ended" } else { "time ran out" },
                        self.what,
                        self.seen
                    );
                }
            }
        }
    }

    /// Waits for the first line that `wanted` accepts; `false` when the program ends first, or after `limit`.
    pub fn saw(&mut self, limit: Duration, wanted: impl Fn(&Value) -> bool) -> bool {
        let until = Instant::now() + limit;
        while let Ok(line) = self.lines.recv_timeout(until.saturating_duration_since(Instant::now())) {
            self.seen.push(line);
            if self.seen.last().is_some_and(&wanted) {
                return true;
            }
        }
        false
    }

    /// Waits for the line whose `event` is this.
    ///
    /// # Panics
    /// As [`Running::wait_for`].
    pub fn wait_event(&mut self, name: &str) -> Value {
        self.wait_for(name, |line| line["event"] == name)
    }

    /// Waits until the program has stopped itself (see `MIGRATE_TEST_HOLD` in docs/scripting.md).
    ///
    /// # Panics
    /// After its limit, or when it ends instead.
    pub fn wait_held(&mut self) {
        if !self.is_held_within(self.limit) {
            self.wait_for("a hold", |_| false);
        }
    }

    /// As [`Running::wait_held`]; `false` when that does not happen in time, or it ends instead.
    pub fn is_held_within(&mut self, limit: Duration) -> bool {
        let until = Instant::now() + limit;
        loop {
            let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
            match stat.rsplit(") ").next().and_then(|rest| rest.chars().next()) {
                Some('T') => return true,
                None | Some('Z' | 'X') => return false,
                _ if Instant::now() > until => return false,
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Sends a signal; a process that is gone already is no error.
    pub fn signal(&self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.pid()) {
            rustix::process::kill_process(pid, signal).ok();
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        self.exit.is_none() && matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// After its limit.
    pub fn finish(mut self) -> Finished {
        let until = Instant::now() + self.limit;
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("wait for a child") {
                break status;
            }
            if Instant::now() > until {
                self.wait_for("its end", |_| false);
            }
            std::thread::sleep(Duration::from_millis(2));
        };
        let code = status
            .code()
            .unwrap_or_else(|| -std::os::unix::process::ExitStatusExt::signal(&status).unwrap_or_default());
        self.exit = Some(code);
        let mut lines = std::mem::take(&mut self.seen);
        lines.extend(self.lines.iter());
        let stderr = self.stderr.take().and_then(|thread| thread.join().ok()).unwrap_or_default();
        Finished { code, lines, stderr }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if self.exit.is_none() {
            self.child.kill().ok();
            self.child.wait().ok();
        }
    }
}

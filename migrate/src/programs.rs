//! Other programs, asked with a limit on time and on what they may say.

use crate::doctor::shown;
use rustix::fs::{Access, MemfdFlags, SealFlags};
use rustix::process::{Pid, Signal};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How long a program may take for its answer.
pub(crate) const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// How long a program that was killed may take to be gone: one that waits in the kernel is left behind.
const GONE_LIMIT: Duration = Duration::from_secs(1);

/// Between two looks at whether a program has ended.
const POLL: Duration = Duration::from_millis(5);

/// The most bytes that a program may say. What goes beyond fails in the program.
const SAID_BYTES: u64 = 64 << 10;

/// The most directories in which a program is looked for.
const DIRECTORIES: usize = 256;

/// How a program ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    Code(i32),
    /// By a signal.
    Killed,
    /// Not within this time.
    TimedOut(Duration),
    /// It did not even begin, for this reason.
    NotStarted(String),
}

/// A program's answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) ended: Ended,
    /// Its standard output and error, one in the other.
    pub(crate) text: String,
}

impl Said {
    /// Whether it did what it was asked.
    pub(crate) fn is_good(&self) -> bool {
        self.ended == Ended::Code(0)
    }

    /// Its last word, as it can be shown, or how it ended.
    pub(crate) fn last_word(&self) -> String {
        let last = self.text.lines().rev().map(shown).find(|line| !line.is_empty());
        match (&self.ended, last) {
            (Ended::NotStarted(why), _) => format!("it cannot be started: {}", shown(why)),
            (Ended::TimedOut(limit), _) => format!("it did not answer within {} s", limit.as_secs()),
            (_, Some(line)) => line,
            (Ended::Code(code), None) => format!("it said nothing and ended with exit code {code}"),
            (Ended::Killed, None) => "it said nothing and was killed by a signal".into(),
        }
    }
}

/// Where a program is. Only absolute directories are looked in: what the working directory has is nobody's choice.
pub(crate) fn find(name: &str, search_path: &OsStr) -> Option<PathBuf> {
    let directories = std::env::split_paths(search_path).filter(|path| path.is_absolute());
    directories.take(DIRECTORIES).map(|path| path.join(name)).find(|path| {
        path.metadata().is_ok_and(|metadata| metadata.is_file())
            && rustix::fs::access(path, Access::EXEC_OK).is_ok()
    })
}

/// Asks a program.
pub(crate) fn ask(program: &Path, arguments: &[&str]) -> Said {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").current_dir("/");
    ask_within(command, ANSWER_LIMIT)
}

/// Lets a program run to its end, within a limit of time.
pub(crate) fn ask_within(mut command: Command, limit: Duration) -> Said {
    let begun = start(&mut command);
    let (mut said, started) = match begun {
        Ok(started) => started,
        Err(error) => return Said { ended: Ended::NotStarted(error.to_string()), text: String::new() },
    };
    let ended = end_of(started, limit);
    Said { ended, text: text_of(&mut said).unwrap_or_default() }
}

/// Starts it in a process group of its own. It speaks into a file of fixed length, and not into a pipe: nobody has to read that while the
/// program runs, and whoever the program leaves behind cannot hold it open.
fn start(command: &mut Command) -> io::Result<(File, Child)> {
    let said = rustix::fs::memfd_create("said", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    rustix::fs::ftruncate(&said, SAID_BYTES)?;
    rustix::fs::fcntl_add_seals(&said, SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL)?;
    let said = File::from(said);
    command.stdin(Stdio::null()).stdout(said.try_clone()?).stderr(said.try_clone()?).process_group(0);
    let child = command.spawn()?;
    Ok((said, child))
}

fn end_of(mut child: Child, limit: Duration) -> Ended {
    if let Some(status) = wait(&mut child, limit) {
        return status.code().map_or(Ended::Killed, Ended::Code);
    }
    end_group(&mut child);
    Ended::TimedOut(limit)
}

/// Kills a program that leads a process group, and all of that.
pub(crate) fn end_group(child: &mut Child) {
    // It is not waited for yet, so its number is still its own.
    if let Some(group) = i32::try_from(child.id()).ok().and_then(Pid::from_raw) {
        rustix::process::kill_process_group(group, Signal::KILL).ok();
    }
    wait(child, GONE_LIMIT);
}

/// Waits for a program to end, for at most so long.
pub(crate) fn wait(child: &mut Child, limit: Duration) -> Option<ExitStatus> {
    let until = Instant::now() + limit;
    loop {
        match child.try_wait() {
            Ok(Some(status)) => return Some(status),
            Ok(None) if Instant::now() < until => std::thread::sleep(POLL),
            _ => return None,
        }
    }
}

/// What stands in the file up to where the last word ended: the program writes at the offset that this descriptor has as well.
fn text_of(said: &mut File) -> io::Result<String> {
    let length = said.stream_position()?.min(SAID_BYTES);
    let mut bytes = vec![0; usize::try_from(length).unwrap_or(0)];
    said.read_exact_at(&mut bytes, 0)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    const SHELL: &str = "/bin/sh";

    fn shell(script: &str, limit: Duration) -> Said {
        let mut command = Command::new(SHELL);
        command.args(["-c", script]);
        ask_within(command, limit)
    }

    #[test]
    fn what_a_program_says_and_how_it_ends_is_told() {
        let said = shell("echo one; echo two >&2; exit 3", ANSWER_LIMIT);
        assert_eq!(said, Said { ended: Ended::Code(3), text: "one\ntwo\n".into() });
        assert!(!said.is_good());
        assert_eq!(said.last_word(), "two");
        assert!(shell("exit 0", ANSWER_LIMIT).is_good());
        assert_eq!(
            shell("kill -9 $$", ANSWER_LIMIT).last_word(),
            "it said nothing and was killed by a signal"
        );
        assert_eq!(shell("printf '\\033[2J\\377\\n \\n'", ANSWER_LIMIT).last_word(), "?[2J\u{fffd}");
        let missing = ask(Path::new("/nowhere/criu"), &[]);
        assert!(missing.last_word().contains("cannot be started"), "{missing:?}");
    }

    #[test]
    fn a_program_that_hangs_is_killed_with_its_children() {
        let begun = Instant::now();
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("pid");
        let script = format!("sleep 600 & echo $! > {}; wait", file.display());
        let said = shell(&script, Duration::from_millis(500));
        assert_eq!(said.ended, Ended::TimedOut(Duration::from_millis(500)));
        assert!(begun.elapsed() < Duration::from_secs(30));
        let child = std::fs::read_to_string(file).unwrap();
        let stat = PathBuf::from(format!("/proc/{}/stat", child.trim()));
        // Gone, or waiting for whoever inherited it.
        let gone = || std::fs::read_to_string(&stat).map_or(true, |text| text.contains(") Z "));
        assert!(
            (0..1000).any(|_| gone() || {
                std::thread::sleep(POLL);
                false
            }),
            "the child lives"
        );
    }

    #[test]
    fn who_is_left_behind_keeps_nobody_waiting() {
        let begun = Instant::now();
        let said = shell("sleep 5 & echo done", ANSWER_LIMIT);
        assert!(said.is_good() && said.last_word() == "done", "{said:?}");
        assert!(begun.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn a_program_cannot_say_without_end() {
        let said = shell("while echo 0123456789abcdef; do :; done 2>/dev/null", ANSWER_LIMIT);
        assert_ne!(said.ended, Ended::TimedOut(ANSWER_LIMIT), "its writes fail");
        assert!(said.text.len() <= SAID_BYTES as usize && said.text.len() > 1000, "{}", said.text.len());
    }

    #[test]
    fn programs_are_found_where_the_path_says_and_nowhere_else() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("criu");
        let path = std::env::join_paths([Path::new("relative"), Path::new(""), parent.path()]).unwrap();
        assert_eq!(find("criu", &path), None);
        std::fs::write(&file, "#!/bin/sh\n").unwrap();
        // Root, too, may execute only what somebody may.
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(find("criu", &path), None);
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o700)).unwrap();
        assert_eq!(find("criu", &path), Some(file));
        assert_eq!(find("criu", OsStr::new("")), None);
        assert_eq!(find("", &path), None, "a directory is no program");
    }
}

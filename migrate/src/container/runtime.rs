//! runc, and CRIU below it.

use super::restoring::Parts;
use crate::doctor::shown;
use crate::error::{Error, Result};
use crate::programs::{Said, ask, ask_within, find};
use serde::{Deserialize, Serialize};
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// How long runc may take for what it does alone.
const ANSWER_LIMIT: Duration = Duration::from_secs(20);

/// Whether everybody may have a userfaultfd.
const UNPRIVILEGED: &str = "/proc/sys/vm/unprivileged_userfaultfd";

/// That connections go along, for runc.
const TCP_ESTABLISHED: &str = "--tcp-established";

/// The oldest CRIU that is taken.
const OLDEST: Version = Version { major: 3, minor: 17, patch: 0 };

/// A version of criu.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// The first number.
    pub major: u32,
    /// The second.
    pub minor: u32,
    /// The third, 0 if there is none.
    pub patch: u32,
}

impl Version {
    /// By a line `Version: 3.17.1`; a suffix is passed over.
    pub fn of_criu(text: &str) -> Option<Self> {
        let words = text.lines().find_map(|line| line.trim().strip_prefix("Version:"))?;
        let number = |part: &str| {
            let digits = part.find(|one: char| !one.is_ascii_digit()).unwrap_or(part.len());
            part[..digits].parse().ok()
        };
        let mut parts = words.trim().split('.');
        let (major, minor) = (number(parts.next()?)?, number(parts.next()?)?);
        Some(Self { major, minor, patch: parts.next().and_then(number).unwrap_or(0) })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { major, minor, patch } = self;
        match patch {
            0 => write!(f, "{major}.{minor}"),
            _ => write!(f, "{major}.{minor}.{patch}"),
        }
    }
}

/// The CRIU of this host.
#[derive(Debug, Clone)]
pub struct Criu {
    /// Its version.
    pub version: Version,
    folder: PathBuf,
}

impl Criu {
    /// The program.
    pub(crate) fn program(&self) -> PathBuf {
        self.folder.join("criu")
    }
}

/// runc with one of its state directories, and the CRIU that it uses.
#[derive(Debug, Clone)]
pub struct Runtime {
    program: PathBuf,
    root: Option<PathBuf>,
    criu: Criu,
    locks_by_nftables: bool,
}

/// Where the programs are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Programs {
    runc: PathBuf,
    root: Option<PathBuf>,
    criu: PathBuf,
}

impl Programs {
    /// Finds them.
    ///
    /// # Errors
    /// As [`Runtime::find`].
    pub(crate) fn find(&self) -> Result<Runtime> {
        Runtime::find(Some(&self.runc), self.root.as_deref(), Some(&self.criu))
    }

    /// How to name them to another process of this program.
    pub(crate) fn arguments(&self) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec!["--runc".into(), self.runc.clone().into()];
        if let Some(root) = &self.root {
            arguments.extend(["--runc-root".into(), root.clone().into()]);
        }
        arguments.extend(["--criu".into(), self.criu.clone().into()]);
        arguments
    }
}

/// What runc says of a container.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct State {
    /// Its first process; 0 when it has ended.
    pub(crate) pid: i32,
    /// `created`, `running`, `paused`, `stopped`.
    pub(crate) status: String,
    /// Where its configuration is.
    pub(crate) bundle: PathBuf,
    /// Its root file system.
    pub(crate) rootfs: PathBuf,
}

impl Runtime {
    /// Finds both programs: where the operator says, or in `PATH`.
    ///
    /// # Errors
    /// `Host` saying what is missing or too old.
    pub fn find(program: Option<&Path>, root: Option<&Path>, criu: Option<&Path>) -> Result<Self> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let found = |named: Option<&Path>, name: &str| {
            let found = match named {
                Some(path) => std::path::absolute(path).ok().filter(|path| path.is_file()),
                None => find(name, &path),
            };
            found.ok_or_else(|| {
                let place = named.map_or_else(|| "in PATH".into(), |path| format!("at {}", path.display()));
                Error::Host(format!("there is no {name} {place}, which moving containers needs: migrate doctor says what to do"))
            })
        };
        let program = found(program, "runc")?;
        let criu = found(criu, "criu")?;
        if criu.file_name() != Some(OsStr::new("criu")) {
            return Err(Error::Usage(format!(
                "{} must be called criu: runc looks for it by that name",
                criu.display()
            )));
        }
        let said = ask(&criu, &["--version"]);
        let version = Version::of_criu(&said.text).filter(|_| said.is_good()).ok_or_else(|| {
            Error::Host(format!("{} does not tell its version: {}", criu.display(), said.last_word()))
        })?;
        if version < OLDEST {
            return Err(Error::Host(format!(
                "{} has version {version}, and moving containers needs {OLDEST} or newer",
                criu.display()
            )));
        }
        let folder = criu.parent().unwrap_or(Path::new("/")).to_path_buf();
        // CRIU takes one of two ways to keep a container's connections still, and not by itself the one that is there.
        let locks_by_nftables = find("ip6tables-restore", &path).is_none();
        let root = root
            .map(std::path::absolute)
            .transpose()
            .map_err(|error| Error::Usage(format!("the directory of runc's state is unusable: {error}")))?;
        Ok(Self { program, root, criu: Criu { version, folder }, locks_by_nftables })
    }

    /// The CRIU that it uses.
    pub fn criu(&self) -> &Criu {
        &self.criu
    }

    /// How to find the same programs again.
    pub(crate) fn programs(&self) -> Programs {
        Programs { runc: self.program.clone(), root: self.root.clone(), criu: self.criu.program() }
    }

    /// The command that does this; what goes wrong is told in a log, if one is named.
    fn command(&self, log: Option<&Path>, arguments: &[&OsStr]) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(log) = log {
            command.arg("--log").arg(log);
        }
        if let Some(root) = &self.root {
            command.arg("--root").arg(root);
        }
        let mut path = OsString::from(&self.criu.folder);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.args(arguments).env("PATH", path).env("LC_ALL", "C").current_dir("/");
        command
    }

    /// Tells CRIU how to keep connections still, with a file in a directory.
    fn configure(&self, command: &mut Command, work: &Path) -> Result<()> {
        if self.locks_by_nftables && std::env::var_os("CRIU_CONFIG_FILE").is_none() {
            let path = work.join("criu.conf");
            std::fs::write(&path, "network-lock nftables\n").map_err(|error| {
                Error::Host(format!("CRIU's settings {} cannot be written: {error}", path.display()))
            })?;
            command.env("CRIU_CONFIG_FILE", path);
        }
        Ok(())
    }

    fn run(&self, what: &str, id: &str, arguments: &[&OsStr]) -> Result<Said> {
        let said = ask_within(self.command(None, arguments), ANSWER_LIMIT);
        match said.is_good() {
            true => Ok(said),
            false => {
                Err(Error::Workload(format!("runc could not {what} {id}: {}", message(&said.last_word()))))
            }
        }
    }

    /// What runc knows of a container.
    ///
    /// # Errors
    /// `Workload` when there is none.
    pub(crate) fn state(&self, id: &str) -> Result<State> {
        let said = self.run("find", id, &["state".as_ref(), id.as_ref()])?;
        let begin = said.text.find('{').unwrap_or(0);
        serde_json::from_str(&said.text[begin..])
            .map_err(|error| Error::Host(format!("what runc says of {id} is not understood: {error}")))
    }

    /// Whether runc knows a container of this name.
    pub(crate) fn knows(&self, id: &str) -> bool {
        self.state(id).is_ok()
    }

    /// Lets all of its processes stand still.
    ///
    /// # Errors
    /// `Workload`.
    pub(crate) fn pause(&self, id: &str) -> Result<()> {
        self.run("pause", id, &["pause".as_ref(), id.as_ref()]).map(drop)
    }

    /// Lets them go on.
    ///
    /// # Errors
    /// `Workload`.
    pub(crate) fn resume(&self, id: &str) -> Result<()> {
        self.run("resume", id, &["resume".as_ref(), id.as_ref()]).map(drop)
    }

    /// Kills all of its processes, also while they stand still.
    ///
    /// # Errors
    /// `Workload`.
    pub(crate) fn kill(&self, id: &str) -> Result<()> {
        self.run("end", id, &["kill".as_ref(), id.as_ref(), "KILL".as_ref()]).map(drop)
    }

    /// Forgets a container that has ended.
    ///
    /// # Errors
    /// `Workload`.
    pub(crate) fn delete(&self, id: &str) -> Result<()> {
        self.run("delete", id, &["delete".as_ref(), "--force".as_ref(), id.as_ref()]).map(drop)
    }

    /// The command that writes a container down, all but its private memory, and then holds it until its page server, which listens at this port of
    /// the loopback, is let go; the container goes on then. It says one byte on its standard output once everything is written.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn hold(&self, id: &str, images: &Path, port: u16, tcp_established: bool) -> Result<Command> {
        let server = format!("127.0.0.1:{port}");
        let log = images.join("runc.log");
        let arguments: &[&OsStr] = &[
            "checkpoint".as_ref(),
            "--image-path".as_ref(),
            images.as_ref(),
            "--work-path".as_ref(),
            images.as_ref(),
            "--leave-running".as_ref(),
            "--lazy-pages".as_ref(),
            "--page-server".as_ref(),
            server.as_ref(),
            "--status-fd".as_ref(),
            "1".as_ref(),
            "--file-locks".as_ref(),
        ];
        let mut command = self.command(Some(&log), arguments);
        command.args(tcp_established.then_some(TCP_ESTABLISHED)).arg(id);
        self.configure(&mut command, images)?;
        Ok(command)
    }

    /// Whether the memory of a container can be filled that is made anew here.
    ///
    /// # Errors
    /// `Host` saying what this host lacks, and what to do about it.
    pub(crate) fn can_fill(&self, in_user_namespace: bool) -> Result<()> {
        let said = ask(&self.criu.program(), &["check", "--feature", "uffd-noncoop"]);
        if !said.is_good() {
            return Err(Error::Host(format!(
                "memory of containers cannot be filled here, by what CRIU says of userfaultfd(2): {}; migrate doctor says what to do",
                said.last_word()
            )));
        }
        // userfaultfd(2): who is root in a user namespace alone may not without that.
        let allowed = || std::fs::read_to_string(UNPRIVILEGED).is_ok_and(|text| text.trim() == "1");
        match in_user_namespace && !allowed() {
            true => Err(Error::Host(
                "it has a user namespace of its own, and the memory of such containers cannot be filled here: let it be with sysctl vm.unprivileged_userfaultfd=1"
                    .into(),
            )),
            false => Ok(()),
        }
    }

    /// The command that makes a container anew, its private memory filled by somebody else. It ends when the container runs.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn restore(&self, parts: &Parts<'_>) -> Result<Command> {
        let Parts { id, images, work, bundle, tcp_established } = *parts;
        let log = work.join("runc.log");
        let arguments: &[&OsStr] = &[
            "restore".as_ref(),
            "--detach".as_ref(),
            "--lazy-pages".as_ref(),
            "--image-path".as_ref(),
            images.as_ref(),
            "--work-path".as_ref(),
            work.as_ref(),
            "--bundle".as_ref(),
            bundle.as_ref(),
            "--file-locks".as_ref(),
        ];
        let mut command = self.command(Some(&log), arguments);
        command.args(tcp_established.then_some(TCP_ESTABLISHED)).arg(id);
        self.configure(&mut command, work)?;
        Ok(command)
    }
}

/// Why CRIU, or runc above it, did not do what it was asked, by the logs that are in a directory.
pub(crate) fn reason(work: &Path, log: &str) -> String {
    let of_runc = || {
        let text = std::fs::read_to_string(work.join("runc.log")).ok()?;
        text.lines().last().map(message)
    };
    last_error(&work.join(log)).or_else(of_runc).unwrap_or_else(|| "it does not say why".into())
}

/// The first error in a log of CRIU's that is not about its own limits: what everything behind it follows from.
fn last_error(log: &Path) -> Option<String> {
    let bytes = std::fs::read(log).ok()?;
    let text = String::from_utf8_lossy(&bytes);
    let mut errors = text.lines().filter(|line| line.contains("Error (") && !line.contains("rlimit:"));
    let first = errors.next()?;
    Some(shown(first.split_once("Error ").map_or(first, |(_, error)| error)))
}

/// runc's own words, without the frame of its log.
fn message(line: &str) -> String {
    let message = line.split_once("msg=\"").and_then(|(_, rest)| rest.rsplit_once('"'));
    shown(&message.map_or(line.into(), |(message, _)| message.replace("\\n", " ").replace("\\\"", "\"")))
}

//! What a laboratory is known by, and how commands are run in its hosts.

use super::wire::{self, Kind};
use super::{Context as _, Result};
use serde_json::{Value, json};
use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Variables that a command in a host gets from the environment of the one who asks for it begin so.
const PASSED_ON: [&str; 2] = ["MIGRATE_TEST_", "RUST_"];

/// What [`Lab::run`] says when time ran out: as timeout(1) does.
pub const TIMED_OUT: i32 = 124;

/// A laboratory that is up.
#[derive(Debug, Clone)]
pub struct Lab {
    /// Its folder, with its logs.
    pub folder: PathBuf,
    /// The process that holds it.
    pub keeper_pid: i32,
    /// Its hosts, in the order of their numbers.
    pub hosts: Vec<HostAccess>,
    token: String,
}

/// How a host is reached.
#[derive(Debug, Clone)]
pub struct HostAccess {
    /// Its name.
    pub name: String,
    /// Its address in the private network.
    pub ip: String,
    /// Where its agent listens, on this machine's loopback.
    pub port: u16,
}

/// A command for a host.
#[derive(Debug, Default)]
pub struct Order<'a> {
    /// The program and its arguments.
    pub command: Vec<&'a str>,
    /// At a terminal with so many rows and columns.
    pub terminal: Option<(u16, u16)>,
    /// How long it may take.
    pub limit: Option<Duration>,
}

impl<'a> Order<'a> {
    /// A command with pipes and without a time limit.
    pub fn new(command: &[&'a str]) -> Self {
        Self { command: command.to_vec(), ..Self::default() }
    }
}

/// The file that describes a laboratory that is up.
pub(super) fn description(folder: &Path) -> PathBuf {
    folder.join("lab.json")
}

impl Lab {
    /// The laboratory in this folder.
    ///
    /// # Errors
    /// If there is none.
    pub fn open(folder: &Path) -> Result<Self> {
        let path = description(folder);
        let text = std::fs::read(&path).map_err(|_| {
            format!("there is no laboratory in {}: scripts/lab up makes one", folder.display())
        })?;
        let damaged = || format!("{} does not describe a laboratory", path.display());
        let told: Value = serde_json::from_slice(&text).map_err(|_| damaged())?;
        let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(damaged);
        let mut hosts = Vec::new();
        for host in told["hosts"].as_array().into_iter().flatten() {
            let port = host["port"].as_u64().and_then(|port| u16::try_from(port).ok()).ok_or_else(damaged)?;
            hosts.push(HostAccess { name: text(&host["name"])?, ip: text(&host["ip"])?, port });
        }
        let keeper_pid = told["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok()).ok_or_else(damaged)?;
        Ok(Self { folder: folder.into(), keeper_pid, hosts, token: text(&told["token"])? })
    }

    /// One that comes up, as its keeper knows it.
    pub(super) fn new(folder: &Path, hosts: Vec<HostAccess>, token: String) -> Self {
        let keeper_pid = i32::try_from(std::process::id()).unwrap_or_default();
        Self { folder: folder.into(), keeper_pid, hosts, token }
    }

    /// Lets others find it.
    pub(super) fn publish(&self) -> Result<()> {
        let host = |host: &HostAccess| json!({"name": host.name, "ip": host.ip, "port": host.port});
        let hosts: Vec<_> = self.hosts.iter().map(host).collect();
        let told = json!({"pid": self.keeper_pid, "token": self.token, "hosts": hosts});
        let path = description(&self.folder);
        std::fs::write(&path, format!("{told:#}\n")).context(|| path.display().to_string())
    }

    /// A host by its name or its number.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn host(&self, name: &str) -> Result<&HostAccess> {
        let found =
            self.hosts.iter().find(|host| host.name == name || host.name.strip_prefix("host") == Some(name));
        let names: Vec<_> = self.hosts.iter().map(|host| host.name.as_str()).collect();
        found.ok_or_else(|| format!("there is no {name} in the laboratory, only {}", names.join(", ")))
    }

    /// Runs a command in a host, with this input, and gives its exit code as a shell tells it. If this process ends, so does the
    /// command.
    ///
    /// # Errors
    /// If the host is not reached or gone.
    pub fn run(
        &self,
        host: &HostAccess,
        order: &Order<'_>,
        input: impl Read + Send + 'static,
        output: &mut dyn Write,
        errors: &mut dyn Write,
    ) -> Result<i32> {
        let failed = || format!("{} is not reached", host.name);
        let stream = TcpStream::connect(("127.0.0.1", host.port)).context(failed)?;
        stream.set_nodelay(true).context(failed)?;
        self.ask(&stream, order)?;
        let to = stream.try_clone().context(failed)?;
        std::thread::spawn(move || feed(input, &to));
        let until = order.limit.map(|limit| Instant::now() + limit);
        let code = self.listen(&stream, &host.name, until, output, errors);
        // Who feeds holds it, too.
        stream.shutdown(Shutdown::Both).ok();
        code
    }

    fn ask(&self, stream: &TcpStream, order: &Order<'_>) -> Result<()> {
        let variables =
            std::env::vars().filter(|(name, _)| PASSED_ON.iter().any(|begin| name.starts_with(begin)));
        let variables: Vec<_> = variables.map(|(name, value)| format!("{name}={value}")).collect();
        let terminal = order.terminal.map(|(rows, columns)| json!({"rows": rows, "columns": columns}));
        let request = json!({"token": self.token, "command": order.command, "variables": variables, "terminal": terminal});
        wire::write(stream, Kind::Request, request.to_string().as_bytes())
    }

    /// Passes on what a command says, and gives its exit code.
    fn listen(
        &self,
        stream: &TcpStream,
        name: &str,
        until: Option<Instant>,
        output: &mut dyn Write,
        errors: &mut dyn Write,
    ) -> Result<i32> {
        let logs = self.folder.join("logs");
        let logs = logs.display();
        loop {
            if let Some(until) = until {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Ok(TIMED_OUT);
                }
                stream.set_read_timeout(Some(left)).context(|| format!("the connection to {name}"))?;
            }
            match wire::read(stream) {
                Ok(Some((Kind::Stdout, bytes))) => pass(output, &bytes)?,
                Ok(Some((Kind::Stderr, bytes))) => pass(errors, &bytes)?,
                Ok(Some((Kind::Exit, bytes))) => {
                    let code = bytes.try_into().map_err(|_| format!("{name} tells no exit code"))?;
                    return Ok(i32::from_le_bytes(code));
                }
                Ok(Some(_)) => return Err(format!("{name} answers with a question")),
                Ok(None) => return Err(format!("{name} hung up: see {logs}")),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return Ok(TIMED_OUT);
                }
                Err(error) => return Err(format!("{name}: {error}: see {logs}")),
            }
        }
    }
}

fn pass(to: &mut dyn Write, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).and_then(|()| to.flush()).context(|| "the output".into())
}

/// Sends what there is for the command, piece by piece, and its end.
fn feed(mut input: impl Read, to: &TcpStream) {
    let mut piece = vec![0; 64 << 10];
    while let Ok(length @ 1..) = input.read(&mut piece) {
        if wire::write(to, Kind::Stdin, &piece[..length]).is_err() {
            return;
        }
    }
    wire::write(to, Kind::Stdin, &[]).ok();
}

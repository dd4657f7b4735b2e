//! The keeper itself: the process that pauses a container, lets CRIU hold it, and lets it go on.

use super::{
    Answer, HOLD_LIMIT, LINE_BYTES, Note, Order, RELEASE_LIMIT, forget, kept_already, missing_is_fine,
    note_path, socket_path,
};
use crate::container::{Runtime, folder, reason};
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::programs::ask_within;
use protocol::monitor::Pledge;
use rustix::process::{Pid, Signal};
use std::fs::{File, TryLockError};
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long `ip` may take.
const NETWORK_LIMIT: Duration = Duration::from_secs(5);

/// How long processes may take to end that were killed.
const END_LIMIT: Duration = Duration::from_secs(20);

/// CRIU, which holds the container's processes.
struct Held {
    child: Child,
    /// Its end is the word to let go.
    server: TcpStream,
    tcp_established: bool,
}

/// The keeper itself.
pub(crate) struct Kept {
    runtime_dir: RuntimeDir,
    runtime: Runtime,
    id: String,
    held: Option<Held>,
    /// Where CRIU listens, once it is to hold the container.
    port: Option<u16>,
    frozen: bool,
    pledged: bool,
}

impl Kept {
    /// Keeps a container until the last order. The first who gives some is at the other end of `first`.
    ///
    /// # Errors
    /// `Host` when the socket for others cannot be made; that and everything later is told to whoever gives orders.
    pub(crate) fn run(
        runtime_dir: RuntimeDir,
        runtime: Runtime,
        id: &str,
        mut first: UnixStream,
    ) -> Result<()> {
        let socket = socket_path(&runtime_dir, id);
        let begun = begin(&runtime_dir, id);
        let told = tell(&mut first, begun.as_ref().err());
        let (_lock, listener) = begun?;
        let mut kept = Self {
            runtime_dir,
            runtime,
            id: id.into(),
            held: None,
            port: None,
            frozen: false,
            pledged: false,
        };
        let mut next = told.is_ok().then_some(first);
        while let Some(stream) = next.take() {
            let is_over = kept.serve(stream);
            if is_over || !kept.pledged {
                break;
            }
            next = listener.accept().map(|(stream, _)| stream).ok();
        }
        if !kept.pledged
            && let Err(error) = kept.resume()
        {
            tracing::error!("{error}");
        }
        std::fs::remove_file(&socket).or_else(missing_is_fine).map_err(|error| no_socket(&socket, &error))
    }

    /// Follows the orders of one who gives them. Answers whether that was the last.
    fn serve(&mut self, stream: UnixStream) -> bool {
        let mut stream = BufReader::new(stream);
        loop {
            let mut line = String::new();
            if !matches!((&mut stream).take(LINE_BYTES).read_line(&mut line), Ok(1..)) {
                return false;
            }
            let done = serde_json::from_str(&line)
                .map_err(|error| Error::Workload(format!("the keeper does not understand {line:?}: {error}")))
                .and_then(|order: Order| {
                    self.follow(&order).map(|()| matches!(order, Order::Resume | Order::HandOver))
                });
            let told = tell(stream.get_mut(), done.as_ref().err());
            match done {
                Ok(true) => return true,
                _ if told.is_err() => return false,
                _ => {}
            }
        }
    }

    fn follow(&mut self, order: &Order) -> Result<()> {
        match order {
            Order::Freeze { images, tcp_established } => self.freeze(images, *tcp_established),
            Order::Pause => self.pause(),
            Order::Thaw if !self.pledged => self.resume(),
            Order::Thaw => Err(Error::Workload(format!("{} is pledged: it does not go on", self.id))),
            Order::Pledge(pledge) => {
                self.note(Some(pledge.clone()))?;
                self.pledged = true;
                Ok(())
            }
            Order::Resume => {
                self.resume()?;
                self.pledged = false;
                Ok(())
            }
            Order::HandOver => {
                self.end()?;
                (self.frozen, self.pledged) = (false, false);
                Ok(())
            }
        }
    }

    fn note(&self, pledge: Option<Pledge>) -> Result<()> {
        let note = Note { id: self.id.clone(), programs: self.runtime.programs(), pledge, port: self.port };
        let path = note_path(&self.runtime_dir, &self.id);
        let draft = path.with_extension("draft");
        serde_json::to_vec(&note)
            .map_err(std::io::Error::other)
            .and_then(|bytes| std::fs::write(&draft, bytes))
            .and_then(|()| std::fs::rename(&draft, &path))
            .map_err(|error| Error::Host(format!("the note {} cannot be written: {error}", path.display())))
    }

    fn pause(&mut self) -> Result<()> {
        if self.frozen {
            return Err(Error::Workload(format!("{} stands still already", self.id)));
        }
        self.note(None)?;
        self.frozen = true;
        self.runtime.pause(&self.id).inspect_err(|_| drop(self.resume()))
    }

    fn freeze(&mut self, images: &Path, tcp_established: bool) -> Result<()> {
        if self.frozen {
            return Err(Error::Workload(format!("{} stands still already", self.id)));
        }
        let port = TcpListener::bind(("127.0.0.1", 0))
            .and_then(|listener| listener.local_addr())
            .map_err(|error| Error::Host(format!("there is no port for CRIU: {error}")))?
            .port();
        self.port = Some(port);
        self.note(None)?;
        self.frozen = true;
        // It is CRIU that stops it: not before it has looked around, which takes longer than anything else that it does then.
        match self.hold(images, port, tcp_established) {
            Ok(held) => {
                self.held = Some(held);
                // CRIU lets the control group go on and holds the processes itself. They stand still without it, too, from now on.
                let paused = self.runtime.pause(&self.id);
                paused.inspect_err(|_| drop(self.resume()))
            }
            Err(error) => {
                self.resume()?;
                Err(error)
            }
        }
    }

    /// Lets CRIU write the container down and hold it.
    fn hold(&self, images: &Path, port: u16, tcp_established: bool) -> Result<Held> {
        let mut command = self.runtime.hold(&self.id, images, port, tcp_established)?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        let mut child =
            command.spawn().map_err(|error| Error::Host(format!("runc cannot be started: {error}")))?;
        let ready = child.stdout.take().map(|output| read_one(output, HOLD_LIMIT));
        let held = match ready {
            Some(true) => TcpStream::connect(("127.0.0.1", port)).map_err(|error| {
                Error::Workload(format!("CRIU does not wait for the memory of {}: {error}", self.id))
            }),
            _ => {
                let why = match crate::programs::wait(&mut child, Duration::from_secs(1)) {
                    Some(_) => reason(images, "dump.log"),
                    None => format!("CRIU did not come to an end within {} s", HOLD_LIMIT.as_secs()),
                };
                Err(Error::Workload(format!("{} cannot be written down: {why}", self.id)))
            }
        };
        match held {
            Ok(server) => Ok(Held { child, server, tcp_established }),
            Err(error) => {
                self.let_go(&mut child)?;
                Err(error)
            }
        }
    }

    /// Ends a runc that did not do what it was asked. CRIU must not be killed with it if it can be helped: it has put code of its own into the processes, and
    /// takes that out when it hears that runc is gone.
    fn let_go(&self, runc: &mut Child) -> Result<()> {
        if crate::programs::wait(runc, Duration::ZERO).is_none() {
            runc.kill().ok();
            runc.wait().ok();
        }
        free(&self.runtime, &self.id, None, RELEASE_LIMIT)
    }

    /// Lets the container go on.
    fn resume(&mut self) -> Result<()> {
        if !self.frozen {
            return Ok(());
        }
        if let Some(Held { mut child, server, .. }) = self.held.take() {
            drop(server);
            if crate::programs::wait(&mut child, RELEASE_LIMIT).is_none() {
                free(&self.runtime, &self.id, None, Duration::ZERO)?;
                crate::programs::end_group(&mut child);
            }
        }
        // How CRIU left it is not the same everywhere.
        if self.runtime.state(&self.id)?.status == "paused" {
            self.runtime.resume(&self.id)?;
        }
        self.frozen = false;
        self.forget()
    }

    /// Ends the container; none of its processes runs another instruction.
    fn end(&mut self) -> Result<()> {
        if let Some(Held { mut child, server, tcp_established }) = self.held.take() {
            if tcp_established {
                let first = self.runtime.state(&self.id)?.pid;
                if let Err(error) = silence(first) {
                    tracing::warn!("the network of {} here may answer for it still: {error}", self.id);
                }
            }
            // Killed before it hears that it may let go: its sockets would say that they are closed.
            free(&self.runtime, &self.id, None, Duration::ZERO)?;
            crate::programs::end_group(&mut child);
            drop(server);
        }
        end_container(&self.runtime, &self.id)?;
        self.forget()
    }

    fn forget(&self) -> Result<()> {
        forget(&self.runtime_dir, &self.id)
    }
}

/// The right to keep a container, for as long as the lock is held, and the socket for those who come later.
fn begin(runtime_dir: &RuntimeDir, id: &str) -> Result<(File, UnixListener)> {
    let socket = socket_path(runtime_dir, id);
    let cannot = |error: std::io::Error| no_socket(&socket, &error);
    std::fs::create_dir_all(folder(runtime_dir)).map_err(cannot)?;
    let lock = File::create(socket.with_extension("lock")).map_err(cannot)?;
    lock.try_lock().map_err(|error| match error {
        TryLockError::WouldBlock => Error::Workload(kept_already(id)),
        TryLockError::Error(error) => cannot(error),
    })?;
    std::fs::remove_file(&socket).or_else(missing_is_fine).map_err(cannot)?;
    Ok((lock, UnixListener::bind(&socket).map_err(cannot)?))
}

fn no_socket(socket: &Path, error: &std::io::Error) -> Error {
    Error::Host(format!("the keeper's socket {} cannot be made: {error}", socket.display()))
}

/// Tells what became of an order.
fn tell(stream: &mut UnixStream, error: Option<&Error>) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(&Answer { error: error.map(Error::to_string) })?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Takes the links of a process's network namespace down, if it has one of its own: what comes for its connections is for where they are now,
/// and the kernel would say here that there are none. The rules by which CRIU keeps packets away end with it.
fn silence(pid: i32) -> std::result::Result<(), String> {
    let namespace = format!("/proc/{pid}/ns/net");
    let is_ours = std::fs::read_link(&namespace).ok() == std::fs::read_link("/proc/self/ns/net").ok();
    if is_ours {
        return Err("it has none of its own".into());
    }
    let inside = |arguments: &[&str]| {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={namespace}")).args(["--", "ip"]).args(arguments);
        let said = ask_within(command, NETWORK_LIMIT);
        if said.is_good() { Ok(said.text) } else { Err(said.last_word()) }
    };
    // `2: eth0@if7: <…> …`
    let links = inside(&["-o", "link", "show"])?;
    let names = links.lines().filter_map(|line| line.split(": ").nth(1)?.split('@').next());
    names.filter(|name| *name != "lo").try_for_each(|name| inside(&["link", "set", name, "down"]).map(drop))
}

/// Who traces a process (proc_pid_status(5)).
fn tracer_of(pid: i32) -> Option<Pid> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:"))?;
    Pid::from_raw(tracer.trim().parse().ok()?)
}

/// Waits until CRIU, which need not be in runc's process group, holds nothing of a container any more. Where it listens, if that is known, it is told so; who does
/// not let go for so long is killed.
pub(super) fn free(runtime: &Runtime, id: &str, port: Option<u16>, patience: Duration) -> Result<()> {
    let first = runtime.state(id)?.pid;
    let until = Instant::now() + patience;
    while let Some(tracer) = tracer_of(first) {
        if let Some(port) = port {
            // Nobody may listen there yet.
            drop(TcpStream::connect(("127.0.0.1", port)));
        }
        if Instant::now() >= until {
            tracing::debug!("CRIU does not let {id} go, and is killed");
            rustix::process::kill_process(tracer, Signal::KILL).ok();
        }
        if Instant::now() > until + RELEASE_LIMIT {
            return Err(Error::Workload(format!("CRIU was killed and still holds {id}")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Ends a container that stands still.
pub(super) fn end_container(runtime: &Runtime, id: &str) -> Result<()> {
    runtime.kill(id)?;
    let until = Instant::now() + END_LIMIT;
    while runtime.state(id).is_ok_and(|state| state.status != "stopped") {
        if Instant::now() > until {
            return Err(Error::Workload(format!("the processes of {id} were killed and do not end")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    runtime.delete(id)
}

/// Whether a byte comes in time.
fn read_one(mut output: std::process::ChildStdout, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let Ok(limit) = Timespec::try_from(limit) else { return false };
    let ready = poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&limit));
    ready.is_ok_and(|ready| ready > 0) && output.read(&mut [0]).is_ok_and(|read| read == 1)
}

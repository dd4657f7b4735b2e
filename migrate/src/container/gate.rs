//! Between runc and CRIU: who holds the gate decides when a container that was made anew may run.
//!
//! ```text
//! runc ══ message ══▶ gate ══ message ══▶ CRIU
//!      ◀══════════════    ◀═ post-restore ═
//!                      │ waits for `open`
//! ```
//!
//! runc starts the first program of the name `criu` that it finds, and both talk over a socket. The one that it finds is this program
//! ([`stand_in`]), which gives its end of that socket to the gate, gets another for it, and becomes CRIU. So every message passes here. They go
//! on as they are, but for one: behind the word that everything is made, and before any of it runs, the gate stays shut until it
//! is opened. If whoever holds it ends, both see their socket closed, and CRIU kills what it made.

use crate::error::{Error, Result};
use protocol::container::rpc::{self, POST_RESTORE, asks_to_restore, notification};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, FdFlags};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, Signal};
use std::ffi::OsString;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

/// What runc looks for.
const NAME: &str = "criu";

/// Where CRIU really is.
const PROGRAM: &str = "MIGRATE_CRIU";

/// The gate's socket.
const SOCKET: &str = "MIGRATE_CRIU_GATE";

/// The longest message that is passed on; what runc asks has some KiB.
const MESSAGE_BYTES: usize = 1 << 20;

/// Descriptors that one message may carry: the most that the kernel lets through (`SCM_MAX_FD`).
const MESSAGE_FDS: usize = 253;

/// How long CRIU may take to take down what it made, when it hears nothing any more, or to come to its end.
const END_LIMIT: Duration = Duration::from_secs(20);

/// How long the stand-in waits for the gate.
const MEET_LIMIT: Duration = Duration::from_secs(10);

/// A gate, shut. Dropped, it never opens.
pub(crate) struct Gate {
    folder: PathBuf,
    program: PathBuf,
    /// A byte here opens it; its end ends everything that passes through.
    orders: Option<UnixStream>,
    reached: Receiver<()>,
    listening: Option<JoinHandle<bool>>,
}

impl Gate {
    /// A new one for a CRIU, with its files in a folder, where CRIU works as well; its images are in another.
    ///
    /// # Errors
    /// `Host`.
    pub(crate) fn new(folder: &Path, images: &Path, program: &Path) -> Result<Self> {
        let cannot = |error: std::io::Error| {
            Error::Host(format!(
                "there can be no gate between runc and CRIU in {}: {error}",
                folder.display()
            ))
        };
        let stand_in = std::env::current_exe().map_err(cannot)?;
        std::os::unix::fs::symlink(stand_in, folder.join(NAME)).map_err(cannot)?;
        let (listener, orders, ours) = UnixListener::bind(folder.join("gate"))
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(|listener| UnixStream::pair().map(|(ours, theirs)| (listener, theirs, ours)))
            .map_err(cannot)?;
        let folders = Folders {
            images: File::open(images).map_err(cannot)?.into(),
            work: File::open(folder).map_err(cannot)?.into(),
        };
        let (reaches, reached) = channel();
        let listening = std::thread::Builder::new()
            .name("gate".into())
            .spawn(move || listen(&listener, &Passage { orders, folders, reaches }))
            .map_err(cannot)?;
        Ok(Self {
            folder: folder.into(),
            program: program.into(),
            orders: Some(ours),
            reached,
            listening: Some(listening),
        })
    }

    /// Leads a runc to the gate.
    pub(crate) fn lead(&self, command: &mut Command) {
        let mut path = OsString::from(&self.folder);
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path).env(PROGRAM, &self.program).env(SOCKET, self.folder.join("gate"));
    }

    /// Whether CRIU has made everything and waits; for at most so long.
    pub(crate) fn is_reached(&self, limit: Duration) -> bool {
        match self.reached.recv_timeout(limit) {
            Ok(()) => true,
            Err(RecvTimeoutError::Timeout) => false,
            Err(RecvTimeoutError::Disconnected) => {
                // Nobody can come any more: runc notices, and ends.
                std::thread::sleep(limit);
                false
            }
        }
    }

    /// Lets run what was made.
    ///
    /// # Errors
    /// `Workload` when nobody waits there any more.
    pub(crate) fn open(&mut self) -> Result<()> {
        let written = self.orders.as_mut().map(|orders| orders.write_all(b"o"));
        match written {
            Some(Ok(())) => Ok(()),
            _ => Err(Error::Workload("CRIU did not wait until the container was to run".into())),
        }
    }

    /// Closes it, and waits until every CRIU has ended. Answers whether all did by themselves: what one made that had to be killed may be anything.
    pub(crate) fn close(mut self) -> bool {
        self.end()
    }

    fn end(&mut self) -> bool {
        self.orders = None;
        self.listening.take().is_none_or(|listening| listening.join().unwrap_or(false))
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        self.end();
    }
}

/// What those need who pass.
struct Passage {
    orders: UnixStream,
    folders: Folders,
    reaches: Sender<()>,
}

/// The folders that runc names, once more: CRIU looks for them in the process that made its socket.
struct Folders {
    images: OwnedFd,
    work: OwnedFd,
}

/// Takes everyone who comes, until the orders end. Answers whether all have ended by themselves.
fn listen(listener: &UnixListener, passage: &Passage) -> bool {
    let is_one_stuck = AtomicBool::new(false);
    let stuck = &is_one_stuck;
    std::thread::scope(|scope| {
        loop {
            let mut ready =
                [PollFd::new(listener, PollFlags::IN), PollFd::new(&passage.orders, PollFlags::empty())];
            match poll(&mut ready, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => break,
            }
            if !ready[1].revents().is_empty() {
                break;
            }
            let Ok((stream, _)) = listener.accept() else { continue };
            let passes = std::thread::Builder::new().name("gate".into()).spawn_scoped(scope, move || {
                let passed = meet(&stream).and_then(|both| {
                    let passed = pass(&both, passage);
                    if !ends(both, END_LIMIT) {
                        stuck.store(true, Ordering::Release);
                    }
                    passed
                });
                if let Err(error) = passed {
                    tracing::debug!("what runc and CRIU say is passed on no more: {error}");
                }
            });
            if let Err(error) = passes {
                tracing::warn!("runc and CRIU cannot talk: {error}");
            }
        }
    });
    !is_one_stuck.into_inner()
}

/// Lets go of both, and waits for the end of CRIU, which is killed if it does not come. Answers whether it came.
fn ends(both: Both, limit: Duration) -> bool {
    let Both { runc, criu, process, .. } = both;
    drop((runc, criu));
    let Some(process) = process else { return true };
    // It can be waited for so whoever its parent is.
    if comes(&process, limit) {
        return true;
    }
    tracing::warn!("CRIU does not end, and is killed");
    rustix::process::pidfd_send_signal(&process, Signal::KILL).ok();
    comes(&process, END_LIMIT);
    false
}

/// Two who talk.
struct Both {
    runc: OwnedFd,
    criu: OwnedFd,
    /// CRIU's number.
    pid: Pid,
    /// CRIU itself: it can be read from when it has ended (pidfd_open(2)). `None` where it is this process, in tests.
    process: Option<OwnedFd>,
}

/// Meets a stand-in: takes runc's socket, and gives it one of ours in its place.
fn meet(stream: &UnixStream) -> std::io::Result<Both> {
    stream.set_read_timeout(Some(MEET_LIMIT))?;
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    // What stands in becomes CRIU, and keeps its number.
    let pid = rustix::net::sockopt::socket_peercred(stream)?.pid;
    let is_other = pid != rustix::process::getpid();
    let process = is_other.then(|| rustix::process::pidfd_open(pid, PidfdFlags::empty())).transpose()?;
    let runc = receive_one(stream)?;
    send(stream.as_fd(), b"x", &[theirs.as_fd()])?;
    Ok(Both { runc, criu: ours, pid, process })
}

/// The control group of a process, where one hierarchy is for all controllers (cgroups(7): `0::PATH` is the only line then).
fn unified_cgroup(pid: Pid) -> Option<String> {
    let text = std::fs::read_to_string(format!("/proc/{}/cgroup", pid.as_raw_pid())).ok()?;
    let path = text.trim_end().strip_prefix("0::")?;
    (!path.contains('\n')).then(|| path.into())
}

/// The descriptor that comes with a byte.
pub(super) fn receive_one(stream: &UnixStream) -> std::io::Result<OwnedFd> {
    let mut byte = [0];
    let (_, mut descriptors) = receive(stream.as_fd(), &mut byte)?;
    descriptors.pop().ok_or_else(|| std::io::Error::other("no socket came"))
}

/// Passes on what both say, until one of them is done.
fn pass(both: &Both, passage: &Passage) -> std::io::Result<()> {
    let Passage { orders, folders, reaches } = passage;
    let Both { runc, criu, pid, .. } = both;
    let mut message = vec![0; MESSAGE_BYTES];
    loop {
        let (from_runc, from_criu, is_over) = {
            let mut ready = [
                PollFd::new(runc, PollFlags::IN),
                PollFd::new(criu, PollFlags::IN),
                PollFd::new(orders, PollFlags::empty()),
            ];
            match poll(&mut ready, None) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(error) => return Err(error.into()),
            }
            let has = |at: usize| !ready[at].revents().is_empty();
            (has(0), has(1), has(2))
        };
        if is_over {
            return Ok(());
        }
        for (is_ready, from, to) in [(from_runc, runc, criu), (from_criu, criu, runc)] {
            if !is_ready {
                continue;
            }
            let (bytes, descriptors) = receive(from.as_fd(), &mut message)?;
            let mut said = message.get(..bytes).unwrap_or(&[]).to_vec();
            if said.is_empty() && descriptors.is_empty() {
                return Ok(());
            }
            if std::ptr::eq(from, runc) && asks_to_restore(&said) {
                // runc has put it into the container's own by now.
                let cgroup = unified_cgroup(*pid);
                let (images, work) = (folders.images.as_raw_fd(), folders.work.as_raw_fd());
                rpc::Place { images, work, cgroup: cgroup.as_deref() }.add(&mut said);
            }
            if std::ptr::eq(from, criu) && notification(&said).as_deref() == Some(POST_RESTORE) {
                reaches.send(()).ok();
                if !is_opened(orders)? {
                    return Ok(());
                }
            }
            let descriptors: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
            send(to.as_fd(), &said, &descriptors)?;
        }
    }
}

/// Waits for the word; without one nothing passes.
fn is_opened(orders: &UnixStream) -> std::io::Result<bool> {
    use std::io::Read as _;
    let mut orders = orders;
    Ok(orders.read(&mut [0])? == 1)
}

/// A message and what it carries.
fn receive(from: BorrowedFd<'_>, message: &mut [u8]) -> std::io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS))];
    let mut carried = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let flags = RecvFlags::CMSG_CLOEXEC;
        match rustix::net::recvmsg(from, &mut [IoSliceMut::new(message)], &mut carried, flags) {
            Err(Errno::INTR) => {}
            received => break received?,
        }
    };
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(std::io::Error::other("a message is too long"));
    }
    let mut descriptors = Vec::new();
    for message in carried.drain() {
        if let RecvAncillaryMessage::ScmRights(some) = message {
            descriptors.extend(some);
        }
    }
    Ok((received.bytes, descriptors))
}

fn send(to: BorrowedFd<'_>, message: &[u8], carries: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MESSAGE_FDS))];
    let mut carried = SendAncillaryBuffer::new(&mut space);
    if !carries.is_empty() && !carried.push(SendAncillaryMessage::ScmRights(carries)) {
        return Err(std::io::Error::other("a message carries too many descriptors"));
    }
    loop {
        match rustix::net::sendmsg(to, &[IoSlice::new(message)], &mut carried, SendFlags::NOSIGNAL) {
            Err(Errno::INTR) => {}
            sent => return Ok(sent.map(drop)?),
        }
    }
}

/// If this program was started as CRIU, by a runc that was led to a gate: becomes CRIU, or answers why it cannot.
pub(crate) fn stand_in() -> Option<ExitCode> {
    let mut arguments = std::env::args_os();
    let is_meant = Path::new(&arguments.next()?).file_name().is_some_and(|name| name == NAME);
    let socket = std::env::var_os(SOCKET).filter(|_| is_meant)?;
    let program = std::env::var_os(PROGRAM)?;
    let arguments: Vec<OsString> = arguments.collect();
    let number = match arguments.as_slice() {
        [verb, number] if verb == "swrk" => number.to_str().and_then(|number| number.parse().ok()),
        _ => None,
    };
    let mut command = Command::new(program);
    command.env_remove(SOCKET).env_remove(PROGRAM);
    let error = match number.and_then(crate::sys::inherited) {
        None => command.args(arguments).exec(),
        Some(runc) => match exchange(Path::new(&socket), &runc).and_then(inherit) {
            Ok(ours) => {
                drop(runc);
                command.arg("swrk").arg(ours.as_raw_fd().to_string()).exec()
            }
            Err(error) => error,
        },
    };
    eprintln!("CRIU cannot be started: {error}");
    Some(ExitCode::FAILURE)
}

/// Gives runc's socket to the gate, and gets one for CRIU.
fn exchange(gate: &Path, runc: &OwnedFd) -> std::io::Result<OwnedFd> {
    let stream = UnixStream::connect(gate)?;
    stream.set_read_timeout(Some(MEET_LIMIT))?;
    send(stream.as_fd(), b"x", &[runc.as_fd()])?;
    receive_one(&stream)
}

/// The same, for the program that this process becomes.
fn inherit(socket: OwnedFd) -> std::io::Result<OwnedFd> {
    rustix::io::fcntl_setfd(&socket, FdFlags::empty())?;
    Ok(socket)
}

/// Whether something comes on a socket within a time.
pub(super) fn comes(from: impl AsFd, limit: Duration) -> bool {
    let Ok(limit) = Timespec::try_from(limit) else { return false };
    poll(&mut [PollFd::new(&from, PollFlags::IN)], Some(&limit)).is_ok_and(|ready| ready > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Child;

    const LIMIT: Duration = Duration::from_secs(20);

    /// `notify { script }` of a `criu_resp`.
    fn said(script: &str) -> Vec<u8> {
        let length = script.len() as u8;
        [&[8, 6, 16, 1, 42, length + 2, 10, length][..], script.as_bytes()].concat()
    }

    /// The two ends that runc and CRIU would have.
    fn through(folder: &Path) -> (OwnedFd, OwnedFd) {
        let (runc, given) =
            rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
                .unwrap();
        (runc, exchange(&folder.join("gate"), &given).unwrap())
    }

    fn heard(from: &OwnedFd) -> (Vec<u8>, usize) {
        assert!(comes(from, LIMIT));
        let mut message = vec![0; 100];
        let (bytes, descriptors) = receive(from.as_fd(), &mut message).unwrap();
        message.truncate(bytes);
        (message, descriptors.len())
    }

    #[test]
    fn all_passes_but_nothing_runs_before_the_gate_is_open() {
        let folder = tempfile::tempdir().unwrap();
        let mut gate = Gate::new(folder.path(), folder.path(), Path::new("/criu")).unwrap();
        let (runc, criu) = through(folder.path());
        // type: VERSION; type: RESTORE, opts { images_dir_fd: 3 }
        send(runc.as_fd(), &[8, 10], &[]).unwrap();
        assert_eq!(heard(&criu), (vec![8, 10], 0));
        send(runc.as_fd(), &[8, 2, 18, 2, 8, 3], &[]).unwrap();
        let (request, _) = heard(&criu);
        assert!(request.len() > 6 && request.starts_with(&[8, 2, 18, 2, 8, 3]), "{request:?}");
        send(criu.as_fd(), &said("orphan-pts-master"), &[std::io::stdin().as_fd()]).unwrap();
        assert_eq!(heard(&runc), (said("orphan-pts-master"), 1));
        assert!(!gate.is_reached(Duration::from_millis(50)));
        send(criu.as_fd(), &said(POST_RESTORE), &[]).unwrap();
        assert!(gate.is_reached(LIMIT));
        assert!(!comes(&runc, Duration::from_millis(100)), "it waits");
        gate.open().unwrap();
        assert_eq!(heard(&runc), (said(POST_RESTORE), 0));
        drop(criu);
        assert_eq!(heard(&runc), (Vec::new(), 0));
    }

    #[test]
    fn who_does_not_end_is_killed_and_that_is_told() {
        let both = |program: &mut Child| {
            let pair = || {
                let flags = SocketFlags::CLOEXEC;
                rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap().0
            };
            let pid = Pid::from_child(program);
            let process = rustix::process::pidfd_open(pid, PidfdFlags::empty()).unwrap();
            Both { runc: pair(), criu: pair(), pid, process: Some(process) }
        };
        let mut stays = Command::new("sleep").arg("600").spawn().unwrap();
        assert!(!ends(both(&mut stays), Duration::from_millis(50)));
        stays.wait().unwrap();
        // Nobody has waited for it when its end is seen.
        let mut goes = Command::new("true").spawn().unwrap();
        assert!(ends(both(&mut goes), LIMIT));
        goes.wait().unwrap();
    }

    #[test]
    fn a_gate_that_is_gone_lets_nothing_pass() {
        let folder = tempfile::tempdir().unwrap();
        let gate = Gate::new(folder.path(), folder.path(), Path::new("/criu")).unwrap();
        // One that only asks for the version, and one that restores.
        let idle = through(folder.path());
        let (runc, criu) = through(folder.path());
        send(criu.as_fd(), &said(POST_RESTORE), &[]).unwrap();
        assert!(gate.is_reached(LIMIT));
        drop(gate);
        for end in [&runc, &criu, &idle.0, &idle.1] {
            assert_eq!(heard(end), (Vec::new(), 0));
        }
    }
}

//! The other end of the control socket: typed calls with a time limit each.

use std::{
    os::fd::OwnedFd,
    os::unix::net::UnixStream,
    path::Path,
    time::{Duration, Instant},
};

use protocol::{
    MigrationId,
    checkpoint::name::CheckpointId,
    layout::{Layout, SpaceKind},
    monitor::{Reply, Request, Role, Status, TrackingMode, VERSION},
    page::{PAGE_SIZE, PageRun, PageSet},
    sparse,
};
use rustix::fs::SealFlags;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType,
    sockopt::{Timeout, set_socket_timeout},
};

use crate::{
    error::{Error, Result},
    wire::{Message, Patience, Wire},
};

/// A VM as its VMM describes it.
#[derive(Debug)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its memory.
    pub layout: Layout,
    /// Its machine description: bytes for another VMM, opaque to the engine.
    pub machine: Vec<u8>,
    /// One memfd or disk image for each space of the layout, in its order.
    pub memory: Vec<OwnedFd>,
    /// Whether the VMM can make disks spaces.
    pub can_copy_disks: bool,
}

/// How to put pages in place that a VM misses.
#[derive(Debug)]
pub struct PageFaults {
    /// A userfaultfd(2) over the mappings of all spaces in the VMM. Not blocking.
    pub descriptor: OwnedFd,
    /// Where each space is mapped in the VMM, in the order of the layout.
    pub addresses: Vec<u64>,
    /// What is missing, one set for each space.
    pub missing: Vec<PageSet>,
}

/// How a VM is tracked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tracking {
    /// How the host does it, for reports.
    pub mode: TrackingMode,
    /// The checkpoint that has everything but what was written since, if there is one.
    pub baseline: Option<CheckpointId>,
    /// Whether the VMM knows what a baseline is.
    pub can_keep: bool,
}

/// A connection to a VMM. Dropping it ends the session, with the consequences that
/// [`protocol::monitor`] names.
pub struct Client {
    wire: Wire,
    limit: Duration,
    software: String,
    welcome: Status,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client").field("vm", &self.welcome.name).finish_non_exhaustive()
    }
}

impl Client {
    /// Connects to the VMM at `path`. `client` says who asks; every call may take `limit`.
    ///
    /// # Errors
    /// [`Error::Unreachable`] when nothing answers there, [`Error::Busy`] when another session holds the
    /// VM, [`Error::Timeout`], [`Error::Protocol`].
    pub fn connect(path: &Path, role: Role, client: &str, limit: Duration) -> Result<Self> {
        let stream = open(path, limit)?;
        let mut wire = Wire::new(stream, true);
        let hello = Request::Hello { version: VERSION, role, client: client.into() };
        let (reply, _) = exchange(&mut wire, &hello, &[], "say hello", limit)?;
        match reply {
            Reply::Welcome { software, status, .. } => Ok(Self { wire, limit, software, welcome: status }),
            Reply::Refused { reason, holder_pid } => Err(Error::Busy { reason, holder_pid }),
            other => Err(unexpected("say hello", other)),
        }
    }

    /// How the VM was when the connection began.
    pub fn welcome(&self) -> &Status {
        &self.welcome
    }

    /// Name and version of the VMM.
    pub fn software(&self) -> &str {
        &self.software
    }

    /// Changes the time limit of the calls to come.
    pub fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// How is it?
    ///
    /// # Errors
    /// [`Error::Timeout`] or [`Error::Protocol`], as all calls.
    pub fn status(&mut self) -> Result<Status> {
        match self.call(&Request::Status, &[], "tell its status")?.0 {
            Reply::Status(status) => Ok(status),
            other => Err(unexpected("tell its status", other)),
        }
    }

    /// What is it? Its memory comes along.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not prepared, or as all calls.
    pub fn describe(&mut self) -> Result<Description> {
        let answer = self.call(&Request::Describe, &[], "describe itself")?;
        description(answer, "describe itself")
    }

    /// Makes disks spaces behind those of memory for this session, by their images as the machine's description names them. Only
    /// for a VMM that can.
    ///
    /// # Errors
    /// [`Error::Refused`] that names the disk that cannot be one, or as all calls.
    pub fn copy_disks(&mut self, disks: Vec<String>) -> Result<Description> {
        const WHAT: &str = "choose the disks that go along";
        let answer = self.call(&Request::CopyDisks { disks }, &[], WHAT)?;
        description(answer, WHAT)
    }

    /// Begins to track writes. With `keep` only those pages count as dirty that the baseline lacks, if there is one, and
    /// else every page does.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is no source or the host refuses, or as all calls.
    pub fn track_start(&mut self, keep: bool) -> Result<Tracking> {
        match self.call(&Request::TrackStart { keep }, &[], "start tracking")?.0 {
            Reply::Tracking { mode, baseline, can_keep } => Ok(Tracking { mode, baseline, can_keep }),
            other => Err(unexpected("start tracking", other)),
        }
    }

    /// Says that everything this session took is safe in a checkpoint; `None` forgets the one that was. Only for a VMM that
    /// can keep it.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not tracked, or as all calls.
    pub fn set_baseline(&mut self, checkpoint: Option<CheckpointId>) -> Result<()> {
        self.done(&Request::Baseline { checkpoint }, &[], "take a checkpoint for its baseline")
    }

    /// Which pages are dirty now, for each space of `layout`? Takes nothing.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not tracked, or as all calls.
    pub fn harvest(&mut self, layout: &Layout) -> Result<Vec<PageSet>> {
        const WHAT: &str = "tell its dirty pages";
        let (reply, message) = self.call(&Request::Harvest { sparse: true }, &[], WHAT)?;
        match reply {
            Reply::Dirty { sparse: true, .. } => {
                sparse::decode(layout, &message.blob).map_err(|error| Error::Protocol(error.to_string()))
            }
            Reply::Dirty { sparse: false, .. } => page_sets(layout, &message.blob),
            other => Err(unexpected(WHAT, other)),
        }
    }

    /// Takes pages: they may be read once this returned.
    ///
    /// # Errors
    /// [`Error::Refused`] for a bad range, or as all calls.
    pub fn take(&mut self, run: PageRun) -> Result<()> {
        let request = Request::Take { space: run.space.0, first: run.first, count: run.count.into() };
        self.done(&request, &[], "take dirty pages")
    }

    /// Gives pages back that were taken and did not arrive: one set for each space, in the layout's order.
    ///
    /// # Errors
    /// [`Error::Refused`] when the sets do not fit, or as all calls.
    pub fn redirty(&mut self, sets: &[PageSet]) -> Result<()> {
        let mut blob = Vec::new();
        for set in sets {
            set.write_to(&mut blob);
        }
        self.done(&Request::Redirty, &blob, "take dirty pages back")
    }

    /// Stops tracking.
    ///
    /// # Errors
    /// As all calls.
    pub fn track_stop(&mut self) -> Result<()> {
        self.done(&Request::TrackStop, &[], "stop tracking")
    }

    /// Lets the vCPUs stand still for a share of their time; 0 lets them run.
    ///
    /// # Errors
    /// [`Error::Refused`] for more than 99 percent, or when it does not run, or as all calls.
    pub fn throttle(&mut self, percent: u8) -> Result<()> {
        self.done(&Request::Throttle { percent }, &[], "slow down")
    }

    /// Stops vCPUs and devices.
    ///
    /// # Errors
    /// [`Error::Refused`] when it does not run (any more), or as all calls.
    pub fn freeze(&mut self) -> Result<()> {
        self.done(&Request::Freeze, &[], "freeze")
    }

    /// The state of a frozen VM.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not frozen or the host refuses, or as all calls.
    pub fn save(&mut self) -> Result<Vec<u8>> {
        match self.call(&Request::Save, &[], "save its state")? {
            (Reply::Saved, message) => Ok(message.blob),
            (other, _) => Err(unexpected("save its state", other)),
        }
    }

    /// From now on a frozen VM stays frozen until told.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not frozen, or as all calls.
    pub fn pledge(&mut self, migration: MigrationId, peer: &str) -> Result<()> {
        self.done(&Request::Pledge { migration, peer: peer.into() }, &[], "pledge itself")
    }

    /// Lets a frozen VM go on; a pledged one only for its own migration.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not frozen or pledged to another migration, or as all calls.
    pub fn resume(&mut self, migration: Option<MigrationId>) -> Result<()> {
        self.done(&Request::Resume { migration }, &[], "resume")
    }

    /// Ends a pledged VM: the destination has it.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not pledged to that migration, or as all calls.
    pub fn hand_over(&mut self, migration: MigrationId) -> Result<()> {
        self.done(&Request::HandOver { migration }, &[], "hand over")
    }

    /// Ends the VM.
    ///
    /// # Errors
    /// As all calls.
    pub fn terminate(&mut self) -> Result<()> {
        self.done(&Request::Terminate, &[], "terminate")
    }

    /// Tells an incoming VM what it will be; `machine` is a source's description.
    ///
    /// # Errors
    /// [`Error::Refused`] that names what this host lacks, or as all calls.
    pub fn prepare(&mut self, name: &str, layout: &Layout, machine: &[u8]) -> Result<Description> {
        let request = Request::Prepare { name: name.into(), layout: layout.clone() };
        let answer = self.call(&request, machine, "prepare")?;
        description(answer, "prepare")
    }

    /// Loads a state into a prepared VM.
    ///
    /// # Errors
    /// [`Error::Refused`] that says what does not fit, or as all calls.
    pub fn load(&mut self, state: &[u8]) -> Result<()> {
        self.done(&Request::Load, state, "load its state")
    }

    /// Lets a loaded VM run.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not loaded, or as all calls.
    pub fn start(&mut self, migration: MigrationId) -> Result<()> {
        self.done(&Request::Start { migration }, &[], "start")
    }

    /// Tells a loaded VM which pages are missing: one set for each space, in the layout's order. Whoever touches one of
    /// them waits from now on.
    ///
    /// # Errors
    /// [`Error::Refused`] when it is not loaded or the host does not allow it, or as all calls.
    pub fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        let mut blob = Vec::new();
        for set in missing {
            set.write_to(&mut blob);
        }
        self.done(&Request::Expect, &blob, "expect pages")
    }

    /// The means to put missing pages in place.
    ///
    /// # Errors
    /// [`Error::Refused`] when it misses none, or as all calls.
    pub fn page_faults(&mut self, layout: &Layout) -> Result<PageFaults> {
        const WHAT: &str = "hand out its page faults";
        let (reply, mut message) = self.call(&Request::PageFaults, &[], WHAT)?;
        let Reply::PageFaults { addresses, .. } = reply else { return Err(unexpected(WHAT, reply)) };
        let missing = page_sets(layout, &message.blob)?;
        match (message.fds.pop(), message.fds.is_empty(), addresses.len() == layout.spaces.len()) {
            (Some(descriptor), true, true) => Ok(PageFaults { descriptor, addresses, missing }),
            _ => Err(Error::Protocol("the page faults do not fit the layout".into())),
        }
    }

    /// Tells a running VM that no page of it is missing any more.
    ///
    /// # Errors
    /// [`Error::Refused`] when that is not so, or as all calls.
    pub fn complete(&mut self) -> Result<()> {
        self.done(&Request::Complete, &[], "be complete")
    }

    /// Ends an incoming VM that was not started.
    ///
    /// # Errors
    /// [`Error::Refused`] when it was started, or as all calls.
    pub fn discard(&mut self) -> Result<()> {
        self.done(&Request::Discard, &[], "discard itself")
    }

    fn done(&mut self, request: &Request, blob: &[u8], what: &'static str) -> Result<()> {
        match self.call(request, blob, what)?.0 {
            Reply::Done => Ok(()),
            other => Err(unexpected(what, other)),
        }
    }

    fn call(&mut self, request: &Request, blob: &[u8], what: &'static str) -> Result<(Reply, Message)> {
        exchange(&mut self.wire, request, blob, what, self.limit)
    }
}

/// Reads the page sets of all spaces.
fn page_sets(layout: &Layout, blob: &[u8]) -> Result<Vec<PageSet>> {
    let mut rest = blob;
    let mut sets = Vec::with_capacity(layout.spaces.len());
    for space in &layout.spaces {
        let length = usize::try_from(PageSet::byte_len(space.pages)).unwrap_or(usize::MAX);
        let (bytes, after) = rest
            .split_at_checked(length)
            .ok_or_else(|| Error::Protocol("the page sets are shorter than the layout".into()))?;
        sets.push(
            PageSet::from_bytes(space.pages, bytes).map_err(|error| Error::Protocol(error.to_string()))?,
        );
        rest = after;
    }
    if rest.is_empty() {
        Ok(sets)
    } else {
        Err(Error::Protocol("the page sets are longer than the layout".into()))
    }
}

fn exchange(
    wire: &mut Wire,
    request: &Request,
    blob: &[u8],
    what: &'static str,
    limit: Duration,
) -> Result<(Reply, Message)> {
    let started = Instant::now();
    // The caller wants to know what was asked for, not which half of a message was missing.
    let name = |error| match error {
        Error::Timeout { .. } => {
            Error::Timeout { what, waited_ms: u64::try_from(started.elapsed().as_millis()).unwrap_or(0) }
        }
        other => other,
    };
    wire.send(request, blob, &[], limit).map_err(name)?;
    let message = wire
        .receive(Patience { first: Some(limit), rest: limit })
        .map_err(name)?
        .ok_or_else(|| Error::Protocol(format!("the VMM ended while it was to {what}")))?;
    let reply = message.decode()?;
    if !message.fds.is_empty() && !matches!(reply, Reply::Description { .. } | Reply::PageFaults { .. }) {
        return Err(Error::Protocol(format!("descriptors came with an answer to {what}")));
    }
    Ok((reply, message))
}

fn unexpected(asked: &'static str, reply: Reply) -> Error {
    match reply {
        Reply::Error { code, message } => Error::Refused { asked, code, text: message },
        other => Error::Protocol(format!("an answer that does not fit the request to {asked}: {other:?}")),
    }
}

fn description((reply, message): (Reply, Message), asked: &'static str) -> Result<Description> {
    let Reply::Description { name, layout, can_copy_disks } = reply else {
        return Err(unexpected(asked, reply));
    };
    layout.validate(u64::MAX).map_err(|error| Error::Protocol(error.to_string()))?;
    if message.fds.len() != layout.spaces.len() {
        return Err(Error::Protocol(format!(
            "{} descriptors came for {} spaces",
            message.fds.len(),
            layout.spaces.len()
        )));
    }
    for (space, fd) in layout.spaces.iter().zip(&message.fds) {
        // A disk's image is never mapped, and is what its file system lets it be.
        if space.kind == SpaceKind::Memory {
            check_memory(fd, space.pages.saturating_mul(PAGE_SIZE as u64))?;
        }
    }
    Ok(Description { name, layout, machine: message.blob, memory: message.fds, can_copy_disks })
}

/// Checks that memory can be mapped without ever meeting a SIGBUS: it is large enough and stays so.
fn check_memory(fd: &OwnedFd, bytes: u64) -> Result<()> {
    let wrong = |why: &str| Error::Protocol(format!("the VMM's memory cannot be used: {why}"));
    let size = rustix::fs::fstat(fd).map_err(|error| wrong(&error.to_string()))?.st_size;
    if u64::try_from(size).is_ok_and(|size| size < bytes) {
        return Err(wrong("it is smaller than its space"));
    }
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|error| wrong(&error.to_string()))?;
    if seals.contains(SealFlags::SHRINK) { Ok(()) } else { Err(wrong("it is not sealed against shrinking")) }
}

fn open(path: &Path, limit: Duration) -> Result<UnixStream> {
    let unreachable = |errno: rustix::io::Errno| Error::Unreachable {
        path: path.to_owned(),
        reason: match errno {
            rustix::io::Errno::NOENT => "there is no socket: is the name right, and the VM running?".into(),
            rustix::io::Errno::CONNREFUSED => "its VMM is gone, only the socket was left".into(),
            rustix::io::Errno::ACCESS => "no permission: it belongs to another user".into(),
            rustix::io::Errno::AGAIN => "it accepts no connections".into(),
            other => other.to_string(),
        },
    };
    let fd = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .map_err(unreachable)?;
    // connect(2) on a unix socket waits for room in the backlog, as long as a send may.
    set_socket_timeout(&fd, Timeout::Send, Some(limit)).map_err(unreachable)?;
    let address = SocketAddrUnix::new(path).map_err(unreachable)?;
    rustix::net::connect(&fd, &address).map_err(unreachable)?;
    Ok(fd.into())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use protocol::{layout::Space, monitor::Phase, page::SpaceId};

    use super::*;

    #[test]
    fn memory_that_could_shrink_is_refused() {
        let mut plain = tempfile::tempfile().unwrap();
        plain.write_all(&[0; 4096]).unwrap();
        assert!(check_memory(&plain.into(), 4096).is_err());
        let memory = crate::memory::GuestMemory::create(2 << 20).unwrap();
        let fd = memory.share(0).unwrap().unwrap();
        check_memory(&fd, 2 << 20).unwrap();
        assert!(check_memory(&fd, (2 << 20) + 1).is_err());
    }

    #[test]
    fn a_vmm_that_knows_only_plain_page_sets_is_understood() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let set = PageSet::from_words(70, vec![0b101, 1 << 5]).unwrap();
        let (mut blob, limit) = (Vec::new(), Duration::from_secs(5));
        set.write_to(&mut blob);
        let vmm = std::thread::spawn(move || {
            let mut wire = Wire::new(theirs, false);
            let asked = wire.receive(Patience { first: Some(limit), rest: limit }).unwrap().unwrap();
            assert_eq!(asked.decode::<Request>().unwrap(), Request::Harvest { sparse: true });
            wire.send(&Reply::Dirty { pages: 3, sparse: false }, &blob, &[], limit).unwrap();
        });
        let space = Space { id: SpaceId(0), kind: SpaceKind::Memory, pages: 70, guest_address: 0 };
        let welcome = Status {
            name: "old".into(),
            phase: Phase::Running,
            pid: 1,
            memory_bytes: 70 * 4096,
            vcpus: 1,
            uptime_ms: 0,
            serial: String::new(),
            holder_pid: None,
            holder: None,
            arrived_by: None,
            pledged_to: None,
            awaiting_pages: None,
            throttle_percent: None,
            baseline: None,
        };
        let mut client = Client { wire: Wire::new(ours, true), limit, software: "old".into(), welcome };
        assert_eq!(client.harvest(&Layout { spaces: vec![space] }).unwrap(), [set]);
        vmm.join().unwrap();
    }

    #[test]
    fn a_vmm_that_does_not_answer_is_named_with_what_it_should_have_done() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("silent.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let error = Client::connect(&path, Role::Query, "test", Duration::from_millis(50)).unwrap_err();
        let text = error.to_string();
        assert!(text.starts_with("waited ") && text.contains("say hello"), "{text}");
    }
}

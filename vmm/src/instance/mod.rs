//! One VM as its clients see it: the phases of its life, and what each request does in each of them.
//!
//! ```text
//!            Freeze            Pledge            HandOver
//!  running ─────────> frozen ─────────> pledged ─────────> (ends)
//!     ^  ^──── Resume ──┘                  │
//!     │  ^──── Resume of that migration ───┘
//!   Start
//!     │        Load               Prepare
//!   loaded <────────── prepared <───────── incoming
//! ```
//!
//! A running VM may have a *baseline*: a checkpoint that has everything but what the tracker knows to be written since
//! (see [`crate::dirty`]). It is no phase. It lives as long as the VM does, through sessions and the time between them,
//! and is gone as soon as it might not be true: with the process, so also at the end of a migration; when the host's
//! log cannot be read; when a client says so.
//!
//! The hardest decision is what happens when a session's socket closes, because that is how the death of
//! the engine looks from here:
//!
//! - *running*, *frozen*: the engine died before it could have sent Commit, so the guest goes on here.
//!   Pages it took may never have arrived anywhere: they are pending again, and tracking stops. With a baseline, tracking
//!   goes on without a session, and pending is exactly what is not in that checkpoint.
//! - *pledged*: Commit may have been sent. The destination may run the guest, so it never resumes here by
//!   itself; a new session that knows the outcome settles it.
//! - *running* and still awaiting pages: the engine that brought them died. The guest goes on, whoever touches a missing
//!   page waits, and another session may come and put them in place (see [`crate::faults`]).
//! - *incoming*, *prepared*, *loaded*: Start did not come, so the guest does not run here and will not.
//!   The VM ends. (If Commit was sent and Start was lost, the source is pledged and still has everything.)

mod tracking;
mod source;
mod destination;

use std::{
    os::fd::OwnedFd,
    sync::mpsc::Sender,
    time::{Duration, Instant},
};

use protocol::{
    MigrationId,
    monitor::{ErrorCode, Phase, Pledge, Reply, Request, Status},
    page::PageSet,
};

use crate::{
    config::ExitReason,
    cpuid::CpuModel,
    devices::{SerialSink, virtio::Allowed},
    error::{Error, Result},
    faults::Awaited,
    host::Host,
    vcpu::Event,
    vm::Vm,
};

/// The longest text of a client that is kept, in bytes: who it is, and where a VM went.
const MAX_TEXT_BYTES: usize = 256;

/// Who holds the VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Holder {
    /// The number of its connection.
    pub(crate) connection: u64,
    /// Its process, as the kernel says.
    pub(crate) pid: Option<u32>,
    /// What it calls itself.
    pub(crate) client: String,
}

/// A VM that has yet to be described.
pub(crate) struct Expectation {
    pub(crate) host: Host,
    pub(crate) max_memory_bytes: u64,
    pub(crate) serial: SerialSink,
    pub(crate) allowed: Allowed,
    pub(crate) cpu: CpuModel,
}

/// What a request leads to.
pub(crate) struct Answer {
    pub(crate) reply: Reply,
    pub(crate) blob: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// The VM ends, once the reply was sent.
    pub(crate) end: Option<ExitReason>,
}

impl From<Reply> for Answer {
    fn from(reply: Reply) -> Self {
        Self { reply, blob: Vec::new(), fds: Vec::new(), end: None }
    }
}

/// The VM, its phase and its holder.
pub(crate) struct Instance {
    name: String,
    phase: Phase,
    vm: Option<Vm>,
    /// What a VM that came without all of its memory waits for.
    awaited: Option<Awaited>,
    /// Loading its state took registers from its memory.
    read_memory: bool,
    expectation: Option<Expectation>,
    events: Sender<Event>,
    holder: Option<Holder>,
    arrived_by: Option<MigrationId>,
    pledge: Option<Pledge>,
    serial: String,
    started: Instant,
}

impl Instance {
    /// A VM that was booted here and is about to run.
    pub(crate) fn booted(name: String, vm: Vm, serial: String, events: Sender<Event>) -> Self {
        Self {
            name,
            phase: Phase::Running,
            vm: Some(vm),
            awaited: None,
            read_memory: false,
            expectation: None,
            events,
            holder: None,
            arrived_by: None,
            pledge: None,
            serial,
            started: Instant::now(),
        }
    }

    /// A VM that waits to be described.
    pub(crate) fn incoming(name: String, expectation: Expectation, events: Sender<Event>) -> Self {
        Self {
            name,
            phase: Phase::Incoming,
            vm: None,
            awaited: None,
            read_memory: false,
            serial: expectation.serial.describe(),
            expectation: Some(expectation),
            events,
            holder: None,
            arrived_by: None,
            pledge: None,
            started: Instant::now(),
        }
    }

    /// How it is.
    pub(crate) fn status(&mut self) -> Status {
        let awaiting_pages = self.awaiting_pages();
        Status {
            awaiting_pages,
            name: self.name.clone(),
            phase: self.phase,
            pid: std::process::id(),
            memory_bytes: self.vm.as_ref().map_or(0, |vm| vm.memory().total_bytes()),
            vcpus: self.vm.as_ref().map_or(0, |vm| vm.machine().vcpus),
            uptime_ms: millis(self.started.elapsed()),
            serial: self.serial.clone(),
            holder_pid: self.holder.as_ref().and_then(|holder| holder.pid),
            holder: self.holder.as_ref().map(|holder| holder.client.clone()),
            arrived_by: self.arrived_by,
            pledged_to: self.pledge.clone(),
            throttle_percent: Some(self.vm.as_ref().map_or(0, Vm::throttle_percent)),
            baseline: self.vm.as_ref().and_then(Vm::baseline),
        }
    }

    /// Pages that a VM waits for, looked up now; `None` when it has all of its memory.
    fn awaiting_pages(&mut self) -> Option<u64> {
        let (Some(vm), Some(awaited)) = (&self.vm, &mut self.awaited) else { return None };
        match awaited.look(vm.memory()) {
            Ok(pages) => Some(pages),
            Err(error) => {
                tracing::warn!(%error, "it is not known how much has arrived");
                Some(awaited.missing().iter().map(PageSet::count).sum())
            }
        }
    }

    /// Makes a connection the holder, or says who holds it.
    pub(crate) fn claim(&mut self, mut holder: Holder) -> Result<(), Holder> {
        if let Some(current) = &self.holder {
            return Err(current.clone());
        }
        holder.client = plain(&holder.client);
        self.holder = Some(holder);
        Ok(())
    }

    /// The holder's connection is gone. See the module's text for what that means.
    pub(crate) fn session_ended(&mut self, connection: u64) {
        if self.holder.as_ref().is_none_or(|holder| holder.connection != connection) {
            return;
        }
        self.holder = None;
        match self.phase {
            Phase::Running | Phase::Frozen => {
                if self.phase == Phase::Frozen {
                    tracing::warn!(name = %self.name, "the session ended while the VM was frozen: it goes on here");
                    self.go_on();
                }
                self.unthrottle();
                self.stop_tracking();
                self.forget_disks();
            }
            Phase::Pledged => {
                self.forget_disks();
                tracing::warn!(name = %self.name, "the session ended after the pledge: frozen until told otherwise");
            }
            Phase::Incoming | Phase::Prepared | Phase::Loaded => self.end(ExitReason::Discarded),
            Phase::Stopped => {}
        }
    }

    /// Lets go of the VM because it ended; its threads are joined.
    pub(crate) fn stop(&mut self) {
        self.phase = Phase::Stopped;
        // Who waits for a page would wait for ever.
        if let (Some(vm), Some(awaited)) = (&self.vm, self.awaited.take())
            && let Err(error) = awaited.end(vm.memory())
        {
            tracing::warn!(%error, "vCPUs may wait for memory still");
        }
        self.vm = None;
    }

    /// Asks whoever runs the VM to end it.
    pub(crate) fn end(&self, reason: ExitReason) {
        // The receiver is gone only when the VM is ending already.
        let _ = self.events.send(Event::End(reason));
    }

    /// Starts a VM that was booted here.
    pub(crate) fn run(&self) {
        if let Some(vm) = &self.vm {
            vm.resume();
        }
    }

    /// Carries out a request of the holder.
    pub(crate) fn handle(&mut self, request: Request, blob: &[u8]) -> Answer {
        let outcome = match request {
            Request::Hello { .. } => Err(Error::Protocol("a second hello".into())),
            Request::Status => Ok(Reply::Status(self.status()).into()),
            Request::Describe => self.describe(),
            Request::CopyDisks { disks } => self.copy_disks(&disks),
            Request::TrackStart { keep } => self.track_start(keep),
            Request::Harvest { sparse } => self.harvest(sparse),
            Request::Take { space, first, count } => self.take(space, first, count),
            Request::Redirty => self.redirty(blob),
            Request::Baseline { checkpoint } => self.baseline(checkpoint),
            Request::TrackStop => self.track_stop(),
            Request::Throttle { percent } => self.throttle(percent),
            Request::Freeze => self.freeze(),
            Request::Save => self.save(),
            Request::Pledge { migration, peer } => self.pledge(migration, &peer),
            Request::Resume { migration } => self.resume(migration),
            Request::HandOver { migration } => self.hand_over(migration),
            Request::Terminate => Ok(ending(ExitReason::Terminated)),
            Request::Prepare { name, layout } => self.prepare(name, &layout, blob),
            Request::Load => self.load(blob),
            Request::Start { migration } => self.start(migration),
            Request::Discard => self.discard(),
            Request::Expect => self.expect(blob),
            Request::PageFaults => self.page_faults(),
            Request::Complete => self.complete(),
        };
        outcome.unwrap_or_else(|error| {
            tracing::info!(name = %self.name, %error, "refused a request");
            Reply::Error { code: code_of(&error), message: error.to_string() }.into()
        })
    }

    fn wrong(&self, asked: &'static str) -> Error {
        Error::WrongState { asked, state: phase_name(self.phase) }
    }

    /// The VM, where it is a source that is not pledged.
    fn live(&mut self, asked: &'static str) -> Result<&mut Vm> {
        let error = self.wrong(asked);
        match (self.phase, &mut self.vm) {
            (Phase::Running | Phase::Frozen, Some(vm)) => Ok(vm),
            _ => Err(error),
        }
    }

    /// The VM, where it is in this phase.
    fn in_phase(&mut self, phase: Phase, asked: &'static str) -> Result<&mut Vm> {
        let error = self.wrong(asked);
        match &mut self.vm {
            Some(vm) if self.phase == phase => Ok(vm),
            _ => Err(error),
        }
    }
}

fn ending(reason: ExitReason) -> Answer {
    Answer { end: Some(reason), ..Reply::Done.into() }
}

/// A text of a client, made safe for terminals and logs, and bounded.
fn plain(text: &str) -> String {
    text.chars().filter(|character| !character.is_control()).take(MAX_TEXT_BYTES / 4).collect()
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

fn phase_name(phase: Phase) -> &'static str {
    match phase {
        Phase::Running => "running",
        Phase::Frozen => "frozen",
        Phase::Pledged => "pledged to a migration whose outcome is not known",
        Phase::Incoming => "not described yet",
        Phase::Prepared => "prepared but not loaded",
        Phase::Loaded => "loaded but not started",
        Phase::Stopped => "stopped",
    }
}

fn code_of(error: &Error) -> ErrorCode {
    match error {
        Error::Protocol(_) => ErrorCode::BadRequest,
        Error::WrongState { .. } | Error::Incomplete { .. } | Error::GuestEnded(_) => ErrorCode::WrongState,
        Error::Config(_) | Error::State(_) | Error::MissingFeatures(_) | Error::Image(_) => {
            ErrorCode::Unsupported
        }
        _ => ErrorCode::Host,
    }
}

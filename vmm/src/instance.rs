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
//! The hardest decision is what happens when a session's socket closes, because that is how the death of
//! the engine looks from here:
//!
//! - *running*, *frozen*: the engine died before it could have sent Commit, so the guest goes on here.
//!   Pages it took may never have arrived anywhere: they are pending again, and tracking stops.
//! - *pledged*: Commit may have been sent. The destination may run the guest, so it never resumes here by
//!   itself; a new session that knows the outcome settles it.
//! - *running* and still awaiting pages: the engine that brought them died. The guest goes on, whoever touches a missing
//!   page waits, and another session may come and put them in place (see [`crate::faults`]).
//! - *incoming*, *prepared*, *loaded*: Start did not come, so the guest does not run here and will not.
//!   The VM ends. (If Commit was sent and Start was lost, the source is pledged and still has everything.)

use std::{
    os::fd::OwnedFd,
    sync::mpsc::Sender,
    time::{Duration, Instant},
};

use protocol::{
    MigrationId,
    layout::{Layout, Space, SpaceKind},
    monitor::{ErrorCode, MAX_THROTTLE_PERCENT, Phase, Pledge, Reply, Request, Status, TrackingMode},
    page::{PageSet, SpaceId},
};

use crate::{
    config::{ExitReason, check_name},
    devices::SerialSink,
    dirty::LogMode,
    error::{Error, Result},
    faults::Awaited,
    host::Host,
    memory::{SpaceInfo, spaces_for},
    state::Machine,
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
            }
            Phase::Pledged => {
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
            Request::TrackStart => self.track_start(),
            Request::Harvest => self.harvest(),
            Request::Take { space, first, count } => self
                .live("take dirty pages")
                .and_then(|vm| vm.tracker().take(space.into(), first, count))
                .map(done),
            Request::Redirty => self.redirty(blob),
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

    fn describe(&self) -> Result<Answer> {
        let wrong = || self.wrong("describe the VM");
        let vm = self.vm.as_ref().filter(|_| self.phase != Phase::Stopped).ok_or_else(wrong)?;
        let layout = layout_of(&vm.memory().layout());
        let mut fds = Vec::new();
        for index in 0..layout.spaces.len() {
            fds.extend(vm.memory().share(index)?);
        }
        let blob = vm.machine().encode()?;
        Ok(Answer { reply: Reply::Description { name: self.name.clone(), layout }, blob, fds, end: None })
    }

    fn track_start(&mut self) -> Result<Answer> {
        self.check_complete("track dirty pages")?;
        let tracker = self.live("track dirty pages")?.tracker();
        tracker.start()?;
        let mode = match tracker.mode() {
            LogMode::ManualInitiallySet => TrackingMode::ManualInitiallySet,
            LogMode::Manual => TrackingMode::Manual,
            LogMode::Plain => TrackingMode::Plain,
        };
        Ok(Reply::Tracking { mode }.into())
    }

    fn harvest(&mut self) -> Result<Answer> {
        let tracker = self.live("harvest dirty pages")?.tracker();
        let pages = tracker.harvest()?.iter().sum();
        let mut blob = Vec::new();
        for words in tracker.pending_words() {
            blob.reserve(words.len() * 8);
            blob.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        }
        Ok(Answer { blob, ..Reply::Dirty { pages }.into() })
    }

    fn redirty(&mut self, blob: &[u8]) -> Result<Answer> {
        let vm = self.live("give dirty pages back")?;
        let spaces = vm.memory().layout();
        let needed: u64 = spaces.iter().map(|space| space.pages.div_ceil(64) * 8).sum();
        if blob.len() as u64 != needed {
            return Err(Error::Protocol(format!(
                "the page sets have {} bytes, this VM's have {needed}",
                blob.len()
            )));
        }
        let mut words = blob.as_chunks::<8>().0.iter().map(|chunk| u64::from_le_bytes(*chunk));
        for (index, space) in spaces.iter().enumerate() {
            let count = usize::try_from(space.pages.div_ceil(64)).unwrap_or(0);
            let bits: Vec<u64> = words.by_ref().take(count).collect();
            vm.tracker().redirty(index, 0, &bits)?;
        }
        Ok(Reply::Done.into())
    }

    fn track_stop(&mut self) -> Result<Answer> {
        self.live("stop tracking")?.tracker().stop()?;
        self.unthrottle();
        Ok(Reply::Done.into())
    }

    fn throttle(&mut self, percent: u8) -> Result<Answer> {
        if percent > MAX_THROTTLE_PERCENT {
            return Err(Error::Protocol(format!(
                "{percent} % of its time a VM cannot stand still: {MAX_THROTTLE_PERCENT} % is the most"
            )));
        }
        self.in_phase(Phase::Running, "slow down")?.throttle(percent)?;
        tracing::debug!(percent, "throttled");
        Ok(Reply::Done.into())
    }

    /// Whatever comes now, the guest shall not be slow in it.
    fn unthrottle(&mut self) {
        if let Some(vm) = &mut self.vm
            && let Err(error) = vm.throttle(0)
        {
            tracing::warn!(%error, "the VM is still throttled");
        }
    }

    fn freeze(&mut self) -> Result<Answer> {
        self.check_complete("freeze")?;
        self.in_phase(Phase::Running, "freeze")?;
        self.unthrottle();
        let vm = self.in_phase(Phase::Running, "freeze")?;
        match vm.pause() {
            Ok(took) => {
                tracing::debug!(?took, "frozen");
                self.phase = Phase::Frozen;
                Ok(Reply::Done.into())
            }
            Err(error @ Error::GuestEnded(_)) => {
                self.phase = Phase::Stopped;
                Err(error)
            }
            Err(error) => {
                vm.resume();
                Err(error)
            }
        }
    }

    fn save(&mut self) -> Result<Answer> {
        let started = Instant::now();
        let blob = self.in_phase(Phase::Frozen, "save")?.save()?;
        tracing::debug!(took = ?started.elapsed(), bytes = blob.len(), "saved");
        Ok(Answer { blob, ..Reply::Saved.into() })
    }

    fn pledge(&mut self, migration: MigrationId, peer: &str) -> Result<Answer> {
        self.in_phase(Phase::Frozen, "pledge")?;
        self.phase = Phase::Pledged;
        self.pledge = Some(Pledge { migration, peer: plain(peer) });
        Ok(Reply::Done.into())
    }

    fn resume(&mut self, migration: Option<MigrationId>) -> Result<Answer> {
        match self.phase {
            Phase::Frozen => self.go_on(),
            Phase::Pledged => {
                let Some(migration) = migration else {
                    return Err(Error::Protocol(
                        "a pledged VM resumes only for the migration of the pledge".into(),
                    ));
                };
                self.check_pledge(migration)?;
                self.go_on();
                self.stop_tracking();
            }
            _ => return Err(self.wrong("resume")),
        }
        Ok(Reply::Done.into())
    }

    fn hand_over(&mut self, migration: MigrationId) -> Result<Answer> {
        self.in_phase(Phase::Pledged, "hand over")?;
        self.check_pledge(migration)?;
        Ok(ending(ExitReason::HandedOver))
    }

    fn check_pledge(&self, migration: MigrationId) -> Result<()> {
        match &self.pledge {
            Some(pledge) if pledge.migration == migration => Ok(()),
            Some(pledge) => Err(Error::Protocol(format!(
                "the VM is pledged to migration {}, not {migration}",
                pledge.migration
            ))),
            None => Err(self.wrong("settle a pledge")),
        }
    }

    fn go_on(&mut self) {
        self.pledge = None;
        self.phase = Phase::Running;
        self.run();
    }

    fn stop_tracking(&mut self) {
        if let Some(vm) = &mut self.vm {
            vm.tracker().give_back();
            if let Err(error) = vm.tracker().stop() {
                tracing::warn!(%error, "dirty tracking could not be stopped");
            }
        }
    }

    fn prepare(&mut self, name: String, layout: &Layout, blob: &[u8]) -> Result<Answer> {
        let Some(expectation) = self.expectation.as_ref().filter(|_| self.phase == Phase::Incoming) else {
            return Err(self.wrong("prepare"));
        };
        check_name(&name)?;
        layout
            .validate(expectation.max_memory_bytes)
            .map_err(|error| Error::Config(format!("the memory that is to come: {error}")))?;
        let memory_bytes = layout.total_bytes();
        if *layout != layout_of(&spaces_for(memory_bytes)?) {
            return Err(Error::Config("this VMM lays out memory in another way than the source".into()));
        }
        let machine = Machine::decode(blob)?;
        machine.check(&expectation.host)?;
        // From here on only the host can refuse; the expectation is used up.
        let Some(expectation) = self.expectation.take() else { return Err(self.wrong("prepare")) };
        let vm = Vm::prepare(&expectation.host, memory_bytes, machine, expectation.serial, &self.events)?;
        self.name = name;
        self.vm = Some(vm);
        self.phase = Phase::Prepared;
        self.describe()
    }

    fn load(&mut self, blob: &[u8]) -> Result<Answer> {
        let started = Instant::now();
        self.read_memory = self.in_phase(Phase::Prepared, "load")?.load(blob)?;
        tracing::debug!(took = ?started.elapsed(), "loaded");
        self.phase = Phase::Loaded;
        Ok(Reply::Done.into())
    }

    fn start(&mut self, migration: MigrationId) -> Result<Answer> {
        self.in_phase(Phase::Loaded, "start")?.resume();
        self.phase = Phase::Running;
        self.arrived_by = Some(migration);
        Ok(Reply::Done.into())
    }

    /// Reads the page sets of all spaces.
    fn sets_of(&self, blob: &[u8]) -> Result<Vec<PageSet>> {
        let Some(vm) = &self.vm else { return Err(self.wrong("read page sets")) };
        let mut rest = blob;
        let wrong = |error: protocol::ProtocolError| Error::Protocol(error.to_string());
        let mut sets = Vec::new();
        for space in vm.memory().layout() {
            let length = usize::try_from(PageSet::byte_len(space.pages)).unwrap_or(usize::MAX);
            let (bytes, behind) = rest.split_at_checked(length).ok_or_else(|| {
                Error::Protocol(format!("the page sets have {} bytes, which is too few", blob.len()))
            })?;
            sets.push(PageSet::from_bytes(space.pages, bytes).map_err(wrong)?);
            rest = behind;
        }
        if !rest.is_empty() {
            return Err(Error::Protocol(format!("{} bytes follow the page sets", rest.len())));
        }
        Ok(sets)
    }

    fn expect(&mut self, blob: &[u8]) -> Result<Answer> {
        if self.awaited.is_some() {
            return Err(self.wrong("expect pages twice"));
        }
        self.in_phase(Phase::Loaded, "expect pages")?;
        if self.read_memory {
            return Err(Error::Config(
                "a guest in 32-bit PAE mode cannot be started without all of its memory: move it without post-copy".into(),
            ));
        }
        let missing = self.sets_of(blob)?;
        let started = Instant::now();
        let vm = self.in_phase(Phase::Loaded, "expect pages")?;
        let awaited = Awaited::begin(vm.memory(), missing)?;
        tracing::debug!(took = ?started.elapsed(), "pages are expected");
        self.awaited = Some(awaited);
        Ok(Reply::Done.into())
    }

    fn page_faults(&mut self) -> Result<Answer> {
        let pages = self.awaiting_pages();
        let (Some(vm), Some(awaited), Some(pages)) = (&self.vm, &self.awaited, pages) else {
            return Err(self.wrong("hand out its page faults: it misses no pages, and"));
        };
        let mut addresses = Vec::new();
        for region in vm.memory().regions() {
            addresses.push(crate::sys::address_of(region).map_err(Error::host("find guest memory"))?);
        }
        let mut blob = Vec::new();
        awaited.missing().iter().for_each(|set| set.write_to(&mut blob));
        let fds = vec![awaited.share(vm.memory())?];
        Ok(Answer { reply: Reply::PageFaults { pages, addresses }, blob, fds, end: None })
    }

    fn complete(&mut self) -> Result<Answer> {
        self.in_phase(Phase::Running, "be complete")?;
        self.check_complete("be complete")?;
        if let (Some(vm), Some(awaited)) = (&self.vm, &self.awaited) {
            awaited.end(vm.memory())?;
        }
        self.awaited = None;
        Ok(Reply::Done.into())
    }

    /// Nothing that needs all of the memory may begin while pages are missing.
    fn check_complete(&mut self, asked: &'static str) -> Result<()> {
        match self.awaiting_pages() {
            Some(pages) if pages > 0 || asked != "be complete" => Err(Error::Incomplete { asked, pages }),
            _ => Ok(()),
        }
    }

    fn discard(&self) -> Result<Answer> {
        match self.phase {
            Phase::Incoming | Phase::Prepared | Phase::Loaded => Ok(ending(ExitReason::Discarded)),
            _ => Err(self.wrong("discard")),
        }
    }
}

fn done<T>(_: T) -> Answer {
    Reply::Done.into()
}

fn ending(reason: ExitReason) -> Answer {
    Answer { end: Some(reason), ..Reply::Done.into() }
}

fn layout_of(spaces: &[SpaceInfo]) -> Layout {
    let spaces = (0_u16..).zip(spaces).map(|(index, space)| Space {
        id: SpaceId(index),
        kind: SpaceKind::Memory,
        pages: space.pages,
        guest_address: space.base,
    });
    Layout { spaces: spaces.collect() }
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

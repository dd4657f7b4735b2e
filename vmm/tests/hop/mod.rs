//! Moving a guest between two VMMs of this process, with the time of every step. Pages are copied from
//! memfd to memfd: what is measured is the VMM, not a link.

use std::{
    os::unix::fs::FileExt,
    path::Path,
    thread::JoinHandle,
    time::{Duration, Instant},
};

use protocol::{
    MigrationId,
    layout::Layout,
    monitor::Role,
    page::{PAGE_SIZE, PageRun, PageSet, SpaceId},
};
use vmm::{
    Client, ExitReason, IncomingConfig, Result, SerialSink, VmConfig, cpuid::CpuModel,
    devices::virtio::Allowed,
};

/// How long any call may take.
const LIMIT: Duration = Duration::from_secs(10);
/// Stop copying rounds when fewer pages are dirty, or after so many rounds.
const FEW_PAGES: u64 = 256;
const MAX_ROUNDS: usize = 20;
/// Pages copied at once.
const COPY_PAGES: u32 = 256;

/// A VM in a thread, and the session that holds it.
pub(crate) struct Host {
    pub(crate) session: Client,
    thread: JoinHandle<Result<ExitReason>>,
}

/// How long each step of the downtime took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Steps {
    pub(crate) freeze: Duration,
    pub(crate) harvest: Duration,
    pub(crate) copy: Duration,
    pub(crate) save: Duration,
    pub(crate) load: Duration,
    pub(crate) pledge: Duration,
    pub(crate) start: Duration,
    pub(crate) total: Duration,
    pub(crate) last_pages: u64,
}

impl std::fmt::Display for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { freeze, harvest, copy, save, load, pledge, start, total, last_pages } = self;
        write!(
            f,
            "total {total:?} = freeze {freeze:?} + harvest {harvest:?} + copy {copy:?} ({last_pages} pages) \
             + save {save:?} + load {load:?} + pledge {pledge:?} + start {start:?}"
        )
    }
}

impl Host {
    pub(crate) fn boot(config: VmConfig) -> Self {
        let path = config.socket_path.clone().unwrap();
        Self::wait(&path, std::thread::spawn(move || vmm::run(config)))
    }

    fn incoming(path: &Path, max_memory_bytes: u64) -> Self {
        let config = IncomingConfig {
            name: "incoming".into(),
            max_memory_bytes,
            serial: SerialSink::None,
            allowed: Allowed::default(),
            cpu: CpuModel::Host,
            socket_path: path.to_owned(),
        };
        Self::wait(path, std::thread::spawn(move || vmm::run_incoming(config)))
    }

    fn wait(path: &Path, thread: JoinHandle<Result<ExitReason>>) -> Self {
        let deadline = Instant::now() + LIMIT;
        while !path.exists() && !thread.is_finished() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        if thread.is_finished() {
            panic!("{:?}", thread.join());
        }
        let session = Client::connect(path, Role::Session, "hop", LIMIT).unwrap();
        Self { session, thread }
    }

    pub(crate) fn terminate(mut self) {
        self.session.terminate().unwrap();
        assert_eq!(self.thread.join().unwrap().unwrap(), ExitReason::Terminated);
    }

    /// Moves the VM to a new VMM at `path`; calls `about_to_freeze` just before the downtime.
    pub(crate) fn hop(mut self, path: &Path, about_to_freeze: impl FnOnce()) -> (Self, Steps, Retiring) {
        let source = self.session.describe().unwrap();
        let layout = source.layout;
        let mut target = Self::incoming(path, layout.total_bytes());
        let prepared = target.session.prepare("moved", &layout, &source.machine).unwrap();
        let files = |fds: Vec<std::os::fd::OwnedFd>| fds.into_iter().map(Into::into).collect();
        let mut copier =
            Copier { from: files(source.memory), to: files(prepared.memory), buffer: Vec::new() };
        self.session.track_start(false).unwrap();
        for _ in 0..MAX_ROUNDS {
            let sets = self.session.harvest(&layout).unwrap();
            if copier.round(&mut self.session, &sets) < FEW_PAGES {
                break;
            }
        }
        let migration = MigrationId(7);
        about_to_freeze();
        let mut clock = Laps(Instant::now());
        let started = clock.0;
        self.session.freeze().unwrap();
        let freeze = clock.lap();
        let sets = self.session.harvest(&layout).unwrap();
        let harvest = clock.lap();
        let last_pages = copier.round(&mut self.session, &sets);
        let copy = clock.lap();
        let state = self.session.save().unwrap();
        let save = clock.lap();
        target.session.load(&state).unwrap();
        let load = clock.lap();
        self.session.pledge(migration, "this process").unwrap();
        let pledge = clock.lap();
        target.session.start(migration).unwrap();
        let start = clock.lap();
        let total = started.elapsed();
        let steps = Steps { freeze, harvest, copy, save, load, pledge, start, total, last_pages };
        (target, steps, Retiring { host: self, migration })
    }

    /// Reads the memory of the VM by guest-physical addresses.
    pub(crate) fn reader(&mut self) -> impl FnMut(u64, &mut [u8]) -> std::io::Result<()> + use<> {
        let description = self.session.describe().unwrap();
        let layout: Layout = description.layout;
        let files: Vec<std::fs::File> = description.memory.into_iter().map(Into::into).collect();
        move |address, buffer| {
            let index = layout
                .spaces
                .iter()
                .position(|space| {
                    (space.guest_address..space.guest_address + space.pages * 4096).contains(&address)
                })
                .ok_or(std::io::ErrorKind::NotFound)?;
            files[index].read_exact_at(buffer, address - layout.spaces[index].guest_address)
        }
    }
}

/// A source whose guest runs elsewhere.
pub(crate) struct Retiring {
    host: Host,
    migration: MigrationId,
}

impl Retiring {
    /// Takes the source down. In this process the guest waits meanwhile for the page tables it shares with
    /// it; in the product that is another process.
    pub(crate) fn retire(mut self) {
        self.host.session.hand_over(self.migration).unwrap();
        assert_eq!(self.host.thread.join().unwrap().unwrap(), ExitReason::HandedOver);
    }
}

struct Laps(Instant);

impl Laps {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

struct Copier {
    from: Vec<std::fs::File>,
    to: Vec<std::fs::File>,
    buffer: Vec<u8>,
}

impl Copier {
    /// Takes all pages of the sets, then copies them.
    fn round(&mut self, session: &mut Client, sets: &[PageSet]) -> u64 {
        self.buffer.resize(COPY_PAGES as usize * PAGE_SIZE, 0);
        for (index, set) in (0_u16..).zip(sets) {
            let all = u32::try_from(set.pages()).unwrap();
            session.take(PageRun { space: SpaceId(index), first: 0, count: all }).unwrap();
            let (from, to) = (&self.from[usize::from(index)], &self.to[usize::from(index)]);
            for run in set.runs(SpaceId(index), COPY_PAGES) {
                let bytes = &mut self.buffer[..run.bytes()];
                from.read_exact_at(bytes, run.offset()).unwrap();
                to.write_all_at(bytes, run.offset()).unwrap();
            }
        }
        sets.iter().map(PageSet::count).sum()
    }
}

//! The control socket over real VMs: two of them in this process, a client for each.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test's helpers fail the test")]

#[path = "../../src/test_images.rs"]
mod test_images;
mod baseline;
mod disks;
mod sparse;

use std::{
    io::Write,
    os::unix::{fs::FileExt, net::UnixStream},
    path::{Path, PathBuf},
    thread::JoinHandle,
    time::{Duration, Instant},
};

use protocol::{
    MigrationId,
    layout::Layout,
    monitor::{ErrorCode, Phase, Role},
    page::{PAGE_SIZE, PageSet, SpaceId},
};
use tempfile::TempDir;
use test_images::{COUNTERS, LOAD};
use vmm::{
    Bytes, Client, Error, ExitReason, IncomingConfig, KernelSource, Result, Ring, SerialSink, VmConfig,
    cpuid::CpuModel, devices::virtio::Allowed, host::Host,
};

const MEMORY: u64 = 16 << 20;
const LIMIT: Duration = Duration::from_secs(10);
const MIGRATION: MigrationId = MigrationId(42);

/// Whether this host has KVM. Without it tests are skipped, loudly; in CI they fail.
fn kvm() -> bool {
    match Host::open() {
        Ok(_) => true,
        Err(error) if std::env::var_os("CI").is_some() => panic!("CI needs KVM: {error}"),
        Err(error) => {
            eprintln!("SKIPPED, needs KVM: {error}");
            false
        }
    }
}

/// A VM in a thread.
struct Running {
    path: PathBuf,
    thread: JoinHandle<Result<ExitReason>>,
}

impl Running {
    fn boot(directory: &TempDir, name: &str, vcpus: u32, image: Vec<u8>) -> Self {
        let path = directory.path().join(format!("{name}.sock"));
        let config = VmConfig {
            name: name.into(),
            memory_bytes: MEMORY,
            vcpus,
            cpu: CpuModel::Host,
            nested: false,
            kernel: KernelSource::Flat {
                image: Bytes::Inline(image.into()),
                load_address: LOAD,
                entry: LOAD,
                ring: Ring::User,
            },
            initramfs: None,
            cmdline: "quiet".into(),
            serial: SerialSink::None,
            devices: Vec::new(),
            socket_path: Some(path.clone()),
        };
        Self::wait(path, std::thread::spawn(move || vmm::run(config)))
    }

    fn incoming(directory: &TempDir, name: &str) -> Self {
        let path = directory.path().join(format!("{name}.sock"));
        let config = IncomingConfig {
            name: name.into(),
            max_memory_bytes: MEMORY,
            serial: SerialSink::None,
            allowed: Allowed::default(),
            cpu: CpuModel::Host,
            socket_path: path.clone(),
        };
        Self::wait(path, std::thread::spawn(move || vmm::run_incoming(config)))
    }

    fn wait(path: PathBuf, thread: JoinHandle<Result<ExitReason>>) -> Self {
        wait_until("the socket", || path.exists() || thread.is_finished());
        Self { path, thread }
    }

    fn session(&self) -> Client {
        connect(&self.path, Role::Session).unwrap()
    }

    fn phase(&self) -> Phase {
        connect(&self.path, Role::Query).unwrap().status().unwrap().phase
    }

    fn end(self) -> ExitReason {
        self.thread.join().unwrap().unwrap()
    }

    fn terminate(self) {
        self.session().terminate().unwrap();
        assert_eq!(self.end(), ExitReason::Terminated);
    }
}

fn connect(path: &Path, role: Role) -> Result<Client> {
    Client::connect(path, role, "control.rs", LIMIT)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !done() {
        assert!(Instant::now() < deadline, "{what} did not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A VM's memory as the engine sees it: through the memfd that came over the socket.
struct Memory(std::fs::File);

impl Memory {
    fn of(client: &mut Client) -> (Self, Layout, Vec<u8>) {
        let mut description = client.describe().unwrap();
        let memory = Self(description.memory.remove(0).into());
        (memory, description.layout, description.machine)
    }

    fn counter(&self, vcpu: u64) -> u64 {
        let mut bytes = [0; 8];
        self.0.read_exact_at(&mut bytes, COUNTERS + vcpu * 4096).unwrap();
        u64::from_le_bytes(bytes)
    }

    fn counts(&self) -> bool {
        let before = self.counter(0);
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if self.counter(0) != before {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }

    fn stands_still(&self) -> bool {
        let before = self.counter(0);
        std::thread::sleep(Duration::from_millis(20));
        self.counter(0) == before
    }
}

/// Takes all dirty pages and copies them; returns how many.
fn round(source: &mut Client, layout: &Layout, from: &Memory, to: &Memory) -> u64 {
    let sets = source.harvest(layout).unwrap();
    let mut page = vec![0; 64 * PAGE_SIZE];
    for run in sets[0].runs(SpaceId(0), 64) {
        source.take(run).unwrap();
        from.0.read_exact_at(&mut page[..run.bytes()], run.offset()).unwrap();
        to.0.write_all_at(&page[..run.bytes()], run.offset()).unwrap();
    }
    sets.iter().map(PageSet::count).sum()
}

#[test]
fn a_running_vm_moves_between_two_vmms() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for vcpus in [1, 4] {
        let source = Running::boot(&directory, "source", vcpus, test_images::counter());
        let target = Running::incoming(&directory, "target");
        let (mut from, mut to) = (source.session(), target.session());
        let (memory, layout, machine) = Memory::of(&mut from);
        wait_until("counting", || memory.counter(u64::from(vcpus) - 1) > 0);

        let prepared = to.prepare("moved", &layout, &machine).unwrap();
        let there = Memory(prepared.memory.into_iter().next().unwrap().into());
        assert_eq!(target.phase(), Phase::Prepared);
        from.track_start(false).unwrap();
        assert_eq!(round(&mut from, &layout, &memory, &there), MEMORY / 4096);
        for _ in 0..3 {
            assert!(round(&mut from, &layout, &memory, &there) < 64);
        }

        let started = Instant::now();
        from.freeze().unwrap();
        let frozen = Instant::now();
        round(&mut from, &layout, &memory, &there);
        let copied = Instant::now();
        let state = from.save().unwrap();
        let saved = Instant::now();
        to.load(&state).unwrap();
        let loaded = Instant::now();
        from.pledge(MIGRATION, "here").unwrap();
        let pledged = Instant::now();
        to.start(MIGRATION).unwrap();
        eprintln!(
            "{vcpus} vCPUs: freeze {:?}, last round {:?}, save {:?}, load {:?}, pledge {:?}, start {:?}",
            frozen - started,
            copied - frozen,
            saved - copied,
            loaded - saved,
            pledged - loaded,
            pledged.elapsed()
        );
        assert!(memory.stands_still());
        let before: Vec<u64> = (0..u64::from(vcpus)).map(|vcpu| memory.counter(vcpu)).collect();
        for (vcpu, before) in (0..).zip(before) {
            wait_until("counting there", || there.counter(vcpu) > before);
        }
        let status = to.status().unwrap();
        assert_eq!((status.name.as_str(), status.phase), ("moved", Phase::Running));
        assert_eq!((status.arrived_by, status.vcpus), (Some(MIGRATION), vcpus));

        assert!(from.hand_over(MigrationId(1)).is_err());
        from.hand_over(MIGRATION).unwrap();
        assert_eq!(source.end(), ExitReason::HandedOver);
        drop(to);
        assert!(there.counts(), "a started VM outlives its session");
        target.terminate();
    }
}

#[test]
fn a_frozen_source_resumes_when_its_session_dies() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::counter());
    for _ in 0..5 {
        let mut session = vm.session();
        let (memory, layout, _) = Memory::of(&mut session);
        session.track_start(false).unwrap();
        session.harvest(&layout).unwrap();
        session.freeze().unwrap();
        assert!(memory.stands_still());
        drop(session);
        assert!(memory.counts());
        wait_until("running", || vm.phase() == Phase::Running);
        // Tracking stopped, and a new attempt starts with every page.
        let mut session = vm.session();
        assert!(session.harvest(&layout).is_err());
        session.track_start(false).unwrap();
        assert_eq!(session.harvest(&layout).unwrap()[0].count(), MEMORY / 4096);
    }
    vm.terminate();
}

#[test]
fn a_throttled_vm_is_slower_and_never_stays_so() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 2, test_images::counter());
    let mut session = vm.session();
    let (memory, ..) = Memory::of(&mut session);
    let steps = || {
        let before = memory.counter(0);
        std::thread::sleep(Duration::from_millis(300));
        memory.counter(0) - before
    };
    // Other work on the host slows the guest too, so the least of several looks is taken for the free run.
    let ratio = |session: &mut Client, percent| {
        let mut best = f64::INFINITY;
        for _ in 0..5 {
            session.throttle(0).unwrap();
            let free = steps();
            session.throttle(percent).unwrap();
            best = best.min(steps() as f64 / free as f64);
        }
        best
    };
    let slow = ratio(&mut session, 90);
    assert!(slow < 0.4, "{slow}");
    assert_eq!(session.status().unwrap().throttle_percent, Some(90));
    assert!(matches!(session.throttle(100), Err(Error::Refused { code: ErrorCode::BadRequest, .. })));
    assert!(steps() > 0, "it still runs");

    let percent = || connect(&vm.path, Role::Query).unwrap().status().unwrap().throttle_percent;
    assert_eq!(percent(), Some(90));
    let started = Instant::now();
    session.freeze().unwrap();
    eprintln!("freeze of a throttled VM: {:?}", started.elapsed());
    assert_eq!(percent(), Some(0));
    assert!(session.throttle(10).is_err(), "what stands still cannot be slowed down");
    session.resume(None).unwrap();
    session.throttle(50).unwrap();
    session.track_start(false).unwrap();
    session.track_stop().unwrap();
    assert_eq!(percent(), Some(0));
    session.throttle(50).unwrap();
    drop(session);
    wait_until("the throttle ends with its session", || percent() == Some(0));
    assert!(memory.counts());
    vm.session().throttle(90).unwrap();
    vm.terminate();
}

#[test]
fn a_pledged_source_stays_frozen_until_it_is_told() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::counter());
    let mut session = vm.session();
    let (memory, ..) = Memory::of(&mut session);
    assert!(session.pledge(MIGRATION, "x").is_err(), "only a frozen VM can be pledged");
    session.freeze().unwrap();
    session.pledge(MIGRATION, "host-b:7000\u{1b}[2J").unwrap();
    drop(session);
    assert!(memory.stands_still());
    let mut session = vm.session();
    let pledge = session.welcome().pledged_to.clone().unwrap();
    assert_eq!((pledge.migration, pledge.peer.as_str()), (MIGRATION, "host-b:7000[2J"));
    for wrong in [None, Some(MigrationId(7))] {
        assert!(session.resume(wrong).is_err());
    }
    assert!(memory.stands_still());
    session.resume(Some(MIGRATION)).unwrap();
    assert!(memory.counts());
    assert_eq!(vm.phase(), Phase::Running);
    drop(session);
    vm.terminate();
}

#[test]
fn an_incoming_vm_that_was_not_started_discards_itself() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = Running::boot(&directory, "source", 1, test_images::counter());
    let mut from = source.session();
    let (_, layout, machine) = Memory::of(&mut from);
    for loads in [false, true] {
        let target = Running::incoming(&directory, "target");
        let mut to = target.session();
        to.prepare("moved", &layout, &machine).unwrap();
        if loads {
            from.freeze().unwrap();
            to.load(&from.save().unwrap()).unwrap();
            from.resume(None).unwrap();
        }
        assert!(to.freeze().is_err());
        drop(to);
        assert_eq!(target.end(), ExitReason::Discarded);
    }
    drop(from);
    source.terminate();
}

#[test]
fn a_destination_refuses_what_it_cannot_be() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = Running::boot(&directory, "source", 1, test_images::counter());
    let mut from = source.session();
    let (_, layout, machine) = Memory::of(&mut from);
    let target = Running::incoming(&directory, "target");
    let mut to = target.session();
    let mut large = layout.clone();
    large.spaces[0].pages *= 2;
    let mut moved = layout.clone();
    moved.spaces[0].guest_address = 4096;
    assert!(to.prepare("moved", &large, &machine).is_err());
    assert!(to.prepare("moved", &moved, &machine).is_err());
    assert!(to.prepare("../moved", &layout, &machine).is_err());
    assert!(to.prepare("moved", &layout, &[]).is_err());
    let (mut other, _) = vmm::state::Machine::decode(&machine).unwrap();
    for leaf in other.cpuid.iter_mut().filter(|leaf| leaf.function == 7 && leaf.index == 0) {
        leaf.ebx |= 1 << 16;
    }
    let error = to.prepare("moved", &layout, &other.encode(&[]).unwrap()).unwrap_err();
    assert!(matches!(error, Error::Refused { code: ErrorCode::Unsupported, .. }), "{error}");
    assert!(error.to_string().contains("avx512f"), "{error}");
    // None of this used the destination up, and loading garbage does not either.
    to.prepare("moved", &layout, &machine).unwrap();
    assert!(to.load(b"garbage").is_err());
    assert!(to.start(MIGRATION).is_err());
    from.freeze().unwrap();
    to.load(&from.save().unwrap()).unwrap();
    to.discard().unwrap();
    assert_eq!(target.end(), ExitReason::Discarded);
    drop(from);
    source.terminate();
}

#[test]
fn a_second_session_is_refused_and_told_by_whom() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::counter());
    let session = vm.session();
    match connect(&vm.path, Role::Session) {
        Err(Error::Busy { holder_pid, reason }) => {
            assert_eq!(holder_pid, Some(std::process::id()));
            assert!(reason.contains("control.rs"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    // Queries are answered all the same.
    let status = connect(&vm.path, Role::Query).unwrap().status().unwrap();
    assert_eq!(status.holder_pid, Some(std::process::id()));
    assert_eq!(status.holder.as_deref(), Some("control.rs"));
    assert!(connect(&vm.path, Role::Query).unwrap().freeze().is_err());
    drop(session);
    drop(vm.session());
    vm.terminate();
}

#[test]
fn garbage_on_the_socket_harms_nobody() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::counter());
    let mut session = vm.session();
    let (memory, ..) = Memory::of(&mut session);
    drop(session);
    let hello = |version: u16| {
        let json = format!(r#"{{"type":"hello","version":{version},"role":"session","client":"x"}}"#);
        let mut bytes = (json.len() as u32).to_le_bytes().to_vec();
        bytes.extend([0; 4]);
        bytes.extend(json.bytes());
        bytes
    };
    let mut then_garbage = hello(1);
    then_garbage.extend([0xff; 64]);
    for bytes in [
        vec![0xff; 4096],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![2, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'],
        then_garbage,
    ] {
        let mut stream = UnixStream::connect(&vm.path).unwrap();
        stream.write_all(&bytes).unwrap();
        // The VMM closes; what it still says is one reply at most.
        std::io::copy(&mut stream, &mut std::io::sink()).unwrap_or(0);
        assert!(memory.counts());
    }
    let mut stream = UnixStream::connect(&vm.path).unwrap();
    stream.write_all(&hello(2)).unwrap();
    let mut answer = Vec::new();
    std::io::copy(&mut stream, &mut answer).unwrap();
    assert!(String::from_utf8_lossy(&answer).contains("version 1"), "{answer:?}");
    vm.terminate();
}

#[test]
fn a_guest_that_ends_ends_the_vm() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::hello(b"x", 9));
    assert_eq!(vm.end(), ExitReason::PoweredOff { code: 9 });
    let vm = Running::boot(&directory, "vm", 1, test_images::crash());
    assert!(matches!(vm.end(), ExitReason::Crashed { vcpu: 0, .. }));
    assert!(!directory.path().join("vm.sock").exists());
}

#[test]
fn where_no_vm_is_the_error_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let error = connect(&directory.path().join("nobody.sock"), Role::Query).unwrap_err();
    assert!(error.to_string().contains("there is no socket"), "{error}");
}

/// A source whose VM has moved to a target that misses the page of its counter; the target is started.
fn moved_without_its_counter(directory: &TempDir) -> (Running, Running, Client, Memory, Layout) {
    let source = Running::boot(directory, "source", 1, test_images::counter());
    let target = Running::incoming(directory, "target");
    let (mut from, mut to) = (source.session(), target.session());
    let (memory, layout, machine) = Memory::of(&mut from);
    wait_until("counting", || memory.counter(0) > 0);
    let prepared = to.prepare("moved", &layout, &machine).unwrap();
    let there = Memory(prepared.memory.into_iter().next().unwrap().into());
    from.track_start(false).unwrap();
    round(&mut from, &layout, &memory, &there);
    from.freeze().unwrap();
    round(&mut from, &layout, &memory, &there);
    assert!(to.expect(&[]).is_err(), "nothing was loaded yet");
    to.load(&from.save().unwrap()).unwrap();
    let mut missing = PageSet::empty(MEMORY / 4096);
    missing.insert(COUNTERS / 4096, 1);
    assert!(to.expect(&[]).is_err(), "sets of another length");
    assert!(to.page_faults(&layout).is_err(), "nothing is missing yet");
    to.expect(std::slice::from_ref(&missing)).unwrap();
    assert!(to.expect(std::slice::from_ref(&missing)).is_err(), "twice");
    assert!(to.complete().is_err(), "not started");
    from.pledge(MIGRATION, "here").unwrap();
    to.start(MIGRATION).unwrap();
    (source, target, to, there, layout)
}

#[test]
fn a_vm_that_misses_a_page_waits_for_it_whoever_dies() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (source, target, mut to, there, layout) = moved_without_its_counter(&directory);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(to.status().unwrap().awaiting_pages, Some(1));
    for refused in [to.track_start(false).map(drop), to.freeze(), to.complete()] {
        let error = refused.unwrap_err().to_string();
        assert!(error.contains("1 pages of the VM are not here yet"), "{error}");
    }
    // The engine dies with its descriptor, and the next one is told the same.
    let faults = to.page_faults(&layout).unwrap();
    assert_eq!((faults.addresses.len(), faults.missing[0].count()), (1, 1));
    drop((faults, to));
    let mut next = target.session();
    assert_eq!(next.welcome().phase, Phase::Running);
    assert_eq!(next.status().unwrap().awaiting_pages, Some(1));
    let mut page = vec![0; PAGE_SIZE];
    let (memory, ..) = Memory::of(&mut source.session());
    memory.0.read_exact_at(&mut page, COUNTERS).unwrap();
    there.0.write_all_at(&page, COUNTERS).unwrap();
    // Whoever waits is woken to look again.
    assert!(next.page_faults(&layout).unwrap().missing[0].is_empty());
    assert!(there.counts());
    next.complete().unwrap();
    assert_eq!(next.status().unwrap().awaiting_pages, None);
    next.freeze().unwrap();
    next.resume(None).unwrap();
    assert!(there.counts());
    drop(next);
    target.terminate();
    source.terminate();
}

#[test]
fn a_vm_that_waits_for_a_page_can_be_ended() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let (source, target, to, ..) = moved_without_its_counter(&directory);
    drop(to);
    let begun = Instant::now();
    target.terminate();
    assert!(begun.elapsed() < Duration::from_secs(5));
    source.terminate();
}

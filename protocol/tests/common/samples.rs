//! One value of every message, and the lists that say that none is missing.

use protocol::MigrationId;
use protocol::checkpoint::name::CheckpointId;
use protocol::container::pagemap::{Entry, LAZY, PARENT, PRESENT, Pagemap};
use protocol::container::tree::{Attribute, Entry as File, Kind, Time};
use protocol::container::{Description, Files, Overlay, Placement, Run, Tree};
use protocol::control::{Downstream, Offer, Outcome, RefuseCode, Upstream, WorkloadKind};
use protocol::handshake::Hello;
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::monitor::{ErrorCode, Phase, Pledge, Reply, Request, Role, Status, TrackingMode};
use protocol::page::{PageSet, SpaceId};
use protocol::state::State;
use protocol::steer::{self, Answer, Order};

pub(crate) const CHECKPOINT: &str = "20261123T194831Z-3f9a1c07";
pub(crate) const MIGRATION: MigrationId = MigrationId(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);

pub(crate) const DOWNSTREAM_TYPES: [&str; 14] = [
    "hello",
    "offer",
    "state",
    "commit",
    "done",
    "cancel",
    "ask",
    "round-sent",
    "missing",
    "recover",
    "join",
    "resume",
    "probe",
    "verify",
];
pub(crate) const UPSTREAM_TYPES: [&str; 17] = [
    "hello",
    "accept",
    "refuse",
    "round-done",
    "ready",
    "started",
    "failed",
    "outcome",
    "want",
    "missing",
    "complete",
    "incomplete",
    "probed",
    "resumed",
    "verified",
    "seeded",
    "anew",
];
pub(crate) const REQUEST_TYPES: [&str; 24] = [
    "hello",
    "status",
    "describe",
    "track-start",
    "harvest",
    "take",
    "redirty",
    "track-stop",
    "freeze",
    "save",
    "pledge",
    "resume",
    "hand-over",
    "terminate",
    "prepare",
    "load",
    "start",
    "discard",
    "expect",
    "page-faults",
    "complete",
    "throttle",
    "baseline",
    "copy-disks",
];
pub(crate) const REPLY_TYPES: [&str; 10] = [
    "welcome",
    "refused",
    "status",
    "description",
    "tracking",
    "dirty",
    "saved",
    "done",
    "error",
    "page-faults",
];

pub(crate) const ORDER_TYPES: [&str; 4] = ["status", "await", "cancel", "set"];
pub(crate) const ANSWER_TYPES: [&str; 4] = ["status", "series", "done", "error"];

// A variant that is added to the crate does not compile here until it has a place in the list above, and a type in
// the list does not pass `every_message_has_a_golden_file` until it has a sample.

pub(crate) fn downstream_type(message: &Downstream) -> &'static str {
    DOWNSTREAM_TYPES[match message {
        Downstream::Hello(_) => 0,
        Downstream::Offer(_) => 1,
        Downstream::State { .. } => 2,
        Downstream::Commit { .. } => 3,
        Downstream::Done { .. } => 4,
        Downstream::Cancel { .. } => 5,
        Downstream::Ask { .. } => 6,
        Downstream::RoundSent { .. } => 7,
        Downstream::Missing { .. } => 8,
        Downstream::Recover { .. } => 9,
        Downstream::Join { .. } => 10,
        Downstream::Resume { .. } => 11,
        Downstream::Probe { .. } => 12,
        Downstream::Verify { .. } => 13,
    }]
}

pub(crate) fn upstream_type(message: &Upstream) -> &'static str {
    UPSTREAM_TYPES[match message {
        Upstream::Hello(_) => 0,
        Upstream::Accept => 1,
        Upstream::Refuse { .. } => 2,
        Upstream::RoundDone { .. } => 3,
        Upstream::Ready => 4,
        Upstream::Started { .. } => 5,
        Upstream::Failed { .. } => 6,
        Upstream::Outcome { .. } => 7,
        Upstream::Want { .. } => 8,
        Upstream::Missing { .. } => 9,
        Upstream::Complete { .. } => 10,
        Upstream::Incomplete { .. } => 11,
        Upstream::Probed { .. } => 12,
        Upstream::Resumed { .. } => 13,
        Upstream::Verified { .. } => 14,
        Upstream::Seeded { .. } => 15,
        Upstream::Anew { .. } => 16,
    }]
}

pub(crate) fn request_type(message: &Request) -> &'static str {
    REQUEST_TYPES[match message {
        Request::Hello { .. } => 0,
        Request::Status => 1,
        Request::Describe => 2,
        Request::TrackStart { .. } => 3,
        Request::Harvest { .. } => 4,
        Request::Take { .. } => 5,
        Request::Redirty => 6,
        Request::TrackStop => 7,
        Request::Freeze => 8,
        Request::Save => 9,
        Request::Pledge { .. } => 10,
        Request::Resume { .. } => 11,
        Request::HandOver { .. } => 12,
        Request::Terminate => 13,
        Request::Prepare { .. } => 14,
        Request::Load => 15,
        Request::Start { .. } => 16,
        Request::Discard => 17,
        Request::Expect => 18,
        Request::PageFaults => 19,
        Request::Complete => 20,
        Request::Throttle { .. } => 21,
        Request::Baseline { .. } => 22,
        Request::CopyDisks { .. } => 23,
    }]
}

pub(crate) fn reply_type(message: &Reply) -> &'static str {
    REPLY_TYPES[match message {
        Reply::Welcome { .. } => 0,
        Reply::Refused { .. } => 1,
        Reply::Status(_) => 2,
        Reply::Description { .. } => 3,
        Reply::Tracking { .. } => 4,
        Reply::Dirty { .. } => 5,
        Reply::Saved => 6,
        Reply::Done => 7,
        Reply::Error { .. } => 8,
        Reply::PageFaults { .. } => 9,
    }]
}

pub(crate) fn order_type(message: &Order) -> &'static str {
    ORDER_TYPES[match message {
        Order::Status => 0,
        Order::Await { .. } => 1,
        Order::Cancel => 2,
        Order::Set(_) => 3,
    }]
}

pub(crate) fn answer_type(message: &Answer) -> &'static str {
    ANSWER_TYPES[match message {
        Answer::Status(_) => 0,
        Answer::Series(_) => 1,
        Answer::Done => 2,
        Answer::Error { .. } => 3,
    }]
}

pub(crate) fn hello() -> Hello {
    Hello { software: "migrate 0.1.0".into(), capabilities: Vec::new(), required: Vec::new() }
}

pub(crate) fn layout() -> Layout {
    let space =
        |id, pages, guest_address| Space { id: SpaceId(id), kind: SpaceKind::Memory, pages, guest_address };
    Layout { spaces: vec![space(0, 786_432, 0), space(1, 262_144, 1 << 32)] }
}

pub(crate) fn downstream() -> Vec<Downstream> {
    vec![
        Downstream::Hello(hello()),
        Downstream::Offer(Offer {
            migration: MIGRATION,
            kind: WorkloadKind::Vm,
            name: "web-1".into(),
            layout: layout(),
            page_streams: 4,
            connections: 1,
            seed: None,
        }),
        Downstream::State { last_round: 5 },
        Downstream::Commit { migration: MIGRATION },
        Downstream::Done { migration: MIGRATION },
        Downstream::Cancel { reason: "stopped by the operator".into() },
        Downstream::Ask { migration: MIGRATION },
        Downstream::RoundSent { round: 0 },
        Downstream::Missing { pages: 5 },
        Downstream::Recover { migration: MIGRATION },
        Downstream::Join { migration: MIGRATION, connection: 1 },
        Downstream::Resume { migration: MIGRATION },
        Downstream::Probe { bytes: 4 << 30 },
        Downstream::Verify { last_round: 5, first: 128 },
    ]
}

pub(crate) fn upstream() -> Vec<Upstream> {
    vec![
        Upstream::Hello(hello()),
        Upstream::Accept,
        Upstream::Refuse {
            code: RefuseCode::Memory,
            reason: "the workload has 4 GiB, --max-memory here is 1 GiB".into(),
        },
        Upstream::RoundDone { round: 0 },
        Upstream::Ready,
        Upstream::Started { migration: MIGRATION },
        Upstream::Failed { reason: "the state's section vcpu/1 is missing".into() },
        Upstream::Outcome { migration: MIGRATION, outcome: Outcome::Discarded },
        Upstream::Want { space: 1, page: 4096 },
        Upstream::Missing { pages: 5 },
        Upstream::Complete { migration: MIGRATION },
        Upstream::Incomplete { migration: MIGRATION },
        Upstream::Probed { bytes: 1_875_000_000, duration_us: 1_500_000 },
        Upstream::Resumed { round: 2 },
        Upstream::Verified { stripes: 256 },
        Upstream::Seeded { pages: 65_536 },
        Upstream::Anew { round: 5 },
    ]
}

pub(crate) fn requests() -> Vec<Request> {
    vec![
        Request::Hello {
            version: protocol::monitor::VERSION,
            role: Role::Session,
            client: "migrate send".into(),
        },
        Request::Status,
        Request::Describe,
        Request::CopyDisks { disks: vec!["/srv/vms/web-1.img".into()] },
        Request::TrackStart { keep: false },
        Request::Harvest { sparse: false },
        Request::Take { space: 1, first: 4096, count: 512 },
        Request::Redirty,
        Request::Baseline { checkpoint: CHECKPOINT.parse().ok() },
        Request::TrackStop,
        Request::Throttle { percent: 40 },
        Request::Freeze,
        Request::Save,
        Request::Pledge { migration: MIGRATION, peer: "192.0.2.7:4242".into() },
        Request::Resume { migration: Some(MIGRATION) },
        Request::HandOver { migration: MIGRATION },
        Request::Terminate,
        Request::Prepare { name: "web-1".into(), layout: layout() },
        Request::Load,
        Request::Start { migration: MIGRATION },
        Request::Discard,
        Request::Expect,
        Request::PageFaults,
        Request::Complete,
    ]
}

pub(crate) fn status() -> Status {
    Status {
        name: "web-1".into(),
        phase: Phase::Pledged,
        pid: 4711,
        memory_bytes: 4 << 30,
        vcpus: 2,
        uptime_ms: 86_400_000,
        serial: "web-1.serial".into(),
        holder_pid: Some(4712),
        holder: Some("migrate send".into()),
        arrived_by: None,
        pledged_to: Some(Pledge { migration: MIGRATION, peer: "192.0.2.7:4242".into() }),
        awaiting_pages: None,
        throttle_percent: None,
        baseline: None,
    }
}

pub(crate) fn replies() -> Vec<Reply> {
    vec![
        Reply::Welcome {
            version: protocol::monitor::VERSION,
            software: "vmm 0.1.0".into(),
            status: Status {
                phase: Phase::Running,
                holder_pid: None,
                holder: None,
                pledged_to: None,
                ..status()
            },
        },
        Reply::Refused { reason: "migrate send (pid 4712) holds this VM".into(), holder_pid: Some(4712) },
        Reply::Status(status()),
        Reply::Description { name: "web-1".into(), layout: layout(), can_copy_disks: false },
        Reply::Tracking { mode: TrackingMode::ManualInitiallySet, baseline: None, can_keep: false },
        Reply::Dirty { pages: 1_048_576, sparse: false },
        Reply::Saved,
        Reply::Done,
        Reply::Error {
            code: ErrorCode::WrongState,
            message: "save needs a frozen VM, this one is running: freeze it first".into(),
        },
        Reply::PageFaults { pages: 5, addresses: vec![0x7f00_0000_0000, 0x7f00_c000_0000] },
    ]
}

pub(crate) fn orders() -> Vec<Order> {
    vec![
        Order::Status,
        Order::Await { limit_ms: 5000 },
        Order::Cancel,
        Order::Set(steer::Limits {
            downtime_us: Some(20_000),
            bandwidth_bytes_per_s: Some(250_000_000),
            ..steer::Limits::default()
        }),
    ]
}

pub(crate) fn answers() -> Vec<Answer> {
    vec![
        Answer::Status(Box::new(steer::Status {
            software: "migrate 0.1.0".into(),
            pid: 4712,
            end: steer::End::Send,
            migration: MIGRATION,
            workload: "web-1".into(),
            peer: "192.0.2.7:4242".into(),
            phase: "rounds".into(),
            cancellable: true,
            outcome: None,
            reason: None,
            elapsed_us: 2_345_678,
            memory_bytes: 4 << 30,
            round: 2,
            dirty_pages: 8192,
            done_pages: 2048,
            moved_bytes: 1 << 30,
            rate_bytes_per_s: 640_000_000,
            dirty_bytes_per_s: Some(120_000_000),
            predicted_downtime_us: Some(48_000),
            throttle_percent: None,
            eta_us: Some(61_000),
            limits: steer::Limits {
                downtime_us: Some(50_000),
                max_downtime_us: Some(300_000),
                max_rounds: Some(30),
                timeout_us: Some(600_000_000),
                on_timeout: Some("cancel".into()),
                on_stall: Some(vec!["minimum".into(), "throttle".into()]),
                max_throttle_percent: Some(80),
                post_copy_after: None,
                bandwidth_bytes_per_s: None,
            },
        })),
        Answer::Series(Box::new(steer::Series {
            software: "migrate 0.1.0".into(),
            pid: 4713,
            workload: "web-1".into(),
            store: "/var/lib/checkpoints".into(),
            phase: "waiting".into(),
            ended: false,
            elapsed_us: 95_000_000,
            interval_us: Some(30_000_000),
            next_us: Some(25_000_000),
            taken: 3,
            failed: 1,
            missed: 0,
            stored_bytes: 1 << 30,
            last: Some(steer::LastCheckpoint {
                id: CheckpointId::new(1_795_463_311, 0x3f9a_1c07),
                durable_unix_ms: 1_795_463_312_250,
                deltas: 2,
                pause_us: 3120,
                stored_bytes: 8 << 20,
            }),
            failure: None,
        })),
        Answer::Done,
        Answer::Error {
            code: steer::ErrorCode::TooLate,
            message: "the migration is behind its commit: it will be finished".into(),
        },
    ]
}

pub(crate) fn state() -> State {
    let mut state = State::default();
    state.push("machine", 2, b"example".to_vec());
    state.push("vcpu/0", 1, vec![0xaa; 5]);
    state.push("vcpu/1", 1, Vec::new());
    state
}

/// Pages 0, 1, 63, 64 and 69 of 70.
pub(crate) fn page_set() -> PageSet {
    let mut set = PageSet::empty(70);
    for (first, count) in [(0, 2), (63, 2), (69, 1)] {
        set.insert(first, count);
    }
    set
}

/// Pages 0, 1 and 200 of the first space of the sample layout, and page 4096 of the second.
pub(crate) fn missing() -> Vec<PageSet> {
    let mut sets: Vec<_> = layout().spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
    for (space, first, count) in [(0, 0, 2), (0, 200, 1), (1, 4096, 1)] {
        sets[space].insert(first, count);
    }
    sets
}

/// A page whose byte `i` is `i` modulo 251.
pub(crate) fn page() -> Vec<u8> {
    (0..protocol::page::PAGE_SIZE).map(|i| (i % 251) as u8).collect()
}

// The names that stand for something, all of them. `complete` does not compile when one is missing from its match.

pub(crate) const REFUSE_CODES: [RefuseCode; 8] = [
    RefuseCode::Version,
    RefuseCode::Memory,
    RefuseCode::NameTaken,
    RefuseCode::Machine,
    RefuseCode::Busy,
    RefuseCode::BadOffer,
    RefuseCode::Host,
    RefuseCode::NoSuchMigration,
];
pub(crate) const OUTCOMES: [Outcome; 3] = [Outcome::Started, Outcome::Discarded, Outcome::Unknown];
pub(crate) const WORKLOAD_KINDS: [WorkloadKind; 3] =
    [WorkloadKind::Vm, WorkloadKind::Program, WorkloadKind::Container];
pub(crate) const SPACE_KINDS: [SpaceKind; 2] = [SpaceKind::Memory, SpaceKind::Disk];
pub(crate) const ROLES: [Role; 2] = [Role::Query, Role::Session];
pub(crate) const TRACKING_MODES: [TrackingMode; 3] =
    [TrackingMode::ManualInitiallySet, TrackingMode::Manual, TrackingMode::Plain];
pub(crate) const ERROR_CODES: [ErrorCode; 4] =
    [ErrorCode::BadRequest, ErrorCode::WrongState, ErrorCode::Unsupported, ErrorCode::Host];
pub(crate) const PHASES: [Phase; 7] = [
    Phase::Running,
    Phase::Frozen,
    Phase::Pledged,
    Phase::Incoming,
    Phase::Prepared,
    Phase::Loaded,
    Phase::Stopped,
];

pub(crate) const STEER_ERROR_CODES: [steer::ErrorCode; 3] =
    [steer::ErrorCode::BadRequest, steer::ErrorCode::BadValue, steer::ErrorCode::TooLate];
pub(crate) const STEER_ENDS: [steer::End; 2] = [steer::End::Send, steer::End::Receive];
pub(crate) const STEER_OUTCOMES: [steer::Outcome; 3] =
    [steer::Outcome::Moved, steer::Outcome::Failed, steer::Outcome::InDoubt];

/// How many variants each list must have, by matches that the compiler keeps complete.
pub(crate) fn complete() -> bool {
    let refuse = REFUSE_CODES.map(|code| match code {
        RefuseCode::Version => 0,
        RefuseCode::Memory => 1,
        RefuseCode::NameTaken => 2,
        RefuseCode::Machine => 3,
        RefuseCode::Busy => 4,
        RefuseCode::BadOffer => 5,
        RefuseCode::Host => 6,
        RefuseCode::NoSuchMigration => 7,
    });
    let outcomes = OUTCOMES.map(|outcome| match outcome {
        Outcome::Started => 0,
        Outcome::Discarded => 1,
        Outcome::Unknown => 2,
    });
    let kinds = WORKLOAD_KINDS.map(|kind| match kind {
        WorkloadKind::Vm => 0,
        WorkloadKind::Program => 1,
        WorkloadKind::Container => 2,
    });
    let spaces = SPACE_KINDS.map(|kind| match kind {
        SpaceKind::Memory => 0,
        SpaceKind::Disk => 1,
    });
    let roles = ROLES.map(|role| match role {
        Role::Query => 0,
        Role::Session => 1,
    });
    let modes = TRACKING_MODES.map(|mode| match mode {
        TrackingMode::ManualInitiallySet => 0,
        TrackingMode::Manual => 1,
        TrackingMode::Plain => 2,
    });
    let errors = ERROR_CODES.map(|code| match code {
        ErrorCode::BadRequest => 0,
        ErrorCode::WrongState => 1,
        ErrorCode::Unsupported => 2,
        ErrorCode::Host => 3,
    });
    let phases = PHASES.map(|phase| match phase {
        Phase::Running => 0,
        Phase::Frozen => 1,
        Phase::Pledged => 2,
        Phase::Incoming => 3,
        Phase::Prepared => 4,
        Phase::Loaded => 5,
        Phase::Stopped => 6,
    });
    let steer_errors = STEER_ERROR_CODES.map(|code| match code {
        steer::ErrorCode::BadRequest => 0,
        steer::ErrorCode::BadValue => 1,
        steer::ErrorCode::TooLate => 2,
    });
    let steer_ends = STEER_ENDS.map(|end| match end {
        steer::End::Send => 0,
        steer::End::Receive => 1,
    });
    let steer_outcomes = STEER_OUTCOMES.map(|outcome| match outcome {
        steer::Outcome::Moved => 0,
        steer::Outcome::Failed => 1,
        steer::Outcome::InDoubt => 2,
    });
    let steer: [&[usize]; 3] = [&steer_errors, &steer_ends, &steer_outcomes];
    let lists: [&[usize]; 8] = [&refuse, &outcomes, &kinds, &spaces, &roles, &modes, &errors, &phases];
    let lists = [&lists[..], &steer[..]].concat();
    lists.iter().all(|list| list.iter().copied().eq(0..list.len()))
}

/// What an offer says of a container.
pub(crate) fn container() -> Description {
    Description {
        id: "web-1".into(),
        criu: [4, 1, 1],
        root: "/srv/web/rootfs".into(),
        tcp_established: true,
        files: None,
    }
}

/// The same of one whose upper layer travels.
pub(crate) fn container_with_files() -> Description {
    let overlay = Overlay {
        lower: vec!["/srv/layers/2".into(), "/srv/layers/1".into()],
        options: vec!["redirect_dir=on".into()],
    };
    Description { files: Some(Files { space: 3, overlay: Some(overlay) }), ..container() }
}

/// One of each kind.
pub(crate) fn tree() -> Tree {
    let entry = |parent, name: &str, kind| File {
        parent,
        name: name.into(),
        kind,
        mode: 0o644,
        uid: 1000,
        gid: 100,
        mtime: Time { s: 1_764_500_000, ns: 123_456_789 },
        attributes: Vec::new(),
    };
    let link =
        File { mode: 0, uid: 0, gid: 0, mtime: Time::default(), ..entry(1, "again", Kind::Link { to: 6 }) };
    let value = b"y".to_vec();
    let opaque = vec![Attribute { name: b"trusted.overlay.opaque".to_vec(), value }];
    Tree {
        entries: vec![
            File { mode: 0o755, ..entry(0, "", Kind::Directory) },
            File { mode: 0o1777, attributes: opaque, ..entry(0, "a", Kind::Directory) },
            entry(0, "b", Kind::BlockDevice { major: 8, minor: 1 }),
            entry(0, "c", Kind::CharDevice { major: 0, minor: 0 }),
            entry(0, "d", Kind::Symlink { target: b"../a".to_vec() }),
            entry(0, "e", Kind::Fifo),
            File { mode: 0o4755, ..entry(0, "f", Kind::File { number: 17, size: 10_000 }) },
            entry(0, "g", Kind::Socket),
            link,
        ],
    }
}

/// Two processes, and pages that came later.
pub(crate) fn placement() -> Placement {
    let run = |process, page, pages, space, slot| Run { process, page, pages, space: SpaceId(space), slot };
    Placement {
        runs: vec![
            run(1, 0x400, 3, 0, 0),
            run(1, 0x7fff_0000, 2, 0, 3),
            run(7, 0x400, 5, 1, 0),
            run(7, 0x405, 1, 2, 0),
        ],
    }
}

/// The image of one of them.
pub(crate) fn pagemap() -> Pagemap {
    let entry = |first, pages, flags| Entry { first, pages, flags };
    Pagemap {
        pages_id: 2,
        entries: vec![entry(0x100, 1, PRESENT), entry(0x400, 5, PARENT), entry(0x405, 1, LAZY)],
    }
}

//! Any value of every type, for proptest.

use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;
use proptest::sample::select;

use super::samples;
use protocol::MigrationId;
use protocol::checkpoint::manifest::HexDigest;
use protocol::checkpoint::name::CheckpointId;
use protocol::control::{Downstream, Offer, Seed, Upstream};
use protocol::frame::{Frame, MAX_FRAME_PAGES, STRIPE_PAGES};
use protocol::handshake::Hello;
use protocol::layout::{Layout, MAX_SPACE_PAGES, Space};
use protocol::monitor::{Pledge, Reply, Request, Status};
use protocol::page::{PageRun, SpaceId};
use protocol::payload::{DELTA_SUM_BYTES, Encoding, KNOWN_PAGE_BYTES};
use protocol::state::{Section, State};
use protocol::steer::{self, Answer, Order};

fn migration() -> impl Strategy<Value = MigrationId> {
    any::<u128>().prop_map(MigrationId)
}

fn text() -> impl Strategy<Value = String> {
    any::<String>()
}

fn hello() -> impl Strategy<Value = Hello> {
    (text(), vec(text(), 0..4), vec(text(), 0..4)).prop_map(|(software, capabilities, required)| Hello {
        software,
        capabilities,
        required,
    })
}

/// Any layout that can be written, most of them not valid.
pub(crate) fn any_layout() -> impl Strategy<Value = Layout> {
    let space = (any::<u16>(), select(&samples::SPACE_KINDS[..]), any::<u64>(), any::<u64>());
    let space = space.prop_map(|(id, kind, pages, guest_address)| Space {
        id: SpaceId(id),
        kind,
        pages,
        guest_address,
    });
    vec(space, 0..6).prop_map(|spaces| Layout { spaces })
}

pub(crate) fn downstream() -> impl Strategy<Value = Downstream> {
    let seed = (text(), checkpoint(), any::<[u8; 32]>()).prop_map(|(store, checkpoint, digest)| Seed {
        store,
        checkpoint,
        manifest: HexDigest(digest),
    });
    let offer = (
        migration(),
        select(&samples::WORKLOAD_KINDS[..]),
        text(),
        any_layout(),
        any::<(u16, u16)>(),
        option::of(seed),
    );
    let offer = offer.prop_map(|(migration, kind, name, layout, (page_streams, connections), seed)| Offer {
        migration,
        kind,
        name,
        layout,
        page_streams,
        connections,
        seed,
    });
    prop_oneof![
        hello().prop_map(Downstream::Hello),
        offer.prop_map(Downstream::Offer),
        any::<u32>().prop_map(|last_round| Downstream::State { last_round }),
        migration().prop_map(|migration| Downstream::Commit { migration }),
        migration().prop_map(|migration| Downstream::Done { migration }),
        text().prop_map(|reason| Downstream::Cancel { reason }),
        migration().prop_map(|migration| Downstream::Ask { migration }),
        any::<u32>().prop_map(|round| Downstream::RoundSent { round }),
        any::<u64>().prop_map(|pages| Downstream::Missing { pages }),
        migration().prop_map(|migration| Downstream::Recover { migration }),
        (migration(), any::<u16>())
            .prop_map(|(migration, connection)| Downstream::Join { migration, connection }),
        migration().prop_map(|migration| Downstream::Resume { migration }),
        any::<u64>().prop_map(|bytes| Downstream::Probe { bytes }),
        (any::<u32>(), any::<u64>()).prop_map(|(last_round, first)| Downstream::Verify { last_round, first }),
    ]
}

pub(crate) fn upstream() -> impl Strategy<Value = Upstream> {
    prop_oneof![
        hello().prop_map(Upstream::Hello),
        Just(Upstream::Accept),
        (select(&samples::REFUSE_CODES[..]), text())
            .prop_map(|(code, reason)| Upstream::Refuse { code, reason }),
        any::<u32>().prop_map(|round| Upstream::RoundDone { round }),
        Just(Upstream::Ready),
        migration().prop_map(|migration| Upstream::Started { migration }),
        (any::<u16>(), any::<u64>()).prop_map(|(space, page)| Upstream::Want { space, page }),
        any::<u64>().prop_map(|pages| Upstream::Missing { pages }),
        migration().prop_map(|migration| Upstream::Complete { migration }),
        migration().prop_map(|migration| Upstream::Incomplete { migration }),
        any::<u32>().prop_map(|round| Upstream::Resumed { round }),
        any::<u32>().prop_map(|round| Upstream::Anew { round }),
        any::<u64>().prop_map(|stripes| Upstream::Verified { stripes }),
        any::<u64>().prop_map(|pages| Upstream::Seeded { pages }),
        text().prop_map(|reason| Upstream::Failed { reason }),
        (any::<u64>(), any::<u64>()).prop_map(|(bytes, duration_us)| Upstream::Probed { bytes, duration_us }),
        (migration(), select(&samples::OUTCOMES[..]))
            .prop_map(|(migration, outcome)| Upstream::Outcome { migration, outcome }),
    ]
}

fn checkpoint() -> impl Strategy<Value = CheckpointId> {
    (any::<u64>(), any::<u32>()).prop_map(|(unix_s, random)| CheckpointId::new(unix_s, random))
}

pub(crate) fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        (any::<u16>(), select(&samples::ROLES[..]), text())
            .prop_map(|(version, role, client)| Request::Hello { version, role, client }),
        select(vec![
            Request::Status,
            Request::Describe,
            Request::Redirty,
            Request::TrackStop,
            Request::Freeze,
            Request::Save,
            Request::Terminate,
            Request::Load,
            Request::Discard,
            Request::Expect,
            Request::PageFaults,
            Request::Complete,
        ]),
        (any::<u16>(), any::<u64>(), any::<u64>()).prop_map(|(space, first, count)| Request::Take {
            space,
            first,
            count
        }),
        any::<bool>().prop_map(|keep| Request::TrackStart { keep }),
        any::<bool>().prop_map(|sparse| Request::Harvest { sparse }),
        option::of(checkpoint()).prop_map(|checkpoint| Request::Baseline { checkpoint }),
        any::<u8>().prop_map(|percent| Request::Throttle { percent }),
        (migration(), text()).prop_map(|(migration, peer)| Request::Pledge { migration, peer }),
        option::of(migration()).prop_map(|migration| Request::Resume { migration }),
        migration().prop_map(|migration| Request::HandOver { migration }),
        (text(), any_layout()).prop_map(|(name, layout)| Request::Prepare { name, layout }),
        migration().prop_map(|migration| Request::Start { migration }),
        vec(text(), 0..4).prop_map(|disks| Request::CopyDisks { disks }),
    ]
}

fn status() -> impl Strategy<Value = Status> {
    let numbers = (any::<u32>(), any::<u64>(), any::<u32>(), any::<u64>());
    let pledge = (migration(), text()).prop_map(|(migration, peer)| Pledge { migration, peer });
    let options = (option::of(any::<u32>()), option::of(text()), option::of(migration()), option::of(pledge));
    let options = (options, option::of(any::<u64>()), option::of(any::<u8>()), option::of(checkpoint()));
    (text(), select(&samples::PHASES[..]), numbers, text(), options).prop_map(
        |(name, phase, (pid, memory_bytes, vcpus, uptime_ms), serial, options)| {
            let ((holder_pid, holder, arrived_by, pledged_to), awaiting_pages, throttle_percent, baseline) =
                options;
            Status {
                name,
                phase,
                pid,
                memory_bytes,
                vcpus,
                uptime_ms,
                serial,
                holder_pid,
                holder,
                arrived_by,
                pledged_to,
                awaiting_pages,
                throttle_percent,
                baseline,
            }
        },
    )
}

pub(crate) fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        (any::<u16>(), text(), status()).prop_map(|(version, software, status)| Reply::Welcome {
            version,
            software,
            status
        }),
        (text(), option::of(any::<u32>()))
            .prop_map(|(reason, holder_pid)| Reply::Refused { reason, holder_pid }),
        status().prop_map(Reply::Status),
        (text(), any_layout(), any::<bool>()).prop_map(|(name, layout, can_copy_disks)| Reply::Description {
            name,
            layout,
            can_copy_disks
        }),
        (select(&samples::TRACKING_MODES[..]), option::of(checkpoint()), any::<bool>())
            .prop_map(|(mode, baseline, can_keep)| Reply::Tracking { mode, baseline, can_keep }),
        any::<(u64, bool)>().prop_map(|(pages, sparse)| Reply::Dirty { pages, sparse }),
        Just(Reply::Saved),
        (any::<u64>(), vec(any::<u64>(), 0..4))
            .prop_map(|(pages, addresses)| Reply::PageFaults { pages, addresses }),
        Just(Reply::Done),
        (select(&samples::ERROR_CODES[..]), text())
            .prop_map(|(code, message)| Reply::Error { code, message }),
    ]
}

fn limits() -> impl Strategy<Value = steer::Limits> {
    let numbers = (option::of(any::<u64>()), option::of(any::<u64>()), option::of(any::<u64>()));
    let words = (option::of(text()), option::of(vec(text(), 0..4)));
    let small = (option::of(any::<u32>()), option::of(any::<u8>()), option::of(any::<u64>()));
    (numbers, words, small).prop_map(|(numbers, (on_timeout, on_stall), small)| steer::Limits {
        downtime_us: numbers.0,
        max_downtime_us: numbers.1,
        max_rounds: small.0,
        timeout_us: numbers.2,
        on_timeout,
        on_stall,
        max_throttle_percent: small.1,
        post_copy_after: small.0,
        bandwidth_bytes_per_s: small.2,
    })
}

pub(crate) fn order() -> impl Strategy<Value = Order> {
    prop_oneof![
        Just(Order::Status),
        any::<u64>().prop_map(|limit_ms| Order::Await { limit_ms }),
        Just(Order::Cancel),
        limits().prop_map(Order::Set),
    ]
}

pub(crate) fn answer() -> impl Strategy<Value = Answer> {
    let who = (text(), any::<u32>(), select(&samples::STEER_ENDS[..]), migration(), text(), text());
    let how = (text(), any::<bool>(), option::of(select(&samples::STEER_OUTCOMES[..])), option::of(text()));
    let counts = any::<[u64; 6]>();
    let maybe = (option::of(any::<u64>()), option::of(any::<u64>()), option::of(any::<u8>()));
    let status = (who, how, counts, maybe, limits()).prop_map(|(who, how, counts, maybe, limits)| {
        Answer::Status(Box::new(steer::Status {
            software: who.0,
            pid: who.1,
            end: who.2,
            migration: who.3,
            workload: who.4,
            peer: who.5,
            phase: how.0,
            cancellable: how.1,
            outcome: how.2,
            reason: how.3,
            elapsed_us: counts[0],
            memory_bytes: counts[1],
            round: counts[2] as u32,
            dirty_pages: counts[3],
            done_pages: counts[4],
            moved_bytes: counts[5],
            rate_bytes_per_s: counts[0] ^ counts[1],
            dirty_bytes_per_s: maybe.0,
            predicted_downtime_us: maybe.1,
            throttle_percent: maybe.2,
            eta_us: maybe.0,
            limits,
        }))
    });
    let last = option::of((any::<[u64; 4]>(), any::<[u32; 2]>())).prop_map(|last| {
        last.map(|(numbers, small)| steer::LastCheckpoint {
            id: CheckpointId::new(numbers[0], small[0]),
            durable_unix_ms: numbers[1],
            deltas: small[1],
            pause_us: numbers[2],
            stored_bytes: numbers[3],
        })
    });
    let who = ((text(), any::<u32>(), text(), text()), (text(), any::<bool>(), option::of(text())));
    let times = (option::of(any::<u64>()), option::of(any::<u64>()));
    let series = (who, any::<[u64; 5]>(), times, last).prop_map(|((who, how), counts, times, last)| {
        Answer::Series(Box::new(steer::Series {
            software: who.0,
            pid: who.1,
            workload: who.2,
            store: who.3,
            phase: how.0,
            ended: how.1,
            elapsed_us: counts[0],
            interval_us: times.0,
            next_us: times.1,
            taken: counts[1],
            failed: counts[2],
            missed: counts[3],
            stored_bytes: counts[4],
            last,
            failure: how.2,
        }))
    });
    prop_oneof![
        status,
        series,
        Just(Answer::Done),
        (select(&samples::STEER_ERROR_CODES[..]), text())
            .prop_map(|(code, message)| Answer::Error { code, message }),
    ]
}

/// Any state that can be encoded.
pub(crate) fn state() -> impl Strategy<Value = State> {
    vec(("[!-~]{1,40}", any::<u16>(), vec(any::<u8>(), 0..200)), 0..12).prop_map(|sections| {
        let mut names = std::collections::HashSet::new();
        let sections = sections
            .into_iter()
            .filter(|(name, ..)| names.insert(name.clone()))
            .map(|(name, version, body)| Section { name, version, body })
            .collect();
        State { sections }
    })
}

const ENCODINGS: [Encoding; 6] =
    [Encoding::Zero, Encoding::Raw, Encoding::Zstd, Encoding::Lz4, Encoding::Delta, Encoding::Known];

/// Any frame that can be sent, with its payload.
pub(crate) fn frame() -> impl Strategy<Value = (Frame, Vec<u8>)> {
    let stripes = MAX_SPACE_PAGES / STRIPE_PAGES;
    let place = (0..stripes, 0..STRIPE_PAGES, 1..=MAX_FRAME_PAGES);
    let pages = (any::<u16>(), place, select(&ENCODINGS[..]), any::<u32>(), any::<u64>());
    let pages = pages.prop_map(|(space, (stripe, offset, count), encoding, round, seed)| {
        let zero = encoding == Encoding::Zero;
        let count = count.min((STRIPE_PAGES - offset) as u32);
        // Payloads of a few pages are enough to find what there is to find.
        let count = if zero { count } else { count.min(3) };
        let run = PageRun { space: SpaceId(space), first: stripe * STRIPE_PAGES + offset, count };
        let bytes = match encoding {
            Encoding::Zero => 0,
            Encoding::Raw => run.bytes(),
            Encoding::Zstd | Encoding::Lz4 => 1 + seed as usize % (run.bytes() - 1),
            Encoding::Delta => DELTA_SUM_BYTES + 1 + seed as usize % (run.bytes() - DELTA_SUM_BYTES - 1),
            Encoding::Known => run.count as usize * KNOWN_PAGE_BYTES,
        };
        let payload: Vec<u8> =
            (0..bytes as u64).map(|i| (seed.rotate_left((i % 64) as u32) ^ i) as u8).collect();
        (Frame::Pages { run, encoding, payload_bytes: bytes as u32, round }, payload)
    });
    prop_oneof![
        3 => pages,
        1 => any::<u32>().prop_map(|round| (Frame::RoundEnd { round }, Vec::new())),
    ]
}

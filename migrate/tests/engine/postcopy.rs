//! Workloads that start before their last pages are there. The guest at the destination touches pages in an order that
//! follows from the migration's id, while others follow, and must see exactly the bytes of the freeze.

use crate::harness::{Ended, SECOND, World, desk, layout, receiving, sending};
use crate::hostile::{Peer, page, preamble};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::error::{Error, Result};
use migrate::inbound;
use migrate::link::duplex::{Cut, Direction, Network, Profile};
use migrate::outbound;
use migrate::report::{Event, Observer, Phase, PostCopyReport, Quiet};
use migrate::source::scripted::{Call, Who};
use migrate::source::{Completed, Donor};
use proptest::prelude::*;
use protocol::MigrationId;
use protocol::control::{Downstream, Outcome, Upstream};
use protocol::frame::Frame;
use protocol::handshake::Hello;
use protocol::layout::Layout;
use protocol::page::{PAGE_SIZE, PageRun, PageSet};
use protocol::sparse;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// To post-copy behind the first round, whatever the link does.
fn post_copy() -> outbound::Options {
    let options = sending();
    options.controls.change(|limits| {
        limits.post_copy_after = Some(1);
        limits.downtime = Duration::from_nanos(1);
    });
    options
}

/// A workload that dirties enough for some to be missing.
fn busy(seed: u64) -> World {
    World::new(seed, 40)
}

fn report(ended: &Ended) -> PostCopyReport {
    ended.sent.as_ref().unwrap().post_copy.expect("it went by post-copy")
}

fn assert_moved(world: &World, ended: &Ended) {
    world.assert_moved(ended);
    assert!(!world.witness.saw_wrong_bytes());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn what_the_guest_sees_is_what_was_frozen(
        seed in any::<u64>(),
        latency_us in prop_oneof![Just(0u64), Just(300)],
        bytes_per_s in prop_oneof![Just(0u64), Just(20_000_000)],
    ) {
        let world = busy(seed);
        let profile = Profile {
            latency: Duration::from_micros(latency_us),
            bytes_per_s,
            seed,
            ..Profile::default()
        };
        let network = Network::new(profile, None);
        let ended = world.attempt(&network, None, &post_copy(), &CancelFlag::default(), &mut Quiet);
        assert_moved(&world, &ended);
        let report = report(&ended);
        prop_assert!(report.missing_pages > 0);
        prop_assert_eq!(report.asked_pages + report.prefetched_pages + report.pushed_pages, report.missing_pages);
        let arrived = ended.received.last().unwrap().as_ref().unwrap().post_copy.unwrap();
        prop_assert_eq!(arrived.received_pages, report.missing_pages);
    }

    #[test]
    fn a_cut_anywhere_is_recovered_or_leaves_the_source(
        seed in any::<u64>(),
        cuts in proptest::collection::vec(any_cut(), 1..4),
    ) {
        let world = busy(seed);
        let profile = Profile { latency: Duration::from_micros(200), seed, ..Profile::default() };
        let network = Network::new(profile, cuts.into_iter().map(Some));
        let ended = world.attempt(&network, None, &post_copy(), &CancelFlag::default(), &mut Quiet);
        match &ended.sent {
            Ok(_) => assert_moved(&world, &ended),
            Err(failed) => {
                prop_assert!(!matches!(failed.error.root(), Error::InDoubt(_)), "{failed}");
                prop_assert!(!world.witness.saw_wrong_bytes());
                world.assert_stayed_and_moves_next(&ended);
            }
        }
    }

    #[test]
    fn a_cable_pulled_at_any_page_that_follows_is_recovered(
        seed in any::<u64>(),
        pulls in proptest::collection::btree_set(0u32..12, 1..4),
    ) {
        let world = busy(seed);
        let network = Network::new(Profile { latency: Duration::from_micros(300), ..Profile::default() }, None);
        let cable = network.clone();
        world.machine.on_call(move |now, count| {
            if now == Call::Donate && pulls.contains(&count) {
                cable.cut();
            }
            Ok(())
        });
        let ended = world.attempt(&network, None, &post_copy(), &CancelFlag::default(), &mut Quiet);
        assert_moved(&world, &ended);
    }
}

fn any_cut() -> impl Strategy<Value = Cut> {
    use Direction::{Down, Up};
    prop_oneof![
        (0u64..8_000_000).prop_map(|bytes| Cut::Bytes(Down, bytes)),
        (0u64..3_000).prop_map(|bytes| Cut::Bytes(Up, bytes)),
        (4u32..9).prop_map(|message| Cut::Before(Down, message)),
        (4u32..9).prop_map(|message| Cut::After(Down, message)),
        (3u32..30).prop_map(|message| Cut::Before(Up, message)),
        (3u32..30).prop_map(|message| Cut::After(Up, message)),
    ]
}

/// Does something when a phase begins.
struct At<F: FnMut()>(Phase, F);

impl<F: FnMut()> Observer for At<F> {
    fn event(&mut self, event: &Event) {
        if *event == (Event::Phase { phase: self.0 }) {
            (self.1)();
        }
    }
}

#[test]
fn a_sender_that_gives_up_leaves_a_donor_that_goes_on_later() {
    let world = busy(9);
    let network = Network::new(Profile::default(), None);
    let mut options = post_copy();
    options.ask = SECOND / 5;
    let unplugged = network.clone();
    world.machine.on_call(move |call, _| {
        if call == Call::Donate {
            unplugged.set_reachable(false);
            unplugged.cut();
        }
        Ok(())
    });
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let desk = desk(&network, &world.ledger);
            let offered = loop {
                if let Some(offered) = desk.next_offer(SECOND).unwrap() {
                    break offered;
                }
            };
            let place = place::Scripted::at(world.site.clone(), world.witness.clone(), None);
            inbound::receive(offered, &desk, place, &receiving(), &CancelFlag::default(), &mut Quiet)
        });
        let failed = outbound::send(
            world.machine.attach(),
            network.dial().unwrap(),
            &mut || network.dial(),
            &options,
            &CancelFlag::default(),
            &mut Quiet,
        )
        .unwrap_err();
        assert!(matches!(failed.error, Error::InDoubt(_)), "{failed}");
        assert!(failed.to_string().contains("migrate recover scripted"), "{failed}");
        assert!(world.machine.is_pledged() && world.witness.is_running(Who::Destination));
        assert!(!world.witness.is_running(Who::Source));

        // The operator goes on once the network is back.
        world.machine.heal();
        network.set_reachable(true);
        let donor = world.machine.donor(options.migration);
        let dial = &mut || network.dial();
        let cancel = CancelFlag::default();
        outbound::donate(donor, "there", dial, &options, &cancel, &mut Quiet).unwrap();
        receiver.join().unwrap().unwrap();
    });
    assert!(world.machine.is_gone() && !world.witness.is_running(Who::Source));
    assert!(world.witness.memory_arrived() && !world.witness.saw_wrong_bytes());
}

#[test]
fn the_first_interrupt_is_answered_and_the_second_leaves_the_donor() {
    for interrupts in [1, 2] {
        let world = busy(5);
        let network = Network::new(Profile { bytes_per_s: 4_000_000, ..Profile::default() }, None);
        let cancel = CancelFlag::default();
        let operator = cancel.for_one();
        let mut left = interrupts;
        world.machine.on_call(move |call, count| {
            // Long enough after each other that both are seen.
            if call == Call::Donate && count % 2 == 0 && left > 0 {
                left -= 1;
                operator.set_all();
                std::thread::sleep(Duration::from_millis(120));
            }
            Ok(())
        });
        if interrupts == 1 {
            let ended = world.attempt(&network, None, &post_copy(), &cancel, &mut Quiet);
            assert_moved(&world, &ended);
            continue;
        }
        std::thread::scope(|scope| {
            let options = post_copy();
            scope.spawn(|| {
                let desk = desk(&network, &world.ledger);
                let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
                let place = place::Scripted::at(world.site.clone(), world.witness.clone(), None);
                inbound::receive(offered, &desk, place, &receiving(), &CancelFlag::default(), &mut Quiet)
                    .unwrap();
            });
            let link = network.dial().unwrap();
            let dial = &mut || network.dial();
            let failed = outbound::send(world.machine.attach(), link, dial, &options, &cancel, &mut Quiet)
                .unwrap_err();
            assert!(failed.to_string().contains("interrupted"), "{failed}");
            assert!(world.machine.is_pledged());
            let donor = world.machine.donor(options.migration);
            world.machine.heal();
            outbound::donate(donor, "there", dial, &options, &CancelFlag::default(), &mut Quiet).unwrap();
        });
        assert!(world.machine.is_gone() && world.witness.memory_arrived());
    }
}

#[test]
fn a_destination_that_cannot_wait_for_pages_leaves_the_workload_at_the_source() {
    let world = busy(3);
    let network = Network::new(Profile::default(), None);
    let fails = Some(place::Call::Expect);
    let ended = world.attempt(&network, fails, &post_copy(), &CancelFlag::default(), &mut Quiet);
    assert!(matches!(ended.error(), Error::PeerFailed { .. }), "{}", ended.error());
    assert!(ended.error().to_string().contains("Expect fails"), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn a_cut_at_commit_finds_its_way_to_the_missing_pages() {
    let world = busy(21);
    let network = Network::new(Profile::default(), None);
    let cable = network.clone();
    // Commit is on its way or not: whatever was decided is found out, and gone through with.
    let mut observer = At(Phase::Commit, move || cable.cut());
    let ended = world.attempt(&network, None, &post_copy(), &CancelFlag::default(), &mut observer);
    match &ended.sent {
        Ok(_) => assert_moved(&world, &ended),
        Err(_) => world.assert_stayed_and_moves_next(&ended),
    }
}

/// Memory to be given away that belongs to nobody: page *n* is full of its number.
struct Pages {
    layout: Layout,
    finished: Arc<AtomicBool>,
}

impl Donor for Pages {
    fn name(&self) -> &'static str {
        "pages"
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn read(&self, run: PageRun, buffer: &mut [u8]) -> Result<()> {
        for (page, bytes) in (run.first..).zip(buffer.chunks_mut(PAGE_SIZE)) {
            bytes.fill(page as u8);
        }
        Ok(())
    }

    fn finish(self: Box<Self>, _: Completed) -> Result<()> {
        self.finished.store(true, Ordering::Release);
        Ok(())
    }
}

const OURS: MigrationId = MigrationId(99);

/// Gives pages to a destination that does as it likes, on every connection; answers the error, if there is one, and
/// whether the memory was let go.
fn donate_to(destination: impl Fn(&mut Peer) + Sync) -> (Result<PostCopyReport>, bool) {
    let network = Network::new(Profile::default(), None);
    let finished = Arc::new(AtomicBool::new(false));
    let donor = Box::new(Pages { layout: layout(), finished: finished.clone() });
    let over = AtomicBool::new(false);
    let result = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Acquire) {
                let Ok(link) = network.accept(SECOND / 50) else { continue };
                let mut peer = Peer(link);
                peer.greet(&Upstream::Hello(Hello::ours())).skip_preamble();
                assert!(matches!(peer.hear(), Some(Downstream::Hello(_))));
                assert!(matches!(peer.hear(), Some(Downstream::Ask { migration: OURS })));
                destination(&mut peer);
            }
        });
        let options = outbound::Options { ask: SECOND / 5, stall: SECOND, ..outbound::Options::new(OURS) };
        let dial = &mut || network.dial();
        let report = outbound::donate(donor, "there", dial, &options, &CancelFlag::default(), &mut Quiet);
        over.store(true, Ordering::Release);
        report
    });
    (result, finished.load(Ordering::Acquire))
}

/// A destination up to its word of what is missing: the first hundred pages.
fn missing(peer: &mut Peer) {
    peer.say(&Upstream::Incomplete { migration: OURS }, &[]);
    assert!(matches!(peer.hear(), Some(Downstream::Recover { migration: OURS })));
    let mut sets: Vec<_> = layout().spaces.iter().map(|space| PageSet::empty(space.pages)).collect();
    sets[0].insert(0, 100);
    peer.say(&Upstream::Missing { pages: 100 }, &sparse::encode(&sets));
}

/// Reads both page streams to their end, in threads of their own.
fn swallow(peer: &mut Peer) {
    for _ in 0..2 {
        let Ok(mut stream) = peer.0.accept_page_stream(SECOND) else { return };
        std::thread::spawn(move || while let Ok(Some(_)) = stream.read() {});
    }
}

#[test]
fn memory_is_let_go_only_at_the_destinations_word_that_nothing_is_missing() {
    let (report, finished) = donate_to(|peer| {
        missing(peer);
        swallow(peer);
        peer.say(&Upstream::Want { space: 0, page: 50 }, &[]);
        peer.say(&Upstream::Complete { migration: OURS }, &[]);
        assert!(matches!(peer.hear(), Some(Downstream::Done { migration: OURS })));
    });
    assert!(finished && report.is_ok());
    let (report, finished) = donate_to(|peer| {
        let outcome = Outcome::Started;
        peer.say(&Upstream::Outcome { migration: OURS, outcome }, &[]);
        assert!(matches!(peer.hear(), Some(Downstream::Done { migration: OURS })));
    });
    assert!(finished && report.is_ok());
}

#[test]
fn a_destination_that_breaks_the_protocol_leaves_the_memory_where_it_is() {
    type Course = fn(&mut Peer);
    let courses: [(&str, Course); 9] = [
        ("a page outside the layout", |peer| {
            missing(peer);
            swallow(peer);
            peer.say(&Upstream::Want { space: 0, page: u64::MAX }, &[]);
        }),
        ("a space that is none", |peer| {
            missing(peer);
            swallow(peer);
            peer.say(&Upstream::Want { space: 7, page: 0 }, &[]);
        }),
        ("another migration", |peer| {
            missing(peer);
            peer.say(&Upstream::Complete { migration: MigrationId(1) }, &[]);
        }),
        ("a word that is not due", |peer| {
            missing(peer);
            peer.say(&Upstream::Ready, &[]);
        }),
        ("the workload is gone", |peer| {
            missing(peer);
            peer.say(&Upstream::Failed { reason: "it crashed".into() }, &[]);
        }),
        ("it was never started", |peer| {
            let outcome = Outcome::Discarded;
            peer.say(&Upstream::Outcome { migration: OURS, outcome }, &[]);
        }),
        ("it is not known", |peer| {
            let outcome = Outcome::Unknown;
            peer.say(&Upstream::Outcome { migration: OURS, outcome }, &[]);
        }),
        ("sets that are none", |peer| {
            peer.say(&Upstream::Incomplete { migration: OURS }, &[]);
            peer.say(&Upstream::Missing { pages: 1 }, &[0xff; 40]);
        }),
        ("a number that is not theirs", |peer| {
            peer.say(&Upstream::Incomplete { migration: OURS }, &[]);
            peer.say(&Upstream::Missing { pages: 1 }, &[]);
        }),
    ];
    for (name, course) in courses {
        let (report, finished) = donate_to(course);
        let error = report.unwrap_err();
        assert!(matches!(error, Error::InDoubt(_)), "{name}: {error}");
        assert!(error.to_string().contains("migrate recover pages"), "{name}: {error}");
        assert!(!finished, "{name}");
    }
}

#[test]
fn wanting_without_end_costs_the_source_nothing_more() {
    let (report, finished) = donate_to(|peer| {
        missing(peer);
        swallow(peer);
        for round in 0..50 {
            for page in 0..200 {
                peer.say(&Upstream::Want { space: 0, page: (page * 7 + round) % 1100 }, &[]);
            }
        }
        peer.say(&Upstream::Complete { migration: OURS }, &[]);
        assert!(matches!(peer.hear(), Some(Downstream::Done { .. })));
    });
    let report = report.unwrap();
    assert!(finished);
    assert_eq!(report.asked_pages + report.prefetched_pages + report.pushed_pages, 100);
}

#[test]
fn pages_that_were_not_missing_or_are_damaged_never_reach_a_running_guest() {
    type Bad = fn(u64, u64) -> Vec<u8>;
    let bad: [(&str, Bad); 6] = [
        ("not missing", |_, there| page(there, 0)),
        ("outside the layout", |_, _| page(5000, 0)),
        ("damaged", |missing, _| {
            let mut bytes = page(missing, 0);
            bytes[1000] ^= 1;
            bytes
        }),
        ("cut short", |missing, _| page(missing, 0)[..2000].to_vec()),
        ("a round's end", |_, _| Frame::RoundEnd { round: 0 }.encode(&[]).to_vec()),
        ("garbage", |_, _| vec![0xee; 64]),
    ];
    for (name, bad) in bad {
        let world = World::new(31, 3);
        // A good sender, whose link is spoilt by a bad one that comes first: the guest must see nothing of it.
        let network = Network::new(Profile::default(), None);
        let bad_sender = network.clone();
        let spoilt = Arc::new(AtomicBool::new(false));
        let done = spoilt.clone();
        let options = post_copy();
        let migration = options.migration;
        world.machine.on_call(move |call, _| {
            if call != Call::Donate || done.swap(true, Ordering::AcqRel) {
                return Ok(());
            }
            let mut peer = Peer(bad_sender.dial().unwrap());
            peer.greet(&Downstream::Hello(Hello::ours())).skip_preamble();
            assert!(matches!(peer.hear(), Some(Upstream::Hello(_))));
            peer.say(&Downstream::Ask { migration }, &[]);
            assert!(matches!(peer.hear(), Some(Upstream::Incomplete { .. })));
            peer.say(&Downstream::Recover { migration }, &[]);
            let Some((Upstream::Missing { .. }, sets)) = peer.hear_blob() else {
                panic!("nothing is missing")
            };
            let missing = sparse::decode(&layout(), &sets).unwrap().remove(0);
            let bytes = bad(missing.next_set(0).unwrap(), missing.next_clear(0));
            for number in 0..2 {
                let mut stream = peer.0.open_page_stream().unwrap();
                let _ = stream.write(&mut [[preamble(number), bytes.clone()].concat().into()]);
            }
            peer.stay();
            Ok(())
        });
        let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
        assert!(spoilt.load(Ordering::Acquire), "{name}");
        assert_moved(&world, &ended);
        assert!(report(&ended).lost_links > 0, "{name}: the bad sender took the link");
    }
}

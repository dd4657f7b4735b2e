//! Page streams over several connections: the same bytes arrive, and losing one of them is losing the link.

use crate::harness::{SECOND, World, desk_at, receiving, sending};
use crate::hostile::{Peer, end, offer, page, preamble};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::destination::{Destination, Incomplete, PageMemory, Refusal};
use migrate::error::{Error, Result};
use migrate::identity::Fingerprint;
use migrate::inbound;
use migrate::link::duplex::{Cut, Direction, Network, Profile};
use migrate::outbound;
use migrate::report::{Connections, Quiet};
use migrate::source::scripted::Witness;
use proptest::prelude::*;
use protocol::MigrationId;
use protocol::control::{Downstream, Offer, RefuseCode, Upstream};
use protocol::handshake::Hello;
use protocol::page::PageSet;
use std::sync::{Arc, mpsc};
use std::time::Duration;

const ALICE: Fingerprint = Fingerprint::from_digest([1; 32]);
const BOB: Fingerprint = Fingerprint::from_digest([2; 32]);

fn over(number: u16, page_streams: u16) -> outbound::Options {
    let connections = Connections { number, reason: "the test says so".into() };
    outbound::Options { connections, page_streams, ..sending() }
}

fn attempt(world: &World, network: &Network, options: &outbound::Options) -> crate::harness::Ended {
    let keep = if options.retry.is_zero() { Duration::ZERO } else { 20 * SECOND };
    let receiving = inbound::Options { keep, ..receiving() };
    let cancel = CancelFlag::default();
    world.attempt_with(network, None, &receiving, options, &cancel, &mut Quiet, &mut Quiet)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn the_same_bytes_arrive_over_several_connections(
        seed in any::<u64>(),
        connections in 2u16..=4,
        more_streams in 0u16..=4,
        pages_per_call in 0u64..4,
        latency_us in 0u64..500,
    ) {
        let world = World::new(seed, pages_per_call);
        let profile = Profile { latency: Duration::from_micros(latency_us), seed, ..Profile::default() };
        let network = Network::new(profile, None);
        let ended = attempt(&world, &network, &over(connections, connections + more_streams));
        world.assert_moved(&ended);
        prop_assert_eq!(network.dialled(), usize::from(connections));
        prop_assert_eq!(ended.sent.unwrap().connections.number, connections);
    }

    #[test]
    fn whichever_connection_is_lost_the_rounds_go_on_or_the_workload_stays(
        seed in any::<u64>(),
        connections in 2u16..=3,
        lost in 0usize..5,
        at in prop_oneof![1 => 0u64..1_500, 4 => 1_000u64..800_000],
        retry in prop_oneof![1 => Just(Duration::ZERO), 3 => Just(20 * SECOND)],
        pages_per_call in 0u64..4,
    ) {
        let world = World::new(seed, pages_per_call);
        let mut cuts = vec![None; lost];
        cuts.push(Some(Cut::Bytes(Direction::Down, at)));
        let network = Network::new(Profile::default(), cuts);
        let options = outbound::Options { retry, ..over(connections, 4) };
        let ended = attempt(&world, &network, &options);
        match &ended.sent {
            Ok(_) => world.assert_moved(&ended),
            Err(failed) => {
                prop_assert!(matches!(
                    failed.error.root(),
                    Error::Link(_)
                        | Error::PeerFailed { .. }
                        | Error::Refused { code: RefuseCode::NoSuchMigration, .. }
                ), "{failed}");
                world.assert_stayed_and_moves_next(&ended);
            }
        }
    }
}

#[test]
fn a_second_connection_that_is_lost_leads_back_into_the_rounds_over_new_ones() {
    let world = World::new(7, 2);
    // The greeting and `join` are below a thousand bytes, the pages of its streams far above.
    let network = Network::new(Profile::default(), [None, Some(Cut::Bytes(Direction::Down, 300_000))]);
    let options = outbound::Options { retry: 20 * SECOND, ..over(2, 2) };
    let ended = attempt(&world, &network, &options);
    world.assert_moved(&ended);
    assert_eq!(ended.sent.unwrap().resumes, 1);
    assert_eq!(network.dialled(), 4, "all connections are made anew");

    let world = World::new(7, 2);
    let network = Network::new(Profile::default(), [None, Some(Cut::Bytes(Direction::Down, 300_000))]);
    let ended = attempt(&world, &network, &over(2, 2));
    assert!(matches!(ended.error(), Error::Link(_)), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn numbers_that_cannot_be_are_refused_at_the_source() {
    for (connections, streams) in [(0, 2), (3, 2), (9, 16)] {
        let world = World::new(1, 1);
        let ended = attempt(&world, &Network::new(Profile::default(), None), &over(connections, streams));
        assert!(matches!(ended.error(), Error::Usage(_)), "{}", ended.error());
        world.assert_stayed_and_moves_next(&ended);
    }
}

#[test]
fn a_destination_of_an_older_release_is_offered_one() {
    let network = Network::new(Profile::default(), None);
    let world = World::new(1, 1);
    std::thread::scope(|scope| {
        let old = scope.spawn(|| {
            let mut peer = Peer(network.accept(5 * SECOND).unwrap());
            let mut hello = Hello::ours();
            hello.capabilities.retain(|name| name != "connections");
            peer.greet(&Upstream::Hello(hello)).skip_preamble();
            assert!(matches!(peer.hear(), Some(Downstream::Hello(_))));
            let offer = peer.hear();
            assert!(matches!(&offer, Some(Downstream::Offer(Offer { connections: 1, .. }))), "{offer:?}");
        });
        let dial = &mut || network.dial();
        let link = dial().unwrap();
        let machine = world.machine.attach();
        let sent = outbound::send(machine, link, dial, &over(2, 2), &CancelFlag::default(), &mut Quiet);
        old.join().unwrap();
        let connections = sent.unwrap_err().report.connections;
        assert!(connections.number == 1 && connections.reason.contains("release"), "{connections:?}");
    });
}

/// A sender that offers two connections, and its first one.
fn offering(network: &Network) -> Peer {
    let mut first = Peer(network.dial_as(ALICE).unwrap());
    first.offer(Offer { connections: 2, ..offer() });
    first
}

/// What the answer to a first word is.
fn answer(network: &Network, who: Fingerprint, hello: Hello, word: &Downstream) -> (Peer, Option<Upstream>) {
    let mut peer = Peer(network.dial_as(who).unwrap());
    peer.greet(&Downstream::Hello(hello)).say(word, &[]).skip_preamble();
    assert!(matches!(peer.hear(), Some(Upstream::Hello(_))));
    let answer = peer.hear();
    (peer, answer)
}

fn join(connection: u16) -> Downstream {
    Downstream::Join { migration: offer().migration, connection }
}

fn assert_refused((_, answer): (Peer, Option<Upstream>), expected: RefuseCode) {
    assert!(matches!(&answer, Some(Upstream::Refuse { code, .. }) if *code == expected), "{answer:?}");
}

/// Runs a receiver against a hostile sender; the error that it ends with.
fn serve(network: &Network, destination: Box<dyn Destination + Send>, sender: impl FnOnce()) -> Error {
    let accepting = network.clone();
    let desk = &desk_at(Box::new(move |limit| accepting.accept(limit)), &Arc::default(), Box::new(|_| {}));
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
            let options = inbound::Options { idle: 2 * SECOND, ..receiving() };
            inbound::receive(offered, desk, destination, &options, &CancelFlag::default(), &mut Quiet)
        });
        sender();
        served.join().unwrap().unwrap_err()
    })
}

fn somewhere() -> Box<place::Scripted> {
    place::Scripted::new(Witness::default(), None)
}

/// A destination that makes room for as long as somebody holds the other end, and says when it begins.
struct Waiting(Box<place::Scripted>, mpsc::Receiver<()>, mpsc::Sender<()>);

impl Destination for Waiting {
    fn prepare(&mut self, offer: &Offer, machine: &[u8]) -> std::result::Result<(), Refusal> {
        let _ = self.2.send(());
        let _ = self.1.recv();
        self.0.prepare(offer, machine)
    }

    fn memory(&self) -> Arc<dyn PageMemory> {
        self.0.memory()
    }

    fn load(&mut self, state: &[u8]) -> Result<()> {
        self.0.load(state)
    }

    fn start(self: Box<Self>, migration: MigrationId) -> Result<String> {
        self.0.start(migration)
    }

    fn expect(&mut self, missing: &[PageSet]) -> Result<()> {
        self.0.expect(missing)
    }

    fn start_incomplete(self: Box<Self>, migration: MigrationId) -> Result<Arc<dyn Incomplete>> {
        self.0.start_incomplete(migration)
    }

    fn take_up(&self, migration: MigrationId) -> Result<Option<Arc<dyn Incomplete>>> {
        self.0.take_up(migration)
    }

    fn discard(self: Box<Self>) {
        self.0.discard();
    }
}

#[test]
fn who_joins_before_the_offer_is_accepted_is_refused() {
    let network = Network::new(Profile::default(), None);
    let (hold, held) = mpsc::channel();
    let (begins, begun) = mpsc::channel();
    let error = serve(&network, Box::new(Waiting(somewhere(), held, begins)), || {
        let mut first = offering(&network);
        // Before the offer is looked at there is no such migration.
        begun.recv_timeout(Duration::from_secs(10)).unwrap();
        let mut early = Peer(network.dial_as(ALICE).unwrap());
        early.greet(&Downstream::Hello(Hello::ours())).say(&join(1), &[]).skip_preamble();
        assert!(matches!(early.hear(), Some(Upstream::Hello(_))));
        // Until then nobody looks.
        assert_eq!(early.hear::<Upstream>(), None);
        drop(hold);
        let word = early.hear();
        assert_refused((early, word), RefuseCode::BadOffer);
        assert_eq!(first.hear(), Some(Upstream::Accept));
        first.say(&Downstream::Cancel { reason: "enough".into() }, &[]).stay();
    });
    assert!(matches!(error.root(), Error::PeerFailed { .. }), "{error}");
}

#[test]
fn pages_that_follow_are_on_the_first_connection() {
    let world = World::new(11, 40);
    let options = over(3, 3);
    options.controls.change(|limits| {
        limits.post_copy_after = Some(1);
        limits.downtime = Duration::from_nanos(1);
    });
    let network = Network::new(Profile::default(), None);
    let ended = attempt(&world, &network, &options);
    world.assert_moved(&ended);
    assert!(!world.witness.saw_wrong_bytes());
    assert!(ended.sent.unwrap().post_copy.unwrap().missing_pages > 0);
    assert_eq!(network.dialled(), 3);
}

#[test]
fn further_connections_are_taken_once_each_and_from_nobody_else() {
    let network = Network::new(Profile::default(), None);
    let error = serve(&network, somewhere(), || {
        let mut first = offering(&network);
        assert_eq!(first.hear(), Some(Upstream::Accept));
        for number in [0, 2, u16::MAX] {
            assert_refused(answer(&network, ALICE, Hello::ours(), &join(number)), RefuseCode::BadOffer);
        }
        let elsewhere = Downstream::Join { migration: MigrationId(5), connection: 1 };
        for (who, word) in [(BOB, &join(1)), (ALICE, &elsewhere)] {
            assert_refused(answer(&network, who, Hello::ours(), word), RefuseCode::NoSuchMigration);
        }
        let plain = Hello { capabilities: vec![], ..Hello::ours() };
        assert_refused(answer(&network, ALICE, plain, &join(1)), RefuseCode::BadOffer);
        // All of that changed nothing.
        let (mut second, heard) = answer(&network, ALICE, Hello::ours(), &join(1));
        assert_eq!(heard, Some(Upstream::Accept));
        let _streams = (first.stream(&[&preamble(0), &end(0)]), second.stream(&[&preamble(1), &end(0)]));
        first.say(&Downstream::RoundSent { round: 0 }, &[]);
        assert_eq!(first.hear(), Some(Upstream::RoundDone { round: 0 }));
        assert_refused(answer(&network, ALICE, Hello::ours(), &join(1)), RefuseCode::NoSuchMigration);
        first.say(&Downstream::Cancel { reason: "enough".into() }, &[]);
        first.stay();
    });
    assert!(matches!(error.root(), Error::PeerFailed { reason } if reason == "enough"), "{error}");
}

#[test]
fn a_number_is_taken_once_while_others_are_due() {
    let network = Network::new(Profile::default(), None);
    let error = serve(&network, somewhere(), || {
        let mut first = Peer(network.dial_as(ALICE).unwrap());
        first.offer(Offer { connections: 3, page_streams: 3, ..offer() });
        assert_eq!(first.hear(), Some(Upstream::Accept));
        let (_second, heard) = answer(&network, ALICE, Hello::ours(), &join(1));
        assert_eq!(heard, Some(Upstream::Accept));
        assert_refused(answer(&network, ALICE, Hello::ours(), &join(1)), RefuseCode::Busy);
        // The third does not come, and what was waited for is named.
        let heard = (0..3).find_map(|_| first.hear());
        assert!(
            matches!(&heard, Some(Upstream::Failed { reason }) if reason.contains("connections")),
            "{heard:?}"
        );
    });
    assert!(matches!(error.root(), Error::TimedOut { what: "all connections of the sender", .. }), "{error}");
}

#[test]
fn what_the_sender_says_while_connections_are_due_is_heard() {
    let network = Network::new(Profile::default(), None);
    let words = [Downstream::Cancel { reason: "enough".into() }, Downstream::RoundSent { round: 0 }];
    for word in words {
        let error = serve(&network, somewhere(), || {
            let mut first = offering(&network);
            assert_eq!(first.hear(), Some(Upstream::Accept));
            first.say(&word, &[]).stay();
        });
        assert!(matches!(error.root(), Error::PeerFailed { .. } | Error::Protocol(_)), "{error}");
    }
}

#[test]
fn a_stream_on_the_wrong_connection_ends_the_migration() {
    let network = Network::new(Profile::default(), None);
    let error = serve(&network, somewhere(), || {
        let mut first = offering(&network);
        assert_eq!(first.hear(), Some(Upstream::Accept));
        let (mut second, _) = answer(&network, ALICE, Hello::ours(), &join(1));
        let _streams =
            (first.stream(&[&preamble(1), &page(512, 0)]), second.stream(&[&preamble(0), &page(0, 0)]));
        first.stay();
    });
    assert!(matches!(error.root(), Error::Protocol(_)), "{error}");
}

#[test]
fn an_offer_of_more_connections_than_can_be_is_refused() {
    let network = Network::new(Profile::default(), None);
    for (connections, capable) in [(0, true), (3, true), (9, true), (2, false)] {
        let error = serve(&network, somewhere(), || {
            let hello = if capable { Hello::ours() } else { Hello { capabilities: vec![], ..Hello::ours() } };
            let word = Downstream::Offer(Offer { connections, ..offer() });
            assert_refused(answer(&network, ALICE, hello, &word), RefuseCode::BadOffer);
        });
        assert!(matches!(error.root(), Error::Refused { code: RefuseCode::BadOffer, .. }), "{error}");
    }
}

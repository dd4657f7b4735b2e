//! Many peers at one front desk: nobody is kept waiting by another, and nobody is taken for another.

use crate::harness::{SECOND, World, desk_at, layout, receiving, sending};
use crate::hostile::{Peer, offer};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::identity::Fingerprint;
use migrate::inbound::{self, Desk, Ledger as _, Limits, MemoryLedger};
use migrate::link::duplex::{Network, Profile};
use migrate::outbound::{self, Word};
use migrate::report::Quiet;
use migrate::source::scripted::{Who, Witness};
use protocol::MigrationId;
use protocol::control::{Downstream, Offer, Outcome, RefuseCode, Upstream};
use protocol::handshake::Hello;
use std::sync::Arc;
use std::time::Instant;

const ALICE: Fingerprint = Fingerprint::from_digest([1; 32]);
const BOB: Fingerprint = Fingerprint::from_digest([2; 32]);

fn desk_for(network: &Network, limits: Limits, ledger: &Arc<MemoryLedger>) -> Desk {
    let network = network.clone();
    let accept = Box::new(move |limit| network.accept(limit));
    Desk::open(accept, ledger.clone(), limits, 5 * SECOND, Box::new(|_| {})).unwrap()
}

fn network() -> Network {
    Network::new(Profile::default(), None)
}

#[test]
fn several_migrations_are_served_at_once_and_each_arrives() {
    let network = network();
    let worlds: Vec<World> = (0..3).map(|number| World::named(&format!("vm-{number}"), number, 2)).collect();
    let limits = Limits { max_migrations: 3, ..Limits::one(1 << 30) };
    let desk = &desk_for(&network, limits, &Arc::default());
    std::thread::scope(|scope| {
        for world in &worlds {
            scope.spawn(|| {
                let dial = &mut || network.dial();
                let link = dial().unwrap();
                let machine = world.machine.attach();
                outbound::send(machine, link, dial, &sending(), &CancelFlag::default(), &mut Quiet).unwrap();
            });
        }
        for _ in 0..3 {
            let offered = desk.next_offer(20 * SECOND).unwrap().unwrap();
            let name = &offered.offer().name;
            let world = worlds.iter().find(|world| world.name == *name).unwrap();
            scope.spawn(|| {
                let place = place::Scripted::new(world.witness.clone(), None);
                inbound::receive(offered, desk, place, &receiving(), &CancelFlag::default(), &mut Quiet)
                    .unwrap();
            });
        }
    });
    for world in &worlds {
        assert!(world.witness.memory_arrived() && !world.witness.saw_two());
        assert!(world.witness.is_running(Who::Destination) && !world.witness.is_running(Who::Source));
    }
}

#[test]
fn those_who_dawdle_or_crowd_keep_nobody_waiting() {
    let network = network();
    let desk = desk_for(&network, Limits::one(1 << 30), &Arc::default());
    // Each of them could hold the desk for seconds, and there are more than it greets at once.
    let _silent: Vec<_> = (0..40).map(|_| network.dial_as(ALICE).unwrap()).collect();
    let begun = Instant::now();
    let link = network.dial_as(BOB).unwrap();
    assert_eq!(outbound::ask(link, MigrationId(5), 3 * SECOND).unwrap(), Word::Outcome(Outcome::Unknown));
    Peer(network.dial_as(BOB).unwrap()).offer(offer());
    assert!(desk.next_offer(3 * SECOND).unwrap().is_some());
    assert!(begun.elapsed() < 4 * SECOND, "{:?}", begun.elapsed());
}

#[test]
fn memory_and_places_are_reserved_until_an_offer_is_over() {
    let network = network();
    let bytes = layout().total_bytes();
    let limits = Limits { max_migrations: 3, ..Limits::one(2 * bytes + 1) };
    let desk = desk_for(&network, limits, &Arc::default());
    let come = |number: u128| {
        let mut peer = Peer(network.dial().unwrap());
        peer.offer(Offer { migration: MigrationId(number), ..offer() });
        peer
    };
    let _peers = [come(1), come(2), come(3)];
    let soon = SECOND / 5;
    let first = desk.next_offer(5 * SECOND).unwrap().unwrap();
    let second = desk.next_offer(5 * SECOND).unwrap().unwrap();
    assert!(desk.next_offer(soon).unwrap().is_none(), "there is no memory for a third");
    drop(first);
    let third = desk.next_offer(5 * SECOND).unwrap().unwrap();
    let mut ids = [second.offer().migration.0, third.offer().migration.0];
    ids.sort_unstable();
    assert!(ids[0] != ids[1] && ids[1] <= 3);
    // What could never be had is not waited for: whoever serves it says no.
    let mut large = offer();
    large.layout.spaces[1].pages = 1 << 30;
    Peer(network.dial().unwrap()).offer(Offer { migration: MigrationId(4), ..large });
    assert_eq!(desk.next_offer(5 * SECOND).unwrap().unwrap().offer().migration, MigrationId(4));
    // One more than may wait is told to come again.
    let _waiting: Vec<Peer> = (5..13).map(come).collect();
    assert!(matches!(come(13).hear(), Some(Upstream::Refuse { code: RefuseCode::Busy, .. })));
}

#[test]
fn two_workloads_of_one_name_or_two_migrations_of_one_id_cannot_arrive_at_once() {
    let network = network();
    let limits = Limits { max_migrations: 3, ..Limits::one(1 << 30) };
    let desk = &desk_for(&network, limits, &Arc::default());
    let cases = [
        (RefuseCode::NameTaken, Offer { migration: MigrationId(1), ..offer() }),
        (RefuseCode::BadOffer, Offer { name: "other".into(), ..offer() }),
    ];
    std::thread::scope(|scope| {
        let serve = || {
            let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
            let place = place::Scripted::new(Witness::default(), None);
            inbound::receive(offered, desk, place, &receiving(), &CancelFlag::default(), &mut Quiet)
        };
        let mut first = Peer(network.dial().unwrap());
        first.offer(offer());
        let served = scope.spawn(serve);
        assert_eq!(first.hear(), Some(Upstream::Accept));
        for (expected, second) in cases {
            let mut peer = Peer(network.dial().unwrap());
            peer.offer(second);
            serve().unwrap_err();
            assert!(matches!(peer.hear(), Some(Upstream::Refuse { code, .. }) if code == expected));
        }
        first.say(&Downstream::Cancel { reason: "enough".into() }, &[]);
        served.join().unwrap().unwrap_err();
    });
}

#[test]
fn a_migration_that_is_loaded_answers_nobody_but_the_peer_that_offered_it() {
    let network = network();
    let ledger = Arc::new(MemoryLedger::default());
    let accepting = network.clone();
    let desk = &desk_at(Box::new(move |limit| accepting.accept(limit)), &ledger, Box::new(|_| {}));
    std::thread::scope(|scope| {
        let mut first = Peer(network.dial_as(ALICE).unwrap());
        let served = scope.spawn(|| {
            let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
            let place = place::Scripted::new(Witness::default(), None);
            let options = inbound::Options { linger: 20 * SECOND, forget: 20 * SECOND, ..receiving() };
            inbound::receive(offered, desk, place, &options, &CancelFlag::default(), &mut Quiet)
        });
        first.ready();
        let id = offer().migration;
        let theirs = outbound::ask(network.dial_as(BOB).unwrap(), id, SECOND).unwrap();
        assert_eq!((theirs, ledger.outcome(id)), (Word::Outcome(Outcome::Unknown), Outcome::Unknown));
        let ours = outbound::ask(network.dial_as(ALICE).unwrap(), id, SECOND).unwrap();
        assert_eq!(ours, Word::Outcome(Outcome::Discarded));
        served.join().unwrap().unwrap_err();
        // Now that it is decided, it is no secret from whoever knows the id.
        assert_eq!(
            outbound::ask(network.dial_as(BOB).unwrap(), id, SECOND).unwrap(),
            Word::Outcome(Outcome::Discarded)
        );
    });
}

#[test]
fn further_connections_of_what_nobody_knows_are_refused_plainly() {
    let network = network();
    let _desk = desk_for(&network, Limits::one(1 << 30), &Arc::default());
    let migration = offer().migration;
    for word in [Downstream::Join { migration, connection: 1 }, Downstream::Resume { migration }] {
        let mut peer = Peer(network.dial().unwrap());
        peer.greet(&Downstream::Hello(Hello::ours())).say(&word, &[]).skip_preamble();
        assert!(matches!(peer.hear(), Some(Upstream::Hello(_))));
        let answer = peer.hear();
        assert!(
            matches!(answer, Some(Upstream::Refuse { code: RefuseCode::NoSuchMigration, .. })),
            "{answer:?}"
        );
    }
}

//! Links that are lost in the rounds and taken up again: nothing is lost, and little is sent twice.

use crate::harness::{Ended, SECOND, World, desk, receiving, sending};
use crate::hostile::{OURS, Peer, end, offer, preamble, state};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::error::Error;
use migrate::identity::Fingerprint;
use migrate::inbound::{self, Ledger as _};
use migrate::link::duplex::{Cut, Direction, Network, Profile};
use migrate::outbound;
use migrate::report::{Event, Observer, Phase, Quiet};
use migrate::source::scripted::{Call, Who, Witness};
use proptest::prelude::*;
use protocol::control::{Downstream, Outcome, RefuseCode, Upstream};
use protocol::handshake::{self, Hello};
use std::sync::Arc;
use std::time::{Duration, Instant};

#[derive(Default)]
struct Diary(Vec<Event>);

impl Observer for Diary {
    fn event(&mut self, event: &Event) {
        self.0.push(event.clone());
    }
}

fn retrying() -> outbound::Options {
    outbound::Options { retry: 20 * SECOND, ..sending() }
}

fn keeping() -> inbound::Options {
    inbound::Options { keep: 20 * SECOND, ..receiving() }
}

fn attempt(world: &World, network: &Network, options: &outbound::Options) -> (Ended, Diary, Diary) {
    let (mut here, mut there) = (Diary::default(), Diary::default());
    let cancel = CancelFlag::default();
    let ended = world.attempt_with(network, None, &keeping(), options, &cancel, &mut here, &mut there);
    (ended, here, there)
}

fn any_cut() -> impl Strategy<Value = Cut> {
    prop_oneof![
        4 => (600u64..1_600_000).prop_map(|bytes| Cut::Bytes(Direction::Down, bytes)),
        1 => (0u64..3_000).prop_map(|bytes| Cut::Bytes(Direction::Down, bytes)),
        1 => (0u64..900).prop_map(|bytes| Cut::Bytes(Direction::Up, bytes)),
        1 => (0u32..10).prop_map(|message| Cut::Before(Direction::Down, message)),
        1 => (0u32..10).prop_map(|message| Cut::After(Direction::Down, message)),
        1 => (0u32..10).prop_map(|message| Cut::Before(Direction::Up, message)),
        1 => (0u32..10).prop_map(|message| Cut::After(Direction::Up, message)),
    ]
}

/// It moved; or it stayed, because the link was lost before it had begun, or behind `Commit` so that it was asked for.
fn assert_moved_or_stayed(world: &World, ended: &Ended) {
    let Err(failed) = &ended.sent else { return world.assert_moved(ended) };
    let begun = failed.report.phases.iter().any(|time| time.phase == Phase::Track);
    let asked = failed.report.phases.iter().any(|time| time.phase == Phase::Ask);
    match failed.error.root() {
        Error::Link(_) => assert!(!begun, "{failed}"),
        Error::PeerFailed { .. } => assert!(asked || !begun, "{failed}"),
        other => panic!("{other}"),
    }
    world.assert_stayed_and_moves_next(ended);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn whatever_is_cut_how_often_the_bytes_arrive_or_the_workload_stays(
        seed in any::<u64>(),
        cuts in proptest::collection::vec(any_cut(), 1..6),
        page_streams in 1u16..=4,
        pages_per_call in 0u64..4,
        latency_us in prop_oneof![Just(0u64), Just(300)],
        verify in prop::bool::weighted(0.25),
    ) {
        let world = World::new(seed, pages_per_call);
        let profile = Profile { latency: Duration::from_micros(latency_us), seed, ..Profile::default() };
        let network = Network::new(profile, cuts.into_iter().map(Some));
        let options = outbound::Options { page_streams, verify, ..retrying() };
        if verify {
            options.controls.change(|limits| limits.downtime = 60 * SECOND);
        }
        let (ended, ..) = attempt(&world, &network, &options);
        assert_moved_or_stayed(&world, &ended);
    }

    #[test]
    fn an_idle_workload_is_sent_the_rest_of_and_no_more(
        seed in any::<u64>(),
        at in 2_000u64..1_000_000,
        page_streams in 1u16..=4,
    ) {
        let world = World::new(seed, 0);
        let network = Network::new(Profile::default(), [Some(Cut::Bytes(Direction::Down, at))]);
        let options = outbound::Options { page_streams, ..retrying() };
        let (ended, here, there) = attempt(&world, &network, &options);
        world.assert_moved(&ended);
        let report = ended.sent.as_ref().unwrap();
        prop_assert_eq!(report.resumes, 1);
        let sent_before = here.0.iter().find_map(|event| match event {
            Event::Resumed { sent_pages, round: 0, .. } => Some(*sent_pages),
            _ => None,
        });
        let arrived = there.0.iter().find_map(|event| match event {
            Event::CameBack { arrived_pages, round: 0 } => Some(*arrived_pages),
            _ => None,
        });
        let sent_behind = report.sent_pages + report.zero_pages - sent_before.unwrap();
        prop_assert_eq!(sent_behind + arrived.unwrap(), 1170 - report.skipped_pages);
    }
}

/// Of an idle workload, the messages of the receiver: `Hello`, `Accept`, `RoundDone`, `Ready`.
const READY: u32 = 3;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_link_that_is_lost_with_the_state_loaded_begins_anew_and_what_arrives_is_the_source(
        seed in any::<u64>(),
        cuts in proptest::collection::vec(any_cut(), 0..4),
        page_streams in 1u16..=4,
        post_copy in prop::bool::weighted(0.25),
        verify in prop::bool::weighted(0.25),
    ) {
        let world = World::new(seed, 0);
        let first = Cut::Before(Direction::Up, if verify { READY + 1 } else { READY });
        let network = Network::new(Profile::default(), std::iter::once(first).chain(cuts).map(Some));
        let options = outbound::Options { page_streams, verify, ..retrying() };
        options.controls.change(|limits| {
            limits.downtime = 60 * SECOND;
            if post_copy && !verify {
                limits.post_copy_after = Some(1);
                limits.downtime = Duration::from_nanos(1);
            }
        });
        let (ended, here, there) = attempt(&world, &network, &options);
        assert_moved_or_stayed(&world, &ended);
        prop_assert!(!world.witness.saw_wrong_bytes());
        let anew = |event: &Event| matches!(event, Event::Resumed { missing_pages: 1170, .. });
        prop_assert!(here.0.iter().any(anew), "{:?}", here.0);
        let lost = there.0.iter().any(|event| matches!(event, Event::LinkLost { .. }));
        prop_assert!(lost);
        let report = ended.sent.as_ref().unwrap_or_else(|failed| &failed.report);
        prop_assert!(report.warnings.iter().any(|warning| warning.contains("once more")), "{report:?}");
    }
}

#[test]
fn until_the_sender_has_heard_that_all_is_gone_it_is_told_again() {
    // Before the answer `Anew`, behind it, and before the first stream is opened behind it.
    for second in [
        None,
        Some(Cut::Before(Direction::Up, 1)),
        Some(Cut::After(Direction::Up, 1)),
        Some(Cut::Bytes(Direction::Down, 700)),
    ] {
        let world = World::new(12, 0);
        let network = Network::new(Profile::default(), [Some(Cut::Before(Direction::Up, READY)), second]);
        let (ended, ..) = attempt(&world, &network, &retrying());
        world.assert_moved(&ended);
        let report = ended.sent.unwrap();
        assert_eq!(network.dialled(), 2 + usize::from(second.is_some()), "{second:?}");
        assert_eq!(report.rounds.iter().filter(|round| round.frozen).count(), 1);
    }
}

/// A receiver of the engine, and a sender of ours that is ready and may say anything.
fn loaded(
    options: &inbound::Options,
    cancel: &CancelFlag,
    sender: impl FnOnce(&Network, Peer),
) -> (World, migrate::error::Result<migrate::report::ArrivalReport>) {
    let world = World::new(1, 0);
    let network = Network::new(Profile::default(), None);
    let accepting = network.clone();
    let accept = Box::new(move |limit| accepting.accept(limit));
    let limits = inbound::Limits::one(1 << 30);
    let desk =
        inbound::Desk::open(accept, world.ledger.clone(), limits, 5 * SECOND, Box::new(|_| {})).unwrap();
    let received = std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
            let place = place::Scripted::at(world.site.clone(), world.witness.clone(), None);
            inbound::receive(offered, &desk, place, options, cancel, &mut Quiet)
        });
        let mut peer = Peer(network.dial().unwrap());
        peer.ready();
        sender(&network, peer);
        served.join().unwrap()
    });
    (world, received)
}

/// A second connection of that sender, with this word.
fn again(network: &Network, word: &Downstream) -> Peer {
    let mut peer = Peer(network.dial().unwrap());
    peer.greet(&Downstream::Hello(Hello::ours())).say(word, &[]).skip_preamble();
    assert!(matches!(peer.hear(), Some(Upstream::Hello(_))));
    peer
}

#[test]
fn a_commit_on_a_link_that_was_given_up_starts_nothing() {
    let options = inbound::Options { idle: SECOND, keep: SECOND, linger: 20 * SECOND, ..receiving() };
    let (world, received) = loaded(&options, &CancelFlag::default(), |network, mut first| {
        let mut second = again(network, &Downstream::Resume { migration: OURS });
        assert_eq!(second.hear(), Some(Upstream::Anew { round: 0 }));
        first.say(&Downstream::Commit { migration: OURS }, &[]);
        // On the new one it is out of place, too: nothing is loaded any more.
        let open = [0, 1].map(|number| second.stream(&[&preamble(number)]));
        second.say(&Downstream::Commit { migration: OURS }, &[]);
        assert!(matches!(second.hear(), Some(Upstream::Failed { .. })));
        drop(open);
    });
    assert!(!world.witness.is_running(Who::Destination));
    let error = received.unwrap_err();
    assert!(matches!(error.root(), Error::Protocol(_)), "{error}");
    assert_eq!(world.ledger.outcome(OURS), Outcome::Discarded);
}

#[test]
fn who_asks_late_of_a_loaded_workload_hears_that_it_never_starts() {
    let options = inbound::Options { forget: SECOND / 20, keep: 20 * SECOND, ..receiving() };
    let (world, received) = loaded(&options, &CancelFlag::default(), |network, first| {
        drop(first);
        std::thread::sleep(SECOND / 3);
        let mut second = again(network, &Downstream::Ask { migration: OURS });
        assert_eq!(second.hear(), Some(Upstream::Outcome { migration: OURS, outcome: Outcome::Discarded }));
        second.say(&Downstream::Done { migration: OURS }, &[]);
    });
    received.unwrap_err();
    assert!(!world.witness.is_running(Who::Destination));
}

#[test]
fn a_loaded_workload_is_not_kept_against_the_operator_or_for_a_sender_that_begins_anew() {
    let options = inbound::Options { forget: SECOND / 20, keep: 60 * SECOND, ..receiving() };
    let cancel = CancelFlag::default();
    let begun = Instant::now();
    let (_, received) = loaded(&options, &cancel, |_, first| {
        drop(first);
        // Not while it may still be told to start.
        while !cancel.is_open() {
            std::thread::sleep(SECOND / 100);
        }
        assert!(cancel.set());
    });
    assert!(matches!(received.unwrap_err().root(), Error::Interrupted(_)));

    let (_, received) = loaded(&options, &CancelFlag::default(), |network, first| {
        drop(first);
        let mut anew = Peer(network.dial().unwrap());
        anew.offer(protocol::control::Offer { migration: protocol::MigrationId(5), ..offer() });
    });
    assert!(received.unwrap_err().to_string().contains("begun anew"));
    assert!(begun.elapsed() < 30 * SECOND);
}

#[test]
fn a_sender_that_does_not_know_how_to_begin_anew_is_refused() {
    let options = inbound::Options { keep: 20 * SECOND, ..receiving() };
    let world = World::new(1, 0);
    let network = Network::new(Profile::default(), None);
    let desk = desk(&network, &world.ledger);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
            let place = place::Scripted::new(world.witness.clone(), None);
            inbound::receive(offered, &desk, place, &options, &CancelFlag::default(), &mut Quiet)
        });
        let mut older = Hello::ours();
        older.capabilities.retain(|name| name != handshake::ANEW);
        let mut first = Peer(network.dial().unwrap());
        first
            .greet(&Downstream::Hello(older.clone()))
            .say(&Downstream::Offer(offer()), b"machine")
            .skip_preamble();
        assert!(matches!(first.hear(), Some(Upstream::Hello(_))));
        assert_eq!(first.hear(), Some(Upstream::Accept));
        drop([0, 1].map(|number| first.stream(&[&preamble(number), &end(0)])));
        first.say(&Downstream::State { last_round: 0 }, &state());
        assert_eq!(first.hear(), Some(Upstream::Ready));
        drop(first);
        let mut second = again(&network, &Downstream::Resume { migration: OURS });
        let code = RefuseCode::NoSuchMigration;
        assert!(matches!(second.hear(), Some(Upstream::Refuse { code: found, .. }) if found == code));
        served.join().unwrap().unwrap_err();
    });
}

#[test]
fn a_link_that_is_lost_in_a_later_round_costs_that_round_at_most() {
    let world = World::new(9, 3);
    // The second round is announced by the fourth message.
    let network = Network::new(Profile::default(), [Some(Cut::Before(Direction::Down, 3))]);
    let (ended, here, _) = attempt(&world, &network, &retrying());
    world.assert_moved(&ended);
    let report = ended.sent.unwrap();
    let resumed = here.0.iter().find_map(|event| match event {
        Event::Resumed { round: 1, missing_pages, .. } => Some(*missing_pages),
        _ => None,
    });
    // Everything of that round was on its way, and a cut lets arrive what was written before it.
    let dirty = report.rounds[0].remaining_pages;
    // A few were written between the count and the freeze, if it was frozen then.
    assert!(resumed.unwrap() <= dirty + 32 && dirty < 1000, "{resumed:?} of {dirty}");
    assert!(report.rounds.iter().any(|round| round.round == 1));
}

#[test]
fn a_frozen_workload_goes_on_at_once_and_is_frozen_again_over_the_new_link() {
    for call in [Call::Freeze, Call::State] {
        let world = World::new(4, 2);
        let network = Network::new(Profile::default(), None);
        let (cable, mut cut) = (network.clone(), false);
        world.machine.on_call(move |now, _| {
            if now == call && !std::mem::replace(&mut cut, true) {
                cable.cut();
                cable.set_reachable(false);
            }
            if now == Call::Thaw {
                cable.set_reachable(true);
            }
            Ok(())
        });
        let (ended, ..) = attempt(&world, &network, &retrying());
        world.assert_moved(&ended);
        let report = ended.sent.as_ref().unwrap();
        assert_eq!((report.resumes, world.machine.calls()[&Call::Thaw]), (1, 1), "{call:?}");
        assert!(report.warnings.iter().any(|warning| warning.contains("stood still")), "{report:?}");
        assert_eq!(report.rounds.iter().filter(|round| round.frozen).count(), 1);
    }
}

#[test]
fn a_receiver_that_was_started_anew_knows_nothing_and_the_workload_stays() {
    let world = World::new(4, 2);
    let network = Network::new(Profile::default(), [Some(Cut::Bytes(Direction::Down, 300_000))]);
    let options = retrying();
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let first = desk(&network, &world.ledger);
            let offered = first.next_offer(5 * SECOND).unwrap().unwrap();
            let place = place::Scripted::new(world.witness.clone(), None);
            inbound::receive(offered, &first, place, &receiving(), &CancelFlag::default(), &mut Quiet)
                .unwrap_err();
            drop(first);
            desk(&network, &world.ledger)
        });
        let mut dial = || network.dial();
        let link = dial().unwrap();
        let failed = outbound::send(
            world.machine.attach(),
            link,
            &mut dial,
            &options,
            &CancelFlag::default(),
            &mut Quiet,
        )
        .unwrap_err();
        let code = RefuseCode::NoSuchMigration;
        assert!(
            matches!(failed.error.root(), Error::Refused { code: found, .. } if *found == code),
            "{failed}"
        );
        drop(receiver.join().unwrap());
    });
    assert!(world.witness.is_running(Who::Source) && !world.witness.is_running(Who::Destination));
    assert_eq!(world.machine.missing_pages(), 0);
    world.assert_moved(&world.move_it());
}

#[test]
fn without_a_link_in_time_both_ends_let_go() {
    let world = World::new(4, 2);
    let network = Network::new(Profile::default(), [Some(Cut::Bytes(Direction::Down, 300_000))]);
    let cable = network.clone();
    world.machine.on_call(move |_, _| {
        // Nobody is reached again behind the first connection.
        cable.set_reachable(false);
        Ok(())
    });
    let options = outbound::Options { retry: SECOND / 2, ..sending() };
    let keeping = inbound::Options { keep: SECOND / 2, ..receiving() };
    let begun = Instant::now();
    let ended = world.attempt_with(
        &network,
        None,
        &keeping,
        &options,
        &CancelFlag::default(),
        &mut Quiet,
        &mut Quiet,
    );
    assert!(matches!(ended.error(), Error::Link(_)), "{}", ended.error());
    assert!(begun.elapsed() < 10 * SECOND);
    network.set_reachable(true);
    world.assert_stayed_and_moves_next(&ended);
}

struct CancelWhenLost(CancelFlag);

impl Observer for CancelWhenLost {
    fn event(&mut self, event: &Event) {
        if matches!(event, Event::LinkLost { .. }) {
            self.0.set();
        }
    }
}

#[test]
fn an_operator_who_has_waited_enough_ends_the_wait() {
    let world = World::new(4, 2);
    let network = Network::new(Profile::default(), [Some(Cut::Bytes(Direction::Down, 300_000))]);
    let cancel = CancelFlag::default();
    let keeping = inbound::Options { keep: SECOND, ..receiving() };
    let mut observer = CancelWhenLost(cancel.clone());
    let options = retrying();
    let ended = world.attempt_with(&network, None, &keeping, &options, &cancel, &mut observer, &mut Quiet);
    assert!(matches!(ended.error(), Error::Interrupted(_)), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn another_host_at_the_same_address_gets_nothing() {
    let world = World::new(4, 2);
    let network = Network::new(Profile::default(), [Some(Cut::Bytes(Direction::Down, 300_000))]);
    network.answer_as([migrate::link::duplex::NOBODY, Fingerprint::from_digest([9; 32])]);
    let keeping = inbound::Options { keep: SECOND / 2, ..receiving() };
    let cancel = CancelFlag::default();
    let ended = world.attempt_with(&network, None, &keeping, &retrying(), &cancel, &mut Quiet, &mut Quiet);
    assert!(matches!(ended.error(), Error::Identity(_)), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn nobody_but_the_peer_that_offered_it_can_take_it_up_and_a_new_offer_ends_the_wait() {
    let network = Network::new(Profile::default(), None);
    let accepting = network.clone();
    let desk = &inbound::Desk::open(
        Box::new(move |limit| accepting.accept(limit)),
        Arc::new(inbound::MemoryLedger::default()),
        inbound::Limits::one(1 << 30),
        5 * SECOND,
        Box::new(|_| {}),
    )
    .unwrap();
    let alice = Fingerprint::from_digest([1; 32]);
    std::thread::scope(|scope| {
        let served = scope.spawn(|| {
            let offered = desk.next_offer(5 * SECOND).unwrap().unwrap();
            let place = place::Scripted::new(Witness::default(), None);
            inbound::receive(offered, desk, place, &keeping(), &CancelFlag::default(), &mut Quiet)
        });
        let mut first = Peer(network.dial_as(alice).unwrap());
        first.accepted();
        let open = [0, 1].map(|number| first.stream(&[&preamble(number)]));
        drop((open, first));
        let resume = Downstream::Resume { migration: offer().migration };
        let mut stranger = Peer(network.dial().unwrap());
        stranger.greet(&Downstream::Hello(Hello::ours())).say(&resume, &[]);
        stranger.skip_preamble().hear::<Upstream>();
        let code = RefuseCode::NoSuchMigration;
        assert!(matches!(stranger.hear(), Some(Upstream::Refuse { code: found, .. }) if found == code));
        // The same peer with the same workload: its engine was started anew, and knows nothing of the old migration.
        let mut anew = Peer(network.dial_as(alice).unwrap());
        anew.offer(protocol::control::Offer { migration: protocol::MigrationId(5), ..offer() });
        let error = served.join().unwrap().unwrap_err();
        assert!(error.to_string().contains("begun anew"), "{error}");
        assert!(desk.next_offer(5 * SECOND).unwrap().is_some());
    });
}

//! Links that end, anywhere.

use crate::harness::{SECOND, World, desk, desk_at, sending};
use migrate::cancel::CancelFlag;
use migrate::error::Error;
use migrate::inbound::{self, Ledger as _};
use migrate::link::duplex::{Cut, Direction, Network, Profile};
use migrate::outbound;
use migrate::report::Quiet;
use migrate::source::scripted::{Call, Who};
use proptest::prelude::*;
use protocol::control::Outcome;
use std::sync::Arc;
use std::time::Duration;

pub(crate) fn any_cut() -> impl Strategy<Value = Cut> {
    prop_oneof![
        (0u64..3_000_000).prop_map(|bytes| Cut::Bytes(Direction::Down, bytes)),
        (0u64..2_000).prop_map(|bytes| Cut::Bytes(Direction::Down, bytes)),
        (0u64..600).prop_map(|bytes| Cut::Bytes(Direction::Up, bytes)),
        (0u32..10).prop_map(|message| Cut::Before(Direction::Down, message)),
        (0u32..10).prop_map(|message| Cut::After(Direction::Down, message)),
        (0u32..10).prop_map(|message| Cut::Before(Direction::Up, message)),
        (0u32..10).prop_map(|message| Cut::After(Direction::Up, message)),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_cut_anywhere_never_leaves_two_or_none(
        seed in any::<u64>(),
        cut in any_cut(),
        second_cut in proptest::option::of(any_cut()),
        page_streams in 1u16..=4,
        pages_per_call in 0u64..4,
        latency_us in prop_oneof![Just(0u64), Just(500)],
    ) {
        let world = World::new(seed, pages_per_call);
        let profile = Profile { latency: Duration::from_micros(latency_us), seed, ..Profile::default() };
        let network = Network::new(profile, [Some(cut), second_cut]);
        let options = outbound::Options { page_streams, ..sending() };
        let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
        // The third connection always holds, so there is always an answer.
        match &ended.sent {
            Ok(_) => world.assert_moved(&ended),
            Err(failed) => {
                prop_assert!(!matches!(failed.error.root(), Error::InDoubt(_)), "{failed}");
                world.assert_stayed_and_moves_next(&ended);
            }
        }
    }

    #[test]
    fn a_cable_pulled_at_any_call_never_leaves_two_or_none(
        seed in any::<u64>(),
        call in proptest::sample::select(&Call::ALL[..]),
        number in 0u32..6,
    ) {
        let world = World::new(seed, 2);
        let network = Network::new(Profile { latency: Duration::from_micros(300), ..Profile::default() }, None);
        let cable = network.clone();
        world.machine.on_call(move |now, count| {
            if (now, count) == (call, number) {
                cable.cut();
            }
            Ok(())
        });
        let ended = world.attempt(&network, None, &sending(), &CancelFlag::default(), &mut Quiet);
        match &ended.sent {
            Ok(_) => world.assert_moved(&ended),
            Err(_) => world.assert_stayed_and_moves_next(&ended),
        }
    }
}

/// The messages of a move in two rounds: `Commit` is the fifth of the sender's, `Ready` the fourth and `Started` the
/// fifth of the receiver's.
const COMMIT: u32 = 4;
const READY: u32 = 3;
const STARTED: u32 = 4;

/// A machine that is idle and so moves in two rounds, whatever the clock says.
fn idle() -> (World, outbound::Options) {
    let options = sending();
    options.controls.change(|limits| limits.max_rounds = 1);
    (World::new(3, 0), options)
}

#[test]
fn around_commit_the_destinations_word_decides() {
    use Direction::{Down, Up};
    for (cut, moves, asks) in [
        (Cut::Before(Up, READY), false, false),
        (Cut::Before(Down, COMMIT), false, true),
        (Cut::After(Down, COMMIT), true, true),
        (Cut::Before(Up, STARTED), true, true),
        (Cut::After(Up, STARTED), true, false),
        (Cut::Before(Down, COMMIT + 1), true, false),
        (Cut::After(Down, COMMIT + 1), true, false),
    ] {
        let (world, options) = idle();
        let network = Network::new(Profile::default(), [Some(cut)]);
        let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
        let phases = match &ended.sent {
            Ok(report) => &report.phases,
            Err(failed) => &failed.report.phases,
        };
        let asked = phases.iter().any(|time| time.phase == migrate::report::Phase::Ask);
        assert_eq!((ended.sent.is_ok(), asked), (moves, asks), "{cut:?}: {:?}", ended.received);
        if moves {
            world.assert_moved(&ended);
        } else {
            world.assert_stayed_and_moves_next(&ended);
        }
    }
}

#[test]
fn without_an_answer_the_source_stays_frozen_and_can_be_settled() {
    for (cut, starts) in [
        (Cut::Before(Direction::Down, COMMIT), false),
        (Cut::After(Direction::Down, COMMIT), true),
        (Cut::Before(Direction::Up, STARTED), true),
    ] {
        let (world, mut options) = idle();
        options.ask = SECOND / 5;
        let network = Network::new(Profile::default(), [Some(cut)]);
        let unplugged = network.clone();
        world.machine.on_call(move |call, _| {
            unplugged.set_reachable(call != Call::Pledge);
            Ok(())
        });
        let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
        assert!(matches!(ended.error(), Error::InDoubt(_)), "{cut:?}: {}", ended.error());
        assert!(ended.error().to_string().contains("migrate recover scripted"), "{}", ended.error());
        assert!(world.machine.is_pledged());
        assert!(!world.witness.is_running(Who::Source));
        assert_eq!(world.witness.is_running(Who::Destination), starts, "{cut:?}");
        assert!(!world.witness.saw_two());

        // The operator asks again once the network is back.
        network.set_reachable(true);
        let expected = if starts { Outcome::Started } else { Outcome::Discarded };
        assert_eq!(world.ledger.outcome(options.migration), expected);
        let desk = desk(&network, &world.ledger);
        let answer = outbound::ask(network.dial().unwrap(), options.migration, SECOND).unwrap();
        drop(desk);
        assert_eq!(answer, outbound::Word::Outcome(expected), "{cut:?}");
    }
}

#[test]
fn a_destination_that_knows_nothing_proves_nothing() {
    let (world, options) = idle();
    let network = Network::new(Profile::default(), [Some(Cut::Before(Direction::Down, COMMIT))]);
    // The receiver dies with the link, and another one that knows nothing takes its place.
    let accepting = network.clone();
    let mut links = 1;
    let only_one = Box::new(move |limit| match std::mem::take(&mut links) {
        1 => accepting.accept(limit * 100),
        _ => Err(Error::Link("gone".into())),
    });
    std::thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let first = desk_at(only_one, &Arc::default(), Box::new(|_| {}));
            let offered = first.next_offer(5 * SECOND).unwrap().unwrap();
            let place = migrate::destination::scripted::Scripted::new(world.witness.clone(), None);
            let options = crate::harness::receiving();
            inbound::receive(offered, &first, place, &options, &CancelFlag::default(), &mut Quiet)
                .unwrap_err();
            desk(&network, &Arc::default())
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
        drop(receiver.join().unwrap());
    });
    assert!(world.machine.is_pledged());
    assert!(!world.witness.is_running(Who::Source) && !world.witness.is_running(Who::Destination));
}

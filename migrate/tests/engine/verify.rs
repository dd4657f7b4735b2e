//! Both ends compare all memory while the workload stands still, if the operator wants that.

use crate::harness::{Ended, SECOND, World, layout, receiving, sending};
use crate::hostile::{Peer, assert_not_received, end, offer, preamble, receive_from, state};
use migrate::cancel::CancelFlag;
use migrate::converge::{OnStall, OnTimeout};
use migrate::destination::scripted::Site;
use migrate::error::Error;
use migrate::inbound;
use migrate::link::duplex::{Cut, Direction, Network, Profile, pair};
use migrate::outbound::{self, Options, Packs};
use migrate::report::{Phase, Quiet};
use migrate::source::scripted::{Call, Machine, Who};
use proptest::prelude::*;
use protocol::control::{Downstream, Upstream};
use protocol::handshake::{Hello, VERIFY};
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::{PAGE_SIZE, SpaceId};

/// Stripes of the harness's layout.
const STRIPES: u64 = 4;

fn verifying() -> Options {
    let mut options = sending();
    options.verify = true;
    // Whatever a debug build on a busy host makes of hashing.
    options.controls.change(|limits| limits.downtime = 60 * SECOND);
    options
}

fn attempt(world: &World, options: &Options) -> Ended {
    let network = Network::new(Profile::default(), None);
    world.attempt(&network, None, options, &CancelFlag::default(), &mut Quiet)
}

fn phases(ended: &Ended) -> Vec<Phase> {
    let report = match &ended.sent {
        Ok(report) => report,
        Err(failed) => &failed.report,
    };
    report.phases.iter().map(|time| time.phase).collect()
}

#[test]
fn memory_that_is_equal_moves_and_the_comparison_is_a_phase_of_both_ends() {
    use Phase::{Commit, Freeze, Greet, Offer, Pledge, Ready, Rounds, Settle, State, Track, Verify};
    for seed in 0..6 {
        let world = World::new(seed, 3);
        let ended = attempt(&world, &verifying());
        world.assert_moved(&ended);
        let order = [Greet, Offer, Track, Rounds, Freeze, Verify, State, Ready, Pledge, Commit, Settle];
        assert_eq!(phases(&ended), order);
        let report = ended.sent.as_ref().unwrap();
        assert!(report.verify_us > 0 && report.verify_us < report.downtime_us, "{report:?}");
        assert_eq!(report.fixed.actual_us, 0, "nothing is learned of it");
        let [Ok(arrival)] = &ended.received[..] else { panic!("{:?}", ended.received) };
        let arrived: Vec<Phase> = arrival.phases.iter().map(|time| time.phase).take(5).collect();
        assert_eq!(arrived, [Greet, Offer, Rounds, Verify, State]);
        assert_eq!(arrival.rounds as usize, report.rounds.len());
        assert!(arrival.state_bytes > 0);
    }
}

#[test]
fn nobody_pays_who_did_not_ask() {
    let world = World::new(3, 3);
    let ended = world.move_it();
    world.assert_moved(&ended);
    assert!(!phases(&ended).contains(&Phase::Verify));
    assert_eq!(ended.sent.unwrap().verify_us, 0);
    assert!(!world.machine.calls().contains_key(&Call::Look));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(20))]

    #[test]
    fn one_bit_that_the_destination_does_not_keep_is_found_and_the_workload_stays(
        seed in 0_u64..1000, at in any::<prop::sample::Index>(), bit in 0_u32..8,
    ) {
        let layout = layout();
        let at = at.index(layout.total_bytes() as usize) as u64;
        let first_bytes = layout.spaces[0].pages * PAGE_SIZE as u64;
        let (space, at) = if at < first_bytes { (0, at) } else { (1, at - first_bytes) };
        let mut world = World::new(seed, 2);
        world.site = Site::with_broken((SpaceId(space), at, 1 << bit));
        // Known pages and differences look at the destination's memory too, and would find it first.
        let options = Options { packs: Packs::Never, ..verifying() };
        let ended = attempt(&world, &options);
        let Error::PeerFailed { reason } = ended.error() else { panic!("{}", ended.error()) };
        let first = at / PAGE_SIZE as u64 / 512 * 512;
        let named = format!("pages {first} to");
        prop_assert!(reason.contains(&named), "{}", reason);
        prop_assert!(reason.contains(&format!("of space {space}, and 1 of {STRIPES} stripes")), "{}", reason);
        prop_assert!(phases(&ended).ends_with(&[Phase::Verify, Phase::Settle]));
        let told = ended.received.first().and_then(|arrival| arrival.as_ref().err());
        prop_assert!(matches!(told.map(Error::root), Some(Error::Host(_))), "{:?}", told);
        world.site = Site::default();
        world.assert_stayed_and_moves_next(&ended);
    }
}

#[test]
fn a_source_whose_memory_cannot_be_looked_at_keeps_its_workload() {
    for number in [0, 30] {
        let world = World::new(4, 2);
        world.machine.on_call(move |call, count| match call {
            Call::Look if count >= number => Err(Error::Workload("it does not let us".into())),
            _ => Ok(()),
        });
        let ended = attempt(&world, &verifying());
        assert!(matches!(ended.error(), Error::Workload(_)), "{}", ended.error());
        world.assert_stayed_and_moves_next(&ended);
    }
}

#[test]
fn a_comparison_longer_than_any_downtime_that_is_allowed_is_not_begun() {
    let world = World::new(4, 2);
    let options = verifying();
    options.controls.change(|limits| {
        limits.downtime = std::time::Duration::from_micros(1);
        limits.max_downtime = limits.downtime;
        limits.on_timeout = OnTimeout::Cancel;
    });
    let ended = attempt(&world, &options);
    let Error::NotConverged(text) = ended.error() else { panic!("{}", ended.error()) };
    assert!(text.contains("--downtime"), "{text}");
    assert_eq!(phases(&ended).last_chunk(), Some(&[Phase::Track, Phase::Settle]));
    world.assert_stayed_and_moves_next(&ended);

    // What is to be forced is.
    options.controls.change(|limits| limits.on_timeout = OnTimeout::Force);
    let again = Options { migration: sending().migration, ..options };
    world.assert_moved(&attempt(&world, &again));
}

#[test]
fn post_copy_and_a_comparison_exclude_each_other() {
    let world = World::new(4, 2);
    let options = verifying();
    options.controls.change(|limits| limits.post_copy_after = Some(1));
    let ended = attempt(&world, &options);
    assert!(matches!(ended.error(), Error::Usage(_)), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);

    // Allowed for a workload that stalls, it is passed over; ordered meanwhile, too.
    let (world, options) = (World::new(5, 40), verifying());
    options.controls.change(|limits| {
        limits.downtime = std::time::Duration::from_micros(1);
        limits.on_stall = vec![OnStall::PostCopy];
        limits.on_timeout = OnTimeout::Force;
    });
    let ended = attempt(&world, &options);
    world.assert_moved(&ended);
    assert!(phases(&ended).contains(&Phase::Verify) && !phases(&ended).contains(&Phase::PostCopy));
}

/// What a release says that cannot compare memory.
fn older() -> Hello {
    let mut hello = Hello::ours();
    hello.capabilities.retain(|name| name != VERIFY);
    hello
}

#[test]
fn a_destination_that_cannot_compare_is_told_nothing_of_the_workload() {
    let world = World::new(4, 2);
    let (here, there, _) = pair(&Profile::default(), None);
    let (sent, offered) = std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut peer = Peer(Box::new(there));
            peer.greet(&Upstream::Hello(older())).skip_preamble();
            assert!(matches!(peer.hear(), Some(Downstream::Hello(_))));
            peer.hear::<Downstream>()
        });
        let sent = outbound::send(
            world.machine.attach(),
            Box::new(here),
            &mut || Err(Error::Link("nobody answers".into())),
            &verifying(),
            &CancelFlag::default(),
            &mut Quiet,
        );
        (sent, receiver.join().unwrap())
    });
    let error = sent.unwrap_err().error;
    assert!(matches!(error.root(), Error::Usage(text) if text.contains("--verify")), "{error}");
    assert!(!matches!(offered, Some(Downstream::Offer(_))), "{offered:?}");
    assert!(world.witness.is_running(Who::Source));
    assert_eq!(world.machine.missing_pages(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn a_link_that_is_lost_meanwhile_leads_back_into_the_rounds(
        seed in any::<u64>(), message in 2_u32..6, before in any::<bool>(), up in any::<bool>(),
    ) {
        let world = World::new(seed, 2);
        let direction = if up { Direction::Up } else { Direction::Down };
        let cut = if before { Cut::Before(direction, message) } else { Cut::After(direction, message) };
        let network = Network::new(Profile::default(), [Some(cut)]);
        let options = Options { retry: 20 * SECOND, ..verifying() };
        let receiving = inbound::Options { keep: 20 * SECOND, ..receiving() };
        let cancel = CancelFlag::default();
        let ended = world.attempt_with(&network, None, &receiving, &options, &cancel, &mut Quiet, &mut Quiet);
        // Behind its state there is no way back into the rounds.
        match &ended.sent {
            Ok(report) => {
                world.assert_moved(&ended);
                prop_assert!(report.verify_us > 0);
            }
            Err(_) => world.assert_stayed_and_moves_next(&ended),
        }
    }
}

/// A workload of so many stripes that their digests come in three parts.
fn large(seed: u64) -> World {
    let spaces = (0..300).map(|id| Space {
        id: SpaceId(id),
        kind: SpaceKind::Memory,
        pages: 2,
        guest_address: u64::from(id) << 20,
    });
    let mut world = World::new(seed, 1);
    world.machine = Machine::new(Layout { spaces: spaces.collect() }, seed, 1, world.witness.clone());
    world
}

#[test]
fn digests_of_a_large_workload_go_in_parts_which_a_lost_link_may_come_between() {
    world_of_parts_moves(None);
    for message in 3..6 {
        for direction in [Direction::Down, Direction::Up] {
            world_of_parts_moves(Some(Cut::Before(direction, message)));
        }
    }
}

fn world_of_parts_moves(cut: Option<Cut>) {
    let world = large(9);
    let network = Network::new(Profile::default(), [cut]);
    let options = Options { retry: 20 * SECOND, ..verifying() };
    let receiving = inbound::Options { keep: 20 * SECOND, ..receiving() };
    let cancel = CancelFlag::default();
    let ended = world.attempt_with(&network, None, &receiving, &options, &cancel, &mut Quiet, &mut Quiet);
    world.assert_moved(&ended);
    let report = ended.sent.unwrap();
    assert_eq!(report.resumes, u32::from(cut.is_some()), "{cut:?}");
    assert!(report.verify_us > 0);
}

#[test]
fn a_difference_is_named_once_all_parts_were_compared() {
    for space in [0, 130, 299] {
        let mut world = large(u64::from(space));
        world.site = Site::with_broken((SpaceId(space), 4097, 1));
        let ended = attempt(&world, &Options { packs: Packs::Never, ..verifying() });
        let Error::PeerFailed { reason } = ended.error() else { panic!("{}", ended.error()) };
        let named = format!("pages 0 to 1 of space {space}, and 1 of 300 stripes");
        assert!(reason.contains(&named), "{reason}");
        world.site = Site::default();
        world.assert_stayed_and_moves_next(&ended);
    }
}

/// A sender of a workload of zeros, behind its last page.
fn silent_pages(peer: &mut Peer) -> &mut Peer {
    peer.accepted();
    for stream in [0, 1] {
        drop(peer.stream(&[&preamble(stream), &end(0)]));
    }
    peer
}

/// Digests of as many stripes of zeros.
fn digests(peer: &mut Peer, first: u64, stripes: usize) -> &mut Peer {
    peer.say(&Downstream::Verify { last_round: 0, first }, &vec![0; stripes * 32])
}

#[test]
fn digests_come_in_as_many_parts_as_the_sender_likes() {
    for parts in [&[4][..], &[1, 3], &[2, 1, 1]] {
        let (result, witness) = receive_from(20 * SECOND, move |peer| {
            silent_pages(peer);
            let mut first = 0;
            for part in parts {
                digests(peer, first, *part);
                first += *part as u64;
                assert_eq!(peer.hear(), Some(Upstream::Verified { stripes: first }));
            }
            peer.say(&Downstream::State { last_round: 0 }, &state());
            assert_eq!(peer.hear(), Some(Upstream::Ready));
            peer.say(&Downstream::Commit { migration: offer().migration }, &[]);
            assert!(matches!(peer.hear(), Some(Upstream::Started { .. })));
            peer.say(&Downstream::Done { migration: offer().migration }, &[]);
        });
        assert!(result.is_ok(), "{result:?}");
        assert!(witness.is_running(Who::Destination));
    }
}

#[test]
fn digests_that_cannot_be_end_the_migration() {
    type Sender = Box<dyn FnOnce(&mut Peer) + Send>;
    let verify = |last_round, first, bytes: usize| -> Sender {
        Box::new(move |peer: &mut Peer| {
            let message = Downstream::Verify { last_round, first };
            silent_pages(peer).say(&message, &vec![0; bytes]).hear::<Upstream>();
        })
    };
    let behind = |stripes: usize, message: Downstream| -> Sender {
        Box::new(move |peer: &mut Peer| {
            digests(silent_pages(peer), 0, stripes).hear::<Upstream>();
            peer.say(&message, &[0; 32]).hear::<Upstream>();
        })
    };
    let length = "the length of the digests";
    let cases: Vec<(&str, Sender)> = vec![
        (length, verify(0, 0, 0)),
        (length, verify(0, 0, 33)),
        (length, verify(0, 0, 5 * 32)),
        (length, verify(0, 0, 129 * 32)),
        ("RoundSent or State of this round", verify(1, 0, 32)),
        ("RoundSent or State of this round", verify(0, 1, 32)),
        ("memory differs", behind_ones()),
        ("Verify of the stripes that follow", behind(3, Downstream::State { last_round: 0 })),
        ("Verify of the stripes that follow", behind(3, Downstream::Verify { last_round: 0, first: 2 })),
        ("Verify of the stripes that follow", behind(3, Downstream::Verify { last_round: 1, first: 3 })),
        ("State of this round", behind(4, Downstream::Verify { last_round: 0, first: 5 })),
        (length, behind(4, Downstream::Verify { last_round: 0, first: 4 })),
        (
            "RoundSent or State of this round",
            Box::new(|peer| {
                peer.greet(&Downstream::Hello(older())).say(&Downstream::Offer(offer()), b"machine");
                peer.skip_preamble();
                assert!(matches!(peer.hear(), Some(Upstream::Hello(_))));
                assert_eq!(peer.hear(), Some(Upstream::Accept));
                for stream in [0, 1] {
                    drop(peer.stream(&[&preamble(stream), &end(0)]));
                }
                digests(peer, 0, 4).hear::<Upstream>();
            }),
        ),
    ];
    for (expected, sender) in cases {
        let error = assert_not_received(expected, 20 * SECOND, sender).to_string();
        assert!(error.contains(expected), "{expected:?} is not in {error:?}");
    }
}

/// A sender whose memory is not what it sent.
fn behind_ones() -> Box<dyn FnOnce(&mut Peer) + Send> {
    Box::new(|peer| {
        silent_pages(peer).say(&Downstream::Verify { last_round: 0, first: 0 }, &[1; 4 * 32]);
        let Some(Upstream::Failed { reason }) = peer.hear() else { panic!("not told") };
        assert!(reason.contains("pages 0 to 511 of space 0, and 4 of 4 stripes"), "{reason}");
    })
}

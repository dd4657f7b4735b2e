//! Disks that go with a workload are spaces like memory: the same rounds, cuts and failures, and no page of them is ever missing.

use crate::cuts::any_cut;
use crate::harness::{SECOND, World, layout, receiving, sending};
use crate::hostile::Peer;
use migrate::cancel::CancelFlag;
use migrate::converge::{OnStall, OnTimeout};
use migrate::destination::scripted as place;
use migrate::error::Error;
use migrate::inbound;
use migrate::link::duplex::{Network, Profile, pair};
use migrate::outbound::{self, Options};
use migrate::report::{Phase, Quiet};
use migrate::source::scripted::Who;
use proptest::prelude::*;
use protocol::control::{Downstream, Upstream};
use protocol::handshake::{DISKS, Hello};
use protocol::layout::{Layout, Space, SpaceKind};
use protocol::page::SpaceId;

/// Memory as the others have it, and a disk of several stripes behind it.
fn with_disk() -> Layout {
    let mut layout = layout();
    let (id, pages) = (SpaceId(layout.spaces.len() as u16), 1300);
    layout.spaces.push(Space { id, kind: SpaceKind::Disk, pages, guest_address: 0 });
    layout
}

fn world(seed: u64, pages_per_call: u64) -> World {
    World::of(with_disk(), "scripted", seed, pages_per_call)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_disk_arrives_as_it_was_at_the_freeze_or_the_workload_stays(
        seed in any::<u64>(),
        pages_per_call in 0_u64..4,
        cuts in proptest::collection::vec(any_cut(), 0..3),
        fail_at in proptest::option::of(proptest::sample::select(&place::Call::ALL[..])),
        verify in any::<bool>(),
        retries in any::<bool>(),
    ) {
        let world = world(seed, pages_per_call);
        let network = Network::new(Profile { seed, ..Profile::default() }, cuts.into_iter().map(Some).collect::<Vec<_>>());
        let mut options = Options { verify, ..sending() };
        options.controls.change(|limits| limits.downtime = 60 * SECOND);
        let mut receiving = receiving();
        if retries {
            (options.retry, receiving.keep) = (5 * SECOND, 5 * SECOND);
        }
        let cancel = CancelFlag::default();
        let ended = world.attempt_with(&network, fail_at, &receiving, &options, &cancel, &mut Quiet, &mut Quiet);
        match &ended.sent {
            Ok(report) => {
                world.assert_moved(&ended);
                prop_assert_eq!(report.disk_bytes, 1300 * 4096);
            }
            Err(_) => world.assert_stayed_and_moves_next(&ended),
        }
    }
}

#[test]
fn a_workload_with_a_disk_never_starts_without_its_last_pages() {
    for seed in 0..4 {
        let world = world(seed, 4);
        let options = sending();
        options.controls.change(|limits| {
            limits.downtime = std::time::Duration::from_micros(1);
            limits.on_stall = vec![OnStall::PostCopy];
            limits.on_timeout = OnTimeout::Force;
        });
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
        world.assert_moved(&ended);
        let phases = ended.sent.as_ref().unwrap().phases.iter().map(|time| time.phase);
        assert!(!phases.into_iter().any(|phase| phase == Phase::PostCopy));
    }
    let world = world(9, 1);
    let options = sending();
    options.controls.change(|limits| limits.post_copy_after = Some(1));
    let network = Network::new(Profile::default(), None);
    let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
    assert!(matches!(ended.error(), Error::Usage(text) if text.contains("--post-copy")), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn a_destination_that_knows_no_disks_is_told_nothing_of_the_workload() {
    let world = world(4, 2);
    let (here, there, _) = pair(&Profile::default(), None);
    let (sent, offered) = std::thread::scope(|scope| {
        let receiver = scope.spawn(move || {
            let mut older = Hello::ours();
            older.capabilities.retain(|name| name != DISKS);
            let mut peer = Peer(Box::new(there));
            peer.greet(&Upstream::Hello(older)).skip_preamble();
            assert!(matches!(peer.hear(), Some(Downstream::Hello(_))));
            peer.hear::<Downstream>()
        });
        let sent = outbound::send(
            world.machine.attach(),
            Box::new(here),
            &mut || Err(Error::Link("nobody answers".into())),
            &sending(),
            &CancelFlag::default(),
            &mut Quiet,
        );
        (sent, receiver.join().unwrap())
    });
    let error = sent.unwrap_err().error;
    assert!(matches!(error.root(), Error::Usage(text) if text.contains("--copy-disk")), "{error}");
    assert!(!matches!(offered, Some(Downstream::Offer(_))), "{offered:?}");
    assert!(world.witness.is_running(Who::Source));
}

#[test]
fn disks_do_not_count_as_memory() {
    let world = world(5, 0);
    let network = Network::new(Profile::default(), None);
    let receiving = inbound::Options { max_memory_bytes: layout().memory_bytes(), ..receiving() };
    let cancel = CancelFlag::default();
    let ended = world.attempt_with(&network, None, &receiving, &sending(), &cancel, &mut Quiet, &mut Quiet);
    world.assert_moved(&ended);
}

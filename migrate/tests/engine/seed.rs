//! A destination that begins with a checkpoint ends with the source's memory all the same.

use crate::harness::{Ended, SECOND, World, layout, receiving, sending};
use migrate::cancel::CancelFlag;
use migrate::checkpoint;
use migrate::link::duplex::{Cut, Direction, Network, Profile};
use migrate::report::Quiet;
use migrate::seed::{Seed, Stores};
use migrate::source::Dirty;
use migrate::store::{MemoryStore, Store};
use migrate::vault::{Vault, new_id};
use proptest::prelude::*;
use protocol::checkpoint::name::{self, CheckpointId};
use std::sync::Arc;

fn vault() -> (Vault, Arc<MemoryStore>) {
    let store = Arc::new(MemoryStore::new());
    (Vault::create(store.clone(), None).unwrap(), store)
}

/// A network whose first link is cut behind so many bytes.
fn network(cut: Option<u64>) -> Network {
    Network::new(Profile::default(), cut.map(|at| Some(Cut::Bytes(Direction::Down, at))))
}

/// Takes a checkpoint of the world's machine.
fn take(world: &World, vault: &Vault, full: bool) -> CheckpointId {
    let mut options = checkpoint::Options::new(new_id().unwrap());
    options.full = full;
    let lease = vault.store().lock("a test").unwrap();
    checkpoint::take(
        world.machine.attach(),
        vault,
        lease.as_ref(),
        &options,
        &CancelFlag::default(),
        &mut Quiet,
    )
    .unwrap();
    options.id
}

/// Moves it with a destination that can read this store.
fn attempt(
    world: &World,
    network: &Network,
    seed: Option<Seed>,
    there: Option<&Vault>,
    retry: bool,
) -> Ended {
    let mut from = sending();
    from.seed = seed.map(Arc::new);
    let mut to = receiving();
    to.seeds = there.map(|vault| Stores::new(vec![vault.clone()]));
    if retry {
        (from.retry, to.keep) = (10 * SECOND, 20 * SECOND);
    }
    world.attempt_with(network, None, &to, &from, &CancelFlag::default(), &mut Quiet, &mut Quiet)
}

fn seed(vault: &Vault, id: CheckpointId) -> Seed {
    Seed::open(vault, id, &layout(), &CancelFlag::default()).unwrap()
}

/// The machine is tracked from a checkpoint on no more.
fn forget_baseline(world: &World) {
    take(world, &vault().0, true);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn memory_is_the_sources_whatever_it_began_with(
        number in any::<u64>(),
        pages_per_call in 0u64..6,
        deltas in 0usize..3,
        tracked in any::<bool>(),
        cut in proptest::option::weighted(0.4, 1_000u64..3_000_000),
    ) {
        let world = World::new(number, pages_per_call);
        let (vault, _) = vault();
        let mut id = take(&world, &vault, true);
        for _ in 0..deltas {
            id = take(&world, &vault, false);
        }
        if !tracked {
            forget_baseline(&world);
        }
        let network = network(cut);
        let ended = attempt(&world, &network, Some(seed(&vault, id)), Some(&vault), cut.is_some());
        match &ended.sent {
            Ok(report) => {
                prop_assert!(world.witness.memory_arrived() && !world.witness.saw_two());
                prop_assert!(report.seeded_pages > 0);
            }
            // A cut that was too much for it: the machine runs on here.
            Err(_) => prop_assert!(cut.is_some()),
        }
    }
}

#[test]
fn what_is_there_is_not_sent() {
    for tracked in [true, false] {
        let world = World::new(5, 0);
        let (vault, _) = vault();
        let id = take(&world, &vault, true);
        if !tracked {
            forget_baseline(&world);
        }
        let network = network(None);
        let report = attempt(&world, &network, Some(seed(&vault, id)), Some(&vault), false).sent.unwrap();
        assert!(world.witness.memory_arrived());
        assert!(report.seeded_pages > 200 && report.sent_pages < 20, "{report:?}");
    }
}

#[test]
fn a_checkpoint_that_is_not_there_or_damaged_or_another_is_no_reason_to_refuse() {
    for damage in 0..4 {
        let world = World::new(9, 1);
        let (vault, store) = vault();
        let id = take(&world, &vault, true);
        let seed = seed(&vault, id);
        let (other, _) = self::vault();
        let there = match damage {
            0 => None,
            1 => Some(&other),
            2 => {
                store.delete(&name::manifest(id)).unwrap();
                Some(&vault)
            }
            _ => {
                let name = name::segment(id, 0);
                let reader = store.open(&name).unwrap();
                let mut bytes = vec![0; reader.bytes() as usize];
                reader.read_at(0, &mut bytes).unwrap();
                let last = bytes.len() - 1;
                bytes[last] ^= 1;
                store.delete(&name).unwrap();
                store.put(&name, &bytes).unwrap();
                Some(&vault)
            }
        };
        let network = network(None);
        let report = attempt(&world, &network, Some(seed), there, false).sent.unwrap();
        assert!(world.witness.memory_arrived(), "{damage}");
        assert_eq!(report.seeded_pages, 0, "{damage}");
    }
}

#[test]
fn a_failed_attempt_leaves_the_next_one_right() {
    let world = World::new(11, 3);
    let (vault, _) = vault();
    let id = take(&world, &vault, true);
    let cut = network(Some(20_000));
    let ended = attempt(&world, &cut, Some(seed(&vault, id)), Some(&vault), false);
    assert!(ended.sent.is_err());
    let mut source = world.machine.attach();
    source.track(Dirty::SinceBaseline).unwrap();
    source.resume().unwrap();
    let network = network(None);
    attempt(&world, &network, Some(seed(&vault, id)), Some(&vault), false).sent.unwrap();
    assert!(world.witness.memory_arrived());
}

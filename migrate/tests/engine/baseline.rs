//! A source that is tracked from a checkpoint on: what fails in between changes nothing of it.

use crate::harness::{SECOND, World, layout, sending};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::error::Error;
use migrate::estimate;
use migrate::link::duplex::{Network, Profile};
use migrate::report::Quiet;
use migrate::source::scripted::{Call, Machine};
use migrate::source::{Dirty, Source};
use proptest::prelude::*;
use protocol::checkpoint::name::CheckpointId;
use protocol::page::SpaceId;

/// A checkpoint's memory.
type Shelf = Vec<Vec<u8>>;

fn empty() -> Shelf {
    layout().spaces.iter().map(|space| vec![0xEE; space.pages as usize * 4096]).collect()
}

/// One round onto the shelf: how many pages that were.
fn round(source: &mut dyn Source, shelf: &mut Shelf) -> u64 {
    let mut pages = 0;
    for (space, dirty) in (0..).map(SpaceId).zip(source.harvest().unwrap()) {
        for run in dirty.runs(space, 64) {
            source.take(space, run.first, run.count.into()).unwrap();
            let at = run.offset() as usize;
            source.read(run, &mut shelf[usize::from(space.0)][at..at + run.bytes()]).unwrap();
            pages += u64::from(run.count);
        }
    }
    pages
}

/// Rounds, a freeze, a last round: the shelf has the memory of that instant. Answers how many pages that took.
fn checkpoint(machine: &Machine, number: u32, dirty: Dirty, shelf: &mut Shelf) -> u64 {
    let mut source = machine.attach();
    source.track(dirty).unwrap();
    let mut pages = round(source.as_mut(), shelf);
    source.freeze().unwrap();
    pages += round(source.as_mut(), shelf);
    assert!(machine.memory() == *shelf, "the shelf is not the memory of that instant");
    source.set_baseline(CheckpointId::new(0, number)).unwrap();
    assert_eq!(source.baseline(), Some(CheckpointId::new(0, number)));
    source.resume().unwrap();
    pages
}

#[test]
fn without_a_baseline_everything_is_dirty() {
    let world = World::new(1, 2);
    let mut source = world.machine.attach();
    source.track(Dirty::SinceBaseline).unwrap();
    assert_eq!(source.baseline(), None);
    assert_eq!(source.harvest().unwrap()[0].count(), 1100);
}

/// What comes between two checkpoints.
#[derive(Debug, Clone, Copy)]
enum Between {
    /// A move whose source fails at this call.
    SourceFails(Call),
    /// A move whose destination fails at this call.
    DestinationFails(place::Call),
    /// A look at how fast it writes.
    Estimate,
    /// A checkpoint that takes pages and dies.
    Dies { dirty: Dirty, frozen: bool },
}

fn happen(world: &World, between: Between) {
    match between {
        Between::SourceFails(call) => {
            world.machine.on_call(move |now, _| {
                if now == call { Err(Error::Workload(format!("{call:?} fails"))) } else { Ok(()) }
            });
            world.move_it().sent.unwrap_err();
            world.machine.heal();
        }
        Between::DestinationFails(call) => {
            let network = Network::new(Profile::default(), None);
            let cancel = CancelFlag::default();
            world.attempt(&network, Some(call), &sending(), &cancel, &mut Quiet).sent.unwrap_err();
        }
        Between::Estimate => {
            estimate::watch(world.machine.attach(), SECOND / 100, &CancelFlag::default()).unwrap();
        }
        Between::Dies { dirty, frozen } => {
            let mut source = world.machine.attach();
            source.track(dirty).unwrap();
            round(source.as_mut(), &mut empty());
            if frozen {
                source.freeze().unwrap();
            }
        }
    }
}

fn between() -> impl Strategy<Value = Between> {
    use Call::{Freeze, Harvest, Pledge, Read, State, Take, Track};
    let dirty = prop_oneof![Just(Dirty::Everything), Just(Dirty::SinceBaseline)];
    prop_oneof![
        proptest::sample::select(vec![Track, Harvest, Take, Read, Freeze, State, Pledge])
            .prop_map(Between::SourceFails),
        proptest::sample::select(vec![place::Call::Prepare, place::Call::Load])
            .prop_map(Between::DestinationFails),
        Just(Between::Estimate),
        (dirty, any::<bool>()).prop_map(|(dirty, frozen)| Between::Dies { dirty, frozen }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn whatever_fails_between_two_checkpoints_the_second_has_exactly_what_changed(
        seed in any::<u64>(),
        pages_per_call in 0..2_u64,
        between in prop::collection::vec(prop::collection::vec(between(), 0..3), 1..4),
    ) {
        let world = World::new(seed, pages_per_call);
        let mut shelf = empty();
        checkpoint(&world.machine, 0, Dirty::SinceBaseline, &mut shelf);
        for (number, events) in (1..).zip(between) {
            for event in events {
                happen(&world, event);
                prop_assert_eq!(world.machine.baseline(), Some(CheckpointId::new(0, number - 1)));
            }
            // What is dirty now, and what the guest writes meanwhile: a page a call, and three where a page is taken and read.
            let lacking: u64 = world.machine.lacking().iter().map(|set| set.count()).sum();
            let pages = checkpoint(&world.machine, number, Dirty::SinceBaseline, &mut shelf);
            prop_assert!(pages <= (lacking + 5 * (lacking + 4)) * pages_per_call, "{} pages for {} that changed", pages, lacking);
        }
    }
}

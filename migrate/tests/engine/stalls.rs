//! Workloads that write faster than the link carries.

use crate::harness::{World, sending};
use migrate::cancel::CancelFlag;
use migrate::converge::{Limits, OnStall, OnTimeout};
use migrate::error::Error;
use migrate::estimate::watch;
use migrate::link::duplex::{Network, Profile};
use migrate::outbound::Options;
use migrate::report::{Quiet, RoundReport};
use migrate::source::scripted::{Call, Who};
use std::time::Duration;

/// A round of all that [`World`] writes takes about a quarter of a second.
fn slow() -> Network {
    Network::new(Profile { bytes_per_s: 10_000_000, ..Profile::default() }, None)
}

fn stalling(on_stall: &[OnStall]) -> Options {
    let limits = Limits {
        downtime: Duration::from_nanos(1),
        max_downtime: Duration::from_secs(60),
        on_stall: on_stall.to_vec(),
        on_timeout: OnTimeout::Cancel,
        max_throttle_percent: 50,
        ..Limits::default()
    };
    Options { controls: migrate::controls::Controls::new(limits), ..sending() }
}

fn throttles(rounds: &[RoundReport]) -> Vec<u8> {
    let mut percents: Vec<u8> = rounds.iter().map(|round| round.throttle_percent).collect();
    percents.dedup();
    percents
}

#[test]
fn a_workload_is_slowed_down_to_the_bound_and_runs_freely_when_it_stays() {
    let world = World::new(3, 400);
    let options = stalling(&[OnStall::Throttle, OnStall::Cancel]);
    let ended = world.attempt(&slow(), None, &options, &CancelFlag::default(), &mut Quiet);
    assert!(matches!(ended.error(), Error::NotConverged(_)), "{}", ended.error());
    assert!(ended.error().to_string().contains("--on-stall"), "{}", ended.error());
    let percents = throttles(&ended.sent.as_ref().unwrap_err().report.rounds);
    assert!(percents.is_sorted() && percents.first() == Some(&0), "{percents:?}");
    assert_eq!(percents.last(), Some(&50), "{percents:?}");
    assert_eq!(world.machine.throttle_percent(), 0);
    world.assert_stayed_and_moves_next(&ended);
}

#[test]
fn a_stalled_workload_moves_at_a_minimum() {
    let world = World::new(4, 400);
    let options = stalling(&OnStall::IN_ORDER);
    let ended = world.attempt(&slow(), None, &options, &CancelFlag::default(), &mut Quiet);
    world.assert_moved(&ended);
    let report = ended.sent.unwrap();
    assert!(report.warnings.iter().any(|warning| warning.contains("minimum")), "{:?}", report.warnings);
    assert_eq!(throttles(&report.rounds), [0], "a minimum comes before any throttle");
}

#[test]
fn a_workload_that_was_watched_runs_on_and_moves_as_any_other() {
    let world = World::new(6, 3);
    let watched = watch(world.machine.attach(), Duration::from_millis(100), &CancelFlag::default()).unwrap();
    assert_eq!(watched.intervals.len(), 5);
    assert!(watched.present_pages > 300 && watched.present_pages < 1170, "{watched:?}");
    assert!(watched.intervals.iter().all(|interval| interval.dirty_pages > 0), "{watched:?}");
    let cancel = CancelFlag::default();
    cancel.set();
    assert!(watch(world.machine.attach(), Duration::from_secs(60), &cancel).is_err());
    for call in [Call::Track, Call::Harvest, Call::Take, Call::Present] {
        world.machine.on_call(move |now, _| match now == call {
            true => Err(Error::Workload(format!("{call:?} fails"))),
            false => Ok(()),
        });
        assert!(watch(world.machine.attach(), Duration::from_millis(100), &CancelFlag::default()).is_err());
        world.machine.heal();
        assert!(world.witness.is_running(Who::Source), "{call:?}");
    }
    world.assert_moved(&world.move_it());
}

#[test]
fn a_workload_that_cannot_be_slowed_down_stays() {
    let world = World::new(5, 400);
    world.machine.on_call(|call, _| match call {
        Call::Throttle => Err(Error::Workload("Throttle fails, as the script says".into())),
        _ => Ok(()),
    });
    let options = stalling(&[OnStall::Throttle]);
    let ended = world.attempt(&slow(), None, &options, &CancelFlag::default(), &mut Quiet);
    assert!(ended.error().to_string().contains("Throttle fails"), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

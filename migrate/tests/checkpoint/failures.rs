//! Whatever fails: no checkpoint, nothing lost, and the next one is right.

use crate::harness::{World, options};
use migrate::cancel::CancelFlag;
use migrate::error::Error;
use migrate::report::{Event, Observer};
use migrate::source::scripted::{Call, Who};
use migrate::store::Store as _;
use protocol::checkpoint::name::DATA;
use std::time::Duration;

/// Behind an attempt that failed: the machine runs, its baseline is what it was, and a delta on it is right.
fn assert_harmless(world: &World, before: Option<protocol::checkpoint::name::CheckpointId>, what: &str) {
    assert!(world.witness.is_running(Who::Source), "{what}: it stands still");
    assert_eq!(world.machine.throttle_percent(), 0);
    assert_eq!(world.machine.baseline(), before, "{what}");
    let next = world.take_soundly(&options());
    assert_eq!(next.parent, before, "{what}");
}

#[test]
fn every_failing_call_of_the_source_leaves_it_running_and_the_next_checkpoint_right() {
    let calls = [
        Call::Track,
        Call::Harvest,
        Call::Take,
        Call::Present,
        Call::Read,
        Call::Freeze,
        Call::State,
        Call::Thaw,
    ];
    for (round, call) in calls.into_iter().enumerate() {
        for nth in [0, 1, 5] {
            let what = format!("{call:?} {nth}");
            let world = World::new(round as u64 * 8 + u64::from(nth), 6);
            let before = (nth == 1).then(|| world.take_soundly(&options()).id);
            world.machine.on_call(move |made, number| {
                if made == call && number == nth { Err(Error::Workload("it says no".into())) } else { Ok(()) }
            });
            match world.take(&options()) {
                // It was never called so often.
                Ok(report) => {
                    world.machine.heal();
                    world.assert_sound(&report);
                    world.take_soundly(&options());
                }
                Err(failed) => {
                    assert!(failed.error.to_string().contains("it says no"), "{what}: {failed}");
                    assert!(!failed.report.committed);
                    world.machine.heal();
                    assert_harmless(&world, before, &what);
                }
            }
        }
    }
}

#[test]
fn every_failing_change_of_the_store_leaves_no_checkpoint_and_the_next_one_right() {
    let mut last = None;
    for changes in 0.. {
        let world = World::new(changes, 4);
        let before = changes.is_multiple_of(2).then(|| world.take_soundly(&options()).id);
        let committed = world.committed();
        world.store.fail_behind(changes);
        let taken = world.take(&options());
        let failed = world.store.mend();
        match taken {
            Err(error) => {
                let what = format!("change {changes}: {error}");
                assert!(failed && error.to_string().contains("no space"), "{what}");
                assert_eq!(world.committed(), committed, "{what}");
                assert_harmless(&world, before, &what);
                last = Some(changes);
            }
            // Everything that it needs succeeded.
            Ok(report) => {
                world.assert_sound(&report);
                break;
            }
        }
    }
    assert!(last >= Some(8), "only {last:?} changes of the store were tried");
}

#[test]
fn a_failed_checkpoint_leaves_nothing_behind_in_a_store_that_works() {
    let world = World::new(21, 4);
    world.machine.on_call(|call, _| match call {
        Call::State => Err(Error::Workload("it says no".into())),
        _ => Ok(()),
    });
    let failed = world.take(&options()).unwrap_err();
    assert!(failed.report.pause_us > 0);
    assert!(world.store.list(DATA).unwrap().is_empty(), "{:?}", world.store.list(DATA).unwrap());
    assert!(world.store.leftovers().unwrap().is_empty(), "{:?}", world.store.leftovers().unwrap());
}

#[test]
fn a_slow_store_takes_its_time_and_the_machine_runs_meanwhile() {
    const EACH: Duration = Duration::from_millis(150);
    let world = World::new(5, 3);
    world.take_soundly(&options());
    world.store.slow_down(EACH);
    let report = world.take_soundly(&options());
    // A segment, its pages and its end, index, state and manifest: none of it in the pause.
    assert!(report.total_us >= 5 * EACH.as_micros() as u64, "{report:#?}");
    assert!(report.pause_us < EACH.as_micros() as u64, "{report:#?}");
}

#[test]
fn a_lost_baseline_answer_only_costs_the_next_delta_its_size() {
    let world = World::new(31, 4);
    let first = world.take_soundly(&options());
    world.machine.on_call(|call, _| match call {
        Call::Baseline => Err(Error::Workload("it says no".into())),
        _ => Ok(()),
    });
    let second = world.take(&options()).unwrap();
    // A machine that is busy may have made the pause longer than it was predicted, which is another warning.
    let told = second.warnings.iter().filter(|warning| warning.ends_with("it says no")).count();
    assert!(second.committed && told == 1, "{second:#?}");
    world.machine.heal();
    assert_eq!(world.machine.baseline(), Some(first.id));
    let third = world.take_soundly(&options());
    assert_eq!(third.parent, Some(first.id));
}

/// Cancels when a phase begins.
struct CancelsAt {
    phase: &'static str,
    flag: CancelFlag,
    stopped: Option<bool>,
}

impl Observer for CancelsAt {
    fn event(&mut self, event: &Event) {
        if let Event::Phase { phase } = event
            && phase.name() == self.phase
        {
            self.stopped = Some(self.flag.set());
        }
    }
}

#[test]
fn cancelled_in_any_phase_it_changes_nothing() {
    for phase in ["track", "rounds", "freeze", "state", "write", "commit", "settle"] {
        let world = World::new(41, 5);
        let before = Some(world.take_soundly(&options()).id);
        let flag = CancelFlag::default();
        let mut observer = CancelsAt { phase, flag: flag.clone(), stopped: None };
        match world.take_with(&options(), &flag, &mut observer) {
            Err(failed) => {
                assert!(matches!(failed.error.root(), Error::Interrupted(_)), "{phase}: {failed}");
                assert_eq!(world.committed(), 1);
                assert_harmless(&world, before, phase);
            }
            Ok(report) => {
                assert_eq!((phase, observer.stopped), ("settle", Some(false)));
                world.assert_sound(&report);
            }
        }
    }
}

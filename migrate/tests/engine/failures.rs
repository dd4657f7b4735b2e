//! Ends that fail, and operators who change their minds.

use crate::harness::{World, sending};
use migrate::cancel::CancelFlag;
use migrate::destination::scripted as place;
use migrate::error::Error;
use migrate::link::duplex::{Network, Profile};
use migrate::report::{Event, Observer, Outcome, Phase, Quiet};
use migrate::source::scripted::{Call, Who};
use protocol::control::RefuseCode;

fn fail_at(world: &World, call: Call, number: u32) {
    world.machine.on_call(move |now, count| {
        if now == call && count >= number {
            return Err(Error::Workload(format!("{call:?} fails, as the script says")));
        }
        Ok(())
    });
}

#[test]
fn a_failing_source_call_leaves_the_workload_running_with_its_dirty_bits() {
    use Call::{Freeze, Harvest, Pledge, Present, Read, State, Take, Track};
    for call in [Track, Harvest, Take, Present, Read, Freeze, State, Pledge] {
        for number in [0, 1, 5] {
            let world = World::new(u64::from(number), 2);
            fail_at(&world, call, number);
            let ended = world.move_it();
            if ended.sent.is_ok() {
                // So often it was not called.
                assert!(number > 0, "{call:?} {number}");
                assert!(world.machine.calls().get(&call).is_none_or(|calls| *calls <= number));
                continue;
            }
            assert!(matches!(ended.error(), Error::Workload(_)), "{}", ended.error());
            world.assert_stayed_and_moves_next(&ended);
        }
    }
}

#[test]
fn a_source_that_cannot_be_ended_is_a_warning_because_the_destination_runs() {
    let world = World::new(0, 2);
    fail_at(&world, Call::HandOver, 0);
    let ended = world.move_it();
    assert!(world.witness.is_running(Who::Destination) && !world.witness.is_running(Who::Source));
    assert!(world.witness.memory_arrived() && !world.witness.saw_two());
    let report = ended.sent.unwrap();
    assert_eq!(report.outcome, Outcome::Moved);
    assert!(report.warnings.iter().any(|warning| warning.contains("HandOver fails")), "{report:?}");
}

#[test]
fn a_source_that_cannot_resume_says_so() {
    let world = World::new(0, 2);
    world.machine.on_call(|call, _| match call {
        Call::State | Call::Resume => Err(Error::Workload(format!("{call:?} fails"))),
        _ => Ok(()),
    });
    let ended = world.move_it();
    assert!(matches!(ended.error(), Error::NotResumed { .. }), "{}", ended.error());
    let text = ended.error().to_string();
    assert!(text.contains("State fails") && text.contains("Resume fails"), "{text}");
}

#[test]
fn dirty_bits_that_cannot_be_given_back_do_not_keep_the_workload_from_resuming() {
    let world = World::new(0, 2);
    world.machine.on_call(|call, _| match call {
        Call::State | Call::Redirty => Err(Error::Workload(format!("{call:?} fails"))),
        _ => Ok(()),
    });
    assert!(world.move_it().sent.is_err());
    assert!(world.witness.is_running(Who::Source));
    world.machine.heal();
    world.assert_moved(&world.move_it());
}

#[test]
fn a_failing_destination_call_leaves_the_workload_at_the_source_with_the_reason() {
    // What only post-copy calls is tested there.
    for call in place::Call::ALL.into_iter().filter(|call| *call != place::Call::Expect) {
        // Zeros are sent for pages that were written as zeros, so every machine has some.
        let world = World::new(11, 2);
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, Some(call), &sending(), &CancelFlag::default(), &mut Quiet);
        let error = ended.error();
        match call {
            place::Call::Prepare => {
                assert!(matches!(error, Error::Refused { code: RefuseCode::Host, .. }), "{error}");
            }
            _ => assert!(matches!(error, Error::PeerFailed { .. }), "{call:?}: {error}"),
        }
        assert!(error.to_string().contains(&format!("{call:?} fails")), "{error}");
        world.assert_stayed_and_moves_next(&ended);
    }
}

/// Cancels when a phase begins.
struct Canceller(Phase, CancelFlag);

impl Observer for Canceller {
    fn event(&mut self, event: &Event) {
        if *event == (Event::Phase { phase: self.0 }) {
            self.1.set();
        }
    }
}

#[test]
fn cancelled_in_any_phase_before_commit_the_workload_stays() {
    use Phase::{Freeze, Greet, Offer, Pledge, Ready, Rounds, State, Track};
    for phase in [Greet, Offer, Track, Rounds, Freeze, State, Ready, Pledge] {
        let world = World::new(5, 2);
        let cancel = CancelFlag::default();
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, None, &sending(), &cancel, &mut Canceller(phase, cancel.clone()));
        assert!(matches!(ended.error(), Error::Interrupted(_)), "{phase:?}: {}", ended.error());
        let told = ended.received.iter().find_map(|arrival| arrival.as_ref().err());
        let heard = matches!(told.map(Error::root), Some(Error::PeerFailed { reason }) if reason.contains("interrupted"));
        // Cancelled that early, the sender may be gone before the receiver has said who it is.
        assert!(heard || phase == Greet, "{phase:?}: {told:?}");
        world.assert_stayed_and_moves_next(&ended);
    }
}

#[test]
fn cancelled_behind_commit_the_workload_moves() {
    for phase in [Phase::Commit, Phase::Settle] {
        let world = World::new(5, 2);
        let cancel = CancelFlag::default();
        let network = Network::new(Profile::default(), None);
        let ended = world.attempt(&network, None, &sending(), &cancel, &mut Canceller(phase, cancel.clone()));
        assert!(!cancel.set(), "it is too late");
        world.assert_moved(&ended);
        let phases = &ended.sent.as_ref().unwrap().phases;
        assert!(phases.iter().all(|time| time.phase != Phase::Ask), "{phases:?}");
    }
}

#[test]
fn a_workload_that_does_not_converge_stays_or_is_forced() {
    use migrate::converge::OnTimeout;
    let world = World::new(5, 8);
    let network = Network::new(Profile { bytes_per_s: 100_000_000, ..Profile::default() }, None);
    let options = sending();
    options.controls.change(|limits| limits.downtime = std::time::Duration::from_nanos(1));
    options.controls.change(|limits| limits.on_timeout = OnTimeout::Cancel);
    let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
    assert!(matches!(ended.error(), Error::NotConverged(_)), "{}", ended.error());
    let Err(failed) = &ended.sent else { panic!() };
    assert_eq!(failed.report.rounds.len(), 6);
    assert!(world.witness.is_running(Who::Source));

    let mut forced = sending();
    forced.controls = migrate::controls::Controls::new(options.limits());
    forced.controls.change(|limits| limits.on_timeout = OnTimeout::Force);
    let ended = world.attempt(&network, None, &forced, &CancelFlag::default(), &mut Quiet);
    world.assert_moved(&ended);
    assert!(ended.sent.unwrap().warnings.iter().any(|warning| warning.contains("downtime budget")));
}

#[test]
fn a_migration_that_takes_too_long_is_stopped_in_the_middle_of_a_round() {
    let world = World::new(5, 0);
    let network = Network::new(Profile { bytes_per_s: 1_000_000, ..Profile::default() }, None);
    let options = sending();
    options.controls.change(|limits| limits.timeout = std::time::Duration::from_millis(50));
    options.controls.change(|limits| limits.on_timeout = migrate::converge::OnTimeout::Cancel);
    let ended = world.attempt(&network, None, &options, &CancelFlag::default(), &mut Quiet);
    assert!(matches!(ended.error(), Error::NotConverged(_)), "{}", ended.error());
    world.assert_stayed_and_moves_next(&ended);
}

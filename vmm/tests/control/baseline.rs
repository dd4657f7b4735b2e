//! A checkpoint as the baseline: what the VMM knows between sessions.

use super::{
    Client, LIMIT, Layout, MEMORY, MIGRATION, Memory, Phase, Role, Running, connect, kvm, round, test_images,
    wait_until,
};
use protocol::{checkpoint::name::CheckpointId, page::PageSet};
use std::os::unix::fs::FileExt;

/// More pages than the guest of [`test_images::counter`] writes, and far fewer than it has.
const FEW: u64 = 64;

fn name(number: u32) -> CheckpointId {
    CheckpointId::new(1_795_463_311, number)
}

/// A place for a checkpoint's memory.
fn shelf() -> Memory {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MEMORY).unwrap();
    Memory(file)
}

/// Rounds, a freeze, a last round: the memory of one instant is on the shelf. Answers how many pages that were.
fn checkpoint(session: &mut Client, layout: &Layout, memory: &Memory, shelf: &Memory) -> u64 {
    let mut pages = round(session, layout, memory, shelf);
    session.freeze().unwrap();
    pages += round(session, layout, memory, shelf);
    let bytes = |memory: &Memory| {
        let mut bytes = vec![0; MEMORY as usize];
        memory.0.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    assert!(bytes(memory) == bytes(shelf), "the checkpoint is not the VM's memory");
    pages
}

/// How a session ends.
#[derive(Debug, Clone, Copy)]
enum End {
    Stop,
    Death,
    DeathFrozen,
    Pledge,
}

fn end(mut session: Client, how: End) {
    match how {
        End::Stop => session.track_stop().unwrap(),
        End::Death => {}
        End::DeathFrozen => session.freeze().unwrap(),
        End::Pledge => {
            session.freeze().unwrap();
            session.pledge(MIGRATION, "nowhere").unwrap();
            session.resume(Some(MIGRATION)).unwrap();
        }
    }
}

#[test]
fn tracking_goes_on_between_sessions_from_a_baseline_on() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 2, test_images::counter());
    let kept = shelf();
    let mut session = vm.session();
    let (memory, layout, _) = Memory::of(&mut session);
    assert!(session.set_baseline(Some(name(0))).is_err(), "nothing is tracked");
    let tracking = session.track_start(true).unwrap();
    assert!(tracking.can_keep && tracking.baseline.is_none());
    assert!(checkpoint(&mut session, &layout, &memory, &kept) >= MEMORY / 4096);
    session.set_baseline(Some(name(0))).unwrap();
    session.resume(None).unwrap();
    drop(session);

    let baseline = || connect(&vm.path, Role::Query).unwrap().status().unwrap().baseline;
    for (number, how) in (1..).zip([End::Stop, End::Death, End::DeathFrozen, End::Pledge]) {
        let newest = name(number - 1);
        assert_eq!(baseline(), Some(newest), "{how:?}");
        assert!(memory.counts());
        // One that knows nothing of baselines: everything is dirty, and nothing changes.
        let mut other = vm.session();
        let tracking = other.track_start(false).unwrap();
        assert_eq!(tracking.baseline, Some(newest));
        assert_eq!(other.harvest(&layout).unwrap()[0].count(), MEMORY / 4096);
        round(&mut other, &layout, &memory, &shelf());
        assert!(memory.counts());
        end(other, how);
        // One that takes what is new and fails.
        let mut failing = vm.session();
        assert_eq!(failing.track_start(true).unwrap().baseline, Some(newest));
        round(&mut failing, &layout, &memory, &shelf());
        assert!(memory.counts());
        end(failing, how);
        // And one that completes the checkpoint.
        let mut session = vm.session();
        assert_eq!(session.welcome().baseline, Some(newest));
        assert_eq!(session.track_start(true).unwrap().baseline, Some(newest));
        let pages = checkpoint(&mut session, &layout, &memory, &kept);
        assert!(pages < FEW, "{how:?}: {pages} pages since the last checkpoint");
        session.set_baseline(Some(name(number))).unwrap();
    }
    vm.terminate();
}

#[test]
fn a_baseline_can_be_given_up_and_does_not_travel() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 1, test_images::counter());
    let mut session = vm.session();
    session.set_limit(LIMIT);
    let (memory, layout, machine) = Memory::of(&mut session);
    let keep = |session: &mut Client| {
        session.track_start(false).unwrap();
        round(session, &layout, &memory, &shelf());
        session.set_baseline(Some(name(7))).unwrap();
    };
    keep(&mut session);
    drop(session);
    let mut session = vm.session();
    assert_eq!(session.welcome().baseline, Some(name(7)));
    session.set_baseline(None).unwrap();
    assert_eq!(session.status().unwrap().baseline, None);
    assert_eq!(session.track_start(true).unwrap().baseline, None);
    assert_eq!(session.harvest(&layout).unwrap()[0].count(), MEMORY / 4096);

    keep(&mut session);
    let target = Running::incoming(&directory, "target");
    let mut to = target.session();
    assert!(to.set_baseline(Some(name(7))).is_err(), "it is no source");
    let prepared = to.prepare("moved", &layout, &machine).unwrap();
    let there = Memory(prepared.memory.into_iter().next().unwrap().into());
    session.track_start(false).unwrap();
    round(&mut session, &layout, &memory, &there);
    session.freeze().unwrap();
    round(&mut session, &layout, &memory, &there);
    to.load(&session.save().unwrap()).unwrap();
    session.pledge(MIGRATION, "here").unwrap();
    to.start(MIGRATION).unwrap();
    session.hand_over(MIGRATION).unwrap();
    vm.end();
    assert!(there.counts());
    assert_eq!(to.status().unwrap().baseline, None);
    assert_eq!(to.track_start(true).unwrap().baseline, None);
    assert_eq!(to.harvest(&layout).unwrap().iter().map(PageSet::count).sum::<u64>(), MEMORY / 4096);
    drop(to);
    wait_until("running", || target.phase() == Phase::Running);
    target.terminate();
}

#[test]
fn a_vm_that_is_restored_begins_with_the_checkpoint_it_is_restored_from() {
    if !kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let vm = Running::boot(&directory, "vm", 2, test_images::counter());
    let mut session = vm.session();
    let (memory, layout, machine) = Memory::of(&mut session);
    wait_until("counting", || memory.counter(1) > 0);
    let kept = shelf();
    session.track_start(false).unwrap();
    checkpoint(&mut session, &layout, &memory, &kept);
    let state = session.save().unwrap();
    session.resume(None).unwrap();

    for generation in 1..4 {
        let restored = Running::incoming(&directory, &format!("restored-{generation}"));
        let mut to = restored.session();
        let prepared = to.prepare("restored", &layout, &machine).unwrap();
        let there = Memory(prepared.memory.into_iter().next().unwrap().into());
        let mut bytes = vec![0; MEMORY as usize];
        kept.0.read_exact_at(&mut bytes, 0).unwrap();
        assert!(to.set_baseline(None).is_err(), "there is none to forget");
        // The order of the two does not matter: the host's log sees neither.
        if generation % 2 == 0 {
            there.0.write_all_at(&bytes, 0).unwrap();
        }
        to.set_baseline(Some(name(generation))).unwrap();
        assert!(to.set_baseline(Some(name(9))).is_err(), "it has one");
        if generation % 2 == 1 {
            there.0.write_all_at(&bytes, 0).unwrap();
        }
        to.load(&state).unwrap();
        assert!(to.set_baseline(Some(name(9))).is_err(), "loading has written to memory");
        to.start(MIGRATION).unwrap();
        assert!(there.counts());
        drop(to);
        wait_until("nobody holds it", || {
            connect(&restored.path, Role::Query).unwrap().welcome().holder_pid.is_none()
        });
        let mut to = restored.session();
        assert_eq!(to.welcome().baseline, Some(name(generation)));
        assert_eq!(to.track_start(true).unwrap().baseline, Some(name(generation)));
        // What was written to the checkpoint is the whole difference; `checkpoint` compares every byte.
        let delta = shelf();
        delta.0.write_all_at(&bytes, 0).unwrap();
        let pages = checkpoint(&mut to, &layout, &there, &delta);
        assert!((1..FEW).contains(&pages), "{pages}");
        to.resume(None).unwrap();
        to.set_baseline(Some(name(10 + generation))).unwrap();
        drop(to);
        restored.terminate();
    }
    drop(session);
    vm.terminate();
}

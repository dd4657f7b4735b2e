//! Chains of checkpoints, each of which must be what the machine was when it stood still.

use crate::harness::{World, options};
use migrate::source::scripted::{Call, Who};
use migrate::vault::new_id;
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn every_link_is_the_memory_at_its_freeze(
        seed: u64,
        pages_per_call in 0u64..40,
        full in proptest::collection::vec(proptest::bool::weighted(0.2), 1..5),
        pack: bool,
    ) {
        let world = World::new(seed, pages_per_call);
        for (number, full) in full.into_iter().enumerate() {
            let mut options = options();
            (options.full, options.pack) = (full, pack);
            let before = world.machine.baseline();
            let report = world.take_soundly(&options);
            prop_assert_eq!(report.parent, before.filter(|_| !full));
            let parts = report.data_pages + report.zero_pages + report.shared_pages;
            prop_assert_eq!(parts, report.dirty_pages);
            prop_assert!(report.written_pages >= report.data_pages);
            prop_assert_eq!(world.committed(), number + 1);
        }
    }
}

#[test]
fn a_delta_has_what_was_written_and_nothing_else() {
    let world = World::new(7, 0);
    let full = world.take_soundly(&options());
    assert_eq!((full.parent, full.deltas), (None, 0));
    let nothing = world.take_soundly(&options());
    assert_eq!((nothing.parent, nothing.deltas, nothing.dirty_pages), (Some(full.id), 1, 0));
    assert_eq!(nothing.stored_bytes, 0);
    assert_eq!(nothing.rounds.len(), 2);
}

#[test]
fn a_full_checkpoint_refers_to_what_is_stored_and_is_the_same() {
    let world = World::new(17, 0);
    // What was written in large extents, and what was packed.
    for pack in [false, true] {
        let mut options = options();
        (options.full, options.pack) = (true, pack);
        options.share = false;
        let first = world.take_soundly(&options);
        assert!(first.shared_pages == 0 && first.data_pages > 100, "{first:#?}");
        (options.id, options.share) = (new_id().unwrap(), true);
        let second = world.take_soundly(&options);
        assert!(second.shared_pages > first.data_pages / 2, "{second:#?}");
        assert_eq!(second.shared_pages + second.data_pages, first.data_pages);
        assert!(second.stored_bytes < first.stored_bytes, "{second:#?}");
    }
}

#[test]
fn a_machine_that_writes_more_than_can_be_copied_is_stopped_and_it_is_said() {
    let world = World::new(11, 60);
    let mut options = options();
    options.max_pause = std::time::Duration::ZERO;
    let report = world.take_soundly(&options);
    assert!(report.warnings.iter().any(|warning| warning.contains("could not be kept")), "{report:#?}");
}

#[test]
fn without_its_parent_in_the_store_a_checkpoint_is_full_and_says_why() {
    let first = World::new(3, 2);
    let parent = first.take_soundly(&options());
    let mut second = World::new(4, 2);
    second.machine = first.machine.clone();
    second.witness = first.witness;
    let report = second.take_soundly(&options());
    assert_eq!(report.parent, None);
    assert!(report.warnings.iter().any(|warning| warning.contains(&parent.id.to_string())), "{report:#?}");
}

#[test]
fn a_suspended_machine_ends_with_its_checkpoint_and_not_before() {
    let world = World::new(5, 9);
    let mut options = options();
    options.suspend = true;
    world.machine.on_call(|call, _| match call {
        Call::End => Err(migrate::Error::Workload("it does not end".into())),
        _ => Ok(()),
    });
    let failed = world.take(&options).unwrap_err();
    assert!(failed.error.to_string().contains("could not be ended"), "{failed}");
    assert!(failed.report.committed && !failed.report.suspended);
    assert!(world.witness.is_running(Who::Source) && !world.machine.is_gone());

    world.machine.heal();
    options.id = new_id().unwrap();
    let report = world.take(&options).unwrap();
    assert!(report.suspended && world.machine.is_gone());
    assert!(!world.witness.is_running(Who::Source));
    assert_eq!(crate::reader::memory(&world.vault, report.id).unwrap(), world.witness.frozen_memory());
}

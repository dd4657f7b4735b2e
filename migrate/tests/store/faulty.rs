//! What a store keeps when calls fail and power is lost: in memory, through the double that others' tests use.

use crate::contract;
use migrate::store::{Fault, FaultyStore, MemoryStore, Store};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

#[test]
fn without_faults_it_is_the_store_that_it_stands_before() {
    contract::check(&|| Arc::new(FaultyStore::new(Arc::new(MemoryStore::new()), |_| None)));
    let slow = |number| (number % 7 == 0).then_some(Fault::Slow(Duration::from_millis(1)));
    contract::check(&move || Arc::new(FaultyStore::new(Arc::new(MemoryStore::new()), slow)));
}

/// One step of somebody who writes.
#[derive(Debug, Clone)]
enum Step {
    Put(u8, Vec<u8>),
    Write(u8, Vec<Vec<u8>>),
    GiveUp(u8, Vec<u8>),
    Delete(u8),
    Lock,
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..40);
    prop_oneof![
        (0..6_u8, bytes()).prop_map(|(name, bytes)| Step::Put(name, bytes)),
        (0..6_u8, prop::collection::vec(bytes(), 0..4)).prop_map(|(name, parts)| Step::Write(name, parts)),
        (0..6_u8, bytes()).prop_map(|(name, bytes)| Step::GiveUp(name, bytes)),
        (0..6_u8).prop_map(Step::Delete),
        Just(Step::Lock),
    ]
}

fn name(number: u8) -> String {
    format!("data/{}/segment-{number:05}", number % 2)
}

fn write(store: &dyn Store, name: &str, parts: &[Vec<u8>]) -> migrate::Result<u64> {
    let mut writer = store.create(name)?;
    parts.iter().try_for_each(|part| writer.append(part))?;
    writer.finish()
}

fn kept(store: &dyn Store) -> BTreeMap<String, Vec<u8>> {
    let listed = store.list("").unwrap();
    let read = listed.into_iter().map(|info| {
        let reader = store.open(&info.name).unwrap();
        let mut bytes = vec![0; usize::try_from(reader.bytes()).unwrap()];
        reader.read_at(0, &mut bytes).unwrap();
        assert_eq!(info.bytes, reader.bytes());
        (info.name, bytes)
    });
    read.collect()
}

fn faults() -> impl Strategy<Value = Fault> {
    prop_oneof![
        Just(Fault::Fails),
        Just(Fault::AnswerLost),
        Just(Fault::PowerLost),
        Just(Fault::PowerLostBehind),
        Just(Fault::Slow(Duration::from_micros(10))),
    ]
}

proptest! {
    /// Against a map: whatever was answered for is there, whole; what was refused is not, or was done without an answer; nothing else.
    #[test]
    fn what_was_answered_for_is_there_and_whole(
        steps in prop::collection::vec(step(), 1..20), call in 0..60_u64, fault in faults(),
    ) {
        let store = FaultyStore::at(Arc::new(MemoryStore::new()), call, fault);
        let mut expected = BTreeMap::<String, Vec<u8>>::new();
        for step in steps {
            let before = expected.clone();
            let calls = store.calls();
            let done = match &step {
                Step::Put(number, bytes) => {
                    let new = !expected.contains_key(&name(*number));
                    let done = store.put(&name(*number), bytes);
                    expected.entry(name(*number)).or_insert_with(|| bytes.clone());
                    done.map(|()| true).map_err(|error| (error, new))
                }
                Step::Write(number, parts) => {
                    let new = !expected.contains_key(&name(*number));
                    let done = write(&store, &name(*number), parts);
                    expected.entry(name(*number)).or_insert_with(|| parts.concat());
                    done.map(|_| true).map_err(|error| (error, new))
                }
                Step::GiveUp(number, bytes) => {
                    let new = !expected.contains_key(&name(*number));
                    let begun = store.create(&name(*number)).and_then(|mut writer| writer.append(bytes));
                    begun.map(|()| true).map_err(|error| (error, new))
                }
                Step::Delete(number) => {
                    let done = store.delete(&name(*number));
                    expected.remove(&name(*number));
                    done.map(|()| true).map_err(|error| (error, true))
                }
                Step::Lock => {
                    let store: &dyn Store = &store;
                    store.lock("a test").map(|_| true).map_err(|error| (error, true))
                }
            };
            if let Err((error, should_succeed)) = done {
                let planned = (calls..store.calls()).contains(&call) || error.to_string().contains("power lost");
                prop_assert!(planned || !should_succeed, "{step:?}: {error}");
                if planned {
                    // The one step that was cut may have been done or not.
                    let found = kept(&*store.after_reboot());
                    prop_assert!(found == before || found == expected, "{step:?}: {found:?}");
                    expected = found;
                }
            }
        }
        let after = store.after_reboot();
        prop_assert_eq!(kept(&*after), expected);
        // What is left can be collected, and nobody holds the lock.
        for left in after.leftovers().unwrap() {
            after.remove_leftover(&left.name).unwrap();
        }
        prop_assert_eq!(after.leftovers().unwrap(), []);
        after.lock("the next").unwrap();
    }
}

#[test]
fn without_power_nothing_works_and_what_was_being_written_is_a_leftover() {
    let store = FaultyStore::at(Arc::new(MemoryStore::new()), 3, Fault::PowerLost);
    store.put("store.json", b"x").unwrap();
    let mut writer = store.create("data/x/index").unwrap();
    writer.append(b"half").unwrap();
    assert!(writer.finish().is_err());
    assert!(store.put("another", b"x").is_err());
    assert!(store.list("").is_err());
    let after = store.after_reboot();
    assert_eq!(after.list("").unwrap().len(), 1);
    let left = after.leftovers().unwrap();
    assert_eq!((left.len(), left[0].bytes), (1, 4));
}

#[test]
fn a_seed_decides_what_fails() {
    let run = |seed| {
        let store = FaultyStore::seeded(Arc::new(MemoryStore::new()), seed, 4);
        (0..200).map(|number| store.put(&format!("object-{number}"), b"x").is_err()).collect::<Vec<_>>()
    };
    let failed = run(1).iter().filter(|failed| **failed).count();
    assert!((15..80).contains(&failed), "{failed} of 200");
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

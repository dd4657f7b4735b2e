//! What every store must keep, whatever it is made of.

use migrate::store::Store;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// Checks all of it, each part on a store of its own.
pub(crate) fn check(new: &dyn Fn() -> Arc<dyn Store>) {
    objects_are_written_once_and_read_as_they_were(&*new());
    an_object_is_not_there_before_it_is_finished(&*new());
    lists_are_in_order_and_complete(&*new());
    any_range_is_read_and_nothing_behind_the_end(&*new());
    names_that_lead_elsewhere_are_refused(&*new());
    there_is_one_writer(&new());
    several_threads_read_and_write(&*new());
}

fn bytes(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at * 31 + at / 251) as u8).collect()
}

fn read(store: &dyn Store, name: &str) -> Vec<u8> {
    let reader = store.open(name).unwrap();
    let mut found = vec![0; usize::try_from(reader.bytes()).unwrap()];
    reader.read_at(0, &mut found).unwrap();
    found
}

fn names(store: &dyn Store, prefix: &str) -> Vec<String> {
    store.list(prefix).unwrap().into_iter().map(|info| info.name).collect()
}

/// The text of an error, which names the object.
fn refused<T>(result: migrate::Result<T>, name: &str) -> String {
    let text = result.err().unwrap().to_string();
    assert!(text.contains(name), "{text}");
    text
}

fn objects_are_written_once_and_read_as_they_were(store: &dyn Store) {
    assert!(store.list("").unwrap().is_empty());
    assert!(!store.contains("store.json").unwrap());
    assert!(refused(store.open("store.json"), "store.json").contains("no object"));
    store.put("store.json", b"what it is").unwrap();
    assert_eq!(read(store, "store.json"), b"what it is");
    assert!(refused(store.put("store.json", b"another"), "store.json").contains("already"));
    assert!(refused(store.create("store.json"), "store.json").contains("already"));
    assert_eq!(read(store, "store.json"), b"what it is");
    store.put("empty", b"").unwrap();
    assert_eq!(read(store, "empty"), b"");
    // Two that are written at once: the one that is finished first is the object.
    let (mut first, mut second) =
        (store.create("data/x/index").unwrap(), store.create("data/x/index").unwrap());
    first.append(b"first").unwrap();
    second.append(b"second").unwrap();
    assert_eq!(second.finish().unwrap(), 6);
    assert!(refused(first.finish(), "data/x/index").contains("already"));
    assert_eq!(read(store, "data/x/index"), b"second");
    store.delete("data/x/index").unwrap();
    store.delete("data/x/index").unwrap();
    store.delete("never/was").unwrap();
    refused(store.open("data/x/index"), "data/x/index");
    assert_eq!(names(store, ""), ["empty", "store.json"]);
    store.put("data/x/index", b"again").unwrap();
    assert_eq!(read(store, "data/x/index"), b"again");
}

fn an_object_is_not_there_before_it_is_finished(store: &dyn Store) {
    let expected = bytes(9_000_000);
    let mut writer = store.create("data/x/segment-00000").unwrap();
    for piece in [1, 4096, 65_536, 7_000_000, 100] {
        let at = expected.len().min(piece);
        writer.append(&expected[..at]).unwrap();
        assert!(!store.contains("data/x/segment-00000").unwrap());
        assert!(names(store, "").is_empty());
    }
    drop(writer);
    assert!(!store.contains("data/x/segment-00000").unwrap());
    assert_eq!(store.leftovers().unwrap(), []);
    let mut writer = store.create("data/x/segment-00000").unwrap();
    for piece in expected.chunks(1_234_567) {
        writer.append(piece).unwrap();
    }
    assert_eq!(writer.finish().unwrap(), expected.len() as u64);
    assert!(read(store, "data/x/segment-00000") == expected);
    assert_eq!(store.leftovers().unwrap(), []);
}

fn lists_are_in_order_and_complete(store: &dyn Store) {
    let before = SystemTime::now() - Duration::from_secs(2);
    let mut all: Vec<String> =
        (0..25).map(|number| format!("data/{}/segment-{:05}", number % 3, number)).collect();
    // What sorts on either side of the slash.
    all.extend(["data/1-b", "data/1.b", "checkpoints/a", "checkpoints/b", "store.json"].map(String::from));
    for (length, name) in all.iter().enumerate() {
        store.put(name, &bytes(length)).unwrap();
    }
    let mut sorted = all.clone();
    sorted.sort();
    assert_eq!(names(store, ""), sorted);
    for prefix in
        ["data/", "data/1", "data/1/", "data/1/segment-0001", "checkpoints/", "checkpoints/b", "none/", "s"]
    {
        let expected: Vec<_> = sorted.iter().filter(|name| name.starts_with(prefix)).cloned().collect();
        assert_eq!(names(store, prefix), expected, "{prefix}");
    }
    for info in store.list("").unwrap() {
        let length = all.iter().position(|name| *name == info.name).unwrap();
        assert_eq!(info.bytes, length as u64, "{}", info.name);
        assert!(info.written >= before, "{} is older than it can be", info.name);
    }
}

fn any_range_is_read_and_nothing_behind_the_end(store: &dyn Store) {
    let expected = bytes(300_000);
    store.put("data/x/segment-00000", &expected).unwrap();
    let reader = store.open("data/x/segment-00000").unwrap();
    assert_eq!(reader.bytes(), 300_000);
    for (offset, length) in [(0, 1), (299_999, 1), (4096, 65_536), (300_000, 0)] {
        let mut found = vec![0; length];
        reader.read_at(offset as u64, &mut found).unwrap();
        assert_eq!(found, expected[offset..offset + length]);
    }
    refused(reader.read_at(299_999, &mut [0; 2]), "data/x/segment-00000");
    refused(reader.read_at(u64::MAX, &mut [0; 1]), "data/x/segment-00000");
    let ranges: Vec<Range<u64>> =
        vec![0..4096, 4096..8192, 200_000..200_001, 100_000..150_000, 7..7, 299_000..300_000];
    let wanted: Vec<u8> = ranges
        .iter()
        .flat_map(|range| &expected[range.start as usize..range.end as usize])
        .copied()
        .collect();
    let mut found = vec![0; wanted.len()];
    reader.read_ranges(&ranges, &mut found).unwrap();
    assert!(found == wanted);
    reader.read_ranges(&[], &mut []).unwrap();
    refused(reader.read_ranges(std::slice::from_ref(&(0..10)), &mut [0; 9]), "data/x/segment-00000");
    refused(
        reader.read_ranges(std::slice::from_ref(&(299_990..300_001)), &mut [0; 11]),
        "data/x/segment-00000",
    );
}

fn names_that_lead_elsewhere_are_refused(store: &dyn Store) {
    for name in
        ["", "/etc/passwd", "../x", "data/../../x", "data//x", "data/", "tmp/x", "lock", "a b", "\u{e4}"]
    {
        assert!(store.put(name, b"x").is_err(), "{name}");
        assert!(store.create(name).is_err(), "{name}");
        assert!(store.open(name).is_err(), "{name}");
        assert!(store.contains(name).is_err(), "{name}");
        assert!(store.delete(name).is_err(), "{name}");
    }
    for name in ["store.json", "tmp/../store.json", "tmp/", "lock"] {
        assert!(store.remove_leftover(name).is_err(), "{name}");
    }
    assert!(store.list("../").is_err());
    store.remove_leftover("tmp/0123456789abcdef").unwrap();
}

fn there_is_one_writer(store: &Arc<dyn Store>) {
    let lease = store.lock("the first").unwrap();
    lease.check().unwrap();
    let told = store.lock("the second").err().unwrap().to_string();
    assert!(told.contains("the first") && told.contains("try again"), "{told}");
    assert!(told.contains(&std::process::id().to_string()), "{told}");
    // Readers and the writer go on.
    store.put("store.json", b"x").unwrap();
    assert_eq!(names(&**store, ""), ["store.json"]);
    let waiting = {
        let store = Arc::clone(store);
        std::thread::spawn(move || {
            store.lock_within("the second", Duration::from_secs(30)).map(|lease| lease.check())
        })
    };
    std::thread::sleep(Duration::from_millis(300));
    assert!(!waiting.is_finished());
    assert!(lease.held_for() >= Duration::from_millis(300));
    drop(lease);
    waiting.join().unwrap().unwrap().unwrap();
    store.lock("the third").unwrap().check().unwrap();
}

fn several_threads_read_and_write(store: &dyn Store) {
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                for number in 0..8 {
                    let (name, expected) =
                        (format!("data/{number}/segment-{thread:05}"), bytes(thread * 1000 + number));
                    store.put(&name, &expected).unwrap();
                    assert_eq!(read(store, &name), expected);
                    // Its directory may be empty then, while others write into it.
                    if thread != 3 {
                        store.delete(&name).unwrap();
                    }
                }
            });
        }
    });
    let left: Vec<_> = (0..8).map(|number| format!("data/{number}/segment-00003")).collect();
    assert_eq!(names(store, ""), left);
}

//! A process that is killed while it writes: every object that it was told of is there and whole, and nothing else is.

use migrate::store::{LocalStore, Store};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

/// Says to the child where to write.
const PLACE: &str = "MIGRATE_TEST_CRASHING_STORE";

/// How often the child is killed.
const KILLS: u32 = 12;

fn name(number: u64) -> String {
    format!("data/{}/segment-{:05}", number / 3, number % 3)
}

fn bytes(number: u64) -> Vec<u8> {
    let length = number * 7919 % 400_000 + 1;
    (0..length).map(|at| (at * 31 + number) as u8).collect()
}

/// Not a test by itself: what the other one starts, and kills.
#[test]
fn the_one_that_is_killed() {
    let Some(place) = std::env::var_os(PLACE) else { return };
    let store: Arc<dyn Store> = Arc::new(LocalStore::new(Path::new(&place)));
    let _lease = store.lock("the one that is killed").unwrap();
    for number in u64::try_from(store.list("data/").unwrap().len()).unwrap().. {
        let mut writer = store.create(&name(number)).unwrap();
        bytes(number).chunks(50_000).for_each(|part| writer.append(part).unwrap());
        writer.finish().unwrap();
        // Past the harness, which keeps what tests print.
        writeln!(std::io::stderr(), "finished {number}").unwrap();
    }
}

fn start(place: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "crashes::the_one_that_is_killed", "--nocapture"])
        .env(PLACE, place)
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn a_writer_that_is_killed_at_any_instant_leaves_every_finished_object_whole() {
    let dir = tempfile::tempdir().unwrap();
    let store: Arc<dyn Store> = Arc::new(LocalStore::new(dir.path()));
    let mut finished = 0;
    for kill in 0..KILLS {
        let mut child = start(dir.path());
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut told = 0;
        for line in lines {
            let line = line.unwrap();
            let Some(number) = line.strip_prefix("finished ") else { continue };
            finished = number.parse::<u64>().unwrap() + 1;
            told += 1;
            if told == 1 {
                let holder = store.lock("the test").err().unwrap().to_string();
                assert!(holder.contains("the one that is killed"), "{holder}");
            }
            if told == kill % 4 + 2 {
                // Somewhere in the next object.
                std::thread::sleep(Duration::from_micros(u64::from(kill) * 311 % 2500));
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(told > 0, "the child wrote nothing");
        let listed = store.list("").unwrap();
        // One more may have been finished than was told of.
        assert!(
            (finished..=finished + 1).contains(&(listed.len() as u64)),
            "{} and {finished}",
            listed.len()
        );
        for number in 0..listed.len() as u64 {
            let (reader, expected) = (store.open(&name(number)).unwrap(), bytes(number));
            let mut found = vec![0; usize::try_from(reader.bytes()).unwrap()];
            reader.read_at(0, &mut found).unwrap();
            assert!(found == expected, "{} is not what was written", name(number));
        }
        assert!(store.leftovers().unwrap().len() <= kill as usize + 1);
        // The lock went with the process.
        store.lock("the test").unwrap();
    }
    for left in store.leftovers().unwrap() {
        store.remove_leftover(&left.name).unwrap();
    }
    assert_eq!(store.leftovers().unwrap(), []);
}

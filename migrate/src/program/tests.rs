use super::*;
use crate::store::{Fault, FaultyStore, MemoryStore};
use proptest::prelude::*;

const PAGES: usize = 40;
const WORDS: usize = PAGE_SIZE / 8;

fn vault() -> Vault {
    Vault::create(Arc::new(MemoryStore::new()), None).unwrap()
}

fn by_digests() -> Program {
    let mut program = Program::new("p", &[PAGES * PAGE_SIZE, 3 * PAGE_SIZE]).unwrap();
    program.compare_digests();
    assert_eq!(program.tracking(), Ok("blake3-digests"));
    program
}

fn memory(program: &Program) -> Vec<u64> {
    [program.values::<u64>(0), program.values(1)].concat()
}

#[test]
fn digests_find_what_was_written_and_nothing_else() {
    let (vault, mut program) = (vault(), by_digests());
    program.values_mut::<u64>(0)[..10 * WORDS].fill(7);
    let full = program.checkpoint(&vault, b"one").unwrap();
    assert_eq!((full.parent, full.tracking.as_str()), (None, "blake3-digests"));

    program.values_mut::<u64>(0)[3 * WORDS] = 8;
    program.values_mut::<u64>(0)[4 * WORDS] = 7; // as it was
    program.values_mut::<u64>(0)[5 * WORDS..6 * WORDS].fill(0);
    program.values_mut::<u64>(1)[2 * WORDS + 1] = 9;
    let delta = program.checkpoint(&vault, b"two").unwrap();
    assert_eq!(delta.parent, Some(full.id));
    assert_eq!((delta.data_pages, delta.zero_pages), (2, 1), "{delta:#?}");
    let idle = program.checkpoint(&vault, b"three").unwrap();
    assert_eq!((idle.parent, idle.dirty_pages), (Some(delta.id), 0));

    // Restored, it goes on from there, in a region that held something else.
    let mut again = by_digests();
    again.values_mut::<u64>(0).fill(1);
    assert_eq!(again.restore(&vault).unwrap().as_deref(), Some(&b"three"[..]));
    assert_eq!(memory(&again), memory(&program));
    again.values_mut::<u64>(0)[0] = 2;
    let next = again.checkpoint(&vault, b"four").unwrap();
    assert_eq!((next.parent, next.dirty_pages), (Some(idle.id), 1));
}

#[test]
fn a_kernel_that_tells_is_asked_and_one_that_does_not_is_no_reason_for_whole_checkpoints() {
    let (vault, mut program) = (vault(), Program::new("p", &[PAGE_SIZE]).unwrap());
    let first = program.checkpoint(&vault, b"").unwrap();
    let second = program.checkpoint(&vault, b"").unwrap();
    assert_eq!(second.parent, Some(first.id), "{:?}", program.tracking());
}

#[test]
fn a_checkpoint_is_later_than_the_last_one_whatever_the_clock_says() {
    let (vault, mut program) = (vault(), by_digests());
    let ahead = crate::vault::now_unix_ms() + 60_000;
    program.last_unix_ms = ahead;
    let full = program.checkpoint(&vault, b"one").unwrap();
    let delta = program.checkpoint(&vault, b"two").unwrap();
    program.compare_digests();
    let again = program.checkpoint(&vault, b"three").unwrap();
    assert_eq!((full.parent, delta.parent, again.parent), (None, Some(full.id), None));
    assert_eq!([full, delta, again].map(|report| report.taken_unix_ms), [ahead + 1, ahead + 2, ahead + 3]);
    let mut last = by_digests();
    assert_eq!(last.restore(&vault).unwrap().as_deref(), Some(&b"three"[..]));
    let next = last.checkpoint(&vault, b"four").unwrap();
    assert_eq!(next.taken_unix_ms, ahead + 4);
    // A delta is later than its parent, even where nobody remembers.
    last.last_unix_ms = 0;
    assert_eq!(last.checkpoint(&vault, b"five").unwrap().taken_unix_ms, ahead + 5);
}

#[test]
fn a_long_chain_gets_an_index_of_all_of_it_and_does_not_need_it() {
    let (vault, mut program) = (vault(), by_digests());
    let mut merged = None;
    for number in 0..400 {
        program.values_mut::<u64>(0)[number * 83 % (PAGES * WORDS)] = number as u64 + 1;
        let report = program.checkpoint(&vault, b"").unwrap();
        let named = vault.manifest(report.id).unwrap().manifest.merged;
        assert_eq!(named.map(|named| named.id), merged);
        if report.merged_bytes > 0 {
            if merged.is_some() {
                break;
            }
            merged = Some(report.id);
        }
    }
    assert!(merged.is_some(), "400 links have none");
    let last = program.checkpoint(&vault, b"").unwrap();
    let named = vault.manifest(last.id).unwrap().manifest.merged.unwrap();
    assert_ne!(Some(named.id), merged, "the nearest is named");
    let restored = || {
        let mut again = by_digests();
        again.restore(&vault).unwrap();
        memory(&again)
    };
    assert_eq!(restored(), memory(&program));
    vault.store().delete(&protocol::checkpoint::name::merged_index(named.id)).unwrap();
    assert_eq!(restored(), memory(&program));
}

#[derive(Debug, Clone)]
enum Step {
    Write(usize, u64),
    Checkpoint,
    /// One in which a call of the store fails, this one if there are so many.
    Trouble(u64),
    /// The program is killed, and goes on from its last checkpoint.
    Killed,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        10 => ((0..PAGES * WORDS), 0..4_u64).prop_map(|(word, value)| Step::Write(word, value)),
        2 => Just(Step::Checkpoint),
        2 => (0..24_u64).prop_map(Step::Trouble),
        1 => Just(Step::Killed),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever was written, refused and killed in between: every checkpoint is the memory of its instant.
    #[test]
    fn digests_never_lose_a_write(steps in prop::collection::vec(step(), 1..60)) {
        let store = MemoryStore::new();
        let vault = Vault::create(Arc::new(store.clone()), None).unwrap();
        let mut program = by_digests();
        let mut saved = None;
        for step in steps {
            match step {
                Step::Write(word, value) => program.values_mut::<u64>(0)[word] = value,
                Step::Checkpoint => {
                    program.checkpoint(&vault, b"").unwrap();
                    saved = Some(memory(&program));
                }
                Step::Trouble(call) => {
                    let faulty = FaultyStore::at(Arc::new(store.clone()), call, Fault::Fails);
                    let taken = Vault::open(Arc::new(faulty), None).and_then(|faulty| program.checkpoint(&faulty, b""));
                    if taken.is_ok() {
                        saved = Some(memory(&program));
                    }
                }
                Step::Killed => {
                    program = by_digests();
                    let found = program.restore(&vault).unwrap();
                    prop_assert_eq!(found.is_some(), saved.is_some());
                    if let Some(saved) = &saved {
                        prop_assert_eq!(&memory(&program), saved);
                    }
                }
            }
        }
        if saved.is_some() {
            program.checkpoint(&vault, b"").unwrap();
            let mut last = by_digests();
            last.restore(&vault).unwrap();
            prop_assert_eq!(memory(&last), memory(&program));
        }
    }
}

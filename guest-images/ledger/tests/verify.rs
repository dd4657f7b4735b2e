//! `verify` accepts sound memory frozen at any moment, and finds every kind of damage.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::convert::Infallible;

use ledger::model::layout::{STATS_GPA, VERSION_TABLE_GPA};
use ledger::model::page::{self, FILLED, Identity, Page, WORDS};
use ledger::model::stats::{MAGIC, VERSION, at};
use ledger::{
    BadStats, Content, Damage, MAX_FAULTS, PAGE_SIZE, Params, Pattern, Range, Ranges, Replay, State, Stats,
    Subject, Verdict, VerifyError, verify,
};
use proptest::prelude::*;

const RAM_BYTES: u64 = 6 << 20;

/// A guest's memory, worked on as the guest does it.
struct Guest {
    memory: Vec<u8>,
    params: Params,
    ranges: Ranges,
    iterations: u64,
}

impl Guest {
    fn boot(line: &str) -> Guest {
        let params: Params = line.parse().unwrap();
        let ram = [Range { start: 0, len: RAM_BYTES }];
        let ranges = Ranges::for_data(&ram, params.fill_pages()).unwrap();
        let mut guest = Guest { memory: vec![0; RAM_BYTES as usize], params, ranges, iterations: 0 };
        guest.put(STATS_GPA, at::MAGIC, MAGIC);
        guest.put_u32(at::VERSION, VERSION);
        guest.put_u32(at::STATE, State::Filling.code());
        guest.put(STATS_GPA, at::SEED, params.seed);
        guest.put(STATS_GPA, at::FILL_PAGES, params.fill_pages());
        guest.put(STATS_GPA, at::WS_PAGES, params.ws_pages());
        let pattern = match params.pattern {
            Pattern::Seq => 0,
            Pattern::Uniform => 1,
            Pattern::Hot { pages_percent, writes_percent } => {
                guest.put_u32(at::HOT_PAGES, pages_percent.into());
                guest.put_u32(at::HOT_WRITES, writes_percent.into());
                2
            }
        };
        guest.put_u32(at::PATTERN, pattern);
        let content = match params.content {
            Content::Random => 0,
            Content::Text => 1,
            Content::Zero => 2,
        };
        guest.put_u32(at::CONTENT, content);
        guest.put(STATS_GPA, at::VERSION_TABLE, VERSION_TABLE_GPA);
        guest.put_u32(at::RANGE_COUNT, 1);
        guest.put(STATS_GPA, at::RANGES, ranges.as_slice()[0].start);
        guest.put(STATS_GPA, at::RANGES + 8, ranges.as_slice()[0].len);
        guest
    }

    fn filled(line: &str) -> Guest {
        let mut guest = Guest::boot(line);
        guest.fill(guest.params.fill_pages());
        guest
    }

    fn fill(&mut self, pages: u64) {
        for number in 0..pages {
            self.store(&self.identity(number, 1, FILLED), WORDS);
            self.set_version(number, 1);
        }
        self.put(STATS_GPA, at::FILLED, pages);
    }

    fn run(&mut self, iterations: u64) {
        for _ in 0..iterations {
            let (id, k) = (self.begin(), self.iterations);
            self.store(&id, WORDS);
            self.set_version(id.page, id.version);
            self.put(STATS_GPA, at::ITERATIONS, k + 1);
            self.iterations += 1;
        }
    }

    /// The next iteration, up to where it starts to write its page.
    fn begin(&mut self) -> Identity {
        let k = self.iterations;
        let number = self.params.pattern.page_of(self.params.seed, self.params.ws_pages(), k);
        self.put(STATS_GPA, at::CURRENT_PAGE, number);
        self.put(STATS_GPA, at::BEGUN, k + 1);
        self.identity(number, self.version(number) + 1, k)
    }

    fn identity(&self, page: u64, version: u32, iteration: u64) -> Identity {
        Identity { seed: self.params.seed, page, version, iteration, content: self.params.content }
    }

    fn gpa(&self, page: u64) -> u64 {
        self.ranges.gpa_of(page).unwrap()
    }

    /// Writes a page's body from the front and its header last, but only `words` of it.
    fn store(&mut self, id: &Identity, words: usize) {
        let mut page: Page = [0; WORDS];
        page::write(&mut page, id);
        let gpa = self.gpa(id.page);
        for word in (8..WORDS).chain(0..8).take(words) {
            self.put(gpa, word * 8, page[word]);
        }
    }

    fn put(&mut self, gpa: u64, offset: usize, value: u64) {
        let from = gpa as usize + offset;
        self.memory[from..from + 8].copy_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, offset: usize, value: u32) {
        let from = STATS_GPA as usize + offset;
        self.memory[from..from + 4].copy_from_slice(&value.to_le_bytes());
    }

    fn entry(&self, page: u64) -> usize {
        (VERSION_TABLE_GPA + page * 4) as usize
    }

    fn version(&self, page: u64) -> u32 {
        u32::from_le_bytes(self.memory[self.entry(page)..][..4].try_into().unwrap())
    }

    fn set_version(&mut self, page: u64, version: u32) {
        let entry = self.entry(page);
        self.memory[entry..entry + 4].copy_from_slice(&version.to_le_bytes());
    }

    fn bytes(&mut self, page: u64) -> &mut [u8] {
        let gpa = self.gpa(page) as usize;
        &mut self.memory[gpa..gpa + PAGE_SIZE as usize]
    }

    fn read(&self) -> impl FnMut(u64, &mut [u8]) -> Result<(), Infallible> {
        |gpa, bytes| {
            bytes.copy_from_slice(&self.memory[gpa as usize..][..bytes.len()]);
            Ok(())
        }
    }

    fn verify(&self) -> Verdict {
        let stats = Stats::read(self.read()).unwrap();
        verify(&stats, self.read()).unwrap()
    }
}

fn only_fault(verdict: &Verdict) -> (Subject, u64, Damage) {
    assert_eq!((verdict.damaged(), verdict.faults.len()), (1, 1), "{verdict}");
    assert!(!verdict.is_sound());
    (verdict.faults[0].subject, verdict.faults[0].page, verdict.faults[0].damage)
}

const LINES: [&str; 4] = [
    "fill=1M ws=512K pattern=seq content=text",
    "fill=1M ws=512K pattern=uniform content=random seed=77",
    "fill=512K pattern=hot hot_pages=5 content=text",
    "fill=512K pattern=uniform content=zero",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn sound_memory_is_sound(line in 0..4usize, iterations in 0..2000u64) {
        let mut guest = Guest::filled(LINES[line]);
        guest.run(iterations);
        let verdict = guest.verify();
        prop_assert!(verdict.is_sound(), "{}", verdict);
        prop_assert_eq!(verdict.pages_checked, guest.params.fill_pages());
        prop_assert_eq!(verdict.in_flight, None);
    }

    #[test]
    fn frozen_in_the_middle_of_a_write_is_sound(
        line in 0..4usize, iterations in 0..500u64, words in 0..=WORDS, entry: bool,
    ) {
        let mut guest = Guest::filled(LINES[line]);
        guest.run(iterations);
        let id = guest.begin();
        guest.store(&id, words);
        if entry && words == WORDS {
            guest.set_version(id.page, id.version);
        }
        let verdict = guest.verify();
        prop_assert!(verdict.is_sound(), "{}", verdict);
        prop_assert_eq!(verdict.in_flight, Some(id.page));
    }

    #[test]
    fn frozen_while_filling_is_sound(line in 0..4usize, pages in 0..128u64, words in 0..=WORDS) {
        let mut guest = Guest::boot(LINES[line]);
        guest.fill(pages);
        if pages < guest.params.fill_pages() {
            guest.store(&guest.identity(pages, 1, FILLED), words);
        }
        prop_assert!(guest.verify().is_sound());
    }

    #[test]
    fn any_flipped_bit_is_found(line in 0..4usize, page in 0..128u64, byte in 0..4096usize, bit in 0..8) {
        let mut guest = Guest::filled(LINES[line]);
        guest.run(300);
        guest.bytes(page)[byte] ^= 1u8 << bit;
        let verdict = guest.verify();
        prop_assert_eq!(verdict.damaged(), 1);
        prop_assert_eq!(verdict.faults[0].page, page);
    }

    #[test]
    fn a_stats_block_of_any_bytes_is_read_or_refused(
        changes in prop::collection::vec((16..0xC00usize, any::<u8>()), 0..40),
    ) {
        let mut guest = Guest::filled(LINES[0]);
        guest.run(10);
        for (offset, byte) in changes {
            guest.memory[STATS_GPA as usize + offset] = byte;
        }
        if let Ok(stats) = Stats::read(guest.read()) {
            let _ = stats.longest_gap_since(5);
            let _ = stats.us(u64::MAX);
            let _ = Replay::new(stats.setup.unwrap()).identity(3);
        }
    }
}

#[test]
fn a_stale_page_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    guest.run(20);
    let old = guest.bytes(5).to_vec();
    guest.run(16);
    guest.bytes(5).copy_from_slice(&old);
    let verdict = guest.verify();
    assert_eq!(only_fault(&verdict), (Subject::Page, 5, Damage::Stale));
    assert_eq!((verdict.faults[0].expected_version, verdict.faults[0].found_version), (3, 2));
    assert_eq!(verdict.faults[0].gpa, guest.gpa(5));
}

#[test]
fn a_lost_page_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K content=text");
    guest.run(20);
    guest.bytes(200).fill(0);
    assert_eq!(only_fault(&guest.verify()), (Subject::Page, 200, Damage::Lost));
}

#[test]
fn a_torn_page_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    let old = guest.bytes(3).to_vec();
    guest.run(16);
    guest.bytes(3)[2048..].copy_from_slice(&old[2048..]);
    assert_eq!(only_fault(&guest.verify()), (Subject::Page, 3, Damage::Torn));
}

#[test]
fn a_page_in_anothers_place_is_found() {
    let mut guest = Guest::filled("fill=1M");
    let other = guest.bytes(9).to_vec();
    guest.bytes(10).copy_from_slice(&other);
    assert_eq!(only_fault(&guest.verify()), (Subject::Page, 10, Damage::Foreign));
}

#[test]
fn a_page_of_another_run_is_found() {
    let other = Guest::filled("fill=1M seed=8").bytes(9).to_vec();
    let mut guest = Guest::filled("fill=1M seed=9");
    guest.bytes(9).copy_from_slice(&other);
    assert_eq!(only_fault(&guest.verify()), (Subject::Page, 9, Damage::Foreign));
}

#[test]
fn a_stale_version_table_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    guest.run(16);
    guest.set_version(4, 1);
    assert_eq!(only_fault(&guest.verify()), (Subject::TableEntry, 4, Damage::Stale));
}

#[test]
fn a_write_the_guest_did_not_do_yet_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    guest.run(5);
    guest.store(&guest.identity(7, 2, 7), WORDS);
    assert_eq!(only_fault(&guest.verify()), (Subject::Page, 7, Damage::Stale));
}

#[test]
fn the_page_in_flight_may_not_hold_anything_else() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    guest.run(5);
    let id = guest.begin();
    guest.store(&id, 100);
    guest.bytes(id.page)[3000] ^= 4;
    assert_eq!(only_fault(&guest.verify()), (Subject::Page, id.page, Damage::Torn));
}

#[test]
fn a_stale_stats_block_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    guest.run(5);
    let stats = guest.memory[STATS_GPA as usize..][..4096].to_vec();
    guest.run(4);
    guest.memory[STATS_GPA as usize..][..4096].copy_from_slice(&stats);
    let verdict = guest.verify();
    assert_eq!((verdict.stale, verdict.table_entries), (4, 4), "{verdict}");
}

#[test]
fn another_page_in_flight_than_the_pattern_names_is_found() {
    let mut guest = Guest::filled("fill=1M ws=64K pattern=seq");
    guest.run(5);
    guest.begin();
    guest.put(STATS_GPA, at::CURRENT_PAGE, 3);
    let verdict = guest.verify();
    assert!(verdict.wrong_page_in_flight && !verdict.is_sound());
}

#[test]
fn all_damage_is_counted_but_not_all_listed() {
    let mut guest = Guest::filled("fill=1M");
    for page in 0..256 {
        guest.bytes(page).fill(0);
    }
    let verdict = guest.verify();
    assert_eq!((verdict.lost, verdict.faults.len()), (256, MAX_FAULTS));
    assert!(verdict.to_string().ends_with("and 192 more"));
}

#[test]
fn errors_the_guest_found_are_not_sound() {
    let mut guest = Guest::filled("fill=1M");
    guest.put(STATS_GPA, at::ERRORS + 8, 1);
    let verdict = guest.verify();
    assert_eq!((verdict.guest_errors, verdict.damaged(), verdict.is_sound()), (1, 0, false));
}

#[test]
fn what_is_no_stats_block_is_refused() {
    assert_eq!(Stats::decode(&[0; 9]), Err(BadStats::Short(9)));
    assert_eq!(Stats::decode(&[0; 4096]), Err(BadStats::Magic(0)));
    let mut guest = Guest::boot("fill=1M");
    guest.put_u32(at::VERSION, 7);
    let page = &guest.memory[STATS_GPA as usize..];
    assert_eq!(Stats::decode(page), Err(BadStats::Version(7)));
}

#[test]
fn a_guest_that_has_not_started_is_no_verdict() {
    let mut guest = Guest::boot("fill=1M");
    guest.put_u32(at::RANGE_COUNT, 0);
    let stats = Stats::read(guest.read()).unwrap();
    assert!(matches!(verify(&stats, guest.read()), Err(VerifyError::NotStarted(_))));
}

#[test]
fn a_guest_that_panicked_is_not_sound() {
    let mut guest = Guest::filled("fill=1M");
    guest.put_u32(at::STATE, State::Failed.code());
    guest.memory[STATS_GPA as usize + at::MESSAGE] = b'x';
    let verdict = guest.verify();
    assert_eq!((verdict.guest_failure.as_deref(), verdict.is_sound()), (Some("x"), false));
}

#[test]
fn the_longest_gap_since_a_moment_is_the_first_listed_after_it() {
    let mut guest = Guest::filled("fill=1M");
    for (n, (tsc_end, cycles)) in [(1000, 500), (2000, 90), (3000, 20)].into_iter().enumerate() {
        guest.put(STATS_GPA, at::GAP_LIST + n * 16, tsc_end);
        guest.put(STATS_GPA, at::GAP_LIST + n * 16 + 8, cycles);
    }
    guest.put(STATS_GPA, at::GAPS_LISTED, 3);
    let longest = |guest: &Guest, since| {
        Stats::read(guest.read()).unwrap().longest_gap_since(since).map(|gap| gap.cycles)
    };
    assert_eq!(longest(&guest, 0), Some(500));
    assert_eq!(longest(&guest, 1000), Some(500));
    assert_eq!(longest(&guest, 1001), Some(90));
    assert_eq!(longest(&guest, 2500), Some(20));
    assert_eq!(longest(&guest, 3001), None);
    // The list lost what was before 900; the longest of all is known to be later than that.
    guest.put(STATS_GPA, at::GAPS_SINCE, 900);
    assert_eq!(longest(&guest, 800), None);
    guest.put(STATS_GPA, at::LONGEST_GAP, 500);
    guest.put(STATS_GPA, at::LONGEST_GAP_END, 1000);
    assert_eq!(longest(&guest, 800), Some(500));
}

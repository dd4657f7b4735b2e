//! Properties of the model: what guest and host agree on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use ledger::model::layout::{MAX_RAM_GPA, MMIO_BYTES, MMIO_GPA, data_start};
use ledger::model::page::{self, Identity, Page, WORDS};
use ledger::{Content, Damage, PAGE_SIZE, Params, Park, Pattern, Problem, Range, Ranges, Rate, Serial};
use proptest::prelude::*;

fn contents() -> impl Strategy<Value = Content> {
    prop_oneof![Just(Content::Random), Just(Content::Text), Just(Content::Zero)]
}

fn patterns() -> impl Strategy<Value = Pattern> {
    prop_oneof![
        Just(Pattern::Seq),
        Just(Pattern::Uniform),
        (1..=100u8, 0..=100u8)
            .prop_map(|(pages_percent, writes_percent)| Pattern::Hot { pages_percent, writes_percent })
    ]
}

fn params() -> impl Strategy<Value = Params> {
    let rate = prop_oneof![Just(Rate::Idle), Just(Rate::Max), (1..=1_000_000u32).prop_map(Rate::Paced)];
    let serial = prop_oneof![Just(Serial::Mmio), Just(Serial::Port), Just(Serial::None)];
    let sizes = (1..=1u64 << 20).prop_flat_map(|fill| (Just(fill), 1..=fill));
    let numbers = (any::<u64>(), 10..=1_000_000u64, 0..=3_600_000u64, 0..=1_000_000u64);
    let more = (0..=100_000_000u64, any::<u64>(), prop_oneof![Just(Park::Pad), Just(Park::Spin)]);
    let more = (more, prop::option::of(0..=1u64 << 40), (0..=1_000_000u64, 0..=u64::from(u32::MAX)));
    (sizes, rate, patterns(), contents(), serial, numbers, more).prop_map(
        |((fill, ws), rate, pattern, content, serial, numbers, ((tsc_khz, stop_after, park), ring, disk))| {
            let (seed, tick_us, report_ms, scrub_mb_s) = numbers;
            let (fill_bytes, ws_bytes) = (fill * PAGE_SIZE, ws * PAGE_SIZE);
            Params {
                seed,
                fill_bytes,
                ws_bytes,
                rate,
                pattern,
                content,
                tick_us,
                report_ms,
                scrub_mb_s,
                tsc_khz,
                stop_after,
                ring,
                disk_mb_s: disk.0,
                disk_stop: disk.1,
                serial,
                park,
            }
        },
    )
}

fn fresh(id: &Identity) -> Page {
    let mut page = [0xAAAA_AAAA_AAAA_AAAA; WORDS];
    page::write(&mut page, id);
    page
}

fn bytes(page: &Page) -> Vec<u8> {
    page.iter().flat_map(|word| word.to_le_bytes()).collect()
}

proptest! {
    #[test]
    fn a_command_line_reads_back_as_what_was_written(params in params()) {
        prop_assert_eq!(params.to_string().parse::<Params>(), Ok(params));
    }

    #[test]
    fn any_text_is_read_or_refused(line in "[a-z_]{0,8}=[ -~]{0,12}( (fill|ws|rate|seed)=[0-9KMGx]{0,22})*") {
        let _ = line.parse::<Params>();
    }

    #[test]
    fn a_pattern_stays_in_the_working_set(
        pattern in patterns(), seed: u64, pages in 1..1u64 << 40, k: u64,
    ) {
        prop_assert!(pattern.page_of(seed, pages, k) < pages);
    }

    #[test]
    fn a_page_is_what_its_identity_says(
        seed: u64, number: u64, version: u32, iteration: u64, content in contents(),
    ) {
        let id = Identity { seed, page: number, version, iteration, content };
        let page = fresh(&id);
        prop_assert_eq!(page::check(&page, number, version, seed, content), Ok(()));
        prop_assert!(!content.is_blank(version) || page == [0; WORDS]);
    }

    #[test]
    fn one_flipped_bit_is_noticed(
        seed: u64, number: u64, version: u32, word in 0..WORDS, bit in 0..64, content in contents(),
    ) {
        let id = Identity { seed, page: number, version, iteration: 3, content };
        let mut page = fresh(&id);
        page[word] ^= 1u64 << bit;
        prop_assert!(page::check(&page, number, version, seed, content).is_err());
    }

    #[test]
    fn an_older_version_is_stale(seed: u64, number: u64, version in 4..u32::MAX, back in 1..3u32) {
        let old = Identity { seed, page: number, version: version - back, iteration: 3, content: Content::Text };
        let found = page::check(&fresh(&old), number, version, seed, Content::Text);
        prop_assert_eq!(found, Err((Damage::Stale, version - back)));
    }

    #[test]
    fn two_halves_are_torn(seed: u64, number: u64, version in 2..u32::MAX, cut in 8..WORDS) {
        let new = Identity { seed, page: number, version, iteration: 9, content: Content::Random };
        let old = Identity { version: version - 1, iteration: 3, ..new };
        let mut page = fresh(&new);
        page[cut..].copy_from_slice(&fresh(&old)[cut..]);
        let found = page::check(&page, number, version, seed, Content::Random);
        prop_assert_eq!(found, Err((Damage::Torn, version)));
    }

    #[test]
    fn data_pages_lie_in_ram_and_only_once(
        pieces in prop::collection::vec((0..40_000_000u64, 0..20_000_000u64), 1..7), fill in 1..1000u64,
    ) {
        let ram: Vec<_> = pieces.iter().map(|(at, len)| Range { start: at * 1000, len: len * 1000 }).collect();
        let Ok(ranges) = Ranges::for_data(&ram, fill) else { return Ok(()) };
        let covered = |gpa: u64| ram.iter().any(|range| range.start <= gpa && gpa < range.start + range.len);
        let mut behind = data_start(fill);
        for number in (0..ranges.pages()).step_by(997).chain([ranges.pages() - 1]) {
            let gpa = ranges.gpa_of(number).unwrap();
            prop_assert!(gpa >= behind && gpa + PAGE_SIZE <= MAX_RAM_GPA && gpa % PAGE_SIZE == 0);
            prop_assert!(covered(gpa) && covered(gpa + PAGE_SIZE - 1));
            prop_assert!(!(MMIO_GPA..MMIO_GPA + MMIO_BYTES).contains(&gpa));
            behind = gpa;
        }
        prop_assert_eq!(ranges.gpa_of(ranges.pages()), None);
    }
}

#[test]
fn defaults_and_unknown_words() {
    let params: Params = "console=ttyS0 quiet fill=8M".parse().unwrap();
    let expected = Params { fill_bytes: 8 << 20, ws_bytes: 8 << 20, ..Params::default() };
    assert_eq!(params, expected);
    assert_eq!("".parse(), Ok(Params::default()));
}

#[test]
fn wrong_values_are_refused_by_name() {
    let cases = [
        ("fill=1T", "fill", Problem::NotASize),
        ("fill=", "fill", Problem::NotASize),
        ("fill=5000", "fill", Problem::NotPages),
        ("fill=99999999999999999999K", "fill", Problem::NotASize),
        ("fill=18014398509481984K", "fill", Problem::NotASize),
        ("fill=4M ws=8M", "ws", Problem::LargerThanFill),
        ("rate=fast", "rate", Problem::NotANumber),
        ("seed=+3", "seed", Problem::NotANumber),
        ("hot_pages=0", "hot_pages", Problem::OutOfRange(1, 100)),
        ("pattern=zipf", "pattern", Problem::NotAChoice("seq, uniform, hot")),
        ("content=noise", "content", Problem::NotAChoice("random, text, zero")),
    ];
    for (line, key, problem) in cases {
        let error = line.parse::<Params>().unwrap_err();
        assert_eq!((error.key, error.problem), (key, problem), "{line}");
        assert!(error.to_string().starts_with(key));
    }
}

#[test]
fn memory_of_our_vmm_skips_the_hole() {
    let gib = 1 << 30;
    let ram = [Range { start: 4 * gib, len: 2 * gib }, Range { start: 0, len: 3 * gib }];
    let ranges = Ranges::for_data(&ram, 1000).unwrap();
    let low_pages = (3 * gib - data_start(1000)) / PAGE_SIZE;
    assert_eq!(ranges.gpa_of(0), Some(data_start(1000)));
    assert_eq!(ranges.gpa_of(low_pages - 1), Some(3 * gib - PAGE_SIZE));
    assert_eq!(ranges.gpa_of(low_pages), Some(4 * gib));
    assert!(Ranges::for_data(&ram, 2 << 20).is_err());
}

#[test]
fn hot_pages_take_their_share() {
    let pattern = Pattern::Hot { pages_percent: 10, writes_percent: 90 };
    let hits = (0..100_000).filter(|k| pattern.page_of(7, 1000, *k) < 100).count();
    assert!((89_000..91_000).contains(&hits), "{hits}");
    let mut seen = [0u32; 1000];
    for k in 0..1_000_000 {
        seen[pattern.page_of(7, 1000, k) as usize] += 1;
    }
    // Hot pages: 9000 writes each; cold ones: 111.
    assert!(seen[..100].iter().all(|count| (8500..9500).contains(count)));
    assert!(seen[100..].iter().all(|count| (50..200).contains(count)));
}

#[test]
fn uniform_writes_are_uniform() {
    let mut seen = [0u32; 1000];
    for k in 0..1_000_000 {
        seen[Pattern::Uniform.page_of(1, 1000, k) as usize] += 1;
    }
    assert!(seen.iter().all(|count| (800..1200).contains(count)));
}

/// A greedy matcher with a one-entry hash table, as fast compressors have: the bytes its output would take.
fn estimated_compressed_bytes(input: &[u8]) -> usize {
    let mut table = vec![usize::MAX; 1 << 14];
    let (mut at, mut literals, mut out) = (0, 0, 0);
    while at + 4 <= input.len() {
        let key = u32::from_le_bytes(input[at..at + 4].try_into().unwrap());
        let slot = (key.wrapping_mul(0x9E37_79B1) >> 18) as usize;
        let candidate = std::mem::replace(&mut table[slot], at);
        if candidate == usize::MAX || input[candidate..candidate + 4] != input[at..at + 4] {
            (at, literals) = (at + 1, literals + 1);
            continue;
        }
        let length =
            (0..).take_while(|i| at + i < input.len() && input[candidate + i] == input[at + i]).count();
        // A token, an offset, and the literals before it.
        out += 3 + literals;
        (at, literals) = (at + length, 0);
    }
    out + literals + input.len() - at
}

#[test]
fn text_compresses_like_text_and_random_does_not() {
    for seed in 0..20 {
        let id = Identity { seed, page: seed * 5, version: 1, iteration: 0, content: Content::Text };
        let text = estimated_compressed_bytes(&bytes(&fresh(&id)));
        assert!((1000..2000).contains(&text), "{text} of 4096 bytes");
        let random = Identity { content: Content::Random, ..id };
        let random = estimated_compressed_bytes(&bytes(&fresh(&random)));
        assert!(random > 4000, "{random} of 4096 bytes");
    }
}

#[test]
fn random_bytes_are_evenly_spread() {
    let mut counts = [0u32; 256];
    for page in 0..256 {
        let id = Identity { seed: 1, page, version: 1, iteration: 0, content: Content::Random };
        for byte in bytes(&fresh(&id)).into_iter().skip(64) {
            counts[usize::from(byte)] += 1;
        }
    }
    // 4032 expected of each; the standard deviation is 63.
    assert!(counts.iter().all(|count| (3600..4450).contains(count)), "{counts:?}");
}

use super::samples::{arrival, busy};
use super::*;
use crate::report::{Outcome, PhaseTime, RoundReport};
use proptest::prelude::*;

const HOSTILE: &str =
    "\"><script>alert(1)</script><img src=x onerror=alert(2)>'</style></title>&\u{202e}\u{0}";

/// Every `<…>` of a page, and what is between them has no further ones: tags as a parser would see them.
fn tags(page: &str) -> Vec<&str> {
    page.split('<').skip(1).map(|rest| rest.split_once('>').expect("a tag that ends").0).collect()
}

fn count(page: &str, what: &str) -> usize {
    page.matches(what).count()
}

#[test]
fn every_round_and_every_phase_has_a_bar_and_a_row() {
    let (report, page) = (busy(), page(&busy()));
    assert_eq!(count(&page, "<g class=\"round\">"), report.rounds.len());
    assert_eq!(count(&page, "<g class=\"forecast\">"), report.rounds.len() - 1);
    let still = report.phases.iter().filter(|time| parts::stands_still(time.phase)).count();
    assert_eq!(count(&page, "<g class=\"phase\">"), report.phases.len() + still);
    for text in [
        "web-1",
        "5.6 ms",
        "2.03 s",
        "192.0.2.7:7700",
        "8952 bytes",
        "socket buffers",
        "manual-initially-set",
    ] {
        assert!(page.contains(text), "{text}");
    }
    assert_eq!(count(&page, "<g class=\"speed\">"), 5);
    assert!(arrival_page(&arrival()).contains("It arrived"));
    let mut followed = (busy(), arrival());
    followed.0.post_copy = Some(crate::report::PostCopyReport { asked_pages: 4711, ..Default::default() });
    followed.1.post_copy = Some(crate::report::FaultReport { faults: 4712, ..Default::default() });
    assert!(super::page(&followed.0).contains("4711") && arrival_page(&followed.1).contains("4712"));
}

#[test]
fn every_chart_is_described_and_has_its_numbers_in_a_table() {
    let page = page(&busy());
    let charts = count(&page, "role=\"img\"");
    assert_eq!(charts, 5);
    assert_eq!(count(&page, "<title id="), charts);
    assert_eq!(count(&page, "<desc id="), charts);
    assert_eq!(count(&page, "<details>"), 4, "the downtime is part of the timeline");
    let mut ids: Vec<_> = page.split(" id=\"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
    let all = ids.len();
    ids.sort_unstable();
    ids.dedup();
    assert_eq!(ids.len(), all, "an id stands twice");
}

#[test]
fn a_page_asks_the_network_for_nothing_and_runs_nothing() {
    for page in [page(&busy()), arrival_page(&arrival())] {
        assert!(page.contains("default-src 'none'"));
        for word in
            ["http:", "https:", "//", "url(", "@import", "<script", "<iframe", "<object", "javascript:"]
        {
            assert!(!page.contains(word), "{word}");
        }
    }
}

#[test]
fn words_of_others_stay_words() {
    let mut hostile = busy();
    hostile.workload = HOSTILE.into();
    hostile.peer = HOSTILE.into();
    hostile.tracking = HOSTILE.into();
    hostile.warnings = vec![HOSTILE.into(); 300];
    hostile.outcome = Outcome::Failed { reason: HOSTILE.into() };
    let mut arrived = arrival();
    (arrived.workload, arrived.peer, arrived.error) = (HOSTILE.into(), HOSTILE.into(), Some(HOSTILE.into()));
    for page in [page(&hostile), arrival_page(&arrived)] {
        for tag in tags(&page) {
            assert!(!tag.starts_with("script") && !tag.starts_with("img"), "{tag}");
            assert!(!tag.contains("onerror") && !tag.contains("alert"), "{tag}");
        }
        assert_eq!(count(&page, "</style>"), 1);
        assert!(!page.contains('\u{202e}') && !page.contains('\u{0}'));
    }
}

proptest! {
    #[test]
    fn any_numbers_give_a_page_of_bounded_size(
        numbers in proptest::collection::vec(any::<[u64; 8]>(), 0..150),
        phases in proptest::collection::vec(any::<u64>(), 0..60),
        totals in any::<[u64; 4]>(),
    ) {
        let mut report = busy();
        report.rounds = numbers
            .iter()
            .map(|n| RoundReport {
                round: n[0] as u32,
                frozen: n[0] % 5 == 0,
                dirty_pages: n[1],
                sent_pages: n[2],
                zero_pages: n[3],
                skipped_pages: n[4],
                sent_bytes: n[5],
                duration_us: n[6],
                rate_bytes_per_s: n[7],
                remaining_pages: n[1],
                predicted_downtime_us: n[2],
                ..RoundReport::default()
            })
            .collect();
        report.phases = phases
            .iter()
            .map(|us| PhaseTime { phase: crate::report::Phase::Rounds, duration_us: *us })
            .collect();
        (report.downtime_us, report.total_us, report.sent_bytes, report.memory_bytes) =
            (totals[0], totals[1], totals[2], totals[3]);
        let page = page(&report);
        prop_assert!(page.len() < 400_000);
        for word in ["NaN", "inf%", "-0.", "=\"-"] {
            prop_assert!(!page.contains(word), "{}", word);
        }
    }
}

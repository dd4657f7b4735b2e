//! Report pages in a real browser.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::Host;
use e2e::browser::Browser;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");

/// Names that a peer or an operator might choose to break a page with.
const HOSTILE: &str = "<script>document.title='broken'</script><img src=\"http://192.0.2.1/x.png\" onerror=\"document.title='broken'\">";

fn report(workload: &str) -> Value {
    let round = |round: u32, dirty: u64, duration_us: u64, left: u64| {
        json!({
            "round": round, "frozen": left == 0, "dirty_pages": dirty, "sent_pages": dirty - dirty / 8, "zero_pages": dirty / 16,
            "skipped_pages": if round == 0 { dirty / 16 } else { 0 }, "sent_bytes": dirty * 3600, "duration_us": duration_us,
            "rate_bytes_per_s": dirty * 3600 * 1_000_000 / duration_us, "remaining_pages": left,
            "predicted_downtime_us": if left == 0 { 0 } else { 2500 + left * 7 },
        })
    };
    let phases = [
        ("greet", 1_900),
        ("offer", 48_000),
        ("track", 700),
        ("rounds", 1_958_000),
        ("freeze", 2_300),
        ("state", 600),
        ("ready", 1_900),
        ("pledge", 60),
        ("commit", 700),
        ("settle", 12_000),
    ];
    json!({
        "event": "report", "version": 1, "migration": "00112233445566778899aabbccddeeff", "workload": workload,
        "peer": "192.0.2.7:7700 (SHA256:q1w2e3r4t5z6u7i8o9p0aAsSdDfFgGhHjJkKlLyYxXc)", "outcome": {"type": "moved"},
        "tracking": "manual-initially-set", "memory_bytes": 1_u64 << 30, "page_streams": 2,
        "phases": phases.map(|(phase, us)| json!({"phase": phase, "duration_us": us})),
        "rounds": [
            round(0, 262_144, 1_480_000, 61_000), round(1, 61_000, 352_000, 15_100), round(2, 15_100, 91_000, 4_100),
            round(3, 4_100, 26_000, 1_150), round(4, 1_150, 9_000, 400), round(5, 420, 3_100, 0),
        ],
        "sent_pages": 300_936, "zero_pages": 21_494, "skipped_pages": 16_384, "sent_bytes": 1_237_730_400_u64, "state_bytes": 21_504,
        "downtime_us": 5_560, "total_us": 2_026_160,
        "link": {"rtt_us": 310, "sent_wire_bytes": 1_262_000_000_u64, "lost_packets": 12, "mtu_bytes": 8952},
        "warnings": ["this host's socket buffers are small: sysctl net.core.rmem_max=33554432 net.core.wmem_max=33554432"],
    })
}

/// Draws a report with `migrate report`.
fn draw(host: &Host, name: &str, report: &Value) -> PathBuf {
    let (from, to) = (host.path(&format!("{name}.json")), host.path(&format!("{name}.html")));
    std::fs::write(&from, report.to_string()).unwrap();
    host.run(&["report", from.to_str().unwrap(), "-o", to.to_str().unwrap()]).success();
    to
}

/// Keeps a picture where `MIGRATE_TEST_PICTURES` says, for people to look at.
fn keep(browser: &mut Browser, name: &str) {
    let picture = browser.screenshot();
    assert!(picture.starts_with(b"\x89PNG"), "{name}");
    if let Some(directory) = std::env::var_os("MIGRATE_TEST_PICTURES") {
        std::fs::write(Path::new(&directory).join(format!("{name}.png")), picture).unwrap();
    }
}

fn assert_quiet(browser: &Browser) {
    let strangers: Vec<_> = browser
        .requests
        .iter()
        .filter(|url| !url.starts_with("file://") && !url.starts_with("data:"))
        .collect();
    assert!(strangers.is_empty(), "the page asks for {strangers:?}");
    assert!(!browser.requests.is_empty(), "the page itself was asked for");
    assert!(browser.complaints.is_empty(), "{:?}", browser.complaints);
}

#[test]
fn a_report_is_whole_quiet_and_fits_every_screen() {
    let Some(mut browser) = Browser::start("a_report_is_whole_quiet_and_fits_every_screen") else { return };
    let host = Host::new(Path::new(PROGRAM));
    let page = draw(&host, "move", &report("web-1"));
    let mut backgrounds = Vec::new();
    for (name, width_px, dark) in
        [("light", 1100, false), ("dark", 1100, true), ("phone-light", 360, false), ("phone-dark", 360, true)]
    {
        browser.open(&page, width_px, dark);
        assert_eq!(browser.evaluate("document.querySelectorAll('svg g.round').length"), 6, "{name}");
        assert_eq!(browser.evaluate("document.querySelectorAll('svg g.forecast').length"), 5, "{name}");
        // Every bar has a width that can be seen, and stays inside its chart.
        let drawn = "[...document.querySelectorAll('figure svg')].every(svg => { \
                     const box = svg.getBoundingClientRect(); \
                     return [...svg.querySelectorAll('rect, text')].every(part => { \
                     const inner = part.getBoundingClientRect(); \
                     return inner.width > 0 && inner.left >= box.left - 1 && inner.right <= box.right + 1; }); })";
        assert_eq!(browser.evaluate(drawn), true, "{name}");
        let text = "document.body.innerText.includes('5.6 ms') && document.title.startsWith('web-1 to')";
        assert_eq!(browser.evaluate(text), true, "{name}");
        browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = true)");
        assert_eq!(
            browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"),
            true,
            "{name}: something is wider than the screen"
        );
        browser.evaluate("document.querySelectorAll('details').forEach(details => details.open = false)");
        keep(&mut browser, name);
        backgrounds.push(browser.evaluate("getComputedStyle(document.body).backgroundColor"));
        assert_quiet(&browser);
    }
    assert_ne!(backgrounds[0], backgrounds[1], "dark is not light");
}

#[test]
fn hostile_names_stay_text_in_a_browser() {
    let Some(mut browser) = Browser::start("hostile_names_stay_text_in_a_browser") else { return };
    let host = Host::new(Path::new(PROGRAM));
    let mut report = report(HOSTILE);
    report["peer"] = HOSTILE.into();
    report["warnings"] = json!([HOSTILE]);
    report["outcome"] = json!({"type": "failed", "reason": HOSTILE});
    let page = draw(&host, "hostile", &report);
    browser.open(&page, 360, false);
    assert_eq!(browser.evaluate("document.querySelectorAll('script, img, iframe').length"), 0);
    assert_eq!(
        browser.evaluate("document.title.includes('broken') && document.title.startsWith('<script>')"),
        true
    );
    assert_eq!(browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth"), true);
    keep(&mut browser, "hostile");
    assert_quiet(&browser);
}

#[test]
fn what_is_no_report_is_refused() {
    let host = Host::new(Path::new(PROGRAM));
    let file = host.path("move.json");
    std::fs::write(&file, "{\"phases\": 7}").unwrap();
    let refused = host.run(&["report", file.to_str().unwrap()]);
    assert_eq!(refused.code, 2, "{refused:?}");
    assert!(refused.stderr.contains("no report"), "{refused:?}");
    assert_eq!(host.run(&["report", "/nowhere/move.json"]).code, 3);
}

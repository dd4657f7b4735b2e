//! What asking for dirty pages costs where there are hardly any: it must not grow with the guest's memory.

use super::account::wait_running;
use super::memory::status_kib;
use crate::Host;
use crate::guest::Window;
use protocol::monitor::Role;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};

/// Guests to compare, in GiB. Their memory is hardly touched, so the large one fits into a small machine.
const SIZES_GIB: [u64; 2] = [1, 16];

/// How often it is asked.
const HARVESTS: usize = 50;

/// How long the VMM may take for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(30);

/// The cost of one harvest of an idle guest, and how the memory of its VMM changes by it, for a small and a large guest.
///
/// # Panics
/// If the guest cannot be started or tracked.
pub(super) fn measure(program: &Path, quick: bool) -> Value {
    let sizes = if quick { &SIZES_GIB[..1] } else { &SIZES_GIB[..] };
    sizes.iter().map(|gib| one(program, *gib)).collect()
}

fn one(program: &Path, gib: u64) -> Value {
    let host = Host::new(program);
    let line = "fill=16M ws=4M rate=0 scrub=0 report_ms=0";
    host.run_ledger("bench", &format!("{gib}GiB"), line, &["--serial", "none"]);
    let pid = host.vm_pid("bench");
    wait_running(&Window::open(pid).expect("the guest's memory"));
    let socket = host.runtime_dir().join("bench.sock");
    let mut client = vmm::Client::connect(&socket, Role::Session, "bench", ANSWER_LIMIT).expect("a session");
    let layout = client.describe().expect("a description").layout;
    client.track_start(false).expect("tracking");
    // The first one finds all memory dirty, which is taken: from then on there is next to nothing.
    for (space, set) in layout.spaces.iter().zip(client.harvest(&layout).expect("a harvest")) {
        for run in set.runs(space.id, u32::MAX) {
            client.take(run).expect("pages are taken");
        }
    }
    let rss = |pid| status_kib(pid, &["RssAnon", "RssShmem", "RssFile"]);
    let rss_before_kib = rss(pid);
    let mut micros: Vec<f64> = Vec::new();
    let mut dirty_pages = 0;
    for _ in 0..HARVESTS {
        std::thread::sleep(Duration::from_millis(10));
        let begun = Instant::now();
        let sets = client.harvest(&layout).expect("a harvest");
        micros.push(begun.elapsed().as_secs_f64() * 1e6);
        dirty_pages = sets.iter().map(protocol::page::PageSet::count).sum();
    }
    micros.sort_by(f64::total_cmp);
    json!({
        "memory_gib": gib,
        "harvest_us": {"median": micros[HARVESTS / 2], "least": micros[0], "most": micros[HARVESTS - 1]},
        "dirty_pages": dirty_pages,
        "vmm_rss_kib": rss(pid),
        "vmm_rss_grown_kib": rss(pid).saturating_sub(rss_before_kib),
    })
}

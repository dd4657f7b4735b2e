//! The highest dirty rate that still converges, without throttling, over a link that is slower than the guest.
//!
//! The link is the same for both: two network namespaces, a token bucket at each end. Both may take 300 ms of downtime and
//! the same time. Rates are tried by halving, ours and QEMU's in turn.

use super::cases::Case;
use super::ours::Ours;
use super::qemu::{DOWNTIME_MS, Qemu, Way};
use crate::network::{self, Cable};
use serde_json::{Value, json};
use std::path::Path;
use std::time::Duration;

/// The link, in bits per second: Gigabit Ethernet.
const LINK_BITS_PER_S: u64 = 1_000_000_000;

/// Rates between which the highest one is looked for, in MB/s: nothing converges at the second.
const FROM_TO: (u64, u64) = (0, 192);

/// How close to find it, in MB/s.
const CLOSE: u64 = 6;

/// A move that takes longer did not converge.
const LIMIT: Duration = Duration::from_secs(40);

const MEMORY_MIB: u64 = 512;

/// As plain as QEMU's can be: its encryption would only slow it down.
const THEIRS: Way = Way { name: "qemu", tls: false, channels: None, downtime_ms: DOWNTIME_MS };

/// Finds both; `None` where namespaces cannot be made.
pub(super) fn measure(program: &Path, tsc_khz: Option<u64>) -> Option<Value> {
    if network::without_root("the highest dirty rate that converges") {
        return None;
    }
    let cable = Cable::new(9_000);
    cable.set_rate(Some(LINK_BITS_PER_S));
    let mut tsc_khz = tsc_khz;
    let (mut ours, mut theirs) = (FROM_TO, FROM_TO);
    while ours.1 - ours.0 > CLOSE || theirs.1 - theirs.0 > CLOSE {
        halve("ours", &mut ours, |rate| {
            let guest = Ours::start(program, &case(rate), 1, Some(&cable));
            tsc_khz = Some(guest.tsc_khz());
            let (downtime, timeout) = (format!("{DOWNTIME_MS}ms"), format!("{}s", LIMIT.as_secs()));
            let mut arguments = vec!["--downtime", &downtime, "--timeout", &timeout, "--max-rounds", "10000"];
            // Neither a throttle nor post-copy, and no longer downtime than QEMU's.
            arguments.extend(["--max-downtime", &downtime, "--on-stall", "minimum,cancel"]);
            guest.try_measure(MEMORY_MIB, &arguments)
        });
        let khz = tsc_khz.expect("ours came first");
        halve("qemu", &mut theirs, |rate| {
            let moved = Qemu::start(&case(rate), 1, khz, THEIRS, Some(&cable))
                .and_then(|guest| guest.measure(MEMORY_MIB, LIMIT));
            moved.unwrap_or_else(|error| panic!("qemu at {rate} MB/s: {error}"))
        });
    }
    Some(json!({
        "link_mb_per_s": LINK_BITS_PER_S / 8_000_000,
        "ours_mb_per_s": ours.0,
        "qemu_mb_per_s": theirs.0,
        "within_mb_per_s": CLOSE,
    }))
}

/// Tries the rate in the middle. A downtime twice as long as allowed, as the guest saw it, is no convergence either.
fn halve(who: &str, between: &mut (u64, u64), attempt: impl FnOnce(u64) -> Result<Value, String>) {
    if between.1 - between.0 <= CLOSE {
        return;
    }
    let rate = u64::midpoint(between.0, between.1);
    let moved = attempt(rate);
    let downtime_us = moved.as_ref().ok().and_then(|sample| sample["downtime_guest_us"].as_u64());
    let converged = downtime_us.is_some_and(|us| us <= 2 * 1000 * DOWNTIME_MS);
    eprintln!(
        "ceiling {who} {rate} MB/s: {}",
        match (&moved, downtime_us) {
            (Ok(_), Some(us)) => format!("downtime {us} us, converged: {converged}"),
            (Err(why), _) => format!("did not converge: {}", why.lines().last().unwrap_or_default()),
            (Ok(_), None) => "no downtime".to_owned(),
        }
    );
    *(if converged { &mut between.0 } else { &mut between.1 }) = rate;
}

/// The guest of this rate. A case's command line is static, as most are: these few are kept until the end.
fn case(rate: u64) -> Case {
    let cmdline = format!("fill=384M ws=256M rate={rate} park=spin");
    Case {
        name: "ceiling",
        memory_mib: MEMORY_MIB,
        cmdline: Box::leak(cmdline.into_boxed_str()),
        most_runs: 1,
    }
}

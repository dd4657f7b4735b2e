//! The highest rate that a guest writes at, as it says itself, and that still converges, without throttling, over a link that is slower
//! than the guest.
//!
//! The link is the same for both: two network namespaces, a token bucket at each end. Both may take 300 ms of downtime and
//! the same time. Rates are told by halving, ours and QEMU's in turn. What counts is what the guest did write while it moved: first writes to
//! protected pages, and others that take its core, may keep it far below the rate that it was told, and a move that converges then says
//! nothing of that rate. So the halving goes on below it, as if it had not converged.

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

/// The part of the rate it was told that a guest must have written at while it moved, for that rate to count.
const WRITTEN_PART: f64 = 0.9;

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
    let (mut ours, mut theirs) = (Search::new("ours"), Search::new("qemu"));
    while !(ours.is_over() && theirs.is_over()) {
        ours.halve(|rate| {
            let guest = Ours::start(program, &case(rate), 1, Some(&cable));
            tsc_khz = Some(guest.tsc_khz());
            let (downtime, timeout) = (format!("{DOWNTIME_MS}ms"), format!("{}s", LIMIT.as_secs()));
            let mut arguments = vec!["--downtime", &downtime, "--timeout", &timeout, "--max-rounds", "10000"];
            // Neither a throttle nor post-copy, and no longer downtime than QEMU's.
            arguments.extend(["--max-downtime", &downtime, "--on-stall", "minimum,cancel"]);
            guest.try_measure(MEMORY_MIB, &arguments)
        });
        let khz = tsc_khz.expect("ours came first");
        theirs.halve(|rate| {
            let moved = Qemu::start(&case(rate), 1, khz, THEIRS, Some(&cable))
                .and_then(|guest| guest.measure(MEMORY_MIB, LIMIT));
            moved.unwrap_or_else(|error| panic!("qemu at {rate} MB/s: {error}"))
        });
    }
    Some(json!({
        "link_mb_per_s": LINK_BITS_PER_S / 8_000_000,
        "ours_mb_per_s": ours.written_mb_per_s,
        "qemu_mb_per_s": theirs.written_mb_per_s,
        "within_mb_per_s": CLOSE,
        "ours_tried": ours.tried,
        "qemu_tried": theirs.tried,
    }))
}

/// What became of a rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Converged,
    /// It arrived, with a downtime beyond what was allowed, or it did not.
    DidNotConverge,
    /// It converged, but the guest wrote less than it was told.
    NotWritten,
}

impl Verdict {
    /// A downtime twice as long as allowed, as the guest saw it, is no convergence either.
    fn of(rate_mb_per_s: u64, downtime_us: Option<u64>, written_mb_per_s: f64) -> Self {
        if downtime_us.is_none_or(|us| us > 2 * 1000 * DOWNTIME_MS) {
            Self::DidNotConverge
        } else if written_mb_per_s < rate_mb_per_s as f64 * WRITTEN_PART {
            Self::NotWritten
        } else {
            Self::Converged
        }
    }
}

/// The search for one ceiling.
struct Search {
    who: &'static str,
    /// The highest rate that counts so far, and the lowest that does not; as told.
    between: (u64, u64),
    /// The highest rate that a guest wrote at whose move counts.
    written_mb_per_s: f64,
    tried: Vec<Value>,
}

impl Search {
    fn new(who: &'static str) -> Self {
        Self { who, between: FROM_TO, written_mb_per_s: 0.0, tried: Vec::new() }
    }

    fn is_over(&self) -> bool {
        self.between.1 - self.between.0 <= CLOSE
    }

    /// Tries the rate in the middle.
    fn halve(&mut self, attempt: impl FnOnce(u64) -> Result<Value, String>) {
        if self.is_over() {
            return;
        }
        let rate = u64::midpoint(self.between.0, self.between.1);
        let moved = attempt(rate);
        let of = |name: &str| moved.as_ref().ok().and_then(|sample| sample[name].as_f64());
        let written = of("guest_mb_per_s_in_move");
        let downtime_us = of("downtime_guest_us").map(|us| us as u64);
        let verdict = Verdict::of(rate, downtime_us, written.unwrap_or(0.0));
        if verdict == Verdict::Converged {
            self.between.0 = rate;
            self.written_mb_per_s = self.written_mb_per_s.max(written.unwrap_or(0.0));
        } else {
            self.between.1 = rate;
        }
        let why = moved.as_ref().err().and_then(|why| why.lines().last());
        let tried = json!({
            "told_mb_per_s": rate,
            "written_mb_per_s": written,
            "downtime_us": downtime_us,
            "verdict": format!("{verdict:?}"),
            "why": why,
        });
        eprintln!("ceiling {}: {tried}", self.who);
        self.tried.push(tried);
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_that_the_guest_did_not_write_at_is_no_ceiling() {
        let fine = Some(100_000);
        assert_eq!(Verdict::of(100, fine, 95.0), Verdict::Converged);
        assert_eq!(Verdict::of(186, fine, 95.0), Verdict::NotWritten);
        assert_eq!(Verdict::of(100, Some(700_000), 95.0), Verdict::DidNotConverge);
        assert_eq!(Verdict::of(100, None, 0.0), Verdict::DidNotConverge);

        let mut search = Search::new("ours");
        for (rate, written) in [(96, 96.0), (144, 100.0), (120, 115.0), (132, 100.0), (126, 100.0)] {
            search.halve(|told| {
                assert_eq!(told, rate);
                Ok(json!({"downtime_guest_us": 100_000, "guest_mb_per_s_in_move": written}))
            });
        }
        assert!(search.is_over());
        assert_eq!(search.written_mb_per_s, 115.0);
    }
}

//! The top of a page: what happened, in one line and a few figures.

use super::parts::{figures, percent, push};
use super::text::Text;
use crate::report::{ArrivalReport, Outcome, Report};
use crate::units::{show_bytes, show_rate, show_us};

/// For a migration as its source saw it.
pub(super) fn sent(page: &mut String, report: &Report) {
    let (class, words) = match &report.outcome {
        Outcome::Moved => ("moved", "It moved, and runs at the destination.".to_owned()),
        Outcome::Failed { reason } => {
            ("failed", format!("It did not move, and runs at the source: {reason}"))
        }
        Outcome::InDoubt { reason } => ("in-doubt", format!("In doubt: {reason}")),
        Outcome::Underway => ("underway", "It had not ended when this was written.".to_owned()),
    };
    title(page, &report.workload, "to", &report.peer, class, &words);
    let forecast = report.rounds.iter().rev().find(|round| !round.frozen);
    let of_memory = percent(report.sent_bytes as f64, report.memory_bytes as f64);
    let downtime = match (report.downtime_us, forecast) {
        (0, _) => ("none".into(), "it was never stopped".into()),
        (us, None) => (show_us(us), "without a forecast".into()),
        (us, Some(round)) => (show_us(us), format!("forecast {}", show_us(round.predicted_downtime_us))),
    };
    let moving = report.phases.iter().filter(|time| time.phase == crate::report::Phase::Rounds);
    let moving_us = moving.fold(0_u64, |sum, time| sum.saturating_add(time.duration_us));
    let rate = crate::report::rate(report.sent_bytes, std::time::Duration::from_micros(moving_us));
    figures(
        page,
        &[
            ("Downtime", downtime.0, downtime.1),
            ("Total time", show_us(report.total_us), format!("{} rounds", report.rounds.len())),
            (
                "Sent",
                show_bytes(report.sent_bytes),
                // More than memory is usual: pages are sent again when they are written again.
                if report.sent_bytes > report.memory_bytes {
                    format!("of {} memory", show_bytes(report.memory_bytes))
                } else {
                    format!("{of_memory:.0} % of {}", show_bytes(report.memory_bytes))
                },
            ),
            (
                "Rate",
                if moving_us == 0 { "–".into() } else { show_rate(rate) },
                format!("{} page streams", report.page_streams),
            ),
        ],
    );
}

/// For a migration as its destination saw it.
pub(super) fn arrived(page: &mut String, report: &ArrivalReport) {
    let (class, words) = match &report.error {
        None => ("moved", "It arrived, and runs here.".to_owned()),
        Some(error) => ("failed", format!("It did not arrive: {error}")),
    };
    title(page, &report.workload, "from", &report.peer, class, &words);
    figures(
        page,
        &[
            ("Total time", show_us(report.total_us), format!("{} rounds", report.rounds)),
            ("Received", show_bytes(report.received_bytes), "on the page streams".into()),
            ("State", show_bytes(report.state_bytes), "of CPUs and devices".into()),
        ],
    );
}

fn title(page: &mut String, workload: &str, direction: &str, peer: &str, class: &str, words: &str) {
    let workload = if workload.is_empty() { "a VM" } else { workload };
    // The address alone: who proved to be there stands under the names.
    let peer = peer.split_once(" (").map_or(peer, |(address, _)| address);
    push(
        page,
        format_args!(
            "<header>\n<h1>{} {direction} {}</h1>\n<p class=\"outcome {class}\">{}</p>\n</header>\n",
            Text(workload),
            Text(peer),
            Text(words)
        ),
    );
}

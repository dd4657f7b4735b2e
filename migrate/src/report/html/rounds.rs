//! The rounds: what each found dirty, and what became of it.

use super::parts::{key, percent, push, section, svg, table};
use crate::report::RoundReport;
use crate::units::{show_bytes, show_rate, show_us};
use protocol::page::PAGE_SIZE;

/// Height of a row, in pixels: a line of text and a bar.
const ROW_PX: usize = 38;

/// The most rounds that are drawn, and the most in the table.
const MOST: (usize, usize) = (100, 2000);

/// A bar for each round.
pub(super) fn chart(page: &mut String, rounds: &[RoundReport]) {
    if rounds.is_empty() {
        return;
    }
    let drawn = rounds.get(rounds.len().saturating_sub(MOST.0)..).unwrap_or(rounds);
    let lead = if drawn.len() < rounds.len() {
        format!("Pages of each of the last {} rounds, of {}.", drawn.len(), rounds.len())
    } else {
        "Pages that each round found dirty, and what became of them.".into()
    };
    section(page, "Rounds", &lead, |page| {
        bars(page, drawn);
        key(
            page,
            &[
                ("sent", "sent"),
                ("zero", "zeros, without bytes"),
                ("skipped", "never touched, not sent"),
                ("stop", "sent while it stood still"),
            ],
        );
        let rows: Vec<_> = rounds.iter().take(MOST.1).map(row).collect();
        table(
            page,
            "Rounds as a table",
            &[
                "Round",
                "Dirty",
                "Sent",
                "Packed",
                "Zeros",
                "Not sent",
                "Held back",
                "Bytes",
                "Time",
                "Rate",
                "Left",
                "Stop then",
                "Throttle",
            ],
            &rows,
        );
    });
}

fn bars(page: &mut String, rounds: &[RoundReport]) {
    let most = rounds.iter().map(pages).max().unwrap_or(0) as f64;
    let sent_bytes = rounds.iter().fold(0_u64, |sum, round| sum.saturating_add(round.sent_bytes));
    let description =
        format!("{} rounds, {} sent; the table has the numbers.", rounds.len(), show_bytes(sent_bytes));
    svg(page, "rounds", "Pages of every round", &description, rounds.len() * ROW_PX, |page| {
        for (row, round) in rounds.iter().enumerate() {
            let (text_y, bar_y) = (row * ROW_PX + 14, row * ROW_PX + 20);
            let name = if round.frozen { "last".into() } else { round.round.to_string() };
            push(
                page,
                format_args!(
                    "<g class=\"round\"><text x=\"0\" y=\"{text_y}\">{name} \u{b7} {}</text>\
                     <text class=\"soft\" x=\"100%\" y=\"{text_y}\" text-anchor=\"end\">{}</text>\
                     <rect class=\"track\" x=\"0\" y=\"{bar_y}\" width=\"100%\" height=\"12\" rx=\"2\"/>",
                    show_bytes(round.sent_bytes),
                    speed(round),
                ),
            );
            let mut x = 0.0;
            let parts = [
                (if round.frozen { "stop" } else { "sent" }, round.sent_pages),
                ("zero", round.zero_pages),
                ("skipped", round.skipped_pages),
            ];
            for (class, pages) in parts {
                let width = percent(pages as f64, most).min(100.0 - x);
                if width > 0.0 {
                    push(
                        page,
                        format_args!(
                            "<rect class=\"{class}\" x=\"{x:.3}%\" y=\"{bar_y}\" width=\"{:.3}%\" height=\"12\"/>",
                            width.max(0.3).min(100.0 - x)
                        ),
                    );
                }
                x += width;
            }
            page.push_str("</g>\n");
        }
    });
}

/// The rate, and by how much the workload was slowed down for it.
fn speed(round: &RoundReport) -> String {
    let rate = if round.duration_us == 0 { String::new() } else { show_rate(round.rate_bytes_per_s) };
    match round.throttle_percent {
        0 => rate,
        percent => format!("throttled {percent} % \u{b7} {rate}"),
    }
}

/// What a round's bar is as long as.
fn pages(round: &RoundReport) -> u64 {
    let parts = round.sent_pages.saturating_add(round.zero_pages).saturating_add(round.skipped_pages);
    parts.max(round.dirty_pages)
}

fn row(round: &RoundReport) -> Vec<String> {
    vec![
        if round.frozen { format!("{}, frozen", round.round) } else { round.round.to_string() },
        round.dirty_pages.to_string(),
        round.sent_pages.to_string(),
        round.packed_pages.to_string(),
        round.zero_pages.to_string(),
        round.skipped_pages.to_string(),
        round.held_pages.to_string(),
        show_bytes(round.sent_bytes),
        show_us(round.duration_us),
        show_rate(round.rate_bytes_per_s),
        show_bytes(round.remaining_pages.saturating_mul(PAGE_SIZE as u64)),
        if round.frozen { "–".into() } else { show_us(round.predicted_downtime_us) },
        format!("{} %", round.throttle_percent),
    ]
}

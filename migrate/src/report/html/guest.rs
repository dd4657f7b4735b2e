//! How fast the guest was, by its own count, and what followed it where it was started without all of its memory.

use super::parts::{pairs, percent, push, section, svg, table};
use crate::report::{FaultReport, GuestSpeed, PostCopyReport, Report};
use crate::units::{show_bytes, show_rate, show_us};

/// Height of a row, in pixels: a line of text and a bar.
const ROW_PX: usize = 34;

/// The most rounds that are drawn.
const MOST: usize = 60;

/// A bar for the speed before the move, and one for each round.
pub(super) fn chart(page: &mut String, report: &Report) {
    let Some(speed) = &report.guest else { return };
    let lead = "What the guest wrote a second, by its own count: before its writes were tracked, and in each round that took long \
                enough to say.";
    section(page, "Guest speed", lead, |page| {
        let rows = rows(speed);
        let most = rows.iter().map(|(_, speed)| *speed).max().unwrap_or(0) as f64;
        let description = format!(
            "{} speeds, the highest {}; the table has the numbers.",
            rows.len(),
            show_rate(most as u64)
        );
        svg(page, "guest", "Speed of the guest", &description, rows.len() * ROW_PX, |page| {
            for (row, (name, speed)) in rows.iter().enumerate() {
                let (text_y, bar_y) = (row * ROW_PX + 14, row * ROW_PX + 20);
                let class = if row == 0 && name == "before" { "zero" } else { "sent" };
                push(
                    page,
                    format_args!(
                        "<g class=\"speed\"><text x=\"0\" y=\"{text_y}\">{name}</text>\
                         <text class=\"soft\" x=\"100%\" y=\"{text_y}\" text-anchor=\"end\">{}</text>\
                         <rect class=\"track\" x=\"0\" y=\"{bar_y}\" width=\"100%\" height=\"9\" rx=\"2\"/>\
                         <rect class=\"{class}\" x=\"0\" y=\"{bar_y}\" width=\"{:.3}%\" height=\"9\" rx=\"2\"/></g>\n",
                        show_rate(*speed),
                        percent(*speed as f64, most).max(0.3),
                    ),
                );
            }
        });
        let cells: Vec<_> = rows.iter().map(|(name, speed)| vec![name.clone(), show_rate(*speed)]).collect();
        table(page, "Speeds as a table", &["Round", "Written by the guest"], &cells);
    });
}

fn rows(speed: &GuestSpeed) -> Vec<(String, u64)> {
    let mut rows = Vec::new();
    if speed.before_bytes_per_s > 0 {
        rows.push(("before".to_owned(), speed.before_bytes_per_s));
    }
    let drawn = speed.rounds.get(speed.rounds.len().saturating_sub(MOST)..).unwrap_or(&speed.rounds);
    rows.extend(drawn.iter().map(|of| (of.round.to_string(), of.bytes_per_s)));
    rows
}

/// What followed, as the source saw it.
pub(super) fn followed(page: &mut String, of: &PostCopyReport) {
    let lead = "The VM was started at the destination without all of its memory; the rest followed.";
    section(page, "Post-copy", lead, |page| {
        pairs(
            page,
            &[
                ("Pages missing at the start", of.missing_pages.to_string()),
                ("Pages that somebody waited for", of.asked_pages.to_string()),
                ("Neighbours sent with them", of.prefetched_pages.to_string()),
                ("Pages sent in their turn", of.pushed_pages.to_string()),
                ("Bytes", show_bytes(of.sent_bytes)),
                ("Links lost and made again", of.lost_links.to_string()),
                ("Time", show_us(of.duration_us)),
            ],
        );
    });
}

/// What followed, as the destination saw it.
pub(super) fn faulted(page: &mut String, of: &FaultReport) {
    let lead = "The VM was started here without all of its memory; the rest followed.";
    section(page, "Post-copy", lead, |page| {
        pairs(
            page,
            &[
                ("Pages missing at the start", of.missing_pages.to_string()),
                ("Pages that came", of.received_pages.to_string()),
                ("Pages touched before they came", of.faults.to_string()),
                ("Wait for a page, mean", show_us(of.fault_mean_us)),
                ("Wait for a page, 99th percentile", show_us(of.fault_p99_us)),
                ("Wait for a page, longest", show_us(of.fault_max_us)),
                ("Links lost and made again", of.lost_links.to_string()),
                ("Time", show_us(of.duration_us)),
            ],
        );
    });
}

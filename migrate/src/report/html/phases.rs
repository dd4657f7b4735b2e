//! The timeline: what was done when, and the part of it in which the workload stood still, enlarged.

use super::parts::{key, percent, push, section, stands_still, svg, table};
use crate::report::{PhaseTime, Report};
use crate::units::show_us;

/// Height of a row, in pixels: a line of text and a bar.
const ROW_PX: usize = 36;

/// The most phases that are drawn; an engine makes about a dozen.
const MOST: usize = 40;

/// All phases, one below the other.
pub(super) fn chart(page: &mut String, phases: &[PhaseTime], total_us: u64) {
    if phases.is_empty() {
        return;
    }
    let sum_us = phases.iter().fold(0_u64, |sum, time| sum.saturating_add(time.duration_us));
    section(page, "Timeline", "From the greeting to the end.", |page| {
        rows(page, "timeline", "Phases of the migration", phases, total_us.max(sum_us));
        key(page, &[("sent", "the workload runs"), ("stop", "it stands still")]);
        table(
            page,
            "Phases as a table",
            &["Phase", "What", "Time"],
            &phases
                .iter()
                .map(|time| vec![time.phase.name().into(), time.phase.to_string(), show_us(time.duration_us)])
                .collect::<Vec<_>>(),
        );
    });
}

/// The phases in which the workload stood still.
pub(super) fn downtime(page: &mut String, report: &Report) {
    let still: Vec<_> = report.phases.iter().filter(|time| stands_still(time.phase)).copied().collect();
    if report.downtime_us == 0 || still.is_empty() {
        return;
    }
    let sum_us = still.iter().fold(0_u64, |sum, time| sum.saturating_add(time.duration_us));
    let lead = format!(
        "{} from the call that stopped the workload to the word that it runs again.",
        show_us(report.downtime_us)
    );
    section(page, "The downtime, enlarged", &lead, |page| {
        rows(page, "downtime", "Phases of the downtime", &still, sum_us);
    });
}

fn rows(page: &mut String, name: &str, title: &str, phases: &[PhaseTime], whole_us: u64) {
    let description =
        format!("{} phases, {} in all; the table has the numbers.", phases.len(), show_us(whole_us));
    let phases = phases.get(..MOST).unwrap_or(phases);
    svg(page, name, title, &description, phases.len() * ROW_PX, |page| {
        let mut at_us = 0_u64;
        for (row, time) in phases.iter().enumerate() {
            let (text_y, bar_y) = (row * ROW_PX + 14, row * ROW_PX + 20);
            let (x, width) =
                (percent(at_us as f64, whole_us as f64), percent(time.duration_us as f64, whole_us as f64));
            let class = if stands_still(time.phase) { "stop" } else { "sent" };
            push(
                page,
                format_args!(
                    "<g class=\"phase\"><text x=\"0\" y=\"{text_y}\">{}</text>\
                     <text class=\"soft\" x=\"100%\" y=\"{text_y}\" text-anchor=\"end\">{}</text>\
                     <rect class=\"track\" x=\"0\" y=\"{bar_y}\" width=\"100%\" height=\"9\" rx=\"2\"/>\
                     <rect class=\"{class}\" x=\"{x:.3}%\" y=\"{bar_y}\" width=\"{width:.3}%\" height=\"9\" rx=\"1\"/>",
                    time.phase.name(),
                    show_us(time.duration_us),
                ),
            );
            if width < 1.0 {
                // A bar that thin would be lost; a line of a pixel or two is seen.
                push(
                    page,
                    format_args!(
                        "<line class=\"thin {class}\" x1=\"{0:.3}%\" x2=\"{0:.3}%\" y1=\"{bar_y}\" y2=\"{1}\"/>",
                        x.min(99.6),
                        bar_y + 9
                    ),
                );
            }
            page.push_str("</g>\n");
            at_us = at_us.saturating_add(time.duration_us);
        }
    });
}

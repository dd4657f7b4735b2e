//! Forecast against actual downtime: what stopping behind each round would have cost, and what it did cost.

use super::parts::{push, section, svg, table};
use crate::report::{Report, RoundReport};
use crate::units::show_us;

/// Height of a row, in pixels.
const ROW_PX: usize = 24;

/// Room for the scale below, in pixels.
const SCALE_PX: usize = 24;

/// The part of the width in front of the bars, for their names, in percent.
const NAMES: f64 = 9.0;

/// The most rounds that are drawn.
const MOST: usize = 60;

/// Forecasts on a scale of powers of ten, from 100 us on.
const LEAST_US: f64 = 100.0;

/// A bar for each forecast, and a line where the downtime came to.
pub(super) fn chart(page: &mut String, report: &Report) {
    let live: Vec<_> = report.rounds.iter().filter(|round| !round.frozen).collect();
    if live.is_empty() {
        return;
    }
    let drawn = live.get(live.len().saturating_sub(MOST)..).unwrap_or(&live);
    let actual = (report.downtime_us > 0).then_some(report.downtime_us);
    let lead = match actual {
        Some(us) => format!("What stopping behind each round was forecast to cost; the line is what it did cost, {}. \
                             Each step of the scale is ten times the one before.", show_us(us)),
        None => "What stopping behind each round was forecast to cost. Each step of the scale is ten times the one before.".into(),
    };
    section(page, "Forecast and actual downtime", &lead, |page| {
        let most = drawn.iter().map(|round| round.predicted_downtime_us).chain(actual).max().unwrap_or(0);
        let scale = Scale::up_to(most as f64);
        bars(page, drawn, actual, &scale);
        let mut rows: Vec<_> = live
            .iter()
            .map(|round| vec![round.round.to_string(), show_us(round.predicted_downtime_us)])
            .collect();
        rows.extend(actual.map(|us| vec!["actual".into(), show_us(us)]));
        rows.truncate(2000);
        table(page, "Forecasts as a table", &["Behind round", "Downtime"], &rows);
    });
}

/// Powers of ten from [`LEAST_US`].
struct Scale {
    decades: f64,
}

impl Scale {
    fn up_to(most_us: f64) -> Self {
        // Beyond a thousand seconds nothing differs that matters.
        Self { decades: (most_us.max(LEAST_US * 10.0) / LEAST_US).log10().ceil().min(7.0) }
    }

    /// Where a duration is, in percent of the chart.
    fn at(&self, us: u64) -> f64 {
        let decades = (us as f64 / LEAST_US).max(1.0).log10().min(self.decades);
        NAMES + (100.0 - NAMES) * decades / self.decades
    }
}

fn bars(page: &mut String, rounds: &[&RoundReport], actual: Option<u64>, scale: &Scale) {
    let height = rounds.len() * ROW_PX;
    let description = format!(
        "{} forecasts{}; the table has the numbers.",
        rounds.len(),
        actual.map_or_else(String::new, |us| format!(", and an actual downtime of {}", show_us(us)))
    );
    svg(page, "forecast", "Forecast and actual downtime", &description, height + SCALE_PX, |page| {
        let names = ["0.1 ms", "1 ms", "10 ms", "100 ms", "1 s", "10 s", "100 s", "1000 s"];
        for (step, name) in (0..).zip(names).take_while(|(step, _)| f64::from(*step) <= scale.decades) {
            let x = NAMES + (100.0 - NAMES) * f64::from(step) / scale.decades;
            let anchor = if f64::from(step) >= scale.decades { "end" } else { "middle" };
            push(
                page,
                format_args!(
                    "<line class=\"tick\" x1=\"{x:.3}%\" x2=\"{x:.3}%\" y1=\"0\" y2=\"{height}\"/>\
                     <text class=\"soft\" x=\"{x:.3}%\" y=\"{}\" text-anchor=\"{anchor}\">{name}</text>\n",
                    height + 17
                ),
            );
        }
        for (row, round) in rounds.iter().enumerate() {
            let y = row * ROW_PX;
            let width = scale.at(round.predicted_downtime_us) - NAMES;
            push(
                page,
                format_args!(
                    "<g class=\"forecast\"><text x=\"0\" y=\"{}\">{}</text>\
                     <rect class=\"zero\" x=\"{NAMES}%\" y=\"{}\" width=\"{:.3}%\" height=\"12\" rx=\"2\"/></g>\n",
                    y + 16,
                    round.round,
                    y + 6,
                    width.max(0.4),
                ),
            );
        }
        if let Some(us) = actual {
            let x = scale.at(us).min(99.7);
            push(
                page,
                format_args!(
                    "<line class=\"actual\" x1=\"{x:.3}%\" x2=\"{x:.3}%\" y1=\"0\" y2=\"{height}\"/>\n"
                ),
            );
        }
    });
}

//! A report as one page: no script, nothing from the network, readable in light and dark, on a phone and on paper.
//!
//! Every chart is an SVG with a title and a description, and its numbers stand in a table behind it. Charts are as wide
//! as the page: positions across are percentages, heights and text are pixels, so that text keeps its size on a phone.
//!
//! Whatever comes from a peer, a guest or a file goes through `text::Text`; the page forbids itself everything but its own
//! style besides (`Content-Security-Policy`).

mod text;
mod parts;
mod head;
mod phases;
mod rounds;
mod forecast;
mod guest;
mod more;

use super::{ArrivalReport, Report};
use std::fmt::Write as _;
use text::Text;

/// The style of all pages.
const STYLE: &str = include_str!("html/style.css");

/// The page of a migration as its source saw it.
pub fn page(report: &Report) -> String {
    let mut body = String::new();
    head::sent(&mut body, report);
    phases::chart(&mut body, &report.phases, report.total_us);
    phases::downtime(&mut body, report);
    rounds::chart(&mut body, &report.rounds);
    forecast::chart(&mut body, report);
    guest::chart(&mut body, report);
    more::sent(&mut body, report);
    frame(&format!("{} to {}", report.workload, report.peer), &body)
}

/// The page of a migration as its destination saw it.
pub fn arrival_page(report: &ArrivalReport) -> String {
    let mut body = String::new();
    head::arrived(&mut body, report);
    phases::chart(&mut body, &report.phases, report.total_us);
    more::arrived(&mut body, report);
    frame(&format!("{} from {}", report.workload, report.peer), &body)
}

fn frame(title: &str, body: &str) -> String {
    let mut page = String::with_capacity(body.len() + STYLE.len() + 1024);
    page.push_str("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
    page.push_str(
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n",
    );
    page.push_str("<meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n");
    // An icon that is empty: without one a browser asks for /favicon.ico.
    page.push_str("<link rel=\"icon\" href=\"data:,\">\n");
    parts::push(&mut page, format_args!("<title>{} – migrate</title>\n", Text(title)));
    parts::push(&mut page, format_args!("<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n"));
    page.push_str(body);
    let version = env!("CARGO_PKG_VERSION");
    let _ = write!(page, "<footer>Drawn by migrate {version}.</footer>\n</main>\n</body>\n</html>\n");
    page
}

#[cfg(test)]
pub(crate) mod samples;
#[cfg(test)]
mod tests;

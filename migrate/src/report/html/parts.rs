//! What all parts of a page are made of.

use super::text::Text;
use crate::report::Phase;
use std::fmt::{Arguments, Write as _};

/// Appends formatted text, which to a `String` cannot fail.
pub(super) fn push(page: &mut String, text: Arguments<'_>) {
    let _ = page.write_fmt(text);
}

/// A part of a whole in percent, within 0 and 100 whatever the numbers are.
pub(super) fn percent(part: f64, whole: f64) -> f64 {
    let percent = 100.0 * part / whole;
    if percent.is_finite() { percent.clamp(0.0, 100.0) } else { 0.0 }
}

/// A section under a heading.
pub(super) fn section(page: &mut String, heading: &str, lead: &str, inside: impl FnOnce(&mut String)) {
    push(page, format_args!("<section>\n<h2>{}</h2>\n", Text(heading)));
    if !lead.is_empty() {
        push(page, format_args!("<p class=\"soft\">{}</p>\n", Text(lead)));
    }
    inside(page);
    page.push_str("</section>\n");
}

/// A chart with what it shows in words. `name` is unique on the page.
pub(super) fn svg(
    page: &mut String,
    name: &str,
    title: &str,
    description: &str,
    height_px: usize,
    inside: impl FnOnce(&mut String),
) {
    push(
        page,
        format_args!(
            "<figure>\n<svg id=\"{name}\" height=\"{height_px}\" role=\"img\" aria-labelledby=\"{name}-title {name}-desc\">\n\
             <title id=\"{name}-title\">{}</title>\n<desc id=\"{name}-desc\">{}</desc>\n",
            Text(title),
            Text(description)
        ),
    );
    inside(page);
    page.push_str("</svg>\n</figure>\n");
}

/// What the colours mean.
pub(super) fn key(page: &mut String, entries: &[(&str, &str)]) {
    page.push_str("<ul class=\"key\">\n");
    for (class, meaning) in entries {
        push(
            page,
            format_args!(
                "<li><svg aria-hidden=\"true\"><rect class=\"{class}\" width=\"12\" height=\"12\"/></svg>{meaning}</li>\n"
            ),
        );
    }
    page.push_str("</ul>\n");
}

/// A table that can be scrolled sideways, folded away behind its chart.
pub(super) fn table(page: &mut String, caption: &str, columns: &[&str], rows: &[Vec<String>]) {
    push(
        page,
        format_args!(
            "<details>\n<summary>{}</summary>\n<div class=\"wide\" tabindex=\"0\" role=\"region\" aria-label=\"{0}\">\n<table>\n<thead><tr>",
            Text(caption)
        ),
    );
    for column in columns {
        push(page, format_args!("<th scope=\"col\">{}</th>", Text(column)));
    }
    page.push_str("</tr></thead>\n<tbody>\n");
    for row in rows {
        page.push_str("<tr>");
        for cell in row {
            push(page, format_args!("<td>{}</td>", Text(cell)));
        }
        page.push_str("</tr>\n");
    }
    page.push_str("</tbody>\n</table>\n</div>\n</details>\n");
}

/// Names and values.
pub(super) fn pairs(page: &mut String, rows: &[(&str, String)]) {
    page.push_str("<table class=\"pairs\">\n<tbody>\n");
    for (name, value) in rows {
        push(page, format_args!("<tr><th scope=\"row\">{}</th><td>{}</td></tr>\n", Text(name), Text(value)));
    }
    page.push_str("</tbody>\n</table>\n");
}

/// Large figures: name, value, and what else there is to say.
pub(super) fn figures(page: &mut String, all: &[(&str, String, String)]) {
    page.push_str("<dl class=\"figures\">\n");
    for (name, value, more) in all {
        push(
            page,
            format_args!(
                "<div><dt>{}</dt><dd>{}<small>{}</small></dd></div>\n",
                Text(name),
                Text(value),
                Text(more)
            ),
        );
    }
    page.push_str("</dl>\n");
}

/// Whether the workload stands still in a phase at the source.
pub(super) fn stands_still(phase: Phase) -> bool {
    matches!(
        phase,
        Phase::Freeze
            | Phase::Verify
            | Phase::State
            | Phase::Ready
            | Phase::Pledge
            | Phase::Commit
            | Phase::Ask
    )
}

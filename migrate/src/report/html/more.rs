//! What else there is: the pages, the link, warnings, names.

use super::guest;
use super::parts::{pairs, push, section};
use super::text::Text;
use crate::report::{ArrivalReport, Report};
use crate::units::{show_bytes, show_us};

/// The most warnings that are shown.
const MOST: usize = 100;

/// For a migration as its source saw it.
pub(super) fn sent(page: &mut String, report: &Report) {
    if !report.warnings.is_empty() {
        section(page, "Warnings", "", |page| {
            page.push_str("<ul>\n");
            for warning in report.warnings.iter().take(MOST) {
                push(page, format_args!("<li>{}</li>\n", Text(warning)));
            }
            page.push_str("</ul>\n");
        });
    }
    if let Some(of) = &report.post_copy {
        guest::followed(page, of);
    }
    section(page, "Memory and state", "", |page| {
        pairs(
            page,
            &[
                ("Memory", show_bytes(report.memory_bytes)),
                (
                    "Writes tracked by",
                    if report.tracking.is_empty() { "–".into() } else { report.tracking.clone() },
                ),
                ("Pages sent", report.sent_pages.to_string()),
                ("Of them in fewer bytes", report.packed_pages.to_string()),
                ("Pages sent as zeros", report.zero_pages.to_string()),
                ("Pages never touched", report.skipped_pages.to_string()),
                ("Pages that were there from a checkpoint", report.seeded_pages.to_string()),
                ("Bytes on the page streams", show_bytes(report.sent_bytes)),
                ("State of CPUs and devices", show_bytes(report.state_bytes)),
            ],
        );
    });
    let fixed = &report.fixed;
    if fixed.actual_us > 0 {
        let lead = "The part of the downtime that no page explains, besides round trips.";
        section(page, "Fixed part of the downtime", lead, |page| {
            let grounds = match fixed.known_from {
                0 => "a guess".into(),
                moves => format!("from {moves} earlier moves to this peer"),
            };
            pairs(
                page,
                &[
                    ("Counted with", format!("{}, {grounds}", show_us(fixed.assumed_us))),
                    ("Came to", show_us(fixed.actual_us)),
                    ("Of it, stopping the VM", show_us(fixed.pause_us)),
                    ("Of it, saving its state", show_us(fixed.save_us)),
                ],
            );
        });
    }
    let link = &report.link;
    section(page, "Link", "As the transport measured it, for both control and pages.", |page| {
        pairs(
            page,
            &[
                ("Round trip", show_us(link.rtt_us)),
                ("Bytes on the wire", show_bytes(link.sent_wire_bytes)),
                ("Packets lost", link.lost_packets.to_string()),
                ("Largest packet", format!("{} bytes", link.mtu_bytes)),
                ("Page streams", report.page_streams.to_string()),
                ("Connections", format!("{}: {}", report.connections.number, report.connections.reason)),
            ],
        );
    });
    names(page, &report.migration.to_string(), &report.peer);
}

/// For a migration as its destination saw it.
pub(super) fn arrived(page: &mut String, report: &ArrivalReport) {
    let migration = report.migration.map_or_else(|| "never offered".into(), |id| id.to_string());
    if let Some(of) = &report.post_copy {
        guest::faulted(page, of);
    }
    names(page, &migration, &report.peer);
}

fn names(page: &mut String, migration: &str, peer: &str) {
    section(page, "Names", "", |page| {
        pairs(page, &[("Migration", migration.to_owned()), ("Peer", peer.to_owned())]);
    });
}

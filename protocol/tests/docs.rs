//! docs/wire-protocol.md and docs/control-protocol.md, held to the code: their limits, their examples, their bytes and
//! their names.
//!
//! A fenced block says what it is: `json downstream`, `json upstream`, `json request`, `json reply`, `json order`,
//! `json answer`, or `hex FILE` for the beginning of a golden file. A limit is a row of a table whose first cell is `module::CONSTANT`.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use common::{files, samples};
use protocol::control::{Downstream, Upstream};
use protocol::monitor::{Reply, Request};
use protocol::steer::{self, Answer, Order};
use protocol::{control, envelope, frame, handshake, layout, monitor, page, payload, sparse, state};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const DOCUMENTS: [&str; 2] = ["wire-protocol.md", "control-protocol.md"];

/// Public constants that are not numbers or texts of the wire.
const NOT_LIMITS: [&str; 21] = [
    "container::DESCRIPTION",
    "container::CONFIG",
    "container::PLACEMENT",
    "container::FILES",
    "container::FILES_PLACEMENT",
    "container::WITH_FILES_VERSION",
    "container::IMAGE",
    "container::SECTION_VERSION",
    "handshake::CAPABILITIES",
    "handshake::OURS",
    "handshake::POST_COPY",
    "handshake::RESUME",
    "handshake::ANEW",
    "handshake::PACKED_PAGES",
    "handshake::DELTA_PAGES",
    "handshake::KNOWN_PAGES",
    "handshake::PROBE",
    "handshake::CONNECTIONS",
    "handshake::VERIFY",
    "handshake::SEED",
    "handshake::DISKS",
];

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every limit as the code has it.
fn limits() -> BTreeMap<&'static str, String> {
    let text = |bytes: &[u8]| format!("`{}`", String::from_utf8_lossy(bytes).replace('\0', "\\0"));
    let number = |value: u64| value.to_string();
    BTreeMap::from([
        ("control::MAX_BLOB_BYTES", number(control::MAX_BLOB_BYTES.into())),
        ("control::MAX_PROBE_BYTES", number(control::MAX_PROBE_BYTES)),
        ("control::MAX_VERIFY_STRIPES", number(control::MAX_VERIFY_STRIPES as u64)),
        ("control::STRIPE_DIGEST_BYTES", number(control::STRIPE_DIGEST_BYTES as u64)),
        ("control::MAX_NAME_BYTES", number(control::MAX_NAME_BYTES as u64)),
        ("envelope::HEADER_BYTES", number(envelope::HEADER_BYTES as u64)),
        ("envelope::MAX_JSON_BYTES", number(envelope::MAX_JSON_BYTES.into())),
        ("frame::HEADER_BYTES", number(frame::HEADER_BYTES as u64)),
        ("frame::MAX_FRAME_PAGES", number(frame::MAX_FRAME_PAGES.into())),
        ("frame::MAX_PAGE_STREAMS", number(frame::MAX_PAGE_STREAMS.into())),
        ("frame::PAGE_STREAM_MAGIC", text(&frame::PAGE_STREAM_MAGIC)),
        ("frame::PREAMBLE_BYTES", number(frame::PREAMBLE_BYTES as u64)),
        ("frame::POST_COPY_STREAMS", number(frame::POST_COPY_STREAMS.into())),
        ("frame::STRIPE_PAGES", number(frame::STRIPE_PAGES)),
        ("control::MAX_CONNECTIONS", number(control::MAX_CONNECTIONS.into())),
        ("handshake::ALPN", text(handshake::ALPN)),
        ("handshake::MAGIC", text(&handshake::MAGIC)),
        ("handshake::MAJOR", number(handshake::MAJOR.into())),
        ("handshake::MAX_CAPABILITIES", number(handshake::MAX_CAPABILITIES as u64)),
        ("handshake::MINOR", number(handshake::MINOR.into())),
        ("handshake::PREAMBLE_BYTES", number(handshake::PREAMBLE_BYTES as u64)),
        ("layout::MAX_DISK_BYTES", number(layout::MAX_DISK_BYTES)),
        ("layout::MAX_SPACES", number(layout::MAX_SPACES as u64)),
        ("layout::MAX_SPACE_PAGES", number(layout::MAX_SPACE_PAGES)),
        ("monitor::MAX_BLOB_BYTES", number(monitor::MAX_BLOB_BYTES.into())),
        ("monitor::MAX_FDS", number(monitor::MAX_FDS as u64)),
        ("monitor::MAX_THROTTLE_PERCENT", number(monitor::MAX_THROTTLE_PERCENT.into())),
        ("monitor::VERSION", number(monitor::VERSION.into())),
        ("payload::DELTA_SUM_BYTES", number(payload::DELTA_SUM_BYTES as u64)),
        ("payload::KNOWN_PAGE_BYTES", number(payload::KNOWN_PAGE_BYTES as u64)),
        ("page::PAGE_SIZE", number(page::PAGE_SIZE as u64)),
        ("sparse::SEGMENT_BYTES", number(sparse::SEGMENT_BYTES as u64)),
        ("state::MAGIC", text(&state::MAGIC)),
        ("state::MAJOR", number(state::MAJOR.into())),
        ("state::MAX_SECTIONS", number(state::MAX_SECTIONS as u64)),
        ("steer::MAX_AWAIT_MS", number(steer::MAX_AWAIT_MS)),
    ])
}

#[test]
fn the_limits_in_the_documents_are_those_of_the_code() {
    let limits = limits();
    let mut documented = BTreeSet::new();
    for name in DOCUMENTS {
        for line in document(name).lines() {
            let mut cells = line.split('|').map(str::trim).skip(1);
            let Some(constant) = cells.next().and_then(|cell| cell.strip_prefix('`')?.strip_suffix('`'))
            else {
                continue;
            };
            if !constant.contains("::") {
                continue;
            }
            let value = limits.get(constant).unwrap_or_else(|| panic!("{name}: no limit {constant}"));
            assert_eq!(cells.next(), Some(value.as_str()), "{name}: {constant}");
            documented.insert(constant.to_owned());
        }
    }
    let in_code: BTreeSet<_> = limits.keys().map(|name| (*name).to_owned()).collect();
    assert_eq!(documented, in_code, "limits that no document names");
}

#[test]
fn no_constant_of_the_crate_is_left_out() {
    let limits = limits();
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut found = 0;
    for file in std::fs::read_dir(source).unwrap() {
        let path = file.unwrap().path();
        // The constants of checkpoints are in a document of their own: tests/checkpoint.rs holds it to them.
        if path.is_dir() {
            continue;
        }
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        for line in std::fs::read_to_string(&path).unwrap().lines() {
            let Some(rest) = line.trim().strip_prefix("pub const ") else { continue };
            let Some((constant, _)) = rest.split_once(':') else { continue };
            let name = format!("{module}::{constant}");
            found += 1;
            assert!(
                limits.contains_key(name.as_str()) || NOT_LIMITS.contains(&name.as_str()),
                "{name} is in no table of limits"
            );
        }
    }
    assert_eq!(found, limits.len() + NOT_LIMITS.len());
}

#[test]
fn every_example_in_the_documents_decodes_and_none_is_missing() {
    let mut seen = BTreeSet::new();
    for name in DOCUMENTS {
        for (kind, text) in blocks(&document(name)) {
            let example = match kind.as_str() {
                "json downstream" => example::<Downstream>(&text, samples::downstream_type),
                "json upstream" => example::<Upstream>(&text, samples::upstream_type),
                "json request" => example::<Request>(&text, samples::request_type),
                "json reply" => example::<Reply>(&text, samples::reply_type),
                "json order" => example::<Order>(&text, samples::order_type),
                "json answer" => example::<Answer>(&text, samples::answer_type),
                other if other.starts_with("hex ") || other == "text" => continue,
                other => panic!("{name}: a block of {other:?} is checked by nobody"),
            };
            seen.insert((kind, example));
        }
    }
    let all = [
        ("json downstream", &samples::DOWNSTREAM_TYPES[..]),
        ("json upstream", &samples::UPSTREAM_TYPES),
        ("json request", &samples::REQUEST_TYPES),
        ("json reply", &samples::REPLY_TYPES),
        ("json order", &samples::ORDER_TYPES),
        ("json answer", &samples::ANSWER_TYPES),
    ];
    for (kind, types) in all {
        for name in types {
            assert!(seen.contains(&(kind.to_owned(), *name)), "no example of {kind} {name}");
        }
    }
}

/// The type of an example, which must be one message with exactly the members that the code writes.
fn example<T: Serialize + DeserializeOwned>(text: &str, kind: fn(&T) -> &'static str) -> &'static str {
    let message: T =
        envelope::decode("documented", text.as_bytes()).unwrap_or_else(|e| panic!("{e}\n{text}"));
    let written: Value = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_value(&message).unwrap(), written, "{text}");
    kind(&message)
}

#[test]
fn the_bytes_in_the_documents_are_those_of_the_golden_files() {
    let mut seen = 0;
    for name in DOCUMENTS {
        for (kind, text) in blocks(&document(name)) {
            let Some(file) = kind.strip_prefix("hex ") else { continue };
            let bytes: Vec<u8> =
                text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
            let golden = files::read(file);
            // Only of a frame with a payload the beginning is enough: its header.
            let golden = if file == "frame/raw.bin" { &golden[..frame::HEADER_BYTES] } else { &golden };
            assert_eq!(bytes, golden, "{name}: {file}");
            seen += 1;
        }
    }
    assert!(seen >= 8, "only {seen} blocks of bytes were found");
}

#[test]
fn every_name_stands_in_its_document() {
    let documents = [
        ("wire-protocol.md", &["refuse-code", "outcome", "workload-kind", "space-kind"][..]),
        (
            "control-protocol.md",
            &[
                "role",
                "tracking-mode",
                "error-code",
                "phase",
                "steer-error-code",
                "steer-end",
                "steer-outcome",
            ],
        ),
    ];
    for (document_name, lists) in documents {
        let text = document(document_name);
        for list in lists {
            let names: Vec<String> =
                serde_json::from_slice(&files::read(&format!("names/{list}.json"))).unwrap();
            for name in names {
                assert!(text.contains(&format!("`{name}`")), "{document_name} does not name {list} {name}");
            }
        }
    }
}

#[test]
fn links_inside_and_between_the_documents_lead_somewhere() {
    let anchors = |name: &str| -> BTreeSet<String> {
        let text = document(name);
        let headings = text.lines().filter(|line| line.starts_with('#'));
        headings.map(|line| anchor(line.trim_start_matches('#').trim())).collect()
    };
    for name in DOCUMENTS {
        for link in document(name)
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split_once(')'))
            .map(|(link, _)| link.to_owned())
        {
            let (file, heading) = link.split_once('#').unwrap_or((&link, ""));
            let file = if file.is_empty() { name } else { file };
            assert!(heading.is_empty() || anchors(file).contains(heading), "{name}: {link}");
            assert!(!document(file).is_empty());
        }
    }
}

/// The anchor that a heading gets: lower case, spaces to dashes, signs dropped.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

/// The fenced blocks of a document: what stands behind the fence, and what is in it.
fn blocks(text: &str) -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if let Some(kind) = line.strip_prefix("```") {
            let body: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push((kind.to_owned(), body.join("\n")));
        }
    }
    blocks
}

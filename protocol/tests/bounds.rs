//! No bytes from outside make a decoder ask for more memory than its bounds.
//!
//! What is watched is the largest address space that a process ever had, which no allocation escapes, touched or not.
//! It says something only where nobody else allocates and malloc keeps nothing in reserve: so the test starts itself
//! once more as a process of its own, with one thread and one arena.
//!
//! `State::decode` holds what it was given once more; JSON of 256 KiB becomes values of at most about 10 MiB while it is read.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{checkpoint, reader, samples};
use protocol::ProtocolError;
use protocol::checkpoint::index::Index;
use protocol::checkpoint::manifest::{self, Manifest};
use protocol::checkpoint::merged::Merged;
use protocol::checkpoint::object::{self, Kind};
use protocol::checkpoint::touched;
use protocol::control::{Downstream, Upstream};
use protocol::envelope::{self, Header, MAX_JSON_BYTES};
use protocol::layout::Layout;
use protocol::monitor::{Reply, Request};
use protocol::page::PageSet;
use protocol::state::{MAGIC, MAJOR, State};
use twox_hash::XxHash3_64;

/// What all decoders together may add: 12 MiB were measured, 9 of them for JSON of 256 KiB that is all small values.
const MOST_KIB: u64 = 24 << 10;

const CHILD: &str = "PROTOCOL_BOUNDS_CHILD";

/// What reading a checkpoint's JSON of 16 MiB may add: three times as much were measured, a vector that grew while it was read.
const MOST_JSON_KIB: u64 = 96 << 10;

#[test]
fn no_decoder_allocates_beyond_its_bounds() {
    in_a_process_of_its_own("no_decoder_allocates_beyond_its_bounds", watch_the_decoders);
}

#[test]
fn no_object_of_a_store_allocates_beyond_its_bounds() {
    in_a_process_of_its_own("no_object_of_a_store_allocates_beyond_its_bounds", watch_the_store);
}

fn in_a_process_of_its_own(test: &str, watch: fn()) {
    if std::env::var_os(CHILD).is_some() {
        return watch();
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture", "--test-threads=1"])
        .env(CHILD, "1")
        .env("GLIBC_TUNABLES", "glibc.malloc.arena_max=1")
        .output()
        .unwrap();
    let (out, err) = (String::from_utf8_lossy(&child.stdout), String::from_utf8_lossy(&child.stderr));
    println!("{out}");
    assert!(child.status.success() && out.contains("1 passed"), "{out}\n{err}");
}

fn watch_the_decoders() {
    // The inputs are made first: their memory is the caller's.
    let states: Vec<Vec<u8>> = [
        state(u16::MAX, &[]),
        state(16384, &[]),
        state(16385, &[]),
        state(1, &section(b"a", u32::MAX)),
        state(1, &section(b"a", 1)),
        state(2, &[section(b"a", 0), section(b"b", u32::MAX)].concat()),
        state(1, &[255]),
        state(
            16384,
            &(0..16384u32).flat_map(|i| section(format!("{i:x}").as_bytes(), 0)).collect::<Vec<_>>(),
        ),
        state(16384, &section(b"a", 0).repeat(16384)),
    ]
    .into();
    let bodies = json_bombs();
    let headers = [[0xff; 8], [0xff, 0xff, 3, 0, 0xff, 0xff, 0xff, 0xff], [1, 0, 4, 0, 0, 0, 0, 0]];
    let before = peak_kib();
    let reserve = before - kib("VmSize:");
    assert!(reserve < 4 << 10, "{reserve} KiB could be allocated unseen: this test would prove nothing");

    let mut valid_states = 0;
    for bytes in &states {
        valid_states += usize::from(State::decode(bytes).is_ok());
    }
    assert_eq!(valid_states, 1, "only the one with 16384 names is whole");
    for header in &headers {
        assert!(Header::decode(header, 64 << 20).is_err());
    }
    for pages in [1 << 36, 1 << 60, u64::MAX - 63, u64::MAX] {
        assert!(PageSet::from_bytes(pages, &[0; 64]).is_err());
        assert!(PageSet::from_words(pages, vec![0; 8]).is_err());
    }
    for (name, body) in &bodies {
        assert!(body.len() <= MAX_JSON_BYTES as usize, "{name} would be refused by its length");
        let before = peak_kib();
        let _ = envelope::decode::<Downstream>("test", body);
        let _ = envelope::decode::<Upstream>("test", body);
        let _ = envelope::decode::<Request>("test", body);
        let _ = envelope::decode::<Reply>("test", body);
        let _ = envelope::decode::<protocol::steer::Order>("test", body);
        let _ = envelope::decode::<protocol::steer::Answer>("test", body);
        if let Ok(layout) = envelope::decode::<Layout>("test", body) {
            assert!(layout.validate(u64::MAX).is_err(), "{name}");
        }
        println!("{name}: {} KiB more", peak_kib() - before);
    }
    let mut endless = &[0xff; 64][..];
    assert!(reader::message::<Downstream>(&mut endless, u32::MAX).is_err());

    let grown = peak_kib() - before;
    println!("all of them: {grown} KiB more");
    assert!(grown <= MOST_KIB, "the decoders took {grown} KiB, {MOST_KIB} KiB are their bound");
}

fn watch_the_store() {
    let layout = samples::layout();
    let counts = [[0xff; 8], [0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0], [0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]];
    let indexes = counts.map(|head| [&head[..], &[0; 4096]].concat());
    let good = checkpoint::index().encode();
    let mut lengths = Vec::new();
    for length in [u64::MAX, 1 << 40, 1 << 32] {
        let mut bytes = object::encode(Kind::Index, false, &good).0;
        bytes[16..24].copy_from_slice(&length.to_le_bytes());
        lengths.push(bytes);
    }
    let start = peak_kib();
    assert!(start - kib("VmSize:") < 4 << 10, "too much could be allocated unseen");
    for bytes in &indexes {
        assert!(Index::decode(&layout, 2, bytes).is_err());
        assert!(touched::decode(&layout, bytes).is_err());
        assert!(Merged::decode(&layout, bytes).is_err());
        // Runs that are said to be many, and are not.
        assert!(Merged::decode(&layout, &[&[0; 48], &[0xff; 8][..], &[1], &bytes[..]].concat()).is_err());
    }
    assert!(Index::decode(&layout, 2, &good).is_ok());
    for bytes in &lengths {
        assert!(object::decode(bytes, Kind::Index, "test").is_err());
    }
    let grown = peak_kib() - start;
    assert!(grown < 1 << 10, "reading what is short took {grown} KiB");
    let room = manifest::MAX_JSON_BYTES - 4096;
    let json = serde_json::to_string(&checkpoint::manifest()).unwrap();
    let (before, after) = json.split_once(r#""segments":["#).unwrap();
    let segment = r#"{"checkpoint":"20261123T194831Z-3f9a1c07","number":0,"bytes":1},"#;
    let bodies = [
        [before, r#""segments":["#, &segment.repeat(room / segment.len()), after].concat(),
        [r#"{"later":["#, &"0,".repeat(room / 2), "0],", &json[1..]].concat(),
        [r#"{"later":"#, &"[".repeat(room), "]"].concat(),
        [r#"{"software":""#, &"x".repeat(room), "\","].concat(),
    ];
    // What making them took for a while counts here, too.
    let start = kib("VmSize:");
    let read: Vec<_> =
        bodies.iter().map(|body| manifest::from_json::<Manifest>("test", body.as_bytes()).is_ok()).collect();
    assert_eq!(read, [true, true, false, false]);
    let grown = peak_kib() - start;
    println!("{grown} KiB more");
    assert!(grown <= MOST_JSON_KIB, "manifests took {grown} KiB, {MOST_JSON_KIB} KiB are their bound");
    let too_long = vec![b' '; manifest::MAX_JSON_BYTES + 1];
    assert!(matches!(
        manifest::from_json::<Manifest>("test", &too_long),
        Err(ProtocolError::TooLarge { .. })
    ));
}

/// The largest JSON bodies that a header lets through, each made to become as much as possible.
fn json_bombs() -> Vec<(&'static str, Vec<u8>)> {
    let room = MAX_JSON_BYTES as usize - 64;
    let fill = |start: &str, unit: &str, end: &str| {
        let body = unit.repeat(room / unit.len());
        [start, body.trim_end_matches(','), end].concat().into_bytes()
    };
    let nest = |open: &str, close: &str, depth: usize| {
        let start = r#"{"type":"cancel","reason":"","x":"#;
        [start, &open.repeat(depth), "0", &close.repeat(depth), "}"].concat().into_bytes()
    };
    let offer = r#"{"type":"prepare","name":"x","layout":{"spaces":["#;
    vec![
        ("numbers", fill(r#"{"type":"status","x":["#, "0,", "]}")),
        ("empty arrays", fill(r#"{"type":"status","x":["#, "[],", "]}")),
        ("empty objects", fill(r#"{"type":"status","x":["#, "{},", "]}")),
        ("small objects", fill(r#"{"type":"status","x":["#, r#"{"":0},"#, "]}")),
        ("empty texts", fill(r#"{"type":"hello","software":"","required":["#, r#""","#, "]}")),
        ("members", fill(r#"{"type":"ready""#, r#","a":0"#, "}")),
        ("one text", fill(r#"{"type":"cancel","reason":""#, "x", "\"}")),
        ("escapes", fill(r#"{"type":"cancel","reason":""#, "\\u00e4", "\"}")),
        ("one number", fill(r#"{"type":"state","last_round":"#, "9", "}")),
        ("spaces", fill(offer, r#"{"id":0,"kind":"memory","pages":1,"guest_address":0},"#, "]}}")),
        ("layout", fill(r#"{"spaces":["#, r#"{"id":0,"kind":"memory","pages":1,"guest_address":0},"#, "]}")),
        ("deep arrays", nest("[", "]", room / 2 - 16)),
        ("deep objects", nest(r#"{"a":"#, "}", room / 6 - 16)),
        ("only opening", fill(r#"{"spaces":"#, "[", "")),
        ("deep and alone", fill("", r#"{"spaces":"#, "")),
        ("nearly too deep", nest("[", "]", 126)),
    ]
}

/// A state whose checksum is right, so that what stands in it is believed.
fn state(sections: u16, body: &[u8]) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&MAJOR.to_le_bytes());
    bytes.extend_from_slice(&sections.to_le_bytes());
    bytes.extend_from_slice(&[0; 4]);
    bytes.extend_from_slice(body);
    let sum = XxHash3_64::oneshot(&bytes);
    bytes.extend_from_slice(&sum.to_le_bytes());
    bytes
}

/// A section that says it has `length` bytes and has none.
fn section(name: &[u8], length: u32) -> Vec<u8> {
    let mut bytes = vec![name.len() as u8];
    bytes.extend_from_slice(name);
    bytes.extend_from_slice(&1u16.to_le_bytes());
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes
}

fn peak_kib() -> u64 {
    kib("VmPeak:")
}

fn kib(name: &str) -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with(name)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

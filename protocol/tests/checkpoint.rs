//! Checkpoints at rest: docs/checkpoint-format.md held to the code, golden bytes read back, and what holds for every value and for any
//! bytes. That what is written equals the golden bytes is `golden.rs`'s.
#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail by panicking")]

mod common;

use common::{checkpoint as samples, files};
use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::Index as At;
use protocol::ProtocolError;
use protocol::checkpoint::index::{self, Extent, Index, Placed};
use protocol::checkpoint::manifest::{
    self, Group, HexDigest, Manifest, Pruned, StoreInfo, from_json, to_json,
};
use protocol::checkpoint::merged::{Merged, Stored, decode_sums, encode_sums};
use protocol::checkpoint::object::{self, Kind};
use protocol::checkpoint::segment::{self, Encoding, MAX_EXTENT_PAGES};
use protocol::checkpoint::{name, touched};
use protocol::page::PageRun;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

const KINDS: [Kind; 9] = [
    Kind::Store,
    Kind::Manifest,
    Kind::Index,
    Kind::State,
    Kind::Group,
    Kind::Pruned,
    Kind::Touched,
    Kind::Merged,
    Kind::Sums,
];

fn document() -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/checkpoint-format.md");
    std::fs::read_to_string(path).unwrap()
}

/// Every constant of the modules as the code has it.
fn limits() -> BTreeMap<&'static str, String> {
    let text = |text: &[u8]| format!("`{}`", String::from_utf8_lossy(text));
    BTreeMap::from([
        ("object::MAGIC", text(&object::MAGIC)),
        ("object::MAJOR", object::MAJOR.to_string()),
        ("object::HEADER_BYTES", object::HEADER_BYTES.to_string()),
        ("segment::MAGIC", text(&segment::MAGIC)),
        ("segment::HEADER_BYTES", segment::HEADER_BYTES.to_string()),
        ("segment::MAX_EXTENT_PAGES", MAX_EXTENT_PAGES.to_string()),
        ("segment::TAG_BYTES", segment::TAG_BYTES.to_string()),
        ("index::ZEROS", index::ZEROS.to_string()),
        ("manifest::MAX_JSON_BYTES", manifest::MAX_JSON_BYTES.to_string()),
        ("manifest::MAX_CHAIN_DELTAS", manifest::MAX_CHAIN_DELTAS.to_string()),
        ("manifest::MAX_MEMBERS", manifest::MAX_MEMBERS.to_string()),
        ("name::MAX_UNIX_S", name::MAX_UNIX_S.to_string()),
        ("name::STORE", text(name::STORE.as_bytes())),
        ("name::CHECKPOINTS", text(name::CHECKPOINTS.as_bytes())),
        ("name::DATA", text(name::DATA.as_bytes())),
        ("name::GROUPS", text(name::GROUPS.as_bytes())),
        ("name::PRUNED", text(name::PRUNED.as_bytes())),
        ("name::TOUCHED", text(name::TOUCHED.as_bytes())),
        ("name::MERGED", text(name::MERGED.as_bytes())),
        ("touched::MAX_RUNS", touched::MAX_RUNS.to_string()),
    ])
}

#[test]
fn the_limits_in_the_document_are_those_of_the_code_and_none_is_missing() {
    let mut documented = BTreeMap::new();
    for line in document().lines() {
        let cells: Vec<_> = line.split('|').map(str::trim).collect();
        let [_, constant, value, ..] = cells[..] else { continue };
        if let Some(constant) = constant.strip_prefix('`').and_then(|cell| cell.strip_suffix('`'))
            && constant.contains("::")
        {
            documented.insert(constant.to_owned(), value.to_owned());
        }
    }
    let limits: BTreeMap<_, _> = limits().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    assert_eq!(documented, limits);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/checkpoint");
    let mut in_code = BTreeSet::new();
    for file in std::fs::read_dir(source).unwrap() {
        let path = file.unwrap().path();
        let module = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let text = std::fs::read_to_string(&path).unwrap();
        let constants = text.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(':'));
        in_code.extend(constants.map(|(constant, _)| format!("{module}::{constant}")));
    }
    assert_eq!(limits.into_keys().collect::<BTreeSet<_>>(), in_code);
}

#[test]
fn every_block_in_the_document_is_what_the_code_reads_and_writes() {
    let mut seen = BTreeSet::new();
    let document = document();
    let mut lines = document.lines();
    while let Some(line) = lines.next() {
        let Some(kind) = line.strip_prefix("```") else { continue };
        let text: Vec<_> = lines.by_ref().take_while(|line| *line != "```").collect();
        let text = text.join("\n");
        match kind {
            "json store" => assert!(samples::stores().contains(&example(&text))),
            "json manifest" => assert_eq!(example::<Manifest>(&text), samples::manifest()),
            "json behind" => assert_eq!(example::<Manifest>(&text), samples::manifest_behind()),
            "json group" => assert_eq!(example::<Group>(&text), samples::group()),
            "json pruned" => assert_eq!(example::<Pruned>(&text), samples::pruned()),
            _ => {
                let file =
                    kind.strip_prefix("hex ").unwrap_or_else(|| panic!("{kind:?} is checked by nobody"));
                let bytes: Vec<u8> =
                    text.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
                assert_eq!(bytes, files::read(file), "{file}");
            }
        }
        seen.insert(kind.to_owned());
    }
    assert_eq!(seen.len(), 5 + 5, "{seen:?}");
    // Every member has a row.
    let [_, sealed] = samples::stores();
    let values = [
        serde_json::to_value(sealed).unwrap(),
        serde_json::to_value(samples::manifest()).unwrap(),
        serde_json::to_value(samples::manifest_behind()).unwrap(),
        serde_json::to_value(samples::group()).unwrap(),
    ];
    for member in values.iter().flat_map(|value| value.as_object().unwrap().keys()) {
        assert!(document.contains(&format!("| `{member}` | ")), "{member} has no row");
    }
}

/// A value with exactly the members that the code writes.
fn example<T: Serialize + DeserializeOwned>(text: &str) -> T {
    let value: T = from_json("documented", text.as_bytes()).unwrap();
    assert_eq!(serde_json::to_value(&value).unwrap(), serde_json::from_str::<Value>(text).unwrap(), "{text}");
    value
}

#[test]
fn the_golden_files_read_back() {
    fn body<T: DeserializeOwned>(kind: Kind, file: &str) -> T {
        from_json("golden", object::decode(&files::read(file), kind, "golden").unwrap().body).unwrap()
    }
    let [open, sealed] = samples::stores();
    assert_eq!(body::<StoreInfo>(Kind::Store, "checkpoint/store.bin"), open);
    assert_eq!(body::<StoreInfo>(Kind::Store, "checkpoint/store-sealed.bin"), sealed);
    let manifest: Manifest = body(Kind::Manifest, "checkpoint/manifest.bin");
    manifest.validate(samples::id()).unwrap();
    assert_eq!(manifest, samples::manifest());
    assert_eq!(body::<Group>(Kind::Group, "checkpoint/group.bin"), samples::group());
    assert_eq!(body::<Pruned>(Kind::Pruned, "checkpoint/pruned.bin"), samples::pruned());
    let bytes = files::read("checkpoint/index-object.bin");
    let object = object::decode(&bytes, Kind::Index, "golden").unwrap();
    assert_eq!((bytes.len() as u64, HexDigest(object.digest)), (manifest.index.bytes, manifest.index.digest));
    let index = Index::decode(&manifest.layout, samples::SEGMENTS, object.body).unwrap();
    assert_eq!(index, samples::index());
    assert_eq!(index.sum_starts(), [0, 1, 5]);
    let bytes = files::read("checkpoint/state.bin");
    assert_eq!(object::decode(&bytes, Kind::State, "golden").unwrap().body, samples::state());
    let runs = touched::decode(&manifest.layout, &files::read("checkpoint/touched.bin")).unwrap();
    assert_eq!(runs, samples::touched_runs());
    let behind: Manifest = body(Kind::Manifest, "checkpoint/manifest-behind.bin");
    behind.validate(samples::id()).unwrap();
    assert_eq!(behind, samples::manifest_behind());
    let merged = Merged::decode(&manifest.layout, &files::read("checkpoint/merged-index.bin")).unwrap();
    assert_eq!(merged, samples::merged());
    let sums = decode_sums(merged.pages(), &files::read("checkpoint/merged-sums.bin")).unwrap();
    assert_eq!(sums, samples::merged_sums());
    let bytes = files::read("checkpoint/sealed.bin");
    assert!(object::decode(&bytes, Kind::State, "golden").unwrap().sealed);
}

#[test]
fn a_manifest_that_cannot_be_is_refused() {
    let good = samples::manifest();
    let wrong = [
        Manifest { deltas: 0, ..good.clone() },
        Manifest { deltas: manifest::MAX_CHAIN_DELTAS + 1, ..good.clone() },
        Manifest { parent: None, ..good.clone() },
        Manifest { workload: "../x".into(), ..good.clone() },
        Manifest { layout: protocol::layout::Layout::default(), ..good.clone() },
        Manifest { id: name::CheckpointId::new(1, 1), ..good.clone() },
    ];
    good.validate(good.id).unwrap();
    for wrong in wrong {
        wrong.validate(good.id).unwrap_err();
    }
    let newer = object::encode(Kind::Manifest, false, b"{}").0;
    let newer = [&newer[..8], &[2], &newer[9..]].concat();
    let error = object::decode(&newer, Kind::Manifest, "a manifest").unwrap_err();
    assert!(matches!(error, ProtocolError::Version { found: 2, supported: 1, .. }), "{error}");
    // Members of a newer minor release are passed over.
    let mut value = serde_json::to_value(&good).unwrap();
    value["later"] = Value::from(7);
    assert_eq!(from_json::<Manifest>("a manifest", value.to_string().as_bytes()).unwrap(), good);
}

/// Any index over the sample layout.
fn indexes() -> impl Strategy<Value = Index> {
    let extent = (1..=MAX_EXTENT_PAGES, any::<bool>(), any::<(u32, u64, [u8; 32])>());
    let run = (any::<bool>(), 0..3_u64, 1..400_u32, any::<At>(), any::<u16>());
    (vec(extent, 0..6), vec(run, 0..12), any::<u64>()).prop_map(|(extents, runs, seed)| {
        let mut index = Index::default();
        for (pages, raw, (length, offset, digest)) in extents {
            let stored_bytes = length % segment::max_stored_bytes(pages) + 1;
            let offset = 16 + offset % (1 << 40);
            let encoding = if raw { Encoding::Raw } else { Encoding::Zstd };
            let sums: Vec<_> = (0..u64::from(pages)).map(|page| page ^ seed).collect();
            let segment = length % samples::SEGMENTS;
            index.push(Extent { segment, offset, stored_bytes, pages, encoding, digest }, &sums);
        }
        let mut next = 0;
        for (zeros, gap, count, at, page) in runs {
            let space = protocol::page::SpaceId(0);
            let first = next + gap;
            if zeros || index.extents.is_empty() {
                let run = PageRun { space, first, count };
                index.runs.push(Placed { run, at: index::At::Zeros });
                next = run.end();
                continue;
            }
            let extent = at.index(index.extents.len());
            let pages = index.extents[extent].pages;
            let page = page % pages;
            let run = PageRun { space, first, count: count % u32::from(pages - page) + 1 };
            index.runs.push(Placed { run, at: index::At::Extent { extent: extent as u32, page } });
            next = run.end();
        }
        index
    })
}

proptest! {
    #[test]
    fn an_index_reads_back_and_whatever_is_changed_in_it_is_valid_or_refused(
        index in indexes(), at: At, byte: u8, cut: At,
    ) {
        let layout = common::samples::layout();
        let bytes = index.encode();
        prop_assert_eq!(Index::decode(&layout, samples::SEGMENTS, &bytes), Ok(index));
        prop_assert!(Index::decode(&layout, samples::SEGMENTS, &bytes[..cut.index(bytes.len())]).is_err());
        prop_assert!(Index::decode(&layout, samples::SEGMENTS, &[&bytes[..], &[0]].concat()).is_err());
        let mut changed = bytes.clone();
        changed[at.index(bytes.len())] = byte;
        if let Ok(found) = Index::decode(&layout, samples::SEGMENTS, &changed) {
            prop_assert_eq!(found.encode(), changed);
            sound(&found);
        }
    }

    #[test]
    fn a_merged_index_reads_back_and_whatever_is_changed_in_it_is_valid_or_refused(
        merged in merged_indexes(), at: At, byte: u8, cut: At, sums in vec(any::<u64>(), 0..9),
    ) {
        let layout = common::samples::layout();
        let bytes = merged.encode(&layout);
        prop_assert_eq!(Merged::decode(&layout, &bytes), Ok(merged));
        prop_assert!(Merged::decode(&layout, &bytes[..cut.index(bytes.len())]).is_err());
        prop_assert!(Merged::decode(&layout, &[&bytes[..], &[0]].concat()).is_err());
        let mut changed = bytes.clone();
        changed[at.index(bytes.len())] = byte;
        if let Ok(found) = Merged::decode(&layout, &changed) {
            prop_assert_eq!(found.encode(&layout), changed);
            sound_merged(&found);
        }
        let (pages, stored) = (sums.len() as u64, encode_sums(&sums));
        prop_assert_eq!(decode_sums(pages, &stored), Ok(sums));
        prop_assert!(decode_sums(pages + 1, &stored).is_err());
        prop_assert!(decode_sums(pages, &[&stored[..], &[0]].concat()).is_err());
    }

    #[test]
    fn an_object_reads_back_and_any_change_is_found(
        kind in prop::sample::select(&KINDS[..]), sealed: bool, body in vec(any::<u8>(), 0..300), at: At, bit in 0..8_u8, cut: At,
    ) {
        let (bytes, digest) = object::encode(kind, sealed, &body);
        let found = object::decode(&bytes, kind, "test").unwrap();
        prop_assert_eq!((found.kind, found.sealed, found.body, found.digest), (kind, sealed, &body[..], digest));
        for other in KINDS {
            prop_assert_eq!(object::decode(&bytes, other, "test").is_ok(), other == kind);
        }
        let mut changed = bytes.clone();
        changed[at.index(bytes.len())] ^= 1 << bit;
        prop_assert!(object::decode(&changed, kind, "test").is_err());
        prop_assert!(object::decode(&bytes[..cut.index(bytes.len())], kind, "test").is_err());
        prop_assert!(object::decode(&[&bytes[..], &[0]].concat(), kind, "test").is_err());
    }

    #[test]
    fn any_bytes_are_read_or_refused(bytes in vec(any::<u8>(), 0..600), segments in 0..4_u32) {
        let layout = common::samples::layout();
        if let Ok(index) = Index::decode(&layout, segments, &bytes) {
            prop_assert_eq!(index.encode(), bytes.clone());
            sound(&index);
        }
        for kind in KINDS {
            let _ = object::decode(&bytes, kind, "test");
        }
        let _ = touched::decode(&layout, &bytes);
        if let Ok(merged) = Merged::decode(&layout, &bytes) {
            prop_assert_eq!(merged.encode(&layout), bytes.clone());
            sound_merged(&merged);
        }
        let _ = from_json::<Manifest>("test", &bytes);
        let _ = from_json::<Group>("test", &bytes);
        let _ = from_json::<StoreInfo>("test", &bytes);
    }

    #[test]
    fn a_manifest_whose_text_is_changed_is_read_or_refused(at: At, text in "[ -~]{0,6}") {
        let json = to_json("a manifest", &samples::manifest()).unwrap();
        let at = at.index(json.len());
        let changed = [&json[..at], text.as_bytes(), &json[(at + text.len()).min(json.len())..]].concat();
        if let Ok(manifest) = from_json::<Manifest>("a manifest", &changed) {
            let _ = manifest.validate(samples::id());
            let again = to_json("a manifest", &manifest).unwrap();
            prop_assert_eq!(from_json::<Manifest>("a manifest", &again).unwrap(), manifest);
        }
    }
}

/// Any merged index over the sample layout: an index's runs that are no zeros.
fn merged_indexes() -> impl Strategy<Value = Merged> {
    (indexes(), any::<[u8; 32]>(), any::<u64>()).prop_map(|(index, digest, bytes)| {
        let stored = |placed: &Placed| match placed.at {
            index::At::Zeros => None,
            index::At::Extent { extent, page } => Some(Stored { run: placed.run, extent, page }),
        };
        let segment = |number| manifest::Segment { checkpoint: samples::id(), number, bytes: 1 << 41 };
        let mut runs: Vec<_> = index.runs.iter().filter_map(stored).collect();
        runs.sort_by_key(|stored| (stored.extent, stored.page));
        Merged {
            sums: manifest::Part { bytes, digest: HexDigest(digest) },
            segments: (0..samples::SEGMENTS).map(segment).collect(),
            extents: index.extents,
            runs,
        }
    })
}

/// What whoever reads a merged index relies on.
fn sound_merged(merged: &Merged) {
    for Stored { run, extent, page } in &merged.runs {
        common::samples::layout().check(run).unwrap();
        let extent = &merged.extents[*extent as usize];
        assert!(u32::from(*page) + run.count <= u32::from(extent.pages));
        assert!(
            extent.offset + u64::from(extent.stored_bytes) <= merged.segments[extent.segment as usize].bytes
        );
    }
    let key = |stored: &Stored| (stored.extent, stored.page);
    assert!(merged.runs.is_sorted_by_key(key));
}

/// What whoever reads an index relies on.
fn sound(index: &Index) {
    let starts = index.sum_starts();
    assert_eq!(starts.len(), index.extents.len());
    for placed in &index.runs {
        common::samples::layout().check(&placed.run).unwrap();
        if let index::At::Extent { extent, page } = placed.at {
            let pages = index.extents[extent as usize].pages;
            assert!(u32::from(page) + placed.run.count <= u32::from(pages));
            assert!(starts[extent as usize] + usize::from(pages) <= index.sums.len());
        }
    }
    for pair in index.runs.windows(2) {
        let key = |run: &PageRun| (run.space.0, run.first);
        assert!((pair[0].run.space.0, pair[0].run.end()) <= key(&pair[1].run));
    }
}

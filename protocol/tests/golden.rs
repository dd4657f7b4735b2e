//! The bytes of version 1, held fast: what is written today is what was written when a file was blessed.
//!
//! A test that fails here means that the wire changed. If that is meant (and docs/wire-protocol.md says what a change
//! costs), write the files anew with `BLESS=1 cargo test -p protocol --test golden` and look at the difference.
#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

mod common;

use common::{files, reader, samples};
use protocol::control::{Downstream, Upstream};
use protocol::envelope;
use protocol::frame::{Frame, HEADER_BYTES, StreamPreamble};
use protocol::handshake::Preamble;
use protocol::layout::Layout;
use protocol::monitor::{self, Reply, Request};
use protocol::page::PageSet;
use protocol::state::State;
use protocol::steer::{Answer, Order};
use protocol::{ProtocolError, control};
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::fmt::Debug;

#[test]
fn what_is_encoded_equals_the_golden_files() {
    let all = files::all();
    if std::env::var_os("BLESS").is_some_and(|value| value == "1") {
        for (name, bytes) in &all {
            let path = files::folder().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, bytes).unwrap();
        }
        // A run that blesses is not a run that tests.
        panic!("{} golden files were written: look at the difference and test without BLESS", all.len());
    }
    for (name, bytes) in &all {
        let golden = files::read(name);
        assert!(
            *bytes == golden,
            "{name} is encoded differently now\n new {}\n old {}",
            bytes.escape_ascii(),
            golden.escape_ascii()
        );
    }
    let expected: Vec<_> = all.into_keys().collect();
    assert_eq!(files::on_disk(), expected, "files in tests/golden that no test makes");
}

#[test]
fn the_binary_golden_files_decode_to_their_values() {
    let preamble = Preamble::decode(&array("preamble/control.bin")).unwrap();
    assert_eq!(preamble, Preamble::OURS);
    let stream = array("preamble/page-stream.bin");
    assert_eq!(StreamPreamble::decode(&stream, 4).unwrap(), files::STREAM);
    assert!(StreamPreamble::decode(&stream, 3).is_err(), "stream 3 of 3");

    for (name, frame) in [
        ("frame/zero.bin", files::zero_frame()),
        ("frame/raw.bin", files::raw_frame()),
        ("frame/round-end.bin", files::round_end(1)),
    ] {
        let bytes = files::read(name);
        let (header, payload) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let (found, mut sum) = Frame::decode(header).unwrap();
        assert_eq!(found, frame, "{name}");
        assert_eq!(payload.len(), frame.payload_bytes(), "{name}");
        sum.update(payload);
        sum.verify().unwrap();
    }
    for (name, encoding, payload) in files::coded() {
        let bytes = files::read(name);
        let (header, found) = bytes.split_first_chunk::<HEADER_BYTES>().unwrap();
        let (frame, mut sum) = Frame::decode(header).unwrap();
        assert_eq!(frame, files::coded_frame(encoding, &payload), "{name}");
        assert_eq!(found, payload, "{name}");
        sum.update(found);
        sum.verify().unwrap();
    }
    let frames = reader::page_stream(&files::read("page-stream/two-rounds.bin"), &samples::layout(), 4);
    assert_eq!(frames.unwrap(), files::two_rounds());

    assert_eq!(State::decode(&files::read("state/empty.bin")).unwrap(), State::default());
    assert_eq!(State::decode(&files::read("state/vm.bin")).unwrap(), samples::state());
    let missing = files::read("sparse/two-spaces.bin");
    assert_eq!(protocol::sparse::decode(&samples::layout(), &missing).unwrap(), samples::missing());
    let set = PageSet::from_bytes(70, &files::read("page-set/70-pages.bin")).unwrap();
    assert_eq!(set, samples::page_set());
}

#[test]
fn the_golden_envelopes_decode_to_their_values() {
    let state = files::read("state/vm.bin");
    let migration = samples::MIGRATION;
    envelope_is("envelope/commit.bin", &Downstream::Commit { migration }, &[], control::MAX_BLOB_BYTES);
    envelope_is("envelope/state.bin", &Downstream::State { last_round: 5 }, &state, control::MAX_BLOB_BYTES);
    envelope_is("envelope/ready.bin", &Upstream::Ready, &[], control::MAX_BLOB_BYTES);
    envelope_is("envelope/request.bin", &Request::Load, &state, monitor::MAX_BLOB_BYTES);
    envelope_is("envelope/reply.bin", &Reply::Saved, &state, monitor::MAX_BLOB_BYTES);
}

#[test]
fn the_golden_messages_decode_to_their_values() {
    messages_are("downstream", &samples::downstream(), samples::downstream_type);
    messages_are("upstream", &samples::upstream(), samples::upstream_type);
    messages_are("request", &samples::requests(), samples::request_type);
    messages_are("reply", &samples::replies(), samples::reply_type);
    messages_are("order", &samples::orders(), samples::order_type);
    messages_are("answer", &samples::answers(), samples::answer_type);
    let layout: Layout = envelope::decode("layout", &files::read("layout/two-spaces.json")).unwrap();
    assert_eq!(layout, samples::layout());
    layout.validate(4 << 30).unwrap();
}

#[test]
fn every_message_has_a_golden_file() {
    assert!(samples::complete());
    let covered = |folder: &str, types: &[&str]| {
        let all = files::all();
        let found = all.keys().filter(|name| name.starts_with(&format!("{folder}/"))).count();
        assert_eq!(found, types.len(), "{folder}");
        for name in types {
            assert!(all.contains_key(&format!("{folder}/{name}.json")), "{folder}/{name}");
        }
        assert_eq!(types.iter().collect::<BTreeSet<_>>().len(), types.len(), "{folder}");
    };
    covered("downstream", &samples::DOWNSTREAM_TYPES);
    covered("upstream", &samples::UPSTREAM_TYPES);
    covered("request", &samples::REQUEST_TYPES);
    covered("reply", &samples::REPLY_TYPES);
    covered("order", &samples::ORDER_TYPES);
    covered("answer", &samples::ANSWER_TYPES);
}

#[test]
fn names_decode_to_their_values() {
    names_are("refuse-code", &samples::REFUSE_CODES);
    names_are("outcome", &samples::OUTCOMES);
    names_are("workload-kind", &samples::WORKLOAD_KINDS);
    names_are("space-kind", &samples::SPACE_KINDS);
    names_are("role", &samples::ROLES);
    names_are("tracking-mode", &samples::TRACKING_MODES);
    names_are("error-code", &samples::ERROR_CODES);
    names_are("phase", &samples::PHASES);
    names_are("steer-error-code", &samples::STEER_ERROR_CODES);
    names_are("steer-end", &samples::STEER_ENDS);
    names_are("steer-outcome", &samples::STEER_OUTCOMES);
}

#[test]
fn a_peer_of_another_minor_version_is_understood() {
    for minor in [0, 1, 7, u16::MAX] {
        // What is reserved today may mean something to a newer release.
        let mut bytes = Preamble { minor }.encode();
        bytes[12..].fill(0xff);
        assert_eq!(Preamble::decode(&bytes).unwrap(), Preamble { minor });
    }
    let future = files::read("handshake/of-the-future.bin");
    let mut rest = &future[..];
    let preamble = Preamble::decode(&reader::array(&mut rest, "").unwrap()).unwrap();
    assert_eq!(preamble.minor, 7);
    let (hello, _) = reader::message::<Downstream>(&mut rest, 0).unwrap();
    let Downstream::Hello(mut hello) = hello else { panic!("not a hello") };
    assert_eq!(hello, files::hello_of_the_future());
    assert_eq!(hello.agree(), Err(ProtocolError::Capability { name: "delta".into() }));
    hello.required.clear();
    assert_eq!(hello.agree().unwrap(), Vec::<&str>::new(), "unknown capabilities are ignored");

    let hello: Downstream = envelope::decode("test", br#"{"type":"hello","software":"old"}"#).unwrap();
    let Downstream::Hello(hello) = hello else { panic!("not a hello") };
    hello.agree().unwrap();
}

#[test]
fn another_major_version_is_refused() {
    let mut control = Preamble::OURS.encode();
    let mut stream = files::STREAM.encode();
    let mut state = files::read("state/vm.bin");
    for major in [0u16, 2, u16::MAX] {
        for bytes in [&mut control[..], &mut stream[..], &mut state[..]] {
            bytes[8..10].copy_from_slice(&major.to_le_bytes());
        }
        let is_version = |error| matches!(error, ProtocolError::Version { found, .. } if found == major);
        assert!(is_version(Preamble::decode(&control).unwrap_err()));
        assert!(is_version(StreamPreamble::decode(&stream, 4).unwrap_err()));
        // The version is judged before the checksum: another version may have another one.
        assert!(is_version(State::decode(&state).unwrap_err()));
    }
}

#[test]
fn unknown_members_are_ignored_and_unknown_types_refused() {
    lenient::<Downstream>("downstream");
    lenient::<Upstream>("upstream");
    lenient::<Request>("request");
    lenient::<Reply>("reply");
    lenient::<Order>("order");
    lenient::<Answer>("answer");
}

fn lenient<T: DeserializeOwned + PartialEq + Debug>(folder: &str) {
    for name in files::on_disk().iter().filter(|name| name.starts_with(&format!("{folder}/"))) {
        let golden = files::read(name);
        let value: T = envelope::decode("test", &golden).unwrap();
        let mut object: Value = serde_json::from_slice(&golden).unwrap();
        object["added_in_1_7"] = json!({"nested": [1, {"a": null}], "text": "x"});
        for member in ["layout", "status", "pledged_to"] {
            if object[member].is_object() {
                object[member]["added_in_1_7"] = json!(true);
            }
        }
        object.as_object_mut().unwrap().retain(|_, value| !value.is_null());
        let text = serde_json::to_vec_pretty(&object).unwrap();
        assert_eq!(envelope::decode::<T>("test", &text).unwrap(), value, "{name} with more members");

        for kind in [json!("of-the-future"), json!("Hello"), json!(""), json!(7), Value::Null] {
            object["type"] = kind;
            let text = serde_json::to_vec(&object).unwrap();
            assert!(envelope::decode::<T>("test", &text).is_err(), "{name} as {}", object["type"]);
        }
        object.as_object_mut().unwrap().remove("type");
        assert!(envelope::decode::<T>("test", &serde_json::to_vec(&object).unwrap()).is_err());
        // An array of the same values, text behind the object, and no object at all.
        assert!(envelope::decode::<T>("test", b"[\"hello\",\"x\",[],[]]").is_err());
        assert!(envelope::decode::<T>("test", &[&golden[..], b"{}"].concat()).is_err());
        assert!(envelope::decode::<T>("test", b"\"status\"").is_err());
    }
}

fn array<const N: usize>(name: &str) -> [u8; N] {
    files::read(name).try_into().unwrap()
}

fn envelope_is<T: Serialize + DeserializeOwned + PartialEq + Debug>(
    name: &str,
    value: &T,
    blob: &[u8],
    max_blob_bytes: u32,
) {
    let bytes = files::read(name);
    let mut rest = &bytes[..];
    let found = reader::message::<T>(&mut rest, max_blob_bytes).unwrap();
    assert_eq!((&found.0, found.1, rest), (value, blob, &[][..]), "{name}");
}

fn messages_are<T: DeserializeOwned + PartialEq + Debug>(
    folder: &str,
    values: &[T],
    kind: fn(&T) -> &'static str,
) {
    for value in values {
        let name = format!("{folder}/{}.json", kind(value));
        assert_eq!(&envelope::decode::<T>("test", &files::read(&name)).unwrap(), value, "{name}");
    }
}

fn names_are<T: DeserializeOwned + PartialEq + Debug>(name: &str, values: &[T]) {
    let found: Vec<T> = serde_json::from_slice(&files::read(&format!("names/{name}.json"))).unwrap();
    assert_eq!(found, values, "{name}");
}

//! The golden files: every one of them, made from the samples.

use super::samples;
use protocol::control::{Downstream, Upstream};
use protocol::envelope;
use protocol::frame::{Frame, StreamPreamble};
use protocol::handshake::{Hello, MINOR, Preamble};
use protocol::page::{PageRun, SpaceId};
use protocol::payload::{Encoding, KnownPage};
use protocol::state::State;
use serde::Serialize;
use std::collections::BTreeMap;
use std::path::PathBuf;

/// Where the golden files lie.
pub(crate) fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

/// The golden file of this name, as it lies on disk.
pub(crate) fn read(name: &str) -> Vec<u8> {
    let path = folder().join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The names on disk, relative to the folder.
pub(crate) fn on_disk() -> Vec<String> {
    let mut names = Vec::new();
    for folder in std::fs::read_dir(folder()).unwrap() {
        let folder = folder.unwrap();
        for file in std::fs::read_dir(folder.path()).unwrap() {
            let name = file.unwrap().file_name();
            names.push(format!("{}/{}", folder.file_name().display(), name.display()));
        }
    }
    names.sort();
    names
}

pub(crate) const STREAM: StreamPreamble = StreamPreamble { stream: 3 };

pub(crate) fn zero_frame() -> Frame {
    pages(0, 1536, 256, Encoding::Zero, 0)
}

pub(crate) fn raw_frame() -> Frame {
    pages(1, 7 * 512 + 9, 1, Encoding::Raw, 1)
}

pub(crate) fn round_end(round: u32) -> Frame {
    Frame::RoundEnd { round }
}

fn pages(space: u16, first: u64, count: u32, encoding: Encoding, round: u32) -> Frame {
    let run = PageRun { space: SpaceId(space), first, count };
    let payload_bytes = if encoding == Encoding::Zero { 0 } else { run.bytes() as u32 };
    Frame::Pages { run, encoding, payload_bytes, round }
}

/// Two pages of zeros as one LZ4 block, as a writer might: a literal 0, a match of 8175 bytes one byte back, and the last
/// 16 bytes as literals, of which the format wants five or more.
pub(crate) fn lz4_payload() -> Vec<u8> {
    // 19 + 31 * 255 + 251 = 8175
    [&[0x1f, 0, 1, 0][..], &[255; 31], &[251, 0xf0, 1], &[0; 16]].concat()
}

/// Two pages of zeros as one Zstandard frame: magic, a descriptor with a content size of two bytes (less 256), and one last
/// block of 8192 times the byte 0.
pub(crate) fn zstd_payload() -> Vec<u8> {
    let block = (8192_u32 << 3 | 1 << 1 | 1).to_le_bytes();
    [&[0x28, 0xb5, 0x2f, 0xfd, 0x60, 0x00, 0x1f][..], &block[..3], &[0]].concat()
}

/// A delta of two pages that did not change.
pub(crate) fn delta_payload() -> Vec<u8> {
    let base = twox_hash::XxHash3_64::oneshot(&samples::page().repeat(2));
    [&base.to_le_bytes()[..], &lz4_payload()].concat()
}

/// Two pages that equal one: the page in front of them.
pub(crate) fn known_payload() -> Vec<u8> {
    let known = KnownPage { page: 7 * 512 + 8, digest: *b"0123456789abcdef0123456789abcdef" };
    known.encode().repeat(2)
}

/// A frame of two pages with that payload.
pub(crate) fn coded_frame(encoding: Encoding, payload: &[u8]) -> Frame {
    let run = PageRun { space: SpaceId(1), first: 7 * 512 + 9, count: 2 };
    Frame::Pages { run, encoding, payload_bytes: payload.len() as u32, round: 1 }
}

/// The frames that stand for their pages by less: file, encoding, payload.
pub(crate) fn coded() -> [(&'static str, Encoding, Vec<u8>); 4] {
    [
        ("frame/zstd.bin", Encoding::Zstd, zstd_payload()),
        ("frame/lz4.bin", Encoding::Lz4, lz4_payload()),
        ("frame/delta.bin", Encoding::Delta, delta_payload()),
        ("frame/known.bin", Encoding::Known, known_payload()),
    ]
}

/// The frames of `page-stream/two-rounds.bin`.
pub(crate) fn two_rounds() -> Vec<Frame> {
    vec![zero_frame(), round_end(0), raw_frame(), round_end(1)]
}

/// A frame with its payload: the sample page where there is one.
pub(crate) fn frame_bytes(frame: &Frame) -> Vec<u8> {
    let payload = samples::page().repeat(frame.payload_bytes() / samples::page().len());
    let mut bytes = frame.encode(&payload).to_vec();
    bytes.extend_from_slice(&payload);
    bytes
}

/// A hello that names capabilities this release does not have.
pub(crate) fn hello_of_the_future() -> Hello {
    Hello {
        software: "migrate 9.9.9".into(),
        capabilities: vec!["delta".into(), "zstd".into()],
        required: vec!["delta".into()],
    }
}

pub(crate) fn handshake(minor: u16, hello: Hello) -> Vec<u8> {
    let mut bytes = Preamble { minor }.encode().to_vec();
    bytes.extend(envelope::encode(&Downstream::Hello(hello), &[]).unwrap());
    bytes
}

/// Every golden file and what it must hold.
pub(crate) fn all() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut add = |name: &str, bytes: Vec<u8>| {
        assert!(files.insert(name.to_owned(), bytes).is_none(), "{name} twice");
    };
    for (name, bytes) in super::checkpoint::files() {
        add(name, bytes);
    }
    add("preamble/control.bin", Preamble::OURS.encode().to_vec());
    add("preamble/page-stream.bin", STREAM.encode().to_vec());
    add("handshake/version-1.0.bin", handshake(MINOR, samples::hello()));
    add("handshake/of-the-future.bin", handshake(7, hello_of_the_future()));
    add("frame/zero.bin", frame_bytes(&zero_frame()));
    add("frame/raw.bin", frame_bytes(&raw_frame()));
    add("frame/round-end.bin", frame_bytes(&round_end(1)));
    for (name, encoding, payload) in coded() {
        let header = coded_frame(encoding, &payload).encode(&payload);
        add(name, [&header[..], &payload].concat());
    }
    let mut stream = STREAM.encode().to_vec();
    stream.extend(two_rounds().iter().flat_map(frame_bytes));
    add("page-stream/two-rounds.bin", stream);
    add(
        "envelope/commit.bin",
        envelope::encode(&Downstream::Commit { migration: samples::MIGRATION }, &[]).unwrap(),
    );
    add("envelope/state.bin", envelope::encode(&Downstream::State { last_round: 5 }, &state()).unwrap());
    add("envelope/ready.bin", envelope::encode(&Upstream::Ready, &[]).unwrap());
    add("envelope/request.bin", envelope::encode(&protocol::monitor::Request::Load, &state()).unwrap());
    add("envelope/reply.bin", envelope::encode(&protocol::monitor::Reply::Saved, &state()).unwrap());
    add("state/empty.bin", State::default().encode().unwrap());
    add("state/vm.bin", state());
    let mut set = Vec::new();
    samples::page_set().write_to(&mut set);
    add("page-set/70-pages.bin", set);
    add("sparse/two-spaces.bin", protocol::sparse::encode(&samples::missing()));
    add("layout/two-spaces.json", json(&samples::layout()));

    for message in samples::downstream() {
        add(&format!("downstream/{}.json", samples::downstream_type(&message)), json(&message));
    }
    for message in samples::upstream() {
        add(&format!("upstream/{}.json", samples::upstream_type(&message)), json(&message));
    }
    for message in samples::requests() {
        add(&format!("request/{}.json", samples::request_type(&message)), json(&message));
    }
    for message in samples::replies() {
        add(&format!("reply/{}.json", samples::reply_type(&message)), json(&message));
    }

    for message in samples::orders() {
        add(&format!("order/{}.json", samples::order_type(&message)), json(&message));
    }
    for message in samples::answers() {
        add(&format!("answer/{}.json", samples::answer_type(&message)), json(&message));
    }

    add("container/description.json", samples::container().encode());
    add("container/description-with-files.json", samples::container_with_files().encode());
    add("container/tree.bin", samples::tree().encode().unwrap());
    add("container/placement.bin", samples::placement().encode().unwrap());
    add("container/pagemap-7.img", samples::pagemap().encode());

    add("names/refuse-code.json", json(&samples::REFUSE_CODES));
    add("names/outcome.json", json(&samples::OUTCOMES));
    add("names/workload-kind.json", json(&samples::WORKLOAD_KINDS));
    add("names/space-kind.json", json(&samples::SPACE_KINDS));
    add("names/role.json", json(&samples::ROLES));
    add("names/tracking-mode.json", json(&samples::TRACKING_MODES));
    add("names/error-code.json", json(&samples::ERROR_CODES));
    add("names/phase.json", json(&samples::PHASES));
    add("names/steer-error-code.json", json(&samples::STEER_ERROR_CODES));
    add("names/steer-end.json", json(&samples::STEER_ENDS));
    add("names/steer-outcome.json", json(&samples::STEER_OUTCOMES));
    files
}

fn state() -> Vec<u8> {
    samples::state().encode().unwrap()
}

fn json<T: Serialize>(value: &T) -> Vec<u8> {
    serde_json::to_vec(value).unwrap()
}

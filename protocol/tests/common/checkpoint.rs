//! One value of everything in a checkpoint store, and the golden files made of them.

use super::samples;
use protocol::checkpoint::index::{At, Extent, Index, Placed};
use protocol::checkpoint::manifest::{
    Group, HexDigest, Manifest, MergedIndex, Parent, Part, Pruned, Seal, Segment, StoreInfo, to_json,
};
use protocol::checkpoint::merged::{self, Merged, Stored};
use protocol::checkpoint::name::CheckpointId;
use protocol::checkpoint::object::{self, Kind};
use protocol::checkpoint::segment::{self, Encoding};
use protocol::checkpoint::touched;
use protocol::control::WorkloadKind;
use protocol::page::{PageRun, SpaceId};
use serde::Serialize;

/// How many segments the sample manifest lists.
pub(crate) const SEGMENTS: u32 = 2;

pub(crate) fn id() -> CheckpointId {
    CheckpointId::new(1_795_463_311, 0x3f9a_1c07)
}

fn earlier() -> CheckpointId {
    CheckpointId::new(1_795_463_251, 0x0000_00ff)
}

fn digest(byte: u8) -> HexDigest {
    HexDigest([byte; 32])
}

pub(crate) fn stores() -> [StoreInfo; 2] {
    let open = StoreInfo {
        id: "000102030405060708090a0b0c0d0e0f".into(),
        created_unix_ms: 1_795_463_311_000,
        software: "migrate 0.1.0".into(),
        seal: None,
    };
    let seal = Seal { cipher: "aes-256-gcm".into(), key_check: digest(0x42) };
    [open.clone(), StoreInfo { seal: Some(seal), ..open }]
}

/// A delta that is a member of a group.
pub(crate) fn manifest() -> Manifest {
    let body = index().encode();
    Manifest {
        id: id(),
        taken_unix_ms: 1_795_463_311_250,
        software: "migrate 0.1.0".into(),
        workload: "web-1".into(),
        kind: WorkloadKind::Vm,
        layout: samples::layout(),
        parent: Some(Parent { id: earlier(), digest: digest(0x11) }),
        deltas: 1,
        segments: vec![
            Segment { checkpoint: id(), number: 0, bytes: 21_496 },
            Segment { checkpoint: earlier(), number: 3, bytes: 67_108_864 },
        ],
        index: Part {
            bytes: (object::HEADER_BYTES + body.len()) as u64,
            digest: HexDigest(object::encode(Kind::Index, false, &body).1),
        },
        state: Part {
            bytes: object_of(Kind::State, &state()).len() as u64,
            digest: HexDigest(object::encode(Kind::State, false, &state()).1),
        },
        data_pages: 9,
        shared_pages: 0,
        zero_pages: 256,
        pause_us: 3120,
        merged: None,
        group: Some(CheckpointId::new(1_795_463_310, 0xabcd_ef01)),
    }
}

/// A delta behind one that has a merged index.
pub(crate) fn manifest_behind() -> Manifest {
    let (bytes, digest) = object::encode(Kind::Merged, false, &merged().encode(&samples::layout()));
    let index = Part { bytes: bytes.len() as u64, digest: HexDigest(digest) };
    Manifest { merged: Some(MergedIndex { id: earlier(), index }), group: None, ..manifest() }
}

/// Extents of which some pages are named, in two spaces; numbers of one byte and of more.
pub(crate) fn merged() -> Merged {
    let segment = |checkpoint, number, bytes| Segment { checkpoint, number, bytes };
    let extent = |segment, offset, stored_bytes, pages, encoding, byte| Extent {
        segment,
        offset,
        stored_bytes,
        pages,
        encoding,
        digest: [byte; 32],
    };
    let stored = |space, first, count, extent, page| Stored {
        run: PageRun { space: SpaceId(space), first, count },
        extent,
        page,
    };
    let (bytes, digest) = object::encode(Kind::Sums, false, &merged::encode_sums(&merged_sums()));
    Merged {
        sums: Part { bytes: bytes.len() as u64, digest: HexDigest(digest) },
        segments: vec![segment(earlier(), 3, 67_108_864), segment(id(), 0, 21_496)],
        extents: vec![
            extent(0, 16, 1_048_576, 256, Encoding::Raw, 0xb1),
            extent(1, 4112, 16_384, 4, Encoding::Raw, 0xa2),
        ],
        runs: vec![
            stored(1, 7, 200, 0, 56),
            stored(0, 786_431, 1, 1, 0),
            stored(0, 2, 2, 1, 2),
            stored(0, 9, 1, 1, 3),
        ],
    }
}

/// One for each of its pages.
pub(crate) fn merged_sums() -> Vec<u64> {
    (0..204).map(|page| 0xb100 + page).collect()
}

pub(crate) fn group() -> Group {
    Group {
        id: CheckpointId::new(1_795_463_310, 0xabcd_ef01),
        name: "app".into(),
        taken_unix_ms: 1_795_463_311_250,
        members: vec![
            Parent { id: id(), digest: digest(0x22) },
            Parent { id: CheckpointId::new(1_795_463_311, 1), digest: digest(0x33) },
        ],
    }
}

pub(crate) fn pruned() -> Pruned {
    Pruned { id: id(), pruned_unix_ms: 1_795_549_711_000 }
}

/// Raw, raw and packed extents; zeros between runs; and a page of an extent that nothing names any more.
pub(crate) fn index() -> Index {
    let mut index = Index::default();
    let mut add = |segment, offset, stored_bytes, pages: u16, encoding, byte| {
        let extent = Extent { segment, offset, stored_bytes, pages, encoding, digest: [byte; 32] };
        let sums: Vec<_> = (0..u64::from(pages)).map(|page| u64::from(byte) << 8 | page).collect();
        index.push(extent, &sums)
    };
    let single = add(0, 16, 4096, 1, Encoding::Raw, 0xa1);
    let four = add(0, 4112, 16_384, 4, Encoding::Raw, 0xa2);
    let packed = add(0, 20_496, 1000, 4, Encoding::Zstd, 0xa3);
    let place = |space, first, count, at| Placed { run: PageRun { space: SpaceId(space), first, count }, at };
    index.runs = vec![
        place(0, 0, 1, At::Extent { extent: single, page: 0 }),
        place(0, 1, 256, At::Zeros),
        place(0, 257, 2, At::Extent { extent: four, page: 2 }),
        place(0, 786_431, 1, At::Extent { extent: four, page: 0 }),
        place(1, 0, 4, At::Extent { extent: packed, page: 0 }),
    ];
    index
}

pub(crate) fn touched_runs() -> Vec<PageRun> {
    [(0, 256, 8), (1, 7, 1), (0, 0, 1)]
        .map(|(space, first, count)| PageRun { space: SpaceId(space), first, count })
        .into()
}

/// A state's body.
pub(crate) fn state() -> Vec<u8> {
    [&7_u32.to_le_bytes()[..], b"machine", &samples::state().encode().unwrap()].concat()
}

fn json<T: Serialize>(kind: Kind, value: &T) -> Vec<u8> {
    object_of(kind, &to_json("sample", value).unwrap())
}

fn object_of(kind: Kind, body: &[u8]) -> Vec<u8> {
    object::encode(kind, false, body).0
}

/// The golden files: name and bytes.
pub(crate) fn files() -> Vec<(&'static str, Vec<u8>)> {
    let [open, sealed] = stores();
    vec![
        ("checkpoint/store.bin", json(Kind::Store, &open)),
        ("checkpoint/store-sealed.bin", json(Kind::Store, &sealed)),
        ("checkpoint/manifest.bin", json(Kind::Manifest, &manifest())),
        ("checkpoint/index-object.bin", object_of(Kind::Index, &index().encode())),
        ("checkpoint/index.bin", index().encode()),
        ("checkpoint/state.bin", object_of(Kind::State, &state())),
        ("checkpoint/group.bin", json(Kind::Group, &group())),
        ("checkpoint/pruned.bin", json(Kind::Pruned, &pruned())),
        ("checkpoint/touched.bin", touched::encode(&touched_runs())),
        ("checkpoint/manifest-behind.bin", json(Kind::Manifest, &manifest_behind())),
        ("checkpoint/merged-index.bin", merged().encode(&samples::layout())),
        ("checkpoint/merged-sums.bin", merged::encode_sums(&merged_sums())),
        ("checkpoint/sealed.bin", object::encode(Kind::State, true, b"salt and ciphertext").0),
        ("checkpoint/segment.bin", segment::header(false).to_vec()),
        ("checkpoint/segment-sealed.bin", segment::header(true).to_vec()),
    ]
}

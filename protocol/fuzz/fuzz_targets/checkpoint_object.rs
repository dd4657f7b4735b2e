//! An object of a checkpoint store.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::checkpoint::object::{self, HEADER_BYTES, Kind};

const KINDS: [Kind; 7] =
    [Kind::Store, Kind::Manifest, Kind::Index, Kind::State, Kind::Group, Kind::Pruned, Kind::Touched];

fuzz_target!(|data: &[u8]| {
    let read = KINDS.iter().filter(|kind| judge(data, **kind)).count();
    assert!(read <= 1, "an object is of one kind");
    // No fuzzer finds a digest: whatever follows the header is written as a body, and must be read as it is.
    if let Some(body) = data.get(HEADER_BYTES..) {
        let kind = KINDS[usize::from(data[10]) % KINDS.len()];
        let (bytes, digest) = object::encode(kind, data[11] & 1 == 1, body);
        let found = object::decode(&bytes, kind, "fuzz").expect("what was encoded is decoded");
        assert_eq!((found.body, found.digest), (body, digest));
    }
});

fn judge(bytes: &[u8], kind: Kind) -> bool {
    let Ok(object) = object::decode(bytes, kind, "fuzz") else { return false };
    assert_eq!(object::encode(kind, object.sealed, object.body), (bytes.to_vec(), object.digest));
    true
}

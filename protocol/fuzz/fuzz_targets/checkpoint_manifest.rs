//! The objects of a checkpoint store that are JSON.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::checkpoint::manifest::{Group, Manifest, Pruned, StoreInfo, from_json, to_json};
use protocol::checkpoint::object::HEADER_BYTES;
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::fmt::Debug;

fuzz_target!(|data: &[u8]| {
    judge_all(data);
    // The seeds are whole objects: what is behind the header is the JSON.
    judge_all(data.get(HEADER_BYTES..).unwrap_or_default());
});

fn judge_all(data: &[u8]) {
    if let Some(manifest) = judge::<Manifest>(data) {
        if manifest.validate(manifest.id).is_ok() {
            assert!(manifest.parent.is_some() == (manifest.deltas > 0));
            assert_eq!(manifest.id.to_string().parse(), Ok(manifest.id));
        }
    }
    judge::<Group>(data);
    judge::<Pruned>(data);
    judge::<StoreInfo>(data);
}

fn judge<T: Serialize + DeserializeOwned + PartialEq + Debug>(json: &[u8]) -> Option<T> {
    let value = from_json::<T>("fuzz", json).ok()?;
    let again = to_json("fuzz", &value).expect("what was read can be written");
    assert_eq!(from_json::<T>("fuzz", &again).as_ref(), Ok(&value));
    Some(value)
}

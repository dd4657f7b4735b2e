//! What the four conversations have in common: not a target, included by them.

#[allow(dead_code, reason = "each target reads one format")]
#[path = "../../tests/common/reader.rs"]
pub mod reader;

use protocol::envelope;
use serde::{Serialize, de::DeserializeOwned};
use std::fmt::Debug;

/// Reads messages until the bytes are used up or wrong, and the whole of the bytes as the JSON of one. What could be
/// read must survive being written.
pub fn conversation<T>(data: &[u8], max_blob_bytes: u32, mut look: impl FnMut(&T))
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let mut judge = |message: &T, blob: &[u8]| {
        look(message);
        // Escapes may make the JSON longer than it came, beyond what a message may have.
        if let Ok(bytes) = envelope::encode(message, blob) {
            let again = reader::message::<T>(&mut &bytes[..], max_blob_bytes);
            assert_eq!(again.as_ref().map(|(message, blob)| (message, *blob)), Ok((message, blob)));
        }
    };
    let mut rest = data;
    while let Ok((message, blob)) = reader::message::<T>(&mut rest, max_blob_bytes) {
        judge(&message, blob);
    }
    if let Ok(message) = envelope::decode::<T>("fuzz", data) {
        judge(&message, &[]);
    }
}

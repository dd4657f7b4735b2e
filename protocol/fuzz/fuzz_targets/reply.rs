//! What a VMM answers.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use protocol::monitor::{MAX_BLOB_BYTES, Reply};

fuzz_target!(|data: &[u8]| {
    message::conversation::<Reply>(data, MAX_BLOB_BYTES, |message| {
        if let Reply::Description { layout, .. } = message {
            let _ = (layout.validate(u64::MAX), layout.total_bytes());
        }
    });
});

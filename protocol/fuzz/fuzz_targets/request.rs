//! What an engine asks a VMM.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use protocol::control::check_name;
use protocol::monitor::{MAX_BLOB_BYTES, Request};

fuzz_target!(|data: &[u8]| {
    message::conversation::<Request>(data, MAX_BLOB_BYTES, |message| {
        if let Request::Prepare { name, layout } = message {
            let _ = (check_name(name), layout.validate(u64::MAX), layout.total_bytes());
        }
    });
});

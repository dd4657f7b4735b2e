//! What a receiver says on the control stream.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use protocol::control::{MAX_BLOB_BYTES, Upstream};

fuzz_target!(|data: &[u8]| {
    message::conversation::<Upstream>(data, MAX_BLOB_BYTES, |message| {
        if let Upstream::Hello(hello) = message {
            let _ = hello.agree();
        }
    });
});

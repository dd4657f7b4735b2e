//! What a sender says on the control stream.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use protocol::control::{Downstream, MAX_BLOB_BYTES};

fuzz_target!(|data: &[u8]| {
    message::conversation::<Downstream>(data, MAX_BLOB_BYTES, |message| match message {
        Downstream::Hello(hello) => drop(hello.agree()),
        Downstream::Offer(offer) => {
            let _ = (offer.check(u64::MAX), offer.layout.total_bytes());
        }
        _ => (),
    });
});

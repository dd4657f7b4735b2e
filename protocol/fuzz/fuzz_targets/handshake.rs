//! The first bytes of a control stream and the hello behind them.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use message::reader;
use protocol::control::Downstream;
use protocol::handshake::Preamble;

fuzz_target!(|data: &[u8]| {
    let Some((head, mut rest)) = data.split_first_chunk() else { return };
    let Ok(preamble) = Preamble::decode(head) else { return };
    assert_eq!(Preamble::decode(&preamble.encode()), Ok(preamble));
    if let Ok((Downstream::Hello(hello), _)) = reader::message(&mut rest, 0) {
        let _ = hello.agree();
    }
    message::conversation::<Downstream>(rest, 0, |_| ());
});

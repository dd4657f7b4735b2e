//! What a running migration answers its operator.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use protocol::steer::Answer;

fuzz_target!(|data: &[u8]| message::conversation::<Answer>(data, 0, |_| {}));

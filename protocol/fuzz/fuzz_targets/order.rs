//! What an operator orders a running migration.
#![no_main]

mod message;

use libfuzzer_sys::fuzz_target;
use protocol::steer::Order;

fuzz_target!(|data: &[u8]| message::conversation::<Order>(data, 0, |_| {}));

//! The state of a workload.
#![no_main]

use libfuzzer_sys::fuzz_target;
use protocol::state::State;
use twox_hash::XxHash3_64;

fuzz_target!(|data: &[u8]| {
    judge(data);
    // No fuzzer finds a checksum: set it right, so that what lies behind it is reached.
    if let Some(body) = data.len().checked_sub(8) {
        let mut bytes = data[..body].to_vec();
        let sum = XxHash3_64::oneshot(&bytes);
        bytes.extend_from_slice(&sum.to_le_bytes());
        judge(&bytes);
    }
});

fn judge(bytes: &[u8]) {
    if let Ok(state) = State::decode(bytes) {
        let again = state.encode().expect("what was decoded fits the format");
        assert_eq!(State::decode(&again), Ok(state));
    }
}

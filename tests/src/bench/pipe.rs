//! The same QUIC settings with no guest behind them.

use crate::trusting_pair;
use std::path::Path;

/// What the pipe carries over so many streams, in bytes per second.
pub(super) fn raw(program: &Path, mib: u64, streams: u16) -> f64 {
    let (a, b) = trusting_pair(program);
    let mut receiver = b.start(&["bench-pipe", "receive", "--listen", "127.0.0.1:0"]);
    let listening = receiver.wait_event("listening");
    let address = listening["address"].as_str().expect("an address").to_owned();
    let (mib, streams) = (mib.to_string(), streams.to_string());
    let sent = a.run(&["bench-pipe", "send", &address, "--mib", &mib, "--streams", &streams]).success();
    receiver.finish().success();
    sent.lines.last().and_then(|line| line["bytes_per_second"].as_f64()).expect("a rate")
}

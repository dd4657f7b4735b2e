//! What runs in a container under test and is asked over a connection: it counts.
//!
//! ```text
//! counter PORT
//! ```
//!
//! It takes connections on a TCP port, one at a time. Every 8 bytes are a number; the first is 1, and each is one more than the last: then they are
//! sent back, and otherwise the connection ends.
#![allow(clippy::expect_used, reason = "a program of tests: it fails by ending, and says why")]

use std::io::{Read as _, Write as _};
use std::net::TcpListener;

fn main() {
    let port = std::env::args().nth(2).and_then(|text| text.parse().ok()).expect("a port");
    let listener = TcpListener::bind(("0.0.0.0", port)).expect("the port is free");
    for mut connection in listener.incoming().flatten() {
        connection.set_nodelay(true).expect("it is a TCP connection");
        let (mut last, mut bytes) = (0_u64, [0; 8]);
        while connection.read_exact(&mut bytes).is_ok() && u64::from_le_bytes(bytes) == last + 1 {
            last += 1;
            if connection.write_all(&bytes).is_err() {
                break;
            }
        }
    }
}

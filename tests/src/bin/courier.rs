//! What runs in several containers under test that talk to each other: it sends numbered messages to the next one, and counts those of the one
//! before.
//!
//! ```text
//! courier OUT PORT NEXT MIB
//! ```
//!
//! It binds UDP port PORT of the loopback, and sends message *n* + 1 to port NEXT when *n* was acknowledged, again and again until it is. So whoever
//! receives *n* has received all before, once; a message that is neither the one that is due nor the last one again was lost or made
//! twice. Ten times a second it writes its record to the start of OUT, of 128 bytes: messages sent and acknowledged, messages received, and
//! messages that were wrong. It holds MIB of memory that it does not need, so that writing it down takes longer.
#![allow(clippy::expect_used, reason = "a program of tests: it fails by ending, and says why")]

use std::fs::File;
use std::io::{ErrorKind, Seek as _, SeekFrom, Write as _};
use std::net::UdpSocket;
use std::time::{Duration, Instant};

/// Bytes of the record.
const RECORD: usize = 128;

/// What a message is: its kind, and its number.
const MESSAGE: u64 = 1 << 63;

const AGAIN: Duration = Duration::from_millis(5);
const SAY: Duration = Duration::from_millis(100);

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let port = |at: usize| arguments[at].parse::<u16>().expect("a port");
    let socket = UdpSocket::bind(("127.0.0.1", port(2))).expect("the port is free");
    socket.set_read_timeout(Some(AGAIN)).expect("a limit");
    let next = ("127.0.0.1", port(3));
    let mut out =
        File::options().write(true).create(true).truncate(false).open(&arguments[1]).expect("its file");
    out.set_len(RECORD as u64).expect("room for its record");
    let mut ballast = vec![1_u64; arguments[4].parse::<usize>().expect("a size") << 17];
    for at in 1..ballast.len() {
        ballast[at] = ballast[at - 1].wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
    }
    let (mut acknowledged, mut received, mut wrong) = (0_u64, 0_u64, 0_u64);
    let (begun, mut said, mut sent) = (Instant::now(), Instant::now(), Instant::now());
    let mut due = true;
    while begun.elapsed() < Duration::from_secs(600) {
        if due || sent.elapsed() >= AGAIN {
            (due, sent) = (false, Instant::now());
            // Nobody may listen yet.
            let _ = socket.send_to(&(MESSAGE | (acknowledged + 1)).to_le_bytes(), next);
        }
        let mut bytes = [0; 8];
        match socket.recv_from(&mut bytes) {
            Ok((8, from)) => {
                let word = u64::from_le_bytes(bytes);
                if word & MESSAGE == 0 {
                    due = word == acknowledged + 1;
                    acknowledged += u64::from(due);
                } else {
                    let number = word & !MESSAGE;
                    wrong += u64::from(number != received && number != received + 1);
                    received = received.max(number);
                    let _ = socket.send_to(&number.to_le_bytes(), from);
                }
            }
            Ok(_) => wrong += 1,
            Err(error) => assert!(
                matches!(
                    error.kind(),
                    ErrorKind::WouldBlock
                        | ErrorKind::TimedOut
                        | ErrorKind::ConnectionRefused
                        // It was stopped meanwhile, which a wait with a limit tells (signal(7)).
                        | ErrorKind::Interrupted
                ),
                "{error}"
            ),
        }
        if said.elapsed() >= SAY {
            said = Instant::now();
            let record = format!("{acknowledged} {received} {wrong}");
            out.seek(SeekFrom::Start(0)).expect("its place");
            writeln!(out, "{record:<width$}", width = RECORD - 1).expect("it is written");
        }
        std::hint::black_box(&ballast);
        // A machine with few cores has others to run.
        std::thread::sleep(Duration::from_micros(200));
    }
}

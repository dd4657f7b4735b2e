//! What runs in a container under test and has something of everything: threads, a pipe, a child behind a Unix socket, a timer, a lock on a file.
//!
//! ```text
//! household OUT [echo]
//! ```
//!
//! A thread counts into a pipe, the first one out of it; another asks the child, which answers with the next number; a third one waits for a timer that
//! expires every 10 ms. Ten times a second the first one writes to OUT, always as long: numbers out of the pipe, answers, expirations, and how often
//! something was not as it should be: a number that was lost or came twice, a lock that somebody else could have.
#![allow(clippy::expect_used, reason = "a program of tests: it fails by ending, and says why")]

use rustix::fs::FlockOperation;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Between two numbers.
const PAUSE: Duration = Duration::from_millis(2);

/// Of the timer.
const PERIOD: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Numbers between two records.
const RECORD: u64 = 50;

#[derive(Default)]
struct Counts {
    answers: AtomicU64,
    expirations: AtomicU64,
    wrong: AtomicU64,
}

impl Counts {
    fn expect(&self, found: u64, wanted: u64) {
        if found != wanted {
            self.wrong.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if arguments.get(2).is_some_and(|word| word == "echo") {
        return echo();
    }
    let counts = Arc::new(Counts::default());
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    std::thread::spawn(move || {
        for number in 1_u64.. {
            writer.write_all(&number.to_le_bytes()).expect("the pipe is read");
            std::thread::sleep(PAUSE);
        }
    });
    let theirs = Arc::clone(&counts);
    let (program, out) = (arguments[0].clone(), arguments[1].clone());
    std::thread::spawn(move || ask(&program, &out, &theirs));

    let theirs = Arc::clone(&counts);
    std::thread::spawn(move || tick(&theirs));
    let mut out =
        File::options().write(true).create(true).truncate(false).open(&arguments[1]).expect("a file");
    rustix::fs::flock(&out, FlockOperation::NonBlockingLockExclusive).expect("nobody has it");
    let mut bytes = [0; 8];
    for number in 1_u64.. {
        reader.read_exact(&mut bytes).expect("the pipe is written to");
        counts.expect(u64::from_le_bytes(bytes), number);
        if number.is_multiple_of(RECORD) {
            let other = File::open(&arguments[1]).expect("it is there");
            if rustix::fs::flock(&other, FlockOperation::NonBlockingLockExclusive).is_ok() {
                counts.wrong.fetch_add(1, Ordering::Relaxed);
            }
            let counted = [&counts.answers, &counts.expirations, &counts.wrong];
            let [answers, expirations, wrong] = counted.map(|count| count.load(Ordering::Relaxed));
            let record = format!("{number:20} {answers:20} {expirations:20} {wrong:20}\n");
            out.rewind().and_then(|()| out.write_all(record.as_bytes())).expect("it is written");
        }
    }
}

/// Asks a child over a Unix socket for the next number.
fn ask(program: &str, out: &str, counts: &Counts) {
    let (mut ours, theirs) = UnixStream::pair().expect("a pair");
    let mut command = Command::new(program);
    command.args([out, "echo"]).stdin(Stdio::from(OwnedFd::from(theirs)));
    let mut child = command.spawn().expect("a child");
    drop(command);
    let mut bytes = [0; 8];
    for number in 1_u64.. {
        ours.write_all(&number.to_le_bytes()).expect("the child reads");
        ours.read_exact(&mut bytes).expect("the child answers");
        counts.expect(u64::from_le_bytes(bytes), number + 1);
        counts.answers.store(number, Ordering::Relaxed);
        std::thread::sleep(PAUSE);
    }
    child.wait().expect("it is ours");
}

/// The child: its standard input is a socket.
fn echo() {
    let mut stream = UnixStream::from(
        std::os::fd::AsFd::as_fd(&std::io::stdin()).try_clone_to_owned().expect("it is open"),
    );
    let mut bytes = [0; 8];
    while stream.read_exact(&mut bytes).is_ok() {
        let next = u64::from_le_bytes(bytes) + 1;
        stream.write_all(&next.to_le_bytes()).expect("somebody reads");
    }
}

/// Counts what a timer does.
fn tick(counts: &Counts) {
    let timer =
        rustix::time::timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC).expect("a timer");
    let every = Itimerspec { it_interval: PERIOD, it_value: PERIOD };
    rustix::time::timerfd_settime(&timer, TimerfdTimerFlags::empty(), &every).expect("it is set");
    let mut bytes = [0; 8];
    loop {
        rustix::io::read(&timer, &mut bytes).expect("it expires");
        counts.expirations.fetch_add(u64::from_ne_bytes(bytes), Ordering::Relaxed);
    }
}

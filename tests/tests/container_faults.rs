//! Whatever fails while a container moves, at whatever moment: it runs on exactly one side in the end, and its memory is whole.
//!
//! The faults and their moments come from a seed, which a case that fails prints: `CONTAINER_FAULTS_SEED` runs it again, or, with
//! `CONTAINER_FAULTS`, so many from that one on.
#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests: what goes wrong in them fails the test"
)]

use e2e::containers::{End, Yard};
use e2e::host::commands;
use e2e::network::without_root;
use e2e::random::Random;
use e2e::relay::{Relay, Way, Weather};
use e2e::{Finished, Running};
use rustix::process::{Pid, Signal};
use std::path::Path;
use std::time::{Duration, Instant};

const PROGRAM: &str = env!("CARGO_BIN_EXE_migrate-under-test");
const TENANT: &str = env!("CARGO_BIN_EXE_tenant");

/// Cases, if nobody says how many: each fault twice, and some more.
const CASES: u64 = 30;

/// What a move takes, more or less: faults come at any moment of it. Its first round is as slow as this makes 8 MiB.
const MOVE: Duration = Duration::from_millis(1100);
const BANDWIDTH: &str = "20MB/s";

/// How long runc or CRIU may be at work when they are killed.
const WORK: Duration = Duration::from_millis(150);

/// How long anything may take that is waited for.
const LIMIT: Duration = Duration::from_secs(60);

/// How long what a killed receiver began may take to come to an end.
const AFTERMATH: Duration = Duration::from_secs(20);

/// Where images are that are too many for it.
const SMALL_BYTES: u64 = 160 << 10;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Source,
    Destination,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fault {
    Sender,
    Keeper,
    SenderAndKeeper,
    Receiver,
    Runc(Side),
    Criu(Side),
    /// The link is gone for good.
    Cut,
    /// There is no room for what CRIU writes.
    Full(Side),
}

const FAULTS: [Fault; 11] = [
    Fault::Sender,
    Fault::Keeper,
    Fault::SenderAndKeeper,
    Fault::Receiver,
    Fault::Runc(Side::Source),
    Fault::Runc(Side::Destination),
    Fault::Criu(Side::Source),
    Fault::Criu(Side::Destination),
    Fault::Cut,
    Fault::Full(Side::Source),
    Fault::Full(Side::Destination),
];

/// Which end has it in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ended {
    at: Side,
    /// Somebody had to ask, or to say, what became of it.
    recovered: bool,
}

fn number(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} takes a number, not {text}")))
}

fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        // It may have ended by itself.
        rustix::process::kill_process(pid, Signal::KILL).ok();
    }
}

/// A runc that works for a `migrate` of this number, and a CRIU that works for it.
fn workers(migrate: i32) -> (Option<i32>, Option<i32>) {
    let images = format!("migrate-images-{migrate}-");
    let verbs = ["\0checkpoint\0", "\0restore\0"];
    let is_runc =
        |command: &str| command.contains(&images) && verbs.iter().any(|verb| command.contains(verb));
    let Some((runc, _)) = commands().find(|(_, command)| is_runc(command)) else { return (None, None) };
    let threads = std::fs::read_dir(format!("/proc/{runc}/task")).into_iter().flatten().flatten();
    let children = threads.filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok());
    let children: Vec<i32> = children
        .flat_map(|text| text.split(' ').filter_map(|pid| pid.parse().ok()).collect::<Vec<_>>())
        .collect();
    let criu = commands().find(|(pid, command)| children.contains(pid) && command.contains("swrk"));
    (Some(runc), criu.map(|(pid, _)| pid))
}

/// Kills a worker some time after it began, if it begins before the sender ends.
fn kill_worker(sender: &mut Running, migrate: i32, wants_criu: bool, later: Duration) -> bool {
    let until = Instant::now() + LIMIT;
    while sender.is_running() && Instant::now() < until {
        let (runc, criu) = workers(migrate);
        if let Some(pid) = if wants_criu { criu } else { runc } {
            std::thread::sleep(later);
            // CRIU is asked several times what it can, by another process each.
            let (_, now) = workers(migrate);
            kill(if wants_criu { now.unwrap_or(pid) } else { pid });
            return true;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    false
}

/// One case, from nothing to the verdict.
fn run(seed: u64, fault: Fault) -> Ended {
    let mut random = Random::new(seed);
    let mut within = |limit: Duration| Duration::from_micros(random.below(limit.as_micros() as u64));
    let (at, later) = (within(MOVE), within(WORK));
    let (mut a, mut b) = End::pair(Path::new(PROGRAM));
    match fault {
        Fault::Full(Side::Source) => a.host = a.host.with_small_disk(SMALL_BYTES),
        Fault::Full(Side::Destination) => b.host = b.host.with_small_disk(SMALL_BYTES),
        _ => {}
    }
    let (id, name) = (Yard::name(), Yard::name());
    a.yard.start(&id, Path::new(TENANT), "8 300");
    let mut receives = b.receives(&name);
    receives.retain(|word| word != "--once");
    let (mut receiver, address) = b.host.receive(&End::arguments(&receives, &[]));
    let relay = Relay::start(&address, Weather::default(), seed);
    let (own, through) = (a.yard.arguments(), relay.address());
    let words = ["send", "--container", &id, &through, "--bandwidth", BANDWIDTH];
    let patience = ["--link-timeout", "3s", "--ask-timeout", "2s"];
    let mut sender = a.host.start(&End::arguments(&own, &[&words[..], &patience].concat()));
    sender.wait_for("the rounds", |line| line["phase"] == "rounds");
    let happened = match fault {
        Fault::Runc(side) | Fault::Criu(side) => {
            let migrate = if side == Side::Source { sender.pid() } else { receiver.pid() };
            kill_worker(&mut sender, migrate, matches!(fault, Fault::Criu(_)), later)
        }
        Fault::Full(_) => true,
        _ => {
            std::thread::sleep(at);
            match fault {
                Fault::Sender | Fault::SenderAndKeeper if sender.is_running() => {
                    if fault == Fault::SenderAndKeeper {
                        a.host.kill_keeper(&id);
                    }
                    sender.signal(Signal::KILL);
                }
                Fault::Keeper => {
                    a.host.kill_keeper(&id);
                }
                Fault::Receiver => receiver.signal(Signal::KILL),
                Fault::Cut => relay.cut(Way::Both),
                _ => {}
            }
            true
        }
    };
    let sent = sender.finish();
    if fault == Fault::Cut {
        relay.mend();
    }
    if fault == Fault::Receiver {
        drop(receiver);
        let words = [&["receive", "--listen", &address][..], &End::arguments(&receives, &[])].concat();
        receiver = b.host.start(&words);
        receiver.wait_event("listening");
    }
    let ended = verdict(&a, &b, &id, &name, &sent);
    // Who says that it was moved, or that it was not, is right.
    if !ended.recovered && matches!(sent.code, 0 | 4 | 6 | 7) {
        assert_eq!(ended.at == Side::Destination, sent.code == 0, "{sent:#?}");
    }
    if matches!(fault, Fault::Full(_)) {
        assert!(ended.at == Side::Source && sent.code != 0, "{sent:#?}");
    }
    if !happened {
        assert_eq!(sent.code, 0, "nothing happened to it: {sent:#?}");
    }
    end(&mut receiver);
    receiver.finish();
    // What a killed receiver left is taken for the next of that name.
    if ended.at == Side::Source && fault != Fault::Receiver {
        assert!(!b.yard.bundles().join(&name).exists(), "something is left of what did not arrive");
    }
    ended
}

/// Ends a receiver; one that waits for a sender to know the outcome must be asked twice.
fn end(receiver: &mut Running) {
    let until = Instant::now() + LIMIT;
    while receiver.is_running() {
        assert!(Instant::now() < until, "the receiver does not end when it is interrupted");
        receiver.signal(Signal::INT);
        let asked = Instant::now();
        while receiver.is_running() && asked.elapsed() < Duration::from_secs(4) {
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Waits until it runs on one side and on one alone, and asks or says what became of it where that is not known.
fn verdict(a: &End, b: &End, id: &str, name: &str, sent: &Finished) -> Ended {
    let mut recovered = false;
    let begun = Instant::now();
    loop {
        let (here, there) = (a.yard.status(id), b.yard.status(name));
        let in_doubt = a.host.run(&["recover"]).success().lines;
        match (here.as_deref(), there.as_deref()) {
            (Some("running"), Some("running")) => panic!("it runs TWICE: {sent:#?}"),
            (Some("running"), None) if in_doubt.is_empty() => {
                a.yard.assert_sound(id);
                return Ended { at: Side::Source, recovered };
            }
            (None, Some("running")) => {
                a.yard.assert_sound(id);
                return Ended { at: Side::Destination, recovered };
            }
            _ => {}
        }
        if !in_doubt.is_empty() && a.host.run(&["recover", id]).code == 0 {
            recovered = true;
        } else if !in_doubt.is_empty() && begun.elapsed() > AFTERMATH {
            // The other end does not know either, because whoever knew was killed: an operator looks, and says what is so.
            let what =
                if b.yard.status(name).as_deref() == Some("running") { "--discard" } else { "--resume" };
            a.host.run(&["recover", id, what]).success();
            recovered = true;
        }
        assert!(begun.elapsed() < LIMIT, "it is {here:?} here and {there:?} there: {sent:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn a_container_lives_on_one_side_whatever_fails() {
    if without_root("a_container_lives_on_one_side_whatever_fails") {
        return;
    }
    let first = number("CONTAINER_FAULTS_SEED");
    let count = number("CONTAINER_FAULTS").unwrap_or(if first.is_some() { 1 } else { CASES });
    let first = first.unwrap_or(1);
    for seed in first..first + count {
        // Every fault comes, in turn; a seed has always the same.
        let fault = FAULTS[usize::try_from(seed % FAULTS.len() as u64).expect("an index")];
        let begun = Instant::now();
        println!("CONTAINER_FAULTS_SEED={seed}: {fault:?} …");
        let ended = run(seed, fault);
        println!(
            "CONTAINER_FAULTS_SEED={seed}: {fault:?}: {ended:?} in {:.1} s",
            begun.elapsed().as_secs_f64()
        );
    }
}

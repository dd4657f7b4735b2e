//! What became of the VM: exactly one, and sound.

use super::case::{Case, Expected, Fault, Process, Side};
use super::scene::{Scene, VM};
use crate::guest::Window;
use crate::process::{Finished, STEP_LIMIT};
use crate::{Host, Running};
use rustix::process::Signal;
use std::fmt;
use std::time::{Duration, Instant};

/// Where the VM is in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Survivor {
    Source,
    Destination,
    /// Its own VMM died.
    Nobody,
}

/// How a case ended, as the summary counts it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ended {
    pub survivor: Survivor,
    /// `migrate recover` was needed.
    pub recovered: bool,
    /// The sender found another link, and went on.
    pub resumed: bool,
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let recovered = if self.recovered { ", by recover" } else { "" };
        let resumed = if self.resumed { ", resumed" } else { "" };
        write!(f, "{:?}{recovered}{resumed}", self.survivor)
    }
}

/// Judges a case whose fault is over and whose sender has ended.
///
/// # Panics
/// If there are two VMs, or none that could have been avoided, or one that is not sound.
pub(super) fn judge(case: &Case, scene: Scene<'_>) -> Ended {
    let Scene { a, b, sender, mut receiver, address, source, .. } = scene;
    let sent = sender.finish();
    check_words(case, "the sender", &sent);
    let resumed = resumed(case, &sent);
    let at_source = wait_settled(&a, &["running", "pledged"]);
    let recovered = at_source.as_deref() == Some("pledged");
    if recovered {
        receiver = recover(case, &a, &b, receiver, &address);
    }
    // A receiver that still waits, or that misses a sender which is gone, ends now.
    if recovered || case.fault != Fault::Interrupt(Side::Receive) {
        end(&mut receiver);
    }
    let received = receiver.finish();
    check_words(case, "the receiver", &received);
    // A source that cannot be settled because what ran at the destination died stays as it is, for the operator.
    let at_source =
        wait_settled(&a, if case.ran_at_destination() { &["running", "pledged"] } else { &["running"] });
    let at_source = at_source.filter(|phase| phase == "running");
    let at_destination = wait_settled(&b, &["running"]);
    let survivor = match (at_source.is_some(), at_destination.is_some()) {
        (true, true) => panic!("TWO VMs run\n{sent:#?}\n{received:#?}"),
        (true, false) => Survivor::Source,
        (false, true) => Survivor::Destination,
        (false, false) => Survivor::Nobody,
    };
    let expected = case.expected();
    let right = match expected {
        Expected::OnlyOne => survivor != Survivor::Nobody,
        Expected::Source => survivor == Survivor::Source,
        Expected::Destination => survivor == Survivor::Destination,
        Expected::DestinationOrNone => survivor != Survivor::Source,
        Expected::SourceOrNone => survivor != Survivor::Destination,
    };
    assert!(
        right,
        "the VM is at {survivor:?}, expected {expected:?}\n{sent:#?}\n{received:#?}\nsource: {}\ndestination: {}",
        a.log(VM),
        b.log(VM)
    );
    if !recovered && matches!(sent.code, 0 | 4 | 6 | 7 | 8 | 9 | 130) {
        let moved = survivor == Survivor::Destination;
        let died = matches!(case.fault, Fault::Kill(Process::SourceVmm | Process::DestinationVmm));
        assert!(died || moved == (sent.code == 0), "the sender says {sent:#?}, the VM is at {survivor:?}");
    }
    match survivor {
        Survivor::Source => {
            a.assert_sound(VM);
            if case.seed.is_multiple_of(4) {
                next_attempt_is_correct(&a, &b);
            }
        }
        Survivor::Destination => {
            b.assert_sound(VM);
            never_two(&source, &b);
        }
        Survivor::Nobody => {}
    }
    Ended { survivor, recovered, resumed }
}

/// Whether the sender went on over another link. What it said while it ran and its report must agree, and what heals in time it
/// must have borne, without anybody's help.
fn resumed(case: &Case, sent: &Finished) -> bool {
    let resumed = sent.lines.iter().filter(|line| line["event"] == "resumed").count() as u64;
    if let Some(report) = sent.event("report") {
        assert_eq!(report["resumes"].as_u64(), Some(resumed), "{sent:#?}");
    }
    assert!(resumed == 0 || case.retries(), "nobody asked it to look for another link: {sent:#?}");
    if case.is_taken_up() {
        assert_eq!(sent.code, 0, "it did not get over what was over in time: {sent:#?}");
        let lost = sent.event("link-lost").is_some();
        assert!(!lost || resumed > 0, "{sent:#?}");
        // A stream that was cut is a link that was lost, on however slow a machine.
        assert!(resumed > 0 || case.reset().is_none(), "no stream was cut: {sent:#?}");
    }
    if case.fault == Fault::Damage {
        let found = format!("{sent:?}").contains("memory differs");
        assert!(sent.code == 7 && found, "the damage was not what ended it: {sent:#?}");
    }
    resumed > 0
}

/// What a program said and how it ended: by one of its documented exit codes, or by the signal that the case sent it. A
/// process that gets no memory is ended by its allocator.
fn check_words(case: &Case, who: &str, finished: &Finished) {
    let killed = match finished.code {
        -9 => matches!(case.fault, Fault::Kill(_) | Fault::Starve(_)),
        -6 => matches!(case.fault, Fault::MemoryShort(_)),
        // A second interrupt ends a program at once; only a receiver that still waits is asked twice.
        -2 => who == "the receiver" || matches!(case.fault, Fault::Interrupt(_)),
        _ => false,
    };
    let documented = matches!(finished.code, 0 | 2..=10 | 130);
    assert!(documented || killed, "{who} ended with {}: {finished:#?}", finished.code);
    // Where there is no memory for a new thread's signal stack, the standard library ends the program in its own words.
    let out_of_memory = killed && finished.code == -6;
    assert!(out_of_memory || !finished.stderr.contains("panicked"), "{who} panicked: {finished:#?}");
}

/// Waits until the VM of this host is in one of these phases, or gone: all others are on the way to somewhere.
fn wait_settled(host: &Host, lasting: &[&str]) -> Option<String> {
    let until = Instant::now() + STEP_LIMIT;
    loop {
        let phase = host.phase(VM);
        if phase.as_deref().is_none_or(|phase| lasting.contains(&phase)) {
            return phase;
        }
        assert!(Instant::now() < until, "the VM stays {phase:?}\n{}", host.log(VM));
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Settles a pledged source as an operator would: asks the receiver, then one started anew; and where nobody knows, looks.
fn recover(case: &Case, a: &Host, b: &Host, receiver: Running, address: &str) -> Running {
    let mut receiver = receiver;
    let mut asked = None;
    if receiver.is_running() {
        asked = Some(a.run(&["recover", VM, "--at", address]));
        if asked.as_ref().is_some_and(|asked| asked.code == 0) {
            return receiver;
        }
        end(&mut receiver);
    }
    let (mut anew, address) = b.receive(&["--link-timeout", "2s", "--ask-timeout", "2s"]);
    let again = a.run(&["recover", VM, "--at", &address]);
    if again.code == 0 {
        return anew;
    }
    assert_eq!(again.code, 10, "{again:#?}\nbefore: {asked:#?}");
    // Nobody may start it any more while the operator looks.
    end(&mut anew);
    let there = wait_settled(b, &["running"]);
    if there.is_none() && case.ran_at_destination() {
        // It ran there and died: the source is no VM any more, and its memory is of the past.
        return anew;
    }
    let vms = b.vms();
    assert!(vms.iter().all(|vm| vm.get("awaiting_pages").is_none()), "it misses pages: {vms:#?}\n{again:#?}");
    a.run(&["recover", VM, if there.is_some() { "--discard" } else { "--resume" }]).success();
    anew
}

/// Interrupts a receiver and waits for its end. One that serves a VM with its last pages wants to be asked twice.
fn end(receiver: &mut Running) {
    let begun = Instant::now();
    let mut asked = None;
    while receiver.is_running() {
        assert!(begun.elapsed() < STEP_LIMIT, "the receiver does not end when it is interrupted");
        if asked.is_none_or(|asked: Instant| asked.elapsed() > Duration::from_secs(4)) {
            receiver.signal(Signal::INT);
            asked = Some(Instant::now());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The source's last tick is a tick of the guest at the destination, too, or else both ran. On one host they share the
/// TSC, so a gap at the destination that has the source's last tick *inside* it proves two: the source went on after
/// the freeze.
fn never_two(source: &Window, destination: &Host) {
    let Some(last) = source.stats().map(|stats| stats.tsc_last) else { return };
    let Some(there) = destination.find_vm_pid(VM).and_then(Window::open).and_then(|window| window.stats())
    else {
        return;
    };
    for gap in &there.gaps {
        let begun = gap.tsc_end - gap.cycles;
        assert!(
            !(begun < last && last < gap.tsc_end),
            "the source ticked at {last}, while the VM that went on stood still from {begun} to {}",
            gap.tsc_end
        );
    }
}

/// The next attempt, with fresh processes, moves the VM, and it is sound at the other end.
fn next_attempt_is_correct(a: &Host, b: &Host) {
    let (receiver, address) = b.receive(&[]);
    // Whatever downtime it takes on a loaded machine.
    let limits = ["--downtime", "1s", "--max-downtime", "1s", "--max-rounds", "5", "--on-timeout", "force"];
    a.run(&[&["send", VM, &address][..], &limits].concat()).success();
    receiver.finish().success();
    assert_eq!(wait_settled(a, &["running"]), None, "the source is still there");
    b.assert_sound(VM);
}

//! All cases: every fault at every moment where it makes sense, then random ones.

use super::case::{Case, Fault, Mode, Moment, Process, Side, Stream};
use crate::random::Random;
use crate::relay::{Way, Weather};

/// The sender's phases, in order. The last one is behind the destination's word that it started.
const SENDING: &[&str] = &[
    "greet", "offer", "track", "rounds", "round-1", "freeze", "state", "ready", "pledge", "commit", "settle",
];

/// The receiver's phases up to its decision. Greeting is its front desk's work, and no phase of a migration.
const RECEIVING: &[&str] = &["offer", "rounds", "state", "ready", "commit"];

/// The phases of a move by post-copy in which it differs. Behind `commit` the VM runs at the destination and misses pages.
const SENDING_POST_COPY: &[&str] = &["freeze", "state", "ready", "commit", "post-copy"];

/// The receiver's.
const RECEIVING_POST_COPY: &[&str] = &["state", "commit", "post-copy"];

/// Time without a link that both ends bear with, and that neither does: they wait for [`LINK_TIMEOUT_MS`].
const SHORT_MS: u64 = 120;
const LONG_MS: u64 = 1500;

const PROCESSES: &[Process] =
    &[Process::Sender, Process::Receiver, Process::SourceVmm, Process::DestinationVmm];

/// All cases of a seed: the whole table, then random ones until there are `count`.
pub fn cases(seed: u64, count: usize) -> Vec<Case> {
    let named = |mode| move |(moment, fault)| named(seed, mode, moment, fault);
    let mut all: Vec<_> = table().into_iter().map(named(Mode::PreCopy)).collect();
    all.extend(table_of_post_copy().into_iter().map(named(Mode::PostCopy)));
    all.extend(table_of_resume().into_iter().map(named(Mode::Resume)));
    all.extend(table_of_verify().into_iter().map(named(Mode::Verify)));
    let mut number = 0;
    while all.len() < count {
        number += 1;
        all.push(random(seed, number));
    }
    all
}

/// Every fault at every moment where it makes sense.
fn table() -> Vec<(Moment, Fault)> {
    let mut all = Vec::new();
    let sending = SENDING.iter().map(|phase| (Side::Send, *phase));
    let receiving = RECEIVING.iter().map(|phase| (Side::Receive, *phase));
    for (side, phase) in sending.chain(receiving) {
        let moment = Moment::Entering(side, phase);
        let mut at = |fault| all.push((moment, fault));
        for process in PROCESSES {
            if *process == Process::DestinationVmm && !has_destination(side, phase) {
                continue;
            }
            at(Fault::Kill(*process));
        }
        for way in [Way::Down, Way::Up, Way::Both] {
            at(Fault::Blackhole(way, None));
        }
        at(Fault::Blackhole(Way::Both, Some(LONG_MS)));
        if side == Side::Send {
            at(Fault::Blackhole(Way::Both, Some(SHORT_MS)));
            at(Fault::Stall(SHORT_MS));
            at(Fault::Stall(LONG_MS));
            at(Fault::Unplug(Some(SHORT_MS)));
            at(Fault::Unplug(None));
            at(Fault::Interrupt(Side::Send));
            at(Fault::Interrupt(Side::Receive));
            at(Fault::Slow(20_000_000, 400));
            at(Fault::Stop(Process::Sender, LONG_MS));
            at(Fault::Stop(Process::Receiver, LONG_MS));
            at(Fault::Stop(Process::Receiver, SHORT_MS));
            at(Fault::Stop(Process::SourceVmm, LONG_MS));
            at(Fault::MemoryShort(Process::Sender));
            at(Fault::FilesShort(Process::Sender));
        }
        if has_destination(side, phase) {
            at(Fault::Stop(Process::DestinationVmm, LONG_MS));
        }
        if side == Side::Receive {
            at(Fault::MemoryShort(Process::Receiver));
            at(Fault::FilesShort(Process::Receiver));
            at(Fault::DiskFull(Side::Receive));
        } else if phase != "round-1" {
            at(Fault::DiskFull(Side::Send));
        }
    }
    all.push((Moment::Before, Fault::TooLarge));
    all.extend([4, 8].map(|mib| (Moment::Before, Fault::Starve(mib))));
    all.extend(resets(&[Stream::Page(0), Stream::Page(1)], &[1, 2_000_000]));
    all.extend(resets(&[Stream::Control], &[0, 1, 100, 400, 2_000]));
    all.push((Moment::Before, Fault::DiskFull(Side::Receive)));
    all.push((Moment::Before, Fault::DiskFull(Side::Send)));
    all.push((Moment::Before, Fault::Slow(400_000_000, 60_000)));
    for weather in weathers() {
        all.push((Moment::Before, Fault::Weather(weather)));
    }
    all
}

/// The same for a move by post-copy: what is cut is made again, and what dies is taken up by `migrate recover`.
fn table_of_post_copy() -> Vec<(Moment, Fault)> {
    let mut all = Vec::new();
    let sending = SENDING_POST_COPY.iter().map(|phase| (Side::Send, *phase));
    let receiving = RECEIVING_POST_COPY.iter().map(|phase| (Side::Receive, *phase));
    for (side, phase) in sending.chain(receiving) {
        let moment = Moment::Entering(side, phase);
        let mut at = |fault| all.push((moment, fault));
        for process in PROCESSES {
            at(Fault::Kill(*process));
            at(Fault::Stop(*process, LONG_MS));
        }
        for way in [Way::Down, Way::Up, Way::Both] {
            at(Fault::Blackhole(way, None));
        }
        at(Fault::Blackhole(Way::Both, Some(LONG_MS)));
        at(Fault::Stall(LONG_MS));
        at(Fault::Slow(20_000_000, 400));
        at(Fault::Interrupt(side));
        let engine = if side == Side::Send { Process::Sender } else { Process::Receiver };
        at(Fault::MemoryShort(engine));
        at(Fault::FilesShort(engine));
    }
    for us in [1_000, 5_000, 20_000, 60_000] {
        let moment = Moment::Into("post-copy", us);
        for fault in [
            Fault::Kill(Process::Sender),
            Fault::Kill(Process::Receiver),
            Fault::Blackhole(Way::Both, None),
            Fault::Blackhole(Way::Both, Some(LONG_MS)),
            Fault::Unplug(Some(LONG_MS)),
        ] {
            all.push((moment, fault));
        }
    }
    for weather in weathers() {
        all.push((Moment::Before, Fault::Weather(weather)));
    }
    all.extend(resets(
        &[Stream::Page(0), Stream::Page(1), Stream::Page(2)],
        &[100_000, 5_000_000, 12_000_000],
    ));
    all.extend(resets(&[Stream::Control], &[400, 20_000]));
    all
}

/// A link that is lost and looked for again: it comes back in time or it does not, and somebody fails meanwhile.
fn table_of_resume() -> Vec<(Moment, Fault)> {
    let mut all = Vec::new();
    let sending =
        ["rounds", "round-1", "freeze", "state", "ready", "commit"].map(|phase| (Side::Send, phase));
    let receiving = ["rounds", "state"].map(|phase| (Side::Receive, phase));
    for (side, phase) in sending.into_iter().chain(receiving) {
        let moment = Moment::Entering(side, phase);
        for way in [Way::Down, Way::Up, Way::Both] {
            all.push((moment, Fault::Blackhole(way, Some(LONG_MS))));
        }
        if side == Side::Send {
            all.push((moment, Fault::Unplug(Some(LONG_MS))));
            all.push((moment, Fault::Blackhole(Way::Both, None)));
        }
    }
    // A stream was cut before: see `Case::reset`.
    let moment = Moment::Entering(Side::Send, "resume");
    let mut at = |fault| all.push((moment, fault));
    for process in PROCESSES {
        at(Fault::Kill(*process));
        at(Fault::Stop(*process, LONG_MS));
    }
    at(Fault::Interrupt(Side::Send));
    at(Fault::Interrupt(Side::Receive));
    at(Fault::Blackhole(Way::Both, Some(LONG_MS)));
    at(Fault::Blackhole(Way::Both, None));
    for process in [Process::Sender, Process::Receiver] {
        at(Fault::MemoryShort(process));
        at(Fault::FilesShort(process));
    }
    all.extend(resets(&[Stream::Page(0), Stream::Page(1)], &[1, 100_000, 5_000_000]));
    all.extend(resets(&[Stream::Control], &[100, 400, 2_000]));
    all
}

/// Memory is compared: whatever fails meanwhile, and memory itself.
fn table_of_verify() -> Vec<(Moment, Fault)> {
    let mut all = Vec::new();
    for side in [Side::Send, Side::Receive] {
        let moment = Moment::Entering(side, "verify");
        let mut at = |fault| all.push((moment, fault));
        at(Fault::Damage);
        for process in PROCESSES {
            at(Fault::Kill(*process));
            at(Fault::Stop(*process, LONG_MS));
        }
        at(Fault::Blackhole(Way::Both, None));
        at(Fault::Blackhole(Way::Both, Some(LONG_MS)));
        at(Fault::Unplug(Some(LONG_MS)));
        at(Fault::Interrupt(Side::Send));
        at(Fault::Interrupt(Side::Receive));
        let engine = if side == Side::Send { Process::Sender } else { Process::Receiver };
        at(Fault::MemoryShort(engine));
        at(Fault::FilesShort(engine));
    }
    all.push((Moment::Entering(Side::Send, "state"), Fault::Kill(Process::Receiver)));
    all.push((Moment::Before, Fault::Weather(Weather::default())));
    all.push((Moment::Before, Fault::Weather(Weather { lose_one_in: 50, ..Weather::default() })));
    all
}

/// Each of these streams cut by either end behind each of these numbers of bytes.
fn resets<'a>(streams: &'a [Stream], bytes: &'a [u64]) -> impl Iterator<Item = (Moment, Fault)> + 'a {
    let both = [Side::Send, Side::Receive].into_iter();
    both.flat_map(move |side| {
        streams.iter().flat_map(move |stream| {
            bytes.iter().map(move |bytes| (Moment::Before, Fault::Reset(side, *stream, *bytes)))
        })
    })
}

/// Weather that a migration gets through.
fn weathers() -> Vec<Weather> {
    let fair = Weather::default();
    vec![
        fair,
        Weather { lose_one_in: 200, ..fair },
        Weather { lose_one_in: 50, ..fair },
        Weather { delay_us: 5_000, ..fair },
        Weather { delay_us: 20_000, ..fair },
        Weather { jitter_us: 2_000, ..fair },
        Weather { delay_us: 2_000, jitter_us: 2_000, double_one_in: 100, lose_one_in: 400, ..fair },
        Weather { double_one_in: 20, ..fair },
        Weather { double_one_in: 1, ..fair },
        Weather { bytes_per_s: 30_000_000, ..fair },
        Weather { bytes_per_s: 30_000_000, lose_one_in: 500, delay_us: 1_000, ..fair },
    ]
}

/// Whether there is a VMM at the destination when an end enters this phase.
fn has_destination(side: Side, phase: &str) -> bool {
    match side {
        Side::Send => !matches!(phase, "greet" | "offer"),
        Side::Receive => phase != "offer",
    }
}

fn random(seed: u64, number: u64) -> Case {
    let mut random = Random::new(seed ^ (number << 20));
    let mut dice = random.clone();
    dice.bits();
    let mode = dice.pick(&[Mode::PreCopy, Mode::PostCopy, Mode::Resume, Mode::Verify]);
    let (sending, receiving) = match mode {
        Mode::PreCopy | Mode::Resume | Mode::Verify => (SENDING, RECEIVING),
        Mode::PostCopy => (SENDING_POST_COPY, RECEIVING_POST_COPY),
    };
    let moment = match dice.below(4) {
        0 => Moment::Entering(Side::Send, dice.pick(sending)),
        1 => Moment::Entering(Side::Receive, dice.pick(receiving)),
        _ => Moment::Into(dice.pick(sending), dice.below(30_000)),
    };
    let process = dice.pick(PROCESSES);
    let side = dice.pick(&[Side::Send, Side::Receive]);
    let lasting = dice.pick(&[None, Some(SHORT_MS), Some(LONG_MS)]);
    let ms = dice.below(LONG_MS);
    let fault = match dice.below(12) {
        0..=2 => Fault::Kill(process),
        3 => Fault::Stop(process, ms),
        4 => Fault::Interrupt(side),
        5 | 6 => Fault::Blackhole(dice.pick(&[Way::Down, Way::Up, Way::Both]), lasting),
        7 => Fault::Unplug(lasting),
        8 => Fault::Stall(ms),
        9 => Fault::Weather(Weather {
            cut_after_bytes: dice.below(30 << 20),
            lose_one_in: dice.pick(&[0, 100, 300]),
            jitter_us: dice.pick(&[0, 1_000]),
            ..Weather::default()
        }),
        10 => Fault::MemoryShort(dice.pick(&[Process::Sender, Process::Receiver])),
        _ => Fault::FilesShort(dice.pick(&[Process::Sender, Process::Receiver])),
    };
    Case { name: format!("random-{number}"), seed: random.bits(), mode, moment, fault }
}

fn named(seed: u64, mode: Mode, moment: Moment, fault: Fault) -> Case {
    let mode_name = match mode {
        Mode::PreCopy => "",
        Mode::PostCopy => "post-copy/",
        Mode::Resume => "resume/",
        Mode::Verify => "verify/",
    };
    let mut name = format!("{mode_name}{fault}@{moment}");
    name.retain(|letter| letter != ' ');
    // The seed of a case depends on its name only, so that a new row does not change the others.
    let own = name.bytes().fold(seed, |hash, byte| Random::new(hash ^ u64::from(byte)).bits());
    Case { name, seed: own, mode, moment, fault }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn a_seed_gives_the_same_cases_again_and_each_has_its_own_name() {
        let all = cases(7, 1000);
        assert_eq!(all, cases(7, 1000));
        assert_ne!(all, cases(8, 1000));
        let names: BTreeSet<_> = all.iter().map(|case| &case.name).collect();
        assert_eq!(names.len(), 1000);
    }

    #[test]
    fn the_table_has_at_least_300_cases_with_every_process_killed_in_every_phase() {
        let all = cases(1, 0);
        assert!(all.len() >= 300, "{}", all.len());
        for phase in SENDING {
            for process in PROCESSES {
                let name = format!("kill-{process:?}@send:{phase}");
                let there = has_destination(Side::Send, phase) || *process != Process::DestinationVmm;
                assert_eq!(all.iter().any(|case| case.name == name), there, "{name}");
            }
        }
    }
}

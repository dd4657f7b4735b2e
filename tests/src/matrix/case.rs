//! What can go wrong, when, and what must come of it.

use crate::random::Random;
use crate::relay::{Way, Weather};
use std::fmt;

/// An end of a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// `migrate send`
    Send,
    /// `migrate receive`
    Receive,
}

/// A process that takes part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Process {
    /// `migrate send`
    Sender,
    /// `migrate receive`
    Receiver,
    /// The VMM that the guest leaves.
    SourceVmm,
    /// The VMM that it comes to.
    DestinationVmm,
}

/// When it happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Before the sender starts.
    Before,
    /// Exactly when this end enters this phase: it stops itself there until the fault is in place.
    Entering(Side, &'static str),
    /// About this many microseconds after the sender said that it enters this phase.
    Into(&'static str, u64),
}

/// For how long, in milliseconds; `None` is until the sender gave up.
pub(super) type Lasting = Option<u64>;

/// What goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// A process is killed.
    Kill(Process),
    /// A process is stopped for so many milliseconds.
    Stop(Process, u64),
    /// The operator interrupts an end.
    Interrupt(Side),
    /// Packets vanish.
    Blackhole(Way, Lasting),
    /// The cable is pulled at the sender, which sees an error.
    Unplug(Lasting),
    /// Packets are held, and all delivered afterwards.
    Stall(u64),
    /// The link carries only so many bits a second, for so many milliseconds.
    Slow(u64, u64),
    /// The weather changes, and stays.
    Weather(Weather),
    /// The disk under the runtime directory of this end is full.
    DiskFull(Side),
    /// A process gets no more memory.
    MemoryShort(Process),
    /// A process gets no more file descriptors.
    FilesShort(Process),
    /// The receiver allows less memory than the VM has.
    TooLarge,
}

/// Where the VM is allowed to be in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// At one of the two.
    OnlyOne,
    /// At the source.
    Source,
    /// At the destination.
    Destination,
    /// Nowhere, or at the destination: its own VMM died.
    DestinationOrNone,
    /// Nowhere, or at the source: the VMM that may have been it died.
    SourceOrNone,
}

/// One case.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// Its name, by which it can be run alone.
    pub name: String,
    /// Guest and weather derive from it.
    pub seed: u64,
    /// How the VM moves.
    pub mode: Mode,
    /// When.
    pub moment: Moment,
    /// What.
    pub fault: Fault,
}

/// How the VM moves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// All of its memory comes first.
    PreCopy,
    /// It starts at the destination behind one round, and the rest follows.
    PostCopy,
}

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

/// `--link-timeout` of both ends where a fault is meant to be noticed.
pub(super) const LINK_TIMEOUT_MS: u64 = 700;

const PROCESSES: &[Process] =
    &[Process::Sender, Process::Receiver, Process::SourceVmm, Process::DestinationVmm];

/// All cases of a seed: the whole table, then random ones until there are `count`.
pub fn cases(seed: u64, count: usize) -> Vec<Case> {
    let named = |mode| move |(moment, fault)| named(seed, mode, moment, fault);
    let mut all: Vec<_> = table().into_iter().map(named(Mode::PreCopy)).collect();
    all.extend(table_of_post_copy().into_iter().map(named(Mode::PostCopy)));
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
    all
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
    let mode = dice.pick(&[Mode::PreCopy, Mode::PreCopy, Mode::PostCopy]);
    let (sending, receiving) = match mode {
        Mode::PreCopy => (SENDING, RECEIVING),
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
    let mode_name = if mode == Mode::PostCopy { "post-copy/" } else { "" };
    let mut name = format!("{mode_name}{fault}@{moment}");
    name.retain(|letter| letter != ' ');
    // The seed of a case depends on its name only, so that a new row does not change the others.
    let own = name.bytes().fold(seed, |hash, byte| Random::new(hash ^ u64::from(byte)).bits());
    Case { name, seed: own, mode, moment, fault }
}

impl Case {
    /// Where the VM has to be in the end. Before `Commit` is sent, what kills the attempt leaves it at the source; once
    /// the destination said that it started, it is there.
    pub fn expected(&self) -> Expected {
        let (before_commit, settled) = match self.moment {
            // A destination that is gone when Ready is in the sender's hands already leaves a doubt.
            Moment::Entering(Side::Send, "commit" | "pledge" | "ready") => (false, false),
            Moment::Entering(Side::Send, "settle") => (false, true),
            Moment::Entering(_, "post-copy") | Moment::Into("post-copy", _) => {
                return self.expected_in_post_copy();
            }
            Moment::Entering(Side::Send, _) => (true, false),
            Moment::Entering(Side::Receive, phase) => (!matches!(phase, "ready" | "commit"), false),
            Moment::Before | Moment::Into(..) => (false, false),
        };
        match self.fault {
            Fault::Kill(Process::SourceVmm) | Fault::MemoryShort(Process::SourceVmm) => {
                if settled {
                    Expected::Destination
                } else {
                    Expected::DestinationOrNone
                }
            }
            Fault::Kill(Process::DestinationVmm) | Fault::MemoryShort(Process::DestinationVmm) => {
                if before_commit {
                    Expected::Source
                } else {
                    Expected::SourceOrNone
                }
            }
            _ if settled => Expected::Destination,
            Fault::Kill(_) | Fault::Blackhole(_, None) | Fault::Interrupt(Side::Send) if before_commit => {
                Expected::Source
            }
            Fault::TooLarge => Expected::Source,
            Fault::Weather(weather) if weather.cut_after_bytes == 0 && self.moment == Moment::Before => {
                Expected::Destination
            }
            _ => Expected::OnlyOne,
        }
    }

    /// Whether the VM ran at the destination before its VMM there was killed.
    pub(super) fn ran_at_destination(&self) -> bool {
        let later = match self.moment {
            Moment::Entering(_, phase) | Moment::Into(phase, _) => {
                matches!(phase, "commit" | "post-copy" | "settle")
            }
            Moment::Before => false,
        };
        later && matches!(self.fault, Fault::Kill(Process::DestinationVmm))
    }

    /// The VM runs at the destination and needs both hosts: whichever of the VMMs dies takes it along, and nothing else does.
    fn expected_in_post_copy(&self) -> Expected {
        match self.fault {
            Fault::Kill(Process::SourceVmm | Process::DestinationVmm)
            | Fault::MemoryShort(Process::SourceVmm | Process::DestinationVmm) => Expected::DestinationOrNone,
            _ => Expected::Destination,
        }
    }

    /// `--link-timeout` of both ends. Weather is to be borne, not noticed.
    pub(super) fn link_timeout_ms(&self) -> u64 {
        match self.fault {
            Fault::Weather(weather) if weather.cut_after_bytes == 0 => 10_000,
            Fault::Slow(..) => 10_000,
            _ => LINK_TIMEOUT_MS,
        }
    }
}

impl fmt::Display for Moment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Before => write!(f, "start"),
            Self::Entering(Side::Send, phase) => write!(f, "send:{phase}"),
            Self::Entering(Side::Receive, phase) => write!(f, "receive:{phase}"),
            Self::Into(phase, us) => write!(f, "send:{phase}+{us}us"),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lasting = |lasting: &Lasting| lasting.map_or_else(|| "ever".to_owned(), |ms| format!("{ms}ms"));
        match self {
            Self::Kill(process) => write!(f, "kill-{process:?}"),
            Self::Stop(process, ms) => write!(f, "stop-{process:?}-{ms}ms"),
            Self::Interrupt(side) => write!(f, "interrupt-{side:?}"),
            Self::Blackhole(way, long) => write!(f, "blackhole-{way:?}-{}", lasting(long)),
            Self::Unplug(long) => write!(f, "unplug-{}", lasting(long)),
            Self::Stall(ms) => write!(f, "stall-{ms}ms"),
            Self::Slow(rate, ms) => write!(f, "slow-{}Mbit-{ms}ms", rate / 1_000_000),
            Self::Weather(weather) => {
                let Weather { lose_one_in, double_one_in, delay_us, jitter_us, bytes_per_s, cut_after_bytes } =
                    weather;
                write!(
                    f,
                    "weather-lose{lose_one_in}-double{double_one_in}-delay{delay_us}us-jitter{jitter_us}us-rate{}MBs-cut{cut_after_bytes}",
                    bytes_per_s / 1_000_000
                )
            }
            Self::DiskFull(side) => write!(f, "disk-full-{side:?}"),
            Self::MemoryShort(process) => write!(f, "memory-short-{process:?}"),
            Self::FilesShort(process) => write!(f, "files-short-{process:?}"),
            Self::TooLarge => write!(f, "too-large"),
        }
    }
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

//! What can go wrong, when, and what must come of it.

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
    /// The receiver and its VMM may use no more than so many MiB, and the kernel kills one that does.
    Starve(u64),
    /// An end cuts a stream behind so many bytes, and the link lives on.
    Reset(Side, Stream, u64),
    /// A byte of the destination's memory changes.
    Damage,
}

/// A stream of a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stream {
    /// The one for messages.
    Control,
    /// The pages' streams, counted from 0.
    Page(u32),
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
    /// As pre-copy, and a link that is lost is looked for again.
    Resume,
    /// As that, and all memory is compared before it starts.
    Verify,
}

/// `--link-timeout` of both ends where a fault is meant to be noticed.
const LINK_TIMEOUT_MS: u64 = 700;

/// Fewer bytes than the first round has on any page stream, however well they pack.
const FIRST_ROUND_BYTES: u64 = 1000;

impl Case {
    /// Where the VM has to be in the end. Before `Commit` is sent, what kills the attempt leaves it at the source; once
    /// the destination said that it started, it is there.
    pub fn expected(&self) -> Expected {
        if self.is_taken_up() {
            return Expected::Destination;
        }
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
            Fault::TooLarge | Fault::Damage | Fault::Starve(_) => Expected::Source,
            Fault::Weather(weather) if weather.cut_after_bytes == 0 && self.moment == Moment::Before => {
                Expected::Destination
            }
            _ => Expected::OnlyOne,
        }
    }

    /// Whether a link that is lost is looked for again.
    pub(super) fn retries(&self) -> bool {
        matches!(self.mode, Mode::Resume | Mode::Verify)
    }

    /// Whether both ends live through it, and the link with them.
    pub(super) fn heals(&self) -> bool {
        match self.fault {
            Fault::Blackhole(_, lasting) | Fault::Unplug(lasting) => lasting.is_some(),
            Fault::Stop(process, _) => matches!(process, Process::Sender | Process::Receiver),
            Fault::Stall(_) | Fault::Slow(..) | Fault::Reset(..) => true,
            Fault::Weather(weather) => weather.cut_after_bytes == 0,
            _ => false,
        }
    }

    /// Whether the migration has to go on by itself over another link: whatever arrived, until the sender has heard `Ready`. Once it may
    /// have, it may have committed, and then it asks.
    pub(super) fn is_taken_up(&self) -> bool {
        let in_time = match self.moment {
            Moment::Entering(Side::Send, phase) => {
                matches!(phase, "rounds" | "round-1" | "freeze" | "verify" | "state" | "resume")
            }
            // Once it has loaded the state its Ready may get through, and be answered by a Commit.
            Moment::Entering(Side::Receive, phase) => matches!(phase, "rounds" | "verify"),
            // The first bytes of pages are of the first round.
            Moment::Before => {
                matches!(self.fault, Fault::Reset(_, Stream::Page(_), bytes) if bytes <= FIRST_ROUND_BYTES)
            }
            Moment::Into(..) => false,
        };
        self.retries() && self.heals() && in_time
    }

    /// Whether a stream is cut, so that the link is looked for again: which, by whom, and behind how many bytes.
    pub(super) fn reset(&self) -> Option<(Side, Stream, u64)> {
        match (self.fault, self.moment) {
            (Fault::Reset(side, stream, bytes), _) => Some((side, stream, bytes)),
            (_, Moment::Entering(Side::Send, "resume")) => Some((Side::Send, Stream::Page(0), 1)),
            _ => None,
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

impl fmt::Display for Stream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Control => write!(f, "control"),
            Self::Page(number) => write!(f, "page-{number}"),
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
            Self::Starve(mib) => write!(f, "starve-{mib}MiB"),
            Self::Reset(side, stream, bytes) => write!(f, "reset-{side:?}-{stream}-{bytes}"),
            Self::Damage => write!(f, "damage"),
        }
    }
}

//! The conversation on the control stream: offer, rounds, state, commit.
//!
//! ```text
//! sender                              receiver
//! Hello ──────────────────────────────▶
//!       ◀────────────────────────────── Hello
//! Offer + machine blob ───────────────▶  checks everything, makes the memory
//!       ◀────────────────────────────── Accept            (or Refuse)
//! … page streams: round 0 … ══════════▶
//! RoundSent 0 ────────────────────────▶  waits for round 0 on every page stream
//!       ◀────────────────────────────── RoundDone 0        (all of it is in memory)
//! … page streams: round n, frozen … ══▶
//! State + blob ───────────────────────▶  waits for round n, loads, checks
//!       ◀────────────────────────────── Ready             (or Failed)
//! Commit ─────────────────────────────▶  starts
//!       ◀────────────────────────────── Started           (or Failed: it will never start)
//! Done ───────────────────────────────▶  may forget
//! ```
//!
//! Every wait of either end is for one message on this stream: the sender announces what it has sent, the
//! receiver answers when it is there. The last round is announced by `State`, and `Ready` is its answer. Behind
//! its last round the sender ends its page streams; the state is loaded only once all of them have ended.
//!
//! With the capability `post-copy` a sender may leave its last pages out: it names them in `Missing`, right before
//! `State`. The receiver forgets what it has of them, starts all the same, and then:
//!
//! ```text
//! … two new page streams: pages that were asked for ══▶, all others ══▶
//!       ◀────────────────────────────── Want              a vCPU waits for this page
//!       ◀────────────────────────────── Complete          (nothing is missing any more)
//! Done ───────────────────────────────▶  may forget
//! ```
//!
//! With the capability `seed` an offer may name a checkpoint that both ends can read. A receiver that has put its pages in memory, all
//! others being zeros, answers `Seeded` instead of `Accept`; the first round then needs no page that is as the checkpoint has it. One
//! that cannot answers `Accept`, and everything is sent.
//!
//! Instead of `Offer`, a sender that lost its link behind `Commit` says `Ask` on a new connection and is told the
//! `Outcome`, or `Incomplete`: then it may say `Recover`, is told in `Missing` what is still to be sent, and goes on
//! from there. One that lost it in the rounds says `Resume` and is told in `Resumed` what arrived; one that opens a
//! further connection says `Join`. The first message behind `Hello` tells what a connection is about. Either end may
//! say why it gives up: `Cancel` downstream, `Failed` upstream.

use crate::MigrationId;
use crate::checkpoint::manifest::HexDigest;
use crate::checkpoint::name::CheckpointId;
use crate::error::{ProtocolError, Result};
use crate::frame::MAX_PAGE_STREAMS;
use crate::layout::Layout;
use serde::{Deserialize, Serialize};

/// The most bytes of state or machine description in one message: 64 MiB, enough for thousands of vCPUs.
pub const MAX_BLOB_BYTES: u32 = 64 << 20;

/// The longest name of a workload in bytes.
pub const MAX_NAME_BYTES: usize = 64;

/// The most bytes with which a path is measured: 1.5 s of a link of 25 Gbit/s.
pub const MAX_PROBE_BYTES: u64 = 4 << 30;

/// The most connections of one migration.
pub const MAX_CONNECTIONS: u16 = 8;

/// The most stripes in one [`Verify`](Downstream::Verify): 256 MiB of memory, so that no single step of it takes long.
pub const MAX_VERIFY_STRIPES: usize = 128;

/// Bytes of a digest in [`Verify`](Downstream::Verify): BLAKE3 of the stripe's pages, or zeros where all of them are zero.
pub const STRIPE_DIGEST_BYTES: usize = 32;

/// Checks a workload's name: 1 to [`MAX_NAME_BYTES`] letters, digits, `.`, `_` and `-`, the first one a
/// letter or a digit. It becomes part of a file name and a word on a command line, so it can be neither a path nor an
/// option.
///
/// # Errors
/// `Name`.
pub fn check_name(name: &str) -> Result<()> {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-');
    let fits = (1..=MAX_NAME_BYTES).contains(&name.len()) && name.bytes().all(allowed);
    if fits && name.starts_with(|first: char| first.is_ascii_alphanumeric()) {
        return Ok(());
    }
    Err(ProtocolError::Name { limit: MAX_NAME_BYTES })
}

/// What the sender says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Downstream {
    /// Who the sender is.
    Hello(crate::handshake::Hello),
    /// Will you take this workload? The blob describes its machine, for the destination's VMM.
    Offer(Offer),
    /// Every page of this round was written to the page streams: say `RoundDone` when all of it is in memory.
    RoundSent {
        /// The round, from 0.
        round: u32,
    },
    /// These pages, named by the blob as [`sparse`](crate::sparse) writes them, are not in any round: forget what came
    /// of them before, and ask for them once the workload runs. At most once, right before `State`.
    Missing {
        /// How many they are.
        pages: u64,
    },
    /// The workload is frozen, its last pages are in `last_round`: compare these digests with your memory. The blob has
    /// [`STRIPE_DIGEST_BYTES`] for each of 1 to [`MAX_VERIFY_STRIPES`] stripes. Needs the capability `verify`.
    Verify {
        /// The round that must have ended on every page stream before memory is looked at.
        last_round: u32,
        /// The first of these stripes, counted over all spaces from 0.
        first: u64,
    },
    /// The workload is frozen, its last pages are in `last_round`; the blob is its [state](crate::state).
    State {
        /// The round that must have ended on every page stream before the state may be loaded.
        last_round: u32,
    },
    /// It is yours: start it. Behind this message the source never resumes by itself.
    Commit {
        /// Which migration.
        migration: MigrationId,
    },
    /// The sender knows what became of the migration, and will not ask; the receiver may forget it.
    Done {
        /// Which migration.
        migration: MigrationId,
    },
    /// The sender gives up before `Commit`; the workload goes on at the source.
    Cancel {
        /// Why, for the receiver's log.
        reason: String,
    },
    /// What became of a migration whose answer was lost?
    Ask {
        /// Which migration.
        migration: MigrationId,
    },
    /// Behind `Incomplete`: the sender has the missing pages still; what is missing?
    Recover {
        /// Which migration.
        migration: MigrationId,
    },
    /// A further connection of a migration that was accepted, or resumed, on another one: its page streams may be opened
    /// when it is answered by `Accept`. Needs the capability `connections`.
    Join {
        /// Which migration.
        migration: MigrationId,
        /// Which of its connections this is; the one that made the offer is 0.
        connection: u16,
    },
    /// The link was lost in the rounds: this connection takes its place. Needs the capability `resume`.
    Resume {
        /// Which migration.
        migration: MigrationId,
    },
    /// How fast is the path? One page stream of bytes without meaning follows. Needs the capability `probe`.
    Probe {
        /// The most that will come, at most [`MAX_PROBE_BYTES`].
        bytes: u64,
    },
}

impl Downstream {
    /// Its name in this document, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Offer(_) => "Offer",
            Self::RoundSent { .. } => "RoundSent",
            Self::Missing { .. } => "Missing",
            Self::Verify { .. } => "Verify",
            Self::State { .. } => "State",
            Self::Commit { .. } => "Commit",
            Self::Done { .. } => "Done",
            Self::Cancel { .. } => "Cancel",
            Self::Ask { .. } => "Ask",
            Self::Recover { .. } => "Recover",
            Self::Join { .. } => "Join",
            Self::Resume { .. } => "Resume",
            Self::Probe { .. } => "Probe",
        }
    }
}

/// A workload that looks for a place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The migration's name, chosen by the sender.
    pub migration: MigrationId,
    /// What kind of workload, and so what the machine blob and the state are.
    pub kind: WorkloadKind,
    /// The workload's name; the receiver may give it another.
    pub name: String,
    /// Its memory.
    pub layout: Layout,
    /// How many page streams the sender will open, at least 1.
    pub page_streams: u16,
    /// How many connections they are spread over, this one included: stream *n* is on connection *n* modulo this. At least
    /// 1 and no more than there are streams. More than 1 needs the capability `connections`.
    #[serde(default = "one", skip_serializing_if = "is_one")]
    pub connections: u16,
    /// A checkpoint that memory may begin with. Only to a receiver with the capability `seed`, which may pass it over.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<Seed>,
}

/// A checkpoint in a store that both ends can read, each by a path of its own.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seed {
    /// The store's id: [`StoreInfo::id`](crate::checkpoint::manifest::StoreInfo::id).
    pub store: String,
    /// The checkpoint.
    pub checkpoint: CheckpointId,
    /// The digest of its manifest, and so of all that is in it.
    pub manifest: HexDigest,
}

/// What an offer means that does not speak of connections.
fn one() -> u16 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
fn is_one(connections: &u16) -> bool {
    *connections == 1
}

impl Offer {
    /// Checks an offer from outside: its name, its layout against `max_memory_bytes`, its numbers of page streams and
    /// connections.
    ///
    /// # Errors
    /// As [`check_name`] and [`Layout::validate`]; `Value` or `TooLarge` for the numbers of page streams and connections.
    pub fn check(&self, max_memory_bytes: u64) -> Result<()> {
        check_name(&self.name)?;
        self.layout.validate(max_memory_bytes)?;
        let (what, found) = ("the number of page streams", u64::from(self.page_streams));
        if found == 0 {
            return Err(ProtocolError::Value { what, found });
        }
        if self.page_streams > MAX_PAGE_STREAMS {
            return Err(ProtocolError::TooLarge { what, found, limit: u64::from(MAX_PAGE_STREAMS) });
        }
        let (what, found) = ("the number of connections", u64::from(self.connections));
        if found == 0 {
            return Err(ProtocolError::Value { what, found });
        }
        let most = self.page_streams.min(MAX_CONNECTIONS);
        if self.connections > most {
            return Err(ProtocolError::TooLarge { what, found, limit: u64::from(most) });
        }
        Ok(())
    }
}

/// The kinds of workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WorkloadKind {
    /// A KVM virtual machine on x86-64 under the `vmm` crate.
    Vm,
    /// A program that writes itself down: it stands in checkpoints alone and is never offered.
    Program,
    /// A process tree under an OCI runtime, as [`container`](crate::container) describes it.
    Container,
}

/// What the receiver says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Upstream {
    /// Who the receiver is.
    Hello(crate::handshake::Hello),
    /// The memory is there; send pages. Also the answer to `Join`.
    Accept,
    /// As `Accept`, and the memory is as the checkpoint has it that the offer named: all other pages are zeros. Only to an offer
    /// that named one.
    Seeded {
        /// Pages of the checkpoint that are not zeros.
        pages: u64,
    },
    /// The receiver will not take this workload; nothing was changed.
    Refuse {
        /// Why, as a class that a script can act on.
        code: RefuseCode,
        /// Why, for the operator of the sender.
        reason: String,
    },
    /// Every page of this round is in memory.
    RoundDone {
        /// The round, from 0.
        round: u32,
    },
    /// The answer to `Verify`.
    Verified {
        /// Stripes that were compared so far.
        stripes: u64,
    },
    /// The state is loaded and everything was checked; only `Commit` is missing.
    Ready,
    /// The workload runs here.
    Started {
        /// Which migration.
        migration: MigrationId,
    },
    /// A vCPU waits for this page: send it before all others. Only behind `Started`, of a page that was missing.
    Want {
        /// The space.
        space: u16,
        /// The number of the page in its space.
        page: u64,
    },
    /// The answer to `Ask`: it runs here and still misses pages. The source must never run again, and must keep its
    /// memory. Said only to a sender with the capability `post-copy`; another one is told that the outcome is `Unknown`.
    Incomplete {
        /// Which migration.
        migration: MigrationId,
    },
    /// The answer to `Recover`: these pages, named by the blob as [`sparse`](crate::sparse) writes them, are not here yet.
    Missing {
        /// How many they are.
        pages: u64,
    },
    /// Nothing is missing any more: the source is not needed.
    Complete {
        /// Which migration.
        migration: MigrationId,
    },
    /// The receiver gave up before it started anything and will never start it; the source is the workload.
    Failed {
        /// Why, for the operator of the sender.
        reason: String,
    },
    /// The answer to `Resume`: the rounds go on with this one. The blob says which pages of it arrived whole on the
    /// connection that was lost, as a [sparse set](crate::sparse).
    Resumed {
        /// The first round that is not in memory whole.
        round: u32,
    },
    /// The answer to `Resume` where the state had been loaded: all of it was forgotten, memory is zeros, and the rounds go on with this
    /// one and every page. Needs the capability `anew`.
    Anew {
        /// The round under way: the one behind which the state came.
        round: u32,
    },
    /// The answer to `Probe`, behind the end of its stream.
    Probed {
        /// Bytes that came.
        bytes: u64,
        /// From the first of them to the last, in microseconds.
        duration_us: u64,
    },
    /// The answer to `Ask`.
    Outcome {
        /// Which migration.
        migration: MigrationId,
        /// What became of it here.
        outcome: Outcome,
    },
}

impl Upstream {
    /// Its name in this document, for errors and logs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "Hello",
            Self::Accept => "Accept",
            Self::Seeded { .. } => "Seeded",
            Self::Refuse { .. } => "Refuse",
            Self::RoundDone { .. } => "RoundDone",
            Self::Verified { .. } => "Verified",
            Self::Ready => "Ready",
            Self::Started { .. } => "Started",
            Self::Want { .. } => "Want",
            Self::Incomplete { .. } => "Incomplete",
            Self::Missing { .. } => "Missing",
            Self::Complete { .. } => "Complete",
            Self::Failed { .. } => "Failed",
            Self::Resumed { .. } => "Resumed",
            Self::Anew { .. } => "Anew",
            Self::Outcome { .. } => "Outcome",
            Self::Probed { .. } => "Probed",
        }
    }
}

/// Why a receiver refuses a workload.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefuseCode {
    /// The protocol versions or capabilities do not fit.
    Version,
    /// The layout is larger than the receiver allows or has.
    Memory,
    /// A workload of that name runs there.
    NameTaken,
    /// The destination's CPU or devices lack what the workload uses.
    Machine,
    /// The receiver is busy with another migration.
    Busy,
    /// The offer contradicts the protocol.
    BadOffer,
    /// The destination could not build the workload (no KVM, no permission, …).
    Host,
    /// There is no such migration under way that this peer offered. The answer to `Join` and `Resume`.
    NoSuchMigration,
}

/// What became of a migration, by the receiver's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// It runs, or ran, at the destination: the source must never run again.
    Started,
    /// It was discarded and will never start: the source may resume.
    Discarded,
    /// The receiver does not know it. That proves nothing: the source must stay frozen.
    Unknown,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_can_stand_in_a_path_and_on_a_command_line() {
        let long = "a".repeat(MAX_NAME_BYTES);
        for good in ["a", "web-1", "0", "db_2.eu", long.as_str()] {
            check_name(good).unwrap();
        }
        let too_long = "a".repeat(MAX_NAME_BYTES + 1);
        for bad in
            ["", ".", "..", "../x", "a/b", "-v", ".hidden", "_x", "a b", "a\nb", "ä", too_long.as_str()]
        {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }
}

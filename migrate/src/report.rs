//! What a migration did, in numbers, and what it says while it does it.
//!
//! One [`Report`] is made by every run of the engine, also by one that fails: its phases and rounds are those that
//! were begun. Times are microseconds on this end's monotonic clock. [`Event`]s tell the same as it happens.

mod file;
pub mod html;
mod timed;

pub use file::Document;
pub(crate) use timed::Timed;

use crate::checkpoint::CheckpointReport;
use crate::converge::trace::Entry;
use protocol::MigrationId;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::time::Duration;

/// The version of a report's JSON. Members may be added under the same version; a reader takes what is missing as nothing.
pub const REPORT_VERSION: u32 = 1;

fn report_version() -> u32 {
    REPORT_VERSION
}

/// A phase of the engine, on either end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Both ends say who they are.
    Greet,
    /// The workload is offered, and the destination makes room for it.
    Offer,
    /// The source begins to track writes.
    Track,
    /// Pages are copied while the workload runs.
    Rounds,
    /// The workload is stopped, and what it wrote since the last round follows.
    Freeze,
    /// All memory is compared with the source's.
    Verify,
    /// Its state follows the last pages.
    State,
    /// The destination loads the state and checks everything.
    Ready,
    /// The source promises not to resume by itself any more.
    Pledge,
    /// What was read is made durable in a store, while the workload runs on.
    Write,
    /// The destination is told to start, and says that it has. In a store: what makes a checkpoint valid is written.
    Commit,
    /// The workload runs at the destination, and its last pages follow.
    PostCopy,
    /// The link was lost behind `Commit`: the destination is asked what became of it.
    Ask,
    /// The link was lost in the rounds: another one is looked for, to go on where they stood.
    Resume,
    /// The source ends its workload, or gets it back.
    Settle,
}

impl Phase {
    /// The phase as one word, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Greet => "greet",
            Self::Offer => "offer",
            Self::Track => "track",
            Self::Rounds => "rounds",
            Self::Freeze => "freeze",
            Self::Verify => "verify",
            Self::State => "state",
            Self::Ready => "ready",
            Self::Pledge => "pledge",
            Self::Write => "write",
            Self::Commit => "commit",
            Self::PostCopy => "post-copy",
            Self::Ask => "ask",
            Self::Resume => "resume",
            Self::Settle => "settle",
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Greet => "greeting the peer",
            Self::Offer => "offering the workload",
            Self::Track => "tracking writes",
            Self::Rounds => "copying memory",
            Self::Freeze => "stopping the workload for the last pages",
            Self::Verify => "comparing memory",
            Self::State => "moving the state",
            Self::Ready => "waiting for the destination to be ready",
            Self::Pledge => "pledging the source",
            Self::Write => "writing to the store",
            Self::Commit => "committing",
            Self::PostCopy => "sending the pages that the running workload misses",
            Self::Ask => "asking what became of the workload",
            Self::Resume => "taking up the rounds over a new link",
            Self::Settle => "settling the source",
        })
    }
}

/// How a migration ended, seen from the source.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Outcome {
    /// It has not ended yet.
    #[default]
    Underway,
    /// The workload runs at the destination.
    Moved,
    /// The workload runs at the source.
    Failed {
        /// Why it did not move.
        reason: String,
    },
    /// The workload stands still at the source, because nobody could say whether it runs at the destination.
    InDoubt {
        /// What to do.
        reason: String,
    },
}

/// How long one phase took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// Which phase.
    pub phase: Phase,
    /// From its first action to its last answer.
    pub duration_us: u64,
}

/// One round of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RoundReport {
    /// Its number, from 0.
    pub round: u32,
    /// Whether the workload stood still: the last round.
    pub frozen: bool,
    /// Pages that were dirty when it began.
    pub dirty_pages: u64,
    /// Pages that were sent with their bytes.
    pub sent_pages: u64,
    /// Those of them that went as less than their bytes.
    #[serde(default)]
    pub packed_pages: u64,
    /// Pages that were sent as zeros, without bytes.
    pub zero_pages: u64,
    /// Pages that were never touched, and so not sent.
    pub skipped_pages: u64,
    /// Bytes on the page streams, headers included.
    pub sent_bytes: u64,
    /// From its first page to the answer that all of it is in the destination's memory; for the frozen round, to
    /// the last page handed to the link.
    pub duration_us: u64,
    /// Bytes sent by duration.
    pub rate_bytes_per_s: u64,
    /// Pages that were dirty when it was over.
    pub remaining_pages: u64,
    /// The downtime that freezing then was predicted to cost.
    pub predicted_downtime_us: u64,
    /// Those of the remaining that the next round holds back, because they are dirty in every one.
    pub held_pages: u64,
    /// The share of its time that the workload was made to stand still in it, in percent.
    pub throttle_percent: u8,
}

/// How many connections carried the pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Connections {
    /// Their number.
    pub number: u16,
    /// Why so many, for people.
    pub reason: String,
}

impl Default for Connections {
    fn default() -> Self {
        Self { number: 1, reason: "nobody asked for more".into() }
    }
}

/// The part of a downtime that no page explains: what was counted with, and what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct FixedPart {
    /// What was counted with, besides round trips.
    pub assumed_us: u64,
    /// The moves to this peer that it was known from; 0 for a guess.
    pub known_from: u32,
    /// What it was, besides round trips; 0 when the workload did not move, or memory was compared.
    pub actual_us: u64,
    /// Of it: stopping the workload.
    pub pause_us: u64,
    /// Of it: saving its state.
    pub save_us: u64,
}

/// What one migration did, seen from the source.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// [`REPORT_VERSION`].
    #[serde(default = "report_version")]
    pub version: u32,
    /// Its name.
    pub migration: MigrationId,
    /// The workload's name.
    pub workload: String,
    /// Who the destination is.
    pub peer: String,
    /// How it ended.
    pub outcome: Outcome,
    /// How the source tracked writes; empty when it did not come to that.
    pub tracking: String,
    /// The workload's memory in bytes.
    pub memory_bytes: u64,
    /// Bytes of the disks that go with it, holes included.
    #[serde(default)]
    pub disk_bytes: u64,
    /// The page streams that were used.
    pub page_streams: u16,
    /// The connections that they were spread over.
    #[serde(default)]
    pub connections: Connections,
    /// The phases in order.
    pub phases: Vec<PhaseTime>,
    /// The rounds in order.
    pub rounds: Vec<RoundReport>,
    /// Pages sent with their bytes, in all rounds.
    pub sent_pages: u64,
    /// Those of them that went as less than their bytes.
    #[serde(default)]
    pub packed_pages: u64,
    /// Pages sent as zeros, in all rounds.
    pub zero_pages: u64,
    /// Pages never touched and not sent.
    pub skipped_pages: u64,
    /// Pages that the destination had from a checkpoint, and that were not sent in the first round.
    #[serde(default)]
    pub seeded_pages: u64,
    /// Bytes on the page streams in all rounds.
    pub sent_bytes: u64,
    /// Bytes of the state.
    pub state_bytes: u64,
    /// How often a link was lost in the rounds and they went on over another one.
    #[serde(default)]
    pub resumes: u32,
    /// From the call that froze the workload to the word that it runs at the destination, or until it was
    /// resumed here; 0 when it was never frozen.
    pub downtime_us: u64,
    /// The part of it in which memory was compared; 0 where nobody asked for that.
    #[serde(default)]
    pub verify_us: u64,
    /// The part of the downtime that no page explains.
    #[serde(default)]
    pub fixed: FixedPart,
    /// From the greeting to the end.
    pub total_us: u64,
    /// What followed behind the start, if it was started without all of its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopyReport>,
    /// What the transport measured.
    pub link: crate::link::LinkStats,
    /// How fast the guest was meanwhile, if it says so itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guest: Option<GuestSpeed>,
    /// What went wrong without changing the outcome, for people.
    pub warnings: Vec<String>,
}

/// How fast a guest was, by its own count of bytes that it wrote: see [`crate::speed`].
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct GuestSpeed {
    /// Before its writes were tracked; 0 where that was too short to say.
    pub before_bytes_per_s: u64,
    /// In each round that took long enough to say.
    pub rounds: Vec<RoundSpeed>,
}

/// How fast a guest was in one round.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct RoundSpeed {
    /// The round, from 0.
    pub round: u32,
    /// Bytes it wrote a second.
    pub bytes_per_s: u64,
}

impl From<(u32, u64)> for RoundSpeed {
    fn from((round, bytes_per_s): (u32, u64)) -> Self {
        Self { round, bytes_per_s }
    }
}

/// The pages that followed a workload which was started without all of its memory, seen from the source.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct PostCopyReport {
    /// Pages that were missing at the start.
    pub missing_pages: u64,
    /// Pages that somebody waited for and asked for.
    pub asked_pages: u64,
    /// Neighbours of those, sent right behind them.
    pub prefetched_pages: u64,
    /// Pages that were sent in their turn, before anybody asked.
    pub pushed_pages: u64,
    /// Bytes on the page streams, headers included.
    pub sent_bytes: u64,
    /// How often the link was lost and made again.
    pub lost_links: u64,
    /// From the word that it runs there to the word that nothing is missing.
    pub duration_us: u64,
}

/// The pages that followed, seen from the destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FaultReport {
    /// Pages that were missing at the start, or when it was taken up.
    pub missing_pages: u64,
    /// Pages that came.
    pub received_pages: u64,
    /// Missing pages that were touched before they came.
    pub faults: u64,
    /// From the touch to the page being in place: the mean.
    pub fault_mean_us: u64,
    /// The 99th percentile.
    pub fault_p99_us: u64,
    /// The longest.
    pub fault_max_us: u64,
    /// How often the link was lost and made again.
    pub lost_links: u64,
    /// From the start to the last page.
    pub duration_us: u64,
}

/// What one migration did, seen from the destination.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ArrivalReport {
    /// [`REPORT_VERSION`].
    #[serde(default = "report_version")]
    pub version: u32,
    /// Its name, once it was offered.
    pub migration: Option<MigrationId>,
    /// The workload's name here, once it was offered.
    pub workload: String,
    /// Who the source is.
    pub peer: String,
    /// Why nothing arrived, if nothing did.
    pub error: Option<String>,
    /// The phases in order.
    pub phases: Vec<PhaseTime>,
    /// Rounds that arrived whole.
    pub rounds: u32,
    /// Bytes on the page streams.
    pub received_bytes: u64,
    /// Bytes of the state.
    pub state_bytes: u64,
    /// How often a link was lost in the rounds and they went on over another one.
    #[serde(default)]
    pub resumes: u32,
    /// Pages that memory began with, from a checkpoint.
    #[serde(default)]
    pub seeded_pages: u64,
    /// What followed behind the start, if it was started without all of its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<FaultReport>,
    /// From the first byte to the end.
    pub total_us: u64,
}

impl ArrivalReport {
    /// Nothing has happened yet.
    pub(crate) fn of(peer: &str) -> Self {
        Self {
            version: REPORT_VERSION,
            migration: None,
            workload: String::new(),
            peer: peer.into(),
            error: None,
            phases: Vec::new(),
            rounds: 0,
            received_bytes: 0,
            state_bytes: 0,
            resumes: 0,
            seeded_pages: 0,
            post_copy: None,
            total_us: 0,
        }
    }
}

/// Something that happened, for progress bars and logs.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "kebab-case")]
pub enum Event {
    /// A phase begins.
    Phase {
        /// Which one.
        phase: Phase,
    },
    /// A round begins.
    RoundBegin {
        /// Its number, from 0.
        round: u32,
        /// Pages it has to look at.
        dirty_pages: u64,
    },
    /// A round goes on; at most ten a second.
    Progress(Progress),
    /// A round is over.
    RoundEnd(RoundReport),
    /// The link was lost in the rounds; the other end is waited for.
    LinkLost {
        /// Why.
        reason: String,
        /// How long, in microseconds.
        wait_us: u64,
    },
    /// The rounds go on over another link, at the source.
    Resumed {
        /// With which one.
        round: u32,
        /// Pages of it that the destination lacks.
        missing_pages: u64,
        /// Pages that were sent until then, in all rounds.
        sent_pages: u64,
    },
    /// The rounds go on over another link, at the destination.
    CameBack {
        /// With which one.
        round: u32,
        /// Pages of it that had arrived whole.
        arrived_pages: u64,
    },
    /// What to do behind it was decided, and on what grounds.
    Decided(Box<Entry>),
    /// The migration is over, at the source.
    Done(Box<Report>),
    /// A checkpoint was taken, or was given up.
    Checkpointed(Box<CheckpointReport>),
    /// Pages come in; at most ten a second.
    Receiving {
        /// The round, from 0.
        round: u32,
        /// Bytes on all page streams so far.
        received_bytes: u64,
        /// Bytes since the last such event by the time since.
        rate_bytes_per_s: u64,
    },
    /// A workload that was started without all of its memory gets the rest, at the source; at most ten a second.
    Donating {
        /// Pages that were not sent yet.
        missing_pages: u64,
        /// What was sent so far.
        report: PostCopyReport,
    },
    /// The same at the destination.
    Following {
        /// Pages that are not there yet.
        missing_pages: u64,
    },
    /// The migration is over, at the destination.
    Arrived(Box<ArrivalReport>),
}

/// How far a round is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Progress {
    /// The round, from 0.
    pub round: u32,
    /// Pages of this round that were looked at.
    pub done_pages: u64,
    /// Pages of this round that are still to be looked at.
    pub remaining_pages: u64,
    /// Bytes on the page streams in all rounds so far.
    pub sent_bytes: u64,
    /// Bytes of this round by its time so far.
    pub rate_bytes_per_s: u64,
    /// The downtime predicted behind the round before, if there was one.
    pub predicted_downtime_us: Option<u64>,
}

/// Whoever wants to know what happens. Called from the engine's own thread: it must not block.
pub trait Observer {
    /// Something happened.
    fn event(&mut self, event: &Event);
}

/// An observer that looks away.
#[derive(Debug, Clone, Copy, Default)]
pub struct Quiet;

impl Observer for Quiet {
    fn event(&mut self, _: &Event) {}
}

/// Whole microseconds.
pub(crate) fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Bytes a second.
pub(crate) fn rate(bytes: u64, duration: Duration) -> u64 {
    (bytes as f64 / duration.as_secs_f64().max(1e-9)) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_json_objects_that_name_themselves() {
        let json = |event: &Event| serde_json::to_string(event).unwrap();
        assert_eq!(json(&Event::Phase { phase: Phase::Rounds }), r#"{"event":"phase","phase":"rounds"}"#);
        let round = json(&Event::RoundEnd(RoundReport { round: 3, ..RoundReport::default() }));
        assert!(round.starts_with(r#"{"event":"round-end","round":3,"#), "{round}");
    }
}

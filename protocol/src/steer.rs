//! The steering socket: what an operator says to a running migration, or a series of checkpoints, on a unix stream socket, and what it answers.
//!
//! Every message is an [envelope](crate::envelope) without a blob. The operator's program speaks first, one order at a
//! time, and gets one answer to each; every order stands for itself. An order that an older migration does not know is
//! answered by an error, and changes nothing.

use crate::MigrationId;
use crate::checkpoint::name::CheckpointId;
use serde::{Deserialize, Serialize};

/// The longest that a migration keeps an answer to [`Order::Await`] back, in milliseconds.
pub const MAX_AWAIT_MS: u64 = 60_000;

/// What an operator wants.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Order {
    /// How is it? Answered by `Status`.
    Status,
    /// Say how it is once it has ended, or when this time is over. Answered by `Status`.
    Await {
        /// Milliseconds, at most [`MAX_AWAIT_MS`]; more counts as that.
        limit_ms: u64,
    },
    /// Stop. Answered by `Done` when it will end without a commit, and by an error `too-late` behind that point.
    Cancel,
    /// Go on within these limits; those that are not named stay. Answered by `Done`, or by an error, and then none
    /// has changed.
    Set(Limits),
}

/// What a migration answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Answer {
    /// To `Status` and `Await`.
    Status(Box<Status>),
    /// To the same, of a series of checkpoints.
    Series(Box<Series>),
    /// Done as ordered.
    Done,
    /// Not done; nothing has changed.
    Error {
        /// The class of the error.
        code: ErrorCode,
        /// What happened and what to do.
        message: String,
    },
}

/// Why an order was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The order does not fit the protocol or its bounds.
    BadRequest,
    /// A limit cannot have that value, or this end has no such limit.
    BadValue,
    /// The migration is behind its commit, or over.
    TooLate,
}

/// What bounds a migration: in a status those in force, in an order those to change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// The downtime to aim at.
    pub downtime_us: Option<u64>,
    /// The downtime that is still taken when what remains no longer falls.
    pub max_downtime_us: Option<u64>,
    /// The most rounds while the workload runs.
    pub max_rounds: Option<u32>,
    /// The longest time for all of them.
    pub timeout_us: Option<u64>,
    /// What happens when rounds or time are used up, as a word of the command line.
    pub on_timeout: Option<String>,
    /// What happens when what remains no longer falls, in this order, as words of the command line.
    pub on_stall: Option<Vec<String>>,
    /// The most that the workload may be slowed down, in percent of its time.
    pub max_throttle_percent: Option<u8>,
    /// Behind how many rounds that were not enough the memory follows the workload.
    pub post_copy_after: Option<u32>,
    /// The most bytes a second on the page streams; in an order 0 lifts the cap.
    pub bandwidth_bytes_per_s: Option<u64>,
}

/// Which end of a migration a process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum End {
    /// The workload leaves.
    Send,
    /// The workload arrives.
    Receive,
}

/// How a migration ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Outcome {
    /// The workload runs at the destination.
    Moved,
    /// The workload runs at the source.
    Failed,
    /// Nobody could say which.
    InDoubt,
}

/// How a migration is. Texts from the other host were cut and cleaned.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Name and version of the program.
    pub software: String,
    /// Its process.
    pub pid: u32,
    /// Which end it is.
    pub end: End,
    /// The migration.
    pub migration: MigrationId,
    /// The workload's name at this end.
    pub workload: String,
    /// Who is at the other end.
    pub peer: String,
    /// The phase, as the word that events use.
    pub phase: String,
    /// Whether `Cancel` is still possible.
    pub cancellable: bool,
    /// How it ended, once it has.
    pub outcome: Option<Outcome>,
    /// Why, where that is not simply success.
    pub reason: Option<String>,
    /// Microseconds since it began.
    pub elapsed_us: u64,
    /// Memory of the workload in bytes.
    pub memory_bytes: u64,
    /// The round, from 0.
    pub round: u32,
    /// Pages that this round has to look at.
    pub dirty_pages: u64,
    /// Pages of this round that were looked at.
    pub done_pages: u64,
    /// Bytes on the page streams so far.
    pub moved_bytes: u64,
    /// Bytes a second of this round so far.
    pub rate_bytes_per_s: u64,
    /// Bytes a second that the workload dirtied during the last round that is over.
    pub dirty_bytes_per_s: Option<u64>,
    /// The downtime that freezing now is predicted to cost.
    pub predicted_downtime_us: Option<u64>,
    /// How much the workload is slowed down, in percent of its time.
    pub throttle_percent: Option<u8>,
    /// Microseconds until the workload is expected to run at the destination; absent where nothing sound can be said.
    pub eta_us: Option<u64>,
    /// The limits in force.
    pub limits: Limits,
}

/// How a series of checkpoints is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Series {
    /// Name and version of the program.
    pub software: String,
    /// Its process.
    pub pid: u32,
    /// The workload's name.
    pub workload: String,
    /// Where its checkpoints lie.
    pub store: String,
    /// The phase of the checkpoint that is being taken, as the word that events use, or `waiting` for the next one.
    pub phase: String,
    /// Whether it is over: there will be no further one.
    pub ended: bool,
    /// Microseconds since it began.
    pub elapsed_us: u64,
    /// Microseconds from the beginning of one to that of the next, once that is known.
    pub interval_us: Option<u64>,
    /// Microseconds until the next one begins, while it is waited for.
    pub next_us: Option<u64>,
    /// Checkpoints of it that exist.
    pub taken: u64,
    /// Attempts that failed.
    pub failed: u64,
    /// Intervals that went by without one.
    pub missed: u64,
    /// Bytes that all of them took in the store.
    pub stored_bytes: u64,
    /// The last one that exists.
    pub last: Option<LastCheckpoint>,
    /// Why the last attempt failed, if it did.
    pub failure: Option<String>,
}

/// What is told of the last checkpoint of a series.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LastCheckpoint {
    /// Its name.
    pub id: CheckpointId,
    /// When all of it was durable, in milliseconds since 1970.
    pub durable_unix_ms: u64,
    /// How many deltas there are from the full one to this.
    pub deltas: u32,
    /// How long the workload stood still for it, in microseconds.
    pub pause_us: u64,
    /// Bytes that it took in the store.
    pub stored_bytes: u64,
}

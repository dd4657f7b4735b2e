//! The control socket: what an engine says to a VMM on a unix stream socket, and what it answers.
//!
//! Every message is an [envelope](crate::envelope). The client speaks first, one request at a time, and gets one
//! reply to each. A connection begins with [`Request::Hello`]; its role decides what follows:
//!
//! - `query`: only [`Request::Status`]. Any number at once, also while a session holds the VM.
//! - `session`: everything. One at a time: a second one is refused with the pid of the holder.
//!
//! The end of a session is a message of its own: if its socket closes (the engine died),
//! - a source that is not pledged resumes, gets back every dirty bit that was taken, and stops tracking, but for what a
//!   [baseline](Request::Baseline) needs;
//! - a pledged source stays frozen until a session says [`Request::Resume`] or [`Request::HandOver`];
//! - a destination that was not started discards itself;
//! - a destination that was started and misses pages goes on: whoever touches one of them waits.
//!
//! File descriptors travel with the reply that says so, as `SCM_RIGHTS` with its first byte.

use crate::MigrationId;
use crate::checkpoint::name::CheckpointId;
use crate::layout::Layout;
use serde::{Deserialize, Serialize};

/// The version of this protocol: a VMM refuses a client with another one.
pub const VERSION: u16 = 1;

/// The most bytes of blob in a request: state and machine descriptions, and page sets of 64 MiB (2 TiB of memory).
pub const MAX_BLOB_BYTES: u32 = 64 << 20;

/// The most that vCPUs can be throttled, in percent: a guest that never runs would never answer anybody either.
pub const MAX_THROTTLE_PERCENT: u8 = 99;

/// The most file descriptors with one message: one for each space. Linux allows 253 (`SCM_MAX_FD`).
pub const MAX_FDS: usize = 253;

/// What a client asks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Request {
    /// First message. Answered by `Welcome` or `Refused`.
    Hello {
        /// Must be [`VERSION`].
        version: u16,
        /// What the connection is for.
        role: Role,
        /// Who asks, for messages to others: for instance `migrate send`.
        client: String,
    },
    /// How is it? Answered by `Status`.
    Status,
    /// What is it? Answered by `Description`, its machine blob, and one memfd for each space.
    Describe,
    /// For the rest of this session these disks are spaces behind those of memory, in the order of the devices: their pages
    /// are tracked, harvested and taken like memory's, and their images go where the workload goes. Not while it is tracked; only
    /// to a VMM that said `can_copy_disks`. Answered as `Describe`, with a descriptor for the image of each.
    CopyDisks {
        /// The images, as the machine's description names them, of disks that the guest may write. Others are named in the
        /// error.
        disks: Vec<String>,
    },
    /// Begin to track writes; every page counts as dirty. Answered by `Tracking`.
    TrackStart {
        /// If there is a baseline, only those pages count as dirty that are not in it.
        #[serde(default, skip_serializing_if = "is_false")]
        keep: bool,
    },
    /// Which pages are dirty now? Takes nothing. Answered by `Dirty` and the page sets of all spaces, one behind
    /// the other, as [`PageSet::write_to`](crate::page::PageSet::write_to) writes them.
    Harvest {
        /// The client can read [sparse](crate::sparse) sets too. A VMM that does not know them answers with plain ones.
        #[serde(default, skip_serializing_if = "is_false")]
        sparse: bool,
    },
    /// Take these pages, all of which the last `Harvest` named dirty or which are not: they are clean from now on,
    /// and whoever reads them behind the answer misses nothing that the log will not say again. Answered by `Done`.
    Take {
        /// The space.
        space: u16,
        /// First page.
        first: u64,
        /// Length in pages.
        count: u64,
    },
    /// These pages, taken before, were not delivered: they are dirty again. The blob is as in `Dirty`.
    /// Answered by `Done`.
    Redirty,
    /// Everything that this session took is safe in this checkpoint, which is the baseline from now on: writes are
    /// tracked also between sessions, and the next `TrackStart` that wants to keep it finds what was written since.
    /// Pages that were taken and are not covered by a newer `Baseline` are dirty again when their session ends. Only to a
    /// VMM that said `can_keep`. Answered by `Done`.
    ///
    /// To a destination, between `Prepare` and `Load`: all its memory is, or will be before anybody sees it, what this checkpoint has;
    /// what is written from now on is what the checkpoint lacks.
    Baseline {
        /// Its name. None: there is no baseline any more, and no tracking between sessions.
        checkpoint: Option<CheckpointId>,
    },
    /// Stop tracking, but for what a baseline needs. Answered by `Done`.
    TrackStop,
    /// Let the vCPUs stand still for this share of every few milliseconds; 0 lets them run. Ends by itself with
    /// `TrackStop`, `Freeze` and the session. Answered by `Done`.
    Throttle {
        /// The share in percent, at most [`MAX_THROTTLE_PERCENT`].
        percent: u8,
    },
    /// Stop all vCPUs and devices. Answered by `Done` once nothing writes to memory any more.
    Freeze,
    /// The state of a frozen workload. Answered by `Saved` and the state blob.
    Save,
    /// `Commit` is about to be sent: do not resume by yourself from now on. Answered by `Done`.
    Pledge {
        /// Which migration.
        migration: MigrationId,
        /// Where it goes, for `status` and recovery: an address an operator can use.
        peer: String,
    },
    /// Go on here. A pledged source goes on only for the migration it was pledged to, when the engine knows that
    /// the destination will never start. Answered by `Done`.
    Resume {
        /// The migration of the pledge, if there is one.
        migration: Option<MigrationId>,
    },
    /// The destination has it: end. Only for a pledged source. Answered by `Done`, then the process ends.
    HandOver {
        /// The migration of the pledge.
        migration: MigrationId,
    },
    /// Stop the VM and end the process. Answered by `Done`.
    Terminate,
    /// Destination: become this workload. The blob is the machine description of the source.
    /// Answered by `Description` and the memfds, or by an error that says what this host lacks.
    Prepare {
        /// The name to run under.
        name: String,
        /// Its memory.
        layout: Layout,
    },
    /// Destination: load this state (the blob) and check it. Answered by `Done`.
    Load,
    /// Destination: these pages are missing. The blob is as in `Dirty`. What is there of them is forgotten, and from now
    /// on whoever touches one of them waits until it is put in place. Answered by `Done`.
    Expect,
    /// Destination that misses pages, started or not: how can they be put in place? Answered by `PageFaults`.
    PageFaults,
    /// Destination that was started: no page is missing any more. Answered by `Done`, once that is found to be so.
    Complete,
    /// Destination: run. Answered by `Done` once the vCPUs were released; from then on the VM is on its own feet.
    Start {
        /// The migration that brought it, remembered for [`Status::arrived_by`].
        migration: MigrationId,
    },
    /// Destination: forget everything and end the process. Answered by `Done`.
    Discard,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it with a reference")]
fn is_false(value: &bool) -> bool {
    !value
}

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Only questions.
    Query,
    /// Holds the VM.
    Session,
}

/// What a VMM answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Reply {
    /// To `Hello`.
    Welcome {
        /// The VMM's [`VERSION`].
        version: u16,
        /// Name and version of the VMM, for the log.
        software: String,
        /// How it is.
        status: Status,
    },
    /// To `Hello`: another session holds the VM, or the version is wrong.
    Refused {
        /// What the client should know.
        reason: String,
        /// The process that holds it, where that is the reason.
        holder_pid: Option<u32>,
    },
    /// To `Status`.
    Status(Status),
    /// To `Describe`, `CopyDisks` and `Prepare`. The blob describes the machine; memfds, and the images of disks, come along, in
    /// the order of the layout.
    Description {
        /// The name.
        name: String,
        /// Its memory.
        layout: Layout,
        /// Whether this VMM knows [`Request::CopyDisks`].
        #[serde(default, skip_serializing_if = "is_false")]
        can_copy_disks: bool,
    },
    /// To `TrackStart`.
    Tracking {
        /// How writes are tracked, for reports.
        mode: TrackingMode,
        /// The checkpoint that has everything but the pages written since, if there is one. Where the request asked to
        /// keep it, exactly those are dirty now.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        baseline: Option<CheckpointId>,
        /// Whether this VMM knows [`Request::Baseline`].
        #[serde(default, skip_serializing_if = "is_false")]
        can_keep: bool,
    },
    /// To `PageFaults`. A userfaultfd(2) comes along, over the mappings of all spaces in the VMM; the blob is the page
    /// sets of what is missing, as in `Dirty`.
    PageFaults {
        /// Missing pages of all spaces together.
        pages: u64,
        /// Where each space is mapped in the VMM, in the order of the layout.
        addresses: Vec<u64>,
    },
    /// To `Harvest`.
    Dirty {
        /// Dirty pages of all spaces together.
        pages: u64,
        /// The blob is as [`sparse::encode`](crate::sparse::encode) writes it. Only where the request allowed it.
        #[serde(default, skip_serializing_if = "is_false")]
        sparse: bool,
    },
    /// To `Save`. The blob is the state.
    Saved,
    /// Done as asked.
    Done,
    /// Not done; the VM is as before.
    Error {
        /// The class of the error.
        code: ErrorCode,
        /// What happened and what to do.
        message: String,
    },
}

/// How the host tracks writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TrackingMode {
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` with `INITIALLY_SET`.
    ManualInitiallySet,
    /// `KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2`.
    Manual,
    /// Reading the log clears it.
    Plain,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    /// The request does not fit the protocol or its bounds.
    BadRequest,
    /// The request does not fit the state the VM is in.
    WrongState,
    /// The machine or its state cannot run on this host.
    Unsupported,
    /// The host refused something (KVM, memory, files).
    Host,
}

/// How a VM is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Its name.
    pub name: String,
    /// Its phase.
    pub phase: Phase,
    /// The VMM's process.
    pub pid: u32,
    /// Memory in bytes.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// Milliseconds since the VMM started.
    pub uptime_ms: u64,
    /// Where the serial port goes, for people.
    pub serial: String,
    /// The process that holds a session, if one does.
    pub holder_pid: Option<u32>,
    /// Who that process said it is.
    pub holder: Option<String>,
    /// The migration that brought it here, if one did.
    pub arrived_by: Option<MigrationId>,
    /// The migration it is pledged to, if it is.
    pub pledged_to: Option<Pledge>,
    /// Pages that are not here yet, of a VM that was started without all of its memory.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub awaiting_pages: Option<u64>,
    /// How much of their time its vCPUs are made to stand still, in percent. Missing where the VMM cannot throttle.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle_percent: Option<u8>,
    /// The checkpoint that has all of its memory but what was written since, if there is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub baseline: Option<CheckpointId>,
}

/// A source that waits for the answer to its `Commit`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pledge {
    /// Which migration.
    pub migration: MigrationId,
    /// Where it went.
    pub peer: String,
}

/// The phases of a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    /// Its vCPUs run.
    Running,
    /// Its vCPUs stand still; a session holds it.
    Frozen,
    /// Its vCPUs stand still until the outcome of a migration is known.
    Pledged,
    /// A destination that waits for `Prepare`.
    Incoming,
    /// A destination that takes pages.
    Prepared,
    /// A destination that was loaded and waits for `Start`.
    Loaded,
    /// Its guest powered off or crashed; the process is about to end.
    Stopped,
}

//! Containers of this host: a process tree under an OCI runtime (runc), written down by CRIU.
//!
//! ```text
//! processes ─▶ slots ─▶ (spaces of a layout)       which page of which process is which page of a space
//! keeper ─▶ runtime ─▶ runc ─▶ CRIU                standing still, its state, going on, ending
//! restoring ─▶ runtime ─▶ runc ─▶ gate ─▶ CRIU     being made anew; `filling` gives its memory
//! ```
//!
//! Memory is read from the processes, by this program; CRIU writes down everything else, and restores. That is less than its page server
//! could do, and more: there is nothing between a round and memory, any number of threads read, a page is read when it is wanted and
//! not when CRIU comes to it, and no connection exists whose end could cost a process its life.

pub(crate) mod arrivals;
mod digests;
mod filling;
pub(crate) mod gate;
pub(crate) mod files;
mod images;
pub(crate) mod keeper;
mod pagemap;
mod processes;
mod restoring;
mod runtime;
mod slots;

pub(crate) use digests::Digests;
pub use files::RootCopy;
pub(crate) use filling::{Arena, Plan};
pub(crate) use images::{IMAGE_LIMIT, Images};
pub(crate) use processes::{Process, SoftDirty, Tree, Which, is_gone};
pub(crate) use restoring::{Parts, Restoring};
pub use runtime::{Criu, Runtime, Version};
pub(crate) use runtime::{Programs, reason};
pub(crate) use slots::{Place, Slots};

use crate::paths::RuntimeDir;
use std::path::PathBuf;

/// How it is found what a container writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Tracking {
    /// By the kernel if it can tell, else by comparing.
    #[default]
    Auto,
    /// The kernel tells (PAGEMAP_SCAN, Linux 6.7).
    Kernel,
    /// An older kernel tells (soft-dirty bits): each round pauses the container while they are read and cleared.
    SoftDirty,
    /// All pages are compared with what was sent of them, by BLAKE3.
    Digests,
}

/// What an operator wants of a container that is moved or written down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Wishes {
    /// How it is found what it writes.
    pub tracking: Tracking,
    /// Its TCP connections go with it.
    pub tcp_established: bool,
    /// Its root file system goes with it, and what of it.
    pub copy_root: Option<RootCopy>,
}

/// The directory of notes and sockets of this host's containers.
pub(crate) fn folder(runtime_dir: &RuntimeDir) -> PathBuf {
    runtime_dir.path().join("containers")
}

//! The bare guest `ledger`: it fills its memory with content that can be checked, overwrites a working set
//! at a set rate, keeps book of every write, and so notices by itself whatever a migration or a checkpoint
//! loses. This library carries the guest image and tells, from a host's side, what its memory must hold.
//!
//! ```text
//! Params ──> command line ──> IMAGE in a VM ──> frozen memory ──> Stats ──> verify ──> Verdict
//! ```
//!
//! How to boot the image, and every layout byte by byte: README.md beside this crate.
//!
//! ```no_run
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let mut memory = std::fs::File::open("memory")?;
//! # let mut read = move |gpa, buf: &mut [u8]| -> std::io::Result<()> {
//! #     use std::os::unix::fs::FileExt;
//! #     memory.read_exact_at(buf, gpa)
//! # };
//! let params: ledger::Params = "fill=768M ws=256M rate=200 pattern=hot".parse()?;
//! let command_line = format!("{params}");
//! // ... boot ledger::IMAGE with it, migrate, freeze ...
//! let stats = ledger::Stats::read(&mut read)?;
//! let verdict = ledger::verify(&stats, &mut read)?;
//! assert!(verdict.is_sound(), "{verdict}");
//! # Ok(())
//! # }
//! ```

/// What guest and host must agree on; compiled into both.
pub mod model;

mod stats;

mod replay;

mod verify;

mod ring;

mod disk;

pub use disk::{DiskAccount, DiskFault};
pub use model::layout::{PAGE_SIZE, Range, Ranges};
pub use model::mail::Account;
pub use model::page::{Content, Damage};
pub use model::params::{ParamError, Params, Park, Problem, Rate, Serial};
pub use model::pattern::Pattern;
pub use model::stats::State;
pub use replay::Replay;
pub use stats::{BadStats, ErrorRecord, Finder, Gap, ReadError, Setup, Stats};
pub use verify::{Fault, MAX_FAULTS, Subject, Verdict, VerifyError, verify};

/// The guest image: a static x86-64 ELF with a PVH entry, loaded from 1 MiB to below 2 MiB.
pub static IMAGE: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/ledger.elf"));

//! `migrate store`: what lies in a store of checkpoints, one verb a file.

mod list;
mod show;
mod prune;
mod verify;
mod gc;
mod copy;
mod key;

pub(super) use prune::KeepArgs;
mod compact;
mod export;
mod import;

use crate::cli::Common;
use crate::error::Result;
use crate::seal::StoreKey;
use crate::store::{MemoryStore, Store};
use crate::units::show_bytes;
use crate::vault::{Vault, now_unix_ms};
use clap::Subcommand;
use protocol::checkpoint::name;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

/// What to do with a store.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Draw the checkpoints of a store as trees, with sizes and ages.
    List(list::Args),
    /// Show everything that is known of one checkpoint.
    Show(show::Args),
    /// Give up checkpoints that no rule keeps.
    Prune(prune::Args),
    /// Read everything and say what is damaged.
    Verify(verify::Args),
    /// Delete what no checkpoint needs any more, after a grace period.
    Gc(gc::Args),
    /// Copy checkpoints, with all that they stand on, to another store.
    Copy(copy::Args),
    /// Make a key to seal stores with.
    Key(key::Args),
    /// Merge a checkpoint and all that it stands on into a new full one.
    Compact(compact::Args),
    /// Write a checkpoint as a memory image, an ELF core for a debugger, or an archive for another store.
    Export(export::Args),
    /// Take in a checkpoint from an archive.
    Import(import::Args),
}

/// Runs the verb.
///
/// # Errors
/// As `docs/scripting.md` lists them.
pub fn run(common: &Common, verb: &Verb) -> Result<ExitCode> {
    match verb {
        Verb::List(args) => list::run(common, args),
        Verb::Show(args) => show::run(common, args),
        Verb::Prune(args) => prune::run(common, args),
        Verb::Verify(args) => verify::run(common, args),
        Verb::Gc(args) => gc::run(common, args),
        Verb::Copy(args) => copy::run(common, args),
        Verb::Key(args) => key::run(common, args),
        Verb::Compact(args) => compact::run(common, args),
        Verb::Export(args) => export::run(common, args),
        Verb::Import(args) => import::run(common, args),
    }
}

/// Which store.
#[derive(Debug, clap::Args)]
pub struct StoreArgs {
    /// Where the checkpoints lie: a directory, or s3://BUCKET/PREFIX.
    #[arg(long, value_name = "STORE")]
    store: String,
    /// The file of the store's key, if it is sealed.
    #[arg(long, value_name = "FILE")]
    encrypt: Option<PathBuf>,
}

impl StoreArgs {
    /// The key, if there is one.
    fn key(&self) -> Result<Option<StoreKey>> {
        self.encrypt.as_deref().map(StoreKey::load).transpose()
    }

    /// Opens it.
    pub(super) fn open(&self) -> Result<Vault> {
        Vault::open(crate::store::open(&self.store)?, self.key()?.as_ref())
    }
}

/// A store as it is; in place of one that is not there yet an empty one in memory, for whoever only looks.
fn open_or_imagine(store: Arc<dyn Store>, key: Option<&StoreKey>) -> Result<Vault> {
    if store.contains(name::STORE)? {
        return Vault::open(store, key);
    }
    Vault::create(Arc::new(MemoryStore::new()), key)
}

/// How long ago a time is, for people: the unit that fits.
fn show_age(unix_ms: u64) -> String {
    let seconds = now_unix_ms().saturating_sub(unix_ms) / 1000;
    match seconds {
        0..120 => format!("{seconds} s"),
        120..7200 => format!("{} min", seconds / 60),
        7200..172_800 => format!("{} h", seconds / 3600),
        _ => format!("{} d", seconds / 86_400),
    }
}

/// A count and what is counted.
fn count(number: usize, one: &str) -> String {
    if number == 1 { format!("1 {one}") } else { format!("{number} {one}s") }
}

/// Bytes of a sum, for people.
fn show_sum(bytes: impl Iterator<Item = u64>) -> String {
    show_bytes(bytes.fold(0, u64::saturating_add))
}

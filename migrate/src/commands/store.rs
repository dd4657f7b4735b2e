//! `migrate store`: what lies in a store of checkpoints, one verb a file.

mod compact;
mod export;
mod import;

use crate::cli::Common;
use crate::error::Result;
use crate::seal::StoreKey;
use crate::vault::Vault;
use clap::Subcommand;
use std::path::PathBuf;
use std::process::ExitCode;

/// What to do with a store.
#[derive(Debug, Subcommand)]
pub enum Verb {
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
        Verb::Compact(args) => compact::run(common, args),
        Verb::Export(args) => export::run(common, args),
        Verb::Import(args) => import::run(common, args),
    }
}

/// Which store.
#[derive(Debug, clap::Args)]
struct StoreArgs {
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
    fn open(&self) -> Result<Vault> {
        Vault::open(crate::store::open(&self.store)?, self.key()?.as_ref())
    }
}

//! `migrate store key`: make a key to seal stores with.

use crate::cli::Common;
use crate::commands::{emit, say};
use crate::error::Result;
use crate::seal::StoreKey;
use std::path::PathBuf;
use std::process::ExitCode;

/// Where.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Example:
  migrate store key /etc/migrate/store.key
  migrate checkpoint web --store /var/lib/checkpoints --encrypt /etc/migrate/store.key

Whoever has this file can read every checkpoint of the stores that are sealed with it, and without it nobody can: keep a copy elsewhere.")]
pub(super) struct Args {
    /// The file to make, which only its owner may read. One that is there is not replaced.
    #[arg(value_name = "FILE")]
    file: PathBuf,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    StoreKey::generate(&args.file)?;
    if common.json {
        emit(&serde_json::json!({"event": "key-made", "file": args.file}));
    } else {
        say(&format!(
            "made the key {}: without it nothing that is sealed with it can be read, so keep a copy elsewhere",
            args.file.display()
        ));
    }
    Ok(ExitCode::SUCCESS)
}

//! `migrate store import`: a checkpoint from an archive.

use super::{StoreArgs, count, open_or_imagine};
use crate::archive;
use crate::cli::Common;
use crate::commands::{cancel_on_signals, emit, say};
use crate::error::{Error, Result};
use crate::units::{self, show_bytes};
use crate::vault::Vault;
use serde_json::json;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

/// Which archive.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store import --store /var/lib/checkpoints web.tar --dry-run
  migrate store import --store /var/lib/checkpoints web.tar
  ssh host1 migrate store export --store /var/lib/checkpoints web --archive - | migrate store import --store /srv/checkpoints -

The archive is one that migrate store export --archive wrote. All of it is read back and checked before the checkpoint exists. A store
that is not there is made; --encrypt names the key of the store the archive is of, if that is sealed.")]
pub struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// The archive; - is the standard input.
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// Read the archive and say what would be taken in, and take in nothing. What of it is damaged is found by the import itself.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for whoever else writes to the store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let mut input: Box<dyn Read> = if args.file == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        let opened = File::open(&args.file);
        Box::new(
            opened
                .map_err(|error| Error::Usage(format!("{} cannot be read: {error}", args.file.display())))?,
        )
    };
    let store = crate::store::open(&args.store.store)?;
    if args.dry_run {
        let place = store.place();
        let vault = open_or_imagine(store, args.store.key()?.as_ref())?;
        let would = archive::import_forecast(&vault, &mut *input, &cancel)?;
        if common.json {
            emit(&json!({
                "event": "would-import", "id": would.id, "checkpoints": would.checkpoints, "objects": would.objects,
                "bytes": would.bytes,
            }));
        } else {
            let (number, bytes) = (count(would.checkpoints, "checkpoint"), show_bytes(would.bytes));
            say(&format!("{}: {number} that {place} has not would be taken in, {bytes}", would.id));
        }
        return Ok(ExitCode::SUCCESS);
    }
    let lease = store.lock_within("migrate store import", args.wait)?;
    let vault = Vault::open_or_create(store, args.store.key()?.as_ref())?;
    let done = archive::import(&vault, &mut *input, &*lease, &cancel)?;
    if common.json {
        emit(&json!({
            "event": "imported", "id": done.id, "checkpoints": done.checkpoints, "objects": done.objects, "bytes": done.bytes,
        }));
    } else if done.checkpoints == 0 {
        say(&format!("{} was here already, and so was all that it stands on", done.id));
    } else {
        let (number, bytes) = (count(done.checkpoints, "checkpoint"), show_bytes(done.bytes));
        say(&format!("{}: {number} not here before, {bytes} written", done.id));
    }
    Ok(ExitCode::SUCCESS)
}

//! `migrate store copy`: checkpoints, with all that they stand on, to another store.

use super::{count, open_or_imagine};
use crate::cli::Common;
use crate::commands::{cancel_on_signals, emit, say};
use crate::error::{Error, Result};
use crate::seal::StoreKey;
use crate::store;
use crate::units::{self, show_bytes};
use crate::upkeep::copy::{Step, copy, copy_forecast};
use crate::vault::Vault;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// From where to where, and what.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store copy /var/lib/checkpoints s3://backup/vms --dry-run
  migrate store copy /var/lib/checkpoints s3://backup/vms
  migrate store copy /var/lib/checkpoints /mnt/usb web@latest --encrypt-to usb.key

What a checkpoint stands on, and the other members of its group, come along. Everything is checked on the way. What is there already is
not copied again, so a copy that was interrupted goes on where it stood.")]
pub struct Args {
    /// The store to copy from: a directory, or s3://BUCKET/PREFIX.
    #[arg(value_name = "FROM")]
    from: String,
    /// The store to copy to; it is made if it is not there.
    #[arg(value_name = "TO")]
    to: String,
    /// Which checkpoints, as for migrate restore [default: all].
    #[arg(value_name = "CHECKPOINT")]
    checkpoints: Vec<String>,
    /// The file of the first store's key, if it is sealed.
    #[arg(long, value_name = "FILE")]
    encrypt: Option<PathBuf>,
    /// The file of the second store's key [default: that of the first].
    #[arg(long, value_name = "FILE")]
    encrypt_to: Option<PathBuf>,
    /// Leave the second store unsealed although the first one is sealed.
    #[arg(long, conflicts_with = "encrypt_to")]
    decrypt: bool,
    /// Say what would be copied, and copy nothing.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for whoever else writes to the second store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let load = |path: &Option<PathBuf>| path.as_deref().map(StoreKey::load).transpose();
    let key = load(&args.encrypt)?;
    let key_to = match &args.encrypt_to {
        None if args.decrypt => None,
        None => key.clone(),
        given => load(given)?,
    };
    let from = Vault::open(store::open(&args.from)?, key.as_ref())?;
    let wanted = if args.checkpoints.is_empty() {
        from.manifests()?.committed.into_iter().map(|found| found.manifest.id).collect()
    } else {
        args.checkpoints.iter().map(|name| from.resolve(name)).collect::<Result<Vec<_>>>()?
    };
    let to = store::open(&args.to)?;
    let place = to.place();
    let lease = if args.dry_run { None } else { Some(to.lock_within("migrate store copy", args.wait)?) };
    let to = match &lease {
        Some(_) => Vault::open_or_create(to, key_to.as_ref())?,
        None => open_or_imagine(to, key_to.as_ref())?,
    };
    if from.info().id == to.info().id {
        return Err(Error::Usage(format!("{} and {} are one store", from.place(), place)));
    }
    let mut watch = |Step { id, before, of }: Step| {
        if cancel.is_set() {
            return Err(Error::Interrupted("what was copied is there; the next time it goes on".into()));
        }
        if common.json {
            let event = if args.dry_run { "would-copy" } else { "copying" };
            emit(&serde_json::json!({"event": event, "checkpoint": id, "before": before, "of": of}));
        } else if args.dry_run {
            say(&format!("would copy {id}"));
        } else {
            say(&format!("{id} ({} of {of})", before + 1));
        }
        Ok(())
    };
    let copied = match &lease {
        Some(lease) => copy(&from, &to, &**lease, &wanted, &mut watch)?,
        None => copy_forecast(&from, &to, &wanted, &mut watch)?,
    };
    if common.json {
        emit(&serde_json::json!({
            "event": "copied",
            "dry_run": args.dry_run,
            "from": from.place(),
            "to": place,
            "copied": copied.copied,
            "present": copied.present,
            "bytes": copied.bytes,
        }));
    } else {
        let present = match copied.present.len() {
            0 => String::new(),
            number => format!("; {number} were there already"),
        };
        let what = count(copied.copied.len(), "checkpoint");
        let done = if args.dry_run { "would be copied" } else { "copied" };
        say(&format!("{what} {done} to {place}, {}{present}", show_bytes(copied.bytes)));
    }
    Ok(ExitCode::SUCCESS)
}

//! `migrate store gc`: delete what no checkpoint needs any more.

use super::{StoreArgs, count, show_sum};
use crate::cli::Common;
use crate::commands::{cancel_on_signals, emit, say};
use crate::error::{Error, Result};
use crate::units;
use crate::upkeep::collect::{Removal, collect, plan};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

/// How much.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store gc --store /var/lib/checkpoints --dry-run
  migrate store gc --store /var/lib/checkpoints --grace 10min

Deleted is what no manifest reaches: of checkpoints that were given up, and what crashes left. Until the grace period is over it
stays, so that whoever reads it may end. It may be stopped at any time: the next time it goes on.")]
pub(super) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// How long something stays after nothing needs it any more.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = units::duration)]
    grace: Duration,
    /// Say what would be deleted, and delete nothing.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for whoever else writes to the store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let vault = args.store.open()?;
    let lease =
        if args.dry_run { None } else { Some(vault.store().lock_within("migrate store gc", args.wait)?) };
    let removals = plan(&vault, SystemTime::now(), args.grace)?;
    let mut tell = |removal: &Removal| {
        if cancel.is_set() {
            return Err(Error::Interrupted(
                "what was deleted was not needed; the rest is for the next time".into(),
            ));
        }
        let Removal { name, bytes, leftover } = removal;
        if common.json {
            let event = if args.dry_run { "would-delete" } else { "deleting" };
            emit(&serde_json::json!({"event": event, "object": name, "bytes": bytes, "leftover": leftover}));
        } else if args.dry_run {
            say(&format!("would delete {name}"));
        }
        Ok(())
    };
    let bytes = match &lease {
        Some(lease) => collect(&vault, &**lease, &removals, &mut tell)?,
        None => {
            removals.iter().try_for_each(&mut tell)?;
            removals.iter().map(|removal| removal.bytes).sum()
        }
    };
    if common.json {
        let collected = serde_json::json!({
            "event": "collected",
            "store": vault.place(),
            "dry_run": args.dry_run,
            "objects": removals.len(),
            "bytes": bytes,
        });
        emit(&collected);
    } else {
        let done = if args.dry_run { "would be deleted; nothing was changed" } else { "deleted" };
        say(&format!("{} ({}) {done}", count(removals.len(), "object"), show_sum([bytes].into_iter())));
    }
    Ok(ExitCode::SUCCESS)
}

//! `migrate store compact`: merge a chain into a new full checkpoint.

use super::StoreArgs;
use crate::cli::Common;
use crate::commands::{cancel_on_signals, emit, say};
use crate::compact::{Forecast, compact};
use crate::error::{Error, Result};
use crate::restore::image::Image;
use crate::units::{self, show_bytes};
use protocol::page::PAGE_SIZE;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Which checkpoint.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  migrate store compact --store /var/lib/checkpoints web --dry-run
  migrate store compact --store /var/lib/checkpoints 20261123T194831Z-3f9a1c07

The new checkpoint has the memory, the state and the time of the old one, a name of its own, and stands on nothing. The old ones stay as they
are, with all that stands on them, until migrate store prune gives them up. No VM is touched. A member of a group is compacted
alone: the new checkpoint belongs to no group.")]
pub(super) struct Args {
    #[command(flatten)]
    store: StoreArgs,
    /// Its name or the beginning of it, a time (the newest until then), a VM's name, VM@latest or VM@TIME, or latest.
    #[arg(value_name = "CHECKPOINT")]
    checkpoint: String,
    /// Say what would be done, and do nothing.
    #[arg(long)]
    dry_run: bool,
    /// How long to wait for whoever else writes to the store.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = units::duration)]
    wait: Duration,
}

pub(super) fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let cancel = cancel_on_signals()?;
    let vault = args.store.open()?;
    let lock = || vault.store().lock_within("migrate store compact", args.wait);
    let lease = if args.dry_run { None } else { Some(lock()?) };
    let id = vault.resolve(&args.checkpoint)?;
    let image = Image::open(&vault, id)?;
    let forecast =
        Forecast::of(&image).ok_or_else(|| Error::Store(format!("checkpoint {id} has no chain")))?;
    let data_bytes = forecast.data_pages * PAGE_SIZE as u64;
    let Some(lease) = lease.filter(|_| forecast.is_needed) else {
        if common.json {
            emit(&json!({
                "event": "would-compact", "id": id, "links": forecast.links, "needed": forecast.is_needed,
                "data_bytes": data_bytes, "stored_bytes": forecast.stored_bytes,
            }));
        } else if forecast.is_needed {
            say(&format!(
                "would merge {} links of {id}: {} of memory, {} as it is stored",
                forecast.links,
                show_bytes(data_bytes),
                show_bytes(forecast.stored_bytes)
            ));
        } else {
            say(&format!("{id} is a full checkpoint with data of its own: there is nothing to merge"));
        }
        return Ok(ExitCode::SUCCESS);
    };
    let made = compact(&vault, &image, &*lease, &cancel)?.manifest;
    let written =
        made.segments.iter().map(|segment| segment.bytes).sum::<u64>() + made.index.bytes + made.state.bytes;
    if common.json {
        emit(&json!({
            "event": "compacted", "id": made.id, "from": id, "links": forecast.links, "data_bytes": data_bytes,
            "stored_bytes": forecast.stored_bytes, "written_bytes": written,
        }));
    } else {
        say(&format!(
            "{} is {} links of {id} in one: {} of memory, {} written",
            made.id,
            forecast.links,
            show_bytes(data_bytes),
            show_bytes(written)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

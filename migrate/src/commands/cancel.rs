//! `migrate cancel`: stop a running migration, or a series of checkpoints; the VM goes on where it is.

use super::status::{Either, connect_either};
use super::{emit, say};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::steer::{Client, Place};
use crate::units;
use protocol::steer::Outcome;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Which migration to stop.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate cancel web

The VM goes on at the source. Behind the commit, which takes milliseconds, it is too late: the move is finished, and this
fails with exit code 4. Of a VM that does not move the series of checkpoints is ended, as by Ctrl-C: what exists stays, and one that is under way is given up.")]
pub struct Args {
    /// The VM that moves, or of which checkpoints are taken.
    #[arg(value_name = "VM")]
    vm: String,
    /// How long to wait until it has stopped.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = units::duration)]
    wait: Duration,
}

/// Runs the verb.
///
/// # Errors
/// `Workload` when there is no such migration, or it is too late.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let runtime = RuntimeDir::open(common.runtime_dir.as_deref())?;
    let name = &args.vm;
    let mut client = match connect_either(&Place::open(&runtime)?, &Place::of_series(&runtime)?, name)? {
        Either::Migration(client) => client,
        Either::Series(client) => return end_series(common, args, client),
    };
    if !client.cancel()? {
        return Err(Error::Workload(format!(
            "the migration of {name} is behind its commit and cannot be cancelled any more: it will be finished"
        )));
    }
    let status = client.status_at_end(args.wait)?;
    match status.outcome {
        None => Err(Error::TimedOut { what: "the cancelled migration to end", after: args.wait }),
        Some(Outcome::Failed) => {
            let (migration, reason) = (status.migration, status.reason);
            if common.json {
                emit(&json!({"event": "cancelled", "name": name, "migration": migration, "reason": reason}));
            } else {
                say(&format!(
                    "{name} does not move: {}",
                    reason.unwrap_or_else(|| "it was cancelled".into())
                ));
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(Outcome::Moved | Outcome::InDoubt) => Err(Error::Workload(format!(
            "the migration of {name} came to its commit all the same: see migrate vm list"
        ))),
    }
}

fn end_series(common: &Common, args: &Args, mut client: Client) -> Result<ExitCode> {
    let name = &args.vm;
    if !client.cancel()? {
        return Err(Error::Workload(format!("the series of checkpoints of {name} is over already")));
    }
    let series = client.series_at_end(args.wait)?;
    if !series.ended {
        return Err(Error::TimedOut { what: "the series of checkpoints to end", after: args.wait });
    }
    if common.json {
        emit(&json!({"event": "cancelled", "name": name, "taken": series.taken, "failed": series.failed}));
    } else {
        say(&format!(
            "no further checkpoint of {name} is taken: {} were, {} failed",
            series.taken, series.failed
        ));
    }
    Ok(ExitCode::SUCCESS)
}

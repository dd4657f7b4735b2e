//! `migrate cancel`: stop a running migration; the VM goes on where it is.

use super::status::connect;
use super::{emit, say};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::steer::Place;
use crate::units;
use protocol::steer::Outcome;
use serde_json::json;
use std::process::ExitCode;
use std::time::Duration;

/// Which migration to stop.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example: migrate cancel web

The VM goes on at the source. Behind the commit, which takes milliseconds, it is too late: the move is finished, and this
fails with exit code 4.")]
pub struct Args {
    /// The VM that moves.
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
    let place = Place::open(&RuntimeDir::open(common.runtime_dir.as_deref())?)?;
    let name = &args.vm;
    let mut client = connect(&place, name)?;
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

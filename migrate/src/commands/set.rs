//! `migrate set`: other limits for a running migration.

use super::status::{connect, show};
use crate::cli::Common;
use crate::converge::{OnStall, OnTimeout};
use crate::error::Result;
use crate::paths::RuntimeDir;
use crate::report::micros;
use crate::steer::Place;
use crate::units;
use clap::ValueEnum;
use protocol::steer::Limits;
use std::process::ExitCode;
use std::time::Duration;

/// What to change.
#[derive(Debug, clap::Args)]
#[command(
    arg_required_else_help = true,
    after_help = "Example: migrate set web --downtime 200ms --bandwidth 2Gbit/s

What is not named stays. It holds from the engine's next decision on."
)]
pub struct Args {
    /// The VM that moves away from this host.
    #[arg(value_name = "VM")]
    vm: String,
    #[command(flatten)]
    change: Change,
}

/// As migrate send has them.
#[derive(Debug, clap::Args)]
#[group(required = true, multiple = true)]
struct Change {
    /// The downtime to aim at.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    downtime: Option<Duration>,
    /// The longest downtime of a move that stalled.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    max_downtime: Option<Duration>,
    /// The most rounds, with those that are over.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: Option<u32>,
    /// The longest time, with what is over of it.
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// What to do when rounds or time are used up.
    #[arg(long, value_enum, value_name = "WHAT")]
    on_timeout: Option<OnTimeout>,
    /// What to do when what remains no longer falls.
    #[arg(long, value_enum, value_name = "WHAT,…", value_delimiter = ',')]
    on_stall: Option<Vec<OnStall>>,
    /// The most that a stalled VM is slowed down, in percent.
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    max_throttle: Option<u8>,
    /// Start the VM at the destination behind N rounds, and let its memory follow.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    post_copy: Option<u32>,
    /// The most that the page streams may carry, for instance 2Gbit/s or 250MB/s; none lifts the cap.
    #[arg(long, value_name = "RATE", value_parser = cap)]
    bandwidth: Option<u64>,
}

/// Runs the verb.
///
/// # Errors
/// `Usage` when the migration refuses a value, `Workload` when there is none.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let place = Place::open(&RuntimeDir::open(common.runtime_dir.as_deref())?)?;
    let mut client = connect(&place, &args.vm)?;
    client.set(&args.change.limits())?;
    show(common, &client.status()?);
    Ok(ExitCode::SUCCESS)
}

impl Change {
    fn limits(&self) -> Limits {
        Limits {
            downtime_us: self.downtime.map(micros),
            max_downtime_us: self.max_downtime.map(micros),
            max_rounds: self.max_rounds,
            timeout_us: self.timeout.map(micros),
            on_timeout: self.on_timeout.as_ref().and_then(word),
            on_stall: self.on_stall.as_ref().map(|all| all.iter().filter_map(word).collect()),
            max_throttle_percent: self.max_throttle,
            post_copy_after: self.post_copy,
            bandwidth_bytes_per_s: self.bandwidth,
        }
    }
}

fn word<T: ValueEnum>(value: &T) -> Option<String> {
    Some(value.to_possible_value()?.get_name().to_owned())
}

/// A cap on the bandwidth; 0 for `none`.
fn cap(text: &str) -> std::result::Result<u64, String> {
    if text == "none" { Ok(0) } else { units::bandwidth(text) }
}

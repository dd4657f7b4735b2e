//! `migrate set`: other limits for a running migration.

use super::limits::{LimitArgs, without_default};
use super::status::{connect, show};
use crate::cli::Common;
use crate::error::{Error, Result};
use crate::paths::RuntimeDir;
use crate::steer::Place;
use crate::units;
use protocol::steer::Limits;
use std::process::ExitCode;

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

/// The cap, and the limits as migrate send has them.
#[derive(Debug, clap::Args)]
#[command(mut_args = without_default)]
struct Change {
    /// The most that the page streams may carry, for instance 2Gbit/s or 250MB/s; none lifts the cap.
    #[arg(long, value_name = "RATE", value_parser = cap)]
    bandwidth: Option<u64>,
    #[command(flatten)]
    limits: LimitArgs,
}

/// Runs the verb.
///
/// # Errors
/// `Usage` when the migration refuses a value, `Workload` when there is none.
pub fn run(common: &Common, args: &Args) -> Result<ExitCode> {
    let change = args.change.limits()?;
    let place = Place::open(&RuntimeDir::open(common.runtime_dir.as_deref())?)?;
    let mut client = connect(&place, &args.vm)?;
    client.set(&change)?;
    show(common, &client.status()?);
    Ok(ExitCode::SUCCESS)
}

impl Change {
    fn limits(&self) -> Result<Limits> {
        let limits = Limits { bandwidth_bytes_per_s: self.bandwidth, ..self.limits.changes() };
        if limits == Limits::default() {
            return Err(Error::Usage(
                "nothing was named to change: migrate set --help lists what can be".into(),
            ));
        }
        Ok(limits)
    }
}

/// A cap on the bandwidth; 0 for `none`.
fn cap(text: &str) -> std::result::Result<u64, String> {
    if text == "none" { Ok(0) } else { units::bandwidth(text) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::{CommandFactory as _, Parser};

    #[derive(Debug, Parser)]
    struct Set {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn it_takes_the_limits_of_a_move_and_changes_what_was_named() {
        let set =
            Set::try_parse_from(["set", "web", "--max-rounds", "9", "--post-copy", "--bandwidth", "none"])
                .unwrap();
        let limits = set.args.change.limits().unwrap();
        let named = Limits {
            max_rounds: Some(9),
            post_copy_after: Some(1),
            bandwidth_bytes_per_s: Some(0),
            ..Limits::default()
        };
        assert_eq!(limits, named);
        let one = Set::try_parse_from(["set", "web", "--on-stall", "throttle,post-copy"]).unwrap();
        assert_eq!(one.args.change.limits().unwrap().on_stall.unwrap(), ["throttle", "post-copy"]);
        Set::try_parse_from(["set", "web", "--bandwidth", "2Gbit/s"]).unwrap();
    }

    #[test]
    fn something_must_be_named_and_no_default_is_promised() {
        let nothing = Set::try_parse_from(["set", "web"]).unwrap();
        assert!(matches!(nothing.args.change.limits(), Err(Error::Usage(_))));
        let help = Set::command().render_long_help().to_string();
        assert!(help.contains("--max-throttle") && !help.contains("[default"), "{help}");
    }
}

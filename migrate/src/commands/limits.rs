//! When to freeze and how long to try, as an operator says it.

use crate::converge::{Limits, OnStall, OnTimeout};
use crate::report::micros;
use crate::units;
use clap::ValueEnum;
use protocol::steer;
use std::time::Duration;

/// Changes to [`Limits`]; what is not named stays as it is: of a new move the default in brackets, of a running one what it
/// has.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "When to stop")]
pub(super) struct LimitArgs {
    /// The downtime to aim at [default: 50ms].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    downtime: Option<Duration>,
    /// The longest downtime of a move that stalled: see --on-stall [default: 300ms].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    max_downtime: Option<Duration>,
    /// The most rounds before --on-timeout decides [default: 30].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    max_rounds: Option<u32>,
    /// The longest time before --on-timeout decides [default: 10m].
    #[arg(long, value_name = "TIME", value_parser = units::duration)]
    timeout: Option<Duration>,
    /// What to do when rounds or time are used up: leave the VM here, move it whatever the downtime, or move it and
    /// let its memory follow [default: cancel].
    #[arg(long, value_enum, value_name = "WHAT")]
    on_timeout: Option<OnTimeout>,
    /// What to do when what remains no longer falls: the first that is possible of freezing at a minimum within
    /// --max-downtime, slowing the VM down, letting its memory follow, and leaving the VM here
    /// [default: minimum,throttle,post-copy,cancel].
    #[arg(long, value_enum, value_name = "WHAT,…", value_delimiter = ',')]
    on_stall: Option<Vec<OnStall>>,
    /// The most that a stalled VM is slowed down, as the share of time in which it stands still [default: 80].
    #[arg(long, value_name = "PERCENT", value_parser = clap::value_parser!(u8).range(0..=99))]
    max_throttle: Option<u8>,
    /// Start the VM at the destination behind N rounds (1 if no number is given) that were not enough, and let its
    /// memory follow.
    #[arg(
        long, value_name = "N", num_args = 0..=1, require_equals = true, default_missing_value = "1",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    post_copy: Option<u32>,
}

impl LimitArgs {
    /// These limits with the changes in them.
    pub(super) fn over(&self, limits: &Limits) -> Limits {
        let limits = limits.clone();
        Limits {
            downtime: self.downtime.unwrap_or(limits.downtime),
            max_downtime: self.max_downtime.unwrap_or(limits.max_downtime),
            max_rounds: self.max_rounds.unwrap_or(limits.max_rounds),
            timeout: self.timeout.unwrap_or(limits.timeout),
            on_timeout: self.on_timeout.unwrap_or(limits.on_timeout),
            on_stall: self.on_stall.clone().unwrap_or(limits.on_stall),
            max_throttle_percent: self.max_throttle.unwrap_or(limits.max_throttle_percent),
            post_copy_after: self.post_copy.or(limits.post_copy_after),
        }
    }

    /// The changes, for a migration that runs.
    pub(super) fn changes(&self) -> steer::Limits {
        steer::Limits {
            downtime_us: self.downtime.map(micros),
            max_downtime_us: self.max_downtime.map(micros),
            max_rounds: self.max_rounds,
            timeout_us: self.timeout.map(micros),
            on_timeout: self.on_timeout.as_ref().and_then(word),
            on_stall: self.on_stall.as_ref().map(|all| all.iter().filter_map(word).collect()),
            max_throttle_percent: self.max_throttle,
            post_copy_after: self.post_copy,
            bandwidth_bytes_per_s: None,
        }
    }
}

fn word<T: ValueEnum>(value: &T) -> Option<String> {
    Some(value.to_possible_value()?.get_name().to_owned())
}

/// The help of an option without the default that it has in a new move.
pub(super) fn without_default(option: clap::Arg) -> clap::Arg {
    let help = option.get_help().map(ToString::to_string).unwrap_or_default();
    match help.split_once(" [default: ") {
        Some((help, _)) => option.help(help.to_owned()),
        None => option,
    }
}
